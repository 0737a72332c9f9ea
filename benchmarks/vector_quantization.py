"""Forward + backward of VectorQuantizer against a plain version and vector-quantize-pytorch: time and peak memory.

    python benchmarks/vector_quantization.py              # about two minutes on 2 cores
    python benchmarks/vector_quantization.py --rounds 21 --threads 1

Times are medians of interleaved rounds (the order turns by one each round); compare the ratios, not the milliseconds.
Memory is the most that tensors took at once during a step, beyond the inputs and weights that were there before: on a
CPU from the profiler's list of allocations, on a GPU from the allocator.
"""
import argparse
import itertools
import os
import time

os.environ.setdefault("KINETO_LOG_LEVEL", "5")   # the profiler is talkative otherwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from medseg_nb.blocks.vector_quantization import VectorQuantizer

SIZES = {"B8 n196 d512 K1024": (8, 14, 512, 1024), "B8 n3136 d256 K512": (8, 56, 256, 512),
         "B8 n16384 d256 K1024": (8, 128, 256, 1024)}
OURS, PLAIN, PEER, PEER_EMA = ("VectorQuantizer", "plain, 15 lines", "vector-quantize-pytorch, learnable codebook",
                               "vector-quantize-pytorch, default (EMA, rotation)")
OURS_EMA = "VectorQuantizer, EMA"


class Plain(nn.Module):
    "What most people write: tokens in rows, arg-min by addmm, two stop-gradient terms, straight-through."
    def __init__(self, dim, codebook_size, beta=1.0):
        super().__init__()
        self.codebook, self.beta = nn.Parameter(torch.randn(codebook_size, dim)), beta
    def forward(self, z):
        tokens = z.flatten(2).transpose(1, 2)                                          # (B,n,C)
        flat = tokens.reshape(-1, z.shape[1])                                          # (N,C)
        distance = torch.addmm(self.codebook.square().sum(1), flat, self.codebook.T, alpha=-2)
        codes = distance.argmin(1).view(tokens.shape[:2])                              # (B,n)
        chosen = F.embedding(codes, self.codebook)                                     # (B,n,C)
        loss = F.mse_loss(chosen, tokens.detach()) + self.beta*F.mse_loss(tokens, chosen.detach())
        out = tokens + (chosen - tokens).detach()
        return out.transpose(1, 2).reshape(z.shape), codes.view(z.shape[0], *z.shape[2:]), loss


def build(name, dim, codebook_size):
    "One of the versions by name."
    if name == PLAIN: return Plain(dim, codebook_size)
    if name == OURS: return VectorQuantizer(dim, codebook_size)
    if name == OURS_EMA: return VectorQuantizer(dim, codebook_size, ema_decay=0.8)
    from vector_quantize_pytorch import VectorQuantize
    if name == PEER_EMA: return VectorQuantize(dim, codebook_size, accept_image_fmap=True)
    return VectorQuantize(dim, codebook_size, accept_image_fmap=True, learnable_codebook=True, ema_update=False,
                          rotation_trick=False, straight_through=False)


def step(module, z, weight):
    "One forward and backward pass; the gradient of the output is `weight`."
    z.grad = None
    for p in module.parameters(): p.grad = None
    out = module(z)
    torch.autograd.backward([out[0], out[2].sum()], [weight, None])
    if z.is_cuda: torch.cuda.synchronize()


def inputs(size, device):
    "Tokens that need a gradient, and the gradient of the output."
    B, side, dim, _ = size
    torch.manual_seed(0)
    z, weight = torch.randn(2, B, dim, side, side, device=device)
    return z.requires_grad_(), weight


def times(names, size, rounds, device, clock=time.perf_counter):
    "Median milliseconds of each version, timed in turn."
    z, weight = inputs(size, device)
    modules = {name: build(name, size[2], size[3]).to(device) for name in names}
    record = {name: [] for name in names}
    for r in range(rounds + 1):
        for name in names[r % len(names):] + names[:r % len(names)]:
            start = clock()
            step(modules[name], z, weight)
            if r: record[name].append(1e3*(clock() - start))   # round 0 warms up
    return {name: sorted(values)[len(values)//2] for name, values in record.items()}


def peak(name, size, device):
    "MiB of tensors alive at once during a step, above what was there before it (inputs and weights)."
    module, (z, weight) = build(name, size[2], size[3]).to(device), inputs(size, device)
    step(module, *inputs((1, 4, *size[2:]), device))   # libraries take their buffers
    for p in module.parameters(): p.grad = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(module, z, weight)
        return (torch.cuda.max_memory_allocated() - before)/2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record: step(module, z, weight)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(alive)/2**20


def table(title, names, size, args):
    "Print one size: time, its ratio to the plain version, memory, its ratio."
    clock = time.process_time if args.cpu_time else time.perf_counter
    ms = times(names, size, args.rounds, args.device, clock)
    mib = {name: peak(name, size, args.device) for name in names}
    print(f"\n{title}\n{'':50s}{'ms':>9s}{'ratio':>8s}{'peak MiB':>10s}{'ratio':>8s}")
    for name in names:
        print(f"{name:50s}{ms[name]:9.1f}{ms[name]/ms[PLAIN]:8.2f}{mib[name]:10.0f}{mib[name]/mib[PLAIN]:8.2f}")
    if PEER in names: print(f"vector-quantize-pytorch takes {ms[PEER]/ms[OURS]:.2f} times as long as VectorQuantizer")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time (busy machines, one thread)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=list(SIZES), help="one size only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"PyTorch {torch.__version__}, {args.threads} threads, {args.device}, {args.rounds} rounds")
    for title, size in SIZES.items():
        if args.size not in (None, title): continue
        large = size[1] > 100
        table(title, [OURS, PLAIN] + ([] if large else [OURS_EMA, PEER, PEER_EMA]), size, args)


if __name__ == "__main__": main()
