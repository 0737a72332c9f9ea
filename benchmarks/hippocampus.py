"""Ten minutes of training on real patients: SynergyNet and UNet of this package beside MONAI's 3D UNet.

    MEDSEG_DATA=folder python benchmarks/hippocampus.py --minutes 10 --out results/hippocampus

Every row trains on the same cases for the same wall-clock time on this machine and is scored by the same code on the same unseen cases
(id-block split: neighbouring ids, probably two sides of one person, stay together). Needs the `hippocampus` collection below MEDSEG_DATA.
"""
import argparse
import sys
from pathlib import Path
from time import monotonic

import numpy as np
import pandas as pd
import torch

from medseg_nb.core import find_collection, progress, set_seed
from medseg_nb.data.collections import load_collection, split_cases
from medseg_nb.data.slices import Augment, PatchDataset, Preparation
from medseg_nb.evaluation.cases import evaluate
from medseg_nb.models.zoo import count_parameters
from medseg_nb.training.supervised import Recipe, train

PATCH, BATCH = (48, 64, 48), 4
PEER = "MONAI 3D UNet"


def train_peer(collection, cases, minutes):
    "MONAI's 3D UNet as peers are usually run: DiceCE, AdamW 1e-3 with poly decay, batch 4, flips along two axes, intensity noise."
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet
    set_seed(0)
    samples = PatchDataset(collection, cases, Preparation(dims=3, patch=PATCH), per_case=1, foreground=0.0)
    model = UNet(3, len(collection.channels), len(collection.classes), (16, 32, 64, 128), (2, 2, 2), num_res_units=2, norm="INSTANCE")
    loss, augment = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False), Augment(flips=(0, 2), rotate=0, scale=0, intensity=0.1, noise=0.05)
    optimiser, start, steps, generator = torch.optim.AdamW(model.parameters(), 1e-3), monotonic(), 0, torch.Generator().manual_seed(0)
    rng, bar = np.random.default_rng(0), progress(range(1000), PEER)
    while (done := (monotonic() - start) / (60*minutes)) < 1:
        for group in optimiser.param_groups: group["lr"] = 1e-3 * (1 - done)**0.9
        x, y = map(torch.stack, zip(*[samples[int(i)] for i in rng.choice(len(samples), BATCH, replace=False)], strict=True))
        x, y = augment(x, y, generator)
        optimiser.zero_grad(); loss(model(x), y[:, None]).backward(); optimiser.step()
        steps += 1; bar.update(int(1000*done) - bar.n)
    bar.close()
    return model.eval(), steps


def score(name, model, collection, cases, preparation):
    "Long table of one model."
    return evaluate(model, collection, cases, preparation).assign(model=name)


def row(name, frame, model, steps):
    "One line of the printed table."
    mean = frame.groupby("class", sort=False)[["DSC", "HD95", "ASSD"]].mean()
    cells = {f"DSC {c}": round(v, 4) for c, v in mean["DSC"].items()} | {f"HD95 {c} (mm)": round(v, 3) for c, v in mean["HD95"].items()}
    return {"model": name, **cells, "mean DSC": round(mean["DSC"].mean(), 4), "mean HD95 (mm)": round(mean["HD95"].mean(), 3),
            "mean ASSD (mm)": round(mean["ASSD"].mean(), 3), "M parameters": round(count_parameters(model)/1e6, 2), "steps": steps}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10); parser.add_argument("--out", default="results/hippocampus")
    parser.add_argument("--models", default="peer,synergynet-8s2h,unet-r50"); parser.add_argument("--runs", default="runs/benchmark-hippocampus")
    args = parser.parse_args()
    path = find_collection("hippocampus")
    if path is None: sys.exit("skipped: MEDSEG_DATA holds no hippocampus collection")
    collection = load_collection(path, check=False)
    parts, frames, rows = split_cases(collection, "id-block"), [], []
    counts = f"{len(parts['train'])} training cases, {len(parts['test'])} unseen test cases"
    print(f"{counts}, {torch.get_num_threads()} threads, {args.minutes:g} minutes each", flush=True)
    for name in args.models.split(","):
        if name == "peer":
            model, steps = train_peer(collection, parts["train"], args.minutes)
            name, preparation = PEER, Preparation(dims=3, patch=PATCH)
        else:
            run = train(name, collection, Recipe.teach(collection, minutes=args.minutes, split="id-block"), f"{args.runs}/{name}")
            model, preparation = run.model, run.preparation
            steps = int(run.history["step"].iloc[-1])
        frames.append(score(name, model, collection, parts["test"], preparation))
        rows.append(row(name, frames[-1], model, steps)); print(pd.DataFrame(rows).to_string(index=False), flush=True)
    out = Path(args.out); out.mkdir(parents=True, exist_ok=True)
    pd.concat(frames).to_csv(out/"cases.csv", index=False, float_format="%.5g"); pd.DataFrame(rows).to_csv(out/"summary.csv", index=False)
    (out/"command.txt").write_text(f"MEDSEG_DATA=... python benchmarks/hippocampus.py --minutes {args.minutes:g} --models {args.models}\n"
                                   f"{torch.get_num_threads()} CPU threads, PyTorch {torch.__version__}; {counts}\n")


if __name__ == "__main__": main()
