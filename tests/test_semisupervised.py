"Some of the labels: parts and steps, killed and resumed, two processes, every model and method, real unlabelled images; bad input is refused."
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from common import TWO_PROCESSES, assert_survives_death, quiet, run_child
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from medseg_nb.cli import main, read_labelled
from medseg_nb.core import DatasetError, LabelError, MedsegError, ShapeError, set_seed
from medseg_nb.data.collections import load_collection
from medseg_nb.data.phantoms import make_phantom
from medseg_nb.experiments.comparison import Variant, compare
from medseg_nb.models.zoo import build_model, list_models, model_dims, takes_modalities
from medseg_nb.training.semisupervised import (
    METHODS,
    SemisupervisedData,
    SemisupervisedRecipe,
    SemisupervisedSession,
    TwoHeads,
    divide,
    ramp_up,
    train_semisupervised,
)
from medseg_nb.training.supervised import Recipe, batch_plan, load_run, make_accelerator, read_tensors

RECIPE = dict(epochs=3, batch_size=2, lr=3e-3, ema=0.9, seed=3, flips=(), loss="ce-dice", labelled=0.5)
CHILD = '''
import json, sys
import torch
torch.set_num_threads(1)
from common import die_at_step
from medseg_nb.core import set_seed
from medseg_nb.data.collections import load_collection
from medseg_nb.models.zoo import build_model
from medseg_nb.training import semisupervised
from medseg_nb.training.supervised import make_accelerator
job = json.loads(sys.argv[1])
die_at_step(semisupervised.SemisupervisedSession, job.get("die_at_step"))
set_seed(0)
model = build_model("unet-r50", 1, 4, size="teach", widths=(4, 8))
recipe = semisupervised.SemisupervisedRecipe(**job["recipe"])
semisupervised.train_semisupervised(model, load_collection(job["collection"]), recipe, job["out"], resume=True)
print("processes", make_accelerator().num_processes)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Hearts of six made-up people, two frames of each."
    folder = tmp_path_factory.mktemp("labels")
    make_phantom("cardiac-mr", 12, 0, folder/"phantom", shape=(32, 32, 4))
    return folder


@pytest.fixture(autouse=True)
def quiet_cache(place):
    with quiet(place/"cache"): yield


@pytest.fixture
def collection(place): return load_collection(place/"phantom")


def tiny():
    torch.manual_seed(0)
    return build_model("unet-r50", 1, 4, size="teach", widths=(4, 8))


def child(place, launcher=None, **job):
    job = {"collection": str(place/"phantom"), "recipe": RECIPE, **job}
    return run_child(place/"child.py", CHILD, job, **({"launcher": launcher} if launcher else {}))


def session(collection, **changes):
    recipe = SemisupervisedRecipe(**{**RECIPE, **changes})
    return SemisupervisedSession(tiny(), SemisupervisedData(collection, recipe), recipe, make_accelerator())


def test_killed_and_resumed_is_bit_identical(place):
    "Multipliers, teacher, second head and projection are all in the state."
    whole, broken = place/"whole", place/"broken"
    assert_survives_death(partial(child, place), broken, whole, (1, 7))
    state = read_tensors(whole/"state.safetensors")[0]
    assert state["multipliers.lam"].abs().max() > 0
    assert {k.split(".")[1] for k in state if k.startswith("average.")} == {"network", "distance", "contrast"}


def test_two_processes_equal_the_double_batch(place, collection, tmp_path):
    "Without eq. 4, which each process computes among its own slices, and without the teacher's noise."
    still = {**RECIPE, **dict(rotate=0, scale=0, gain=0, noise=0, epochs=2, precision="fp32", method="ldc", teacher_noise=0.0)}
    result = child(place, TWO_PROCESSES, out=str(tmp_path/"two"), recipe=still)
    assert result.returncode == 0 and "processes 2" in result.stdout, result.stderr
    set_seed(0)
    model = build_model("unet-r50", 1, 4, size="teach", widths=(4, 8))
    one = train_semisupervised(model, collection, SemisupervisedRecipe(**{**still, "batch_size": 4}), tmp_path/"one")
    a, b = (pd.read_csv(tmp_path/f/"metrics.csv").filter(regex="epoch|lr|loss_|lam") for f in ("one", "two"))
    pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=1e-5)
    weights = load_file(tmp_path/"two"/"model.safetensors")
    for k, tensor in load_file(one.folder/"model.safetensors").items(): torch.testing.assert_close(weights[k], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_the_same_steps_and_logs_its_terms(collection, tmp_path, method):
    run = train_semisupervised(tiny(), collection, SemisupervisedRecipe(**{**RECIPE, "method": method, "epochs": 2}), tmp_path/"run")
    what, columns = METHODS[method], set(run.history)
    assert run.history["step"].tolist() == [8, 16]                               # 16 slices in each part, 2 at a time
    assert np.isfinite(run.history.filter(regex="loss|lam|kkt").to_numpy()).all()
    assert ("loss_contrast" in columns) == ("loss_sup_sdm" in columns) == what.contrast
    assert ("lam_1" in columns) == ("kkt_stationarity" in columns) == (what.consistency == "ldc")
    assert any(c.startswith("loss_con_") for c in columns) == bool(what.consistency)
    assert any(c.startswith("pseudo_dice") for c in columns) == (what.unlabelled)
    assert len(run.split["train"]) == (8 if what.everything else 4) and ("unlabelled" in run.split) != what.everything
    again = load_run(run.folder, collection, tiny())
    assert isinstance(again.recipe, SemisupervisedRecipe) and again.split == run.split
    assert set(again.model.state_dict()) == set(tiny().state_dict())             # no second head in what is kept


@pytest.mark.parametrize("name", [n for n in list_models() if not takes_modalities(n)])
def test_a_second_head_for_every_network(name):
    "The scores are the network's own; the map has the image's grid; both parts get gradients. Windows no network's grid divides."
    set_seed(0)
    sides = (34, 40) if model_dims(name)[0] == 2 else (30, 26, 20)
    network, x = build_model(name, 1, 3, size="teach"), torch.randn(2, 1, *sides)
    both = TwoHeads(network, 3, x[:1]).eval()
    out = both(x, aux=True)
    for logits in (both(x), network(x)): torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-5)
    assert out.maps["sdm"].shape == (2, 2, *sides) and out.maps["sdm"].abs().max() < 1
    out.maps["sdm"].square().mean().backward()
    assert both.distance.draw.weight.grad.abs().max() > 0
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
    assert not any(m._forward_hooks for m in both.modules())


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_ramp_rises_to_one(a, b, ramp):
    low, high = (ramp_up(v, ramp) for v in sorted((a, b)))
    assert np.exp(-5) - 1e-12 <= low <= high <= 1 and ramp_up(1, ramp) == 1


def test_no_label_of_an_unlabelled_case_reaches_the_weights(place, collection, tmp_path):
    "The same run where the others' labels are nonsense: other entries in the log, the same weights."
    recipe = SemisupervisedRecipe(**{**RECIPE, "epochs": 2})
    one = train_semisupervised(tiny(), collection, recipe, tmp_path/"one")
    changed = []
    for case in collection.cases:
        file = tmp_path/f"{case.id}.nii.gz"
        label = nib.load(case.label)
        wrong = case.id in one.split["unlabelled"]
        nib.save(nib.Nifti1Image(np.asarray(label.dataobj)*0 + 1 if wrong else np.asarray(label.dataobj), label.affine), file)
        changed.append(replace(case, label=file))
    two = train_semisupervised(tiny(), replace(collection, cases=changed), recipe, tmp_path/"two")
    a, b = (load_file(run.folder/"model.safetensors") for run in (one, two))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not one.history.filter(regex="pseudo").equals(two.history.filter(regex="pseudo"))


def test_images_nobody_labelled(place, collection, tmp_path):
    "imagesTs takes part with labelled=None: all labels are read, and nothing is said about the teacher's."
    strangers = [replace(case, id=f"new{i}", label=None) for i, case in enumerate(collection.cases[:3])]
    data = replace(collection, test_cases=strangers)
    run = train_semisupervised(tiny(), data, SemisupervisedRecipe(**{**RECIPE, "labelled": None, "epochs": 1}), tmp_path/"run")
    assert run.split["unlabelled"] == ["new0", "new1", "new2"] and len(run.split["train"]) == 8
    assert not any(c.startswith("pseudo") for c in run.history)


def test_windows_of_volumes(collection, tmp_path):
    recipe = SemisupervisedRecipe(**{**RECIPE, "dims": 3, "patch": (16, 16, 4), "epochs": 1, "per_case": 2})
    torch.manual_seed(0)
    model = build_model("unet-r50", 1, 4, size="teach", spatial_dims=3, widths=(4, 8))
    history = train_semisupervised(model, collection, recipe, tmp_path/"run").history
    assert np.isfinite(history[["loss_contrast", "loss_con_mass", "loss_sup_sdm"]].to_numpy()).all()


def test_steps_until_the_larger_part_was_seen(collection):
    for labelled, ratio in ((0.25, 1), (0.25, 2), (0.75, 1), (3, 0.5)):
        s = session(collection, labelled=labelled, ratio=ratio)
        n, m = len(s.data.labelled), len(s.data.unlabelled)
        without = max(1, round(2*ratio))
        assert n + m == 32 and s.steps == max(len(batch_plan(n, 2)), len(batch_plan(m, without)))
        x, y = next(iter(s.batches()))
        assert len(x) == len(y) == 2 + without


def test_the_teacher_is_no_part_of_the_gradient(collection):
    s = session(collection)
    x, y = next(iter(s.batches()))
    before = [p.clone() for p in s.average.model.parameters()]
    s.step(x, y, 0)
    assert all(p.grad is None for p in s.average.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, s.average.model.parameters(), strict=True))   # it follows
    assert s.consistency.lam.abs().max() > 0                                                            # and a price has moved


BAD = [(dict(method="none"), "method"), (dict(labelled=0.0), "labelled"), (dict(labelled=1.0001), "labelled"), (dict(labelled=-1), "labelled"),
       (dict(ratio=0), "ratio"), (dict(weights=(1, -1, 1)), "weights"), (dict(supervision="dice"), "supervision"), (dict(ema=None), "ema"),
       (dict(temperature=0), "temperature"), (dict(ldc={"classes": 2}), "ldc"), (dict(teacher_noise=-1), "teacher_noise"), (dict(ramp=1.5), "ramp")]


@pytest.mark.parametrize("change, word", BAD)
def test_recipes_that_do_not_fit(change, word):
    with pytest.raises(MedsegError, match=f"recipe: {word} does not fit"): SemisupervisedRecipe(**change)


def test_a_recipe_goes_through_json():
    recipe = SemisupervisedRecipe.teach(method="ldc", ldc={"rate": 0.2, "mass": [0.1, 0.2]}, labelled=2)
    again = Recipe.from_dict(json.loads(json.dumps({f: getattr(recipe, f) for f in recipe.__dataclass_fields__})))
    assert isinstance(again, SemisupervisedRecipe) and again == recipe
    assert SemisupervisedRecipe.paper().supervision == "mse" and SemisupervisedRecipe.paper().momentum == 0.99
    with pytest.raises(MedsegError, match="no paper's recipe"): SemisupervisedRecipe.paper("unet-r50")


def test_what_cannot_be_trained(collection, tmp_path):
    recipe = SemisupervisedRecipe(**RECIPE)
    fit = lambda model=None, data=collection, **changes: train_semisupervised(model or tiny(), data, replace(recipe, **changes), tmp_path/"run")
    with pytest.raises(DatasetError, match="cannot be divided"): fit(labelled=4)                        # nobody is left without
    with pytest.raises(DatasetError, match="cannot be divided"): fit(labelled=0.01)                     # nobody with
    with pytest.raises(DatasetError, match="no image without labels"): fit(labelled=None)
    with pytest.raises(LabelError, match="no voxel of unicorn"): fit(data=replace(collection, classes={**collection.classes, 4: "unicorn"}))
    unfit = (dict(bounds=(0.6, 0.2)), "cannot be met"), (dict(mass=(0.5, 0.2, 1.2)), "cannot be met"), (dict(beta=(0.5, 0.2, 0.2)), "beta does not fit")
    for ldc, said in unfit:
        with pytest.raises(MedsegError, match=said): fit(ldc=ldc)
    with pytest.raises(ShapeError, match="classes"): fit(model=build_model("unet-r50", 1, 3, size="teach", widths=(4, 8)))
    with pytest.raises(MedsegError, match="does not say whose labels"): train_semisupervised(tiny(), collection, Recipe(), tmp_path/"run")
    assert not (tmp_path/"run"/"metrics.csv").exists()


def test_teacher_and_student_of_different_shapes(collection):
    s = session(collection, method="ldc")
    logits, y = torch.zeros(4, 4, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)
    with pytest.raises(ShapeError, match="teacher and student"): s.agree(logits[:3], logits, y)


def test_division_is_by_person(collection):
    with_labels, without = divide(collection, collection.cases, SemisupervisedRecipe(**RECIPE))
    people = [{case.id.split("_")[1] for case in part} for part in (with_labels, without)]
    assert not people[0] & people[1] and len(with_labels) + len(without) == 12


def test_compared_on_the_same_cases(collection, tmp_path):
    rows = [Variant(m, "unet-r50", dict(widths=(4, 8)), {"method": m}) for m in ("supervised", "ours")]
    recipe = SemisupervisedRecipe(**{**RECIPE, "epochs": 1})
    result = compare(rows, collection, recipe, (0,), tmp_path/"cmp", rounds=1)
    assert set(result.scores["model"]) == {"supervised", "ours"} and (tmp_path/"cmp"/"report.html").exists()
    assert result.costs.set_index("model").loc["ours", "step ratio"] > 1                                # a teacher is not free
    with pytest.raises(MedsegError, match="another kind of recipe"): compare(rows, collection, Recipe(epochs=1), (0,), tmp_path/"no")


def test_command_line(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = str(place/"phantom")
    assert main(["train", "unet-r50", "--data", data, "--method", "mean-teacher", "--labelled", "2", "--epochs", "1", "--batch-size", "4", "--out", "run"]) == 0
    page = Path("run/report.html").read_text()
    assert "--method mean-teacher" in page and "--labelled 2" in page and "of 4 of 8 training cases" in page and "whose labels it never sees" in page
    capsys.readouterr()
    refused = {("train", "unet-r50", "--data", data, "--method", "magic"): "method does not fit",
               ("train", "unet-r50", "--data", data, "--labelled", "half"): "does not read",
               ("train", "lssc-2d", "--data", f"ct={data},mr={data}", "--method", "ours"): "all labels",
               ("compare", "--models", "unet-r50,vqunet", "--methods", "ours,magic", "--data", data): "no method is called so",
               ("compare", "--table", "cmaformer-3", "--methods", "ours", "--data", data): "has its methods"}
    for words, said in refused.items():
        assert main(list(words)) == 2 and said in capsys.readouterr().err, words
    assert (read_labelled("0.5"), read_labelled("2"), read_labelled("all")) == (0.5, 2, None)
