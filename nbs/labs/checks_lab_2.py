"""The checks of lab 2. Each says what is wrong in words; reading them is allowed, but try first."""
import torch
from marking import close, exercise, expect, in_words, need_tensor, wrong
from scipy.optimize import linear_sum_assignment

from medseg_nb.blocks.sinkhorn import sinkhorn


def plan_of(cost, eps, n_iters, **options):
    "The library's plan of one cost matrix (n,t)."
    return sinkhorn(cost[None], eps, n_iters, **options)[0]

def some_cost(*shape):
    "Costs between -1 and 1, in double precision."
    return 2*torch.rand(*shape, dtype=torch.double) - 1


@exercise(1, "by hand")
def check_by_hand(plan, cost):
    "Tokens at 0, 1, 3, 5 with mass 1/4, references at 1 and 4 with mass 1/2."
    best = torch.tensor([[1., 0], [1, 0], [0, 1], [0, 1]])/4
    distance = (torch.tensor([0., 1, 3, 5])[:,None] - torch.tensor([1., 4])).abs()
    plan = torch.as_tensor(plan, dtype=torch.float)
    need_tensor(plan, best, "the plan", {(2, 4): "a row is a token, a column a reference; transpose it."})
    if (plan < -1e-6).any(): wrong("the plan: mass cannot be negative.")
    if close(plan, 4*best): wrong("the plan: these are the right pairs, but each token brings a mass of 1/4, not 1.")
    if not close(plan.sum(1), torch.full((4,), .25)): wrong(f"the plan: each row must sum to 1/4, the mass of a token; yours sum to {numbers(plan.sum(1))}.")
    if not close(plan.sum(0), torch.full((2,), .5)): wrong(f"the plan: each column must sum to 1/2, the mass of a reference; yours sum to {numbers(plan.sum(0))}.")
    paid = (plan*distance).sum().item()
    if paid > .75 + 1e-5: wrong(f"the plan is allowed, but costs {paid:.3f}; there is a cheaper one. Which token is nearer to which reference?")
    expect(cost, torch.tensor(.75), "the cost", {"the cost: you added the distances; weigh each by the mass that moves.": torch.tensor(3.),
                                                 "the cost: only the tokens of one reference are counted.": torch.tensor(.25)})

def numbers(x): return ", ".join(f"{v:.3g}" for v in x.tolist())


def scaled(cost, eps, n_iters, sign=-1, a=None, b=None, columns_first=False, times=False):
    "Kernel and scalings with one possible mistake."
    n, t = cost.shape
    K = (sign*(cost*eps if times else cost/eps)).exp()
    a, b = (1/n if a is None else a), (1/t if b is None else b)
    u, v = torch.ones(n).to(K), torch.ones(t).to(K)
    for _ in range(n_iters):
        if columns_first: v = b/(K.T @ u); u = a/(K @ v)
        else: u = a/(K @ v); v = b/(K.T @ u)
    return u[:,None]*K*v, K, u, v

@exercise(2, "kernel and scalings")
def check_scalings(gibbs_kernel, scale):
    "A kernel, then 3 iterations on 6 tokens and 4 references."
    cost = some_cost(6, 4)
    asked = cost, .3, 3
    right, K, u, v = scaled(*asked)
    expect(gibbs_kernel(cost, .3), K, "gibbs_kernel", {
        "gibbs_kernel: the sign is missing; a dear move must get a small entry, exp(-cost/eps).": (cost/.3).exp(),
        "gibbs_kernel: divide the cost by eps, do not multiply.": (-cost*.3).exp(),
        "gibbs_kernel: eps is missing.": (-cost).exp(),
        "gibbs_kernel: the exponential is missing.": -cost/.3}, tol=1e-9)
    expect(scale(*asked), right, "the plan", {
        "the plan: the masses are missing; u is (1/n)/(K v) and v is (1/t)/(K^T u).": scaled(*asked, a=1, b=1)[0],
        "the plan: the masses are exchanged; a row sums to 1/n, a column to 1/t.": scaled(*asked, a=1/4, b=1/6)[0],
        "the plan: you scale the columns first; here each iteration scales the rows (u), then the columns (v).": scaled(*asked, columns_first=True)[0],
        "the plan: you only did one iteration; repeat both scalings n_iters times.": scaled(cost, .3, 1)[0],
        "the plan: one iteration too few.": scaled(cost, .3, 2)[0], "the plan: one iteration too many.": scaled(cost, .3, 4)[0],
        "the plan: these are u and v without the kernel; the plan is u_i K_ij v_j.": u[:,None]*v,
        "the plan: v is missing; the plan is u_i K_ij v_j.": u[:,None]*K, "the plan: u is missing; the plan is u_i K_ij v_j.": K*v,
    }, {(4, 6): "a row is a token; transpose it.", (6,): "these are the factors of the rows; the plan is u_i K_ij v_j.",
        (4,): "these are the factors of the columns; the plan is u_i K_ij v_j."}, tol=1e-7)


