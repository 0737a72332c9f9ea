"The optimal-transport embedding: against loops, against POT, at its limits, and the memory it takes."
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from common import assert_same, gradients, peak
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from medseg_nb.blocks.ot_embedding import (
    InverseSquareRoot,
    L2GMapper,
    NystromFeatures,
    OTEmbedding,
    plan_to_references,
    position_weights,
    reference_sides,
    spherical_kmeans,
)
from medseg_nb.core import MedsegError, ShapeError

DOUBLE = torch.float64


def loop_features(x, w, alpha):
    "psi token by token: the kernel of each pair, then the inverse square root by eigenvalues."
    unit = [v/v.norm() for v in w]
    kappa = lambda a, b: torch.exp(alpha*((a*b).sum() - 1))
    values, vectors = torch.linalg.eigh(torch.stack([torch.stack([kappa(a, b) for b in unit]) for a in unit]))
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    rows = [[root @ torch.stack([kappa(z/z.norm(), a) for a in unit]) for z in tokens] for tokens in x]
    return torch.stack([torch.stack(r) for r in rows])


def loop_sinkhorn(cost, eps, n_iters):
    "One plan by scaling the rows, then the columns, in the exponential domain."
    n, t = cost.shape
    K, v = torch.exp(-cost/eps), torch.ones(t, dtype=cost.dtype)
    for _ in range(n_iters):
        u = (1/n)/(K @ v)
        v = (1/t)/(K.T @ u)
    return u[:, None]*K*v


def pot_sinkhorn(cost, eps, n_iters):
    "POT's solver, run to convergence and differentiated through."
    ot = pytest.importorskip("ot")
    n, t = cost.shape
    a, b = cost.new_full((n,), 1/n), cost.new_full((t,), 1/t)
    return ot.bregman.sinkhorn_log(a, b, cost, eps, numItermax=n_iters, stopThr=0, warn=False)


def loop_position(grid, sides, sigma):
    "S pair by pair, positions counted from 1."
    S = torch.ones(math.prod(grid), math.prod(sides), dtype=DOUBLE)
    for i, p in enumerate(itertools.product(*map(range, grid))):
        for j, r in enumerate(itertools.product(*map(range, sides))):
            for a, n, b, t in zip(p, grid, r, sides, strict=True): S[i, j] *= math.exp(-((a + 1)/n - (b + 1)/t)**2/sigma**2)
    return S


def loop_embedding(block, x, grid, solver):
    "Eq. 3 bin by bin: Phi (B,q,t,k) and the plans (B,q,n,t)."
    q, t, k = block.references.shape
    grids = {"grid": lambda: (grid, reference_sides(t, len(grid))), "index": lambda: ((x.shape[1],), (t,))}
    S = loop_position(*grids[block.position](), block.sigma) if block.position else torch.ones(x.shape[1], t, dtype=DOUBLE)
    pooled, plans = [], []
    for tokens, reference in itertools.product(x, block.references):
        cost = -torch.stack([torch.stack([(z*r).sum() for r in reference]) for z in tokens])
        plan = solver(cost*S if block.weight_similarities else cost, block.eps, block.n_iters)
        bins = [sum(plan[i, j]*S[i, j]*tokens[i] for i in range(len(tokens))) for j in range(t)]
        pooled.append(math.sqrt(t)*torch.stack(bins)/math.sqrt(q)); plans.append(plan)
    return torch.stack(pooled).unflatten(0, (-1, q)), torch.stack(plans).unflatten(0, (-1, q))


def loop_mapper(block, z):
    "The whole mapper, token by token."
    grid = z.shape[2:]
    x = z.flatten(2).mT
    psi = loop_features(x, block.features.anchors, block.features.alpha) if block.features else x
    pooled, plan = loop_embedding(block.embedding, psi, grid, loop_sinkhorn)
    pooled, (B, q, n, t) = block.norm(pooled), plan.shape
    if block.unpool == "transport":
        back = [[torch.cat([sum(n*plan[b, h, i, j]*pooled[b, h, j] for j in range(t)) for h in range(q)]) for i in range(n)] for b in range(B)]
        found = torch.stack([torch.stack(r) for r in back]) @ block.project.weight.T              # (B,n,dim)
        return z + found.mT.reshape(z.shape)
    coarse = pooled.permute(0, 1, 3, 2).reshape(B, -1, *reference_sides(t, len(grid)))            # (B,q*k,*sides)
    fine = F.interpolate(coarse, size=grid, mode=("linear", "bilinear", "trilinear")[len(grid)-1], align_corners=False)
    return z + torch.einsum("bc...,dc->bd...", fine, block.project.weight)


