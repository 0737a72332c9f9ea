"sinkhorn: against POT, against unrolled autograd, masks, marginals, tiny eps, memory, bad input."
import pytest
import torch
from common import gradients, peak
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.blocks.sinkhorn import Scaling, marginal_error, sinkhorn, sinkhorn_unrolled
from medseg_nb.core import MedsegError, ShapeError


def problem(B=3, n=12, t=5, scale=10., dtype=torch.float64, seed=0):
    "Costs between points, up to `scale` with eps = 1, and two masses; all need a gradient."
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(B, k, 3, dtype=torch.float64, generator=g) for k in (n, t))
    cost = torch.cdist(x, y).square()
    a, b = (torch.rand(B, k, dtype=torch.float64, generator=g) + 0.1 for k in (n, t))
    values = scale*cost/cost.max(), a/a.sum(1, keepdim=True), b/b.sum(1, keepdim=True)
    return [x.to(dtype).requires_grad_() for x in values]


def assert_close(a, b, tol):
    "Every tensor within `tol` of the norm of the other (or of 0.01, a tenth of a plan's: some gradients vanish)."
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and x.isfinite().all()
        assert (x.double() - y.double()).norm() <= tol*y.double().norm().clamp_min(0.01)


def pot(cost, eps, n_iters, a, b, method="log_sinkhorn"):
    "POT's batched solver, with as many iterations; a negative tolerance keeps it going."
    from ot.batch import solve_batch
    return solve_batch(cost, eps, a, b, max_iter=n_iters, tol=-1., method=method, grad="autodiff").plan


@pytest.mark.parametrize("scale", [1, 20, 100, 2000, 1e5])
@pytest.mark.parametrize("n_iters", [1, 2, 10])
def test_equals_pot_in_values_and_gradients(scale, n_iters):
    inputs = problem(scale=scale)
    ours = gradients(lambda c, a, b: sinkhorn(c, 1., n_iters, a, b), inputs)
    theirs = gradients(lambda c, a, b: pot(c, 1., n_iters, a, b), inputs)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-9)
    assert_close(ours, theirs, 1e-8)


@pytest.mark.parametrize("log_domain", [True, False])
def test_converges_to_pots_solution(log_domain):
    import ot
    cost, a, b = (x.detach() for x in problem(B=2))
    plan = sinkhorn(cost, 1., 3000, a, b, log_domain)
    for i in range(2):
        truth = ot.sinkhorn(a[i], b[i], cost[i], 1., numItermax=10000, stopThr=1e-14)
        torch.testing.assert_close(plan[i], truth, rtol=0, atol=1e-9)
    assert marginal_error(plan, a, b).max() < 1e-9


def test_approaches_unregularised_transport():
    import ot
    cost, a, b = (x.detach() for x in problem(B=2, scale=1.))
    plan = sinkhorn(cost, 1e-3, 5000, a, b)
    for i in range(2):
        assert (plan[i]*cost[i]).sum() == pytest.approx(ot.emd2(a[i].numpy(), b[i].numpy(), cost[i].numpy()), abs=2e-3)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("scale", [1, 20, 50, 200, 2000])
@pytest.mark.parametrize("n_iters", [1, 3, 10, 100])
def test_gradient_equals_unrolled_autograd(dtype, tol, scale, n_iters):
    inputs = problem(scale=scale, dtype=dtype)
    ours = gradients(lambda c, a, b: sinkhorn(c, 1., n_iters, a, b), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    theirs = gradients(lambda c, a, b: sinkhorn_unrolled(c, 1., n_iters, a, b), exact)
    assert_close(ours, theirs, max(tol, 3e-7*scale if dtype == torch.float32 else 0))   # float32 rounds cost/eps itself


@pytest.mark.parametrize("scale", [1, 20])
def test_plain_form_equals_log_form(scale):
    inputs = problem(scale=scale)
    both = [gradients(lambda c, a, b, log=log: sinkhorn(c, 1., 10, a, b, log), inputs) for log in (True, False)]
    assert_close(*both, 1e-10)


@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 3), n=st.integers(1, 9), t=st.integers(1, 9), scale=st.sampled_from([0., 1., 60., 3000.]),
       n_iters=st.integers(1, 6), seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_properties(B, n, t, scale, n_iters, seed, dtype):
    t = min(n, t)
    g = torch.Generator().manual_seed(seed)
    cost = scale*torch.randn(B, n, t, generator=g, dtype=dtype).requires_grad_()
    a, b = (torch.rand(k, generator=g, dtype=dtype).pow(4) for k in (n, t))
    a, b = a/a.sum(), b/b.sum()
    plan = sinkhorn(cost, 1., n_iters, a, b)
    assert plan.shape == (B, n, t) and plan.min() >= 0
    torch.testing.assert_close(plan.sum(1), b.expand(B, t), rtol=1e-4, atol=1e-6)          # the last half-step's
    torch.testing.assert_close(plan, sinkhorn_unrolled(cost, 1., n_iters, a, b), rtol=1e-2, atol=2e-6*max(scale, 1))
    torch.testing.assert_close(sinkhorn(cost + 7, 1., n_iters, a, b), plan, rtol=1e-2, atol=2e-6*max(scale, 1))
    assert torch.autograd.grad(plan.square().sum(), cost)[0].isfinite().all()


