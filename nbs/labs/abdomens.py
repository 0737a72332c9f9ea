"""Abdomens of two modalities, other people in each, and how well a network finds the organs of each unseen patient."""
import tempfile
from typing import NamedTuple

import torch
from hearts import overlaps, stack_slices
from torch import Tensor

from medseg_nb.data import load_modalities, make_phantom, split_modalities

ORGANS = {"liver": "liver", "kidney R": "right kidney", "kidney L": "left kidney", "spleen": "spleen", "*": "background"}   # the four of LSSC


class Abdomens(NamedTuple):
    "One modality, patient by patient; nobody is in two modalities or two parts."
    train:list   # (x, y) of each patient: x (n,3,side,side) slices that show an organ with their neighbours, y (n,side,side) class ids
    unseen:list  # the same of the patients that nothing is trained on

def load_abdomens(
    side:int,    # pixels
    cases:int,   # patients of each modality; a third of them stays unseen
    device,
    shape=None,  # voxels of the phantoms; None: 96 x 96 x 24
) -> tuple:      # {modality: Abdomens}, [class names, background first]
    "Phantoms of LSSC's abdominal task, CT and MR under one list of classes."
    home = tempfile.mkdtemp()
    folders = {m: make_phantom(f"abdomen-{m}", cases, seed, f"{home}/{m}", shape) for seed, m in enumerate(("ct", "mr"))}
    data = load_modalities(folders, dict.fromkeys(folders, ORGANS), out=f"{home}/labels")
    stack = lambda m, cases: [stack_slices(data[m], [case], side, f"{home}/cache", device, neighbours=1) for case in cases]
    found = {m: Abdomens(stack(m, parts["train"]), stack(m, parts["validation"] + parts["test"]))   # nothing is tuned: both are unseen
             for m, parts in split_modalities(data).items()}
    return found, list(data.classes.values())

@torch.no_grad()
def dice_by_patient(
    net,              # an LSSC in evaluation mode
    modality:str,
    part:Abdomens,    # of that modality
    classes:int,      # background left out
) -> Tensor:          # (patients,) 0..1
    "Mean Dice of the organs, one number for each unseen patient: patients are independent, their slices are not."
    found = lambda x: torch.cat([net(batch, modality).argmax(1) for batch in x.split(16)])
    return torch.tensor([overlaps(found(x), y, classes) for x, y in part.unseen], dtype=torch.double).mean(1)
