"Slices and patches: exact geometry, a cache that is whole or made again, batches that repeat, labels kept true."

import json
import os

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.core import DatasetError, GeometryError, MedsegError, ShapeError
from medseg_nb.data.collections import Case, load_collection
from medseg_nb.data.phantoms import make_phantom
from medseg_nb.data.slices import (
    Augment,
    PatchDataset,
    Preparation,
    SliceDataset,
    make_loader,
    mirror,
    prepare_cases,
    prepare_image,
    repeat_edges,
    restore,
    restore_probabilities,
    slice_axis,
    slices_last,
)
from medseg_nb.data.volumes import spacing_of


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return load_collection(
        make_phantom("cardiac-mr", 4, 0, tmp_path_factory.mktemp("phantom") / "p", shape=(40, 36, 6)), check=False
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def image_of(shape=(7, 9, 5), spacing=(1, 1.5, 4), seed=0):
    data = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return nib.Nifti1Image(data, np.diag([*spacing, 1]))


# geometry ------------------------------

orders = st.permutations([0, 1, 2]).flatmap(
    lambda p: st.tuples(st.just(p), st.tuples(*[st.sampled_from([1, -1])] * 3))
)


@settings(max_examples=30, deadline=None)
@given(turn=orders, spacing=st.sampled_from([(1, 1, 4), (1, 2, 1.5), (3, 1, 1)]))
def test_orientation_on_disk_does_not_matter(turn, spacing):
    image = image_of(spacing=spacing)
    turned = image.as_reoriented(np.array(list(zip(*turn, strict=True))))
    a, b = (prepare_image([i], Preparation(intensity="none")) for i in (image, turned))
    assert np.array_equal(a, b)
    label = (a[0] > 0).astype(np.uint8)
    back = restore(label, turned, Preparation())
    assert back.shape == turned.shape and np.allclose(back.affine, turned.affine)
    assert np.array_equal(np.asarray(back.dataobj), (np.asarray(turned.dataobj) > 0))


@pytest.mark.parametrize(
    "spacing, axis", [((1, 1, 4), 2), ((4, 1, 1), 0), ((1, 1, 1), 2), ((2, 2, 1), 1), ((1, 1.0000001, 1), 2)]
)
def test_slice_axis(spacing, axis):
    assert slice_axis(spacing) == axis
    assert slice_axis(spacing_of(slices_last(image_of(spacing=spacing)))) == 2 or spacing == (2, 2, 1)


@settings(max_examples=15, deadline=None)
@given(inplane=st.integers(6, 24), spacing=st.sampled_from([None, (1.2, 1.2, 4.0), (0.7, 0.7, 2.0)]))
def test_restored_labels_lie_on_the_original_grid(inplane, spacing):
    image, preparation = image_of(), Preparation(inplane=inplane, spacing=spacing)
    prepared = prepare_image([image], preparation)
    assert prepared.shape[1:3] == (inplane, inplane)
    back = restore(np.ones(prepared.shape[1:], np.uint8), image, preparation)
    assert back.shape == image.shape and np.allclose(back.affine, image.affine)
    assert (np.asarray(back.dataobj) == 1).mean() > 0.7  # the grid's outermost voxels may lie half outside


def test_probabilities_take_the_likeliest_class():
    image, preparation = image_of(), Preparation(inplane=20)
    shape = prepare_image([image], preparation).shape[1:]
    left = np.zeros(shape, np.float32)
    left[:10] = 1
    label = np.asarray(restore_probabilities(np.stack([1 - left, left]), image, preparation).dataobj)
    assert label[:3].all() and not label[4:].any()


def test_wrong_frame_and_channels_on_two_grids():
    with pytest.raises(ShapeError, match="prepared frame"):
        restore(np.zeros((3, 3, 3), np.uint8), image_of(), Preparation())
    with pytest.raises(GeometryError, match="different grids"):
        prepare_image([image_of(), image_of(spacing=(1, 1, 1))], Preparation())
    assert prepare_image([image_of(), image_of(seed=1)], Preparation()).shape == (2, 7, 9, 5)


@pytest.mark.parametrize(
    "bad",
    [
        dict(intensity="x"),
        dict(spacing=(1, 1)),
        dict(spacing=(1, 1, 0)),
        dict(inplane=0),
        dict(dims=4),
        dict(neighbours=-1),
        dict(patch=(8, 8)),
    ],
)
def test_bad_preparations(bad):
    with pytest.raises(MedsegError):
        Preparation(**bad)


def test_preparation_survives_json():
    one = Preparation("ct", (1.0, 1.0, 3.0), 224, 3, 2, (48, 48, 24))
    assert Preparation.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    with pytest.raises(MedsegError, match="unknown"):
        Preparation.from_dict({"colour": 1})


# cache ------------------------------


def test_cache_is_used_and_repaired(collection, cache):
    case = prepare_cases(collection, collection.cases[:1], Preparation(), cache)[0]
    stamp = case.image.stat().st_mtime_ns
    assert prepare_cases(collection, collection.cases[:1], Preparation(), cache)[0] == case
    assert case.image.stat().st_mtime_ns == stamp  # not written again
    whole = case.label.read_bytes()
    case.label.write_bytes(whole[:80])
    prepare_cases(collection, collection.cases[:1], Preparation(), cache)
    assert case.label.read_bytes() == whole
    assert isinstance(case.open_image(), np.memmap)


def test_changed_source_and_changed_preparation_make_new_files(tmp_path):
    folder = make_phantom("cardiac-mr", 1, 0, tmp_path / "p", shape=(16, 16, 4))
    found = load_collection(folder, check=False)
    name = lambda p: prepare_cases(found, None, p, tmp_path / "c")[0].image.name
    first = name(Preparation())
    assert name(Preparation("percentile")) != first
    assert name(Preparation(neighbours=2, dims=3)) == first  # same volume, read otherwise
    os.utime(found.cases[0].images[0], (1, 1))
    assert name(Preparation()) != first


def test_cases_without_label_or_file(collection, cache, tmp_path):
    bare = Case("bare", collection.cases[0].images, None)
    with pytest.raises(DatasetError, match="no label"):
        prepare_cases(collection, [bare], Preparation(), cache)
    assert prepare_cases(collection, [bare], Preparation(), cache, labels=False)[0].label is None
    with pytest.raises(DatasetError, match="no cases"):
        SliceDataset(collection, [], cache=cache)
    gone = Case("gone", (tmp_path / "gone.nii.gz",), collection.cases[0].label)
    with pytest.raises(DatasetError, match="gone.nii.gz"):
        prepare_cases(collection, [gone], Preparation(), cache)


def test_label_on_another_grid(collection, cache, tmp_path):
    label = nib.load(collection.cases[0].label)
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), label.affine + np.diag([1, 0, 0, 0])), tmp_path / "l.nii.gz")
    case = Case("moved", collection.cases[0].images, tmp_path / "l.nii.gz")
    with pytest.raises(GeometryError, match="l.nii.gz"):
        prepare_cases(collection, [case], Preparation(), cache)