@exercise(3, "in the log domain")
def check_log_sinkhorn(log_sinkhorn):
    "A batch of two, gently; then with costs a thousand times eps."
    cost = some_cost(2, 6, 4)
    right = sinkhorn(cost, .3, 5)
    n_t = 6*4
    expect(log_sinkhorn(cost, .3, 5), right, "the plans", {
        "the plans: the logarithms of the masses are missing: f = log(1/n) - logsumexp(...), g = log(1/t) - logsumexp(...).": wrong_logs(cost, "mass"),
        "the plans: the sign of the cost is the wrong way round.": wrong_logs(cost, "sign"),
        "the plans: this is log T; take the exponential at the end.": right.log(),
        "the plans: the masses are exchanged; log(1/n) belongs to the rows.": wrong_logs(cost, "swap"),
        "the plans: multiplied by n t; rows should sum to 1/n.": right*n_t,
        "the plans: you only did one iteration.": sinkhorn(cost, .3, 1),
    }, {(6, 4): "the batch got lost; work on the last two axes.", (2, 4, 6): "a row is a token; transpose it."}, tol=1e-7)
    hard = 2 + some_cost(1, 5, 3)
    found = log_sinkhorn(hard, 1e-3, 50)
    if not found.isfinite().all():
        wrong("right while the numbers are small, but with eps = 0.001 there are NaN or infinity: somewhere an exponential is taken before the logarithm. Use torch.logsumexp.")
    expect(found, sinkhorn(hard, 1e-3, 50), "the plans for eps = 0.001", tol=1e-6)

def wrong_logs(cost, what, eps=.3, n_iters=5):
    "The log-domain iterations with one mistake."
    n, t = cost.shape[1:]
    K = cost/eps if what == "sign" else -cost/eps
    a, b = {"mass": (1, 1), "swap": (1/t, 1/n)}.get(what, (1/n, 1/t))
    f, g = cost.new_zeros(len(cost), n), cost.new_zeros(len(cost), t)
    log = lambda m: torch.tensor(m, dtype=cost.dtype).log()
    for _ in range(n_iters):
        f = log(a) - torch.logsumexp(K + g[:,None], 2)
        g = log(b) - torch.logsumexp(K + f[..., None], 1)
    return (K + f[..., None] + g[:,None]).exp()


@exercise(4, "marginal error")
def check_marginal_error(marginal_error, iterations_needed):
    "A plan that is not finished, then how often one must iterate."
    plan = plan_of(some_cost(6, 4), .1, 2)*1.1
    rows, columns = plan.sum(1) - 1/6, plan.sum(0) - 1/4
    e, f = rows.abs().sum(), columns.abs().sum()
    expect(marginal_error(plan), e + f, "the error", {
        "the error: the absolute values are missing, so that too much and too little cancel.": rows.sum() + columns.sum(),
        "the error: only the rows are counted.": e, "the error: only the columns are counted.": f,
        "the error: you squared; absolute values are asked for.": rows.square().sum() + columns.square().sum(),
        "the error: you averaged; the sums are asked for.": e/6 + f/4,
        "the error: 1/n and 1/t are exchanged: the n rows sum to 1/n.": (plan.sum(1) - 1/4).abs().sum() + (plan.sum(0) - 1/6).abs().sum(),
        "the error: rows and columns are compared with 1; they should sum to 1/n and 1/t.": (plan.sum(1) - 1).abs().sum() + (plan.sum(0) - 1).abs().sum(),
        "the error: the axes are exchanged: sum(1) gives the rows' sums.": (plan.sum(0) - 1/6).abs().sum() + (plan.sum(1) - 1/4).abs().sum(),
    }, {(6,): "one number is asked for; add them."}, tol=1e-9)
    check_count(iterations_needed)

