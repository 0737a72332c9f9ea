"Lesions found and invented: against loops, scikit-image and MONAI, under changes that must not matter, and for input that must be refused."

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.froc import compute_fp_tp_probs_nd
from scipy.ndimage import gaussian_filter
from skimage.measure import label, regionprops

from medseg_nb.core import DatasetError, GeometryError, LabelError, MedsegError, ShapeError
from medseg_nb.data.collections import Case, Collection
from medseg_nb.evaluation import LesionDetection, evaluate_lesions, lesion_detection, summarise_lesions
from medseg_nb.evaluation.lesions import components


def blobs(seed, shape, share):
    hills = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 0.9)
    return (hills > np.quantile(hills, 1 - share)).astype(np.uint8)


def slowly(pred, truth, overlap, measure, min_size, connectivity):
    "Loops over components as sets of voxels."
    sets = lambda m: [{tuple(v) for v in r.coords} for r in regionprops(label(m, connectivity=connectivity))]
    lesions, guesses = sets(truth), [g for g in sets(pred) if len(g) >= min_size]
    found = 0
    for lesion in (asked := [x for x in lesions if len(x) >= min_size]):
        near = set().union(*(g for g in guesses if g & lesion))
        found += len(near & lesion) / len(lesion | (near if measure == "iou" else set())) >= overlap
    return len(asked), found, sum(not any(g & x for x in lesions) for g in guesses)


SHAPES = st.sampled_from([(9, 11), (24, 16), (7, 6, 5), (12, 9, 1)])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9999), SHAPES, st.sampled_from([0.02, 0.1, 0.3]), st.sampled_from([0.0, 0.1, 0.4]), st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    st.sampled_from(["cover", "iou"]), st.sampled_from([0, 1, 2, 5.5]), st.sampled_from([None, 1, 2]),
)
def test_same_as_loops(seed, shape, p, t, overlap, measure, min_size, connectivity):
    pred, truth = blobs(seed, shape, p), blobs(seed + 1, shape, t)
    ours = lesion_detection(pred, truth, overlap=overlap, measure=measure, min_size=min_size, connectivity=connectivity)
    assert ours == slowly(pred, truth, overlap, measure, min_size, connectivity)
    assert all(type(n) is int for n in ours)
    assert ours.sensitivity == ours.found / ours.lesions if ours.lesions else np.isnan(ours.sensitivity)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), SHAPES)
def test_same_as_monai_where_a_voxel_finds_a_lesion(seed, shape):
    pred, truth = blobs(seed, shape, 0.15), blobs(seed + 1, shape, 0.15)
    lesions, points = label(truth), np.argwhere(pred)
    _, hit, n = compute_fp_tp_probs_nd(np.ones(len(points)), points, lesions)
    best = np.stack([max(r.coords, key=lambda v: lesions[tuple(v)]) for r in regionprops(label(pred))])
    invented, _, _ = compute_fp_tp_probs_nd(np.ones(len(best)), best, lesions)
    assert lesion_detection(pred, truth, overlap=1e-9) == (n, hit.sum(), len(invented))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), SHAPES, st.sampled_from(["cover", "iou"]))
def test_what_must_hold(seed, shape, measure):
    pred, truth = blobs(seed, shape, 0.15), blobs(seed + 1, shape, 0.1)
    n = components(truth).max()
    assert lesion_detection(truth, truth, overlap=1.0, measure=measure) == (n, n, 0)
    assert lesion_detection(0 * pred, truth, measure=measure) == (n, 0, 0)
    assert lesion_detection(pred, 0 * truth, measure=measure) == (0, 0, components(pred).max())
    found = [lesion_detection(pred, truth, overlap=o, measure=measure).found for o in (0.01, 0.2, 0.5, 1.0)]
    assert found == sorted(found, reverse=True)
    ours = lesion_detection(pred, truth, measure=measure)
    for turn in (lambda x: x.T, lambda x: x[::-1], lambda x: np.pad(x, 2), lambda x: 7 * x):  # neither axes, borders nor the id matter
        assert lesion_detection(turn(pred), turn(truth), turn(np.uint8(1)) if turn(truth).max() == 7 else 1, measure=measure) == ours
    assert lesion_detection(3 * pred, 3 * truth, class_id=3, measure=measure) == ours
    assert lesion_detection(pred + 1, truth + 1, class_id=2, measure=measure) == ours


def test_sizes_are_in_millimetres():
    truth = np.zeros((12, 12, 6), np.uint8)
    truth[1:3, 1:3, 1:3] = truth[8, 8, 2:5] = 1  # 8 and 3 voxels
    spacing = (0.5, 0.5, 4.0)  # 1 mm³ a voxel
    counts = [lesion_detection(truth, truth, 1, spacing, min_size=m).lesions for m in (0, 3, 3.01, 8, 8.01)]
    assert counts == [2, 2, 1, 1, 0]
    pred = truth.copy()
    pred[8, 8, 4] = 0  # 2 of 3 voxels of a lesion too small to be asked for, and its guess is deleted
    assert lesion_detection(pred, truth, 1, spacing, min_size=3) == (2, 1, 0)
    pred[6:11, 8, 2] = 1  # a guess of 6 on the small lesion: not asked for, not invented either
    assert lesion_detection(pred, truth, 1, spacing, min_size=5) == (1, 1, 0)


