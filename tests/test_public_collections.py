"""The papers' own data: replicas of the official archives, read by others and by us; split, resumed, broken in every way that downloads break."""
import gzip
import json
import locale
import re
import shutil
import signal
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from common import run_child
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medseg_nb.cli import main
from medseg_nb.core import DatasetError, GeometryError, LabelError, MedsegError, find_collection
from medseg_nb.data import (
    COLLECTIONS,
    check_layout,
    describe_collection,
    list_collections,
    load_collection,
    load_modalities,
    prepare_collection,
    split_cases,
    write_replica,
)
from medseg_nb.data.official_layouts import (
    BTCV,
    CHAOS_MR,
    ISIC,
    REPLICAS,
    TRANSUNET_TEST,
    Written,
    list_files,
    read_codes,
    read_info,
    read_series,
    recode,
    simpleitk,
    take_inventory,
)
from medseg_nb.data.public_collections import divide_people, make_splits

CASES = 4   # of each part; slices of bts
ARCHIVE = {name: name for name in COLLECTIONS} | {"bts-types": "bts"}
FILES = {"synapse": 4, "acdc": 8, "isic2018": 4, "bts": 4, "bts-types": 4, "mmwhs": 4, "chaos": 4, "lits": 4}   # cases of each part written


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "A replica of every archive."
    root = tmp_path_factory.mktemp("archives")
    for name in REPLICAS: write_replica(name, root/name, 6 if name == "bts" else CASES)
    return root


@pytest.fixture(scope="module")
def prepared(archives, tmp_path_factory):
    "Every collection, prepared once."
    root = tmp_path_factory.mktemp("prepared")
    for name in COLLECTIONS: prepare_collection(name, archives/ARCHIVE[name], root/name, workers=2, partial=True)
    return root


@pytest.fixture
def copy(archives, tmp_path):
    "A function that gives a copy of an archive that may be broken."
    def of(name): return Path(shutil.copytree(archives/name, tmp_path/"raw"))
    return of


def data(path): return np.asarray(nib.load(path).dataobj)


def contents(folder):
    "What a folder of volumes holds, decompressed: gzip notes the time."
    return {str(p.relative_to(folder)): gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file() and p.parent.name != ".prepared"}


@pytest.mark.parametrize("name", COLLECTIONS)
def test_what_comes_out_is_a_collection(prepared, name):
    known = COLLECTIONS[name]
    for part, (classes, channels) in known.parts.items():
        collection = load_collection(prepared/name/part)                   # opens every label, compares every grid
        assert list(collection.classes.values()) == ["background", *classes] and list(collection.channels.values()) == list(channels)
        assert len(collection) == FILES[name] + 2*name.startswith("bts")
        assert known.licence in collection.description and "of the archive" in collection.description
        found = json.loads((prepared/name/part/"splits.json").read_text())
        assert found.pop("from") == known.split.origin and sorted(id for ids in found.values() for id in ids) == sorted(c.id for c in collection.cases)
        if name != "synapse": split_cases(collection, "file")              # no person in two parts, no part empty
        everything = np.unique(np.concatenate([np.unique(data(c.label)) for c in collection.cases]))
        assert set(everything) == set(collection.classes)


def test_organs_of_synapse(archives, prepared):
    "Ids read by hand; the image is the very file."
    mine = {1: 7, 2: 4, 3: 3, 4: 2, 6: 5, 7: 8, 8: 1, 11: 6}               # spleen, right kidney, left kidney, gallbladder, liver, stomach, aorta, pancreas
    names = list(load_collection(prepared/"synapse", check=False).classes.values())
    assert names[7] == "spleen" and names[4] == "kidney R" and names[3] == "kidney L" and names[1] == "aorta"
    for file in sorted((archives/"synapse/RawData/Training/label").iterdir()):
        key = file.name[5:9]
        old, new = data(file), data(prepared/f"synapse/labelsTr/synapse_{key}.nii.gz")
        assert 9 in old and np.array_equal(np.vectorize(lambda v: mine.get(v, 0))(old), new)
        assert (prepared/f"synapse/imagesTr/synapse_{key}_0000.nii.gz").read_bytes() == (file.parent.parent/f"img/img{key}.nii.gz").read_bytes()


def test_transunet_is_the_window_of_the_same_volume(archives, tmp_path):
    out = prepare_collection("synapse", archives/"synapse-transunet", tmp_path/"out", partial=True)
    collection = load_collection(out)
    assert "spacing unknown" in collection.description and len(collection) == 2*CASES
    with h5py.File(archives/f"synapse-transunet/test_vol_h5/case{TRANSUNET_TEST.keys[0]}.npy.h5") as f: x, y = f["image"][()], f["label"][()]
    case = collection.case(f"synapse_{TRANSUNET_TEST.keys[0]}")
    again = (np.clip(data(case.images[0]), -125, 275) + 125)/400           # the window that a CT gets later
    np.testing.assert_allclose(again.transpose(2, 0, 1), x, atol=1e-6)
    assert np.array_equal(data(case.label).transpose(2, 0, 1), y)