@pytest.mark.parametrize("values", [[3., 1., .5, .2], [1., 1., 1., 1.], [2., 2., 1e-6, 1e-6], [1., 1., -1e-4, 2e-3]])
def test_inverse_square_root(values):
    torch.manual_seed(0)
    basis, values = torch.linalg.qr(torch.randn(4, 4, dtype=DOUBLE))[0], torch.tensor(values, dtype=DOUBLE)
    a = (basis*values @ basis.T).requires_grad_()
    root = lambda a: InverseSquareRoot.apply((a + a.T)/2, 1e-3)   # noqa: E731
    torch.testing.assert_close(root(a), basis*values.clamp(1e-3)**-0.5 @ basis.T, rtol=1e-6, atol=1e-6)
    assert gradcheck(root, (a,))


@pytest.mark.parametrize("alpha", [0.5, 4.])
def test_features_equal_the_loop_and_have_true_gradients(alpha):
    torch.manual_seed(0)
    block, x = NystromFeatures(5, 4, alpha, floor=1e-9).to(DOUBLE), torch.randn(2, 3, 5, dtype=DOUBLE)
    assert_same(gradients(block, [x], block.parameters()),
                gradients(lambda x: loop_features(x, block.anchors, alpha), [x], block.parameters()), 1e-8)
    assert gradcheck(lambda x, w: torch.func.functional_call(block, {"anchors": w}, (x,)), (x.requires_grad_(), block.anchors))


def test_features_give_the_kernel_at_the_anchors():
    torch.manual_seed(0)
    block = NystromFeatures(6, 5, 2.).to(DOUBLE)
    psi, w = block(block.anchors[None])[0], F.normalize(block.anchors, dim=1)
    torch.testing.assert_close(psi @ psi.T, torch.exp(2*(w @ w.T - 1)))
    torch.testing.assert_close(block(7*block.anchors[None])[0], psi)   # only directions count


def test_equal_anchors_leave_finite_gradients():
    block = NystromFeatures(4, 6)
    with torch.no_grad(): block.anchors.copy_(torch.ones(6, 4))
    x = torch.randn(2, 7, 4, requires_grad=True)
    block(x).square().sum().backward()
    assert x.grad.isfinite().all() and block.anchors.grad.isfinite().all() and block.anchors.grad.abs().sum() > 0


@pytest.mark.parametrize("grid, sides", [((7,), (3,)), ((3, 4), (2, 2)), ((2, 3, 2), (2, 2, 2))])
def test_position_weights(grid, sides):
    torch.testing.assert_close(position_weights(grid, sides, 0.3), loop_position(grid, sides, 0.3))


