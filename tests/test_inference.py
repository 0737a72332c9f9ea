"""Prediction over whole volumes, back on the grid they came from, and the tables made of it."""
import warnings

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from medseg_nb.core import CheckpointError, DatasetError, GeometryError, MedsegError, ShapeError
from medseg_nb.data.collections import Case, load_collection
from medseg_nb.data.phantoms import make_phantom
from medseg_nb.data.slices import Preparation
from medseg_nb.data.volumes import load_label, save_volume
from medseg_nb.evaluation.cases import (
    evaluate,
    plot_metrics,
    summarise,
    table_cells,
    table_to_latex,
    table_to_markdown,
    worst_cases,
)
from medseg_nb.evaluation.inference import evaluating, flip_average, predict_probabilities, predict_volume
from medseg_nb.evaluation.metrics import evaluate_case


class Threshold(nn.Module):
    "Class 1 where the first channel is above a level."
    def __init__(self, level):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(float(level)))

    def forward(self, x):
        return torch.stack([-8*(x[:, 0]-self.level), 8*(x[:, 0]-self.level)], dim=1)


def an_image(shape=(30, 24, 10), spacing=(1, 1, 3), seed=0):
    "Smooth noise, so that its outline survives resampling; random rotation, some axes mirrored."
    from scipy.ndimage import gaussian_filter
    rng = np.random.default_rng(seed)
    x = gaussian_filter(rng.normal(size=shape), 3/np.array(spacing)).astype(np.float32)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]*spacing
    affine[:3, 3] = rng.normal(0, 50, 3)
    return nib.Nifti1Image(x/x.std(), affine)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape,spacing", [((30, 24, 10), (1, 1, 3)), ((10, 33, 21), (4, 1, 1)),
                                           ((17, 1, 19), (1, 5, 1))])
@pytest.mark.parametrize("dims", [2, 3])
def test_exact_without_resampling_whatever_the_orientation(shape, spacing, seed, dims):
    image = an_image(shape, spacing, seed)
    preparation = Preparation("none", dims=dims, patch=(12, 12, 8) if dims == 3 else None)
    found = predict_volume(Threshold(0.5), image, preparation, classes=2)
    assert found.shape == image.shape and np.array_equal(found.affine, image.affine)
    assert found.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(found.dataobj), np.asarray(image.dataobj) > 0.5)


@pytest.mark.parametrize("preparation", [Preparation("none", inplane=20), Preparation("none", spacing=(1.5, 1.5, 2)),
                                         Preparation("none", spacing=(2, 2, 2), dims=3, patch=(16, 16, 16))])
def test_resampled_comes_back_on_the_exact_grid(preparation):
    image = an_image((40, 36, 12))
    found = predict_volume(Threshold(0.5), [image], preparation)
    assert found.shape == image.shape and np.array_equal(found.affine, image.affine)
    truth = (np.asarray(image.dataobj) > 0.5).astype(int)
    assert evaluate_case(np.asarray(found.dataobj), truth, (1, 1, 3), {1: "a"})["DSC"][0] > 0.85


def test_a_full_image_stays_full_to_its_edges():
    full = nib.Nifti1Image(np.full((96, 80, 20), 3, np.float32), np.diag([1, 1, 3, 1]))
    for change in ({"inplane": 32}, {"spacing": (3, 3, 8)}, {"spacing": (.7, .7, 2)}):
        preparation = Preparation("none", **change)
        assert np.asarray(predict_volume(Threshold(1), full, preparation).dataobj).all()


