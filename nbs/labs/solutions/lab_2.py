"""Solutions of lab 2. Each part below is the whole of one exercise's cell."""
import math

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

# %%
# Exercise 1: by hand
hand_plan = [[1/4, 0], [1/4, 0], [0, 1/4], [0, 1/4]]   # a row a token (at 0, 1, 3, 5), a column a reference (at 1, 4)
hand_cost = 3/4                                        # sum of mass times distance

# %%
# Exercise 2: kernel and scalings
def gibbs_kernel(cost, eps):
    "cost (n,t) -> K (n,t): large where moving is cheap."
    return torch.exp(-cost/eps)

def scale(cost, eps, n_iters):
    "cost (n,t) -> plan (n,t) after n_iters iterations; each scales the rows, then the columns."
    n, t = cost.shape
    K, v = gibbs_kernel(cost, eps), torch.ones(t).to(cost)
    for _ in range(n_iters):
        u = (1/n)/(K @ v)                          # (n,)
        v = (1/t)/(K.T @ u)                        # (t,)
    return u[:,None]*K*v                           # (n,t)

# %%
# Exercise 3: in the log domain
def log_sinkhorn(cost, eps, n_iters):
    "cost (B,n,t) -> plan (B,n,t), without an exponential before the last line."
    B, n, t = cost.shape
    log_K, g = -cost/eps, cost.new_zeros(B, t)
    log_a, log_b = -math.log(n), -math.log(t)                  # of the masses 1/n and 1/t
    for _ in range(n_iters):
        f = log_a - torch.logsumexp(log_K + g[:,None], 2)      # (B,n)
        g = log_b - torch.logsumexp(log_K + f[..., None], 1)   # (B,t)
    return torch.exp(log_K + f[..., None] + g[:,None])

# %%
# Exercise 4: marginal error
def marginal_error(plan):
    "plan (n,t) -> a number: how much its rows and columns have too much or too little."
    n, t = plan.shape
    return (plan.sum(1) - 1/n).abs().sum() + (plan.sum(0) - 1/t).abs().sum()

def iterations_needed(error_after, tolerance):
    "error_after(k) is the error after k iterations -> the smallest k >= 1 whose error is at most the tolerance."
    k = 1
    while error_after(k) > tolerance: k += 1
    return k

# %%
# Exercise 5: the two limits
def plan_of_large_eps(cost):
    "cost (n,t) -> the plan (n,t) for eps towards infinity."
    return torch.full_like(cost, 1/cost.numel())

def plan_of_small_eps(cost):
    "cost (n,n) -> the plan (n,n) for eps towards 0; `linear_sum_assignment` finds the cheapest pairs."
    rows, columns = linear_sum_assignment(cost.numpy())
    plan = torch.zeros_like(cost)
    plan[rows, columns] = 1/len(cost)
    return plan

# %%
# Exercise 6: Nystrom features
def inverse_square_root(A, floor):
    "A (k,k) symmetric -> A^{-1/2} (k,k), eigenvalues below `floor` raised to it."
    values, vectors = torch.linalg.eigh(A)                     # (k,), (k,k) eigenvectors in columns
    return vectors @ values.clamp_min(floor).rsqrt().diag() @ vectors.mT

def nystrom(x, anchors, alpha):
    "x (B,n,d), anchors (k,d), of any length -> psi (B,n,k), with kappa(a,b) = exp(alpha(<a,b> - 1)) of unit vectors."
    x, w = F.normalize(x, dim=-1), F.normalize(anchors, dim=-1)
    kappa = lambda a, b: (alpha*(a @ b.mT - 1)).exp()
    return kappa(x, w) @ inverse_square_root(kappa(w, w), 1e-4)

# %%
# Exercise 7: pooling with the plan
def pool(plan, x):
    "plan (B,n,t), x (B,n,k) -> Phi (B,t,k), eq. 3 without position weights."
    return plan.shape[-1]**.5*plan.mT @ x

def back(plan, pooled):
    "plan (B,n,t), Phi (B,t,k) -> (B,n,k): each token takes from the references in the shares of its row, which sum to 1."
    return plan.shape[-2]*plan @ pooled

def multiplications(n, t, k):
    "Of numbers: self-attention over n tokens of k channels, and a plan to t references with pooling and way back."
    attention = 2*n*n*k
    transport = 3*n*t*k
    return attention, transport

# %%
# Exercise 8: in words (only the length is checked)
answer = """
Each reference gathers the tokens of one kind of tissue, so that what is far apart but alike is pooled together, and the columns force every reference to take its share;
a softmax over references has no such balance. Its cost grows with n times t and not with n squared. In a run this short the Dice of the three differ little, and one seed
and two patients do not rank them; the time and the maps of the references are the safer observations.
"""
