"""Bad input: every damaged file or folder ends in a MedsegError that names it; nothing half-written stays."""
import errno
import gzip
import json
import shutil
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medseg_nb.core import DatasetError, GeometryError, LabelError, MedsegError, ShapeError
from medseg_nb.data.collections import load_collection, png_pairs_to_collection, split_cases, subject_of
from medseg_nb.data.volumes import (
    INTENSITY_RULES,
    class_names,
    load_label,
    load_volume,
    normalize,
    save_volume,
    split_channels,
)

settings.register_profile("bad", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("bad")

SHAPE, AFFINE = (7, 6, 5), np.diag([-1.0, 1, 3, 1])


def write(path, data, affine=AFFINE):
    "A NIfTI file at `path`."
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def noise(shape=SHAPE): return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def with_header(path, **fields):
    "An uncompressed NIfTI whose header fields are overwritten with anything, checked by nobody."
    img = nib.Nifti1Image(noise(), AFFINE)
    header = img.header.copy()
    header["magic"], header["vox_offset"] = b"n+1", 352
    header["sform_code"], header["srow_x"], header["srow_y"], header["srow_z"] = 1, *AFFINE[:3]
    for name, value in fields.items(): header[name] = value
    path.write_bytes(header.binaryblock + bytes(4) + noise().tobytes("F"))
    return path


@pytest.fixture(scope="module")
def room(tmp_path_factory): return tmp_path_factory.mktemp("bad")


def refused(kind, read, path, *words):
    "`read(path)` raises exactly this kind of error, and it names the file."
    with pytest.raises(kind) as caught: read(path)
    message = str(caught.value)
    assert path.name in message and "\n" not in message
    for word in words: assert word in message
    return message


# ------------------------------------------------------------------------------------------------ one file

@pytest.mark.parametrize("name", ["empty.nii", "empty.nii.gz"])
def test_empty_file(room, name):
    (room/name).write_bytes(b"")
    for read in (load_volume, load_label, class_names): refused(DatasetError, read, room/name)


@pytest.mark.parametrize("content", [b"PK\x03\x04 not an image", b"\x1f\x8b" + b"\0"*400, b"\0"*352])
def test_another_kind_of_file(room, content):
    for name in ("other.nii", "other.nii.gz"):
        (room/name).write_bytes(content)
        refused(DatasetError, load_volume, room/name)


def test_missing_file_and_folder(room):
    refused(DatasetError, load_volume, room/"absent.nii.gz", "does not exist")
    refused(DatasetError, load_volume, room)


@given(keep=st.floats(0, 0.999))
def test_truncated_gz(room, keep):
    whole = write(room/"whole.nii.gz", noise())
    bytes_ = whole.read_bytes()
    cut = room/"cut.nii.gz"
    cut.write_bytes(bytes_[:int(keep * len(bytes_))])
    try: img = load_volume(cut)
    except DatasetError as error: assert "cut.nii.gz" in str(error)
    else:   # only the checksum at the end may be lost
        assert len(bytes_) - int(keep * len(bytes_)) <= 8
        np.testing.assert_array_equal(np.asarray(img.dataobj), noise())


@given(keep=st.integers(0, 352 + 4*7*6*5 - 1))
def test_truncated_nii(room, keep):
    whole = write(room/"whole.nii", noise())
    (room/"cut.nii").write_bytes(whole.read_bytes()[:keep])
    refused(DatasetError, load_volume, room/"cut.nii")


@given(at=st.integers(0, 351), value=st.integers(0, 255), packed=st.booleans())
@settings(max_examples=150)
def test_a_flipped_header_byte_is_an_error_or_a_sound_volume(room, at, value, packed):
    content = bytearray(write(room/"whole.nii", noise()).read_bytes())
    content[at] = value
    path = room/("flip.nii.gz" if packed else "flip.nii")
    path.write_bytes(gzip.compress(bytes(content), 1) if packed else bytes(content))
    for read in (load_volume, load_label):
        try: img = read(path, max_voxels=10_000)
        except MedsegError as error: assert path.name in str(error)
        else:
            assert img.ndim == 3 and min(img.shape) > 0 and np.isfinite(np.asarray(img.dataobj)).all()
            assert abs(np.linalg.det(img.affine)) > 0


def test_gz_bomb_is_refused_before_it_is_unpacked(room):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape((2000, 2000, 2000))   # declares 32 GB
    header["magic"], header["vox_offset"] = b"n+1", 352
    header.set_sform(AFFINE, 1)
    with gzip.open(room/"bomb.nii.gz", "wb", 1) as file:
        file.write(header.binaryblock + bytes(4))
        for _ in range(64): file.write(bytes(2**20))
    tracemalloc.start()
    refused(GeometryError, load_volume, room/"bomb.nii.gz", "8,000,000,000", "max_voxels")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
    for read in (load_label, class_names): refused(GeometryError, read, room/"bomb.nii.gz", "too many voxels")


@pytest.mark.parametrize("shape", [(7, 6, 5, 3), (7, 6, 5, 1, 3)])
def test_four_dimensions(room, shape):
    refused(GeometryError, load_volume, write(room/"4d.nii.gz", noise(shape)), "three dimensions")
    assert load_volume(write(room/"3d.nii.gz", noise((7, 6, 5, 1)))).shape == (7, 6, 5)


def test_channels_taken_apart(room):
    x = noise((7, 6, 5, 3))
    files = split_channels(write(room/"multi.nii.gz", x), room/"apart")
    for c, file in enumerate(files): np.testing.assert_array_equal(np.asarray(load_volume(file).dataobj), x[..., c])
    refused(GeometryError, split_channels, write(room/"single.nii.gz", noise()), "not 4D")


@pytest.mark.parametrize("dim", [[3, 0, 6, 5, 1, 1, 1, 1], [3, 7, 0, 5, 1, 1, 1, 1], [3, -7, 6, 5, 1, 1, 1, 1]])
def test_zero_or_negative_size(room, dim):
    refused(MedsegError, load_volume, with_header(room/"zero.nii", dim=dim))


@pytest.mark.parametrize("rows", [
    dict(srow_z=[0, 0, 0, 0]), dict(srow_x=[1, 1, 0, 0], srow_y=[0, 0, 1, 0], srow_z=[0, 0, 0, 0]),
    dict(srow_x=[np.nan]*4), dict(srow_y=[0, np.inf, 0, 0]),
])
def test_affine_that_cannot_be_inverted(room, rows):
    path = with_header(room/"flat.nii", **rows)
    for read in (load_volume, load_label): refused(GeometryError, read, path, "inverted")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(room, value):
    x = noise()
    x[3, 2, 1] = value
    for read in (load_volume, load_label): refused(DatasetError, read, write(room/"nan.nii.gz", x), "1 NaN or inf")


def test_too_large_for_32_bits(room):
    refused(DatasetError, load_volume, write(room/"huge.nii.gz", np.full(SHAPE, 1e300)), "32-bit")


@pytest.mark.parametrize("kind", [np.complex64, np.dtype([(c, "u1") for c in "RGB"])])
def test_voxels_that_are_no_numbers(room, kind):
    refused(DatasetError, load_volume, write(room/"colour.nii.gz", np.zeros(SHAPE, kind)), "no plain numbers")


def test_constant_image_becomes_zero_not_nan(room):
    for level in (0, 7, -1e5, 1e30):
        img = load_volume(write(room/"constant.nii.gz", np.full(SHAPE, level, np.float32)))
        for rule in INTENSITY_RULES: assert np.isfinite(normalize(np.asarray(img.dataobj), rule)).all()
        for rule in ("zscore", "percentile"): assert not normalize(np.asarray(img.dataobj), rule).any()


# ------------------------------------------------------------------------------------------------ labels

def test_labels_that_are_fractions_negative_or_undeclared(room):
    ids = np.random.default_rng(0).integers(0, 3, SHAPE)
    label = write(room/"label.nii.gz", ids.astype(np.float32))
    assert load_label(label, {0: "a", 1: "b", 2: "c"}).get_data_dtype() == np.uint8   # floats, but whole: fine
    refused(LabelError, lambda p: load_label(p, {0: "a", 1: "b"}), label, "found [2]", "expected [0, 1]")
    refused(LabelError, load_label, write(room/"half.nii.gz", (ids/2).astype(np.float32)), "found 0.5")
    refused(LabelError, load_label, write(room/"minus.nii.gz", (ids - 1).astype(np.int16)), "found [-1]")


@given(scale=st.sampled_from([0.25, 0.5, 1.0, 2.0]), shift=st.integers(-2, 5), classes=st.integers(1, 6))
def test_a_label_is_in_its_classes_or_refused(room, scale, shift, classes):
    data = (np.random.default_rng(0).integers(0, 4, SHAPE) + shift) * scale
    path = write(room/"any.nii.gz", data.astype(np.float32))
    sound = (data % 1 == 0).all() and (data >= 0).all() and (data < classes).all()
    if sound: np.testing.assert_array_equal(np.asarray(load_label(path, range(classes)).dataobj), data)
    else: refused(LabelError, lambda p: load_label(p, range(classes)), path)


# ------------------------------------------------------------------------------------------------ writing

def left(folder): return sorted(p.name for p in folder.rglob("*"))


def test_output_folder_that_cannot_be_written(tmp_path, monkeypatch):
    like = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE)
    (tmp_path/"a_file").write_text("no folder")
    save = lambda path: save_volume(np.zeros(SHAPE), like, path)
    refused(DatasetError, save, tmp_path/"a_file"/"x.nii.gz", "cannot be written")
    def forbid(*args, **kwargs): raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr("tempfile.mkstemp", forbid)
    refused(DatasetError, save, tmp_path/"x.nii.gz", "Permission denied")
    assert left(tmp_path) == ["a_file"]


