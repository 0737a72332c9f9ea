"""HD95 + ASSD of seven classes: evaluate_case against MONAI and medpy, interleaved medians.

    python benchmarks/metrics.py            # about a minute
    python benchmarks/metrics.py --rounds 9
"""
import warnings

import measure
import numpy as np

from medseg_nb.evaluation.metrics import evaluate_case

CASES = {"2D 224 x 224": ((224, 224), (0.8, 1.3), 1.0), "3D 128 x 128 x 64": ((128, 128, 64), (0.8, 1.3, 5.0), 1.0),
         "3D, poor": ((128, 128, 64), (0.8, 1.3, 5.0), 2.0)}  # size, mm, error of the prediction in voxels
CLASSES = {c: f"organ {c}" for c in range(8)}


def organs(shape, n=7, seed=0, error=1.0):
    "n ellipsoids in a ring, and a copy of each that is off by about `error` voxels: (prediction, truth)."
    rng, size = np.random.default_rng(seed), np.array(shape)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    pred, truth = np.zeros((2, *shape), np.uint8)
    for c in range(1, n+1):
        centre = size*(0.5 + 0.33*np.array([np.cos(0.9*c), np.sin(0.9*c), 0][:len(shape)]))
        radius = size*rng.uniform(0.10, 0.14, len(shape))
        truth[(((grid-centre)/radius)**2).sum(-1) < 1] = c
        centre, radius = centre + rng.normal(0, error, len(shape)), radius*(1 + 0.07*error*rng.uniform(-1, 1))
        pred[(((grid-centre)/radius)**2).sum(-1) < 1] = c
    return pred, truth


def one_hot(labels, n=7):
    "(X,Y[,Z]) labels -> (1,n+1,X,Y[,Z]) one-hot float tensor, as MONAI wants them."
    import torch
    return torch.from_numpy(np.stack([labels == c for c in range(n+1)])[None].astype(np.float32))


def by_monai(pred, truth, spacing):
    "HD95 and ASSD of the foreground classes from one-hot tensors: (n,2)."
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hd = compute_hausdorff_distance(pred, truth, percentile=95, directed=False, spacing=spacing)
        asd = compute_average_surface_distance(pred, truth, symmetric=True, spacing=spacing)
    return np.stack([hd[0].numpy(), asd[0].numpy()], axis=1)


def by_medpy(pred, truth, spacing, n=7):
    "HD95 and ASSD of classes 1 to n: (n,2)."
    from medpy.metric.binary import assd, hd95
    return np.array([[f(pred == c, truth == c, voxelspacing=spacing) for f in (hd95, assd)] for c in range(1, n+1)])


def distances(pred, truth, spacing, convention="medpy"):
    "HD95 and ASSD by evaluate_case (which computes the other five metrics too): (n,2)."
    return evaluate_case(pred, truth, spacing, CLASSES, convention)[["HD95", "ASSD"]].to_numpy()


def compare(title, shape, spacing, error, args):
    "Print the time of each library, timed in turn, and the largest difference to medpy and MONAI."
    pred, truth = organs(shape, error=error)
    hot = one_hot(pred), one_hot(truth)
    runs = {"evaluate_case": lambda: distances(pred, truth, spacing),
            "MONAI": lambda: by_monai(*hot, spacing),
            "medpy": lambda: by_medpy(pred, truth, spacing)}
    first = {name: run() for name, run in runs.items()}
    apart = {"medpy": np.abs(first["evaluate_case"] - first["medpy"]).max(),
             "MONAI": np.abs(distances(pred, truth, spacing, "monai") - first["MONAI"]).max()}
    seconds = measure.in_turn({name: lambda lap, run=run: run() for name, run in runs.items()}, args.rounds, args.clock)
    ms, ratio = measure.medians(seconds), measure.ratios(seconds, "evaluate_case")
    measure.table(title, [("ms", ".1f"), ("ratio", ".1f"), ("largest difference (mm)", ".1e")],
                  {name: (ms[name][-1], ratio[name], apart.get(name, "")) for name in runs})


def main():
    args = measure.arguments(__doc__, 5)
    for title, (shape, spacing, error) in CASES.items(): compare(title, shape, spacing, error, args)


if __name__ == "__main__": main()
