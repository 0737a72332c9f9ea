"Prices and KKT against closed forms and SciPy, eq. 2 against NumPy and MONAI, prices that survive SIGKILL, what is refused."
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, minimize

from medseg_nb.core import LabelError, MedsegError, ShapeError
from medseg_nb.losses import ConsistencyLoss, LDCLoss, class_fractions, dual_step, kkt_residuals, lagrange_term, squared_norm
from medseg_nb.losses.lagrangian import PAPER_BETA


@pytest.fixture(autouse=True)
def alone():
    with one_thread(): yield


def draw(*shape, seed=0, scale=1.): return scale*torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(shape, seed=0):
    "Labels (B,*S) for logits of `shape`."
    return torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(seed))


def one_hot(y, classes): return F.one_hot(y, classes).movedim(-1, 1).double()


def value_and_gradient(loss, x):
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def assert_same(a, b, tol=1e-10):
    for x, y in zip(a, b, strict=True): torch.testing.assert_close(x, y, rtol=tol, atol=tol)


# A small convex problem: least squares with a mass to spend and bounds to keep.

def knapsack(a, mass, low, high):
    "Closed form: p, lambda, mu+, mu-."
    corners = np.sort(np.concatenate([a - low, a - high]))[::-1]
    lam = np.interp(mass, np.clip(a - corners[:, None], low, high).sum(1), corners)
    return tuple(map(torch.as_tensor, (np.clip(a - lam, low, high), lam, np.maximum(a - lam - high, 0), np.maximum(low - a + lam, 0))))


def conditions(a, mass, low, high, p, lam, up, down):
    "KKT residuals of the knapsack."
    return kkt_residuals(p - a + lam + up - down, [(lam, p.sum() - mass, "equal"), (up, p - high, "at most"), (down, low - p, "at most")])


PROBLEMS = {"simplex": (np.array([.9, .4, -.2]), 1., 0., 1.), "knapsack": (draw(12, seed=3).numpy(), 4., .05, .8)}


@pytest.mark.parametrize("name", PROBLEMS)
def test_primal_and_dual_steps_reach_the_closed_form_and_scipy(name):
    a, mass, low, high = PROBLEMS[name]
    n, exact, score = len(a), knapsack(*PROBLEMS[name]), torch.as_tensor(a)
    p, lam, up, down = score.clone(), torch.zeros((), dtype=torch.double), torch.zeros(n).double(), torch.zeros(n).double()
    for _ in range(1500):
        p = p - .5*(p - score + lam + up - down)
        lam, up, down = dual_step(lam, p.sum() - mass, 1/(n+2), "equal"), dual_step(up, p - high, 1/(n+2)), dual_step(down, low - p, 1/(n+2))
    assert_same((p, lam, up, down), exact, 1e-6)
    assert max(conditions(score, mass, low, high, p, lam, up, down).values()) < 1e-6
    scipy = minimize(lambda p: .5*((p - a)**2).sum(), np.full(n, mass/n), jac=lambda p: p - a, hess=lambda p: np.eye(n), method="trust-constr",
                     bounds=Bounds(low, high), constraints=LinearConstraint(np.ones(n), mass, mass), options=dict(gtol=1e-12, xtol=1e-14, barrier_tol=1e-12))
    np.testing.assert_allclose(p, scipy.x, atol=1e-4)
    np.testing.assert_allclose(lam, scipy.v[0][0], atol=1e-4)
    np.testing.assert_allclose(up - down, scipy.v[1], atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=9), st.floats(.05, .95), st.floats(0, .4), st.floats(.5, 1))
def test_kkt_residuals_vanish_at_the_closed_form_and_nowhere_near_it(scores, share, low, high):
    a = np.array(scores); mass = len(a)*(low + share*(high - low))
    exact = knapsack(a, mass, low, high)
    assert max(conditions(torch.as_tensor(a), mass, low, high, *exact).values()) < 1e-8
    p, lam, up, down = exact
    moved = {"stationarity": (p, lam + .1, up, down), "primal": (p + .1, lam - .1, up, down), "dual": (p, lam + .1, up - .1, down),
             "slackness": (p, lam, up + 1, down + 1)}
    for name, point in moved.items(): assert conditions(torch.as_tensor(a), mass, low, high, *point)[name] > 1e-3 or name == "dual" and up.min() > .09


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_multiplier_is_the_price_of_its_bound(name):
    a, mass, low, high = PROBLEMS[name]
    best = lambda mass: .5*((knapsack(a, mass, low, high)[0].numpy() - a)**2).sum()
    assert (best(mass + 1e-5) - best(mass - 1e-5))/2e-5 == pytest.approx(-knapsack(a, mass, low, high)[1].item(), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(.01, 3), st.sampled_from(["at most", "equal", "at least"]))