@pytest.mark.parametrize("classes", [None, {0: "background", 1: "liver"}])
def test_full_disk_leaves_the_old_file_or_none(tmp_path, monkeypatch, classes):
    like = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE)
    save_volume(np.ones(SHAPE, np.uint8), like, tmp_path/"old.nii.gz", classes)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    def fill(img, path):
        path.write_bytes(b"half of a fi")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("nibabel.save", fill)
    for name in ("old.nii.gz", "new.nii.gz"):
        refused(DatasetError, lambda p: save_volume(np.zeros(SHAPE), like, p, classes), tmp_path/name, "No space left")
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_array_of_another_size_or_name(tmp_path):
    like = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE)
    refused(ShapeError, lambda p: save_volume(np.zeros((7, 6, 4)), like, p), tmp_path/"x.nii.gz")
    refused(DatasetError, lambda p: save_volume(np.zeros(SHAPE), like, p), tmp_path/"x.png")
    assert left(tmp_path) == []


# ------------------------------------------------------------------------------------------------ collections

INFO = {"name": "few", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "ball"}}


def collection_at(path, n=4, kind="msd", channels=1):
    "A sound little collection of either kind."
    ids = [f"case_{10*i:03d}" for i in range(n)]
    for id in ids:
        for c in range(channels):
            write(path/f"imagesTr/{id}{'' if kind == 'msd' else f'_{c:04d}'}.nii.gz", noise())
        write(path/f"labelsTr/{id}.nii.gz", (noise() > 0).astype(np.uint8))
    training = [{"image": f"./imagesTr/{id}.nii.gz", "label": f"./labelsTr/{id}.nii.gz"} for id in ids]
    nnunet = {"channel_names": {str(c): f"T{c}" for c in range(channels)}, "labels": {"background": 0, "ball": 1},
              "numTraining": n, "file_ending": ".nii.gz"}
    path.mkdir(exist_ok=True)
    info = INFO | {"training": training, "numTraining": n} if kind == "msd" else nnunet
    (path/"dataset.json").write_text(json.dumps(info))
    return path


