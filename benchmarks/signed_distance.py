"""Signed distance maps: signed_distance_map against edt's signed distance and SciPy's two transforms, interleaved medians.

    python benchmarks/signed_distance.py            # about a minute
    python benchmarks/signed_distance.py --rounds 15

Ours also finds the boundary and scales both sides to 1; `edt.sdf` gives plain mm. `edt, one side` is a single unsigned transform: less than a signed map needs.
"""
import edt
import measure
import numpy as np
from scipy.ndimage import distance_transform_edt

from medseg_nb.losses import signed_distance_map

CASES = {"3D liver-sized, 128 x 128 x 64": ((), (128, 128, 64), (0.8, 0.8, 3.0)), "3D, 192 x 192 x 128": ((), (192, 192, 128), (1.0, 1.0, 1.0)),
         "2D, batch of 8 x 2 masks of 224 x 224": ((8, 2), (224, 224), (0.8, 0.8))}   # leading axes, axes of space, mm


def lumpy(lead, shape, seed=0):
    "Bent ellipsoids, one a mask: (*lead,*shape) bool."
    rng, grid = np.random.default_rng(seed), np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"), -1)
    masks = np.empty((*lead, *shape), bool)
    for i in np.ndindex(lead):
        bend = 0.12*np.sin(grid @ rng.uniform(-9, 9, (len(shape), len(shape))))
        masks[i] = (((grid - rng.uniform(-0.3, 0.3, len(shape)) + bend)/rng.uniform(0.4, 0.7, len(shape)))**2).sum(-1) < 1
    return masks


def each(f, masks, lead):
    "f of every mask, stacked."
    return np.stack([f(masks[i]) for i in np.ndindex(lead)]).reshape(masks.shape)


def by_scipy(mask, spacing):
    "Outside minus inside, mm."
    return distance_transform_edt(~mask, sampling=spacing) - distance_transform_edt(mask, sampling=spacing)


def compare(title, lead, shape, spacing, args):
    "Print the time of each way, timed in turn, and the largest difference in mm to ours off the boundary."
    masks = lumpy(lead, shape)
    runs = {"signed_distance_map": lambda: signed_distance_map(masks, spacing),
            "signed_distance_map, mm": lambda: signed_distance_map(masks, spacing, normalize=False),
            "edt.sdf": lambda: each(lambda m: -edt.sdf(m, anisotropy=spacing, parallel=1), masks, lead),
            "edt, one side": lambda: each(lambda m: edt.edt(m, anisotropy=spacing, parallel=1), masks, lead),
            "SciPy, two transforms": lambda: each(lambda m: by_scipy(m, spacing), masks, lead)}
    ours = runs["signed_distance_map, mm"]()
    off = ours != 0
    apart = {name: f"{np.abs(runs[name]() - ours)[off].max():.1e}" for name in ("edt.sdf", "SciPy, two transforms")}
    seconds = measure.in_turn({name: lambda lap, run=run: run() for name, run in runs.items()}, args.rounds, args.clock)
    ms, ratio = measure.medians(seconds), measure.ratios(seconds, "edt.sdf")
    measure.table(f"{title}, {masks.mean():.0%} inside", [("ms", ".1f"), ("ratio to edt.sdf", ".2f"), ("largest difference (mm)", "")],
                  {name: (ms[name][-1], ratio[name], apart.get(name, "")) for name in runs})


def main():
    args = measure.arguments(__doc__, 7)
    for title, case in CASES.items(): compare(title, *case, args)


if __name__ == "__main__": main()