@pytest.mark.parametrize("scale", [1, 20, 100, 500, 2000])
def test_single_precision_is_finite_for_small_eps(scale):
    torch.manual_seed(0)
    cost = (2*torch.rand(4, 40, 16) - 1).requires_grad_()
    for n_iters in (1, 10, 200):
        plan, grad = gradients(lambda c: sinkhorn(c, 1/scale, n_iters), [cost])            # noqa: B023
        exact = gradients(lambda c: sinkhorn(c, 1/scale, n_iters), [cost.detach().double().requires_grad_()])  # noqa: B023
        assert_close([plan, grad], exact, 2e-3)


def test_plain_form_shows_what_it_cannot_do():
    cost = torch.rand(2, 8, 4) + 1
    assert sinkhorn(cost, 1/20, log_domain=False).isfinite().all()
    assert sinkhorn(cost, 1/2000, log_domain=False).isnan().any() and sinkhorn(-cost, 1/2000, log_domain=False).isnan().any()
    assert sinkhorn(cost, 1/2000).isfinite().all()


@pytest.mark.parametrize("limit", [0.3, 1e-3, 1e-12])   # a new kernel at nearly every half-step, now and then, never
def test_recentring_changes_nothing(monkeypatch, limit):
    inputs, start = problem(scale=400.), Scaling._start
    kernels = []

    def eager(self):
        self.smallest = limit
        kernels.append(self.potentials)
        self.centre = None
        start(self)
    monkeypatch.setattr(Scaling, "_start", eager)
    ours = gradients(lambda c, a, b: sinkhorn(c, 1., 30, a, b), inputs)
    assert (len(kernels[0]) > 20) if limit == 0.3 else (len(kernels[0]) > 1) if limit == 1e-3 else len(kernels[0]) >= 1
    assert_close(ours, gradients(lambda c, a, b: sinkhorn_unrolled(c, 1., 30, a, b), inputs), 1e-10)


@pytest.mark.parametrize("scale", [3., 60., 800.])       # one kernel; one, found by rows and columns; several
@pytest.mark.parametrize("log_domain", [True, False])
def test_gradcheck(scale, log_domain):
    if scale > 100 and not log_domain: scale = 30.
    cost, a, b = problem(B=2, n=5, t=3, scale=scale)
    mask = torch.tensor([[True]*5, [True, False, True, True, False]])

    def f(cost, a, b):   # masses from positive numbers, so that a step of the check stays a mass
        a, b = a*mask, b
        return sinkhorn(cost, 1., 4, a/a.sum(1, keepdim=True), b/b.sum(1, keepdim=True), log_domain, mask=mask)
    assert torch.autograd.gradcheck(f, (cost, a, b), eps=1e-7, atol=1e-5)
    assert torch.autograd.gradcheck(lambda c: sinkhorn(c, 1., 4, log_domain=log_domain, mask=mask), (cost,), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("scale", [5, 50, 2000])
@pytest.mark.parametrize("log_domain", [True, False])
def test_masked_tokens_are_out_of_the_problem(scale, log_domain):
    if scale > 100 and not log_domain: scale = 10
    cost = problem(B=2, scale=scale)[0]
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 7:] = mask[1, [0, 3]] = False
    spoilt = cost.detach().masked_fill(~mask[..., None], torch.nan).requires_grad_()
    plan, grad = gradients(lambda c: sinkhorn(c, 1., 10, log_domain=log_domain, mask=mask), [spoilt])
    by_mass = mask/mask.sum(1, keepdim=True)
    again = gradients(lambda c: sinkhorn(c, 1., 10, by_mass, log_domain=log_domain), [cost])
    assert_close([plan, grad], again, 1e-9)
    assert (plan[~mask] == 0).all() and (grad[~mask] == 0).all()
    weight = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(1)).to(cost)
    for i in (0, 1):                                               # the same as leaving the rows out
        x = cost[i:i+1, mask[i]].detach().requires_grad_()
        small = sinkhorn(x, 1., 10)
        assert_close([plan[i, mask[i]][None], grad[i, mask[i]][None]],
                     [small.detach(), torch.autograd.grad(small, x, weight[i, mask[i]][None])[0]], 1e-9)


