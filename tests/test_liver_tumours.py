"Liver-tumour phantoms: shares, numbers and contrast as documented, lesions inside the liver and apart, the same bytes every time."

import hashlib
import json
from itertools import combinations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt, label

from medseg_nb.data import LIVER_TUMOUR, PHANTOM_KINDS, load_collection, make_phantom, split_cases
from medseg_nb.data.liver_tumours import (
    LESION_DROP,
    LESION_SHARE,
    MOST_LESIONS,
    add_lesions,
    blob_distance,
    blob_level,
    draw_liver_tumours,
    lesion_count,
    lesion_shares,
    liver_numbers,
)
from medseg_nb.data.phantoms import TISSUES, Scene, draw_case, random_stream
from medseg_nb.evaluation.lesions import components

KIND, SMALL = "liver-tumour-ct", (24, 24, 8)


def arrays(index, seed=0, shape=None):
    return tuple(np.asarray(part.dataobj) for part in draw_case(KIND, index, seed, shape))


@pytest.fixture(scope="module")
def block():
    "Three cases at the kind's own size: 2, 0 and 5 lesions."
    return [arrays(i) for i in range(3)]


def test_the_kind_is_an_abdomen_with_two_classes():
    kind, belly = PHANTOM_KINDS[KIND], PHANTOM_KINDS["abdomen-ct"]
    assert kind.classes == tuple(LIVER_TUMOUR) == ("liver", "tumour")
    assert (kind.shape, kind.size, kind.modality) == (belly.shape, belly.size, "CT")


def test_documented_shares_and_numbers(block):
    found = [components(truth == 2).max() for _, truth in block]
    assert found == [lesion_count(i, 0) for i in range(3)] == [2, 0, 5]
    for (image, truth), n in zip(block, found, strict=True):
        assert image.shape == truth.shape == PHANTOM_KINDS[KIND].shape and image.dtype == np.int16
        share = (truth == 2).sum() / (truth > 0).sum()
        assert 0.001 < share < 0.05 if n else share == 0


def test_lesions_are_a_little_darker_than_the_liver(block):
    for image, truth in block:
        if not (truth == 2).any(): continue
        around = (truth == 1) & (distance_transform_edt(truth != 0, sampling=(3.5, 3.5, 8)) > 8)  # not the fat beside it
        inside = (truth == 2) & (distance_transform_edt(truth != 0, sampling=(3.5, 3.5, 8)) > 8)
        drop = np.median(image[around]) - np.median(image[inside])
        assert 0 < drop < LESION_DROP[1] + 10, drop
        assert 6 < image[around].std() < 40  # and within the noise, more or less


def test_numbers_of_a_patient():
    for seed in range(50):
        hu = liver_numbers(np.random.default_rng(seed))
        assert LESION_DROP[0] <= hu["liver"] - hu["lesion"] <= LESION_DROP[1] and set(hu) <= set(TISSUES)


@given(st.integers(0, 5000), st.integers(0, 99))
def test_every_block_of_six_has_each_number(k, seed):
    assert sorted(lesion_count(i, seed) for i in range(6 * k, 6 * k + 6)) == list(range(6))


@given(st.integers(0, 9999), st.integers(0, MOST_LESIONS))
def test_shares(seed, n):
    shares = lesion_shares(np.random.default_rng(seed), n)
    assert shares.shape == (n,)
    if n: assert shares.min() >= LESION_SHARE[0] - 1e-12 and shares.sum() <= LESION_SHARE[1] + 1e-12


