"Phantoms: same seed, same bytes; anatomy keeps its rules; bad requests and full disks leave nothing behind."

import hashlib
import json
import os
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.core import DatasetError, MedsegError, ShapeError
from medseg_nb.data import phantoms
from medseg_nb.data.collections import load_collection, split_cases, subject_of
from medseg_nb.data.phantoms import ORGANS, PHANTOM_KINDS, draw_case, make_phantom

SMALL = (48, 48, 12)
VOLUMES = [kind for kind, what in PHANTOM_KINDS.items() if what.picture is None]   # pictures: test_lesion_pictures.py


def digests(folder):
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def arrays(kind, index, seed=0, shape=None):
    return tuple(np.asarray(part.dataobj) for part in draw_case(kind, index, seed, shape))


@pytest.mark.parametrize("kind", VOLUMES)
def test_same_seed_same_bytes_in_another_process(kind, tmp_path):
    here = make_phantom(kind, 2, 5, tmp_path / "here", shape=SMALL)
    time.sleep(1.1)  # a gzip time stamp would have moved on
    request = f"make_phantom({kind!r}, 2, 5, {str(tmp_path / 'there')!r}, shape={SMALL})"
    code = f"from medseg_nb.data.phantoms import make_phantom; {request}"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert digests(here) == digests(tmp_path / "there")
    assert len(digests(here)) == 5  # two images, two labels, dataset.json


def test_gzip_time_stamp_is_zero(tmp_path):
    folder = make_phantom("cardiac-mr", 1, 0, tmp_path / "p", shape=SMALL)
    for file in folder.rglob("*.nii.gz"):
        assert file.read_bytes()[4:8] == b"\0\0\0\0"


@pytest.mark.parametrize("kind", VOLUMES)
def test_collection_loads_and_holds_every_class(kind, tmp_path):
    collection = load_collection(make_phantom(kind, 3, 0, tmp_path / "p", shape=(64, 64, 16)))
    names = PHANTOM_KINDS[kind].classes
    assert list(collection.classes.values()) == ["background", *names] and len(names) > 1
    held = [set(np.unique(nib.load(case.label).dataobj).tolist()) for case in collection.cases]
    assert set.union(*held) == set(range(len(names) + 1))
    for case, ids in zip(collection.cases, held, strict=True):
        assert {names[i - 1] for i in range(1, len(names) + 1) if i not in ids} <= {"tumour"}  # some patients have none
        assert nib.load(case.images[0]).shape == (64, 64, 16)


@pytest.mark.parametrize("kind", VOLUMES)
def test_every_case_differs(kind):
    cases = [arrays(kind, i, shape=SMALL) for i in range(4)]
    for i in range(4):
        for j in range(i):
            for one, other in zip(cases[i], cases[j], strict=True):
                assert (one != other).mean() > 0.01
    images = arrays(kind, 0, seed=1, shape=SMALL)[0]
    assert (images != cases[0][0]).mean() > 0.5  # another seed, another patient


def test_a_case_does_not_depend_on_how_many_are_made(tmp_path):
    few, many = (digests(make_phantom("cardiac-mr", n, 3, tmp_path / str(n), shape=SMALL)) for n in (1, 3))
    assert all(many[name] == digest for name, digest in few.items() if name.endswith(".nii.gz"))


def test_shape_changes_sampling_and_not_the_field_of_view():
    coarse, fine = (draw_case("abdomen-ct", 0, 0, shape)[0] for shape in (SMALL, (96, 96, 24)))
    extent = [np.array(i.shape) * i.header.get_zooms() for i in (coarse, fine)]
    assert np.allclose(*extent, rtol=1e-3)
    assert nib.aff2axcodes(fine.affine) == ("R", "A", "S")


@pytest.mark.parametrize("kind", ["abdomen-ct", "abdomen-mr"])
@pytest.mark.parametrize("index", range(3))
def test_anatomy(kind, index):
    _, label = draw_case(kind, index, 11, SMALL)
    voxels = np.asarray(label.dataobj)
    middle = {
        n: nib.affines.apply_affine(label.affine, np.argwhere(voxels == i)).mean(0) for i, n in enumerate(ORGANS, 1)
    }
    millilitres = {n: (voxels == i).sum() * np.prod(label.header.get_zooms()) / 1000 for i, n in enumerate(ORGANS, 1)}
    assert middle["liver"][0] > 20 and middle["gallbladder"][0] > 20  # the patient's right
    assert middle["spleen"][0] < -40 and middle["stomach"][0] < 0  # and left
    assert middle["kidney R"][0] > 25 and middle["kidney L"][0] < -25
    assert middle["spleen"][1] < middle["stomach"][1]  # spleen behind stomach
    assert middle["gallbladder"][2] < middle["liver"][2]  # gallbladder low in the liver
    assert abs(middle["aorta"][0]) < abs(middle["kidney L"][0])
    assert 700 < millilitres["liver"] < 2200 and 40 < millilitres["spleen"] < 500
    assert max(millilitres, key=millilitres.get) == "liver"


