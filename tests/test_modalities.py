"Several modalities under one taxonomy: names decide, labels are written anew, few-shot by case, bad sets are refused."

import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.core import DatasetError, GeometryError, LabelError, MedsegError, ShapeError
from medseg_nb.data.collections import load_collection, split_cases
from medseg_nb.data.modalities import (
    PREPARATIONS,
    class_counts,
    common_classes,
    few_shot,
    list_cases,
    load_modalities,
    remap_collection,
    rename_classes,
    split_modalities,
)
from medseg_nb.data.phantoms import make_phantom
from medseg_nb.data.slices import Preparation, prepare_cases, prepare_image, restore
from medseg_nb.data.volumes import clipped_zscore, load_label, normalize

MR = ("liver", "right kidney", "left kidney")
CT = ("kidney_left", "spleen", "kidney_right", "liver")
TO_MR = {"kidney_left": "left kidney", "kidney_right": "right kidney", "spleen": "background"}


def write_set(folder, names, n=4, used=None, channels=1, labels=True):
    "A collection of n cases of 8 x 7 x 5 voxels whose labels hold the ids `used` (all, if None)."
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    ids = list(range(len(names) + 1)) if used is None else used
    for i in range(n):
        rng = np.random.default_rng([len(names), i])
        for c in range(channels):
            image = nib.Nifti1Image(rng.normal(size=(8, 7, 5)).astype(np.float32), np.diag([1, 1, 3, 1.0]))
            nib.save(image, folder / "imagesTr" / f"p{i:02d}_{c:04d}.nii.gz")
        label = np.resize(ids, 280).reshape(8, 7, 5).astype(np.uint8)
        if labels: nib.save(nib.Nifti1Image(rng.permuted(label), np.diag([1, 1, 3, 1.0])), folder / "labelsTr" / f"p{i:02d}.nii.gz")
    said = {"name": folder.name, "channel_names": {str(c): f"c{c}" for c in range(channels)},
            "labels": {"background": 0} | {name: i for i, name in enumerate(names, 1)}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folders(tmp_path):
    return {"mr": write_set(tmp_path / "a-mr", MR), "ct": write_set(tmp_path / "b-ct", CT)}


def voxels(collection, case, name):
    ids = [i for i, n in collection.classes.items() if n == name]
    return np.isin(np.asarray(load_label(case.label).dataobj), ids)


def test_ids_follow_names(folders):
    data = load_modalities(folders, {"ct": TO_MR})
    before = load_collection(folders["ct"])
    assert data.modalities == ["mr", "ct"]
    assert data.classes == data["mr"].classes == data["ct"].classes == dict(enumerate(["background", *MR]))
    back = {"background": ["background", "spleen"], "liver": ["liver"]} | {v: [k] for k, v in TO_MR.items() if v != "background"}
    for old, new in zip(before.cases, data["ct"].cases, strict=True):
        assert new.id == old.id and new.images == tuple(f.absolute() for f in old.images)
        for name in data.classes.values():
            assert (voxels(data["ct"], new, name) == sum(voxels(before, old, n) for n in back[name])).all()
    assert data["mr"].path == folders["mr"]  # nothing written where ids agree


def test_the_first_modality_gives_the_order(folders):
    data = load_modalities({"ct": folders["ct"], "mr": folders["mr"]}, {"ct": TO_MR})
    assert list(data.classes.values()) == ["background", "left kidney", "right kidney", "liver"]


def test_remapped_labels_are_kept_and_renewed_when_a_label_changes(folders):
    one, two = (load_modalities(folders, {"ct": TO_MR})["ct"] for _ in range(2))
    assert one.path == two.path
    file = sorted((folders["ct"] / "labelsTr").glob("*"))[0]
    img = nib.load(file)
    nib.save(nib.Nifti1Image(np.asarray(img.dataobj)[::-1].copy(), img.affine), file)
    assert load_modalities(folders, {"ct": TO_MR})["ct"].path != one.path


def test_two_classes_become_one(tmp_path, folders):
    both = {"mr": {"right kidney": "kidney", "left kidney": "kidney"}}
    both["ct"] = {"kidney_right": "kidney", "kidney_left": "kidney", "liver": "liver", "*": "background"}
    data = load_modalities(folders, both)
    assert list(data.classes.values()) == ["background", "liver", "kidney"]
    assert class_counts(data["ct"]) == {"liver": 4, "kidney": 4}


def test_three_modalities(tmp_path, folders):
    folders["pet"] = write_set(tmp_path / "c-pet", MR)
    data = load_modalities(folders, {"ct": TO_MR})
    assert data.modalities == ["mr", "ct", "pet"] and len({tuple(data[m].classes.items()) for m in data.modalities}) == 1


def test_phantom_pairs_agree_without_a_map(tmp_path):
    for pair in (("abdomen-ct", "abdomen-mr"), ("head-ct", "head-mr")):
        made = {m: make_phantom(m, 1, 0, tmp_path / m, shape=(48, 48, 12)) for m in pair}
        data = load_modalities(made)
        assert all(data[m].path == made[m] for m in pair)


def test_splits_groups_test_cases_and_channels_survive(tmp_path):
    folder = write_set(tmp_path / "x", CT, channels=2)
    splits = {"train": ["p00", "p01"], "validation": ["p02"], "test": ["p03"]}
    (folder / "splits.json").write_text(json.dumps(splits))
    (folder / "imagesTs").mkdir()
    for c in range(2): (folder / "imagesTs" / f"t0_{c:04d}.nii.gz").write_bytes((folder / "imagesTr" / f"p00_{c:04d}.nii.gz").read_bytes())
    said = json.loads((folder / "dataset.json").read_text()) | {"group": r"p(\d+)"}
    (folder / "dataset.json").write_text(json.dumps(said))
    old = load_collection(folder)
    new = remap_collection(old, dict(enumerate(["background", *MR])), tmp_path / "out", TO_MR)
    assert new.splits == splits and new.group == old.group and list(new.channels.values()) == ["c0", "c1"]
    assert [c.id for c in new.test_cases] == ["t0"] and len(new.cases[0].images) == 2
    assert {p: [c.id for c in cs] for p, cs in split_cases(new).items()} == splits
    assert prepare_cases(new, new.cases[:1], Preparation(), tmp_path / "prepared")[0].shape == (2, 8, 7, 5)


def test_list_cases_takes_files_of_any_name(tmp_path, folders):
    images, labels = (sorted((folders["mr"] / part).glob("*")) for part in ("imagesTr", "labelsTr"))
    (labels[0].parent / "other name.nii.gz").write_bytes(labels[0].read_bytes())
    list_cases(tmp_path / "made", "made", dict(enumerate(["background", *MR])), {0: "MRI"},
               [(images[0], labels[0].parent / "other name.nii.gz"), (images[1], None)])
    made = load_collection(tmp_path / "made")
    assert [c.id for c in made.cases] == ["p00_0000"] and [c.id for c in made.test_cases] == ["p01_0000"]


# ------------------------------------------------------------------ parts and shots


def test_shots_are_nested_drawn_by_seed_and_touch_training_alone(folders, tmp_path):
    data = load_modalities({"mr": write_set(tmp_path / "m", MR, 12), "ct": folders["ct"]}, {"ct": TO_MR})
    full = split_modalities(data, "random", 3)
    ids = lambda cases: [c.id for c in cases]
    few = {n: split_modalities(data, "random", 3, {"mr": n}) for n in (1, 3)}
    assert few[1] == split_modalities(data, "random", 3, {"mr": 1})
    assert set(ids(few[1]["mr"]["train"])) < set(ids(few[3]["mr"]["train"])) < set(ids(full["mr"]["train"]))
    for n, parts in few.items():
        assert len(parts["mr"]["train"]) == n and parts["ct"] == full["ct"]
        assert all(parts["mr"][p] == full["mr"][p] for p in ("validation", "test"))
    drawn = {tuple(ids(few_shot(full["mr"]["train"], 1, "mr", seed))) for seed in range(20)}
    assert len(drawn) > 3  # another seed, another case


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 99))
def test_few_shot_keeps_order_and_number(n, k, seed):
    cases = list(range(n))
    if k > n:
        with pytest.raises(DatasetError, match="'ct'"): few_shot(cases, k, "ct", seed)
        return
    kept = few_shot(cases, k, "ct", seed)
    assert len(kept) == k and kept == sorted(set(kept)) and set(few_shot(cases, max(k - 1, 1), "ct", seed)) <= set(kept)


