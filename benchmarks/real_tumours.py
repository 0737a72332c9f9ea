"""Brain tumours of four real patients: everyone is measured once, by networks that learned from two others. The runs that data/04_public_collections shows.

    MEDSEG_DATA=folder python benchmarks/real_tumours.py --seeds 0,1,2 --out results/brats2015

FLAIR and T1 with contrast (BraTS 2015), the whole tumour, slices of 2 mm, which are a quarter of the pixels; every score is on the original
grid of 1 mm. In each of four rounds two people train, one validates and one is measured; the spread is over rounds and seeds together.
Beside them SynergyNet's Table 4: other people, other images, another budget.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from real_pairs import with_split

from medseg_nb.core import data_root
from medseg_nb.data.collections import load_collection, write_dataset_json
from medseg_nb.data.volumes import load_label, save_volume
from medseg_nb.experiments.comparison import beside, compare, summarise_models, write_table, write_text
from medseg_nb.experiments.tables import choose_rows, table_plan, table_recipe

MODELS = ["unet-r50", "vqunet", "synergynet-8s2h", "l2gnet-4ref"]


def whole_tumours(source, folder):
    "Images where they lie, labels 1 to 4 as one class."
    people = sorted(p for p in source.iterdir() if p.is_dir())
    for part in ("imagesTr", "labelsTr"): (folder/part).mkdir(parents=True, exist_ok=True)
    for p in people:
        for i, file in enumerate(("Flair", "T1c")):
            link = folder/"imagesTr"/f"{p.name}_{i:04d}.nii.gz"
            if not link.exists(): link.symlink_to((p/f"{file}.nii.gz").absolute())
        label = load_label(p/"seg.nii.gz")
        save_volume(np.asarray(label.dataobj) > 0, label, folder/"labelsTr"/f"{p.name}.nii.gz")
    write_dataset_json(folder, "brats2015", {0: "background", 1: "tumour"}, {0: "FLAIR", 1: "T1c"}, len(people), "whole tumour, four patients of BraTS 2015")
    return [p.name for p in people]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2"); parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--runs", default="runs/real-tumours"); parser.add_argument("--out", default="results/brats2015")
    args = parser.parse_args()
    if data_root() is None: sys.exit("skipped: MEDSEG_DATA is not set")
    runs, out, seeds = Path(args.runs), Path(args.out), [int(s) for s in args.seeds.split(",")]
    people = whole_tumours(data_root()/"brats2015", runs/"data")
    models, reference, published = choose_rows(table_plan("synergynet-4"), MODELS)
    rounds = []
    for k, measured in enumerate(people):
        others = [*people[k+1:], *people[:k]]
        data = load_collection(with_split(runs/"data", others[1:], others[:1], [measured]))
        recipe = table_recipe("synergynet-4", data, dims=2, epochs=args.epochs, validate_every=args.epochs, spacing=(2., 2., 2.))
        result = compare(models, data, recipe, seeds, runs/measured, reference, published)
        rounds.append(result.scores.assign(seed=[10*k + s for s in result.scores["seed"]]))
    scores = pd.concat(rounds, ignore_index=True)
    scores.attrs = dict(result.scores.attrs)
    write_table(scores, out/"scores.csv")
    table = beside(published, summarise_models(scores))
    write_table(table, out/"published.csv", index=True)
    facts = json.loads((runs/people[-1]/"comparison.json").read_text())
    facts["command"] = f"MEDSEG_DATA=... python benchmarks/real_tumours.py --seeds {args.seeds} --epochs {args.epochs}"
    write_text(json.dumps({**facts, "people": people}, indent=1), out/"comparison.json")
    print(table[[c for c in table if "published" not in c]].to_string())


if __name__ == "__main__": main()