@pytest.fixture
def msd(tmp_path): return collection_at(tmp_path/"msd")


@pytest.fixture
def nnunet(tmp_path): return collection_at(tmp_path/"nnunet", kind="nnunet", channels=2)


def test_both_kinds_load(msd, nnunet):
    a, b = load_collection(msd), load_collection(nnunet)
    assert a.classes == b.classes == {0: "background", 1: "ball"} and [c.id for c in a.cases] == [c.id for c in b.cases]
    assert [f.name for f in a.cases[0].images] == ["case_000.nii.gz"]
    assert [f.name for f in b.cases[0].images] == ["case_000_0000.nii.gz", "case_000_0001.nii.gz"]
    write(nnunet/"imagesTs/new_0000.nii.gz", noise())
    write(nnunet/"imagesTs/new_0001.nii.gz", noise())
    assert [(c.id, c.label) for c in load_collection(nnunet).test_cases] == [("new", None)]


def test_image_and_label_on_different_grids(msd, nnunet):
    for path in (msd, nnunet):
        write(path/"labelsTr/case_010.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE @ np.diag([-1, 1, 1, 1]))
        refused(GeometryError, load_collection, path, "labelsTr/case_010.nii.gz", "back_to_grid")
        write(path/"labelsTr/case_010.nii.gz", np.zeros((7, 6, 4), np.uint8))
        refused(GeometryError, load_collection, path, "labelsTr/case_010.nii.gz", "(7, 6, 4)", "(7, 6, 5)")
        assert len(load_collection(path, check=False)) == 4
    write(nnunet/"labelsTr/case_010.nii.gz", np.zeros(SHAPE, np.uint8))
    write(nnunet/"imagesTr/case_020_0001.nii.gz", noise((7, 6, 4)))
    refused(GeometryError, load_collection, nnunet, "case_020_0001.nii.gz")


def test_label_outside_the_declared_set(msd):
    write(msd/"labelsTr/case_030.nii.gz", np.full(SHAPE, 2, np.uint8))
    refused(LabelError, load_collection, msd, "case_030.nii.gz", "found [2]")
    write(msd/"labelsTr/case_030.nii.gz", np.full(SHAPE, 0.5, np.float32))
    refused(LabelError, load_collection, msd, "case_030.nii.gz", "fractions")


def test_missing_halves(msd, nnunet):
    (msd/"labelsTr/case_000.nii.gz").unlink()
    refused(DatasetError, load_collection, msd, "case_000.nii.gz", "has no label")
    (msd/"imagesTr/case_000.nii.gz").unlink()
    refused(DatasetError, load_collection, msd, "case_000.nii.gz", "is missing")
    (nnunet/"imagesTr/case_010_0001.nii.gz").unlink()
    refused(DatasetError, load_collection, nnunet, "case_010_0001.nii.gz", "is missing")
    shutil.copy(nnunet/"imagesTr/case_010_0000.nii.gz", nnunet/"imagesTr/case_010_0001.nii.gz")
    (nnunet/"labelsTr/case_030.nii.gz").unlink()
    refused(DatasetError, load_collection, nnunet, "case_030_0000.nii.gz", "belongs to no case")


def test_folders_that_hold_nothing(tmp_path, msd):
    refused(DatasetError, load_collection, tmp_path/"absent")
    (tmp_path/"empty").mkdir()
    refused(DatasetError, load_collection, tmp_path/"empty", "dataset.json")
    (msd/"dataset.json").write_text(json.dumps(INFO | {"training": []}))
    refused(DatasetError, load_collection, msd, "holds no case")
    (msd/"dataset.json").unlink()
    refused(DatasetError, load_collection, msd, "dataset.json")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'{"labels": {"0": "x", "1": "y"}}'])
