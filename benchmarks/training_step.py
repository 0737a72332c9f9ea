"""What a training step costs at the paper's size, 224 x 224, batch 2: SynergyNet's three blocks, and the networks it is compared with.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --models transunet,deeplabv3plus-r50,smp-deeplabv3plus

The target: quantizer, DisConX and refinement together add at most 20% to the step of the same network with the identity in their place
(pre- and post-quantization blocks kept); L2GNet's step is no slower than synergynet-8s2h's, and at least 1.8 times as fast as TransUNet's.
The peer row is segmentation-models-pytorch's ResNet-50 UNet.
"""
import measure
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


def step(model, x, y, loss):
    "A row: one forward, backward and update."
    optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    def row(lap):
        out = model(x, aux=True) if hasattr(model, "bottleneck") else model(x)
        logits, extra = (out.logits, sum(out.losses.values())) if hasattr(out, "logits") else (out, 0)
        optimiser.zero_grad(); (loss(logits, y) + extra).backward(); optimiser.step()
    return row


def main():
    names = ("names with commas between, the first is the base of the ratios: a name of `medseg models`, or "
             + ", ".join(OTHERS) + " (identity: synergynet-8s2h with pre and post blocks only)")
    args = measure.arguments(__doc__, 7, models=dict(default=DEFAULT, help=names))
    x, y = torch.randn(2, 1, 224, 224, device=args.device), torch.randint(0, 9, (2, 224, 224), device=args.device)
    models = {name: network(name).to(args.device) for name in args.models.split(",")}
    seconds = measure.in_turn({name: step(model, x, y, BCEDice()) for name, model in models.items()}, args.rounds, args.clock)
    ms, ratio = measure.medians(seconds), measure.ratios(seconds, next(iter(models)))
    lines = {name: (count_parameters(model)/1e6, ms[name][-1], ratio[name]) for name, model in models.items()}
    measure.table("one step", [("M params", ".2f"), ("ms", ".0f"), ("ratio", ".2f")], lines)


if __name__ == "__main__": main()
