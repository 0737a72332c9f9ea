"""Organs in 3D: surfaces of eight classes in 256 x 256 x 100 voxels, truth and prediction; ours beside plain marching cubes and VTK.

    python benchmarks/surfaces.py              # about two minutes
    python benchmarks/surfaces.py --rounds 7 --threads 1

Rows add up: marching cubes alone (scikit-image, all triangles kept), our surfaces (smoothed, simplified, with distances), and the whole of
`render_surfaces` with the page and the still picture. VTK (flying edges, windowed sinc, quadric decimation) does what our surfaces do, without the
distances; it is left out where it is not installed. The size of the page, and the share of volume that is lost, are printed below.
"""
import tempfile
from importlib.util import find_spec
from pathlib import Path

import measure
import numpy as np
from skimage.measure import marching_cubes

from medseg_nb.explain.surfaces import make_surfaces, render_surfaces, surface_mesh

SHAPE, SPACING, CLASSES = (256, 256, 100), (0.8, 0.8, 3.0), 8


def organs(seed=0):
    "Bent ellipsoids on a circle: (X,Y,Z) uint8."
    rng, labels = np.random.default_rng(seed), np.zeros(SHAPE, np.uint8)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE], indexing="ij"), -1)
    for c in range(1, CLASSES+1):
        middle = np.array([.55*np.cos(2*np.pi*c/CLASSES), .55*np.sin(2*np.pi*c/CLASSES), rng.uniform(-.3, .3)], np.float32)
        bend = .06*np.sin(grid @ rng.uniform(-9, 9, (3, 3)).astype(np.float32))
        labels[(((grid-middle+bend)/rng.uniform(.2, .35, 3).astype(np.float32))**2).sum(-1) < 1] = c
    return labels


def plain(volumes):
    "scikit-image alone: every class of every volume, nothing smoothed or left out; the number of triangles."
    return sum(len(marching_cubes(np.pad(v == c, 1).astype(np.float32), .5, spacing=SPACING)[1]) for v in volumes for c in range(1, CLASSES+1))


def by_vtk(volumes, triangles):
    "The same with VTK's filters; the number of triangles."
    import vtk
    from vtk.util.numpy_support import numpy_to_vtk
    total = 0
    for volume in volumes:
        padded = np.pad(volume, 1)
        image = vtk.vtkImageData()
        image.SetDimensions(*padded.shape)
        image.SetSpacing(*SPACING)
        image.GetPointData().SetScalars(numpy_to_vtk(padded.ravel(order="F"), deep=True))
        for c in range(1, CLASSES+1):
            cubes, smooth, light = vtk.vtkDiscreteFlyingEdges3D(), vtk.vtkWindowedSincPolyDataFilter(), vtk.vtkQuadricDecimation()
            cubes.SetInputData(image)
            cubes.SetValue(0, c)
            smooth.SetInputConnection(cubes.GetOutputPort())
            smooth.SetNumberOfIterations(20)
            smooth.Update()
            light.SetInputConnection(smooth.GetOutputPort())
            light.SetTargetReduction(max(0, 1 - triangles/CLASSES/len(volumes)/smooth.GetOutput().GetNumberOfPolys()))
            light.Update()
            total += light.GetOutput().GetNumberOfPolys()
    return total


def main():
    args = measure.arguments(__doc__, 3)
    truth = organs()
    pred, counts = np.roll(truth, 3, 0), {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)/"organs.html"
        ours = dict(pred=pred, truth=truth, affine=SPACING)
        runs = {"marching cubes alone": lambda: plain((truth, pred)),
                "make_surfaces": lambda: sum(len(l.surface.faces) for l in make_surfaces(**ours).layers if l.panel != "difference"),
                "render_surfaces, page and still": lambda: render_surfaces(**ours, out=out) and None}
        if find_spec("vtk"): runs["VTK, no distances"] = lambda: by_vtk((truth, pred), 60_000)
        else: print("VTK is not installed: its row is left out")
        rows = {name: lambda lap, name=name, run=run: counts.__setitem__(name, run()) for name, run in runs.items()}
        seconds = measure.in_turn(rows, args.rounds, args.clock)
        size = f"{out.stat().st_size/1e6:.2f} MB, still {out.with_suffix('.png').stat().st_size/1e6:.2f} MB"
    ms, ratio = measure.medians(seconds), measure.ratios(seconds, "marching cubes alone")
    measure.table(f"{CLASSES} classes in {' x '.join(map(str, SHAPE))}, truth and prediction", [("s", ".2f"), ("ratio", ".2f"), ("triangles", ",")],
                  {name: (ms[name][-1]/1e3, ratio[name], counts[name] if counts[name] else "") for name in rows})
    lost = [1 - surface_mesh(truth == c, SPACING, triangles=3750).volume/((truth == c).sum()*np.prod(SPACING)) for c in range(1, CLASSES+1)]
    print(f"\npage {size}; volume against voxels with 3,750 triangles an organ: {-100*max(lost):+.2f} to {-100*min(lost):+.2f} %")


if __name__ == "__main__": main()
