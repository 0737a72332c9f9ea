"""nnFormer at its two published sizes against timm's ResNet-50: parameters, multiplications, forward + backward.

    python benchmarks/nnformer.py                    # ACDC size (and teaching size): a minute on 2 cores, 3 GB
    python benchmarks/nnformer.py --sizes synapse    # a minute or two, 7 GB

The ResNet-50 (timm, features only, 2 x 3 x 224 x 224) is the yardstick: the public nnFormer took 6.3 times its time at the ACDC size
(1 x 1 x 14 x 160 x 160, 4 classes) and 23.4 times at the Synapse size (1 x 1 x 64 x 128 x 128, 14 classes), with two threads. Here the goal
is to stay within 1.1 of those ratios. Compare the ratios, not the milliseconds.
"""
import measure
import torch

from medseg_nb.models.nnformer import NNFORMER_SIZES, NNFormer

PEER = "timm resnet50 features"
INPUTS = {"acdc": ((1, 1, 160, 160, 14), 4, 6.3), "synapse": ((1, 1, 128, 128, 64), 14, 23.4), "teach": ((1, 1, 48, 48, 24), 3, None)}


class WithDeepHeads(torch.nn.Module):
    "All three answers, as the public network gives them in training."
    def __init__(self, model): super().__init__(); self.counted = model   # its multiplications without the coarse answers
    def forward(self, x):
        out = self.counted(x, aux=True)
        return [out.logits, *(v for k, v in out.maps.items() if k.startswith("logits"))]


def main():
    args = measure.arguments(__doc__, 5, sizes=dict(default="teach,acdc", help="names with commas between: " + ", ".join(INPUTS)))
    import timm
    models, inputs, goals = {PEER: timm.create_model("resnet50", features_only=True, pretrained=False)}, {PEER: torch.randn(2, 3, 224, 224)}, {}
    for size in args.sizes.split(","):
        name, (shape, classes, public) = f"nnFormer {size}", INPUTS[size]
        if public: goals[name] = 1.1*public
        models[name], inputs[name] = WithDeepHeads(NNFormer(1, classes, **NNFORMER_SIZES[size])), torch.randn(shape)
    measure.networks(models, inputs, goals, args)


if __name__ == "__main__": main()
