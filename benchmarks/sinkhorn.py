"""sinkhorn against POT's batched solvers and plain reference code: time, peak memory and the error of the gradient.

    python benchmarks/sinkhorn.py               # a minute on one core
    python benchmarks/sinkhorn.py --rounds 101 --threads 1 --cpu-time --size "B32 n196 t64, max cost / eps 1000"

All rows start from the same cost matrices and take the same number of iterations, without a test of convergence. Compare
the ratios, not the milliseconds. Memory is counted beyond the cost that was there before. The gradient's error is the norm of
its difference to unrolled autograd in float64, over the norm of the latter.
"""
import math

import measure
import torch
import torch.nn.functional as F

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


def both_ways(f, size, args):
    "A row: forward, a lap, backward."
    cost, weight = inputs(size, args.device)
    def row(lap):
        plan = f(cost, size[3], args.iterations)
        lap()
        torch.autograd.grad(plan, cost, weight)
    return row


def gradient_error(name, size, args):
    "Relative distance to the gradient of unrolled autograd in float64 (four items of the batch)."
    cost, weight = (x[:4].detach() for x in inputs(size, args.device))
    grads = []
    for f, dtype in ((VERSIONS[name], cost.dtype), (sinkhorn_unrolled, torch.float64)):
        x = cost.to(dtype).requires_grad_()
        grads.append(torch.autograd.grad(f(x, size[3], args.iterations), x, weight.to(dtype))[0].double())
    return float((grads[0] - grads[1]).norm()/grads[1].norm())


def compare(title, size, args):
    "Print one size."
    rows = {name: both_ways(f, size, args) for name, f in VERSIONS.items()}
    seconds = measure.in_turn(rows, args.rounds, args.clock)
    ms, ratio, lines = measure.medians(seconds), measure.ratios(seconds, OURS), {}
    for name, row in rows.items():
        error = gradient_error(name, size, args)
        lines[name] = *ms[name], ratio[name], measure.peak(row, args.device), f"{error:.1e}" if math.isfinite(error) else "not finite"
    measure.table(title, [("forward ms", ".2f"), ("+ backward", ".2f"), ("ratio", ".2f"), ("peak MiB", ".1f"), ("gradient error", "")], lines)
    plain = measure.ratios(seconds, REFERENCE)[OURS_PLAIN]
    print(f"POT's log form takes {ratio[POT]:.1f} times as long as sinkhorn; log_domain=False {plain:.2f} times as long as the plain reference")


def main():
    args = measure.arguments(__doc__, 21, iterations=dict(type=int, default=10), size=dict(choices=list(SIZES), help="one size only"))
    for title, size in SIZES.items():
        if args.size in (None, title): compare(title, size, args)


if __name__ == "__main__": main()
