"""Hearts person by person, two frames of each, a small U-Net with two heads, and how well it finds the parts of each unseen heart."""
import tempfile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hearts import halve, overlaps, stack_slices
from torch import Tensor, nn

from medseg_nb.data import load_collection, make_phantom
from medseg_nb.data.collections import subject_of
from medseg_nb.losses import SDMHead, SDMProjection


class Frames(NamedTuple):
    "Cases of a collection; a person has two, the heart filled and the heart squeezed."
    train:dict    # {case: person} of those whose images may train
    unseen:dict   # {case: person} of the others
    slices:dict   # {case: (x, y)}: x (n,1,side,side) slices that show a heart, y (n,side,side) class ids
    classes:list  # names, background first

def load_frames(
    side:int,    # pixels
    people:int,  # hearts to draw
    unseen:int,  # of them kept apart, the last ones
    device,
    shape=None,  # voxels of the phantoms; None: 96 x 96 x 10
) -> Frames:
    "Phantoms of short-axis cine MR, two frames a person."
    home = tempfile.mkdtemp()
    collection = load_collection(make_phantom("cardiac-mr", 2*people, 0, f"{home}/hearts", shape), check=False)
    person_of = {case.id: subject_of(case.id, collection.group) for case in collection.cases}
    apart = sorted(set(person_of.values()))[-unseen:]
    parts = [{case: who for case, who in person_of.items() if (who in apart) == kept} for kept in (False, True)]
    slices = {case.id: stack_slices(collection, [case], side, f"{home}/cache", device) for case in collection.cases}
    return Frames(*parts, slices, [collection.classes[c] for c in sorted(collection.classes)])

def join(
    frames:Frames,
    cases:list,
) -> tuple:  # (N,1,side,side), (N,side,side)
    "All slices of some cases."
    return tuple(map(torch.cat, zip(*(frames.slices[case] for case in cases), strict=True)))

def convolve(
    i:int,  # channels in
    o:int,  # channels out, a multiple of 4
):
    "A convolution that keeps the side, group norm and GELU."
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(4, o), nn.GELU())

class TwoHeadedUNet(nn.Module):
    "A U-Net on half the image's side; one head gives scores, the other signed distance maps, and `project` is h of eq. 4."
    def __init__(self,
        classes:int,             # background included
        widths=(16, 32, 64),     # channels; each map has half the side of the one before, the first half of the image's
    ):
        super().__init__()
        self.down = nn.ModuleList(halve(i, o) for i, o in zip((1, *widths), widths, strict=False))
        self.up = nn.ModuleList(convolve(i + o, o) for i, o in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.scores, self.distance = nn.Conv2d(widths[0], 4*classes, 1), SDMHead(widths[0], classes - 1)
        self.project = SDMProjection(classes - 1)
    def forward(self,
        x:Tensor,  # (B,1,side,side); side a multiple of 8
    ) -> tuple:    # logits (B,Z,side,side), maps (B,Z-1,side,side) in (-1,1)
        kept = []
        for layer in self.down: kept.append(x := layer(x))                                   # (B,16,side/2,side/2), (B,32,side/4,side/4), ...
        for layer, skip in zip(self.up, kept[-2::-1], strict=True): x = layer(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        return F.pixel_shuffle(self.scores(x), 2), F.interpolate(self.distance(x), scale_factor=2, mode="bilinear")

@torch.no_grad()
def dice_by_case(
    net:TwoHeadedUNet,
    frames:Frames,
) -> dict:  # {case: 0..1}
    "Mean Dice over the classes, background left out, of each unseen case."
    find = lambda x: torch.cat([net(batch)[0].argmax(1) for batch in x.split(32)])
    found = {case: overlaps(find(x), y, len(frames.classes) - 1) for case, (x, y) in frames.slices.items() if case in frames.unseen}
    return {case: sum(each)/len(each) for case, each in found.items()}
