"""Slices of hearts, and a small network without skips into which a lab puts its bottleneck."""
import tempfile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medseg_nb.core import find_collection, progress, set_seed
from medseg_nb.data import Preparation, SliceDataset, load_collection, make_phantom
from medseg_nb.data.collections import subject_of
from medseg_nb.losses.segmentation import BCEDice


class Hearts(NamedTuple):
    "Slices that show a heart; the test patients are in no training slice."
    train_x:Tensor  # (N,1,side,side)
    train_y:Tensor  # (N,side,side) class ids
    test_x:Tensor
    test_y:Tensor
    names:list      # of the classes, without the background

def stack_slices(
    collection,
    cases:list,
    side:int,          # pixels
    cache:str,         # folder
    device,
    neighbours:int=0,  # slices on either side that join as channels
) -> tuple:            # (N,2*neighbours+1,side,side), (N,side,side)
    "The slices of some cases in which there is something to find."
    slices = SliceDataset(collection, cases, Preparation(inplane=side, neighbours=neighbours), size=side, cache=cache)
    images, labels = map(torch.stack, zip(*[slices[i] for i in range(len(slices))]))
    keep = labels.flatten(1).any(1)
    return images[keep].to(device), labels[keep].to(device)

def load_hearts(
    side:int,   # pixels
    device,
) -> Hearts:
    "ACDC where MEDSEG_DATA names a folder that has it, else six phantoms; the last two patients are for the test."
    home = tempfile.mkdtemp()
    collection = load_collection(find_collection("acdc") or make_phantom("cardiac-mr", 6, 0, f"{home}/hearts"))
    people = {case.id: subject_of(case.id, collection.group) for case in collection.cases}   # a patient may have several scans
    tested = sorted(set(people.values()))[-2:]
    parts = [[c for c in collection.cases if (people[c.id] in tested) == test] for test in (False, True)]
    stacked = (x for cases in parts for x in stack_slices(collection, cases, side, f"{home}/cache", device))
    return Hearts(*stacked, [collection.classes[c] for c in sorted(collection.classes) if c])

def halve(
    i:int,  # channels in
    o:int,  # channels out, a multiple of 4
):
    "Two convolutions; the first halves the sides."
    layers = [[nn.Conv2d(c, o, 3, stride, 1), nn.GroupNorm(4, o), nn.GELU()] for c, stride in ((i, 2), (o, 1))]
    return nn.Sequential(*layers[0], *layers[1])

class SmallNet(nn.Module):
    "Encoder of stride 2^halvings, bottleneck, decoder without skips: everything passes through the bottleneck."
    def __init__(self,
        bottleneck:nn.Module,  # (B,dim,h,w) -> (B,dim,h,w) and a loss
        dim:int,               # channels of the bottleneck
        halvings:int,          # of the sides
        classes:int,           # background included
    ):
        super().__init__()
        widths = [1, *(dim//2**i for i in reversed(range(halvings)))]           # e.g. 1, 8, 16, 32
        self.encoder = nn.Sequential(*(halve(i, o) for i, o in zip(widths, widths[1:])), nn.Conv2d(dim, dim, 1))
        self.bottleneck, side = bottleneck, 2**halvings
        self.decoder = nn.Sequential(nn.Conv2d(dim, 2*dim, 3, padding=1), nn.GELU(), nn.Conv2d(2*dim, classes*side**2, 1), nn.PixelShuffle(side))
    def forward(self, x):
        z, loss = self.bottleneck(self.encoder(x))
        return self.decoder(z), loss, z

def fit(
    make,                    # () -> bottleneck
    hearts:Hearts,
    dim:int, halvings:int,   # of `SmallNet`
    steps:int, batch:int, rate:float,
    watch=lambda net: 0.,    # a number to note at every step
) -> tuple:                  # network in evaluation mode, (steps,2) segmentation loss and what was watched
    "Train one network on the training slices."
    set_seed(0)
    net = SmallNet(make(), dim, halvings, len(hearts.names) + 1).to(hearts.train_x.device)
    loss, optimizer, curve = BCEDice(), torch.optim.AdamW(net.parameters(), rate), []
    for _ in progress(range(steps), "training"):
        i = torch.randint(len(hearts.train_x), (batch,))
        logits, extra, _ = net(hearts.train_x[i])
        wrong = loss(logits, hearts.train_y[i])
        optimizer.zero_grad(); (wrong + extra).backward(); optimizer.step()
        curve.append((wrong.item(), float(watch(net))))
    return net.eval(), torch.tensor(curve)

def overlaps(
    found:Tensor,  # (N,side,side) class ids
    truth:Tensor,  # (N,side,side)
    classes:int,   # background left out
) -> list:         # a number a class, 0..1
    "Dice of each class over all slices at once."
    share = lambda a, b: 2*(a & b).sum().item()/max(1, (a.sum() + b.sum()).item())
    return [share(found == c, truth == c) for c in range(1, classes + 1)]

@torch.no_grad()
def dice(
    net:SmallNet,
    hearts:Hearts,
) -> list:  # a number a class, 0..1
    "Dice over all slices of the unseen patients."
    found = torch.cat([net(x)[0].argmax(1) for x in hearts.test_x.split(8)])
    return overlaps(found, hearts.test_y, len(hearts.names))
