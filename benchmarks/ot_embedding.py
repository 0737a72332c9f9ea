"""L2GMapper against self-attention as tokens grow, and OTEmbedding against the same around other solvers.

    python benchmarks/ot_embedding.py                       # three minutes on one core
    python benchmarks/ot_embedding.py --rounds 3 --threads 1 --cpu-time

Whole modules, forward + backward, gradients of the map and of every weight. The targets: with t fixed, time and peak
memory of L2GMapper grow at most 1.15 times as fast as n from n = 784 to 16384. Compare the ratios, not the milliseconds.
Naive attention is left out above n = 4096, where its weights alone fill gigabytes. Fused attention never builds them:
its memory is linear in n too, its time is not.
"""
import measure
import torch
import torch.nn.functional as F
from sinkhorn import POT, REFERENCE, VERSIONS

from medseg_nb.blocks.disconx import DisConX, split_heads
from medseg_nb.blocks.ot_embedding import L2GMapper, OTEmbedding

SIDES, DIM, HEADS = (28, 40, 56, 80, 112, 128), 256, 4   # n = 784 ... 16384
MAPPER, FUSED, NAIVE = "L2GMapper, t 64, q 4", "self-attention, fused", "self-attention, naive"


def naive(block, z):
    "Self-attention with the n x n weights built."
    return block.project(block.attention(z, z) @ split_heads(block.value(block.tokens(z)), block.heads), z)


def scaling(args):
    "{n: {row: (ms, MiB)}}, all rows of one n in turn."
    mapper, block, found = L2GMapper(DIM, heads=HEADS).to(args.device), DisConX(DIM, HEADS).to(args.device), {}
    for side in SIDES:
        z = torch.randn(1, DIM, side, side, device=args.device, requires_grad=True)
        rows = {MAPPER: lambda z, *_: mapper(z), FUSED: lambda z, *_: block(z, z), NAIVE: lambda z, *_: naive(block, z)}
        if side**2 > 4096: del rows[NAIVE]
        rows = {name: measure.both_ways(f, [z, *(mapper if name == MAPPER else block).parameters()]) for name, f in rows.items()}
        ms = measure.medians(measure.in_turn(rows, args.rounds, args.clock))
        found[side**2] = {name: (ms[name][-1], measure.peak(row, args.device)) for name, row in rows.items()}
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


def embeddings(args):
    "OTEmbedding beside POT and the plain reference."
    block, x = OTEmbedding(128, 64, 4).to(args.device), F.normalize(torch.randn(8, 196, 128, device=args.device), dim=2).requires_grad_()
    solvers = {"OTEmbedding": lambda x, *_: block(x), POT: around(VERSIONS[POT], block), REFERENCE: around(VERSIONS[REFERENCE], block)}
    rows = {name: measure.both_ways(f, [x, *block.parameters()]) for name, f in solvers.items()}
    measure.compare("B8 n196 k128, t 64, q 4", rows, args, "OTEmbedding", 4*args.rounds)


def main():
    args = measure.arguments(__doc__, 5)
    embeddings(args)
    print_scaling(scaling(args))


if __name__ == "__main__": main()