def test_frames_of_acdc(archives, prepared):
    "End diastole and end systole as Info.cfg says, and no other frame."
    for home in sorted((archives/"acdc/training").iterdir()):
        info = read_info(home/"Info.cfg")
        assert (home/f"{home.name}_4d.nii.gz").is_file()
        for moment in ("ED", "ES"):
            id = f"{home.name}_frame{info[moment]:02d}"
            assert np.array_equal(data(home/f"{id}_gt.nii.gz"), data(prepared/f"acdc/labelsTr/{id}.nii.gz"))
    assert len(list((prepared/"acdc/labelsTr").iterdir())) == 2*CASES


def test_slices_of_bts(archives, prepared):
    "Transposed as MATLAB shows them, a class for the tumour or for its type, two slices a person."
    for file in sorted((archives/"bts").glob("*.mat")):
        assert file.read_bytes()[:10] == b"MATLAB 7.3"
        with h5py.File(file) as f:
            mask, kind, person = f["cjdata/tumorMask"][()], int(f["cjdata/label"][0, 0]), "".join(chr(int(c[0])) for c in f["cjdata/PID"])
        id = f"{person}-IM-{int(file.stem):04d}"
        assert np.array_equal(data(prepared/f"bts/labelsTr/{id}.nii.gz")[..., 0], mask.T)
        assert np.array_equal(data(prepared/f"bts-types/labelsTr/{id}.nii.gz")[..., 0], kind*mask.T)
    frame = describe_collection(prepared/"bts").cases
    assert (frame.groupby("person").size() == 2).all() and (frame.groupby("person").part.nunique() == 1).all()


def test_sizes_of_pictures_are_kept(archives, prepared):
    shapes = set()
    for file in sorted(archives.glob("isic2018/*Input/*.jpg")):
        x, y = np.asarray(Image.open(file)), np.asarray(Image.open(archives/f"isic2018/ISIC2018_Task1_Training_GroundTruth/{file.stem}_segmentation.png"))
        for c in range(3): assert np.array_equal(data(prepared/f"isic2018/imagesTr/{file.stem}_{c:04d}.nii.gz")[..., 0], x[..., c])
        assert np.array_equal(data(prepared/f"isic2018/labelsTr/{file.stem}.nii.gz")[..., 0], y == 255)
        shapes.add(y.shape)
    assert len(shapes) > 1


def test_the_stray_code_of_mmwhs(archives, prepared):
    seen = set()
    for file in sorted((archives/"mmwhs/ct_train").glob("*label*")):
        old, new = data(file), data(prepared/f"mmwhs/ct/labelsTr/{file.name[:13]}.nii.gz")
        seen |= set(np.unique(old))
        for code, id in {205: 1, 420: 2, 421: 2, 500: 3, 820: 4, 550: 0, 600: 0, 850: 0, 0: 0}.items(): assert (new[old == code] == id).all()
    assert {420, 421} <= seen


def test_lits_is_compressed_and_nothing_else(archives, prepared):
    for file in archives.rglob("volume-*.nii"):
        assert gzip.decompress((prepared/f"lits/imagesTr/lits_{int(file.stem[7:]):03d}_0000.nii.gz").read_bytes()) == file.read_bytes()


