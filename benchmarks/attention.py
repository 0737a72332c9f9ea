"""DisConX and HardAttention against plain attention: time and peak memory, forward and forward + backward.

    python benchmarks/attention.py              # two or three minutes on 2 cores
    python benchmarks/attention.py --rounds 21 --threads 1 --cpu-time

Rows work on queries, keys and values (B, heads, n, d) that are already projected, so that they differ in the
attention alone; the last table compares whole modules. Times are medians of interleaved rounds (the order turns by
one each round); compare the ratios, not the milliseconds. Memory is the most that tensors took at once during forward
+ backward, beyond the inputs that were there before: on a CPU from the profiler's list of allocations, on a GPU from
the allocator.
"""
import argparse
import itertools
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from medseg_nb.blocks.disconx import DisConX
from medseg_nb.blocks.hard_attention import HardAttention, StraightThroughPick, find_winners

DENSE, OURS = "one-hot straight-through", "HardAttention, straight-through"
SIZES = {"B8 n196 d512 h2": (8, 196, 512, 2), "B8 n196 d512 h8": (8, 196, 512, 8),
         "B1 n3136 d256 h8": (1, 3136, 256, 8)}


def naive(q, k, v):
    "Soft attention with the n x n weights built."
    return (q @ k.mT * q.shape[-1]**-0.5).softmax(-1) @ v


def gather(q, k, v):
    "Arg-max and gather: no gradient to q and k."
    return v.gather(2, (q @ k.mT).argmax(-1, keepdim=True).expand_as(v))


def dense(q, k, v):
    "Hard weights forward, soft weights backward, as n x n matrices."
    s = q @ k.mT * q.shape[-1]**-0.5
    soft = s.softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, s.argmax(-1, keepdim=True), 1.)
    return (hard + soft - soft.detach()) @ v


def ours(q, k, v):
    "What HardAttention computes between its projections."
    q, k, x = (t.flatten(0, 1) for t in (q * q.shape[-1]**-0.5, k, v))   # (B,heads,n,d) -> (G,n,d)
    with torch.no_grad(): winners = find_winners(q, k, False)
    return StraightThroughPick.apply(q, k, x, winners, False).view_as(v)


ATTENTION = {"F.scaled_dot_product_attention (DisConX)": F.scaled_dot_product_attention, "naive softmax": naive,
             "arg-max + gather": gather, DENSE: dense, OURS: ours}


class Peer(nn.MultiheadAttention):
    "nn.MultiheadAttention on maps (B,C,*S)."
    def forward(self, z_dis, z_con):
        q, kv = z_dis.flatten(2).mT, z_con.flatten(2).mT
        return super().forward(q, kv, kv, need_weights=False)[0].mT.reshape(z_dis.shape)


def modules(dim, heads):
    "Whole modules with their projections."
    return {"nn.MultiheadAttention": Peer(dim, heads, bias=False, batch_first=True), "DisConX": DisConX(dim, heads),
            "HardAttention": HardAttention(dim, heads),
            "HardAttention, estimator none": HardAttention(dim, heads, estimator="none")}


def step(f, inputs, backward=True):
    "One forward and, if asked, backward pass; returns the clock's reading in between."
    out = f(*inputs)
    if out.is_cuda: torch.cuda.synchronize()
    between = CLOCK()
    if backward: torch.autograd.grad(out.sum(), inputs, allow_unused=True)
    if out.is_cuda: torch.cuda.synchronize()
    return between


def times(rows, inputs, rounds):
    "Median milliseconds {name: (forward, forward + backward)}, interleaved."
    names, seen = list(rows), {name: [] for name in rows}
    for i in range(rounds + 1):                                       # the first round warms up
        for name in names[i % len(names):] + names[:i % len(names)]:
            start = CLOCK()
            between = step(rows[name], inputs[name])
            if i: seen[name].append((between - start, CLOCK() - start))
    return {name: [1e3*median(column) for column in zip(*pairs, strict=True)] for name, pairs in seen.items()}


def peak(f, inputs):
    "MiB of tensors alive at once during forward + backward, above what was there before."
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(f, inputs)
        return (torch.cuda.max_memory_allocated() - before)/2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record: step(f, inputs)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))/2**20


def table(title, rows, inputs, rounds, reference):
    "Print one size: forward, forward + backward, its ratio to the reference row, memory, its ratio."
    ms, mib = times(rows, inputs, rounds), {name: peak(f, inputs[name]) for name, f in rows.items()}
    print(f"\n{title}\n{'':42s}{'fwd ms':>9s}{'fwd+bwd':>9s}{'ratio':>7s}{'peak MiB':>10s}{'ratio':>7s}")
    for name in rows:
        (forward, both), mem = ms[name], mib[name]
        ratios = both/ms[reference][1], mem/mib[reference]
        print(f"{name:42s}{forward:9.1f}{both:9.1f}{ratios[0]:7.2f}{mem:10.1f}{ratios[1]:7.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine in use")
    args = parser.parse_args()
    global CLOCK
    CLOCK = time.process_time if args.cpu_time else time.perf_counter
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    for title, (b, n, d, h) in SIZES.items():
        qkv = [torch.randn(b, h, n, d//h, device=args.device, requires_grad=True) for _ in range(3)]
        rounds = max(3, args.rounds//3) if n > 1000 else args.rounds
        table(title, ATTENTION, dict.fromkeys(ATTENTION, qkv), rounds, DENSE)
    maps = [torch.randn(8, 512, 14, 14, device=args.device, requires_grad=True) for _ in range(2)]
    rows = {name: block.to(args.device) for name, block in modules(512, 8).items()}
    inputs = {name: maps[:1] if "Hard" in name else maps for name in rows}
    table("whole modules, B8 512 x 14 x 14, h8", rows, inputs, args.rounds, "nn.MultiheadAttention")


if __name__ == "__main__": main()
