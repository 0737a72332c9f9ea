"""Geometry: whatever the grid (anisotropic, flipped, permuted, rotated), nothing moves in mm and all ways lead back."""
import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from nibabel.processing import resample_from_to
from scipy.ndimage import center_of_mass
from scipy.spatial.transform import Rotation

from medseg_nb.core import GeometryError, ShapeError
from medseg_nb.data.volumes import (
    back_to_grid,
    load_label,
    load_volume,
    regrid,
    resample,
    resample_to_shape,
    same_grid,
    save_volume,
    spacing_of,
    to_canonical,
)

settings.register_profile("geometry", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("geometry")


@st.composite
def affines(draw, rotated=True):
    "Voxel to mm: any spacing from 0.4 to 8 mm, any order and direction of axes, any rotation, any origin."
    spacing = draw(st.tuples(*[st.floats(0.4, 8)]*3))
    turn = np.eye(3)[list(draw(st.permutations(range(3))))] * draw(st.tuples(*[st.sampled_from([-1, 1])]*3))
    if rotated: turn = Rotation.from_euler("xyz", draw(st.tuples(*[st.floats(-1.5, 1.5)]*3))).as_matrix() @ turn
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * spacing, draw(st.tuples(*[st.floats(-200, 200)]*3))
    return affine


shapes = st.tuples(*[st.integers(2, 11)]*3)
seeds = st.integers(0, 2**16)


def random_label(shape, affine, seed):
    return nib.Nifti1Image(np.random.default_rng(seed).integers(0, 5, shape).astype(np.uint8), affine)


def random_image(shape, affine, seed):
    return nib.Nifti1Image(np.random.default_rng(seed).normal(size=shape).astype(np.float32), affine)


def values(img): return np.asarray(img.dataobj)


def on_grid_of(img, reference):
    return img.shape == reference.shape and np.array_equal(img.affine, reference.affine)


@given(affines(), shapes, seeds)
def test_canonical_and_back_is_exact(affine, shape, seed):
    label, image = random_label(shape, affine, seed), random_image(shape, affine, seed)
    for img, order in ((label, 0), (image, 0), (image, 1)):
        back = back_to_grid(to_canonical(img), img, order)
        assert on_grid_of(back, img)
        np.testing.assert_allclose(values(back), values(img), atol=1e-5 if order else 0)


def assert_gives_back(prepared, label):
    "Back on the grid of the label, every voxel has its label again."
    back = back_to_grid(prepared, label)
    assert on_grid_of(back, label)
    np.testing.assert_array_equal(values(back), values(label))


@given(affines(), shapes, seeds)
def test_unchanged_spacing_changes_no_label(affine, shape, seed):
    label = random_label(shape, affine, seed)
    canonical = to_canonical(label)
    prepared = resample(canonical, spacing_of(canonical), order=0)
    assert same_grid(prepared, canonical)
    np.testing.assert_array_equal(values(prepared), values(canonical))
    assert_gives_back(prepared, label)


@given(affines(), shapes, seeds, st.tuples(*[st.floats(0.2, 0.98)]*3))
def test_a_finer_grid_gives_every_label_back(affine, shape, seed, finer):
    label = random_label(shape, affine, seed)
    canonical = to_canonical(label)
    prepared = resample(canonical, spacing_of(canonical) * finer, order=0)
    assert_gives_back(prepared, label)


@given(affines(), shapes, seeds, st.tuples(*[st.floats(0.3, 20)]*3))
def test_any_spacing_comes_back_on_the_exact_grid(affine, shape, seed, spacing):
    label = random_label(shape, affine, seed)
    prepared = resample(to_canonical(label), spacing, order=0)
    np.testing.assert_allclose(spacing_of(prepared), spacing, rtol=1e-6)
    assert set(np.unique(values(prepared))) <= set(np.unique(values(label)))   # no label is invented
    back = back_to_grid(prepared, label)
    assert on_grid_of(back, label) and back.get_data_dtype() == np.uint8


@given(affines(), shapes, st.tuples(*[st.integers(1, 15)]*3))
def test_resample_to_shape_covers_the_same_box(affine, shape, new):
    img = random_image(shape, affine, 0)
    out = resample_to_shape(img, new)
    assert out.shape == new
    for corner in (0, 1):   # outer corners of the first and of the last voxel
        a = apply_affine(img.affine, np.array(shape) * corner - 0.5)
        b = apply_affine(out.affine, np.array(new) * corner - 0.5)
        np.testing.assert_allclose(a, b, atol=1e-3)


@given(affines(), st.tuples(*[st.floats(0.4, 1.5)]*3), st.tuples(*[st.floats(-1.5, 1.5)]*3))
def test_centre_of_mass_stays_where_it_is(affine, ratio, offset):
    shape, sigma = (21, 23, 25), 2.2
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    blob = np.exp(-((index - (np.array(shape)-1)/2 - offset)**2).sum(-1) / (2*sigma**2)).astype(np.float32)
    img = nib.Nifti1Image(blob, affine)
    out = resample(img, spacing_of(img) * ratio)
    back = back_to_grid(out, img, order=1)
    before, there, again = (apply_affine(i.affine, center_of_mass(values(i))) for i in (img, out, back))
    for after in (there, again):   # in voxels of the image: half a voxel of shift would be 0.5
        assert np.abs(np.linalg.inv(affine)[:3, :3] @ (after - before)).max() < 0.06


def plane(affine, shape, slope):
    "An image whose value is a linear function of the position in mm: linear interpolation must hit it exactly."
    mm = apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))
    return nib.Nifti1Image(mm @ slope, affine)


