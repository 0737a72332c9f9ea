"Signed distance maps against SciPy, eq. 4 against a loop, what reaches the student, and what is refused."
import sys

import numpy as np
import pytest
import torch
from common import assert_same, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure
from torch import nn
from torch.nn import functional as F

from medseg_nb.core import GeometryError, LabelError, MedsegError, ShapeError
from medseg_nb.losses import BoundaryContrast, SDMHead, SDMProjection, draw_negatives, info_nce, signed_distance_map


def by_scipy(mask, spacing=None, normalize=True):
    "Two transforms, each divided by its maximum, 0 on the inner boundary (faces; the image's edge is none)."
    if mask.all() or not mask.any(): return np.full(mask.shape, (-1. if mask.all() else 1.)*(1 if normalize else np.inf))
    inner, outer = (distance_transform_edt(m, sampling=spacing) for m in (mask, ~mask))
    if normalize: inner, outer = inner/inner.max(), outer/outer.max()
    faces = generate_binary_structure(mask.ndim, 1)
    return np.where(mask & ~binary_erosion(mask, faces, border_value=1), 0, outer - inner)


def blobs(shape, seed, share=.4):
    "A random mask with some coherence."
    rng = np.random.default_rng(seed)
    noise = rng.random(shape)
    for axis in range(len(shape)): noise = noise + np.roll(noise, 1, axis)
    return noise < np.quantile(noise, share)


sides = st.one_of(st.tuples(*[st.integers(1, 14)]*2), st.tuples(*[st.integers(1, 9)]*3))
millimetres = st.floats(.2, 8)


