"Pictures and reports: what the notebooks do not test beside the code, over all models and kinds of run."
import json
import re
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medseg_nb.core import DatasetError, MedsegError, ShapeError, set_seed
from medseg_nb.data.collections import load_collection, png_pairs_to_collection
from medseg_nb.data.phantoms import make_phantom
from medseg_nb.explain.codes_and_attention import (
    attention_map,
    attention_winners,
    code_map,
    code_usage,
    perplexity,
    token_at,
    token_centre,
)
from medseg_nb.explain.gradcam import METHODS, cam_score, find_layer, grad_cam
from medseg_nb.explain.report import command_of, rank_cases, score_run, shown_image, write_report
from medseg_nb.explain.viewer import best_plane, cut, draw_slice, make_scene, view_volume
from medseg_nb.models.zoo import build_model, list_models, list_settings, model_dims, takes_modalities
from medseg_nb.training.supervised import Recipe, load_run, train


@pytest.fixture(autouse=True)
def close_figures():
    import matplotlib
    matplotlib.use("Agg")
    yield
    import matplotlib.pyplot as plt
    plt.close("all")


# --- viewer -----------------------------------------------------------------------------------------------------------

@given(flips=st.tuples(*[st.sampled_from([-1, 1])]*3), order=st.permutations([0, 1, 2]))
@settings(max_examples=20, deadline=None)
def test_the_picture_does_not_depend_on_how_the_volume_is_stored(flips, order):
    rng = np.random.default_rng(0)
    canonical = nib.Nifti1Image(rng.normal(size=(5, 6, 7)), np.diag([1., 2., 3., 1.]))
    stored = canonical.as_reoriented(np.array([[o, f] for o, f in zip(order, flips, strict=True)]))
    a, b = make_scene(canonical), make_scene(stored)
    np.testing.assert_array_equal(a.volume, b.volume)
    np.testing.assert_allclose(a.spacing, b.spacing)


def test_radiological_sides():
    truth = np.zeros((20, 20, 4), np.uint8)
    truth[14:18, 8:12] = 1                                   # large x: the patient's right, in canonical orientation
    ax = draw_slice(nib.Nifti1Image(truth*1., np.eye(4)), nib.Nifti1Image(truth, np.eye(4)), plane="axial")
    left, right = ax.get_xlim()
    assert left > right                                      # x runs to the left of the page
    assert [t.get_text() for t in ax.texts] == ["R", "L", "A", "P"]
    assert not draw_slice(truth*1., truth, plane="axial").texts      # an array does not know its sides


def test_a_thin_volume_is_drawn_in_mm():
    ax = draw_slice(np.random.default_rng(0).normal(size=(10, 12, 3)), spacing=(1, 1, 8), plane="coronal", index=0)
    left, right, bottom, top = ax.images[0].get_extent()
    assert (abs(right-left), abs(top-bottom)) == (10, 24) and ax.get_aspect() == 1
    assert best_plane((1, 1, 8)) == "axial" and best_plane((8, 1, 1)) == "sagittal"


def test_every_control_changes_the_picture():
    rng = np.random.default_rng(0)
    volume, truth = rng.normal(size=(16, 18, 6)), np.zeros((16, 18, 6), int)
    truth[4:9, 5:12, 2:4], truth[10:13, 5:12, 2:4] = 1, 2
    view = view_volume(volume, truth, np.roll(truth, 2, 0), {0: "b", 1: "one", 2: "two"})
    for name, value in dict(index=3, style="fill", opacity=.9, truth=False, prediction=False, plane="coronal").items():
        before = view.picture.value
        view.controls[name].value = value
        assert view.picture.value != before, name
    with pytest.raises(ShapeError): view_volume(volume, truth[:5])
    with pytest.raises(ShapeError): cut(volume, "axial", -1)


# --- Grad-CAM ---------------------------------------------------------------------------------------------------------

class Pooled(nn.Module):
    "A network whose coarse feature is the image itself, pooled by 8: where the evidence is, is known."
    def __init__(self, dims):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.strides = (8,)
        self.pool, self.up = (nn.AvgPool2d, nn.AvgPool3d)[dims-2](8), nn.Upsample(scale_factor=8)
        self.weight = nn.Parameter(torch.ones(()))
    def forward(self, x):
        from medseg_nb.models.encoder_decoder import pad_to_multiple
        size = x.shape[2:]
        z = self.up(self.pool(pad_to_multiple(x, 8)))*self.weight
        z = z[(..., *[slice(s) for s in size])]
        return torch.cat([.5-z, z], 1)


