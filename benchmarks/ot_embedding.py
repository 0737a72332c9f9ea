"""L2GMapper against self-attention as tokens grow, and OTEmbedding against the same around other solvers.

    python benchmarks/ot_embedding.py                       # three minutes on one core
    python benchmarks/ot_embedding.py --rounds 3 --threads 1 --cpu-time

Whole modules, forward + backward, gradients of the map and of every weight. The targets: with t fixed, time and peak
memory of L2GMapper grow at most 1.15 times as fast as n from n = 784 to 16384. Times are medians of interleaved rounds;
compare the ratios, not the milliseconds. Memory is the most that tensors took at once beyond what was there before.
Naive attention is left out above n = 4096, where its weights alone fill gigabytes. Fused attention never builds them:
its memory is linear in n too, its time is not.
"""
import argparse
import os
import time

os.environ.setdefault("KINETO_LOG_LEVEL", "5")   # the profiler is talkative otherwise

import attention
import torch
from sinkhorn import POT, REFERENCE, VERSIONS

from medseg_nb.blocks.disconx import DisConX, split_heads
from medseg_nb.blocks.ot_embedding import L2GMapper, OTEmbedding

SIDES, DIM, HEADS = (28, 40, 56, 80, 112, 128), 256, 4   # n = 784 ... 16384
MAPPER, FUSED, NAIVE = "L2GMapper, t 64, q 4", "self-attention, fused", "self-attention, naive"


def naive(block, z):
    "Self-attention with the n x n weights built."
    return block.project(block.attention(z, z) @ split_heads(block.value(block.tokens(z)), block.heads), z)


def scaling(rounds, device):
    "{n: {row: (ms, MiB)}}, all rows of one n in turn."
    mapper, block, found = L2GMapper(DIM, heads=HEADS).to(device), DisConX(DIM, HEADS).to(device), {}
    for side in SIDES:
        z = torch.randn(1, DIM, side, side, device=device, requires_grad=True)
        rows = {MAPPER: lambda z, *_: mapper(z), FUSED: lambda z, *_: block(z, z), NAIVE: lambda z, *_: naive(block, z)}
        if side**2 > 4096: del rows[NAIVE]
        inputs = {name: [z, *(mapper if name == MAPPER else block).parameters()] for name in rows}
        ms = attention.times(rows, inputs, rounds)
        found[side**2] = {name: (ms[name][1], attention.peak(f, inputs[name])) for name, f in rows.items()}
    return found


def print_scaling(found):
    "Milliseconds and MiB per n, then how much faster than n each grew."
    names = list(found[min(found)])
    print(f"\nB1, {DIM} channels, {HEADS} heads\n{'n':>7s}" + "".join(f"{name:>32s}" for name in names))
    for n, row in found.items():
        print(f"{n:7d}" + "".join(f"{row[name][0]:17.1f} ms {row[name][1]:8.1f} MiB" if name in row else f"{'':>32s}" for name in names), flush=True)
    first, last = min(found), max(found)
    for name in names:
        if name not in found[last]: continue
        time_, memory = (found[last][name][k]/found[first][name][k]*first/last for k in (0, 1))
        print(f"{name:24s} from n = {first} to {last}: time grew {time_:.2f} times as fast as n, peak memory {memory:.2f} times")


def around(solver, block):
    "Eq. 3 around another solver of eq. 1, by einsum."
    def run(x, *_):
        cost = -torch.einsum("bnk,qtk->bqnt", x, block.references)
        plan = solver(cost.flatten(0, 1), block.eps, block.n_iters).view_as(cost)
        q, t = cost.shape[1::2]
        return (t/q)**0.5*torch.einsum("bqnt,bnk->bqtk", plan, x)
    return run


def embeddings(rounds, device):
    "OTEmbedding beside POT and the plain reference."
    block, x = OTEmbedding(128, 64, 4).to(device), torch.nn.functional.normalize(torch.randn(8, 196, 128, device=device), dim=2).requires_grad_()
    rows = {"OTEmbedding": lambda x, *_: block(x), POT: around(VERSIONS[POT], block), REFERENCE: around(VERSIONS[REFERENCE], block)}
    attention.table("B8 n196 k128, t 64, q 4", rows, dict.fromkeys(rows, [x, *block.parameters()]), rounds, "OTEmbedding")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine in use")
    args = parser.parse_args()
    attention.CLOCK = time.process_time if args.cpu_time else time.perf_counter
    torch.manual_seed(0); torch.set_num_threads(args.threads)
    embeddings(4*args.rounds, args.device)
    print_scaling(scaling(args.rounds, args.device))


if __name__ == "__main__": main()