def interior(img, affine, shape):
    "Voxels of the grid (affine, shape) that lie between the outermost centres of `img`, and their index in it."
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    at = apply_affine(np.linalg.inv(img.affine) @ affine, index)
    return ((at > 1e-3) & (at < np.array(img.shape) - 1.001)).all(-1), at


@given(affines(), affines(), st.booleans())
def test_an_analytic_image_is_met_on_any_grid(affine, other, aligned):
    img = plane(affine, (9, 8, 7), np.array([0.7, -1.3, 2.1]))
    centre = apply_affine(affine, (4, 3.5, 3))
    target = affine @ np.diag([0.7, 1.6, 0.9, 1]) if aligned else other.copy()
    target[:3, 3] = centre - target[:3, :3] @ (3, 3, 3)   # the two grids share a middle
    out = regrid(img, target, (7, 7, 7))
    inside, _ = interior(img, target, (7, 7, 7))
    truth = values(plane(target, (7, 7, 7), np.array([0.7, -1.3, 2.1])))
    assert inside.any()
    np.testing.assert_allclose(values(out)[inside], truth[inside], atol=1e-3)


@given(affines(), shapes, seeds)
def test_beyond_the_image_there_is_background(affine, shape, seed):
    label = nib.Nifti1Image(np.ones(shape, np.uint8), affine)
    shift = np.eye(4)
    shift[:3, 3] = -3
    wide = nib.Nifti1Image(np.zeros(np.array(shape) + 6, np.uint8), affine @ shift)
    for reference in (wide, to_canonical(wide)):
        back = to_canonical(back_to_grid(label, reference)) if reference is wide else back_to_grid(label, reference)
        assert values(back).sum() == np.prod(shape)   # the voxel next to the edge is one whole voxel away: 0


def sitk_resample(img, reference, linear):
    "SimpleITK's resampling of a nibabel image onto another's grid (its world is LPS, its arrays run z, y, x)."
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is a development requirement")
    def convert(nifti):
        out, lps = sitk.GetImageFromArray(values(nifti).astype(np.float64).T), np.diag([-1, -1, 1]) @ nifti.affine[:3]
        spacing = spacing_of(nifti)
        out.SetSpacing(spacing.tolist()); out.SetOrigin(lps[:, 3].tolist())
        out.SetDirection((lps[:, :3] / spacing).ravel().tolist())
        return out
    how = sitk.sitkLinear if linear else sitk.sitkNearestNeighbor
    return sitk.GetArrayFromImage(sitk.Resample(convert(img), convert(reference), sitk.Transform(), how)).T