def test_nothing_half_written_on_a_full_disk(collection, tmp_path, monkeypatch):
    def full_disk(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(DatasetError, match="No space left"):
        prepare_cases(collection, None, Preparation(), tmp_path)
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == []


# slices ------------------------------


def test_slices_are_those_of_the_volume(collection, cache):
    data = SliceDataset(collection, cache=cache, preparation=Preparation(neighbours=1))
    assert len(data) == 4 * 6 and data.size == 48 and data.channels == 3
    volume = prepare_image(collection.cases[1].images, Preparation())[0]  # (40,36,6)
    truth = np.asarray(nib.load(collection.cases[1].label).dataobj)
    for z in range(6):
        image, label = data[6 + z]
        assert image.shape == (3, 48, 48) and image.dtype == torch.float32 and label.dtype == torch.int64
        for j, at in enumerate((max(z - 1, 0), z, min(z + 1, 5))):
            assert np.allclose(image[j, 4:44, 6:42], volume[:, :, at], atol=5e-3)
        assert np.array_equal(label[4:44, 6:42], truth[:, :, z])
        assert torch.equal(image[:, :4], image[:, 4:5].expand(-1, 4, -1)) and torch.equal(image[:, :, 42:], image[:, :, 41:42].expand(-1, -1, 6))
        assert label[:4].max() == 0


def test_many_at_once_equal_one_by_one(collection, cache):
    data = SliceDataset(collection, cache=cache)
    for (image, label), i in zip(data.__getitems__([5, 0, 17]), (5, 0, 17), strict=True):
        assert torch.equal(image, data[i][0]) and torch.equal(label, data[i][1])
    assert torch.equal(data[-1][0], data[len(data) - 1][0])
    with pytest.raises(IndexError):
        data[len(data)]
    with pytest.raises(IndexError):
        data[-len(data) - 1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=3))