@pytest.mark.parametrize("scale", [5, 50, 2000])
def test_entries_without_mass(scale):
    cost, a, b = (x.detach() for x in problem(scale=scale))
    a[:, 2:5] = 0; b[:, 1] = 0
    a, b = ((x/x.sum(1, keepdim=True)).requires_grad_() for x in (a, b))
    plan, *grads = gradients(lambda c, a, b: sinkhorn(c, 1., 10, a, b), [cost.requires_grad_(), a, b])
    torch.testing.assert_close(plan, pot(cost, 1., 10, a, b), rtol=0, atol=1e-9)
    assert (plan[:, 2:5] == 0).all() and (plan[:, :, 1] == 0).all() and all(g.isfinite().all() for g in grads)
    assert (grads[0][:, 2:5] == 0).all() and (grads[1][:, 2:5] == 0).all() and (grads[2][:, 1] == 0).all()
    kept = torch.ones(12, dtype=torch.bool); kept[2:5] = False
    unrolled = gradients(lambda c, a: sinkhorn_unrolled(c, 1., 10, a, b.detach()), [cost, a])
    assert_close([grads[0][:, kept], grads[1][:, kept]], [unrolled[1][:, kept], unrolled[2][:, kept]], 1e-8)


def test_masses_may_be_shared_by_the_batch():
    cost, a, b = problem()
    a, b = a[0].detach().requires_grad_(), b[0].detach().requires_grad_()
    ours = gradients(lambda c, a, b: sinkhorn(c, 1., 10, a, b), [cost, a, b])
    assert ours[2].shape == (12,) and ours[3].shape == (5,)
    assert_close(ours, gradients(lambda c, a, b: sinkhorn_unrolled(c, 1., 10, a, b), [cost, a, b]), 1e-10)
    default = sinkhorn(cost, 1.)
    torch.testing.assert_close(default, sinkhorn(cost, 1., a=torch.full((12,), 1/12).double(), b=torch.full((5,), 0.2).double()),
                               rtol=1e-6, atol=0)


def test_mixed_precision_computes_in_single_precision():
    cost = problem(dtype=torch.float32)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = sinkhorn(cost, 0.5)
        grad, = torch.autograd.grad(plan.square().sum(), cost)
    assert plan.dtype == torch.float32
    whole = sinkhorn(cost, 0.5)
    assert torch.equal(plan, whole) and torch.equal(grad, torch.autograd.grad(whole.square().sum(), cost)[0])
    half = cost.detach().bfloat16().requires_grad_()
    plan = sinkhorn(half, 0.5)
    assert plan.dtype == torch.float32 and torch.equal(plan, sinkhorn(half.float(), 0.5))
    assert torch.autograd.grad(plan.square().sum(), half)[0].dtype == torch.bfloat16


def test_gradient_twice_but_no_second_derivative():
    cost = problem()[0]
    loss = sinkhorn(cost, 1.).square().sum()
    first, = torch.autograd.grad(loss, cost, retain_graph=True)
    second, = torch.autograd.grad(loss, cost, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="once_differentiable"): second.sum().backward()


def test_many_iterations_are_multiplied_out_in_parts():
    inputs = problem(n=6, t=4)
    assert_close(gradients(lambda c, a, b: sinkhorn(c, 1., 150, a, b), inputs),
                 gradients(lambda c, a, b: sinkhorn_unrolled(c, 1., 150, a, b), inputs), 1e-9)


@pytest.mark.parametrize("eps", [0.1, 0.001])
def test_memory_does_not_grow_with_the_iterations(eps):
    cost = torch.rand(32, 196, 64).requires_grad_()
    few, many = (peak(lambda k=k: sinkhorn(cost, eps, k).sum().backward()) for k in (10, 30))
    matrix = 32*196*64*4/2**20
    assert few < 6*matrix < 16 and many < few + 2*matrix   # autograd keeps two matrices an iteration and more
    assert few < peak(lambda: sinkhorn_unrolled(cost, eps, 10).sum().backward())/3


def test_inputs_are_left_as_they_were():
    cost, a, b = (x.detach() for x in problem(scale=2000))
    copies = [x.clone() for x in (cost, a, b)]
    sinkhorn(cost.requires_grad_(), 1., 10, a, b).square().sum().backward()
    assert all(torch.equal(x, y) for x, y in zip((cost, a, b), copies, strict=True))
    torch.testing.assert_close(sinkhorn(cost.mT.contiguous().mT, 1.), sinkhorn(cost, 1.))   # any strides