def test_projection_and_augmented_term(multiplier, value, c, relation):
    m, g = torch.tensor([multiplier, value], dtype=torch.float64)
    if relation == "at most": m = m.abs()
    if relation == "at least": m = -m.abs()
    moved = dual_step(m, g, c, relation)
    assert moved == {"equal": m + c*g, "at most": max(m + c*g, 0), "at least": min(m + c*g, 0)}[relation]
    g = g.clone().requires_grad_()
    term = lagrange_term(m, g, relation, c)
    assert torch.autograd.grad(term, g)[0].item() == pytest.approx(moved.item(), abs=1e-9)    # its slope is the next price
    expected = m*g + c/2*g**2 if relation == "equal" or moved != 0 else -m**2/(2*c)
    assert term.item() == pytest.approx(expected.item(), abs=1e-9)
    assert lagrange_term(m, g, relation).item() == pytest.approx((m*g).item())


# Eq. 2 and the Lagrangian.

def numpy_ldc(p, y, loss, w=None):
    "The whole Lagrangian of p, y (B,Z,N), from its definition; `loss` lends its settings and prices."
    q, t, beta = p[:, 1:], y[:, 1:], np.array(loss.beta)
    if loss.form == "literal": total = -loss.alpha*(t*np.log(q)).sum(1).mean() - (beta[:, None]*t*q/(t + q)).sum(1).mean()
    else:
        dice = lambda q, t, axes: (2*(q*t).sum(axes) + loss.smooth) / ((q + t).sum(axes) + loss.smooth)
        d = dice(q, t, (0, 2)) if loss.batch_dice else dice(q, t, 2)
        total = -loss.alpha*(y*np.log(p) + (1-y)*np.log(1-p)).mean() + ((1 - d)*beta).sum(-1).mean()
    if not isinstance(loss, LDCLoss): return total
    low, high = loss.bounds
    total += (loss.mu_plus.numpy()*np.maximum(q - high, 0).mean((0, 2))).sum() + (loss.mu_minus.numpy()*np.maximum(low - q, 0).mean((0, 2))).sum()
    if loss.mass is not None:
        s = np.clip(t.mean((0, 2)), low, high) if loss.mass == "target" else np.array(loss.mass)
        total += (loss.lam.numpy()*(q.mean((0, 2)) - s)).sum()
    return total + (loss.eta.item()*((w**2).sum()/loss.max_norm - 1) if loss.max_norm else 0)


def with_prices(loss):
    "The loss in float64, every price set to something."
    loss = loss.double()
    for i, price in enumerate(loss.buffers()): price.copy_(torch.linspace(.3, 1.1 + i, price.numel()).view_as(price))
    return loss


@pytest.mark.parametrize("shape", [(2, 3, 7), (3, 3, 5, 4), (2, 5, 3, 4, 2)])
@pytest.mark.parametrize("form", ["literal", "corrected"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_equals_its_definition(shape, form, activation):
    Z, w = shape[1], draw(6, seed=5)
    logits, y = draw(*shape, scale=2.), labels_of(shape)
    teacher = draw(*shape, seed=1).sigmoid()
    base = dict(form=form, activation=activation, alpha=.7, batch_dice=shape[0] == 2)
    losses = [ConsistencyLoss(Z, **base), with_prices(LDCLoss(Z, bounds=(.2, .7), max_norm=3., **base)),
              with_prices(LDCLoss(Z, mass=(.1,)*(Z-1), relation="at most", **base))]
    for loss in losses:
        more = (w,) if isinstance(loss, LDCLoss) else ()
        p = loss.probabilities(logits).flatten(2).numpy()
        for target, maps in ((y, one_hot(y, Z)), (teacher, teacher)):
            assert loss(logits, target, *more).item() == pytest.approx(numpy_ldc(p, maps.flatten(2).numpy(), loss, w.numpy()), abs=1e-10)
    assert torch.autograd.gradcheck(lambda l: losses[1](l, y, w), logits.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda w: losses[1](logits, y, w), w.clone().requires_grad_())


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 8, 5), (2, 4, 5, 6, 4)])
def test_corrected_eq2_equals_monai_and_pytorch(batch_dice, shape):
    monai = pytest.importorskip("monai.losses")
    Z, logits, y = shape[1], draw(*shape), labels_of(shape)
    loss = ConsistencyLoss(Z, batch_dice=batch_dice)
    per_class = monai.DiceLoss(sigmoid=True, include_background=False, batch=batch_dice, reduction="none", smooth_nr=1e-5, smooth_dr=1e-5)
    def theirs(l):
        dice = per_class(l, one_hot(y, Z)).view(-1, Z-1)                                # (1 or B,Z-1)
        return F.binary_cross_entropy_with_logits(l, one_hot(y, Z)) + (dice*torch.tensor(loss.beta, dtype=torch.double)).sum(1).mean()
    assert_same(value_and_gradient(lambda l: loss(l, y), logits), value_and_gradient(theirs, logits))


