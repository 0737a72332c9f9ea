"The consistency losses of LSSC: against loops, SciPy and PyTorch, any number of modalities, and what they refuse."
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from common import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from medseg_nb.core import LabelError, MedsegError, ShapeError
from medseg_nb.losses import AuxiliaryLoss, CEDice, image_consistency, modality_consistency
from medseg_nb.losses.semantic_consistency import shrink_labels, symmetric_kl


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_gradients(loss, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def loop_modality(embeddings):
    "Eq. 13, class by class, pair by pair, image by image."
    embeddings, total, pairs = [Q if Q.ndim == 3 else Q[None] for Q in embeddings], 0., 0
    for P, Q in combinations(embeddings, 2):
        pairs += 1
        for p in P:
            for q in Q:
                cosines = [(p[i]*q[i]).sum() / (p[i].square().sum().sqrt()*q[i].square().sum().sqrt()) for i in range(len(p))]
                total = total + sum(1 - c for c in cosines)/(len(P)*len(Q))
    return total/pairs


def loop_image(correlations, tau=4.):
    "Eq. 14, row by row: the sum over scales and classes, the mean over pairs of images and of modalities."
    total, pairs = 0., 0
    for one, two in combinations([[E] if isinstance(E, torch.Tensor) else E for E in correlations], 2):
        pairs += 1
        for E1, E2 in zip(one, two, strict=True):
            for a in E1:
                for b in E2:
                    for i in range(len(a)):
                        p, q = (a[i]/tau).softmax(0), (b[i]/tau).softmax(0)
                        total = total + ((p*(p/q).log()).sum() + (q*(q/p).log()).sum())/(len(E1)*len(E2))
    return total/pairs


@pytest.mark.parametrize("shapes", [[(3, 4)]*2, [(3, 4)]*4, [(2, 3, 4), (5, 3, 4)], [(3, 4), (2, 3, 4), (1, 3, 4)]])
def test_modality_consistency_equals_the_loops(shapes):
    embeddings = [draw(*s, seed=k) for k, s in enumerate(shapes)]
    assert_same(value_and_gradients(modality_consistency, *embeddings), value_and_gradients(loop_modality, *embeddings))


def test_modality_consistency_equals_cosine_similarity():
    a, b = draw(5, 7), draw(5, 7, seed=1)
    assert_same(value_and_gradients(modality_consistency, a, b),
                value_and_gradients(lambda x: (1 - F.cosine_similarity(*x, dim=-1)).sum(), a, b))


@pytest.mark.parametrize("batches, scales", [((2, 2), 1), ((2, 3), 3), ((1, 2, 3), 2)])
def test_image_consistency_equals_the_loops(batches, scales):
    flat = [draw(B, 3, 3, seed=10*m + s)*3 for m, B in enumerate(batches) for s in range(scales)]
    fold = lambda x: [x[i:i+scales] for i in range(0, len(x), scales)]
    for tau in (0.5, 4.):
        assert_same(value_and_gradients(lambda x: image_consistency(fold(x), tau), *flat),     # noqa: B023
                    value_and_gradients(lambda x: loop_image(fold(x), tau), *flat))            # noqa: B023


def test_image_consistency_equals_scipy():
    one, two = draw(3, 4, 4), draw(2, 4, 4, seed=1)
    p, q = ((E/4).softmax(-1).numpy() for E in (one, two))
    expected = sum(entropy(a, b, axis=-1).sum() + entropy(b, a, axis=-1).sum() for a in p for b in q)/6
    assert image_consistency([one, two]).item() == pytest.approx(expected, rel=1e-12)


def test_a_tensor_is_one_scale_and_scales_add_up():
    one, two = draw(3, 4, 4), draw(2, 4, 4, seed=1)
    single = image_consistency([one, two])
    torch.testing.assert_close(image_consistency([[one], [two]]), single)
    torch.testing.assert_close(image_consistency([[one]*3, (two, two, two)]), 3*single)


def test_gradcheck():
    E = [draw(2, 3, 3, seed=k).requires_grad_() for k in (0, 1, 2)]
    assert torch.autograd.gradcheck(lambda *x: image_consistency(list(x)), E)
    assert torch.autograd.gradcheck(lambda *x: modality_consistency(list(x)), E)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), modalities=st.integers(2, 4), scale=st.sampled_from([1e-3, 1., 30.]))
