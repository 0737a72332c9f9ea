"""Metrics against medpy, MONAI and brute force; what they refuse; how fast they are."""
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medpy.metric import binary

from medseg_nb.core import GeometryError, LabelError, MedsegError, ShapeError
from medseg_nb.evaluation.metrics import assd, border_of, evaluate_case, hd95, surface_distances

COLUMNS = ["class", "DSC", "IoU", "SE", "SP", "ACC", "HD95", "ASSD"]


def blobs(shape, n, seed):
    "A label map of n boxes of random place and size, and a disturbed copy; classes may touch and hide each other."
    rng = np.random.default_rng(seed)
    pred, truth = np.zeros((2, *shape), np.uint8)
    for c in range(1, n+1):
        low = rng.integers(0, [max(s//2, 1) for s in shape])
        high = low + rng.integers(1, [max(s//2, 2) for s in shape])
        move = rng.integers(-2, 3, len(shape))
        truth[tuple(map(slice, low, high))] = c
        pred[tuple(map(slice, np.maximum(low+move, 0), np.maximum(high+move, 1)))] = c
    return pred, truth


def by_monai(pred, truth, spacing):
    "HD95 and ASSD of one mask pair."
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
    a, b = (torch.from_numpy(m[None, None].astype(np.float32)) for m in (pred, truth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hd = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing)
        asd = compute_average_surface_distance(a, b, include_background=True, symmetric=True, spacing=spacing)
    return hd.item(), asd.item()


@pytest.mark.parametrize("shape,spacing", [((40, 31), (0.7, 1.9)), ((24, 17, 9), (0.8, 1.3, 5.0)),
                                           ((6, 5, 1), (1, 1, 2))])
@pytest.mark.parametrize("seed", range(4))
def test_every_metric_equals_medpy_and_monai(shape, spacing, seed):
    pred, truth = blobs(shape, 4, seed)
    classes = {c: str(c) for c in range(5)}
    ours = evaluate_case(pred, truth, spacing, classes)
    monai = evaluate_case(pred, truth, spacing, classes, convention="monai")
    assert list(ours.columns) == COLUMNS and len(ours) == 4
    compared = 0
    for row, other in zip(ours.to_dict("records"), monai.to_dict("records"), strict=True):
        a, b = pred == int(row["class"]), truth == int(row["class"])
        assert row["ACC"] == pytest.approx((a == b).mean())
        assert row["SP"] == pytest.approx(binary.specificity(a, b))
        if not (a.any() and b.any()): continue
        compared += 1
        assert row["DSC"] == pytest.approx(binary.dc(a, b))
        assert row["IoU"] == pytest.approx(binary.jc(a, b))
        assert row["SE"] == pytest.approx(binary.sensitivity(a, b))
        assert row["HD95"] == pytest.approx(binary.hd95(a, b, spacing), abs=1e-4)
        assert row["ASSD"] == pytest.approx(binary.assd(a, b, spacing), abs=1e-4)
        assert (other["HD95"], other["ASSD"]) == pytest.approx(by_monai(a, b, spacing), abs=1e-4)
    assert compared


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 3), st.floats(0.05, 0.95))
def test_distances_equal_brute_force_on_noise(seed, ndim, density):
    rng = np.random.default_rng(seed)
    shape, spacing = tuple(rng.integers(1, 8, ndim)), rng.uniform(0.3, 4, ndim)
    pred, truth = rng.random((2, *shape)) < density
    p, t = (np.argwhere(border_of(m.astype(int)))*spacing for m in (pred, truth))
    there, back = surface_distances(pred, truth, spacing)
    assert (len(there), len(back)) == (len(p), len(t))
    if not len(p) or not len(t):
        assert np.isnan(there).all() and np.isnan(back).all() and np.isnan(hd95(pred, truth, spacing))
        return
    between = np.linalg.norm(p[:, None] - t[None], axis=-1)
    assert np.allclose(there, between.min(1)) and np.allclose(back, between.min(0))
    assert hd95(pred, truth, spacing) == pytest.approx(hd95(truth, pred, spacing))
    assert assd(pred, truth, spacing) == pytest.approx(np.r_[there, back].mean())


def test_border_is_what_erosion_leaves():
    from scipy.ndimage import binary_erosion
    labels, _ = blobs((20, 15, 9), 5, 0)
    expected = np.zeros_like(labels)
    for c in range(1, 6): expected[(labels == c) & ~binary_erosion(labels == c)] = c
    assert np.array_equal(border_of(labels), expected)


def test_the_two_conventions_on_a_false_blob():
    truth = np.zeros((40, 90), int)
    truth[10:30, 10:30] = 1
    pred = truth.copy()
    pred[19:21, 70:72] = 1
    assert hd95(pred, truth, (1, 1)) == 0
    assert hd95(pred, truth, (1, 1), "monai") == pytest.approx(2.05, abs=1e-4)
    assert max(surface_distances(pred, truth, (1, 1))[0]) == 42


def test_perfect_and_millimetres():
    truth = np.zeros((10, 10, 4), int)
    truth[2:6, 2:6, 1:3] = 1
    assert evaluate_case(truth, truth, (1, 1, 1), {1: "a"}).iloc[0, 1:].tolist() == [1, 1, 1, 1, 1, 0, 0]
    moved = np.roll(truth, 1, axis=2)
    assert hd95(moved, truth, (1, 1, 8)) == 8*hd95(moved, truth, (1, 1, 1)) == 8


@pytest.mark.parametrize("pred,truth,nan,transunet", [
    (0, 1, [0, 0, 0, np.nan, np.nan], [0, 0, 0, 0, 0]),                            # missed
    (1, 0, [0, 0, np.nan, np.nan, np.nan], [1, 1, np.nan, 0, 0]),                  # false alarm
    (0, 0, [np.nan]*5, [0, 0, np.nan, 0, 0])])                                     # absent from both
def test_absent_classes(pred, truth, nan, transunet):
    square = np.zeros((8, 8), int)
    square[2:5, 2:5] = 1
    columns = ["DSC", "IoU", "SE", "HD95", "ASSD"]
    for rule, expected in (("nan", nan), ("transunet", transunet)):
        row = evaluate_case(pred*square, truth*square, (1, 1), {0: "background", 1: "organ"}, empty=rule).iloc[0]
        assert row[columns].astype(float).tolist() == pytest.approx(expected, nan_ok=True)


def test_gaps_and_large_ids():
    truth = np.zeros((9, 9), np.int32)
    truth[1:4, 1:4], truth[5:8, 5:8] = 7, 420
    frame = evaluate_case(truth, truth, (1, 1), {420: "spleen", 0: "background", 7: "liver"})
    assert frame["class"].tolist() == ["liver", "spleen"] and frame["DSC"].tolist() == [1, 1]


SQUARE = np.eye(4, dtype=int)


@pytest.mark.parametrize("change,error,says", [
    ({"truth": SQUARE[:3]}, ShapeError, "differ in shape"),
    ({"pred": SQUARE[0], "truth": SQUARE[0], "spacing": (1,)}, ShapeError, "not an image"),
    ({"pred": SQUARE[:0], "truth": SQUARE[:0]}, ShapeError, "no side 0"),
    ({"spacing": (1, 1, 1)}, GeometryError, "2 positive numbers"),
    ({"spacing": (1, 0)}, GeometryError, "positive"),
    ({"spacing": (1, -2)}, GeometryError, "positive"),
    ({"spacing": (1, np.nan)}, GeometryError, "positive"),
    ({"pred": SQUARE*0.5}, LabelError, "integer labels"),
    ({"pred": SQUARE*2}, LabelError, r"prediction has labels that are no class; found \[2\]"),
    ({"truth": SQUARE*-1}, LabelError, r"truth has labels that are no class; found \[-1\]"),
    ({"classes": {0: "background"}}, LabelError, "above 0"),
    ({"classes": {-1: "a"}}, LabelError, "above 0"),
    ({"convention": "itk"}, MedsegError, "'medpy' or 'monai'"),
    ({"empty": "zero"}, MedsegError, "'nan' or 'transunet'")])
def test_refuses(change, error, says):
    given = {"pred": SQUARE, "truth": SQUARE, "spacing": (1, 1), "classes": {0: "background", 1: "a"}} | change
    with pytest.raises(error, match=says): evaluate_case(**given)


def test_much_faster_than_monai():
    "The full measure is in benchmarks/metrics.py; here a floor that holds on a busy machine."
    truth = np.zeros((128, 128, 64), np.uint8)
    for c in range(1, 8): truth[16*c-6:16*c+4, 30:70, 20:40] = c
    pred, ratios = np.roll(truth, (1, 2), (0, 1)), []
    for _ in range(3):
        start = time.perf_counter()
        evaluate_case(pred, truth, (1, 1, 2), {c: str(c) for c in range(8)})
        middle = time.perf_counter()
        for c in range(1, 8): by_monai(pred == c, truth == c, (1, 1, 2))
        ratios.append((time.perf_counter() - middle) / (middle - start))
    assert max(ratios) > 5
