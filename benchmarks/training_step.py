"""What SynergyNet's three blocks, or L2GNet's two, add to a training step: ResNet-50, 224 x 224, batch 2, dim 512.

    python benchmarks/training_step.py

The target: quantizer, DisConX and refinement together add at most 20% to the step of the same network with the identity in their place
(pre- and post-quantization blocks kept); L2GNet's step is no slower than that of synergynet-8s2h. The peer row is
segmentation-models-pytorch's ResNet-50 UNet. Medians of interleaved rounds.
"""
import argparse
from statistics import median
from time import perf_counter

import torch
from torch import nn

from medseg_nb.losses.segmentation import BCEDice
from medseg_nb.models import EncoderDecoder, L2GBottleneck, Slot, build_model
from medseg_nb.models.encoder_decoder import TimmEncoder, UNetDecoder
from medseg_nb.models.zoo import count_parameters


class WithoutBlocks(nn.Module):
    "SynergyNet's bottleneck with the identity between its pre- and post-quantization blocks."
    def __init__(self, bottleneck):
        super().__init__(); self.pre, self.post = bottleneck.pre, bottleneck.post
    def forward(self, z): return Slot(self.post(self.pre(z)), {}, {})


def l2gnet(heads):
    "L2GNet with q references at the paper's size."
    encoder = TimmEncoder("resnet50", in_channels=1)
    bottleneck = L2GBottleneck(encoder.channels[-1], heads=heads)
    return EncoderDecoder(encoder, bottleneck, UNetDecoder(encoder, bottleneck.out_channels, 9))


def networks():
    import segmentation_models_pytorch as smp
    identity = build_model("synergynet-8s2h", classes=9); identity.bottleneck = WithoutBlocks(identity.bottleneck)
    return {"identity in the slot (pre, post kept)": identity, "synergynet-8s2h": build_model("synergynet-8s2h", classes=9),
            "synergynet-8s8h": build_model("synergynet-8s8h", classes=9),
            "l2gnet, 2 references": l2gnet(2), "l2gnet, 4 references": l2gnet(4), "unet-r50": build_model("unet-r50", classes=9),
            "smp UNet ResNet-50": smp.Unet("resnet50", encoder_weights=None, in_channels=1, classes=9)}


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
    rounds, x, y, loss = parser.parse_args().rounds, torch.randn(2, 1, 224, 224), torch.randint(0, 9, (2, 224, 224)), BCEDice()
    torch.manual_seed(0); models = networks()
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
