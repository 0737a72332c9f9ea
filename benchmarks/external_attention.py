"""semantic_correlations against eq. 9 to 11 of LSSC written as printed: time and peak memory, forward + backward.

    python benchmarks/external_attention.py             # under a minute on 2 cores
    python benchmarks/external_attention.py --rounds 21 --threads 1 --cpu-time

The printed form holds the Z x Z x N x n products B^ij and divides two sums. Times are medians of interleaved rounds (the order turns by one
each round); compare the ratios, not the milliseconds. Memory is the most that tensors took at once beyond the inputs, from
the profiler's list of allocations.
"""
import argparse
import itertools
import time
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from medseg_nb.blocks.external_attention import semantic_correlations

SIZES = {"2D, scale 3: B12 Z5 N3 56x56": (12, 5, 3, 96, (56, 56)), "3D, scale 3: B2 Z5 N3 32x32x32": (2, 5, 3, 96, (32, 32, 32)),
         "2D, many classes: B12 Z14 N6 28x28": (12, 14, 6, 192, (28, 28))}


def as_printed(Q, A, W):
    "Eq. 9 to 11 with every array of the paper."
    K = torch.einsum("bzw,zwn->bzn", Q, W)
    A = A.flatten(3)                                             # (B,Z,N,n)
    S = torch.einsum("bih,bjhn->bijn", K, A)                     # (B,Z,Z,n)
    gate = S.softmax(2)
    B = A[:, None] * gate[:, :, :, None]                         # (B,Z,Z,N,n)
    return B.sum((3, 4)) / gate.sum(3)


ROWS = {"eq. 9 to 11 as printed": as_printed, "semantic_correlations": semantic_correlations}


def step(f, inputs):
    "One forward and backward pass."
    torch.autograd.grad(f(*inputs).square().sum(), inputs)


def times(inputs, rounds, clock):
    "Median milliseconds of each row, interleaved."
    names, seen = list(ROWS), {name: [] for name in ROWS}
    for i in range(rounds + 1):                                  # the first round warms up
        for name in names[i % len(names):] + names[:i % len(names)]:
            start = clock()
            step(ROWS[name], inputs)
            if i: seen[name].append(clock() - start)
    return {name: 1e3*median(values) for name, values in seen.items()}


def peak(f, inputs):
    "MiB of tensors alive at once during forward + backward, above what was there before."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record: step(f, inputs)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))/2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine in use")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    for title, (B, Z, N, width, shape) in SIZES.items():
        inputs = [torch.randn(s, requires_grad=True) for s in ((B, Z, width), (B, Z, N, *shape), (Z, width, N))]
        torch.testing.assert_close(as_printed(*inputs), semantic_correlations(*inputs), rtol=1e-2, atol=1e-3)
        ms = times(inputs, args.rounds, time.process_time if args.cpu_time else time.perf_counter)
        mib = {name: peak(f, inputs) for name, f in ROWS.items()}
        first = next(iter(ROWS))
        print(f"\n{title}\n{'':26s}{'fwd+bwd ms':>12s}{'ratio':>7s}{'peak MiB':>10s}{'ratio':>7s}")
        for name in ROWS: print(f"{name:26s}{ms[name]:12.1f}{ms[name]/ms[first]:7.2f}{mib[name]:10.1f}{mib[name]/mib[first]:7.2f}", flush=True)


if __name__ == "__main__": main()