def test_ct_is_in_hounsfield_units():
    image, label = arrays("abdomen-ct", 0, shape=(96, 96, 24))
    assert image.dtype == np.int16 and image.min() >= -1024
    assert abs(np.median(image[:2]) + 1000) < 40  # air around the patient
    assert 10 < np.median(image[label == 5]) < 160


def test_the_heart_contracts():
    for person in range(3):
        full, squeezed = (arrays("cardiac-mr", 2 * person + beat)[1] for beat in (0, 1))
        assert (full == 3).sum() > 1.15 * (squeezed == 3).sum()
        assert 0.7 < (squeezed == 2).sum() / (full == 2).sum() < 1.3  # muscle keeps its volume


def test_frames_of_one_heart_stay_together(tmp_path):
    collection = load_collection(make_phantom("cardiac-mr", 8, 0, tmp_path / "p", shape=(16, 16, 4)), check=False)
    parts = split_cases(collection, "random")
    people = [{subject_of(c.id) for c in cases} for cases in parts.values()]
    assert len(set.union(*people)) == sum(map(len, people)) == 4


def test_asked_twice_it_is_used_again_but_nothing_else_is_overwritten(tmp_path):
    folder = make_phantom("cardiac-mr", 1, 0, tmp_path / "p", shape=SMALL)
    before = digests(folder)
    assert make_phantom("cardiac-mr", 1, 0, folder, shape=SMALL) == folder
    with pytest.raises(DatasetError, match="something else"):
        make_phantom("cardiac-mr", 1, 1, folder, shape=SMALL)
    assert digests(folder) == before
    (folder / "imagesTr" / "cardiac-mr_000_frame01.nii.gz").unlink()  # damaged: said, not papered over
    with pytest.raises(DatasetError):
        make_phantom("cardiac-mr", 1, 0, folder, shape=SMALL)


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"training": 3}', '{"phantom": {}, "training": [1]}'])
def test_a_foreign_dataset_json_is_left_alone(content, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DatasetError):
        make_phantom("cardiac-mr", 1, 0, tmp_path, shape=SMALL)
    assert (tmp_path / "dataset.json").read_text() == content


def test_a_fault_half_way_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(phantoms, "nifti_bytes", full_disk)
    with pytest.raises(DatasetError, match="No space left"):
        make_phantom("cardiac-mr", 2, 0, tmp_path / "p", shape=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "p").write_text("hello")
    with pytest.raises(DatasetError):
        make_phantom("cardiac-mr", 1, 0, tmp_path / "p", shape=SMALL)
    with pytest.raises(DatasetError):
        make_phantom("cardiac-mr", 1, 0, tmp_path / "p" / "q", shape=SMALL)
    assert (tmp_path / "p").read_text() == "hello"


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 0),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=4),
)


@settings(max_examples=60, deadline=None)
@given(kind=anything, n_cases=anything, seed=st.one_of(st.integers(-9, -1), st.floats(), st.text(max_size=3)))
def test_bad_requests_are_medsegerrors(kind, n_cases, seed, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "never"
    with pytest.raises(MedsegError):
        make_phantom(kind, 1, 0, folder)
    with pytest.raises(MedsegError):
        make_phantom("cardiac-mr", n_cases, 0, folder)
    with pytest.raises(MedsegError):
        make_phantom("cardiac-mr", 1, seed, folder)
    assert not folder.exists()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.one_of(
        st.lists(st.integers(-3, 3), min_size=3, max_size=3),
        st.lists(st.integers(8, 9), max_size=2),
        st.tuples(st.floats(8, 9), st.just(8), st.just(8)),
        st.integers(1, 9),
        st.text(min_size=1),
        st.just([]),
    )
)
def test_bad_shapes(shape, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "never"
    with pytest.raises(ShapeError):
        make_phantom("cardiac-mr", 1, 0, folder, shape=shape)
    assert not folder.exists()


def test_dataset_json_says_what_it_is(tmp_path):
    said = json.loads((make_phantom("abdomen-mr", 1, 2, tmp_path / "p", shape=SMALL) / "dataset.json").read_text())
    assert said["phantom"] == {"kind": "abdomen-mr", "n_cases": 1, "seed": 2, "shape": list(SMALL)}
    assert said["labels"]["8"] == "stomach" and said["modality"] == {"0": "MRI"} and said["numTraining"] == 1


def test_twenty_abdomens_take_under_thirty_seconds_of_one_core():
    start = time.process_time()
    for i in range(2):
        draw_case("abdomen-ct", i, 0)
    assert (time.process_time() - start) * 10 < 60  # twice the aim, since the machine may be busy