def lump(shape=(40, 40, 40), radius=28, step=1.5):
    "A liver that is a ball."
    axes = [(np.arange(n) + 0.5 - n / 2) * step for n in shape]
    scene = Scene(np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32), np.zeros(shape, np.uint8), np.zeros(shape, np.uint8), axes, 0)
    scene.label[np.square(scene.points).sum(0) < radius**2] = 1
    return scene


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.lists(st.floats(0.001, 0.02), max_size=4))
def test_lesions_have_their_size_and_stay_apart(seed, shares):
    scene = lump()
    liver = scene.label > 0
    done = add_lesions(scene, np.random.default_rng(seed), shares)
    tumour = scene.label == 2
    assert (tumour <= liver).all() and (scene.label > 0).sum() == liver.sum()  # inside, and nothing else is lost
    assert (tumour == (scene.tissue == TISSUES.index("lesion"))).all()
    wanted = [round(s * liver.sum()) for s in shares]
    assert done == len(shares) and tumour.sum() == sum(wanted)
    pieces, n = label(tumour, np.ones((3, 3, 3)))
    assert n >= done
    if n != done: return  # a lesion cut in two by the surface
    assert sorted(np.bincount(pieces.ravel())[1:]) == sorted(wanted)
    for a, b in combinations(range(1, n + 1), 2): assert distance_transform_edt(pieces != a, sampling=1.5)[pieces == b].min() > 3


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.floats(0, 0.39), st.integers(1, 6))
def test_a_blob_is_star_shaped(seed, depth, waves):
    rng = np.random.default_rng(seed)
    direction, steps = rng.standard_normal((3, 1)), np.linspace(0, 40, 60)
    ray = direction / np.linalg.norm(direction) * steps + 5
    d = blob_distance(np.random.default_rng(seed), ray, (5, 5, 5), depth, waves)
    assert d[0] == 0 and (np.diff(d) > 0).all()  # further out is further away
    assert np.allclose(d / d[-1], steps / steps[-1])  # and twice as far is twice the distance
    wanted = int(rng.integers(1, 60))
    assert (d <= blob_level(d, wanted)).sum() == wanted


@pytest.mark.parametrize("shape", [(4, 4, 4), (8, 6, 4), (16, 16, 4)])
def test_tiny_grids_do_not_break(shape):
    for i in range(6):
        image, truth = arrays(i, 3, shape)
        assert image.shape == shape and truth.max() <= 2


def test_no_room_is_said():
    assert 0 < add_lesions(lump(), np.random.default_rng(0), [0.4] * 5) < 5
    empty = lump(radius=0)
    assert add_lesions(empty, np.random.default_rng(0), [0.1]) == 0 and not empty.label.any()


def test_unlabelled_spots_of_the_abdomen_become_liver():
    lesion = TISSUES.index("lesion")
    for seed in range(8):
        scene = draw_liver_tumours(random_stream("spots", seed), (48, 48, 16), (336, 336, 192), 0)
        assert not (scene.tissue == lesion).any() and set(np.unique(scene.label)) <= {0, 1}


def test_cases_depend_on_seed_and_index_alone(tmp_path):
    folders = [make_phantom(KIND, n, seed, tmp_path / f"{n}-{seed}", shape=SMALL) for n, seed in ((3, 1), (5, 1), (3, 2))]
    digest = lambda folder, i: [hashlib.sha256((folder / part / f"{KIND}_{i:03d}.nii.gz").read_bytes()).hexdigest() for part in ("imagesTr", "labelsTr")]
    for i in range(3):
        assert digest(folders[0], i) == digest(folders[1], i)
        assert not set(digest(folders[0], i)) & set(digest(folders[2], i))


def test_as_a_collection(tmp_path):
    folder = make_phantom(KIND, 20, 0, tmp_path / "p", shape=(16, 16, 4))
    said = json.loads((folder / "dataset.json").read_text())
    assert said["labels"] == {"0": "background", "1": "liver", "2": "tumour"} and said["modality"] == {"0": "CT"} and said["licence"] == "CC0"
    collection = load_collection(folder)
    assert collection.modality == "ct" and nib.aff2axcodes(nib.load(collection.cases[0].images[0]).affine) == ("R", "A", "S")
    assert {part: len(cases) for part, cases in split_cases(collection, "80/15/5").items()} == {"train": 16, "validation": 3, "test": 1}
