"Surfaces in mm: closed and turned outwards for any mask and affine, the budget kept, distances right, files whole and small, bad input refused."
import base64
import gzip
import json
import re
import time

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.cli import main
from medseg_nb.core import DatasetError, GeometryError, LabelError, MedsegError, ShapeError
from medseg_nb.explain.surfaces import (
    INVENTED,
    MISSED,
    distance_to_surface,
    draw_surfaces,
    extract_surface,
    make_surfaces,
    render_surfaces,
    share_triangles,
    simplify_surface,
    smooth_surface,
    surface_mesh,
    surfaces_figure,
)


def ball(radius, spacing=(1, 1, 1)):
    "(X,Y,Z) bool in a box that just holds it."
    half = [int(radius/s)+2 for s in spacing]
    grid = np.stack(np.meshgrid(*[np.arange(-h, h+1)*s for h, s in zip(half, spacing, strict=True)], indexing="ij"), -1)
    return (grid**2).sum(-1) < radius**2


def organs(n=8, shape=(128, 128, 64)):
    "n bent ellipsoids on a circle: (X,Y,Z) uint8."
    rng, labels = np.random.default_rng(0), np.zeros(shape, np.uint8)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, k) for k in shape], indexing="ij"), -1)
    for c in range(1, n+1):
        middle = [.55*np.cos(2*np.pi*c/n), .55*np.sin(2*np.pi*c/n), rng.uniform(-.3, .3)]
        labels[(((grid-middle+.05*np.sin(grid @ rng.uniform(-9, 9, (3, 3))))/rng.uniform(.2, .32, 3))**2).sum(-1) < 1] = c
    return labels


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    "Eight organs, the files of their picture with a prediction shifted by two voxels, and the seconds of processor time they took."
    truth, out = np.repeat(np.repeat(organs(8, (128, 128, 100)), 2, 0), 2, 1), tmp_path_factory.mktemp("surfaces")/"eight.html"
    pred, start = np.roll(truth, 2, 0), time.process_time()
    render_surfaces(pred, truth, affine=np.diag([.8, .8, 3., 1.]), out=out, title="a <b>title</b>")
    return truth, out, time.process_time()-start


def packed(page, part): return gzip.decompress(base64.b64decode(re.search(rf'id="{part}">([^<]*)<', page)[1])).decode()


# --- geometry ---------------------------------------------------------------------------------------------------------

@given(seed=st.integers(0, 10**6), share=st.floats(.02, .98), turn=st.integers(0, 10**6), mirror=st.sampled_from([-1, 1]))
@settings(max_examples=25, deadline=None)
def test_any_mask_and_affine_gives_a_closed_surface_turned_outwards(seed, share, turn, mirror):
    mask = np.random.default_rng(seed).random((6, 5, 4)) < share
    mask[2, 2, 2] = True
    rng, affine = np.random.default_rng(turn), np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ np.diag([mirror*.7, 1.1, 4.])
    affine[:3, 3] = rng.normal(size=3)*100
    surface, plain = extract_surface(mask, affine), extract_surface(mask, np.eye(3).diagonal())
    assert surface.is_closed() and surface.volume > 0
    np.testing.assert_allclose(surface.volume, plain.volume*.7*1.1*4, rtol=1e-5)
    assert smooth_surface(surface).is_closed()


@pytest.mark.parametrize("spacing", [(1, 1, 1), (.8, .8, 3), (3, .7, 1)])
def test_a_ball_has_its_volume_and_nearly_its_area(spacing):
    r, surface = 20, surface_mesh(ball(20, spacing), spacing)
    assert surface.volume == pytest.approx(4/3*np.pi*r**3, rel=.01) and surface.area == pytest.approx(4*np.pi*r**2, rel=.1)
    assert surface.euler == 2 and surface.is_closed()


def test_an_organ_at_the_border_is_closed_there():
    surface = surface_mesh(np.ones((5, 6, 7), bool))
    assert surface.is_closed() and surface.euler == 2 and surface.volume == pytest.approx(210, rel=.1)
    np.testing.assert_allclose(extract_surface(np.ones((5, 6, 7)), None).vertices.max(0), [4.5, 5.5, 6.5])


def test_smoothing_is_the_same_in_voxels_and_in_mm_and_keeps_small_pieces():
    spacing, surface = np.array([.8, .9, 3.]), extract_surface(ball(7), None)
    inside, outside = smooth_surface(surface).vertices*spacing, smooth_surface(extract_surface(ball(7), spacing)).vertices
    np.testing.assert_allclose(inside, outside, atol=1e-4)
    two = np.pad(ball(7), 4)
    two[1, 1, 1] = True
    assert smooth_surface(extract_surface(two, None)).vertices.min() == pytest.approx(.5) and surface_mesh(two).euler == 4


@given(triangles=st.integers(150, 6000))
@settings(max_examples=15, deadline=None)
def test_the_budget_is_kept_and_so_is_the_volume(triangles):
    full = surface_mesh(ball(15, (1, 1, 2)), (1, 1, 2))
    light = simplify_surface(full, triangles)
    assert len(light.faces) <= triangles and light.is_closed()
    assert light.volume == pytest.approx(full.volume, rel=6/triangles)