def test_edges_are_repeated_as_numpy_pads(axes):
    inner = np.random.default_rng(0).random([n for n, _, _ in axes]).astype(np.float32)
    image = np.full([a + n + b for n, a, b in axes], np.nan, np.float32)
    filled = tuple(slice(a, a + n) for n, a, _ in axes)
    image[filled] = inner
    repeat_edges(image, *filled)
    assert np.array_equal(image, np.pad(inner, [(a, b) for _, a, b in axes], mode="edge"))


def test_a_smaller_size_cuts_around_the_centre(collection, cache):
    small, large = (SliceDataset(collection, size=s, cache=cache)[8] for s in (16, 48))
    assert torch.equal(small[0], large[0][:, 16:32, 16:32]) and torch.equal(small[1], large[1][16:32, 16:32])


# patches ------------------------------


def test_patches_depend_on_seed_epoch_and_item_alone(collection, cache):
    make = lambda seed=0: PatchDataset(collection, patch=(16, 16, 4), cache=cache, seed=seed)
    one, two = make(), make()
    _ = two[5]
    assert torch.equal(one[2][0], two[2][0])
    two.set_epoch(1)
    assert not torch.equal(one[2][0], two[2][0])
    assert not torch.equal(one[2][0], make(1)[2][0])
    assert len(one) == 16


def test_patches_are_cut_from_the_volume(collection, cache):
    data = PatchDataset(collection, patch=(12, 10, 4), cache=cache, foreground=0.0)
    volume = data.prepared[0].open_image().transpose(1, 2, 3, 0).astype(np.float32)[0]
    image, label = data[0]
    windows = np.lib.stride_tricks.sliding_window_view(volume, (12, 10, 4))
    place = np.argwhere((windows == image[0].numpy()).all((-1, -2, -3)))
    assert len(place) == 1
    x, y, z = place[0]
    truth = data.prepared[0].open_label().transpose(1, 2, 0)
    assert np.array_equal(label, truth[x : x + 12, y : y + 10, z : z + 4])


def test_foreground_windows_hold_a_class(collection, cache):
    data = PatchDataset(collection, patch=(8, 8, 2), per_case=20, foreground=1.0, cache=cache)
    labels = [data[i][1] for i in range(len(data))]
    assert all(y.any() for y in labels)
    seen = [sum(bool((y == c).any()) for y in labels) for c in (1, 2, 3)]
    assert min(seen) > 15  # each class is drawn about as often


def test_a_patch_larger_than_the_volume_is_filled_with_its_edge(collection, cache):
    data = PatchDataset(collection, patch=(64, 64, 16), cache=cache)
    image, label = data[3]
    assert image.shape == (1, 64, 64, 16)
    volume = torch.from_numpy(data.prepared[0].open_image().astype("float32"))      # (Z,C,X,Y)
    assert image[0, 0, 0, 0] == volume[0, 0, 0, 0] and image[0, -1, -1, -1] == volume[-1, 0, -1, -1]
    assert label.sum() == int(data.prepared[0].open_label().astype(int).sum())


# augmentation ------------------------------


def batch(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=g), torch.randint(0, 4, (shape[0], *shape[2:]), generator=g)


@pytest.mark.parametrize("shape", [(3, 2, 20, 16), (2, 1, 12, 10, 6)])
def test_augment_repeats_and_leaves_its_input_alone(shape):
    x, y = batch(shape)
    kept = x.clone(), y.clone()
    augment = Augment(flips=(0, 1), noise=0.05)
    a, b = (augment(x, y, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])
    assert a[0].shape == x.shape and a[1].shape == y.shape and a[1].dtype == y.dtype and a[0].isfinite().all()
    assert not torch.equal(augment(x, y, torch.Generator().manual_seed(3))[0], a[0])