@given(sides, st.integers(0, 10**6), st.floats(0, 1), st.lists(millimetres, min_size=3, max_size=3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_equals_scipys_two_transforms(shape, seed, share, spacing, normalize):
    mask, spacing = blobs(shape, seed, share), spacing[:len(shape)]
    np.testing.assert_allclose(signed_distance_map(mask, spacing, normalize=normalize), by_scipy(mask, spacing, normalize), rtol=2e-5, atol=2e-6)


@given(sides, st.integers(0, 10**6), st.floats(.05, .95), millimetres)
@settings(max_examples=80, deadline=None)
def test_sign_range_and_scale(shape, seed, share, unit):
    mask = blobs(shape, seed, share)
    sdm = signed_distance_map(mask)
    assert sdm.dtype == np.float32 and (np.abs(sdm) <= 1).all() and (sdm[mask] <= 0).all() and (sdm[~mask] > 0).all()
    if not mask.all() and mask.any(): assert sdm.max() == 1 and sdm.min() in (-1, 0) and (sdm == 0).any()
    np.testing.assert_allclose(signed_distance_map(mask, [unit]*len(shape)), sdm, atol=1e-5)
    for axis in range(len(shape)):
        np.testing.assert_allclose(signed_distance_map(np.flip(mask, axis)), np.flip(sdm, axis), atol=1e-6)
    np.testing.assert_allclose(signed_distance_map(mask.T), sdm.T, atol=1e-6)              # any order in memory


def test_by_hand():
    square = np.zeros((5, 5), bool); square[1:4, 1:4] = True
    r = 2**-.5
    np.testing.assert_allclose(signed_distance_map(square), [[1, r, r, r, 1], [r, 0, 0, 0, r], [r, 0, -1, 0, r], [r, 0, 0, 0, r], [1, r, r, r, 1]], atol=1e-7)
    line = np.zeros((1, 5), bool); line[0, 0:3] = True                                      # the image's edge is no boundary
    np.testing.assert_allclose(signed_distance_map(line, (1, 2), normalize=False), [[-6, -4, 0, 2, 4]])


def test_empty_and_full():
    empty, full = np.zeros((4, 5), bool), np.ones((2, 3, 4), np.uint8)
    assert (signed_distance_map(empty) == 1).all() and (signed_distance_map(full) == -1).all()
    assert (signed_distance_map(empty, normalize=False) == np.inf).all() and (signed_distance_map(full, normalize=False) == -np.inf).all()


@pytest.mark.parametrize("shape, spacing, dims, space", [((2, 3, 8, 9), None, None, 2), ((2, 3, 6, 5, 4), None, None, 3), ((4, 8, 9), None, 2, 2),
                                                         ((4, 8, 9), (1, 2), None, 2),
                                                         ((2, 6, 5, 4), (1, 1, 3), None, 3), ((7, 8), None, None, 2), ((6, 7, 5), None, None, 3)])
def test_batches_and_classes_are_independent(shape, spacing, dims, space):
    masks = np.random.default_rng(0).random(shape) < .5
    maps = signed_distance_map(masks, spacing, dims)
    lead = shape[:len(shape) - space]
    for i in np.ndindex(lead): np.testing.assert_allclose(maps[i], by_scipy(masks[i], spacing), atol=1e-5)
    assert maps.shape == shape


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_tensors_give_tensors(kind):
    mask = torch.from_numpy(blobs((9, 7), 0))
    sdm = signed_distance_map(mask.to(kind))
    assert sdm.dtype == torch.float32 and sdm.device == mask.device
    np.testing.assert_array_equal(sdm.numpy(), signed_distance_map(mask.numpy()))


def test_the_mask_is_left_alone():
    mask = blobs((9, 7), 0); before = mask.copy()
    signed_distance_map(mask)
    np.testing.assert_array_equal(mask, before)


@pytest.mark.parametrize("error, wrong", [
    (LabelError, lambda: signed_distance_map(np.full((4, 4), .5))), (LabelError, lambda: signed_distance_map(np.full((4, 4), np.nan))),
    (LabelError, lambda: signed_distance_map(np.array([["a", "b"]]))),
    (ShapeError, lambda: signed_distance_map(np.ones(4, bool))), (ShapeError, lambda: signed_distance_map(np.ones((0, 4), bool))),
    (ShapeError, lambda: signed_distance_map(np.ones((4, 4), bool), dims=3)), (ShapeError, lambda: signed_distance_map(np.ones((4, 4), bool), dims=1)),
    (ShapeError, lambda: signed_distance_map(np.ones((4, 4), bool), spacing=1.)),
    (ShapeError, lambda: signed_distance_map(np.ones((2,)*6, bool))),
    (GeometryError, lambda: signed_distance_map(np.ones((4, 4), bool), (1, 0))),
    (GeometryError, lambda: signed_distance_map(np.ones((4, 4), bool), (1, np.nan))),
    (GeometryError, lambda: signed_distance_map(np.ones((4, 4, 4), bool), (1, 1, 1), dims=2)),
])
def test_masks_that_cannot_be_measured(error, wrong):
    with pytest.raises(error): wrong()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "edt", None)
    with pytest.raises(MedsegError, match="pip install edt"): signed_distance_map(blobs((5, 5), 0))


# Eq. 4.

def loop_contrast(teacher, student, temperature, negatives):
    "Eq. 4, slice by slice."
    terms = []
    for i in range(len(teacher)):
        score = lambda k, i=i: (teacher[i]*student[k]).sum()/temperature
        bottom = score(i).exp() + sum(score(k).exp() for k in negatives[i].tolist())
        terms.append(-(score(i).exp()/bottom).log())
    return torch.stack(terms).mean()


def vectors(n, d, seed):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, d, generator=g, dtype=torch.double), dim=1) for _ in range(2)]