def test_literal_eq2_by_hand_and_its_fault():
    "Two pixels: tumour with p = 1/2, background with p = 1/2. The second costs nothing, whatever p is."
    p = torch.tensor([[[.5, .5], [.1, .1], [.5, .5]]], dtype=torch.double)
    loss, y = ConsistencyLoss(form="literal", activation="none"), torch.tensor([[2, 0]])
    assert loss(p, y).item() == pytest.approx(-(np.log(.5) + .685*.5/1.5)/2)
    for worse in (.6, .99): assert loss(torch.where(torch.tensor([False, True]), worse, p), y).item() == pytest.approx(loss(p, y).item())
    assert ConsistencyLoss().beta == PAPER_BETA and sum(ConsistencyLoss(5).beta) == pytest.approx(1)


@pytest.mark.parametrize("seed, alpha", [(0, 1.), (1, .5), (2, 2.)])
def test_the_price_that_repairs_the_printed_loss(seed, alpha):
    "With S the targets' mean, eq. 2 literal has its optimum at p = y, at the price alpha + beta/4."
    y = .05 + .9*torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss, target = LDCLoss(2, form="literal", alpha=alpha, rate=.5).double(), torch.stack([1 - y, y])[None]
    logits = torch.zeros(1, 2, 4, dtype=torch.double, requires_grad=True)
    for _ in range(600):
        gradient, = torch.autograd.grad(loss(logits, target), logits)
        logits.data -= 6/alpha*gradient; loss.ascend()
    torch.testing.assert_close(loss.probabilities(logits)[0, 1].detach(), y, rtol=0, atol=1e-4)
    assert loss.lam.item() == pytest.approx(alpha + 1/4, abs=1e-4)
    residuals = loss.report(torch.autograd.grad(loss(logits, target), logits))
    assert all(residuals[f"kkt_{name}"] < 1e-4 for name in ("stationarity", "primal", "dual", "slackness"))


@pytest.mark.parametrize("relation, price", [("equal", 1), ("at most", 1), ("at least", 0)])
def test_both_directions_of_the_mass_constraint(relation, price):
    "The printed loss wants all the mass it can get: only from above is there something to hold."
    y = torch.zeros(1, 2, 50, dtype=torch.double); y[0, 1, 0] = 1
    loss, logits = LDCLoss(2, form="literal", relation=relation, rate=.5).double(), torch.zeros(1, 2, 1, dtype=torch.double, requires_grad=True)
    for _ in range(200):
        gradient, = torch.autograd.grad(loss(logits.expand(1, 2, 50), y), logits)
        logits.data -= gradient*4; loss.ascend()
    mass = logits.sigmoid()[0, 1].item()
    assert (mass == pytest.approx(.02, abs=1e-3) and loss.lam.item() > .9) if price else (mass > .3 and loss.lam.item() == 0)


# Constraints (1), (3), (4) and their prices.

def test_every_price_moves_by_rho_g_and_keeps_its_sign():
    p = torch.tensor([[[.5, .5, .5, .5], [.95, .05, .5, .5], [-.4, .2, .3, .3]]], dtype=torch.double)
    loss = LDCLoss(bounds=(.1, .9), activation="none", max_norm=2., rate=.5, mass=(.6, .3)).double()
    for steps in (1, 2):
        loss(p, torch.tensor([[0, 1, 2, 0]]), torch.tensor([1., 2.]))
        loss.ascend()
        wanted = {"mu_plus": [.05/4, 0], "mu_minus": [.05/4, .5/4], "lam": [.5 - .6, .1 - .3], "eta": 5/2 - 1, "zeta": [0, .4/4]}
        for name, g in wanted.items(): torch.testing.assert_close(getattr(loss, name), .5*steps*torch.tensor(g, dtype=torch.double))
    loss(p, torch.tensor([[0, 1, 2, 0]]), torch.tensor([0., .1])); loss.ascend(); loss.ascend(); loss.ascend(); loss.ascend()
    assert loss.eta == 0 and set(loss.report()) >= {"mu_plus_1", "mu_minus_2", "lam_2", "eta", "zeta_1", "kkt_primal", "kkt_dual", "kkt_slackness"}
    assert all(type(v) is float for v in loss.report([torch.ones(2), None]).values())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["sigmoid", "softmax"]), st.floats(0, .2), st.floats(.8, 1))
