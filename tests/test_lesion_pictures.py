"Pictures: skin in colour and tumours in slices; same seed, same bytes; a person's slices stay together; bad shapes are refused."
import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.cli import main
from medseg_nb.core import DatasetError, ShapeError
from medseg_nb.data import TUMOURS, load_collection, make_phantom, skin_colour, split_cases
from medseg_nb.data.collections import subject_of
from medseg_nb.data.lesion_pictures import LESION_AREA, draw_hairs, draw_skin, lesion_depth, tumour_kind
from medseg_nb.data.phantoms import PHANTOM_KINDS, draw_case
from medseg_nb.data.slices import Preparation, SliceDataset

PICTURES = ["skin-lesion", "brain-tumour", "brain-tumour-types"]


@pytest.fixture(autouse=True)
def drawn_heads(monkeypatch): monkeypatch.delenv("MEDSEG_DATA", raising=False)


def test_the_kinds_are_there():
    assert PICTURES == [kind for kind, what in PHANTOM_KINDS.items() if what.picture]


@pytest.mark.parametrize("kind", PICTURES)
def test_same_seed_same_bytes_and_the_collection_loads(kind, tmp_path):
    here, there = (make_phantom(kind, 4, 5, tmp_path/name, shape=(32, 40, 1)) for name in ("here", "there"))
    files = sorted(p.relative_to(here) for p in here.rglob("*") if p.is_file())
    assert all((here/f).read_bytes() == (there/f).read_bytes() for f in files)
    assert len(files) == 1 + 4*(1 + (len(PHANTOM_KINDS[kind].channels) or 1))
    collection = load_collection(here)
    assert len(collection) == 4 and list(collection.classes.values()) == ["background", *PHANTOM_KINDS[kind].classes]
    for case in collection.cases:
        assert nib.load(case.label).shape == nib.load(case.images[0]).shape == (32, 40, 1) and np.asarray(nib.load(case.label).dataobj).any()
    assert make_phantom(kind, 4, 5, here, shape=(32, 40, 1)) == here                     # made already
    (here/files[-1]).unlink()
    with pytest.raises(DatasetError, match="something else"): make_phantom(kind, 4, 5, here, shape=(32, 40, 1))


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("shape", [(32, 32, 8), (2, 32, 1), (32, 32)])
def test_shapes_that_are_no_picture_are_refused(kind, shape, tmp_path):
    with pytest.raises(ShapeError): make_phantom(kind, 2, 0, tmp_path/"p", shape=shape)
    assert not (tmp_path/"p").exists()


def test_photographs_are_three_channels_for_the_loader(tmp_path):
    collection = load_collection(make_phantom("skin-lesion", 3, 0, tmp_path/"skin", shape=(30, 40, 1)))
    x, y = SliceDataset(collection, preparation=Preparation(), cache=tmp_path/"cache")[0]
    assert x.shape == (3, 48, 48) and set(np.unique(y)) == {0, 1}
    assert json.loads((tmp_path/"skin"/"dataset.json").read_text())["channel_names"] == {"0": "red", "1": "green", "2": "blue"}


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 3), st.floats(0, 2), st.floats(0.1, 1))
def test_melanin_browns_and_blood_reddens(melanin, blood, light):
    here, browner, redder = skin_colour(melanin, blood, light), skin_colour(melanin + 0.1, blood, light), skin_colour(melanin, blood + 0.1, light)
    assert here.shape == (3,) and (here <= light).all() and (here > 0).all()
    lost = 1 - browner/here                                                                # the share swallowed: blue most
    assert lost[0] < lost[1] < lost[2]
    assert (redder/here)[0] > (redder/here)[1:].max()                                      # blood lets red pass
    np.testing.assert_allclose(skin_colour(melanin + 0.3, blood, light), skin_colour(melanin, blood, light)*skin_colour(0.3, 0))    # layers multiply


def test_a_lesion_is_darker_than_the_skin_around_it_and_hairs_carry_no_label():
    for i in range(6):
        image, label = draw_skin(np.random.default_rng(i), (48, 64))
        assert image.shape == (48, 64, 3) and image.dtype == label.dtype == np.uint8 and 0 < label.mean() < 2*LESION_AREA[1]
        middle = np.s_[12:36, 16:48]                                                       # corners are dark, too
        if (label[middle] == 0).any() and label[middle].any(): assert image[middle][label[middle] == 1].mean() < image[middle][label[middle] == 0].mean()
    assert not draw_hairs(np.random.default_rng(0), (20, 30), 0, 1.0).any() and draw_hairs(np.random.default_rng(0), (20, 30), 5, 1.0).max() <= 1


def test_depth_is_positive_inside_and_one_at_most():
    grid = np.meshgrid(np.arange(-20, 20) + .5, np.arange(-30, 30) + .5, indexing="ij")
    for i in range(10):
        depth = lesion_depth(np.random.default_rng(i), *grid)
        assert depth.max() <= 1 and (depth > 0).any() and (depth < 0).any()


def test_two_slices_of_a_person_show_one_tumour_of_one_scan():
    (a, la), (b, lb) = (draw_case("brain-tumour-types", i, 0, (32, 32, 1)) for i in (0, 1))
    assert np.allclose(a.header.get_zooms(), b.header.get_zooms()) and np.allclose(a.affine[:2], b.affine[:2]) and a.affine[2, 3] != b.affine[2, 3]
    kinds = {int(np.asarray(x.dataobj).max()) for x in (la, lb)}
    assert kinds == {1 + TUMOURS.index(tumour_kind(0, 0))}
    assert (np.asarray(la.dataobj) > 0).sum() >= (np.asarray(lb.dataobj) > 0).sum() > 0    # the largest first
    binary = draw_case("brain-tumour", 0, 0, (32, 32, 1))
    assert (np.asarray(binary[0].dataobj) == np.asarray(a.dataobj)).all() and set(np.unique(binary[1].dataobj)) == {0, 1}


@pytest.mark.parametrize("seed", range(3))
def test_three_neighbours_have_three_tumours(seed):
    assert [{tumour_kind(3*k + i, seed) for i in range(3)} for k in range(3)] == [set(TUMOURS)]*3


def test_people_are_not_divided(tmp_path):
    parts = split_cases(load_collection(make_phantom("brain-tumour", 8, 0, tmp_path/"p", shape=(24, 24, 1))))
    people = [{subject_of(c.id) for c in cases} for cases in parts.values()]
    assert sum(map(len, people)) == len(set.union(*people)) == 4


def test_from_the_command_line(tmp_path, capsys):
    assert main(["phantom", "skin-lesion", "--cases", "2", "--shape", "24x32x1", "--out", str(tmp_path/"skin")]) == 0
    assert main(["phantom", "skin-lesion", "--cases", "2", "--shape", "24x32x4", "--out", str(tmp_path/"thick")]) == 2
    assert "then 1" in capsys.readouterr().err and not (tmp_path/"thick").exists()