def test_ranges_and_symmetry(seed, modalities, scale):
    E = [(draw(1 + m, 4, 4, seed=seed + m)*scale).float() for m in range(modalities)]
    mcr, icr = modality_consistency(E), image_consistency(E)
    assert -1e-5 <= mcr.item() <= 2*4 + 1e-5 and 0 <= icr.item() < float("inf")
    torch.testing.assert_close(modality_consistency(E[::-1]), mcr)
    torch.testing.assert_close(image_consistency(E[::-1]), icr)
    torch.testing.assert_close(modality_consistency([7*Q for Q in E]), mcr)            # lengths do not count
    torch.testing.assert_close(image_consistency([Q + 5 for Q in E]), icr, rtol=1e-3, atol=1e-5)   # nor a constant on a row
    same = [E[0][:1]]*modalities
    assert modality_consistency(same).item() < 1e-5 and image_consistency(same).item() == 0


def test_extremes_of_the_temperature():
    "Hot: the loss falls as 1/tau^2, half the variance of the difference. Cold: it grows as 1/tau."
    one, two = draw(1, 4, 4), draw(1, 4, 4, seed=1)
    at = lambda tau: image_consistency([one, two], tau).item()
    variance = (one - two).var(-1, correction=0).sum().item()
    assert at(1e4)*1e8 == pytest.approx(variance, rel=1e-3) and at(1e-4)/at(1e-3) == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    E = [draw(2, 3, 3, seed=k).to(dtype) for k in (0, 1)]
    for loss in (modality_consistency, image_consistency):
        assert loss(E).dtype == torch.float32
        torch.testing.assert_close(loss(E), loss([x.float() for x in E]))
        with torch.autocast("cpu", dtype=torch.bfloat16): torch.testing.assert_close(loss([x.float() for x in E]), loss([x.float() for x in E]))


def test_a_zero_embedding_is_finite():
    value, *grads = value_and_gradients(modality_consistency, torch.zeros(2, 3), torch.ones(2, 3))
    assert value.item() == 2 and all(bool(g.isfinite().all()) for g in grads)


def test_hardly_any_gradient_from_near_certain_rows():
    E = [torch.tensor([[[200., -200.], [0., 0.]]]), torch.tensor([[[-200., 200.], [0., 0.]]])]
    value, *grads = value_and_gradients(lambda x: image_consistency(x, 0.1), *E)
    assert value.isfinite() and all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("call", [
    lambda: modality_consistency([]), lambda: modality_consistency([draw(3, 4)]), lambda: modality_consistency(draw(3, 4)),
    lambda: modality_consistency(None), lambda: modality_consistency([draw(3, 4), draw(2, 4)]),
    lambda: modality_consistency([draw(3, 4), draw(3, 5)]), lambda: modality_consistency([draw(4), draw(4)]),
    lambda: modality_consistency([draw(0, 4), draw(0, 4)]),
    lambda: image_consistency([]), lambda: image_consistency([draw(1, 3, 3)]), lambda: image_consistency(draw(2, 3, 3)),
    lambda: image_consistency([draw(1, 3, 3), draw(1, 4, 4)]), lambda: image_consistency([draw(1, 3, 4), draw(1, 3, 4)]),
    lambda: image_consistency([draw(3, 3), draw(3, 3)]), lambda: image_consistency([[], []]),
    lambda: image_consistency([[draw(1, 3, 3)], [draw(1, 3, 3)]*2]), lambda: image_consistency([draw(0, 3, 3), draw(1, 3, 3)])])
def test_lists_that_do_not_fit(call):
    with pytest.raises(ShapeError, match="expected"): call()


@pytest.mark.parametrize("tau", [0, -1, float("nan"), float("inf")])
def test_temperatures_that_cannot_be(tau):
    with pytest.raises(MedsegError, match="tau > 0"): image_consistency([draw(1, 3, 3)]*2, tau)


# the auxiliary loss ------------------------------

def loop_shrink(y, size):
    "The label at the centre of each coarse cell, two dimensions."
    out = torch.zeros(len(y), *size, dtype=y.dtype)
    for i in range(size[0]):
        for j in range(size[1]): out[:, i, j] = y[:, int((i + .5)*y.shape[1]/size[0]), int((j + .5)*y.shape[2]/size[1])]
    return out


