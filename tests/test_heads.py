"Heads: real label maps and drawn ones, different people in CT and MR, contrasts from their ranges, faults said."

import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from medseg_nb.core import DatasetError, LabelError, find_collection
from medseg_nb.data import heads
from medseg_nb.data.collections import load_collection, split_cases, subject_of
from medseg_nb.data.heads import CONTRASTS, HEAD, HEAD_CT, HEAD_MR, STRUCTURES, folded, head_maps, head_numbers, paint_head, sample_map
from medseg_nb.data.phantoms import TISSUES, case_id, draw_case, ellipsoid, make_phantom

SMALL = (24, 24, 8)
NESTED = (511, 515, 24, 3, 2, 10, 4)  # from the skin inwards, each 3 voxels thick at 4 mm


def write_head(path, seed=0, strange=None, affine=None):
    "A map of nested cubes with a hindbrain, as FreeSurfer numbers them; every seed another size."
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = np.zeros((48, 50, 46), np.int16)
    for depth, structure in enumerate(NESTED):
        cut = 3 * depth + 1 + (seed % 3 if depth else 0)
        volume[cut:-cut, cut:-cut, cut:-cut] = structure
    volume[18:30, 12:20, 12:20], volume[20:28, 24:30, 12:18] = 8, 16
    if strange: volume[20, 20, 20] = strange
    nib.save(nib.Nifti1Image(volume, np.diag([4.0, 4, 4, 1]) if affine is None else affine), path)
    return path


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.delenv("MEDSEG_DATA", raising=False)


@pytest.fixture
def maps(tmp_path, monkeypatch):
    "MEDSEG_DATA with five small label maps: three people for CT, two for MR."
    for i in range(5): write_head(tmp_path / "data" / "head_labels" / f"training_seg_{i:02d}.nii.gz", i)
    monkeypatch.setenv("MEDSEG_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "head_labels"


def arrays(kind, index, seed=0, shape=SMALL):
    return tuple(np.asarray(part.dataobj) for part in draw_case(kind, index, seed, shape))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), shape=st.tuples(*[st.integers(1, 6)] * 3))
def test_sample_map_is_the_nearest_voxel(seed, shape):
    rng = np.random.default_rng(seed)
    volume, index = rng.integers(1, 600, shape), rng.uniform(-2, 7, (3, 40))
    found = sample_map(volume, index)
    size = np.array(shape)[:, None]
    inside = ((index > -0.5) & (index < size - 0.5)).all(0)
    assert (found[inside] == map_coordinates(volume, index, order=0, mode="nearest")[inside]).all()
    assert (found[~inside] == 0).all()


def test_every_tissue_has_a_range_in_both_contrasts():
    painted = {tissue for tissue, _ in STRUCTURES.values()}
    assert painted <= set(HEAD_CT) == set(HEAD_MR) <= set(TISSUES)
    assert all(low <= high for ranges in (HEAD_CT, HEAD_MR) for low, high in ranges.values())
    assert {c for _, c in STRUCTURES.values()} == set(range(len(HEAD) + 1))
    drawn = head_numbers(np.random.default_rng(3), HEAD_CT)
    assert all(HEAD_CT[t][0] <= v <= HEAD_CT[t][1] for t, v in drawn.items())


def test_folds_stay_in_their_box_and_vanish_at_depth_0():
    points = np.random.default_rng(0).uniform(-40, 40, (3, 5000)).astype(np.float32)
    flat = folded(np.random.default_rng(1), (3, 0, 0), (20, 24, 18), 0)
    assert (flat.inside(points) == ellipsoid((3, 0, 0), (20, 24, 18)).inside(points)).all()
    wavy = folded(np.random.default_rng(1), (3, 0, 0), (20, 24, 18), 0.3)
    held = wavy.inside(points)
    assert held.any() and (held != flat.inside(points)).any()
    assert (np.abs(points[:, held] - wavy.centre[:, None]) <= wavy.reach[:, None]).all()


@pytest.mark.parametrize("kind", ["head-ct", "head-mr"])
def test_drawn_heads_have_anatomy(kind, no_data):
    image, label = draw_case(kind, 1, 4, (48, 48, 16))
    voxels, spacing = np.asarray(label.dataobj), np.array(label.header.get_zooms())
    middle = {n: nib.affines.apply_affine(label.affine, np.argwhere(voxels == i)).mean(0) for i, n in enumerate(HEAD, 1)}
    litres = {n: (voxels == i).sum() * spacing.prod() / 1e6 for i, n in enumerate(HEAD, 1)}
    assert all(abs(m[0]) < 10 for m in middle.values())  # left and right together
    assert middle["cerebellum"][1] < middle["brainstem"][1] < 0.9 * abs(middle["cerebellum"][1])  # behind the brainstem
    assert middle["cerebellum"][2] < middle["ventricles"][2] - 20  # and low
    assert 0.7 < sum(litres.values()) < 1.9 and 0.01 < litres["ventricles"] < 0.15
    assert litres["white matter"] > litres["cerebellum"] > litres["brainstem"]
    assert image.shape == (48, 48, 16) and nib.aff2axcodes(image.affine) == ("R", "A", "S")