def test_a_probability_never_breaks_constraint_4(seed, activation, low, high):
    loss = LDCLoss(4, bounds=(low, high), activation=activation)
    logits = draw(2, 4, 5, 3, seed=seed, scale=4.).float()
    loss(logits, labels_of(logits.shape, seed)); loss.ascend()
    assert loss.zeta.eq(0).all() and loss.mu_plus.ge(0).all() and loss.mu_minus.ge(0).all() and "nonnegative" not in loss.values


def test_the_norm_of_weights_in_all_its_forms():
    model = torch.nn.Linear(3, 2)
    expected = sum((w**2).sum() for w in model.parameters()).item()
    weight = model.weight.half()
    as_number = torch.tensor(expected)
    for given_ in (model, model.parameters(), list(model.parameters()), model.parameters, lambda: model, as_number, lambda: as_number):
        assert squared_norm(given_).item() == pytest.approx(expected, rel=1e-6)
    assert squared_norm(weight).dtype == torch.float32
    logits, y = torch.randn(1, 2, 4), torch.tensor([[0, 1, 1, 0]])
    loss = LDCLoss(2, max_norm=expected/3, weights=model.parameters)
    loss(logits, y); loss.ascend()
    assert loss.eta.item() == pytest.approx(.1*2, rel=1e-5)
    loss(logits, y).backward()
    torch.testing.assert_close(model.weight.grad, loss.eta*2*model.weight.detach()/loss.max_norm)


def test_a_call_changes_no_state_and_the_teacher_gets_no_gradient():
    loss, student = LDCLoss(bounds=(.05, .95)), torch.randn(2, 3, 6, 6, requires_grad=True)
    teacher_logits = torch.randn(2, 3, 6, 6, requires_grad=True)
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    parts = loss.parts(student, loss.probabilities(teacher_logits))
    torch.testing.assert_close(sum(parts.values()), loss(student, loss.probabilities(teacher_logits)))
    sum(parts.values()).backward()
    assert teacher_logits.grad is None and student.grad is not None and list(parts) == ["bce", "dice", "upper", "lower", "mass"]
    for k, v in loss.state_dict().items(): assert torch.equal(v, before[k]) and not v.requires_grad
    assert set(before) == {"mu_plus", "mu_minus", "lam", "eta", "zeta"} and list(loss.parameters()) == []


def test_a_batch_without_a_class_and_a_value_that_is_no_number():
    loss, logits = LDCLoss(rate=1.), torch.randn(2, 3, 8, 8)
    value = loss(logits, torch.zeros(2, 8, 8, dtype=torch.long)); loss.ascend()
    assert value.isfinite() and loss.lam.gt(0).all()
    before = loss.lam.clone()
    loss(logits*torch.nan, torch.zeros(2, 8, 8, dtype=torch.long)); loss.ascend()
    assert torch.equal(loss.lam, before)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("form", ["literal", "corrected"])
def test_half_precision_autocast_and_certain_scores(activation, form):
    loss = LDCLoss(activation=activation, form=form, bounds=(.01, .99))
    loss.lam.fill_(.5)
    logits, y = torch.randn(2, 3, 6, 5, 4), labels_of((2, 3, 6, 5, 4))
    for half in (logits.half(), logits.bfloat16()):
        assert loss(half, y).dtype == torch.float32
        torch.testing.assert_close(loss(half, y), loss(half.float(), y))
    plain = loss(logits, y)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(loss(logits, y), plain) and plain.dtype == torch.float32
    sure = torch.tensor([[[1e4, -1e4, 0.], [-1e4, 1e4, 0.], [0., 0., 1e4]]])
    value, gradient = value_and_gradient(lambda l: loss(l, torch.tensor([[1, 2, 0]])), sure)
    assert value.isfinite() and gradient.isfinite().all()