def test_wrong_json(msd, text):
    (msd/"dataset.json").write_bytes(text)
    refused(DatasetError, load_collection, msd, "dataset.json")


simple = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=4)
anything = st.recursive(
    simple,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("012a", max_size=2), inner, max_size=3),
    max_leaves=5)
KEYS = ["name", "description", "modality", "channel_names", "labels", "training", "test", "numTraining", "file_ending",
        "group"]


@given(key=st.sampled_from(KEYS), value=anything)
@settings(max_examples=200)
def test_any_value_in_dataset_json_is_an_error_or_a_collection(room, key, value):
    path = room/"fuzz"
    if not path.exists(): collection_at(path)
    info = INFO | {"training": [{"image": "imagesTr/case_000.nii.gz", "label": "labelsTr/case_000.nii.gz"}]}
    (path/"dataset.json").write_text(json.dumps(info | {key: value}))
    try: collection = load_collection(path)
    except MedsegError: return
    assert len(collection) >= 1 and collection.classes and collection.modality in ("ct", "mr")


@given(value=anything, part=st.sampled_from(["train", "test", None]))
@settings(max_examples=100)
def test_any_splits_json_is_an_error_or_a_split(room, value, part):
    path = room/"fuzz_splits"
    if not path.exists(): collection_at(path)
    good = {"train": ["case_000", "case_010"], "validation": ["case_020"], "test": ["case_030"]}
    (path/"splits.json").write_text(json.dumps(value if part is None else good | {part: value}))
    try: parts = split_cases(load_collection(path, check=False))
    except MedsegError: return
    assert all(parts.values())


def test_splits(msd, tmp_path):
    collection = load_collection(msd)
    parts = split_cases(collection)
    assert sorted(c.id for cases in parts.values() for c in cases) == [c.id for c in collection.cases]
    blocks = split_cases(collection, "id-block")
    assert {part: [c.id for c in cases] for part, cases in blocks.items()} == {
        "train": ["case_000", "case_030"], "validation": ["case_020"], "test": ["case_010"]}
    for n in (1, 2):
        few = load_collection(collection_at(tmp_path/f"few{n}", n))
        for rule in ("random", "id-block"):
            with pytest.raises(DatasetError, match="leaves a part empty.*3 subjects"): split_cases(few, rule)
    with pytest.raises(DatasetError, match="splits.json"): split_cases(collection, "file")
    def split(**parts):
        (msd/"splits.json").write_text(json.dumps(parts))
        return split_cases(load_collection(msd))
    ids = [c.id for c in collection.cases]
    assert [c.id for c in split(train=ids[2:], validation=ids[1:2], test=ids[:1])["test"]] == ids[:1]
    with pytest.raises(DatasetError, match="not there"): split(train=ids[2:], validation=ids[1:2], test=["nobody"])
    with pytest.raises(DatasetError, match="two parts"): split(train=ids, validation=ids[1:2], test=ids[:1])
    with pytest.raises(DatasetError, match="not a split"): split(train=ids, val=[], test=[])


