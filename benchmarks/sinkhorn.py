"""sinkhorn against POT's batched solvers and plain reference code: time, peak memory and the error of the gradient.

    python benchmarks/sinkhorn.py               # a minute on one core
    python benchmarks/sinkhorn.py --rounds 101 --threads 1 --cpu-time --size "B32 n196 t64, max cost / eps 1000"

All rows start from the same cost matrices and take the same number of iterations, without a test of convergence. Times
are medians of interleaved rounds (the order turns by one each round); compare the ratios, not the milliseconds. Memory
is the most that tensors took at once during forward + backward, beyond the cost that was there before: on a CPU from
the profiler's list of allocations, on a GPU from the allocator. The gradient's error is the norm of its difference to
unrolled autograd in float64, over the norm of the latter.
"""
import argparse
import itertools
import math
import os
import time

os.environ.setdefault("KINETO_LOG_LEVEL", "5")   # the profiler is talkative otherwise

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from medseg_nb.blocks.sinkhorn import sinkhorn, sinkhorn_unrolled

SIZES = {"B32 n196 t64, max cost / eps 10": (32, 196, 64, 0.1), "B32 n196 t64, max cost / eps 100": (32, 196, 64, 0.01),
         "B32 n196 t64, max cost / eps 1000": (32, 196, 64, 0.001), "B8 n3136 t64, max cost / eps 10": (8, 3136, 64, 0.1)}
OURS, OURS_PLAIN, POT, REFERENCE = "sinkhorn", "sinkhorn, log_domain=False", "POT ot.batch, log, autodiff", "reference, plain"
LAST = 'POT ot.batch, log, grad="last_step"'


def reference_plain(cost, eps, n_iters):
    "Scalings of exp(-cost/eps) by batched products, differentiated by autograd; sums 1/n and 1/t."
    B, n, t = cost.shape
    K = torch.exp(-cost/eps)
    v = K.new_ones(B, t, 1)
    for _ in range(n_iters):
        u = 1/n / torch.bmm(K, v)                    # (B,n,t) @ (B,t,1)
        v = 1/t / torch.bmm(u.mT, K).mT              # (B,1,n) @ (B,n,t), as (B,t,1)
    return u*K*v.mT


def pot(method, grad):
    "POT's batched solver; a negative tolerance keeps it going to the last iteration."
    def run(cost, eps, n_iters):
        from ot.batch import solve_batch
        return solve_batch(cost, eps, max_iter=n_iters, tol=-1., method=method, grad=grad).plan
    return run


VERSIONS = {OURS: sinkhorn, OURS_PLAIN: lambda *args: sinkhorn(*args, log_domain=False),
            POT: pot("log_sinkhorn", "autodiff"), "POT ot.batch, plain, autodiff": pot("sinkhorn", "autodiff"),
            LAST: pot("log_sinkhorn", "last_step"), REFERENCE: reference_plain, "reference, log": sinkhorn_unrolled}


def inputs(size, device):
    "Costs -<x, y> of unit vectors, and the gradient of the plan."
    B, n, t, _ = size
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(B, k, 64, device=device), dim=2) for k in (n, t))
    cost = -x @ y.mT
    return (cost/cost.abs().max()).requires_grad_(), torch.randn(B, n, t, device=device)


def step(f, cost, weight, eps, n_iters, clock):
    "Forward, backward: seconds of the first, and of both."
    wait = torch.cuda.synchronize if cost.is_cuda else lambda: None
    wait(); start = clock()
    plan = f(cost, eps, n_iters)
    wait(); between = clock()
    torch.autograd.grad(plan, cost, weight)
    wait(); return between - start, clock() - start


def times(size, args):
    "Median milliseconds of each version, forward and forward + backward, timed in turn."
    (cost, weight), names = inputs(size, args.device), list(VERSIONS)
    record = {name: [] for name in names}
    for r in range(args.rounds + 2):
        for name in names[r % len(names):] + names[:r % len(names)]:
            seconds = step(VERSIONS[name], cost, weight, size[3], args.iterations, args.clock)
            if r > 1: record[name].append(seconds)   # the first rounds warm up
    return {name: [1e3*sorted(x)[len(x)//2] for x in zip(*rows, strict=True)] for name, rows in record.items()}


def peak(name, size, args):
    "MiB of tensors alive at once during forward + backward, above what was there before."
    cost, weight = inputs(size, args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        step(VERSIONS[name], cost, weight, size[3], args.iterations, args.clock)
        return (torch.cuda.max_memory_allocated() - before)/2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step(VERSIONS[name], cost, weight, size[3], args.iterations, args.clock)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))/2**20


def gradient_error(name, size, args):
    "Relative distance to the gradient of unrolled autograd in float64 (four items of the batch)."
    cost, weight = (x[:4].detach() for x in inputs(size, args.device))
    grads = []
    for f, dtype in ((VERSIONS[name], cost.dtype), (sinkhorn_unrolled, torch.float64)):
        x = cost.to(dtype).requires_grad_()
        grads.append(torch.autograd.grad(f(x, size[3], args.iterations), x, weight.to(dtype))[0].double())
    return float((grads[0] - grads[1]).norm()/grads[1].norm())


def table(title, size, args):
    "Print one size."
    ms = times(size, args)
    mib, error = ({name: f(name, size, args) for name in VERSIONS} for f in (peak, gradient_error))
    print(f"\n{title}\n{'':38s}{'forward ms':>11s}{'+ backward':>12s}{'ratio':>8s}{'peak MiB':>10s}{'gradient error':>16s}")
    for name, (forward, both) in ms.items():
        wrong = f"{error[name]:.1e}" if math.isfinite(error[name]) else "not finite"
        print(f"{name:38s}{forward:11.2f}{both:12.2f}{both/ms[OURS][1]:8.2f}{mib[name]:10.1f}{wrong:>16s}")
    print(f"POT's log form takes {ms[POT][1]/ms[OURS][1]:.1f} times as long as sinkhorn; "
          f"log_domain=False {ms[OURS_PLAIN][1]/ms[REFERENCE][1]:.2f} times as long as the plain reference")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", dest="clock", action="store_const", const=time.process_time, default=time.perf_counter,
                        help="count CPU time (busy machines, one thread)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=list(SIZES), help="one size only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"PyTorch {torch.__version__}, {args.threads} threads, {args.device}, {args.rounds} rounds, {args.iterations} iterations")
    for title, size in SIZES.items():
        if args.size in (None, title): table(title, size, args)


if __name__ == "__main__": main()
