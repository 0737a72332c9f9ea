"""Swin-Unet tiny against timm's ResNet-50 features and against itself wired from timm's blocks: batch 2, 3 x 224 x 224, forward + backward.

    python benchmarks/swin_unet.py

The target: at most 2.46 times the time of timm's resnet50 features (the published code takes 2.24 times, measured the same way). Medians of
interleaved rounds (the order turns by one each round); ratios are taken round by round. Memory is the growth of the largest resident size in
a process of its own.
"""
import argparse
import time
from statistics import median

import torch
from torch import nn

from medseg_nb.blocks.window_attention import WindowStage
from medseg_nb.models.swin_unet import SwinUNet
from medseg_nb.models.zoo import count_macs, count_parameters

PEER, TARGET = "timm resnet50 features", 2.46


class Blocks(nn.Sequential):
    "timm's blocks in the place of a stage; they take no scales."
    def forward(self, x, scales): return super().forward(x)


def from_timm_blocks(side=224):
    "Our Swin-Unet with every stage replaced by timm's blocks of the same size."
    from timm.models.swin_transformer import SwinTransformerBlock
    model = SwinUNet(3, 9)
    sides = {width: side//stride for width, stride in zip(model.encoder.channels, model.encoder.strides, strict=True)}
    for parent in list(model.modules()):
        for name, stage in list(parent.named_children()):
            if not isinstance(stage, WindowStage): continue
            dim, heads = stage[0].norm1.normalized_shape[0], stage[0].attention.heads
            peers = (SwinTransformerBlock(dim, (sides[dim],)*2, heads, window_size=7, shift_size=b.attention.shift[0], drop_path=b.drop_path.rate)
                     for b in stage)
            setattr(parent, name, Blocks(*peers))
    return model


def resnet():
    import timm
    return timm.create_model("resnet50", features_only=True)


NETWORKS = {PEER: resnet, "Swin-Unet from timm's blocks": from_timm_blocks, "SwinUNet": lambda: SwinUNet(3, 9)}


def step(model, x):
    "Seconds of one forward and backward pass."
    model.zero_grad()
    start = CLOCK()
    out = model(x)
    (sum(o.mean() for o in out) if isinstance(out, list) else out.mean()).backward()
    if x.is_cuda: torch.cuda.synchronize()
    return CLOCK() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine in use")
    args = parser.parse_args()
    global CLOCK
    CLOCK = time.process_time if args.cpu_time else time.perf_counter
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    models, x = {name: make().to(args.device) for name, make in NETWORKS.items()}, torch.randn(2, 3, 224, 224, device=args.device)
    names, times = list(models), {name: [] for name in models}
    for k in range(args.rounds + 1):                                       # the first round warms up
        for name in names[k % len(names):] + names[:k % len(names)]:
            seconds = step(models[name], x)
            if k: times[name].append(seconds)
    print(f"{args.device}, {torch.get_num_threads()} threads; medians of {args.rounds} interleaved rounds")
    print(f"{'network':32}{'M params':>9}{'GMAC':>7}{'ms':>8}{'ratio':>8}")
    for name, t in times.items():
        ratio = median(a/b for a, b in zip(t, times[PEER], strict=True))
        macs = count_macs(models[name].cpu().eval(), (2, 3, 224, 224))
        print(f"{name:32}{count_parameters(models[name])/1e6:9.2f}{macs/1e9:7.1f}{1000*median(t):8.0f}{ratio:8.2f}")
    print(f"target: SwinUNet at most {TARGET} times {PEER}")


if __name__ == "__main__": main()