@given(people=st.integers(3, 40), scans=st.integers(1, 3), seed=st.integers(0, 99))
def test_no_person_is_in_two_parts(room, people, scans, seed):
    from medseg_nb.data.collections import Case, Collection
    cases = [Case(f"patient{p:03d}_frame{s:02d}", (), None) for p in range(people) for s in range(scans)]
    parts = split_cases(Collection(room, "x", {}, {}, cases), "random", seed)
    who = {part: {subject_of(c.id) for c in chosen} for part, chosen in parts.items()}
    assert all(who.values()) and sum(map(len, who.values())) == people
    assert sum(map(len, parts.values())) == people * scans


# ------------------------------------------------------------------------------------------------ pictures

@pytest.fixture
def pairs(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("images", "labels"): (tmp_path/part).mkdir()
    for p in range(3):
        for f in range(2):
            stem = f"P{p}-IM-{f:04d}"
            Image.fromarray(rng.integers(0, 255, (9, 12), dtype=np.uint8)).save(tmp_path/"images"/f"{stem}.png")
            Image.fromarray(np.uint8(255)*(rng.random((9, 12)) > 0.5)).save(tmp_path/"labels"/f"{stem}.png")
    return tmp_path


def convert(room, **options):
    return png_pairs_to_collection(room/"images", room/"labels", room/"out", "pairs", **options)


def test_pictures_become_a_collection(pairs):
    collection = convert(pairs, classes={0: "background", 1: "LV"})
    again = load_collection(pairs/"out")
    assert again.cases == collection.cases and len(again) == 6 and again.channels == {0: "grey"}
    case = again.case("P1-IM-0001")
    picture = np.asarray(Image.open(pairs/"images/P1-IM-0001.png"))
    np.testing.assert_array_equal(np.asarray(load_volume(case.images[0]).dataobj)[:, :, 0], picture)
    mask = np.asarray(Image.open(pairs/"labels/P1-IM-0001.png"))
    np.testing.assert_array_equal(np.asarray(load_label(case.label).dataobj)[:, :, 0], mask // 255)
    assert {part: len(cases) for part, cases in split_cases(again).items()} == {"train": 2, "validation": 2, "test": 2}


def draw(room, x, name="labels/P2-IM-0001.png"): Image.fromarray(np.asarray(x, np.uint8)).save(room/name)
def spoil_soft(p): draw(p, np.full((9, 12), 99))
def spoil_size(p): draw(p, np.zeros((9, 11)))
def spoil_cut(p): (p/"images/P2-IM-0001.png").write_bytes((p/"images/P2-IM-0001.png").read_bytes()[:60])
def spoil_alone(p): (p/"labels/P2-IM-0001.png").unlink()
def spoil_colour(p): draw(p, np.arange(9*12*3).reshape(9, 12, 3) % 200)
def spoil_twice(p): shutil.copytree(p/"images", p/"images/again")
def spoil_mixed(p): draw(p, np.zeros((9, 12, 3)), "images/P2-IM-0001.png")
def spoil_all(p): [f.unlink() for f in (p/"labels").iterdir()]


@pytest.mark.parametrize("spoil,kind,word", [
    (spoil_soft, LabelError, "threshold="), (spoil_size, GeometryError, "differ in size"),
    (spoil_cut, DatasetError, "P2-IM-0001"), (spoil_alone, DatasetError, "no partner"),
    (spoil_colour, LabelError, "coloured"), (spoil_twice, DatasetError, "same name"),
    (spoil_mixed, DatasetError, "mixes"), (spoil_all, DatasetError, "no picture")])
def test_bad_pictures_leave_no_half_collection(pairs, spoil, kind, word):
    spoil(pairs)
    with pytest.raises(kind, match=word): convert(pairs)
    assert sorted(p.name for p in pairs.iterdir()) == ["images", "labels"]


def test_soft_masks_need_a_threshold_and_full_folders_are_kept(pairs):
    spoil_soft(pairs)
    label = convert(pairs, threshold=50).case("P2-IM-0001").label
    assert np.asarray(load_label(label).dataobj).all()
    before = left(pairs)
    with pytest.raises(DatasetError, match="there already"): convert(pairs, threshold=50)
    assert left(pairs) == before
