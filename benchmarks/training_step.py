"""What a training step costs at the paper's size, 224 x 224, batch 2: SynergyNet's three blocks, and the networks it is compared with.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --models transunet,deeplabv3plus-r50,smp-deeplabv3plus

The target: quantizer, DisConX and refinement together add at most 20% to the step of the same network with the identity in their place
(pre- and post-quantization blocks kept); L2GNet's step is no slower than synergynet-8s2h's, and at least 1.8 times as fast as TransUNet's.
The peer row is segmentation-models-pytorch's ResNet-50 UNet. Medians of interleaved rounds.
"""
import argparse
from statistics import median
from time import perf_counter

import torch
from torch import nn

from medseg_nb.losses.segmentation import BCEDice
from medseg_nb.models import Slot, build_model
from medseg_nb.models.zoo import count_parameters


class WithoutBlocks(nn.Module):
    "SynergyNet's bottleneck with the identity between its pre- and post-quantization blocks."
    def __init__(self, bottleneck):
        super().__init__(); self.pre, self.post = bottleneck.pre, bottleneck.post
    def forward(self, z): return Slot(self.post(self.pre(z)), {}, {})


def without_blocks():
    "synergynet-8s2h with the identity in the place of its three blocks."
    model = build_model("synergynet-8s2h", classes=9); model.bottleneck = WithoutBlocks(model.bottleneck)
    return model


def peer(kind):
    "A network of segmentation-models-pytorch with random weights."
    import segmentation_models_pytorch as smp
    return getattr(smp, kind)("resnet50", encoder_weights=None, in_channels=1, classes=9)


def wide(name):
    "A network whose bottleneck has 1024 channels instead of 512."
    return build_model(name, classes=9, dim=1024)


OTHERS = {"identity": without_blocks, "synergynet-8s2h-1024": lambda: wide("synergynet-8s2h"), "l2gnet-4ref-1024": lambda: wide("l2gnet-4ref"),
          "smp-unet": lambda: peer("Unet"), "smp-deeplabv3plus": lambda: peer("DeepLabV3Plus")}
DEFAULT = "identity,synergynet-8s2h,synergynet-8s8h,l2gnet-2ref,l2gnet-4ref,synergynet-8s2h-1024,l2gnet-4ref-1024,transunet,unet-r50,smp-unet"


def network(name):
    "A row of the table by its name."
    return OTHERS[name]() if name in OTHERS else build_model(name, classes=9)


def step(model, optimiser, x, y, loss):
    "Seconds of one forward, backward and update."
    start = perf_counter()
    out = model(x, aux=True) if hasattr(model, "bottleneck") else model(x)
    logits, extra = (out.logits, sum(out.losses.values())) if hasattr(out, "logits") else (out, 0)
    optimiser.zero_grad(); (loss(logits, y) + extra).backward(); optimiser.step()
    return perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", default=DEFAULT, help="names with commas between, the first is the base of the ratios: a name of `medseg models`, or "
                        + ", ".join(OTHERS) + " (identity: synergynet-8s2h with pre and post blocks only)")
    args = parser.parse_args()
    rounds, x, y, loss = args.rounds, torch.randn(2, 1, 224, 224), torch.randint(0, 9, (2, 224, 224)), BCEDice()
    torch.manual_seed(0); models = {name: network(name) for name in args.models.split(",")}
    optimisers = {n: torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for n, m in models.items()}
    times = {n: [] for n in models}
    for k in range(rounds + 1):
        for name, model in models.items():
            seconds = step(model, optimisers[name], x, y, loss)
            if k: times[name].append(seconds)
    base = next(iter(times.values()))
    print(f"{torch.get_num_threads()} threads; medians of {rounds} interleaved rounds, of the ratio round by round")
    print(f"{'network':40}{'M params':>9}{'ms':>8}{'ratio':>8}")
    for name, t in times.items():
        print(f"{name:40}{count_parameters(models[name])/1e6:9.2f}{1000*median(t):8.0f}{median(a/b for a, b in zip(t, base, strict=True)):8.2f}")


if __name__ == "__main__": main()