@pytest.mark.parametrize("part,home", [("mr", "MR/{}/T2SPIR"), ("ct", "CT/{}")])
def test_series_as_others_read_them(archives, prepared, part, home):
    "SimpleITK's series reader finds the same values at the same places; the pictures lie on the slices whose name they bear."
    for label in sorted((prepared/f"chaos/{part}/labelsTr").iterdir()):
        key = re.search(r"_(\d+)\.nii", label.name)[1]
        folder = archives/"chaos/Train_Sets"/home.format(key)
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder/"DICOM_anon"))
        other, img = sitk.ReadImage(names), nib.load(prepared/f"chaos/{part}/imagesTr/chaos_{part}_{key}_0000.nii.gz")
        assert np.array_equal(np.asarray(img.dataobj).transpose(2, 1, 0), sitk.GetArrayFromImage(other))
        for voxel in ((0, 0, 0), (3, 1, 2), (31, 31, 9)):
            np.testing.assert_allclose((img.affine @ [*voxel, 1])[:3]*[-1, -1, 1], other.TransformIndexToPhysicalPoint(voxel), atol=1e-3)
        for k, file in enumerate(names):
            mask = np.asarray(Image.open(folder/"Ground"/(f"{Path(file).stem}.png" if part == "mr" else f"liver_GT_{int(Path(file).name[1:5]):03d}.png")))
            ids = np.array([0, 1, 2, 3, 4])[mask // 63] if part == "mr" else mask // 255
            assert np.array_equal(data(label)[:, :, k].T, ids)


def test_affine_as_pydicom_says(archives):
    "Position, orientation and spacing of the headers, put together by hand."
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
    files = sorted((archives/"chaos/Train_Sets/MR/1/T2SPIR/DICOM_anon").iterdir())
    img, ordered = read_series(files)
    headers = [pydicom.dcmread(f) for f in ordered]
    for k in (0, 4, 9):
        header = headers[k]
        row, column = np.array(header.ImageOrientationPatient[:3], float), np.array(header.ImageOrientationPatient[3:], float)
        place = np.array(header.ImagePositionPatient, float) + 7*row*header.PixelSpacing[1] + 2*column*header.PixelSpacing[0]
        np.testing.assert_allclose((img.affine @ [7, 2, k, 1])[:3], place*[-1, -1, 1], atol=1e-3)
        assert np.array_equal(np.asarray(img.dataobj)[:, :, k].T, header.pixel_array)


def test_dicom_leaves_the_locale_alone(archives, tmp_path):
    "After SimpleITK alone has written DICOM, text files would be read as ASCII."
    before = locale.setlocale(locale.LC_ALL)
    prepare_collection("chaos", write_replica("chaos", tmp_path/"raw", 3), tmp_path/"out", workers=4, partial=True)
    assert locale.setlocale(locale.LC_ALL) == before


# ---- splits

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=3, max_size=120), st.integers(0, 9), st.sampled_from([(70, 10, 20), (80, 15, 5)]))
def test_people_are_dealt_out_evenly(groups, seed, percent):
    people = {f"p{i:03d}": g for i, g in enumerate(groups)}
    part = divide_people(people, percent, seed)
    n = {p: sum(v == p for v in part.values()) for p in ("train", "validation", "test")}
    assert [n["validation"], n["test"]] == [max(1, round(share/100*len(people))) for share in percent[1:]] and sum(n.values()) == len(people)
    assert part == divide_people(dict(reversed(people.items())), percent, seed)
    for g in set(groups):
        size, tested = groups.count(g), sum(part[p] == "test" for p in people if people[p] == g)
        assert abs(tested - n["test"]*size/len(people)) <= 1


def test_the_papers_numbers():
    acdc = divide_people({f"patient{i:03d}": i % 5 for i in range(100)}, COLLECTIONS["acdc"].split.percent)
    for group in range(5):
        found = [acdc[f"patient{i:03d}"] for i in range(group, 100, 5)]
        assert [found.count(part) for part in ("train", "validation", "test")] == [14, 2, 4]
    lits = list(divide_people({str(i): "" for i in range(131)}, COLLECTIONS["lits"].split.percent).values())
    assert [lits.count(p) for p in ("train", "validation", "test")] == [104, 20, 7]
    hearts = list(divide_people({str(i): "" for i in range(20)}, COLLECTIONS["mmwhs"].split.percent).values())
    assert [hearts.count(p) for p in ("train", "validation", "test")] == [14, 2, 4]


def test_named_cases_of_synapse():
    written = [Written(f"synapse_{key}", f"synapse_{key}") for key in BTCV.keys]
    split = make_splits(COLLECTIONS["synapse"].split, written)
    numbers = {part: [id[-4:] for id in split[part]] for part in ("train", "validation", "test")}
    assert numbers["test"] == "0001 0002 0003 0004 0008 0022 0025 0029 0032 0035 0036 0038".split()
    eighteen = "0005 0006 0007 0009 0010 0021 0023 0024 0026 0027 0028 0030 0031 0033 0034 0037 0039 0040".split()
    assert numbers["train"] + numbers["validation"] == eighteen and numbers["validation"] == ["0039", "0040"]


# ---- resuming

def stamps(folder): return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize("name", ["isic2018", "mmwhs"])
def test_a_second_run_does_nothing(archives, tmp_path, name):
    out = prepare_collection(name, archives/name, tmp_path/"out", partial=True)
    before = stamps(out)
    prepare_collection(name, archives/name, out, partial=True)
    assert stamps(out) == before