@given(st.integers(2, 9), st.integers(1, 6), st.floats(.05, 5), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_equals_the_loop(n, d, temperature, count, seed):
    teacher, student = vectors(n, d, seed)
    drawn = draw_negatives(n, count, torch.Generator().manual_seed(seed))
    fast = gradients(lambda s: info_nce(teacher, s, temperature, drawn), [student])
    assert_same(fast, gradients(lambda s: loop_contrast(teacher, s, temperature, drawn), [student]))
    everyone = gradients(lambda s: info_nce(teacher, s, temperature), [student])
    assert_same(everyone, gradients(lambda s: loop_contrast(teacher, s, temperature, draw_negatives(n)), [student]))


@given(st.integers(2, 12), st.one_of(st.none(), st.integers(1, 15)), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_negatives_are_others_and_differ(n, count, seed):
    drawn = draw_negatives(n, count, torch.Generator().manual_seed(seed))
    assert drawn.shape == (n, min(count or n-1, n-1))
    for i, row in enumerate(drawn.tolist()): assert i not in row and len(set(row)) == len(row) and set(row) <= set(range(n))
    torch.testing.assert_close(drawn, draw_negatives(n, count, torch.Generator().manual_seed(seed)))


def test_negatives_are_drawn_evenly():
    g = torch.Generator().manual_seed(0)
    seen = torch.stack([F.one_hot(draw_negatives(5, 2, g), 5).sum(1) for _ in range(2000)]).double().mean(0)
    torch.testing.assert_close(seen, (1 - torch.eye(5).double())/2, rtol=0, atol=.05)


def test_low_temperature_and_large_scores_stay_finite():
    teacher, student = vectors(6, 4, 0)
    loss, gradient = gradients(lambda s: info_nce(teacher, s, 1e-4), [student])
    assert loss.isfinite() and gradient.isfinite().all()


# The module.

def maps(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=g)*2 - 1


@pytest.mark.parametrize("shape", [(5, 2, 12, 9), (2, 2, 12, 9, 3), (3, 2, 5, 4), (2, 2, 8, 8, 1)])
@pytest.mark.parametrize("negatives", [None, 2])
def test_the_module_is_projection_and_loop(shape, negatives):
    contrast, student, teacher = BoundaryContrast(2, negatives=negatives), maps(*shape), maps(*shape, seed=1)
    flat = [m if m.ndim == 4 else torch.cat([m[i, ..., j][None] for i in range(shape[0]) for j in range(shape[-1])]) for m in (student, teacher)]
    g = torch.Generator().manual_seed(0)
    before = g.get_state()
    drawn = draw_negatives(len(flat[0]), negatives, torch.Generator().manual_seed(0))
    want = loop_contrast(contrast.head(flat[1]), contrast.head(flat[0]), .1, drawn)
    torch.testing.assert_close(contrast(student, teacher, generator=g), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(g.get_state(), before) == (negatives is None)      # nothing is drawn where all others are asked


def test_gradients_of_the_module():
    contrast, teacher = BoundaryContrast(1, temperature=.5, dim=6).double(), maps(3, 1, 9, 9, seed=1).double()
    assert torch.autograd.gradcheck(lambda s: contrast(s, teacher), maps(3, 1, 9, 9).double().requires_grad_())


def test_every_image_reaches_the_student_and_none_the_teacher():
    torch.manual_seed(0)
    student, contrast = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), SDMHead(4, 1)), BoundaryContrast(1, negatives=3)
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), SDMHead(4, 1))
    image = torch.randn(6, 1, 16, 16)                                                       # the last three are the unlabelled ones
    drawn = student(image); drawn.retain_grad()
    contrast(drawn, teacher(image)).backward()
    assert (drawn.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad is None for p in teacher.parameters()) and all(p.grad.norm() > 0 for p in [*student.parameters(), *contrast.parameters()])


def test_unlabelled_images_alone_train_the_student():
    torch.manual_seed(0)
    student, contrast = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), SDMHead(4, 1)), BoundaryContrast(1)
    image, goal = torch.randn(6, 1, 16, 16), maps(6, 1, 16, 16, seed=3)
    optimiser, log = torch.optim.Adam([*student.parameters(), *contrast.parameters()], 1e-2), []
    before = student[0].weight.detach().clone()
    for _ in range(40):
        optimiser.zero_grad(); loss = contrast(student(image), goal); loss.backward(); optimiser.step(); log.append(loss.item())
    assert log[-1] < .5*log[0] and not torch.equal(before, student[0].weight)