def test_survives_export():
    class Layer(torch.nn.Module):
        def forward(self, cost, mask): return sinkhorn(cost, 0.5, mask=mask)
    cost, mask = problem()[0].detach(), torch.arange(12).expand(3, 12) < torch.tensor([[12], [7], [5]])
    exported = torch.export.export(Layer(), (cost, mask)).module()
    torch.testing.assert_close(exported(cost, mask), sinkhorn(cost, 0.5, mask=mask))
    with torch.inference_mode(): assert torch.equal(sinkhorn(cost, 0.5), sinkhorn(cost, 0.5))


@pytest.mark.parametrize("scale", [5, 500])
@pytest.mark.parametrize("little", [1e-12, 1e-30, 1e-37, 1e-42])
def test_hardly_any_mass(scale, little):
    cost = problem(scale=scale, dtype=torch.float32)[0]
    a, b = (torch.cat([torch.tensor([little]), torch.full((k - 1,), 1/(k - 1))]) for k in (12, 5))
    inputs = [cost, a.requires_grad_(), b.requires_grad_()]
    ours = gradients(lambda c, a, b: sinkhorn(c, 1., 10, a, b), inputs)
    exact = gradients(lambda c, a, b: sinkhorn_unrolled(c, 1., 10, a, b), [x.detach().double().requires_grad_() for x in inputs])
    assert all(x.isfinite().all() for x in ours)
    assert_close(ours[:2], exact[:2], 2e-4)


def test_marginal_error_by_hand():
    plan = torch.tensor([[[0.5, 0.1], [0.1, 0.3]]])
    torch.testing.assert_close(marginal_error(plan), torch.tensor([0.1 + 0.1 + 0.1 + 0.1]))
    torch.testing.assert_close(marginal_error(plan, torch.tensor([0.6, 0.4]), torch.tensor([0.6, 0.4])), torch.zeros(1))
    torch.testing.assert_close(marginal_error(torch.zeros(1, 2, 2)), torch.tensor([2.]))


COST = torch.rand(2, 4, 3)
MASK = torch.tensor([[True, True, True, False], [False]*4])


@pytest.mark.parametrize("kind, match, change", [
    (MedsegError, "eps does not fit.*found 0", dict(eps=0)), (MedsegError, "eps does not fit", dict(eps=-1.)),
    (MedsegError, "eps does not fit", dict(eps=float("nan"))), (MedsegError, "eps does not fit", dict(eps=float("inf"))),
    (MedsegError, "pass cost/eps as the cost", dict(eps=torch.tensor(0.1, requires_grad=True))),
    (MedsegError, "eps is too small.*scale the cost", dict(eps=1e-30)), (MedsegError, "n_iters >= 1", dict(n_iters=0)),
    (ShapeError, "cost\\[None\\]", dict(cost=COST[0])), (ShapeError, "none of them 0", dict(cost=COST[:, :0])),
    (ShapeError, "t <= n.*transpose", dict(cost=COST.mT)),
    (MedsegError, "not finite; found 1 NaN", dict(cost=COST.index_put((torch.tensor(0),)*3, torch.tensor(torch.nan)))),
    (MedsegError, "not finite; found 1 NaN or inf", dict(cost=COST.index_put((torch.tensor(1),)*3, torch.tensor(torch.inf)))),
    (MedsegError, "not finite", dict(cost=-COST/0)),
    (ShapeError, "a does not fit the cost; found \\(3,\\).*\\(4,\\) or \\(2, 4\\)", dict(a=torch.full((3,), 1/3))),
    (ShapeError, "b does not fit the cost", dict(b=torch.full((1, 3), 1/3))),
    (MedsegError, "a is no mass; found smallest entry -0.5", dict(a=torch.tensor([0.5, 0.5, 0.5, -0.5]))),
    (MedsegError, "b is no mass; found smallest entry nan", dict(b=torch.tensor([0.5, 0.5, torch.nan]))),
    (MedsegError, "a does not sum to 1; found 4 in item 0.*divide a by its sum", dict(a=torch.ones(4))),
    (MedsegError, "b does not sum to 1; found 2 in item 1", dict(b=torch.tensor([[0.5, 0.25, 0.25], [1., 0.5, 0.5]]))),
    (MedsegError, "over the tokens that the mask keeps", dict(a=torch.full((4,), 0.25), mask=MASK[:1].expand(2, 4))),
    (MedsegError, "no token left; found item 1 of the batch", dict(mask=MASK)),
    (MedsegError, "no token left; found item 1 of the batch", dict(mask=MASK, a=torch.full((4,), 0.25))),
    (ShapeError, "mask does not fit", dict(mask=MASK[0])), (ShapeError, "torch.bool", dict(mask=MASK.float())),
])
@pytest.mark.parametrize("log_domain", [True, False])
def test_bad_input(kind, match, change, log_domain):
    with pytest.raises(kind, match=match): sinkhorn(**{"cost": COST, "eps": 0.1, "log_domain": log_domain, **change})