@pytest.mark.parametrize("size", [(9, 7), (4, 3), (1, 1), (5, 7), (18, 9)])
def test_labels_shrink_to_the_centre(size):
    y = torch.randint(0, 5, (2, 9, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(shrink_labels(y, size), loop_shrink(y, size))
    assert torch.equal(shrink_labels(y, size), F.interpolate(y[:, None].float(), size, mode="nearest-exact")[:, 0].long())


def loop_auxiliary(loss, maps, y):
    "Eq. 12: per scale and class a weighted sum over heads, then CE + Dice."
    total = 0.
    for conv, A in zip(loss.to_logits, maps, strict=True):
        logits = torch.stack([sum(conv.weight[j, h, 0]*A[:, j, h] for h in range(A.shape[2])) + conv.bias[j]
                              for j in range(A.shape[1])], 1)
        total = total + CEDice()(logits, loop_shrink(y, A.shape[3:]))
    return total


def test_auxiliary_equals_the_loops():
    torch.manual_seed(0)
    loss = AuxiliaryLoss(3, [2, 4])
    y = torch.randint(0, 3, (2, 9, 7))
    maps = [torch.randn(2, 3, 2, 4, 3), torch.randn(2, 3, 4, 9, 7)]
    ours = value_and_gradients(lambda x: loss(x, y), *maps)
    assert_same(ours, value_and_gradients(lambda x: loop_auxiliary(loss, x, y), *maps), 1e-5)


@pytest.mark.parametrize("shape", [(8,), (7, 5), (6, 5, 4)])
def test_auxiliary_in_one_to_three_dimensions(shape):
    torch.manual_seed(0)
    loss, y = AuxiliaryLoss(4, 2, scales=3, loss=CEDice(batch_dice=True)), torch.randint(0, 4, (2, *shape))
    maps = [torch.randn(2, 4, 2, *(-(-n//k) for n in shape), requires_grad=True) for k in (4, 2, 1)]
    assert [l.shape for l in loss.logits(maps)] == [(2, 4, *A.shape[3:]) for A in maps]
    loss(maps, y).backward()
    assert all(A.grad.abs().sum() > 0 for A in maps) and all(p.grad.abs().sum() > 0 for p in loss.parameters())


def test_auxiliary_ties_a_map_to_its_class():
    torch.manual_seed(0)
    loss, A = AuxiliaryLoss(4, 2, scales=1), torch.randn(1, 4, 2, 5, 5, requires_grad=True)
    loss.logits([A])[0][:, 1].sum().backward()
    assert A.grad[:, 1].abs().sum() > 0 and A.grad[:, [0, 2, 3]].abs().sum() == 0


@pytest.mark.parametrize("call", [
    lambda: AuxiliaryLoss(1, 2), lambda: AuxiliaryLoss(3, 0), lambda: AuxiliaryLoss(3, []), lambda: AuxiliaryLoss(3, 2, scales=0),
    lambda: AuxiliaryLoss(3, 2, scales=2)([torch.randn(1, 3, 2, 4)], torch.zeros(1, 4, dtype=torch.long)),
    lambda: AuxiliaryLoss(3, 2, scales=1)([torch.randn(1, 4, 2, 4)], torch.zeros(1, 4, dtype=torch.long)),
    lambda: AuxiliaryLoss(3, 2, scales=1)([torch.randn(1, 3, 2)], torch.zeros(1, dtype=torch.long)),
    lambda: AuxiliaryLoss(3, 2, scales=1)([torch.randn(1, 3, 2, 4)], torch.zeros(2, 4, dtype=torch.long)),
    lambda: AuxiliaryLoss(3, 2, scales=1)([torch.randn(1, 3, 2, 4)], torch.zeros(1, 4, 4, dtype=torch.long)),
    lambda: AuxiliaryLoss(3, 2, scales=1)([torch.randn(1, 3, 2, 4)], torch.zeros(1, 0, dtype=torch.long))])
def test_auxiliary_refuses(call):
    with pytest.raises(ShapeError, match="expected"): call()


def test_auxiliary_labels_out_of_range():
    with pytest.raises(LabelError): AuxiliaryLoss(3, 2, scales=1)([torch.randn(1, 3, 2, 4)], torch.full((1, 4), 3))


def test_symmetric_kl_by_hand():
    p, q = torch.tensor([.5, .5]), torch.tensor([.8, .2])
    expected = .5*torch.tensor(.5/.8).log() + .5*torch.tensor(.5/.2).log() + .8*torch.tensor(.8/.5).log() + .2*torch.tensor(.2/.5).log()
    torch.testing.assert_close(symmetric_kl(p.log(), q.log()), expected)