@given(areas=st.lists(st.floats(.01, 1e6), min_size=1, max_size=30), triangles=st.integers(3000, 100_000))
@settings(max_examples=50, deadline=None)
def test_shares_never_exceed_the_whole(areas, triangles):
    shares = share_triangles(areas, triangles)
    assert sum(shares) <= triangles and min(shares) >= 100 and shares[int(np.argmax(areas))] == max(shares)


def test_distances_have_the_right_size_and_sign():
    truth, rng = surface_mesh(np.pad(ball(6), 3)), np.random.default_rng(0)
    points = truth.vertices.mean(0) + rng.normal(size=(100, 3))*4
    found, exact = distance_to_surface(points, truth), distance_to_surface(points, truth, nearest=len(truth.faces))
    np.testing.assert_allclose(found, exact, atol=.1)
    np.testing.assert_allclose(exact, np.linalg.norm(points-truth.vertices.mean(0), axis=1)-6, atol=.8)
    assert np.abs(distance_to_surface(truth.vertices, truth)).max() < 1e-6
    box = extract_surface(np.ones((4, 4, 4)), None)                     # its corners are the hard case for the sign
    corner = np.array([[5., 5, 5], [-3, 4, 9], [1.5, 1.5, 1.5]])
    assert (np.sign(distance_to_surface(corner, box)) == [1, 1, -1]).all()


# --- pictures and files -----------------------------------------------------------------------------------------------