def test_a_single_person_can_train_only(tmp_path, folders):
    data = load_modalities({"mr": folders["mr"], "ct": write_set(tmp_path / "one", CT, 1)}, {"ct": TO_MR})
    parts = split_modalities(data, {"ct": "train"})
    assert [len(parts["ct"][p]) for p in ("train", "validation", "test")] == [1, 0, 0] and all(parts["mr"].values())
    with pytest.raises(DatasetError, match="leaves a part empty"): split_modalities(data)


@pytest.mark.parametrize("shots", [{"ct": 0}, {"ct": 99}, {"ct": -1}, {"ct": True}, {"ct": 1.0}, {"ct": None}, {"pet": 1}])
def test_shots_that_cannot_be_had(shots, folders):
    data = load_modalities(folders, {"ct": TO_MR})
    with pytest.raises(DatasetError, match="ct|pet"): split_modalities(data, "random", 0, shots)


def test_unknown_modalities_and_rules(folders):
    data = load_modalities(folders, {"ct": TO_MR})
    with pytest.raises(DatasetError, match="'pet'"): data["pet"]
    with pytest.raises(DatasetError, match="'pet'"): split_modalities(data, {"pet": "random"})
    with pytest.raises(DatasetError, match="no such split rule"): split_modalities(data, "by moon")