def test_contrasts_differ_in_order(no_data):
    means = {}
    for m in CONTRASTS:
        image, label = arrays(f"head-{m}", 0, shape=(72, 72, 24))
        means[m] = [float(np.median(image[label == HEAD.index(n) + 1])) for n in ("white matter", "cortex")]
    assert means["ct"][0] < means["ct"][1] and means["mr"][0] > means["mr"][1]
    ct, label = arrays("head-ct", 0, shape=(72, 72, 24))
    assert 20 < means["ct"][0] < 34 and ct.min() >= -1024 and (ct > 500).sum() > 100  # grey values of a brain, and a skull


def test_ct_and_mr_never_share_a_person(maps):
    people = {m: {f.name for f in head_maps(m)} for m in CONTRASTS}
    assert len(people["ct"]) == 3 and len(people["mr"]) == 2 and not people["ct"] & people["mr"]


def test_drawn_people_differ_between_modalities(no_data):
    assert (arrays("head-ct", 0)[1] != arrays("head-mr", 0)[1]).mean() > 0.01


def test_real_people_come_in_the_seeds_order_and_again_when_all_were_there(maps, monkeypatch):
    used = []
    monkeypatch.setattr(heads, "paint_head", lambda rng, file, shape, size: used.append(file.name) or heads.draw_head(rng, shape, size))
    for index in range(6): arrays("head-ct", index, seed=1)
    assert used[:3] == used[3:] and set(used) == {f.name for f in head_maps("ct")}
    names = [case_id("head-ct", i) for i in range(6)]
    assert len(set(names)) == 6 and len({subject_of(n) for n in names}) == 3
    assert [subject_of(n) for n in names[:3]] == [subject_of(n) for n in names[3:]]


def test_a_person_that_comes_again_is_another_case_in_the_same_part(maps, tmp_path):
    folder = make_phantom("head-ct", 6, 0, tmp_path / "p", shape=SMALL)
    collection = load_collection(folder)
    first, again = (np.asarray(nib.load(collection.case(case_id("head-ct", i)).label).dataobj) for i in (0, 3))
    assert (first != again).mean() > 0.01
    for cases in split_cases(collection, "random").values():
        assert len(cases) == 2 * len({subject_of(c.id) for c in cases})
    said = json.loads((folder / "dataset.json").read_text())
    assert "3 real heads" in said["description"] and said["phantom"]["anatomy"].startswith("3 real heads")


def test_real_heads_keep_their_structures_whatever_the_orientation(maps, tmp_path):
    turned = np.array([[0, 0, -4.0, 90], [-4, 0, 0, 90], [0, 4, 0, -90], [0, 0, 0, 1]])
    for file in (head_maps("ct")[0], write_head(tmp_path / "turned.nii.gz", affine=turned)):
        scene = paint_head(np.random.default_rng(0), file, (32, 32, 16), (230, 230, 200))
        assert set(np.unique(scene.label)) == set(range(7))
        assert {TISSUES[i] for i in np.unique(scene.tissue[scene.label == 3])} == {"grey matter"}
        assert {TISSUES[i] for i in np.unique(scene.tissue[scene.label == 1])} == {"csf"}
        middle = scene.points[:, scene.label > 0].mean(1)
        assert np.abs(middle).max() < 8  # the brain is in the middle of the field of view


def test_drawn_and_real_folders_are_told_apart(maps, tmp_path, monkeypatch):
    folder = make_phantom("head-mr", 1, 0, tmp_path / "p", shape=SMALL)
    assert make_phantom("head-mr", 1, 0, folder, shape=SMALL) == folder
    monkeypatch.delenv("MEDSEG_DATA")
    with pytest.raises(DatasetError, match="something else"):
        make_phantom("head-mr", 1, 0, folder, shape=SMALL)


def test_a_structure_without_tissue_is_named(tmp_path):
    file = write_head(tmp_path / "odd.nii.gz", strange=999)
    with pytest.raises(LabelError, match="999") as error:
        paint_head(np.random.default_rng(0), file, (8, 8, 8), (200, 200, 200))
    assert error.value.file == file and error.value.fix


def test_a_map_without_brain_and_a_folder_without_maps(tmp_path, monkeypatch):
    nib.save(nib.Nifti1Image(np.full((4, 4, 4), 511, np.int16), np.eye(4)), tmp_path / "skin.nii.gz")
    with pytest.raises(LabelError, match="no brain"):
        paint_head(np.random.default_rng(0), tmp_path / "skin.nii.gz", (8, 8, 8), (20, 20, 20))
    (tmp_path / "data" / "head_labels").mkdir(parents=True)
    monkeypatch.setenv("MEDSEG_DATA", str(tmp_path / "data"))
    with pytest.raises(DatasetError, match="too few"):
        make_phantom("head-ct", 1, 0, tmp_path / "p", shape=SMALL)
    assert not (tmp_path / "p").exists()


@pytest.mark.skipif(find_collection("head_labels") is None, reason="head_labels is not below MEDSEG_DATA")
@pytest.mark.parametrize("kind", ["head-ct", "head-mr"])
def test_real_heads(kind):
    assert len(head_maps("ct")) == len(head_maps("mr")) == 10
    image, label = arrays(kind, 0, shape=(48, 48, 16))
    assert set(np.unique(label)) == set(range(7)) and image.shape == label.shape == (48, 48, 16)
    litres = np.bincount(label.ravel(), minlength=7) * (230 / 48) ** 2 * 10 / 1e6
    assert 0.8 < litres[1:].sum() < 2 and litres[2] > litres[5] > litres[6]