@pytest.mark.parametrize("solver", [loop_sinkhorn, pot_sinkhorn])
@pytest.mark.parametrize("position, weight", [(None, False), ("index", False), ("grid", False), ("grid", True)])
def test_embedding_equals_loop_and_pot(solver, position, weight):
    torch.manual_seed(0)
    block = OTEmbedding(3, 4, 2, eps=0.5, n_iters=200, position=position, sigma=0.4, weight_similarities=weight).to(DOUBLE)
    x, grid = torch.randn(2, 6, 3, dtype=DOUBLE), (2, 3)
    assert_same(gradients(lambda x: block(x, grid), [x], block.parameters()),
                gradients(lambda x: loop_embedding(block, x, grid, solver)[0], [x], block.parameters()), 1e-7)
    torch.testing.assert_close(block.plan(x, grid), loop_embedding(block, x, grid, solver)[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grid", [(6,), (2, 4), (2, 2, 3)])
@pytest.mark.parametrize("unpool", ["transport", "grid"])
@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_mapper_equals_the_loop(grid, unpool, kernel):
    torch.manual_seed(0)
    t = 2**len(grid) if len(grid) > 1 else 3
    block = L2GMapper(4, t, 2, anchors=3, kernel=kernel, unpool=unpool, eps=0.5, n_iters=300, sigma=0.5).to(DOUBLE)
    z = torch.randn(2, 4, *grid, dtype=DOUBLE)
    assert_same(gradients(block, [z], block.parameters()), gradients(lambda z: loop_mapper(block, z), [z], block.parameters()), 1e-7)
    assert block.plan(z).shape == (2, 2, math.prod(grid), t)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), t=st.integers(1, 40), copies=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_number_of_tokens_and_references(n, t, copies, seed):
    cost = torch.randn(copies, n, t, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    plan = plan_to_references(cost, 0.5, 500)
    torch.testing.assert_close(plan.sum(2), torch.full((copies, n), 1/n, dtype=DOUBLE), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plan.sum(1), torch.full((copies, t), 1/t, dtype=DOUBLE), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plan[0], loop_sinkhorn(cost[0], 0.5, 500), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n, t", [(12, 4), (2, 9), (5, 9)])
def test_padding_tokens_have_no_mass(n, t):
    torch.manual_seed(0)
    block, x = OTEmbedding(3, t, 2).to(DOUBLE), torch.randn(2, n, 3, dtype=DOUBLE)
    padded = torch.cat([x, 9*torch.randn(2, 4, 3, dtype=DOUBLE)], 1)
    mask = torch.arange(n + 4).expand(2, -1) < n
    alone, beside = (gradients(f, [x], block.parameters()) for f in (block, lambda x: block(torch.cat([x, padded[:, n:]], 1), mask=mask)))
    assert_same(alone, beside, 1e-8)
    assert bool((block.plan(padded, mask=mask)[:, :, n:] == 0).all())


@pytest.mark.parametrize("unpool", ["transport", "grid"])
def test_masked_pixels_give_and_get_nothing(unpool):
    torch.manual_seed(0)
    block, z = L2GMapper(6, 4, 2, anchors=5, unpool=unpool), torch.randn(2, 6, 4, 5)
    mask = torch.rand(2, 4, 5) > 0.3
    out, other = block(z, mask), block(torch.where(mask[:, None], z, torch.randn_like(z)), mask)
    torch.testing.assert_close(torch.where(mask[:, None], out, 0), torch.where(mask[:, None], other, 0))
    assert torch.equal(out.movedim(1, -1)[~mask], z.movedim(1, -1)[~mask])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.sampled_from(["grid", "index", None]), st.sampled_from(["transport", "grid"]), st.booleans())
def test_any_map(sides, position, unpool, weight):
    block, z = L2GMapper(5, 64, 2, anchors=4, position=position, unpool=unpool, weight_similarities=weight), torch.randn(2, 5, *sides, requires_grad=True)
    out = block(z)
    out.square().sum().backward()
    assert out.shape == z.shape and out.isfinite().all() and z.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_every_weight_learns_and_half_precision_keeps_its_type():
    block, z = L2GMapper(8, 16, 2, anchors=6), torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16): out = block(z.bfloat16())
    assert out.dtype == torch.bfloat16 and block.plan(z.bfloat16()).dtype == torch.float32
    block(z).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


def test_kmeans_finds_the_directions():
    torch.manual_seed(0)
    tokens = torch.eye(4).repeat(30, 1)*torch.rand(120, 1).add(0.5) + 0.02*torch.randn(120, 4)
    centres = spherical_kmeans(tokens, 4)
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(4))
    assert bool((centres @ torch.eye(4)).amax(0).gt(0.99).all())
    assert spherical_kmeans(torch.ones(9, 3), 5).isfinite().all()   # fewer directions than clusters


def test_initialise_puts_anchors_and_references_on_tokens():
    torch.manual_seed(0)
    block, z = L2GMapper(16, 4, 2, anchors=8, alpha=4.), F.normalize(torch.randn(3, 16, 1, 1) + 0.3*torch.randn(3, 16, 6, 6), dim=1)
    tokens = z.flatten(2).mT.flatten(0, 1)
    error = lambda: (block.features(tokens[None])[0].square().sum(1) - 1).abs().mean()   # noqa: E731   kappa(z,z) = 1
    before = error()
    block.initialise(z)
    assert error() < 0.5*before
    torch.testing.assert_close(block.embedding.references.norm(dim=-1), torch.ones(2, 4))