def test_windows_equal_the_whole_where_context_suffices():
    "A network that sees 1 voxel around: away from window edges every window says the same as the whole volume."
    torch.manual_seed(0)
    net = nn.Conv3d(2, 3, 3, padding=1)
    x = np.random.default_rng(0).normal(size=(2, 20, 20, 20)).astype(np.float32)
    whole = predict_probabilities(net, x, Preparation(dims=3))
    with torch.no_grad(): assert np.allclose(whole, net(torch.from_numpy(x)[None]).softmax(1)[0], atol=1e-5)
    windows = predict_probabilities(net, x, Preparation(dims=3, patch=(14, 14, 14)), overlap=0.5)
    assert np.allclose(windows[:, 1:6, 1:6, 1:6], whole[:, 1:6, 1:6, 1:6], atol=1e-5)
    assert np.allclose(windows.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_batches_and_devices_change_nothing(dims):
    torch.manual_seed(0)
    net = (nn.Conv2d, nn.Conv3d)[dims-2](1, 4, 3, padding=1)
    x = np.random.default_rng(0).normal(size=(1, 13, 14, 9)).astype(np.float32)
    preparation = Preparation(dims=dims, patch=(8, 8, 8) if dims == 3 else None)
    one = predict_probabilities(net, x, preparation, 4, batch=1)
    assert one.dtype == np.float32 and one.shape == (4, 13, 14, 9)
    assert np.allclose(one, predict_probabilities(net, x, preparation, 4, batch=5, device="cpu"), atol=1e-6)


def test_neighbours_as_in_training(tmp_path):
    "A network that only reads one channel shows which slice lies there; the data set must agree."
    from medseg_nb.data.slices import SliceDataset

    class Channel(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.c = c

        def forward(self, x): return torch.stack([-x[:, self.c], x[:, self.c]], 1)
    data = load_collection(make_phantom("cardiac-mr", 1, seed=0, path=tmp_path/"p", shape=(32, 32, 5)))
    preparation = Preparation("zscore", neighbours=1)
    slices = SliceDataset(data, preparation=preparation, cache=tmp_path/"cache")
    x = np.asarray(slices.prepared[0].open_image(), np.float32).transpose(1, 2, 3, 0)
    for c in range(3):
        p = predict_probabilities(Channel(c), x, preparation)
        for z in range(5):
            expected = torch.stack([-slices[z][0][c], slices[z][0][c]]).softmax(0)
            assert np.allclose(p[..., z], expected, atol=1e-5)


def test_flips_average_over_all_mirrored_copies():
    torch.manual_seed(0)
    net, x = nn.Conv2d(1, 2, 3, padding=1), torch.randn(1, 1, 6, 7)
    with torch.no_grad():
        expected = sum(net(x.flip(a)).softmax(1).flip(a) for a in ([], [2], [3], [2, 3]))/4
        assert torch.allclose(flip_average(net, x, (0, 1)), expected, atol=1e-6)


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout())
    net.train()
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    predict_volume(net, an_image(), Preparation())
    with pytest.raises(RuntimeError), evaluating(net): raise RuntimeError("in the middle")
    assert [m.training for m in net.modules()] == [True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.is_grad_enabled()


def test_large_answers_lie_on_disk():
    import medseg_nb.evaluation.inference as inference
    assert isinstance(inference._room((10, 600, 600, 100)), np.memmap)
    assert not isinstance(inference._room((2, 9, 9, 9)), np.memmap)


@pytest.mark.parametrize("call,error,says", [
    (lambda net, x: predict_probabilities(net, x[0], Preparation()), ShapeError, "not a prepared volume"),
    (lambda net, x: predict_probabilities(net, x[..., :0], Preparation()), ShapeError, "no side 0"),
    (lambda net, x: predict_probabilities(net, x, Preparation(), {0: "b", 1: "a", 2: "c"}), CheckpointError,
     "found 2; expected 3"),
    (lambda net, x: predict_probabilities(net, x, Preparation(dims=3), 7), CheckpointError, "found 2; expected 7"),
    (lambda net, x: predict_probabilities(net, x, Preparation(), flips=(2,)), ShapeError, "axes of 0 to 1"),
    (lambda net, x: predict_volume(net, [an_image(), an_image()], Preparation()), ShapeError, "found 2; expected 1"),
    (lambda net, x: predict_volume(net, "/nowhere/a.nii.gz", Preparation()), DatasetError, "nowhere"),
    (lambda net, x: predict_volume(net, an_image(), Preparation(), 5), CheckpointError, "found 2; expected 5")])
def test_refuses(call, error, says):
    net = Threshold(0)
    net.config = {"in_channels": 1}
    with pytest.raises(error, match=says): call(net, np.zeros((1, 8, 8, 4), np.float32))


# --- whole test sets ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")/"heart"
    return load_collection(make_phantom("cardiac-mr", 3, seed=1, path=folder, shape=(40, 40, 6)))


class Oracle(nn.Module):
    "Four classes by brightness; it need not be good, only the same everywhere."
    def forward(self, x):
        centre = torch.tensor([-.5, .5, 1., 2.]).view(4, *[1]*(x.ndim-2))
        return -(x[:, :1] - centre)**2


def test_evaluate_measures_what_is_saved(data, tmp_path):
    frame = evaluate(Oracle(), data, None, Preparation(), save=tmp_path/"masks")
    assert frame["case"].nunique() == 3 and len(frame) == 9 and frame["DSC"].between(0, 1).all()
    for case in data.cases:
        pred, truth = load_label(tmp_path/"masks"/f"{case.id}.nii.gz", data.classes), load_label(case.label)
        assert np.allclose(pred.affine, truth.affine)
        again = evaluate_case(*(np.asarray(i.dataobj) for i in (pred, truth)), truth.header.get_zooms(), data.classes)
        kept = frame[frame["case"] == case.id].drop(columns="case").reset_index(drop=True)
        pd.testing.assert_frame_equal(again, kept, check_exact=False, rtol=1e-5)


def test_evaluate_passes_its_options_on(data):
    medpy, monai = (evaluate(Oracle(), data, data.cases[:1], Preparation(), convention=c) for c in ("medpy", "monai"))
    assert (medpy["DSC"] == monai["DSC"]).all() and (medpy["HD95"] != monai["HD95"]).any()
    assert "MONAI" in table_to_markdown(monai) and "medpy" in table_to_markdown(medpy)


def test_one_slice_is_measured_as_a_plane(tmp_path, data):
    truth = np.zeros((20, 20, 1), np.uint8)
    truth[5:15, 5:15] = 1
    like = nib.Nifti1Image(truth, np.diag([0.5, 0.5, 9, 1]))
    save_volume(truth.astype(np.float32), like, tmp_path/"image.nii.gz")
    save_volume(np.roll(truth, 2, axis=0), like, tmp_path/"label.nii.gz")
    lesion = type(data)(tmp_path, "lesion", {0: "background", 1: "lesion"}, {0: "R"}, [])
    case = Case("a", (tmp_path/"image.nii.gz",), tmp_path/"label.nii.gz")
    row = evaluate(Threshold(0.5), lesion, [case], Preparation("none")).iloc[0]
    expected = evaluate_case(truth[..., 0], np.roll(truth, 2, axis=0)[..., 0], (0.5, 0.5), {1: "lesion"}).iloc[0]
    assert row[["DSC", "HD95", "ASSD"]].tolist() == pytest.approx(expected[["DSC", "HD95", "ASSD"]].tolist())


def test_evaluate_refuses(data, tmp_path):
    with pytest.raises(DatasetError, match="no cases"): evaluate(Oracle(), data, [], Preparation())
    bare = Case("bare", data.cases[0].images)
    with pytest.raises(DatasetError, match="bare"): evaluate(Oracle(), data, [bare], Preparation())
    label = load_label(data.cases[0].label)
    shifted = nib.Nifti1Image(np.asarray(label.dataobj), nib.affines.from_matvec(np.eye(3), [9, 0, 0]) @ label.affine)
    nib.save(shifted, tmp_path/"shifted.nii.gz")
    with pytest.raises(GeometryError, match="shifted.nii.gz"):
        evaluate(Oracle(), data, [Case("s", data.cases[0].images, tmp_path/"shifted.nii.gz")], Preparation())


NUMBERS = pd.DataFrame([("1", "liver", .9, 4.), ("1", "gall_bladder", .6, 8.), ("2", "liver", .8, 6.),
                        ("2", "gall_bladder", .4, 9.), ("3", "liver", .7, 5.), ("3", "gall_bladder", np.nan, np.nan)],
                       columns=["case", "class", "DSC", "HD95"])


def test_summary_counts_what_is_missing():
    table = summarise(NUMBERS)
    assert table.index.tolist() == ["liver", "gall_bladder", "mean"]
    assert table["DSC"].tolist() == pytest.approx([.8, .5, .65])
    assert table["DSC sd"].tolist() == pytest.approx([.1, np.std([.6, .4], ddof=1), np.std([.75, .6, .7], ddof=1)])
    assert table["HD95 nan"].tolist() == [0, 1, 1] and table["cases"].tolist() == [3, 3, 3]
    assert table_cells(NUMBERS)["DSC"].tolist() == ["0.800 ± 0.100", "0.500 ± 0.141 (1 nan)", "0.650 ± 0.076 (1 nan)"]
    alone = table_cells(NUMBERS[NUMBERS["case"] == "3"])
    assert alone["DSC"].tolist() == ["0.700", "– (1 nan)", "0.700 (1 nan)"]
    with pytest.raises(MedsegError, match="nothing"): summarise(NUMBERS[:0])


def test_tables_for_readme_and_paper():
    text = table_to_markdown(NUMBERS)
    assert "| liver | 0.800 ± 0.100 | 5.00 ± 1.00 |" in text and "HD95 (mm)" in text and "3 cases" in text
    tex = table_to_latex(NUMBERS)
    assert r"  gall\_bladder & 0.500 $\pm$ 0.141 (1 nan) & 8.50 $\pm$ 0.71 (1 nan) \\" in tex
    assert tex.count(r"\midrule") == 2 and tex.startswith(r"\begin{table}") and tex.rstrip().endswith(r"\end{table}")
    with pytest.raises(MedsegError, match="no such metric"): table_to_latex(NUMBERS, ["F1"])


def test_worst_cases_and_box_plot():
    assert worst_cases(NUMBERS, "DSC", 2)["case"].tolist() == ["2", "3"]
    assert worst_cases(NUMBERS, "HD95", 1)["case"].tolist() == ["2"]
    lost = pd.concat([NUMBERS, pd.DataFrame([("4", "liver", np.nan, np.nan)], columns=NUMBERS.columns)])
    assert worst_cases(lost, "HD95", 1)["case"].tolist() == ["4"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = plot_metrics(NUMBERS)
    assert [a.get_title() for a in fig.axes] == ["DSC", "HD95"]
    assert "(1 nan)" in fig.axes[0].get_xticklabels()[1].get_text()
