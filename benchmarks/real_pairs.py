"""Does a second modality help on real images? The runs that experiments/04_modalities reads, and how the pairs are put together.

    MEDSEG_DATA=folder python benchmarks/real_pairs.py --pairs abdomen,tumour,heads --out results

abdomen   T2-weighted MR of CHAOS and one CT of TotalSegmentator: few MR shots, alone and beside the CT
tumour    FLAIR of one patient of BraTS 2015 and T1 with contrast of another to learn from, two more to validate and to measure: whole tumour
heads     CT-like and MR-like contrasts painted on real label maps, different people in each: few CT shots, alone and beside the MR

Nobody trains both modalities. Very few people are left to measure on: read the spread, not only the mean.
"""
import argparse
import json
import sys
from pathlib import Path

from medseg_nb.core import data_root
from medseg_nb.data import heads  # noqa: F401  adds the phantom heads
from medseg_nb.data.collections import load_collection
from medseg_nb.data.modalities import list_cases, load_modalities
from medseg_nb.data.phantoms import make_phantom
from medseg_nb.experiments.comparison import publish
from medseg_nb.experiments.modalities import compare_modalities, settings_table
from medseg_nb.training.multimodal import MultimodalRecipe

ORGANS = ["liver", "right kidney", "left kidney", "spleen"]


def with_split(folder, train, validation, test):
    "Write splits.json beside a dataset.json."
    (folder/"splits.json").write_text(json.dumps({"train": train, "validation": validation, "test": test}, indent=1))
    return folder


def abdomen(root, work):
    "CHAOS, 6 people to train on, 2 to validate, 7 to measure; the one CT trains only."
    chaos, source = load_collection(root/"chaos_mr"), (root/"totalseg").absolute()
    list_cases(work/"mr", "chaos_mr", chaos.classes, chaos.channels, [(c.images[0].absolute(), c.label.absolute()) for c in chaos.cases], chaos.description)
    ids = [c.id for c in chaos.cases]
    structures = json.loads((source/"class_map.json").read_text())["total"]
    list_cases(work/"ct", "totalseg", {0: "background"} | structures, {0: "CT"},
               [(source/"example_ct.nii.gz", source/"example_seg_fast_force_split.nii.gz")], "masks predicted by a tool")
    names = dict(zip(["liver", "kidney_right", "kidney_left", "spleen"], ORGANS, strict=True)) | {"*": "background"}
    data = load_modalities({"mr": with_split(work/"mr", ids[:6], ids[6:8], ids[8:]), "ct": work/"ct"}, {"ct": names})
    return data, "lssc-shots:mr", dict(spacing=(3., 3., 8.), split={"ct": "train"}, batch_size=4, epochs=8, validate_every=4)


def tumour(root, work):
    "Each sequence has one person of its own to learn from; the third validates and the fourth is measured, in both."
    people, folders = sorted((root/"brats2015").glob("brats*")), {}
    for m, file, own in (("flair", "Flair", [people[0], *people[2:4]]), ("t1c", "T1c", people[1:4])):
        for p in own:
            for part, kind in (("images", file), ("labels", "seg")):
                link = work/m/part/f"{p.name}.nii.gz"
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists(): link.symlink_to((p/f"{kind}.nii.gz").absolute())
        pairs = [(f"images/{p.name}.nii.gz", f"labels/{p.name}.nii.gz") for p in own]
        list_cases(work/m, f"brats2015-{m}", {0: "background", 1: "necrosis", 2: "oedema", 3: "solid", 4: "enhancing"}, {0: m}, pairs)
        folders[m] = with_split(work/m, *([p.name] for p in own))
    whole = {name: "tumour" for name in ("necrosis", "oedema", "solid", "enhancing")}
    return load_modalities(folders, {m: whole for m in folders}), "lssc-main", dict(spacing=(2., 2., 4.), batch_size=4, epochs=40, validate_every=40)


def head_contrasts(root, work):
    "Painted on real label maps where they are there, on ellipsoids elsewhere."
    folders = {}
    for m in ("ct", "mr"):
        folders[m] = work/m
        if not (work/m/"dataset.json").exists(): make_phantom(f"head-{m}", 10, 0, work/m)
    return load_modalities(folders), "lssc-shots:ct", dict(batch_size=4, epochs=8, validate_every=4)


PAIRS = {"abdomen": abdomen, "tumour": tumour, "heads": head_contrasts}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default=",".join(PAIRS)); parser.add_argument("--seeds", default="0")
    parser.add_argument("--runs", default="runs/real-pairs"); parser.add_argument("--out", default="results")
    args = parser.parse_args()
    root, seeds = data_root(), [int(s) for s in args.seeds.split(",")]
    if root is None: sys.exit("skipped: MEDSEG_DATA is not set")
    for name in args.pairs.split(","):
        work = Path(args.runs)/name
        (work/"data").mkdir(parents=True, exist_ok=True)
        data, table, changes = PAIRS[name](root, work/"data")
        recipe = MultimodalRecipe.teach(data, **changes)
        command = f"MEDSEG_DATA=... python benchmarks/real_pairs.py --pairs {name} --seeds {args.seeds}"
        result = compare_modalities(table, data, recipe, seeds, work/"table", command=command)
        print(settings_table(result.scores).to_string(), len(publish(work/"table", Path(args.out)/f"lssc_{name}", "ASSD.csv")), "files", flush=True)


if __name__ == "__main__": main()