def test_softmax_chances_against_float64():
    "log(1-p) of the winner is not lost to rounding."
    logits = torch.tensor([[[0.], [30.], [-3.]]])
    loss = ConsistencyLoss(activation="softmax", alpha=1., beta=(.5, .5))
    p = logits.double().softmax(1); y = torch.tensor([[0]])
    bce = -(one_hot(y, 3)*p.log() + (1 - one_hot(y, 3))*torch.stack([1 - p[:, 0], p[:, 0] + p[:, 2], 1 - p[:, 2]], 1).log()).mean()
    assert loss.parts(logits, y)["bce"].item() == pytest.approx(bce.item(), rel=1e-6)


def test_class_fractions():
    y = torch.tensor([[0, 0, 1], [2, 0, 0]])
    torch.testing.assert_close(class_fractions(y, 3), torch.tensor([4, 1, 1])/6, check_dtype=False)
    torch.testing.assert_close(class_fractions(iter([y[:1], y[1:, :2]]), 3), torch.tensor([3, 1, 1])/5, check_dtype=False)
    LDCLoss(mass=class_fractions(y, 3)[1:])
    with pytest.raises(LabelError, match="no pixel of class 2"): class_fractions(y[:1], 3)
    with pytest.raises(LabelError, match="0 to 1"): class_fractions(y, 2)


# Prices are state.

RUN = '''
import os, signal, sys
from pathlib import Path
import torch
from medseg_nb.losses import LDCLoss
from medseg_nb.training.supervised import fill_optimiser, optimiser_tensors, read_tensors, write_tensors

def below(name, tensors): return {k[len(name)+1:]: v for k, v in tensors.items() if k.startswith(name + ".")}

def train(path, steps=12, die_at=None, forget=False):
    "Twelve steps, saved after each; goes on where the file says."
    torch.manual_seed(0)
    model = torch.nn.Conv2d(1, 3, 3, padding=1)
    loss = LDCLoss(bounds=(.02, .98), max_norm=.5, weights=model.parameters, rate=.7, augmented=.3)
    optimiser, done = torch.optim.SGD(model.parameters(), .3, momentum=.9), 0
    if Path(path).exists():
        tensors, facts = read_tensors(path)
        done = facts["step"]
        model.load_state_dict(below("model", tensors)); fill_optimiser(optimiser, below("optimiser", tensors))
        if not forget: loss.load_state_dict(below("loss", tensors))
    for step in range(done, steps):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(2, 1, 9, 9, generator=g), torch.randint(0, 3, (2, 9, 9), generator=g)
        optimiser.zero_grad(); loss(model(x), y).backward(); optimiser.step(); loss.ascend()
        if step == die_at: os.kill(os.getpid(), signal.SIGKILL)
        parts = {"model": model.state_dict(), "loss": loss.state_dict(), "optimiser": optimiser_tensors(optimiser)}
        write_tensors(path, {f"{k}.{name}": v for k, part in parts.items() for name, v in part.items()}, {"step": step + 1})
    return read_tensors(path)[0]

if __name__ == "__main__": train(sys.argv[1], die_at=int(sys.argv[2]))
'''