@pytest.mark.parametrize("rotate, scale", [(0, 0), (25, 0.2)])
@pytest.mark.parametrize("shape", [(8, 1, 24, 20), (8, 1, 14, 12, 6)])
def test_image_and_label_move_together(shape, rotate, scale):
    y = batch(shape)[1].clamp_max(1)
    y = torch.nn.functional.interpolate(y[:, None, ::4, ::4].float(), size=shape[2:]).long()[:, 0]  # coarse blocks
    x, moved = Augment(flips=tuple(range(len(shape) - 2)), rotate=rotate, scale=scale, intensity=0)(
        y[:, None].float(), y
    )
    inner = (slice(None), slice(4, -4), slice(4, -4))
    differs = ((x[:, 0] > 0.5).long() != moved)[inner].float().mean()
    assert differs < 0.05  # only where 0.5 may fall either way


def test_flips_are_drawn_for_each_sample():
    x, y = batch((64, 1, 6, 6))
    a, _ = Augment(rotate=0, scale=0, intensity=0)(x, y, torch.Generator().manual_seed(0))
    kinds = [tuple(torch.equal(a[i], x[i].flip(d)) for d in ([], [1], [2], [1, 2])) for i in range(64)]
    assert all(sum(k) == 1 for k in kinds) and all(5 < n < 30 for n in np.sum(kinds, 0))


def test_both_ways_of_mirroring_agree():
    x, y = batch((6, 2, 10, 8))
    a, b = (Augment(rotate=r, scale=0, intensity=0)(x, y, torch.Generator().manual_seed(1)) for r in (0, 1e-7))
    assert torch.allclose(a[0], b[0], atol=1e-5) and torch.equal(a[1], b[1])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), intensity=st.floats(0.01, 0.3))
def test_intensity_keeps_the_order_of_values(seed, intensity):
    x = torch.linspace(-3, 5, 50).reshape(1, 1, 50, 1)
    a, _ = Augment(flips=(), rotate=0, scale=0, intensity=intensity)(
        x, x[:, 0].long(), torch.Generator().manual_seed(seed)
    )
    assert (a[0, 0, 1:, 0] > a[0, 0, :-1, 0]).all()


def test_constant_images_stay_finite():
    x = torch.full((2, 1, 8, 8), 3.0)
    a, _ = Augment(noise=0.1)(x, torch.zeros(2, 8, 8, dtype=torch.long))
    assert a.isfinite().all() and (a - 3).abs().max() < 1e-3


def test_mirror_of_channels_and_axes():
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert torch.equal(mirror(x, torch.tensor([[-1, 1]])), x.flip(2))
    assert torch.equal(mirror(x, torch.tensor([[-1, -1]])), x.flip(2, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_augment_is_the_same_on_a_gpu():
    x, y = batch((3, 1, 24, 20))
    here = Augment(noise=0.02)(x, y, torch.Generator().manual_seed(0))
    there = Augment(noise=0.02)(x.cuda(), y.cuda(), torch.Generator().manual_seed(0))
    assert torch.allclose(here[0], there[0].cpu(), atol=1e-4)


# loader ------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_repeats_an_epoch(collection, cache, workers):
    data = PatchDataset(collection, patch=(8, 8, 4), cache=cache)
    run = lambda loader: torch.cat([x for x, _ in loader])
    loader = make_loader(data, 3, seed=1, workers=workers)
    first = run(loader)
    loader.sampler.set_epoch(2)
    third = run(loader)
    assert not torch.equal(first, third)
    assert torch.equal(
        run(make_loader(PatchDataset(collection, patch=(8, 8, 4), cache=cache), 3, seed=1, epoch=2)), third
    )


def test_loader_order(collection, cache):
    data = SliceDataset(collection, cache=cache)
    assert list(make_loader(data, 5, shuffle=False).sampler) == list(range(24))
    order = list(make_loader(data, 5, seed=3).sampler)
    assert (
        sorted(order) == list(range(24))
        and order != list(range(24))
        and order != list(make_loader(data, 5, seed=4).sampler)
    )
    assert [len(x) for x, _ in make_loader(data, 5, drop_last=True)] == [5] * 4
    assert [len(x) for x, _ in make_loader(data, 5)] == [5] * 4 + [4]
