"""What do images without labels add? The runs that experiments/06_half_the_labels reads, and how each collection is put together.

    MEDSEG_DATA=folder python benchmarks/half_labels.py --parts hippocampus-05,hippocampus-10,hippocampus-50,acdc --out results
    python benchmarks/half_labels.py --parts liver-2,liver-3,liver-unet --out results

hippocampus-05, -10, -50   real patients, windows of 32 x 32 x 32; labels of 5, 10 and 50% of the training cases
acdc                       real hearts, slices: two labelled patients, two without labels, one to validate and two to measure
liver-2, liver-3           phantoms, slices: CMAformer's Tables II (all labels and half of them) and III (parts on and off)
liver-main                 the two rows of CMAformer in Table II again, with more seeds
liver-unet                 the same phantoms, a small U-Net under every way of training

Every part trains what is missing, measures the unseen cases and copies its small files to <out>/half_<part>; tumours are counted, too (lesions.csv).
"""
import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from real_pairs import with_split

from medseg_nb.core import data_root
from medseg_nb.data import liver_tumours  # noqa: F401  adds the phantom livers
from medseg_nb.data.collections import load_collection
from medseg_nb.data.modalities import list_cases
from medseg_nb.data.phantoms import make_phantom
from medseg_nb.evaluation.cases import evaluate
from medseg_nb.evaluation.lesions import evaluate_lesions, summarise_lesions
from medseg_nb.experiments.comparison import Variant, compare, publish, run_folder, write_table
from medseg_nb.experiments.tables import compare_table
from medseg_nb.training.semisupervised import METHODS, SemisupervisedRecipe
from medseg_nb.training.supervised import load_run

THREE = ("supervised", "mean-teacher", "ours")
FOUR = (*THREE, "all-labels")
MAIN = [Variant("CMAformer-SSL", "cmaformer", changes={"method": "ours"}), Variant("CMAformer", "cmaformer", changes={"method": "all-labels-ldc"})]
EPOCHS = {5: 2, 10: 2, 50: 4}   # of the larger part, with or without labels: about 400 steps for each share
PARTS = ("hippocampus-05", "hippocampus-10", "hippocampus-50", "acdc", "liver-2", "liver-3", "liver-main", "liver-unet")


def ways(model, methods):
    "One network under several ways of training."
    return [Variant(method, model, changes={"method": method}) for method in methods]


def hippocampus(root, percent):
    "Windows around the hippocampus, two with and two without labels a step; the same number of steps for every method."
    data, epochs = load_collection(root/"hippocampus"), EPOCHS[percent]
    return data, SemisupervisedRecipe.teach(data, patch=(32, 32, 32), batch_size=2, epochs=epochs, validate_every=epochs,
                                            split="id-block", labelled=percent/100)


def hearts(root, work):
    "Four patients to train on, two of them with labels; one to validate, two to measure."
    acdc = load_collection(root/"acdc")
    pairs = [(c.images[0].absolute(), c.label.absolute()) for c in acdc.cases]
    list_cases(work, "acdc", acdc.classes, acdc.channels, pairs, acdc.description, acdc.group)
    people = sorted({c.id[:10] for c in acdc.cases})
    of = lambda chosen: [c.id for c in acdc.cases if c.id[:10] in chosen]
    data = load_collection(with_split(work, of(people[:4]), of(people[4:5]), of(people[5:])))
    return data, SemisupervisedRecipe.teach(data, inplane=112, epochs=80, validate_every=20, labelled=2)


def livers(work, cases=48):
    "Livers with 0 to 5 lesions; of the paper's 80/15/5 two cases would be left to measure, so 60% train, 15% validate and 25% are measured."
    data = load_collection(make_phantom("liver-tumour-ct", cases, 0, work, shape=(96, 96, 16)))
    return data, SemisupervisedRecipe.teach(data, split="60/15/25", intensity="ct-liver", lr=3e-3, batch_size=4, epochs=12, validate_every=6, labelled=0.5)


def count_lesions(result):
    "Tumours found and invented by every run on its unseen cases: lesions.csv."
    rows = []
    for _, line in result.runs.iterrows():
        run = load_run(run_folder(result.folder, Variant(line["model"], ""), line["seed"]))
        evaluate(run.model, run.collection, run.cases("test"), run.preparation, save=run.folder/"masks")
        found = evaluate_lesions(run.folder/"masks", run.collection, run.cases("test"), class_id=2)
        rows.append(summarise_lesions(found).assign(model=line["model"], seed=line["seed"]))
    write_table(pd.concat(rows, ignore_index=True), result.folder/"lesions.csv")


def run_part(part, root, seeds, runs, command):
    "The comparison of one part."
    kind, _, rest = part.partition("-")
    out = Path(runs)/f"half_{part}"
    if kind == "hippocampus":                                  # the ceiling does not depend on the share: it is run once
        return compare(ways("unet-r50", FOUR if rest == "05" else THREE), *hippocampus(root, int(rest)), seeds, out, command=command)
    if kind == "acdc": return compare(ways("unet-r50", FOUR), *hearts(root, Path(runs)/"data/acdc"), seeds, out, command=command)
    data, recipe = livers(Path(runs)/"data/livers")
    chosen = {"unet": ways("unet-r50", METHODS), "main": MAIN}
    result = compare(chosen[rest], data, recipe, seeds, out, command=command) if rest in chosen else \
        compare_table(f"cmaformer-{rest}", data, recipe, seeds, out, command=command)
    count_lesions(result)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS)); parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", default="runs/half-labels"); parser.add_argument("--out", default="results")
    args = parser.parse_args()
    root, seeds = data_root(), [int(s) for s in args.seeds.split(",")]
    for part in args.parts.split(","):
        if part not in PARTS: sys.exit(f"no part {part}: {', '.join(PARTS)}")
        if root is None and not part.startswith("liver"): print(f"{part}: skipped, MEDSEG_DATA is not set"); continue
        command = f"{'' if part.startswith('liver') else 'MEDSEG_DATA=... '}python benchmarks/half_labels.py --parts {part} --seeds {args.seeds}"
        result = run_part(part, root, seeds, args.runs, command)
        files = publish(result.folder, Path(args.out)/f"half_{part.replace('-', '_')}")
        print(result.summary[result.summary["class"] == "mean"].to_string(index=False), len(files), "files", json.dumps(part), flush=True)


if __name__ == "__main__": main()
