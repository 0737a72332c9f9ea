"""A few minutes of SynergyNet on three more real collections, with the tables the notebook experiments/02_real_data shows.

    MEDSEG_DATA=folder python benchmarks/real_data.py --minutes 4 --out results

chaos_mr (abdominal MRI), acdc and sunnybrook (cardiac MRI). Splits are by person; few people are left for testing, so read the spread, not only the mean.
"""
import argparse
import sys
from pathlib import Path

import torch

from medseg_nb.core import data_root
from medseg_nb.data.collections import load_collection, png_pairs_to_collection
from medseg_nb.explain.report import score_run, write_report
from medseg_nb.training.supervised import Recipe, train


def open_collection(name, root, work):
    "A collection by name; sunnybrook's PNG pairs are converted first."
    if name != "sunnybrook": return load_collection(root/name)
    made = work/"sunnybrook-nifti"
    if made.exists(): return load_collection(made)
    return png_pairs_to_collection(root/name/"Images", root/name/"Labels", made, name, {0: "background", 1: "LV"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4); parser.add_argument("--out", default="results")
    parser.add_argument("--runs", default="runs/real-data")
    parser.add_argument("--sets", default="chaos_mr,acdc,sunnybrook")
    args = parser.parse_args()
    root = data_root()
    if root is None: sys.exit("skipped: MEDSEG_DATA is not set")
    for name in args.sets.split(","):
        if not (root/name).is_dir(): print(f"{name}: skipped, not below MEDSEG_DATA"); continue
        collection = open_collection(name, root, Path(args.runs))
        run = train("synergynet-8s2h", collection, Recipe.teach(collection, minutes=args.minutes), Path(args.runs)/name, resume=True)
        frame, out = score_run(run), Path(args.out)/name
        out.mkdir(parents=True, exist_ok=True)
        frame.to_csv(out/"cases.csv", index=False, float_format="%.5g"); run.history.to_csv(out/"epochs.csv", index=False, float_format="%.5g")
        counts = f"{len(run.split['train'])} training, {len(run.split['test'])} test cases; {run.recipe.dims}D"
        (out/"command.txt").write_text(f"MEDSEG_DATA=... python benchmarks/real_data.py --minutes {args.minutes:g} --sets {name}\n"
                                       f"{torch.get_num_threads()} CPU threads, PyTorch {torch.__version__}; {counts}\n")
        print(name, frame.groupby("class", sort=False)[["DSC", "HD95"]].mean().round(3).to_dict("index"), write_report(run.folder), flush=True)


if __name__ == "__main__": main()