# ------------------------------------------------------------------ bad sets


def refused(kind, folders, label_map=None, *words):
    "The error, which must name every word and say what to do."
    with pytest.raises(kind) as error: load_modalities(folders, label_map)
    assert error.value.fix, str(error.value)
    for word in words: assert word in str(error.value), str(error.value)


def test_different_classes_and_no_map(folders):
    refused(LabelError, folders, None, "'ct'", "b-ct", "label_map", "kidney_left")


def test_a_map_that_leaves_a_class_out(folders):
    refused(LabelError, folders, {"ct": {k: v for k, v in TO_MR.items() if k != "spleen"}}, "'ct'", "besides ['spleen']")
    refused(LabelError, folders, {"ct": TO_MR | {"kidney_left": "background"}}, "without ['left kidney']")


def test_maps_that_point_nowhere(folders):
    refused(LabelError, folders, {"ct": TO_MR | {"Milz": "spleen"}}, "b-ct", "Milz")
    refused(LabelError, folders, {"pet": TO_MR}, "pet")
    refused(LabelError, folders, {"ct": TO_MR | {"background": "liver"}}, "b-ct", "background")
    refused(LabelError, folders, {m: {"*": "background"} for m in folders}, "no class is left")


@pytest.mark.parametrize("target", [None, 3, "", "  ", ["liver"]])
@pytest.mark.parametrize("source", ["spleen", "*"])
def test_targets_that_are_no_names(source, target, folders):
    with pytest.raises(LabelError, match="no name"): load_modalities(folders, {"ct": TO_MR | {source: target}})


def test_an_empty_modality(folders, tmp_path):
    refused(DatasetError, folders | {"ct": write_set(tmp_path / "empty", MR, 0)}, None, "'ct'", "empty", "holds no case")
    refused(DatasetError, folders | {"ct": write_set(tmp_path / "unlabelled", MR, 2, labels=False)}, None, "'ct'")
    refused(DatasetError, folders | {"ct": tmp_path / "nowhere"}, None, "'ct'", "nowhere")


def test_a_modality_without_a_class(folders, tmp_path):
    refused(LabelError, {"mr": folders["mr"], "ct": write_set(tmp_path / "few", MR, used=[0, 1, 3])}, None, "'ct'", "no right kidney", "few")


def test_a_modality_or_a_folder_named_twice(folders):
    refused(DatasetError, [("ct", folders["ct"]), ("CT ", folders["mr"])], None, "CT", "a-mr")
    refused(DatasetError, [("ct", folders["ct"]), ("mr", folders["ct"] / ".." / "b-ct")], None, "mr", "b-ct")
    refused(DatasetError, {"ct": folders["ct"]}, None, "two or more")
    refused(DatasetError, {"ct": folders["ct"], " ": folders["mr"]}, None, "each with a name")


def test_other_channels_and_broken_files(folders, tmp_path):
    refused(ShapeError, {"mr": folders["mr"], "ct": write_set(tmp_path / "two", MR, channels=2)}, None, "'ct'", "two")
    other = write_set(tmp_path / "shifted", MR)
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)), other / "labelsTr" / "p01.nii.gz")
    refused(GeometryError, {"mr": folders["mr"], "ct": other}, None, "'ct'", "p01.nii.gz")