def test_what_is_new_is_added(copy, tmp_path):
    raw = copy("lits")
    late = [p for p in raw.rglob("*-0.nii")]
    kept = {p: p.read_bytes() for p in late}
    for p in late: p.unlink()
    out = prepare_collection("lits", raw, tmp_path/"out", partial=True)
    before = stamps(out/"labelsTr")
    assert len(load_collection(out)) == CASES - 1
    for p, content in kept.items(): p.write_bytes(content)
    assert len(load_collection(prepare_collection("lits", raw, out, partial=True))) == CASES
    now = stamps(out/"labelsTr")
    assert before.items() <= now.items() and len(now) == len(before) + 1


def test_a_frame_that_is_named_no_more_goes(copy, tmp_path):
    "Info.cfg is corrected: what was made of the wrong frame does not stay."
    raw = copy("acdc")
    out = prepare_collection("acdc", raw, tmp_path/"out", partial=True)
    home = raw/"training/patient001"
    for end in ("", "_gt"): (home/f"patient001_frame07{end}.nii.gz").rename(home/f"patient001_frame09{end}.nii.gz")
    edit(home/"Info.cfg", "ES: 7", "ES: 9 ")
    names = {c.id for c in load_collection(prepare_collection("acdc", raw, out, partial=True)).cases}
    assert "patient001_frame09" in names and "patient001_frame07" not in names and len(names) == 2*CASES


def test_what_is_lost_and_cannot_be_made_again(copy, tmp_path):
    "A label map is gone from the folder, its case in the archive is damaged: the rest is still a collection."
    raw = copy("lits")
    out = prepare_collection("lits", raw, tmp_path/"out", partial=True)
    (out/"labelsTr/lits_000.nii.gz").unlink(); (out/"imagesTr/lits_000_0000.nii.gz").unlink()
    first(raw, "volume-0.nii").write_bytes(b"x")
    with pytest.raises(DatasetError, match="truncated"): prepare_collection("lits", raw, out, partial=True)
    assert len(load_collection(out)) == CASES - 1


def test_links_are_followed(copy, tmp_path):
    raw = copy("lits")
    (tmp_path/"linked").mkdir()
    for folder in raw.iterdir(): (tmp_path/"linked"/folder.name).symlink_to(folder, target_is_directory=True)
    assert len(check_layout("lits", tmp_path/"linked")[0].cases) == CASES


def test_no_workers(archives, tmp_path):
    with pytest.raises(MedsegError, match="at a time"): prepare_collection("lits", archives/"lits", tmp_path/"out", workers=-1, partial=True)


KILLED = """
import json, sys
from common import die
from medseg_nb.data import official_layouts, public_collections
job = json.loads(sys.argv[1])
save, count = official_layouts.save_volume, iter(range(1000))
def counted(*args, **kwargs):
    if next(count) == job["at"]: die()
    return save(*args, **kwargs)
official_layouts.save_volume = counted
public_collections.prepare_collection("chaos", job["raw"], job["out"], workers=1, partial=True)
"""


def test_killed_and_taken_up_again(archives, tmp_path):
    at = 5                                                                 # two volumes a case: in the midst of the third
    whole = prepare_collection("chaos", archives/"chaos", tmp_path/"whole", partial=True)
    job = dict(raw=str(archives/"chaos"), out=str(tmp_path/"broken"), at=at)
    assert run_child(tmp_path/"child.py", KILLED, job).returncode == -signal.SIGKILL
    left = stamps(tmp_path/"broken/mr/labelsTr") if (tmp_path/"broken/mr/labelsTr").is_dir() else {}
    broken = prepare_collection("chaos", archives/"chaos", tmp_path/"broken", partial=True)
    assert len(left) == at//2 and left.items() <= stamps(broken/"mr/labelsTr").items()     # what was done was left alone
    assert contents(broken) == contents(whole) and not list(broken.rglob("*half-*"))


# ---- bad input: what is done to an archive, what is said

def edit(path, old, new): path.write_text(path.read_text().replace(old, new))


def change_mat(path, field, value):
    with h5py.File(path, "r+") as f:
        del f[f"cjdata/{field}"]
        if value is not None: f[f"cjdata/{field}"] = value


def regrid(path, change):
    img = nib.load(path)
    shape, affine = change(img.shape, img.affine.copy())
    nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), affine), path)


def sixteen_bits(path):
    x = np.asarray(Image.open(path)).astype(np.uint16)
    Image.fromarray(x*257 - (x > 0)).save(path)


def off_by_one(path, value):
    x = np.asarray(Image.open(path)).copy()
    x[0, 0] = value
    Image.fromarray(x).save(path)


def thirteen_organs(path): np.savez(path, image=np.zeros((32, 32), np.float32), label=np.full((32, 32), 13.0))