@pytest.mark.parametrize("size", [(40, 40), (37, 51), (20, 33, 27)])
def test_the_map_lies_where_the_evidence_is(size):
    model, x = Pooled(len(size)), torch.zeros(1, 1, *size)
    block = tuple(slice(16, min(24, s)) for s in size)
    x[(0, 0, *block)] = 1
    for method in METHODS:
        cam = grad_cam(model, x, 1, "pool", method)
        assert cam.shape == size and cam.max() == 1
        peak = np.argwhere(cam > .99).mean(0)
        assert all(abs(p-min(19.5, s-1)) <= .51 for p, s in zip(peak, size, strict=True)), (method, peak)


UNREAD = {"r50-vit": ("encoder:0",), "deeplabv3plus-r50": ("encoder:0",)}   # features that their decoders do not read as a skip


@pytest.mark.parametrize("name", [n for n in list_models() if "encoder" in list_settings(n)])
def test_every_model_has_maps_at_every_part_and_stays_as_it_was(name):
    set_seed(0)
    model = build_model(name, 1, 3, size="teach", widths=(8, 16, 16), dim=16, codebook_size=8)
    x = torch.randn(1, 1, 36, 28)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    for layer in ("encoder", "encoder:0", "bottleneck", "decoder:0", "decoder", model.encoder.levels[1]):
        if layer in UNREAD.get(name, ()):
            with pytest.raises(ShapeError, match="does not depend"): grad_cam(model, x, 1, layer, mask=np.ones((36, 28)))
            continue
        cam = grad_cam(model, x, 1, layer, mask=np.ones((36, 28)))
        assert cam.shape == (36, 28) and 0 <= cam.min() and cam.max() <= 1 and np.isfinite(cam).all()
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


WHOLE = [n for n in list_models() if "encoder" not in list_settings(n)]


@pytest.mark.parametrize("name", WHOLE)
def test_networks_of_another_shape_have_maps_too(name):
    set_seed(0)
    sides = (34, 40, 20)[:model_dims(name)[0]]
    model = build_model(name, 1, 3, size="teach")
    model = model.network if takes_modalities(name) else model
    decoder = ("decoder",) if len(sides) == 2 else ()                                     # nnFormer's keeps its channels last
    for layer in ("encoder:0", "encoder", *decoder) if hasattr(model, "encoder") else ("bottleneck",):
        cam = grad_cam(model, torch.randn(1, 1, *sides), 1, layer, mask=np.ones(sides))
        assert cam.shape == sides and np.isfinite(cam).all()


@pytest.mark.parametrize("name", [n for n in list_models() if not takes_modalities(n)])
def test_every_model_has_the_layer_a_report_looks_at(name):
    assert find_layer(build_model(name, 1, 3, size="teach"), "bottleneck")[1] == -1


def test_three_dimensions_frozen_weights_and_bad_requests():
    set_seed(0)
    model = build_model("synergynet-8s2h", 1, 2, size="teach", spatial_dims=3, widths=(8, 16), dim=16, codebook_size=8)
    x = torch.randn(1, 1, 9, 12, 10)
    for p in model.parameters(): p.requires_grad_(False)
    assert grad_cam(model, x, 1, mask=np.ones((9, 12, 10))).shape == (9, 12, 10)
    for bad in (dict(class_id=5), dict(layer="nowhere"), dict(layer="encoder:9"), dict(method="x")):
        with pytest.raises(MedsegError): grad_cam(model, x, **{"class_id": 1, "mask": np.ones((9, 12, 10)), **bad})


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_score_is_a_weighted_mean_of_the_map(h, w, seed):
    rng = np.random.default_rng(seed)
    cam, mask = rng.random((h, w)), rng.random((h, w)) < .5
    inside, outside = cam_score(cam, mask)
    parts = [s*m.sum() for s, m in ((inside, mask), (outside, ~mask)) if m.any()]
    np.testing.assert_allclose(sum(parts), cam.sum())


# --- codes and attention ----------------------------------------------------------------------------------------------