def check_count(iterations_needed):
    "Errors 1/2, 1/4, 1/8 ... after 1, 2, 3 ... iterations."
    asked = []
    def error_after(k): asked.append(k); return .5**k
    found = iterations_needed(error_after, .1)
    if found is None: wrong("iterations_needed: your function returned nothing; is the `return` missing?")
    if found == 3: wrong("iterations_needed: one too few; after 3 iterations the error is still 0.125, above 0.1. Check before you return.")
    if found == 5: wrong("iterations_needed: one too many; count from 1 and return the first number that is good enough.")
    if found != 4: wrong(f"iterations_needed: for errors 1/2, 1/4, 1/8, 1/16 ... and tolerance 0.1 the answer is 4, yours is {found}.")
    if 0 in asked: wrong("iterations_needed: you asked for 0 iterations; begin with 1.")


@exercise(5, "the two limits")
def check_limits(plan_of_large_eps, plan_of_small_eps):
    "6 tokens and 4 references; then 3 and 3, so that the limit of small eps is an assignment."
    cost = some_cost(6, 4)
    expect(plan_of_large_eps(cost), torch.full((6, 4), 1/24).double(), "large eps", {
        "large eps: the mass must sum to 1 in all; every entry is 1/(n t).": torch.ones(6, 4).double(),
        "large eps: rows must sum to 1/n; every entry is 1/(n t).": torch.full((6, 4), 1/4).double(),
        "large eps: rows must sum to 1/n; every entry is 1/(n t). ": torch.full((6, 4), 1/6).double(),
        "large eps: this still depends on the cost; when the entropy is everything, no pair is preferred.": (-cost).softmax(-1)/6})
    check_assignment(plan_of_small_eps)

def check_assignment(plan_of_small_eps):
    "An assignment that differs from the greedy choice."
    cost = torch.tensor([[9., 1, 2], [3, 9, 2], [1, .5, 9]]).double()
    rows, columns = map(torch.from_numpy, linear_sum_assignment(cost.numpy()))
    _, dearest = map(torch.from_numpy, linear_sum_assignment(cost.numpy(), maximize=True))
    pairs = lambda j: torch.zeros(3, 3).double().index_put_((rows, j), torch.tensor(1/3, dtype=torch.double))
    expect(plan_of_small_eps(cost), pairs(columns), "small eps", {
        "small eps: the pairs are right, but each carries a mass of 1/n, not 1.": 3*pairs(columns),
        "small eps: you sent each token to its nearest reference; then one reference gets too much and another nothing. All columns must sum to 1/t as well.": pairs(cost.argmin(1)),
        "small eps: you sent each token to its nearest reference; all columns must sum to 1/t as well, and the mass of a pair is 1/n.": 3*pairs(cost.argmin(1)),
        "small eps: this is the dearest assignment; the cheapest is asked for.": pairs(dearest),
        "small eps: rows and columns are exchanged.": pairs(columns).mT,
    }, {(3,): "these are the numbers of the references; put 1/n at (row, column) of a matrix of zeros."}, tol=1e-9)


def roots(A, power=-.5, floor=1e-4, elementwise=False, turned=False):
    "A power of a symmetric matrix, with one possible mistake."
    if elementwise: return A.clamp_min(1e-12)**power
    values, vectors = torch.linalg.eigh(A)
    values = values.clamp_min(floor)**power if floor else values**power
    return vectors.mT @ values.diag() @ vectors if turned else vectors @ values.diag() @ vectors.mT

@exercise(6, "Nystrom features")
def check_nystrom(inverse_square_root, nystrom):
    "A matrix with two equal anchors (singular), then 7 tokens and 4 anchors."
    unit = torch.nn.functional.normalize
    w = torch.randn(4, 3, dtype=torch.double)
    A = (unit(w) @ unit(w).mT - 1).exp()
    found = inverse_square_root(A, 1e-4)
    expect(found, roots(A), "inverse_square_root", {
        "inverse_square_root: you took 1/sqrt of every entry, as the paper prints it; the root of the *matrix* is meant (eigh).": roots(A, elementwise=True),
        "inverse_square_root: this is the inverse; the square root of the eigenvalues is missing.": roots(A, power=-1),
        "inverse_square_root: this is the square root; take 1/sqrt of the eigenvalues.": roots(A, power=.5),
        "inverse_square_root: eigh gives the eigenvectors as columns: V diag(...) V^T, not V^T diag(...) V.": roots(A, turned=True)}, tol=1e-6)
    B = A[[0, 1, 2, 0]][:, [0, 1, 2, 0]]
    if not close(inverse_square_root(B, 1e-2), roots(B, floor=1e-2), 1e-5):
        wrong("inverse_square_root: right for a good matrix, but with two equal anchors an eigenvalue is 0; raise eigenvalues below `floor` to it (clamp_min).")
    check_features(nystrom, torch.randn(2, 7, 3, dtype=torch.double), w, unit)