def test_one_guess_over_everything_is_found_out_by_iou():
    truth = np.zeros((20, 20), np.uint8)
    truth[2:4, 2:4] = truth[15:18, 15:18] = 1
    assert lesion_detection(np.ones_like(truth), truth) == (2, 2, 0)
    assert lesion_detection(np.ones_like(truth), truth, measure="iou", overlap=0.5) == (2, 0, 0)


@pytest.mark.parametrize("rule, error, said", [
    (dict(overlap=0), MedsegError, "above 0"), (dict(overlap=1.01), MedsegError, "at most 1"), (dict(overlap="half"), MedsegError, "overlap"),
    (dict(overlap=float("nan")), MedsegError, "overlap"), (dict(measure="dice"), MedsegError, "'cover' or 'iou'"),
    (dict(min_size=-1), MedsegError, "mm³"), (dict(min_size=float("inf")), MedsegError, "mm³"), (dict(min_size=None), MedsegError, "mm³"),
    (dict(connectivity=0), MedsegError, "faces"), (dict(connectivity=4), MedsegError, "faces"), (dict(connectivity=1.5), MedsegError, "faces"),
    (dict(connectivity=True), MedsegError, "faces"), (dict(class_id=0), LabelError, "1 or more"), (dict(class_id="tumour"), LabelError, "1 or more"),
    (dict(spacing=(1, 1)), GeometryError, "spacing"), (dict(spacing=(1, 1, 0)), GeometryError, "spacing")])
def test_rules_that_cannot_be_used(rule, error, said):
    x = np.zeros((4, 4, 4), np.uint8)
    with pytest.raises(error, match=said): lesion_detection(x, x, **rule)


def test_maps_that_cannot_be_compared():
    x = np.zeros((4, 4), np.uint8)
    with pytest.raises(ShapeError, match="differ in shape"): lesion_detection(x, x[:3])
    with pytest.raises(LabelError, match="integer"): lesion_detection(x.astype(float), x)
    with pytest.raises(ShapeError, match="not an image"): lesion_detection(x[0], x[0])
    assert lesion_detection(x.astype(bool), x) == (0, 0, 0)


@pytest.fixture
def folder(tmp_path):
    "Two cases with labels, and their masks: one lesion of two found; nothing to find and one invention."
    affine, truth, pred = np.diag([1.0, 1, 2, 1]), np.zeros((2, 8, 8, 4), np.uint8), np.zeros((2, 8, 8, 4), np.uint8)
    truth[:, :5], pred[:, :5] = 1, 1
    truth[0, 1, 1, 1] = truth[0, 4, 4:6, 1] = pred[0, 4, 4:7, 1] = pred[1, 2, 2, 2] = 2
    cases = []
    for i in range(2):
        for part, x in (("labels", truth), ("masks", pred)):
            (tmp_path / part).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(x[i], affine), tmp_path / part / f"c{i}.nii.gz")
        cases.append(Case(f"c{i}", (), tmp_path / "labels" / f"c{i}.nii.gz"))
    return tmp_path / "masks", Collection(tmp_path, "x", {0: "background", 1: "liver", 2: "tumour"}, {0: "CT"}, cases)


def test_a_folder_of_masks(folder):
    masks, collection = folder
    frame = evaluate_lesions(masks, collection, class_id=2)
    assert list(frame.columns) == ["case", "lesions", "found", "false_positives", "sensitivity"]
    assert frame["case"].tolist() == ["c0", "c1"] and frame[["lesions", "found", "false_positives"]].values.tolist() == [[2, 1, 0], [0, 0, 1]]
    assert frame["sensitivity"][0] == 0.5 and np.isnan(frame["sensitivity"][1])
    total = summarise_lesions(frame).iloc[0].to_dict()
    assert total == {"cases": 2, "lesions": 2, "found": 1, "sensitivity": 0.5, "false_positives": 0.5}
    assert np.isnan(summarise_lesions(frame.iloc[1:])["sensitivity"][0])
    large = evaluate_lesions(masks, collection, collection.cases[:1], 2, min_size=4)  # two voxels of 2 mm³
    assert large["lesions"].tolist() == [1] and large.attrs == {"class": "tumour", "overlap": 0.1, "measure": "cover", "min_size": 4, "connectivity": None}


def test_a_folder_that_does_not_fit(folder):
    masks, collection = folder
    with pytest.raises(LabelError, match="1: 'liver', 2: 'tumour'"): evaluate_lesions(masks, collection, class_id=3)
    with pytest.raises(DatasetError, match="no cases"): evaluate_lesions(masks, collection, [], 2)
    with pytest.raises(DatasetError, match="without a label"): evaluate_lesions(masks, collection, [Case("c0", ())], 2)
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 4), np.uint8), np.diag([2.0, 1, 2, 1])), masks / "c0.nii.gz")
    with pytest.raises(GeometryError, match="c0.nii.gz.*another grid"): evaluate_lesions(masks, collection, class_id=2)
    (masks / "c0.nii.gz").unlink()
    with pytest.raises(DatasetError, match="c0.nii.gz"): evaluate_lesions(masks, collection, class_id=2)
    with pytest.raises(MedsegError, match="nothing to summarise"): summarise_lesions(evaluate_lesions(masks, collection, collection.cases[1:], 2).iloc[:0])


def test_totals_add_up():
    parts = [LesionDetection(3, 2, 1), LesionDetection(0, 0, 4)]
    assert LesionDetection(*np.sum(parts, axis=0)).sensitivity == 2 / 3