@given(affines(), shapes, seeds, st.tuples(*[st.floats(0.4, 2.5)]*3))
def test_agrees_with_simpleitk(affine, shape, seed, ratio):
    img, label = random_image(shape, affine, seed), random_label(shape, affine, seed)
    out = resample(img, spacing_of(img) * ratio)
    inside, at = interior(img, out.affine, out.shape)
    np.testing.assert_allclose(values(out)[inside], sitk_resample(img, out, linear=True)[inside], atol=1e-4)
    clear = inside & (np.abs(at % 1 - 0.5) > 1e-3).all(-1)   # exactly between two voxels either is right
    nearest = resample(label, spacing_of(label) * ratio, order=0)
    np.testing.assert_array_equal(values(nearest)[clear], sitk_resample(label, nearest, linear=False)[clear])


def ignored_tilt(img, target, shape):
    "Voxels by which a target may be off its axes and still count as parallel to the image's: at most a thousandth."
    steps = np.abs(np.linalg.solve(img.affine, target)[:3, :3])
    steps[steps.argmax(0), range(3)] = 0
    tilt = (steps @ np.array(shape)).max()
    return tilt if tilt < 1e-3 else 0


@given(affines(), affines(), seeds)
@example(np.diag([-1., -1, -1, 1]), np.array([[-1, 1e-5, 0, 0], [-1e-5, -1, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]]), 0)
def test_agrees_with_simpleitk_and_nibabel_on_rotated_grids(affine, other, seed):
    img = random_image((9, 8, 7), affine, seed)
    target = other.copy()
    target[:3, 3] = apply_affine(affine, (4, 3.5, 3)) - target[:3, :3] @ (2, 2, 2)
    reference = nib.Nifti1Image(np.zeros((5, 5, 5), np.float32), target)
    out = back_to_grid(img, reference, order=1)
    inside, _ = interior(img, target, (5, 5, 5))
    assume(inside.any())
    atol = 1e-4 + 3 * ignored_tilt(img, target, (5, 5, 5)) * np.ptp(values(img))
    np.testing.assert_allclose(values(out)[inside], sitk_resample(img, reference, linear=True)[inside], atol=atol)
    theirs = values(resample_from_to(img, reference, order=1))
    np.testing.assert_allclose(values(out)[inside], theirs[inside], atol=atol)


@given(affine=affines(), shape=shapes, seed=seeds)
@settings(max_examples=15)
def test_saved_and_read_again(tmp_path_factory, affine, shape, seed):
    folder = tmp_path_factory.mktemp("saved")
    label, image = random_label(shape, affine, seed), random_image(shape, affine, seed)
    a = load_label(save_volume(values(label), label, folder/"label.nii.gz"), range(5))
    b = load_volume(save_volume(values(image), image, folder/"image.nii"))
    assert same_grid(a, label) and same_grid(b, image)
    np.testing.assert_array_equal(values(a), values(label))
    np.testing.assert_array_equal(values(b), values(image))


def test_same_grid_sees_a_shift_a_flip_and_a_small_turn():
    img = random_image((100, 100, 20), np.diag([1.0, 1, 5, 1]), 0)
    def moved(matrix): return nib.Nifti1Image(values(img), img.affine @ matrix)
    shift = np.eye(4); shift[0, 3] = 0.5
    turn = np.eye(4); turn[:2, :2] = [[np.cos(0.005), -np.sin(0.005)], [np.sin(0.005), np.cos(0.005)]]
    noise = np.eye(4); noise[0, 1] = 1e-6
    flip = np.diag([-1.0, 1, 1, 1])
    assert [same_grid(img, moved(m)) for m in (shift, flip, turn, noise)] == [False, False, False, True]


def test_impossible_requests_are_refused():
    img = random_image((4, 4, 4), np.eye(4), 0)
    for spacing in ((0, 1, 1), (1, -1, 1), (1, 1, np.nan)):
        with pytest.raises(GeometryError): resample(img, spacing)
    for shape in ((0, 4, 4), (4, 4)):
        with pytest.raises(ShapeError): resample_to_shape(img, shape)