@pytest.mark.parametrize("build", [
    lambda: NystromFeatures(8, 0), lambda: NystromFeatures(0, 4), lambda: NystromFeatures(8, 4, alpha=0), lambda: NystromFeatures(8, 4, alpha=-1.),
    lambda: NystromFeatures(8, 4, alpha=float("nan")), lambda: OTEmbedding(8, 0), lambda: OTEmbedding(8, 4, 0), lambda: OTEmbedding(8, 4, 2, eps=0),
    lambda: OTEmbedding(8, 4, 2, eps=-0.1), lambda: OTEmbedding(8, 4, 2, eps=float("nan")), lambda: OTEmbedding(8, 4, 2, n_iters=0),
    lambda: OTEmbedding(8, 4, 2, position="here"), lambda: OTEmbedding(8, 4, 2, sigma=0), lambda: L2GMapper(8, kernel="cubic"),
    lambda: L2GMapper(8, unpool="up"),
    lambda: L2GMapper(0), lambda: L2GMapper(8, anchors=0), lambda: reference_sides(12, 2), lambda: reference_sides(16, 3),
    lambda: spherical_kmeans(torch.ones(3, 2), 4)])
def test_numbers_that_do_not_fit(build):
    with pytest.raises(MedsegError): build()


@pytest.mark.parametrize("call, error", [
    (lambda: OTEmbedding(8, 4)(torch.randn(1, 9, 6)), ShapeError), (lambda: OTEmbedding(8, 4)(torch.randn(9, 8)), ShapeError),
    (lambda: OTEmbedding(8, 4)(torch.randn(1, 0, 8)), ShapeError), (lambda: OTEmbedding(8, 4, position="grid")(torch.randn(1, 9, 8)), ShapeError),
    (lambda: OTEmbedding(8, 4, position="grid")(torch.randn(1, 9, 8), (3, 4)), ShapeError),
    (lambda: OTEmbedding(8, 5, position="grid")(torch.randn(1, 9, 8), (3, 3)), ShapeError),
    (lambda: OTEmbedding(8, 4)(torch.full((1, 9, 8), torch.nan)), MedsegError), (lambda: NystromFeatures(8, 4)(torch.full((1, 9, 8), torch.inf)), MedsegError),
    (lambda: NystromFeatures(8, 4)(torch.randn(1, 9, 7)), ShapeError), (lambda: NystromFeatures(8, 4).initialise(torch.randn(3, 8)), ShapeError),
    (lambda: OTEmbedding(8, 4)(torch.randn(1, 9, 8), mask=torch.ones(1, 8, dtype=torch.bool)), ShapeError),
    (lambda: OTEmbedding(8, 4)(torch.randn(1, 9, 8), mask=torch.zeros(1, 9, dtype=torch.bool)), MedsegError),
    (lambda: L2GMapper(8)(torch.randn(1, 7, 4, 4)), ShapeError), (lambda: L2GMapper(8)(torch.randn(1, 8)), ShapeError),
    (lambda: L2GMapper(8)(torch.randn(1, 8, 0, 4)), ShapeError), (lambda: L2GMapper(8, 12)(torch.randn(1, 8, 4, 4)), ShapeError),
    (lambda: L2GMapper(8)(torch.full((1, 8, 4, 4), torch.nan)), MedsegError),
    (lambda: L2GMapper(8)(torch.randn(1, 8, 4, 4), torch.ones(1, 4, 5, dtype=torch.bool)), ShapeError)])
def test_tokens_that_do_not_fit(call, error):
    with pytest.raises(error): call()


def test_anchors_gone_astray():
    block = NystromFeatures(8, 4)
    with torch.no_grad(): block.anchors[0, 0] = torch.nan
    with pytest.raises(MedsegError, match="anchors"): block(torch.randn(1, 9, 8))


def test_memory_grows_no_faster_than_the_tokens():
    torch.manual_seed(0)
    block = L2GMapper(32, 16, 2, anchors=16)

    def taken(side):
        z = torch.randn(1, 32, side, side, requires_grad=True)
        return peak(lambda: block(z).sum().backward())

    taken(28)
    assert taken(112)/taken(28) <= 1.15*16