@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 16), st.data())
@settings(max_examples=40, deadline=None)
def test_tokens_and_pixels(grid, stride, data):
    token = data.draw(st.integers(0, int(np.prod(grid))-1))
    assert token_at(token_centre(token, grid, stride), grid, stride) == token
    with pytest.raises(ShapeError): token_at([g*stride for g in grid], grid, stride)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_perplexity_counts_codes(counts):
    value, used = perplexity(counts), np.count_nonzero(counts)
    assert np.isnan(value) if used == 0 else 1-1e-9 <= value <= used+1e-9


def test_bottlenecks_are_read_in_two_and_three_dimensions():
    set_seed(0)
    for dims, size in ((2, (24, 20)), (3, (12, 8, 12))):
        small = dict(size="teach", widths=(8, 16), dim=16, codebook_size=8)
        model = build_model("synergynet-2s2h", 1, 2, spatial_dims=dims, **small)
        x = torch.randn(2, 1, *size)
        grid = tuple(-(-s//4) for s in size)
        assert code_map(model, x[:1]).shape == grid and code_map(model, x).shape == (2, *grid)
        assert code_usage(model, [x, x]).sum() == 4*np.prod(grid)
        weights = attention_map(model, x[:1], [s//2 for s in size])
        assert weights.shape == grid and abs(weights.sum()-1) < 1e-4
        winners, found = attention_winners(model, x[:1])
        assert found == grid and winners.shape == (2, np.prod(grid)) and winners.max() < np.prod(grid)


def test_models_without_codes_say_so():
    model, x = build_model("unet-r50", 1, 2, size="teach", widths=(4, 8)), torch.randn(1, 1, 8, 8)
    for look in (code_map, attention_winners, lambda model, x: attention_map(model, x, (1, 1))):
        with pytest.raises(ShapeError, match="synergynet"): look(model, x)


# --- report -----------------------------------------------------------------------------------------------------------

def small_run(folder, model="synergynet-8s2h", collection=None, **changes):
    "A run of one epoch on a few small cases."
    if collection is None:
        collection = load_collection(make_phantom("cardiac-mr", 5, 0, folder/"hearts", shape=(32, 32, 4)), check=False)
    dims = changes.get("dims", 2)
    recipe = Recipe.teach(**{**dict(epochs=1, batch_size=4), **changes})
    settings = {k: v for k, v in dict(widths=(8, 16), codebook_size=8, dim=16).items() if k in list_settings(model, "teach")} if model not in WHOLE else {}
    channels = len(collection.channels)*(2*recipe.neighbours+1)
    net = build_model(model, channels, len(collection.classes), size="teach", spatial_dims=dims, **settings)
    return train(net, collection, recipe, folder/"run")


@pytest.fixture(scope="module")
def run(tmp_path_factory): return small_run(tmp_path_factory.mktemp("report"))


def headings(page): return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_report_is_whole_and_self_contained(run):
    start = time.process_time()
    page = write_report(run.folder).read_text(encoding="utf-8")
    assert time.process_time()-start < 20
    assert headings(page)[-3:] == ["Codes", "Where the model looked", "How to do it again"] and "In three dimensions" in headings(page)
    assert not re.search(r'(src|href)="(?!data:|#|surfaces_)', page) and "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page and page.count("data:image/png;base64,") >= 5
    assert f"{score_run(run)['case'].nunique()} test cases" in page


def test_the_numbers_of_the_page_are_those_of_the_table(run):
    from medseg_nb.evaluation.cases import summarise
    page, mean = write_report(run).read_text(encoding="utf-8"), summarise(score_run(run)).loc["mean"]
    assert f"<b>{mean['DSC']:.3f}</b><span>mean Dice of the classes" in page


def test_a_resumed_run_is_measured_again(run):
    score_run(run)
    kept = (run.folder/"cases.csv").read_bytes()
    (run.folder/"cases.csv").write_bytes(kept.replace(b",", b",,", 1))           # damaged
    score_run(run)
    assert (run.folder/"cases.csv").read_bytes() == kept
    (run.folder/"model.safetensors").touch()
    stamp = (run.folder/"cases.csv").stat().st_mtime_ns
    score_run(run)
    assert (run.folder/"cases.csv").stat().st_mtime_ns > stamp and (run.folder/"cases.csv").read_bytes() == kept


def test_names_cannot_change_the_page(tmp_path):
    path = make_phantom("cardiac-mr", 5, 0, tmp_path/"hearts", shape=(32, 32, 4))
    info = json.loads((path/"dataset.json").read_text())
    info["labels"]["1"], info["name"] = "<script>alert(1)</script>", "a <i>name</i> & more"
    (path/"dataset.json").write_text(json.dumps(info))
    page = write_report(small_run(tmp_path, collection=load_collection(path, check=False))).read_text(encoding="utf-8")
    assert "<script" not in page and "<i>name" not in page and "&lt;script&gt;" in page


def test_a_unet_has_no_codes(tmp_path):
    page = write_report(small_run(tmp_path, "unet-r50")).read_text(encoding="utf-8")
    assert "Codes" not in headings(page) and "Where the model looked" in headings(page)


def test_neighbouring_slices_and_windows_have_reports_too(tmp_path):
    for i, changes in enumerate((dict(neighbours=1), dict(dims=3, patch=(16, 16, 4)))):
        (tmp_path/str(i)).mkdir()
        done = small_run(tmp_path/str(i), **changes)
        assert len(headings(write_report(done).read_text(encoding="utf-8"))) == 8
        assert "neighbours=1" in write_report(done).read_text() if i == 0 else "--dims 3" in command_of(done)


@pytest.mark.parametrize("model, changes", [("cmaformer", {}), ("unetr", dict(dims=3, patch=(16, 16, 4)))])
def test_networks_of_another_shape_have_reports_too(tmp_path, model, changes):
    assert headings(write_report(small_run(tmp_path, model, **changes)).read_text(encoding="utf-8"))[-2:] == ["Where the model looked", "How to do it again"]


def test_photographs_keep_their_colours_and_sides(tmp_path):
    from PIL import Image
    rng = np.random.default_rng(0)
    for name in ("images", "labels"): (tmp_path/name).mkdir()
    for i in range(5):
        photo, mask = rng.integers(0, 80, (32, 40, 3), dtype=np.uint8), np.zeros((32, 40), np.uint8)
        mask[5:15, 4:14] = 255                                # above the middle, on the left
        photo[mask > 0, 0] = 250                              # red
        Image.fromarray(photo).save(tmp_path/"images"/f"p{i}.png")
        Image.fromarray(mask).save(tmp_path/"labels"/f"p{i}.png")
    path = png_pairs_to_collection(tmp_path/"images", tmp_path/"labels", tmp_path/"set", "skin")
    collection = path if hasattr(path, "cases") else load_collection(path, check=False)
    picture = cut(shown_image(collection.cases[0], collection), "axial", 0)      # rows from below
    assert picture.shape == (32, 40, 3) and picture[::-1][10, 9, 0] == 250 and picture[::-1][25, 30, 0] < 80
    page = write_report(small_run(tmp_path, collection=collection)).read_text(encoding="utf-8")
    assert page.count("data:image/png") >= 3


def test_runs_that_are_not_whole(run, tmp_path):
    import shutil
    copy = tmp_path/"run"
    shutil.copytree(run.folder, copy)
    config = json.loads((copy/"config.json").read_text())
    config["collection"]["path"] = str(tmp_path/"gone")
    (copy/"config.json").write_text(json.dumps(config))
    with pytest.raises(DatasetError, match="collection"): write_report(copy)
    assert load_run(copy).collection is None
    (copy/"report.html").unlink(missing_ok=True)
    (copy/"model.safetensors").write_bytes(b"short")
    with pytest.raises(MedsegError, match="model.safetensors"): write_report(copy)
    assert not (copy/"report.html").exists()
    with pytest.raises(MedsegError): write_report(tmp_path/"nowhere")


def test_best_and_worst_never_share_a_case():
    import pandas as pd
    rng = np.random.default_rng(0)
    for n in range(1, 12):
        frame = pd.DataFrame({"case": [f"c{i}" for i in range(n)], "DSC": rng.random(n)})
        ranked = rank_cases(frame)
        ids = sum(ranked.values(), [])
        assert len(ids) == len(set(ids)) and ranked["best"][0] == frame.loc[frame["DSC"].idxmax(), "case"]
        if n > 1: assert ranked["worst"][0] == frame.loc[frame["DSC"].idxmin(), "case"]