def test_a_no_grad_branch_and_another_image_teach_nothing_about_the_unlabelled():
    "The wiring of the authors' script: the unlabelled branch is a constant, so its images get no gradient."
    torch.manual_seed(0)
    student, contrast = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), SDMHead(4, 1)), BoundaryContrast(1)
    labelled, unlabelled = torch.randn(3, 1, 16, 16), torch.randn(3, 1, 16, 16, requires_grad=True)
    with torch.no_grad(): constant = student(unlabelled)
    assert torch.autograd.grad(contrast(student(labelled), constant), unlabelled, allow_unused=True)[0] is None
    assert torch.autograd.grad(contrast(student(unlabelled), student(unlabelled + .1)), unlabelled)[0].norm() > 0


def test_a_head_of_its_own_for_the_teacher():
    contrast, other, m = BoundaryContrast(1), SDMProjection(1), maps(4, 1, 8, 8)
    torch.testing.assert_close(contrast(m, m, teacher_head=other), info_nce(other(m), contrast.head(m)))
    contrast(m, m, teacher_head=other).backward()
    assert all(p.grad is None for p in other.parameters())


def test_half_precision():
    contrast, student, teacher = BoundaryContrast(1), maps(4, 1, 8, 8), maps(4, 1, 8, 8, seed=1)
    with torch.autocast("cpu", torch.bfloat16): loss = contrast(student.bfloat16(), teacher.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, contrast(student, teacher), rtol=.05, atol=.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    contrast, student, teacher = BoundaryContrast(1, negatives=2), maps(4, 1, 8, 8), maps(4, 1, 8, 8, seed=1)
    draw = lambda: torch.Generator().manual_seed(0)
    want = contrast(student, teacher, generator=draw())
    torch.testing.assert_close(contrast.cuda()(student.cuda(), teacher.cuda(), generator=draw()).cpu(), want, rtol=1e-3, atol=1e-4)
    assert signed_distance_map((student > 0).cuda()).is_cuda


@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (2, 5, 4, 3, 6)])
def test_the_head_draws_what_it_is_shown(shape):
    torch.manual_seed(0)
    head = SDMHead(5, 2, spatial_dims=len(shape) - 2)
    out = head(torch.randn(shape))
    assert out.shape == (2, 2, *shape[2:]) and out.abs().max() < 1


@pytest.mark.parametrize("other", [(4, 2, 8, 9), (3, 2, 8, 8), (4, 1, 8, 8), (4, 2, 8, 8, 1)])
def test_teacher_and_student_of_different_shapes(other):
    with pytest.raises(ShapeError, match="teacher and student have different shapes"): BoundaryContrast(2)(maps(4, 2, 8, 8), maps(*other))
    with pytest.raises(ShapeError, match="teacher and student have different shapes"): info_nce(torch.randn(3, 4), torch.randn(3, 5))


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 2, 8), (0, 2, 8, 8), (4, 2, 8, 0), (4, 2, 3, 3, 3, 3)])
def test_maps_that_do_not_fit(shape):
    with pytest.raises(ShapeError, match="do not fit the contrast"): BoundaryContrast(2)(torch.zeros(shape), torch.zeros(shape))


def test_what_cannot_be_built_or_asked():
    for wrong in (dict(temperature=0), dict(temperature=-1), dict(temperature=float("nan")), dict(negatives=0), dict(classes=0), dict(dim=0)):
        with pytest.raises(MedsegError, match="cannot be built"): BoundaryContrast(**{"classes": 2, **wrong})
    for negatives in (None, 2):
        with pytest.raises(ShapeError, match="no negatives"): BoundaryContrast(2, negatives=negatives)(maps(1, 2, 8, 8), maps(1, 2, 8, 8))
    with pytest.raises(ShapeError, match="do not fit the contrast"): BoundaryContrast(2)(maps(4, 2, 8, 8).long(), maps(4, 2, 8, 8).long())
    with pytest.raises(ShapeError, match="spatial_dims"): SDMHead(4, 1, spatial_dims=4)
