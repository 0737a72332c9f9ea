"""Swin-Unet tiny against timm's ResNet-50 features and against itself wired from timm's blocks: batch 2, 3 x 224 x 224, forward + backward.

    python benchmarks/swin_unet.py
    python benchmarks/swin_unet.py --threads 1 --cpu-time

The target: at most 2.46 times the time of timm's resnet50 features (the published code takes 2.24 times, measured the same way). Compare the
ratios, not the milliseconds.
"""
import measure
import torch
from torch import nn

from medseg_nb.blocks.window_attention import WindowStage
from medseg_nb.models.swin_unet import SwinUNet

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


def main():
    args = measure.arguments(__doc__, 9)
    models = {name: make() for name, make in NETWORKS.items()}
    measure.networks(models, dict.fromkeys(models, torch.randn(2, 3, 224, 224)), {"SwinUNet": TARGET}, args)


if __name__ == "__main__": main()
