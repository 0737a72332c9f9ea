"""nnFormer at its two published sizes against timm's ResNet-50: parameters, multiplications, forward + backward.

    python benchmarks/nnformer.py                    # ACDC size (and teaching size): a minute on 2 cores, 3 GB
    python benchmarks/nnformer.py --sizes synapse    # a minute or two, 7 GB

The ResNet-50 (timm, features only, 2 x 3 x 224 x 224) is the yardstick: the public nnFormer took 6.3 times its time at the ACDC size
(1 x 1 x 14 x 160 x 160, 4 classes) and 23.4 times at the Synapse size (1 x 1 x 64 x 128 x 128, 14 classes), with two threads. Here the goal
is to stay within 1.1 of those ratios. Medians of interleaved rounds; compare the ratios, not the milliseconds.
"""
import argparse
from statistics import median
from time import perf_counter, process_time

import torch

from medseg_nb.models.nnformer import NNFORMER_SIZES, NNFormer
from medseg_nb.models.zoo import count_macs, count_parameters

INPUTS = {"acdc": ((1, 1, 160, 160, 14), 4, 6.3), "synapse": ((1, 1, 128, 128, 64), 14, 23.4), "teach": ((1, 1, 48, 48, 24), 3, None)}


def step(model, x, clock):
    "Seconds of one forward and backward pass, with all outputs in the sum."
    model.zero_grad()
    start = clock()
    out = model(x)
    (sum(f.sum() for f in out) if isinstance(out, list) else out.sum()).backward()
    return clock() - start


class WithDeepHeads(torch.nn.Module):
    "All three answers, as the public network gives them in training."
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x):
        out = self.model(x, aux=True)
        return [out.logits, *(v for k, v in out.maps.items() if k.startswith("logits"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="teach,acdc"); parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine in use")
    args = parser.parse_args()
    import timm
    clock, names = process_time if args.cpu_time else perf_counter, args.sizes.split(",")
    torch.manual_seed(0)
    models = {"timm resnet50 features": timm.create_model("resnet50", features_only=True, pretrained=False)}
    inputs, goals = {"timm resnet50 features": torch.randn(2, 3, 224, 224)}, {}
    for name in names:
        shape, classes, goals[f"nnFormer {name}"] = INPUTS[name]
        models[f"nnFormer {name}"] = WithDeepHeads(NNFormer(1, classes, **NNFORMER_SIZES[name]))
        inputs[f"nnFormer {name}"] = torch.randn(shape)
    times = {n: [] for n in models}
    for k in range(args.rounds + 1):                                     # the first round warms up
        for name, model in models.items():
            seconds = step(model, inputs[name], clock)
            if k: times[name].append(seconds)
    base = next(iter(times.values()))
    print(f"{torch.get_num_threads()} threads; medians of {args.rounds} interleaved rounds, of the ratio round by round")
    print(f"{'network':26}{'M params':>9}{'GMAC':>8}{'ms':>8}{'ratio':>8}{'goal':>12}")
    for name, t in times.items():
        macs, goal = count_macs(getattr(models[name], "model", models[name]), inputs[name].shape), goals.get(name)
        print(f"{name:26}{count_parameters(models[name])/1e6:9.2f}{macs/1e9:8.1f}{1000*median(t):8.0f}"
              f"{median(a/b for a, b in zip(t, base, strict=True)):8.2f}{f'<= {1.1*goal:.1f}' if goal else '':>12}")


if __name__ == "__main__": main()