def rewrite(path, change, affine=None):
    "Other voxels, or another affine."
    img = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(img.dataobj)).astype(np.int32), img.affine if affine is None else affine(img.affine)), path)


def first(raw, pattern): return sorted(raw.rglob(pattern))[0]


def double(raw, pattern):
    file = first(raw, pattern)
    shutil.copy(file, file.with_stem(f"{file.stem} (1)"))
    mask = file.parent.parent/"Ground"/f"{file.stem}.png"
    shutil.copy(mask, mask.with_stem(f"{mask.stem} (1)"))


def change_spacing(file, spacing):
    with simpleitk() as itk:
        image = itk.ReadImage(str(file))
        for tag in ("0008|0060", "0020|000d", "0020|000e", "0020|0013", "0020|0032", "0020|0037"): image.SetMetaData(tag, image.GetMetaData(tag))
        image.SetSpacing(spacing)
        writer = itk.ImageFileWriter(); writer.KeepOriginalImageUIDOn(); writer.SetFileName(str(file)); writer.Execute(image)


def lose_slice(raw):
    for p in raw.rglob("MR/1/T2SPIR/*/IMG-0004-00005.*"): p.unlink()


IN_ONE_CASE = {   # one case is damaged: (archive, what is done, kind of error, the file named, what is said)
    "Info.cfg without ED": ("acdc", lambda raw: edit(first(raw, "Info.cfg"), "ED: 1\n", ""), DatasetError, "Info.cfg", "does not say ED"),
    "Info.cfg names another frame": ("acdc", lambda raw: edit(first(raw, "Info.cfg"), "ED: 1\n", "ED: 3\n"),
        DatasetError, "frame03.nii.gz", "Info.cfg calls ED"),
    "a mask of another size": ("isic2018", lambda raw: Image.new("L", (7, 5)).save(first(raw, "*_segmentation.png")),
        GeometryError, "_segmentation.png", "differ in size"),
    "a label of another size": ("synapse", lambda raw: regrid(first(raw, "label0*"), lambda s, a: ((*s[:2], s[2] - 1), a)),
        GeometryError, "label0001.nii.gz", "differ in size"),
    "a label of another spacing": ("mmwhs", lambda raw: regrid(first(raw, "ct*label*"), lambda s, a: (s, a*1.2)),
        GeometryError, "_label.nii.gz", "differ in spacing"),
    "a flipped label": ("lits", lambda raw: regrid(first(raw, "segm*"), lambda s, a: (s, a @ np.diag([1, -1, 1, 1]))),
        GeometryError, "segmentation-", "orientation"),
    "an undeclared organ": ("synapse", lambda raw: rewrite(first(raw, "label0*"), lambda y: np.where(y == 9, 14, y)),
        LabelError, "label0001.nii.gz", "does not declare"),
    "a truncated volume": ("lits", lambda raw: first(raw, "volume*").write_bytes(first(raw, "volume*").read_bytes()[:900]),
        DatasetError, "volume-0.nii", "truncated"),
    "a missing slice": ("chaos", lose_slice, GeometryError, ".dcm", "one is missing"),
    "a doubled slice": ("chaos", lambda raw: double(raw, "MR/1/T2SPIR/DICOM_anon/*00004.dcm"), GeometryError, "IMG-0004-00004", "where another slice"),
    "a slice without picture": ("chaos", lambda raw: first(raw, "MR/1/T2SPIR/Ground/*.png").unlink(), DatasetError, ".dcm", "no label picture"),
    "mixed spacings": ("chaos", lambda raw: change_spacing(first(raw, "MR/1/T2SPIR/DICOM_anon/*00004.dcm"), (3.0, 3.0, 5.0)),
        GeometryError, "00004.dcm", "does not fit the other slices"),
    "a damaged slice": ("chaos", lambda raw: first(raw, "MR/1/T2SPIR/DICOM_anon/*").write_bytes(b"x"*200), DatasetError, ".dcm", "cannot be read as DICOM"),
    "16 bits, off by one": ("chaos", lambda raw: sixteen_bits(first(raw, "MR/1/T2SPIR/Ground/*.png")), LabelError, ".png", "8 bits"),
    "16 bits, off by one, of skin": ("isic2018", lambda raw: sixteen_bits(first(raw, "*_segmentation.png")), LabelError, "_segmentation.png", "no class ids"),
    "a code between the organs": ("chaos", lambda raw: off_by_one(first(raw, "MR/1/T2SPIR/Ground/*.png"), 90), LabelError, ".png", "does not declare"),
    "a picture that is none": ("isic2018", lambda raw: first(raw, "*.jpg").write_bytes(b"\xff\xd8nothing"),
        DatasetError, ".jpg", "cannot be read as a picture"),
    "a corrupt .mat": ("bts", lambda raw: first(raw, "1.mat").write_bytes(first(raw, "1.mat").read_bytes()[:3000]), DatasetError, "1.mat", "MATLAB v7.3"),
    "an old .mat": ("bts", lambda raw: first(raw, "1.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(2000)), DatasetError, "1.mat", "MATLAB v7.3"),
    "a .mat without PID": ("bts", lambda raw: change_mat(first(raw, "1.mat"), "PID", None), DatasetError, "1.mat", "lacks a field"),
    "a .mat of no tumour type": ("bts", lambda raw: change_mat(first(raw, "1.mat"), "label", np.array([[4.0]])), LabelError, "1.mat", "no tumour type"),
    "a .mat with another mask": ("bts", lambda raw: change_mat(first(raw, "1.mat"), "tumorMask", np.zeros((3, 3), np.uint8)),
        GeometryError, "1.mat", "differ in size"),
    "a lost npz": ("synapse-transunet", lambda raw: first(raw, "*_slice003.npz").unlink(), DatasetError, "_slice004.npz", "before this one"),
    "14 classes": ("synapse-transunet", lambda raw: thirteen_organs(first(raw, "*_slice003.npz")), LabelError, "slice000.npz", "does not declare"),
}


@pytest.mark.parametrize("fault", IN_ONE_CASE)
def test_a_damaged_case_is_named_and_the_others_are_done(copy, tmp_path, fault):
    archive, damage, kind, file, said = IN_ONE_CASE[fault]
    raw = copy(archive)
    damage(raw)
    name, out = archive.split("-")[0], tmp_path/"out"
    with pytest.raises(kind, match=said) as caught: prepare_collection(name, raw, out, partial=True)
    assert caught.value.file and file in Path(caught.value.file).name and Path(caught.value.file).is_relative_to(raw) and caught.value.fix
    assert "other" in str(caught.value) and "same command again" in str(caught.value)
    part = out/next(iter(COLLECTIONS[name].parts)) if name != "chaos" else out/"mr"
    assert len(load_collection(part)) >= 3                                 # what was done is a collection
    assert not list(out.rglob("*half-*"))


def rename(raw, pattern, new): (lambda p: p.rename(p.with_name(new(p.name))))(first(raw, pattern))


WHOLE = {   # the archive as a whole is not as it should be
    "half unpacked": ("acdc", lambda raw: shutil.rmtree(first(raw, "patient001")), "is not whole"),
    "a label is missing": ("synapse", lambda raw: first(raw, "label0*").unlink(), "label0001.nii.gz"),
    "renamed by a file manager": ("synapse", lambda raw: rename(raw, "img0*", lambda n: n.replace(".nii", " (1).nii")), "expected img0001.nii.gz"),
    "renamed to a copy": ("lits", lambda raw: rename(raw, "volume*", lambda n: f"Copy of {n}"), "expected volume-0.nii"),
    "there twice": ("lits", lambda raw: shutil.copy(first(raw, "volume*"), raw), "is there twice"),
    "labels not unpacked": ("synapse", lambda raw: shutil.rmtree(raw/"RawData/Training/label"), "no complete case"),
    "another archive": ("bts", lambda raw: [p.rename(p.with_suffix(".txt")) for p in raw.glob("*.mat")], "holds nothing of bts"),
}


@pytest.mark.parametrize("fault", WHOLE)
def test_an_archive_that_is_not_whole_is_refused(copy, tmp_path, fault):
    archive, damage, said = WHOLE[fault]
    raw = copy(archive)
    damage(raw)
    with pytest.raises(DatasetError, match=re.escape(said)) as caught: prepare_collection(archive, raw, tmp_path/"out")
    assert caught.value.fix and not (tmp_path/"out").exists()


def test_packed_missing_and_strange(tmp_path):
    with pytest.raises(DatasetError, match="is not a folder"): check_layout("acdc", tmp_path/"nowhere")
    (tmp_path/"a.zip").write_bytes(b"PK")
    with pytest.raises(DatasetError, match="still packed"): check_layout("acdc", tmp_path)
    with pytest.raises(DatasetError, match="no public collection.*synapse"): check_layout("brats", tmp_path)
    with pytest.raises(DatasetError, match="no replica"): write_replica("brats", tmp_path)


def test_the_challenges_own_test_set_is_left_alone(copy):
    raw = copy("synapse")
    (raw/"RawData/Testing/img").mkdir(parents=True)
    shutil.copy(first(raw, "img0001*"), raw/"RawData/Testing/img/img0061.nii.gz")
    (raw/"RawData/Training/img/._img0001.nii.gz").write_bytes(b"hidden by macOS")
    assert len(check_layout("synapse", raw)[0].cases) == CASES


@pytest.mark.parametrize("what", ["another collection", "the same from another archive", "other files", "a file"])
def test_a_folder_that_holds_something_else(archives, tmp_path, what):
    out = tmp_path/"out"
    if what == "another collection": prepare_collection("lits", archives/"lits", out, partial=True)
    if what == "the same from another archive": prepare_collection("synapse", archives/"synapse-transunet", out, partial=True)
    if what == "other files": out.mkdir(); (out/"thesis.tex").write_text("x")
    if what == "a file": out.write_text("x")
    before = stamps(tmp_path)
    with pytest.raises(DatasetError, match="--out"): prepare_collection("synapse", archives/"synapse", out, partial=True)
    assert stamps(tmp_path) == before


def test_two_modalities_do_not_go_into_a_collection(archives, tmp_path):
    out = prepare_collection("lits", archives/"lits", tmp_path/"out", partial=True)
    with pytest.raises(DatasetError, match="holds something else"): prepare_collection("mmwhs", archives/"mmwhs", out, partial=True)


def test_codes():
    table = {0: 0, 5: 1, 7: 2}
    assert recode(np.array([[0, 5], [7, 5]]), table).tolist() == [[0, 1], [2, 1]]
    for wrong in (6, 8, 2**31): pytest.raises(LabelError, recode, np.array([0, wrong]), table, "x.nii")


def test_a_grey_photograph(tmp_path):
    raw = write_replica("isic2018", tmp_path/"raw", 3)
    file = first(raw, "*.jpg")
    Image.open(file).convert("L").save(file)
    with pytest.raises(DatasetError, match="not a colour picture"): ISIC.read(take_inventory(ISIC, list_files(raw)).cases[0], tmp_path/"out")


# ---- looking

def report_of(tmp_path, archives, name="lits", change=lambda out: None):
    out = prepare_collection(name, archives/name, tmp_path/name, partial=True)
    change(out)
    return describe_collection(out, tmp_path/"m.png")


def test_what_show_counts(archives, tmp_path):
    report = report_of(tmp_path, archives)
    collection = load_collection(tmp_path/"lits")
    assert report.warnings == [] and len(report.cases) == CASES and report.montage.read_bytes()[:4] == b"\x89PNG"
    for case in collection.cases:
        row, x, y = report.cases.loc[case.id], data(case.images[0]), data(case.label)
        assert (row.liver, row.tumour) == ((y == 1).sum(), (y == 2).sum()) and (row["min"], row["max"], row["shape"]) == (x.min(), x.max(), x.shape)
        np.testing.assert_allclose([row["mm x"], row["mm y"], row["mm z"]], nib.load(case.label).header.get_zooms(), atol=1e-3)


def test_what_show_warns_of(archives, tmp_path):
    def change(out):
        train = json.loads((out/"splits.json").read_text())["train"]
        for id in train: rewrite(out/f"labelsTr/{id}.nii.gz", lambda y: np.where(y == 2, 1, y))                       # no tumour in training
        ids = sorted(p.name[:8] for p in (out/"labelsTr").iterdir())
        rewrite(out/f"imagesTr/{ids[0]}_0000.nii.gz", lambda x: x + 4000)                                              # another unit
        thick = lambda affine: affine @ np.diag([1, 1, 5, 1])
        for part in (f"imagesTr/{ids[1]}_0000", f"labelsTr/{ids[1]}"): rewrite(out/f"{part}.nii.gz", lambda x: x, thick)
        noise = np.random.default_rng(0).normal(0, 5, (32, 32, 10))
        rewrite(out/f"imagesTr/{ids[2]}_0000.nii.gz", lambda x: data(out/f"imagesTr/{ids[3]}_0000.nii.gz") + noise)    # one person twice
        for part in (f"imagesTr/{ids[3]}_0000", f"labelsTr/{ids[3]}"): rewrite(out/f"{part}.nii.gz", lambda x: x, lambda affine: np.eye(4))
    said = "\n".join(report_of(tmp_path, archives, change=change).warnings)
    ids = sorted(p.name[:8] for p in (tmp_path/"lits/labelsTr").iterdir())
    assert "class tumour has no voxel in the training part" in said
    assert "spacings along z differ by more than 3 times" in said and f"in {ids[1]}" in said
    assert f"intensities of {ids[0]}" in said
    assert f"{ids[2]} and {ids[3]} are nearly the same" in said
    assert f"1 of {CASES} cases say 1 x 1 x 1 mm" in said


def test_show_of_pictures(archives, tmp_path):
    report = report_of(tmp_path, archives, "isic2018")
    assert Image.open(report.montage).size[0] > 300 and (report.cases.lesion > 0).all()


def test_list(monkeypatch, tmp_path):
    (tmp_path/"acdc").mkdir(); (tmp_path/"acdc/dataset.json").write_text("{}"); (tmp_path/"lits").mkdir()
    monkeypatch.setenv("MEDSEG_DATA", str(tmp_path))
    table = list_collections()
    assert table.state.to_dict() == dict.fromkeys(COLLECTIONS, "missing") | {"acdc": "here", "lits": "here, not prepared"}
    assert table.register.str.startswith("https://").all() and (table.drop(columns="state") != "").all(axis=None)


# ---- the command

def test_the_two_modalities_of_lssc(prepared):
    "The CT of Synapse and the MR of CHAOS under one list of classes, as the notebook says."
    organs = ("liver", "kidney R", "kidney L", "spleen")
    both = load_modalities({"ct": prepared/"synapse", "mr": prepared/"chaos/mr"}, {"ct": dict(zip(organs, organs)) | {"*": "background"}})
    assert set(both.classes.values()) == {"background", *organs}


def test_the_command(archives, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "list"]) == 0 and "figshare" in capsys.readouterr().out
    words = ["data", "prepare", "mmwhs", "--raw", str(archives/"mmwhs")]
    assert main([*words, "--check"]) == 2
    out, err = capsys.readouterr()
    assert "4 of 20 cases" in out and "ct_train_1002_image.nii.gz" in out and len(err.strip().splitlines()) == 1 and "--partial" in err
    assert main([*words, "--partial"]) == 2 and "--out" in capsys.readouterr().err
    assert main([*words, "--partial", "--out", "hearts"]) == 0 and "medseg data show hearts/ct" in capsys.readouterr().out
    assert main(["data", "show", "hearts", "--out", "cases.csv"]) == 0
    out = capsys.readouterr().out
    assert out.count("-- hearts") == 2 and "LVM" in out
    assert all((tmp_path/f).is_file() for f in ("hearts-ct.png", "hearts-mr.png", "cases-ct.csv", "cases-mr.csv"))
    assert main(["data", "replica", "acdc", "--cases", "2", "--out", "r"]) == 0 and (tmp_path/"r/training/patient001/Info.cfg").is_file()
    assert main(["data", "show", "r"]) == 2 and "medseg data prepare" in capsys.readouterr().err


# ---- real pieces

def real(name):
    return find_collection(name) or pytest.skip(f"MEDSEG_DATA has no {name}")


def test_real_isic(tmp_path):
    raw = real("isic2018")
    few = tmp_path/"raw"
    for folder in ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"):
        (few/folder).mkdir(parents=True)
        for file in sorted((raw/folder).iterdir())[:8]: shutil.copy(file, few/folder)
    inventory, = check_layout("isic2018", raw)
    assert len(inventory.cases) == 200 and not inventory.missing
    collection = load_collection(prepare_collection("isic2018", few, tmp_path/"out", partial=True))
    mask = np.asarray(Image.open(few/f"ISIC2018_Task1_Training_GroundTruth/{collection.cases[0].id}_segmentation.png"))
    assert len(collection) == 8 and np.array_equal(data(collection.cases[0].label)[..., 0], mask > 127)


def test_real_series():
    "A compressed CT (JPEG 2000) with negative positions: values and places as SimpleITK's own reader has them."
    files = sorted((real("totalseg")/"example_ct_dicom").iterdir())
    img, ordered = read_series(files[::-1])
    other = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(files[0].parent)))
    assert np.array_equal(np.asarray(img.dataobj).transpose(2, 1, 0), sitk.GetArrayFromImage(other)) and img.shape == (512, 512, 20)
    for voxel in ((0, 0, 0), (511, 3, 19)):
        np.testing.assert_allclose((img.affine @ [*voxel, 1])[:3]*[-1, -1, 1], other.TransformIndexToPhysicalPoint(voxel), atol=1e-2)
    with pytest.raises(GeometryError, match="one is missing"): read_series(ordered[:2] + ordered[3:5])


def test_codes_of_pictures(tmp_path):
    Image.fromarray(np.array([[0, 63], [66, 252]], np.uint8)).save(tmp_path/"a.png")
    ids = {0: 0, 63: 1, 66: 1, 252: 4}
    assert read_codes(tmp_path/"a.png", ids).tolist() == [[0, 1], [1, 4]]
    assert CHAOS_MR.count == len(CHAOS_MR.keys) == 20
    with pytest.raises(MedsegError): read_codes(tmp_path/"b.png", ids)