def test_remap_refuses_what_has_no_place_and_leaves_nothing(folders, tmp_path, monkeypatch):
    old = load_collection(folders["ct"])
    classes = dict(enumerate(["background", *MR]))
    with pytest.raises(LabelError, match="lead nowhere") as error: remap_collection(old, classes, tmp_path / "out")
    assert error.value.file == old.path and error.value.fix
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note.txt").write_text("mine")
    with pytest.raises(DatasetError, match="there already"): remap_collection(old, classes, tmp_path / "used", TO_MR)
    (folders["ct"] / "labelsTr" / "p02.nii.gz").write_bytes(b"no image")
    with pytest.raises(MedsegError, match="p02"): remap_collection(old, classes, tmp_path / "out", TO_MR)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".half-*"))


def test_names_and_taxonomy_alone():
    class Some:
        path, classes = "somewhere", dict(enumerate(["nothing", "a", "b", "c"]))
    assert rename_classes(Some) == {0: "background", 1: "a", 2: "b", 3: "c"}
    assert rename_classes(Some, {"b": "x", "*": "background"}) == {0: "background", 1: "background", 2: "x", 3: "background"}
    assert common_classes({"m": {0: "background", 1: "x", 2: "background", 3: "y"}, "n": {0: "background", 1: "y", 2: "x"}}, {}) == {
        0: "background", 1: "x", 2: "y"}


# ------------------------------------------------------------------ preparations


def test_clipped_zscore_by_hand():
    x = np.arange(101.0).reshape(1, 101)
    kept = np.minimum(x, 98)
    assert np.allclose(clipped_zscore(x), (kept - kept.mean()) / kept.std(), atol=1e-6)
    assert np.allclose(normalize(x, "clipped-zscore"), clipped_zscore(x))
    metal = np.r_[x.ravel(), 1e6]
    assert clipped_zscore(metal).max() < 2 and not clipped_zscore(np.full((3, 3), 7.0)).any()


@pytest.mark.parametrize("shape, crop", [((9, 12, 4), 6), ((9, 12, 4), 7), ((5, 12, 4), 6), ((9, 12, 4), 40)])
def test_crop_keeps_the_middle_and_comes_back(shape, crop):
    rng = np.random.default_rng(0)
    image = nib.Nifti1Image(rng.normal(size=shape).astype(np.float32), np.diag([1, 1, 3, 1.0]))
    preparation = Preparation("none", crop=crop)
    x = prepare_image([image], preparation)[0]
    assert x.shape == (min(shape[0], crop), min(shape[1], crop), 4)
    sides = [slice(n // 2 - min(n, crop) // 2, n // 2 - min(n, crop) // 2 + min(n, crop)) for n in shape[:2]]
    assert (x == np.asarray(image.dataobj)[sides[0], sides[1]]).all()
    labels = rng.integers(1, 4, x.shape).astype(np.uint8)
    back = np.asarray(restore(labels, image, preparation).dataobj)
    outside = np.ones(shape, bool)
    outside[sides[0], sides[1]] = False
    assert back.shape == shape and (back[sides[0], sides[1]] == labels).all() and not back[outside].any()


def test_paper_preparations(tmp_path):
    assert PREPARATIONS["lssc-cardiac"].spacing == (1, 1, 1) and PREPARATIONS["lssc-cardiac"].intensity == "clipped-zscore"
    assert PREPARATIONS["lssc-abdomen"].spacing == (1.5, 1.5, 8) and PREPARATIONS["lssc-abdomen"].patch == (128, 128, 64)
    folder = make_phantom("abdomen-mr", 1, 0, tmp_path / "p", shape=(24, 24, 6))
    for preparation in PREPARATIONS.values():
        assert Preparation.from_dict(json.loads(json.dumps(preparation.to_dict()))) == preparation
    ready = prepare_cases(load_collection(folder), None, PREPARATIONS["lssc-abdomen"], tmp_path / "c")[0]
    x = np.asarray(ready.open_image(), np.float32)
    assert np.allclose(ready.spacing, (1.5, 1.5, 8), atol=1e-3) and max(ready.shape[1:3]) <= 256
    assert abs(x.mean()) < 2e-3 and abs(x.var() - 1) < 5e-3


@pytest.mark.parametrize("crop", [0, -3])
def test_impossible_crops(crop):
    with pytest.raises(ShapeError): Preparation(crop=crop)
