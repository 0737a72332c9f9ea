"""CMAformer at its reference size, 1 x 1 x 512 x 512, against timm's ResNet-50 features (2 x 3 x 224 x 224): forward + backward.

    python benchmarks/cmaformer.py
    python benchmarks/cmaformer.py --threads 1 --cpu-time

The target: at most 10.9 times the time of timm's resnet50 features, which the authors' code takes (3879 ms to 356 ms, measured the same way with two
threads). Compare the ratios, not the milliseconds.
"""
import measure
import torch

from medseg_nb.models.cmaformer import CMAformer

PEER, TARGET = "timm resnet50 features", 3879/356
ROWS = {"CMAformer": {}, 'CMAformer, cross="gate"': dict(cross="gate"), "CMAformer, cross=False": dict(cross=False),
        "CMAformer, vit=False, cross=False": dict(vit=False, cross=False)}


def main():
    args = measure.arguments(__doc__, 5)
    import timm
    models = {PEER: timm.create_model("resnet50", features_only=True)} | {name: CMAformer(1, 3, **settings) for name, settings in ROWS.items()}
    inputs = {name: torch.randn(2, 3, 224, 224) if name == PEER else torch.randn(1, 1, 512, 512) for name in models}
    measure.networks(models, inputs, dict.fromkeys(list(ROWS)[:2], TARGET), args)


if __name__ == "__main__": main()