def test_eight_organs_fit_in_5_mb_and_need_no_network(eight):
    _, out, _ = eight
    page, picture = out.read_text(encoding="utf-8"), out.with_suffix(".png").read_bytes()
    assert out.stat().st_size < 5e6 and picture.startswith(b"\x89PNG") and len(picture) < 1e6
    assert not re.search(r'(src|href)="(?!data:)', page) and "://" not in page
    assert "<b>title" not in page and "&lt;b&gt;title" in page
    figure = json.loads(packed(page, "figure"))
    assert len(figure["data"]) == 24 and packed(page, "library").count("Mesh3d") + packed(page, "library").count("mesh3d") > 0
    triangles = sum(len(base64.b64decode(t["i"]["bdata"]))//int(t["i"]["dtype"][1]) for t in figure["data"][:16])
    assert 50_000 < triangles <= 60_000
    assert sorted(p.name for p in out.parent.iterdir()) == ["eight.html", "eight.png"]


def test_a_volume_of_256_256_100_takes_less_than_10_s(eight):
    assert eight[0].shape == (256, 256, 100) and eight[2] < 10


def test_legend_panels_and_scale():
    truth = organs(8, (48, 48, 24))
    scene = make_surfaces(np.roll(truth, 2, 0), truth, {2: "liver", 5: "spleen"}, (2, 2, 3), triangles=4000, clip=3)
    figure = surfaces_figure(scene)
    assert [t.name for t in figure.data if t.showlegend] == ["liver", "spleen"] and list(scene.panels()) == ["truth", "prediction", "difference"]
    assert {t.scene for t in figure.data} == {"scene", "scene2", "scene3"} and figure.layout.coloraxis.cmax == 3
    assert figure.layout.scene.camera == figure.layout.scene3.camera and figure.layout.scene.camera.eye.y > 0 and figure.layout.scene.camera.up.z == 1
    sizes = [np.ptp(figure.layout.scene[f"{a}axis"].range)/figure.layout.scene.aspectratio[a] for a in "xyz"]
    np.testing.assert_allclose(sizes, sizes[0])                         # a mm is a mm along every axis
    assert not scene.oriented and make_surfaces(nib.Nifti1Image(truth, np.eye(4))).oriented


def test_shifted_prediction_is_red_on_one_side_and_blue_on_the_other():
    truth = np.pad(ball(12), 6)
    scene = make_surfaces(np.roll(truth, 3, 0), truth, triangles=4000)
    layer = scene.layers[-1]
    x = layer.surface.vertices[:, 0] - layer.surface.vertices[:, 0].mean()
    assert layer.distance[x > 10].mean() == pytest.approx(3, abs=.5) and layer.distance[x < -10].mean() == pytest.approx(-3, abs=.5)


def test_a_false_blob_far_away_does_not_fade_the_rest():
    truth = np.pad(ball(5), ((3, 60), (3, 3), (3, 3)))
    pred = truth.copy()
    pred[60:68, 4:12, 4:12] = True
    scene = make_surfaces(pred, truth, triangles=4000)
    assert scene.clip == 10 and scene.layers[-1].distance.max() > 40


def test_missed_and_invented_classes_are_shown():
    truth, pred = np.zeros((2, 30, 20, 20), np.uint8)
    truth[3:9, 3:9, 3:9], pred[3:9, 3:9, 3:9], truth[12:18, 3:9, 3:9], pred[20:26, 3:9, 3:9] = 1, 1, 2, 3
    scene = make_surfaces(pred, truth)
    colours = {l.name: l.colour for l in scene.panels()["difference"] if l.distance is None}
    assert colours == {"class 2": MISSED, "class 3": INVENTED} and len(scene.notes()) == 2
    only = make_surfaces(np.zeros_like(truth), truth)                   # nothing predicted at all
    assert list(only.panels()) == ["truth", "difference"] and not any(l.distance is not None for l in only.layers)
    for s in (scene, only): draw_surfaces(s, width=1.5)


def test_a_single_volume_has_three_views():
    figure = draw_surfaces(make_surfaces(truth=organs(2, (40, 40, 20))), width=1.5)
    assert [ax.get_title().split(", ")[1] for ax in figure.axes] == ["from the front", "from the left", "from below"]


def test_how_a_volume_is_stored_does_not_matter():
    labels = organs(3, (40, 36, 20))
    image = nib.Nifti1Image(labels, np.diag([1., 2, 3, 1]))
    turned = image.as_reoriented(np.array([[1, -1], [0, 1], [2, -1]]))
    a, b = make_surfaces(image, triangles=100_000), make_surfaces(turned, triangles=100_000)
    for one, other in zip(a.layers, b.layers, strict=True):
        assert one.surface.volume == pytest.approx(other.surface.volume, rel=1e-3)
        np.testing.assert_allclose(one.surface.vertices.max(0), other.surface.vertices.max(0), atol=.15)   # the table of cases has no mirror


# --- bad input --------------------------------------------------------------------------------------------------------

BLOCK = np.pad(np.ones((4, 4, 4), np.uint8), 2)
SHIFTED = np.array([[1., 0, 0, 30], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def _name(value):
    "What a case is called: the same in every process."
    if isinstance(value, dict): return ",".join(value)
    return value if isinstance(value, str) else value.__name__


@pytest.mark.parametrize("error, words, given", [
    (ShapeError, "no volume", dict(pred=BLOCK[0])), (ShapeError, "no volume", dict(pred=BLOCK[:, :, :1])), (ShapeError, "no volume", dict(truth=BLOCK[None])),
    (ShapeError, "differ in shape", dict(pred=BLOCK, truth=BLOCK[1:])), (LabelError, "no label map", dict(pred=BLOCK/2)),
    (LabelError, "no label map", dict(pred=BLOCK.astype(int)-1)),
    (LabelError, "nothing to draw", dict(pred=BLOCK*0, truth=BLOCK*0)), (LabelError, "nothing to draw", dict(pred=BLOCK, classes={7: "liver"})),
    (GeometryError, "affine", dict(pred=BLOCK, affine=np.zeros((4, 4)))), (GeometryError, "affine", dict(pred=BLOCK, affine=(1, 1))),
    (GeometryError, "affine", dict(pred=BLOCK, affine=(1, 1, np.nan))), (GeometryError, "affine", dict(pred=BLOCK, affine=(1, 1, 0))),
    (GeometryError, "different places", dict(pred=nib.Nifti1Image(BLOCK, np.eye(4)), truth=nib.Nifti1Image(BLOCK, SHIFTED))),
    (MedsegError, "too few triangles", dict(pred=BLOCK, triangles=99)), (MedsegError, "too few triangles", dict(pred=BLOCK, triangles=1e4)),
    (MedsegError, "nothing to draw", {}), (MedsegError, "clip", dict(pred=BLOCK, truth=BLOCK, clip=0)), (MedsegError, "smoothing", dict(pred=BLOCK, smooth=-1)),
    (DatasetError, "does not exist", dict(pred="no/such.nii.gz"))], ids=_name)
def test_bad_input_is_refused_and_nothing_is_written(error, words, given, tmp_path):
    with pytest.raises(error, match=words): render_surfaces(**given, out=tmp_path/"out.html")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(MedsegError, match="ending in .html"): render_surfaces(BLOCK, out=tmp_path/"a.png")
    (tmp_path/"file").write_text("")
    with pytest.raises(DatasetError, match="cannot be written"): render_surfaces(BLOCK, out=tmp_path/"file"/"a.html")
    (tmp_path/"b.html").mkdir()                                         # the page cannot take its place: no picture without it
    with pytest.raises(DatasetError, match="cannot be written"): render_surfaces(BLOCK, out=tmp_path/"b.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.html", "file"]


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = nib.Nifti1Image(organs(2, (40, 40, 20)), np.diag([1., 1, 2, 1]))
    nib.save(image, "a.nii.gz")
    assert main(["surfaces", "a.nii.gz", "--truth", "a.nii.gz", "--triangles", "2000", "--out", "p.html"]) == 0
    assert "p.png" in capsys.readouterr().out and (tmp_path/"p.html").exists() and (tmp_path/"p.png").exists()
    assert main(["surfaces", "a.nii.gz", "--truth", "gone.nii.gz", "--out", "q.html"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path/"q.html").exists()
