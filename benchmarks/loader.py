"""How many augmented 2D slices of 224 x 224 a second, and in how much memory: our loader against MONAI's transforms.

    python benchmarks/loader.py            # one table each for speed and memory, about two minutes

Speed: batches of 8, mirror + turn + resize + intensity + noise, with no and with one neighbour on either side. MONAI
gets the same prepared volumes already in memory, in this process and with two worker processes. Rounds are interleaved,
medians are shown, and ratios to MONAI in this process. Memory: what a fresh process holds after one pass over n cases
(ours), or with n cases in memory and a few batches taken (MONAI).
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from medseg_nb.data.collections import Case, load_collection
from medseg_nb.data.phantoms import make_phantom
from medseg_nb.data.slices import Augment, Preparation, SliceDataset, make_loader, prepare_cases

SIDE, BATCH = 224, 8


def ours(collection, cases, cache, neighbours):
    "Our loader and augmentation: an endless stream of batches."
    data = SliceDataset(collection, cases, Preparation("ct", inplane=SIDE, neighbours=neighbours), cache=cache)
    loader, augment, generator = make_loader(data, BATCH), Augment(noise=0.02), torch.Generator().manual_seed(0)
    for epoch in range(10**6):
        loader.sampler.set_epoch(epoch)
        for x, y in loader: yield augment(x, y, generator)


def monai_transforms(neighbours):
    "The same changes in MONAI's words: a random slice (neighbours as channels), mirrored, turned, resized, shaded."
    from monai import transforms as T
    both, wide = ["image", "label"], 2*neighbours + 1
    def as_channels(d):
        return {"image": d["image"][0].movedim(-1, 0), "label": d["label"][:, :, :, neighbours]}
    turn = T.RandAffined(both, prob=1, rotate_range=np.pi/12, scale_range=0.1, mode=("bilinear", "nearest"),
                         padding_mode=("border", "zeros"))
    return T.Compose([T.RandSpatialCropd(both, (SIDE, SIDE, wide), random_size=False), as_channels,
                      T.RandFlipd(both, 0.5, 0), T.RandFlipd(both, 0.5, 1), turn,
                      T.RandScaleIntensityd("image", 0.1, prob=1), T.RandShiftIntensityd("image", 0.1, prob=1),
                      T.RandAdjustContrastd("image", prob=1, gamma=(0.8, 1.25)),
                      T.RandGaussianNoised("image", prob=1, std=0.02)])


def monai(prepared, neighbours, workers):
    "MONAI's Dataset and transforms on volumes that lie in memory: an endless stream of batches."
    from monai.data import Dataset
    volumes = [{"image": torch.from_numpy(c.open_image().astype(np.float32)).permute(1, 2, 3, 0),  # (1,X,Y,Z)
                "label": torch.from_numpy(np.array(c.open_label())).permute(1, 2, 0)[None]} for c in prepared]
    data = Dataset(volumes*prepared[0].shape[3], monai_transforms(neighbours))  # an item a slice
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    while True: yield from ((b["image"], b["label"]) for b in loader)


def slices_per_second(stream, seconds):
    "Take batches for so long: slices a second by the clock, and a second of this process's CPU time."
    n, start, spent = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds: n += len(next(stream)[0])
    return n/(time.perf_counter() - start), n/(time.process_time() - spent)


def speed(collection, cache, rounds, seconds):
    "Median slices a second of every row, rounds interleaved; CPU seconds only where one process does all the work."
    prepared = prepare_cases(collection, None, Preparation("ct", inplane=SIDE), cache)
    rows = {}
    for k in (0, 1):
        rows["ours", k] = ours(collection, None, cache, k)
        for workers in (0, 2): rows[f"MONAI, {workers or 'no'} workers", k] = monai(prepared, k, workers)
    for (name, k), stream in rows.items():
        x, y = next(stream)                                                     # warm up
        assert x.shape[1:] == (2*k + 1, SIDE, SIDE) and y.shape[-2:] == (SIDE, SIDE), (name, x.shape, y.shape)
    taken = {row: [] for row in rows}
    for _ in range(rounds):
        for row, stream in rows.items():
            taken[row].append(slices_per_second(stream, seconds))
            time.sleep(0.5)                                                     # let the workers fill up and rest
    rate = {row: np.median(t, 0) for row, t in taken.items()}                   # (2,) by the clock, by CPU time
    peer = {k: rate["MONAI, no workers", k] for k in (0, 1)}
    return pd.DataFrame([{"loader": name, "channels": 2*k + 1,
                          "slices/s": round(r[0]), "ratio": round(r[0]/peer[k][0], 2),
                          "slices/CPU s": round(r[1]) if "2 workers" not in name else "",
                          "CPU ratio": round(r[1]/peer[k][1], 2) if "2 workers" not in name else ""}
                         for (name, k), r in rate.items()])


def resident():
    "MiB this process holds: its own memory, and pages of files mapped into it."
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: round(int(fields[key].split()[0])/1024) for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def hold(which, folder, n):
    "Go once over n cases and say what memory is held."
    collection = load_collection(folder/"phantom", check=False)
    cases = [Case(f"{c.id}_{i}", c.images, c.label) for i in range(n) for c in collection.cases[:1]]
    prepared = prepare_cases(collection, cases, Preparation("ct", inplane=SIDE), folder/"many")
    if which == "ours": stream = ours(collection, cases, folder/"many", 0)
    else: stream = monai(prepared, 0, 0)
    for _ in range(n*prepared[0].shape[3]//BATCH if which == "ours" else 4): next(stream)
    print(json.dumps(resident()))


def memory(folder, counts):
    "Memory of a fresh process after one pass, for a growing number of cases."
    rows = []
    for which in ("ours", "MONAI"):
        for n in counts:
            command = [sys.executable, __file__, "--hold", which, str(folder), str(n)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            said = json.loads(output.splitlines()[-1])
            rows.append({"loader": which, "cases": n, "own MiB": said["own"], "mapped MiB": said["mapped"]})
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each row in each round")
    parser.add_argument("--threads", type=int, default=2, help="of this process")
    parser.add_argument("--hold", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold: return hold(arguments.hold[0], Path(arguments.hold[1]), int(arguments.hold[2]))
    torch.set_num_threads(arguments.threads)
    folder = Path(tempfile.mkdtemp())
    make_phantom("abdomen-ct", 4, 0, folder/"phantom")
    collection = load_collection(folder/"phantom", check=False)
    print(f"{torch.get_num_threads()} threads, batch {BATCH}, {SIDE} x {SIDE}")
    print(speed(collection, folder/"cache", arguments.rounds, arguments.seconds).to_string(index=False), "\n")
    print(memory(folder, (4, 16, 64)).to_string(index=False))


if __name__ == "__main__": main()