def test_prices_survive_sigkill_and_resume_bit_for_bit(tmp_path):
    script = tmp_path/"run.py"; script.write_text(RUN)
    killed = subprocess.run([sys.executable, str(script), str(tmp_path/"killed.safetensors"), "7"], env={**os.environ, "OMP_NUM_THREADS": "1"},
                            capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    space = {"__name__": "run"}; exec(RUN, space)
    from medseg_nb.training.supervised import read_tensors
    half, facts = read_tensors(tmp_path/"killed.safetensors")
    assert facts["step"] == 7 and half["loss.lam"].abs().min() > 0 and half["loss.eta"] > 0
    (tmp_path/"copy.safetensors").write_bytes((tmp_path/"killed.safetensors").read_bytes())
    whole, resumed = space["train"](tmp_path/"whole.safetensors"), space["train"](tmp_path/"killed.safetensors")
    assert set(whole) == set(resumed) and all(torch.equal(whole[k], resumed[k]) for k in whole)
    forgotten = space["train"](tmp_path/"copy.safetensors", forget=True)
    assert not torch.equal(forgotten["model.weight"], whole["model.weight"])       # without the prices it is another run


PAIR = '''
import sys
import torch
import torch.distributed as dist
from medseg_nb.losses import LDCLoss

def train(part, average=lambda gradient: gradient):
    "Five steps on part of each batch; weights, then prices, as lists."
    torch.manual_seed(0)
    model, g = torch.nn.Conv2d(1, 3, 1), torch.Generator().manual_seed(1)
    loss = LDCLoss(bounds=(.2, .6), rate=.5, augmented=2.)
    for _ in range(5):
        x, y = torch.randn(4, 1, 6, 6, generator=g), torch.randint(0, 3, (4, 6, 6), generator=g)
        model.zero_grad(); loss(model(x[part]), y[part]).backward()
        for p in model.parameters(): p.data -= .3*average(p.grad)
        loss.ascend()
    return [v.flatten().tolist() for v in (*model.state_dict().values(), *loss.state_dict().values())]

def average(gradient):
    dist.all_reduce(gradient)
    return gradient/2

if __name__ == "__main__":
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
    print(train(slice(2*rank, 2*rank + 2), average))
'''


def test_two_processes_have_the_prices_of_one_with_the_double_batch(tmp_path):
    (tmp_path/"pair.py").write_text(PAIR)
    start = lambda rank: subprocess.Popen([sys.executable, str(tmp_path/"pair.py"), str(rank), str(tmp_path)], text=True, stdout=subprocess.PIPE,
                                          stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    answers = [run.communicate(timeout=300) for run in [start(0), start(1)]]
    assert all(out for out, _ in answers), answers
    space = {"__name__": "pair"}; exec(PAIR, space)
    one, two = space["train"](slice(None)), [json.loads(out) for out, _ in answers]
    assert two[0] == two[1] and max(map(abs, one[4])) > 0                         # the same on both, and prices did move
    for a, b in zip(one, two[0], strict=True): np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# What is refused.

@pytest.mark.parametrize("wrong, says", [
    (dict(bounds=(.9, .1)), "l <= u"), (dict(bounds=(-.1, 1.)), "0 <= l"), (dict(bounds=(0., 1.5)), "u <= 1"),
    (dict(bounds=(float("nan"), 1.)), "cannot be met"),
    (dict(bounds=(.6, 1.), activation="softmax"), "share a sum of 1"), (dict(mass=(.3, 1.2)), "0 to 1"), (dict(mass=(.3, -.1)), "0 to 1"),
    (dict(mass=(.3,)), "2 numbers"), (dict(mass=(.3, .01), bounds=(.05, .95)), "cannot both be met"),
    (dict(mass=(.7, .6), activation="softmax"), "sum of at most 1"), (dict(mass="labels"), "'target'"), (dict(relation="<="), "'at most'"),
    (dict(beta=(.5, .2)), "sum to 1"), (dict(beta=(1.5, -.5)), ">= 0"), (dict(beta=(1.,)), "2 weights"), (dict(beta=(float("nan"), .5)), "sum to 1"),
    (dict(classes=1), "classes=1"), (dict(rate=0), "rate > 0"), (dict(augmented=-1), "augmented >= 0"), (dict(max_norm=0), "max_norm > 0"),
    (dict(form="printed"), "'literal'"), (dict(activation="relu"), "'softmax'"), (dict(smooth=0), "smooth > 0"), (dict(alpha=-1), "alpha >= 0"),
])
def test_conditions_nobody_can_keep(wrong, says):
    with pytest.raises(MedsegError, match=says): LDCLoss(**wrong)


def test_inputs_that_do_not_fit():
    loss, logits, y = LDCLoss(), torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
    for teacher in (torch.rand(2, 3, 4, 4), torch.rand(2, 2, 8, 8), torch.rand(1, 3, 8, 8), torch.rand(2, 8, 8)):
        with pytest.raises(ShapeError, match="teacher and student have different shapes"): loss(logits, teacher)
    for teacher in (logits, torch.full_like(logits, torch.nan)):
        with pytest.raises(MedsegError, match="no probabilities"): loss(logits, teacher)
    with pytest.raises(LabelError, match="0 to 2"): loss(logits, y + 3)
    with pytest.raises(ShapeError, match="labels do not fit"): loss(logits, y[:, :4])
    for wrong in (logits[:, :2], logits.long(), logits[:0], logits[0, :, 0, 0]):
        with pytest.raises(ShapeError, match="logits do not fit"): loss(wrong, y)
    with pytest.raises(MedsegError, match="no weights"): LDCLoss(max_norm=1.)(logits, y)
    with pytest.raises(MedsegError, match="before ascend"): LDCLoss().ascend()
    for call in (dual_step, lambda *a: kkt_residuals((), [a[:2] + a[3:]])):
        with pytest.raises(MedsegError, match="no such constraint"): call(torch.zeros(1), torch.zeros(1), 1., "below")