def check_features(nystrom, x, w, unit):
    "psi of tokens of any length."
    def psi(x, w, alpha=2., one=1., root=True):
        values = (alpha*(x @ w.mT - one)).exp()
        return values @ roots((alpha*(w @ w.mT - one)).exp()) if root else values
    expect(nystrom(x, w, 2.), psi(unit(x, dim=-1), unit(w)), "nystrom", {
        "nystrom: tokens and anchors must be scaled to length 1 first.": psi(x, w), "nystrom: the tokens are not scaled to length 1.": psi(x, unit(w)),
        "nystrom: the tokens must be scaled along their channels (dim=-1), not along the tokens.": psi(unit(x, dim=1), unit(w)),
        "nystrom: this is kappa(x, w) alone; multiply it with the inverse square root of kappa(w, w).": psi(unit(x, dim=-1), unit(w), root=False),
        "nystrom: alpha is missing.": psi(unit(x, dim=-1), unit(w), alpha=1.),
        "nystrom: in the exponent the -1 is missing; kappa(x, x) must be 1.": psi(unit(x, dim=-1), unit(w), one=0.),
        "nystrom: in the exponent the sign is the wrong way round; like tokens must get the largest value.": psi(unit(x, dim=-1), unit(w), alpha=-2.),
    }, {(7, 4): "the batch got lost."}, tol=1e-5)


@exercise(7, "pooling with the plan")
def check_pool(pool, back, multiplications):
    "Eq. 3, the way back, and what both cost."
    plan, x = sinkhorn(some_cost(2, 6, 4), .3, 5), torch.randn(2, 6, 3, dtype=torch.double)
    sums = plan.mT @ x
    expect(pool(plan, x), 2*sums, "pool", {
        "pool: the factor sqrt(t) of eq. 3 is missing.": sums, "pool: the factor is sqrt(t), not t.": 4*sums,
        "pool: the factor is the root of t (references), not of n (tokens).": 6**.5*sums,
        "pool: the factor is multiplied, not divided.": sums/2},
        {(2, 6, 3): "each reference pools all tokens, so the plan is transposed: (B,t,n) @ (B,n,k).", (2, 3, 4): "references come first: (B,t,k)."}, tol=1e-9)
    found = back(plan, 2*sums)
    share = plan @ (2*sums)
    expect(found, 6*share, "back", {"back: the factor n is missing; a row of the plan sums to 1/n, and a token takes back a share of 1.": share,
                                    "back: the factor is n (tokens), not t.": 4*share, "back: the factor is n, not its root.": 6**.5*share},
           {(2, 4, 3): "each token takes from all references: (B,n,t) @ (B,t,k)."}, tol=1e-9)
    check_cost(multiplications)

def check_cost(multiplications):
    "n = 1000 tokens, t = 16 references, k = 8 channels."
    found = multiplications(1000, 16, 8)
    if not isinstance(found, tuple) or len(found) != 2: wrong("multiplications: return two numbers, for attention and for the plan.")
    attention, plan = (float(x) for x in found)
    if (attention, plan) == (3*128000, 2*8e6): wrong("multiplications: the two numbers are exchanged; attention comes first.")
    if attention == 8e6: wrong("multiplications: attention has two products of n x n x k, the scores and the sum of the values; you counted one.")
    if attention != 16e6: wrong(f"multiplications: attention needs n n k for the scores and n n k for the sum of the values, 16000000 here; yours is {attention:.0f}.")
    if plan in (128000, 256000): wrong("multiplications: three products have size n x t x k: similarities, pooling, and the way back.")
    if plan != 384000: wrong(f"multiplications: the plan needs n t k three times (similarities, pooling, way back), 384000 here; yours is {plan:.0f}.")


@exercise(8, "in words")
def check_answer(text):
    "Long enough to be an answer; whether it is a good one, a person says."
    in_words(text, at_least=30)
