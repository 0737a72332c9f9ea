"Several modalities in one loop: balanced and repeatable, killed and resumed, exported, seen one at a time; bad input is refused."
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from common import TWO_PROCESSES, assert_survives_death, quiet, run_child
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from medseg_nb.cli import main, read_pairs
from medseg_nb.core import CheckpointError, DatasetError, MedsegError, ShapeError
from medseg_nb.data.modalities import load_modalities
from medseg_nb.data.phantoms import make_phantom
from medseg_nb.experiments.modalities import LSSC_TABLES, compare_modalities, gains, plan_trials, settings_table
from medseg_nb.models.lssc import LSSC2D, SETTINGS
from medseg_nb.training.multimodal import (
    MultimodalData,
    MultimodalRecipe,
    balanced_plan,
    has_modalities,
    history_of,
    load_multimodal,
    train_multimodal,
)
from medseg_nb.training.supervised import Recipe, batch_plan, train

SWIN = dict(width=8, heads=(1, 2, 2, 4), window=2, patch=4, drop_path=0., init_std=None)
FEW = {name: "background" for name in ("aorta", "gallbladder", "pancreas", "stomach", "kidney L", "kidney R")}
RECIPE = dict(epochs=3, batch_size=2, lr=3e-3, ema=0.9, seed=3, flips=(), loss="ce-dice")
CHILD = '''
import json, sys
import torch
torch.set_num_threads(1)
from common import die_at_step
from medseg_nb.core import set_seed
from medseg_nb.data.modalities import load_modalities
from medseg_nb.models.lssc import LSSC2D
from medseg_nb.training import multimodal
job = json.loads(sys.argv[1])
die_at_step(multimodal.MultimodalSession, job.get("die_at_step"))
set_seed(0)
data = load_modalities(job["folders"], job["label_map"])
model = LSSC2D(1, len(data.classes), job["setting"], modalities=("ct", "mr"), **job["swin"])
multimodal.train_multimodal(model, data, multimodal.MultimodalRecipe(**job["recipe"]), job["out"], resume=True)
print("processes", multimodal.make_accelerator().num_processes)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Two small phantom collections."
    folder = tmp_path_factory.mktemp("modalities")
    for seed, (m, n) in enumerate((("ct", 6), ("mr", 4)), 1): make_phantom(f"abdomen-{m}", n, seed, folder/m, shape=(24, 24, 4))
    return folder


@pytest.fixture(autouse=True)
def quiet_cache(place):
    with quiet(place/"cache"): yield


@pytest.fixture
def data(place): return load_modalities({m: place/m for m in ("ct", "mr")}, {m: FEW for m in ("ct", "mr")})


def small(data, setting="ours", seed=0):
    torch.manual_seed(seed)
    return LSSC2D(1, len(data.classes), setting, modalities=tuple(data.modalities), **SWIN)


def child(place, *launcher, **job):
    job = {"folders": {m: str(place/m) for m in ("ct", "mr")}, "label_map": {m: FEW for m in ("ct", "mr")}, "swin": SWIN,
           "recipe": RECIPE, "setting": "ours"} | job
    return run_child(place/"child.py", CHILD, job, *launcher)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 30), st.integers(1, 3), st.integers(0, 5))
def test_balanced_plans(n, batch, steps, processes, seed):
    "As many full batches as asked for, shared out among processes, every sample before any for the third time."
    plans = [balanced_plan(n, steps, batch, seed, 1, r, processes) for r in range(processes)]
    assert all(len(p) == steps and all(len(b) == batch for b in p) for p in plans)
    alone = balanced_plan(n, steps, batch*processes, seed, 1)
    for k in range(steps): assert sorted(sum((p[k] for p in plans), [])) == sorted(alone[k])
    rounds = batch_plan(n, batch*processes)
    whole = steps//len(rounds)*len(rounds)                              # steps of rounds that were finished
    if n % (batch*processes) == 0 and whole:
        seen = np.bincount(np.concatenate(alone[:whole]), minlength=n)
        assert seen.min() == seen.max() == whole//len(rounds)


def test_killed_and_resumed_is_bit_identical(place):
    broken, whole = place/"broken", place/"whole"
    assert_survives_death(partial(child, place), broken, whole, (1, 5))
    assert has_modalities(whole)


def test_two_processes_equal_the_double_batch(place, data, tmp_path):
    "Without the losses that compare images, which each process computes among its own."
    still = {**RECIPE, **dict(rotate=0, scale=0, gain=0, noise=0, epochs=2, precision="fp32")}
    result = child(place, TWO_PROCESSES, out=str(tmp_path/"two"), recipe=still, setting="joint-v2")
    assert result.returncode == 0 and "processes 2" in result.stdout, result.stderr
    from medseg_nb.core import set_seed
    set_seed(0)
    model = LSSC2D(1, len(data.classes), "joint-v2", modalities=("ct", "mr"), **SWIN)
    train_multimodal(model, data, MultimodalRecipe(**{**still, "batch_size": 4}), tmp_path/"one")
    a, b = (pd.read_csv(tmp_path/name/"metrics.csv").filter(regex="epoch|lr|loss_") for name in ("one", "two"))
    pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("setting", ["ours", "baseline", "joint-v1-cr"])
def test_every_term_is_logged_and_falls_where_it_should(place, data, tmp_path, setting):
    run = train_multimodal(small(data, setting), data, MultimodalRecipe(**{**RECIPE, "epochs": 4}), tmp_path/"run")
    terms = {"seg ct", "seg mr", "aux ct", "aux mr", *(["mcr"] if SETTINGS[setting].mcr else []), *(["icr"] if SETTINGS[setting].icr else [])}
    assert {c.removeprefix("loss_") for c in run.history if c.startswith("loss_")} == terms | {"total"}
    last, weight = run.history.iloc[-1], {"aux": .5, "mcr": .5, "icr": .5}
    assert last["loss_total"] == pytest.approx(sum(weight.get(t.split()[0], 1)*last[f"loss_{t}"] for t in terms), rel=1e-4)
    assert last["loss_total"] < run.history["loss_total"].iloc[0]
    for m in data.modalities:
        named = [c for c in run.history if c.startswith("val_dice_") and c.endswith(f" {m}")]
        assert named == [f"val_dice_mean {m}", *(f"val_dice_{n} {m}" for i, n in data.classes.items() if i)]
    assert not (tmp_path/"run"/"exported").exists()                     # a network without a name cannot be built again from one


def test_named_runs_are_exported_and_loaded(place, data, tmp_path):
    recipe = MultimodalRecipe(**{**RECIPE, "epochs": 1})
    run = train_multimodal("lssc-2d", data, recipe, tmp_path/"run")
    plain, full = load_multimodal(tmp_path/"run"/"exported"), load_multimodal(tmp_path/"run")
    assert not [k for k in load_file(tmp_path/"run"/"exported"/"model.safetensors") if k.split(".")[0] in ("class_embeddings", "paths")]
    x = torch.randn(1, 1, 20, 28)
    with torch.no_grad():
        for m in data.modalities: torch.testing.assert_close(plain.view(m).model(x), full.view(m).model(x), rtol=0, atol=1e-5)
        assert torch.equal(full.view("ct").model(x), run.view("ct").model(x))
    assert plain.recipe == recipe and plain.split == run.split and plain.view("mr").classes == data.classes
    assert [c.id for c in plain.view("mr").cases()] == run.split["mr"]["test"]
    with pytest.raises(ShapeError, match="pet"): run.view("pet")
    with pytest.raises(DatasetError, match="holds a run"): train_multimodal("lssc-2d", data, recipe, tmp_path/"run")
    with pytest.raises(CheckpointError, match="tau"): train_multimodal("lssc-2d", data, replace(recipe, tau=1.0), tmp_path/"run", resume=True)
    single = train("unet-r50", data["ct"], Recipe(epochs=1, batch_size=2, flips=()), tmp_path/"single")
    with pytest.raises(CheckpointError, match="load_run"): load_multimodal(single.folder)


def test_few_shots(place, data):
    full, few = (MultimodalData(data, MultimodalRecipe(**RECIPE, shots=shots)) for shots in (None, {"mr": 1}))
    assert len(few.split["mr"]["train"]) == 1 and few.split["ct"] == full.split["ct"]
    assert few.split["mr"]["test"] == full.split["mr"]["test"] and few.split["mr"]["train"][0] in full.split["mr"]["train"]
    drawn = {MultimodalData(data, MultimodalRecipe(**{**RECIPE, "seed": s}, shots={"mr": 1})).split["mr"]["train"][0] for s in range(6)}
    assert len(drawn) > 1                                               # another seed, another shot
    crops = MultimodalData(data, MultimodalRecipe(dims=3, patch=(16, 16, 4), per_case=2, shots={"mr": 1})).each
    assert len(crops["mr"].samples) == len(crops["ct"].samples)         # as many windows, from fewer cases


def test_history_of_one_modality():
    table = pd.DataFrame({"epoch": [1], "loss_seg ct": [1.], "loss_seg mr": [2.], "loss_mcr": [3.], "val_dice": [.5],
                          "val_dice_mean ct": [.6], "val_dice_mean mr": [.4], "val_dice_liver mr": [.3]})
    one = history_of(table, "mr", ["ct", "mr"])
    assert one.to_dict("records") == [{"epoch": 1, "loss_seg": 2., "loss_mcr": 3., "val_dice": .4, "val_dice_liver": .3}]


@pytest.mark.parametrize("changes, word", [
    (dict(tau=0), "tau"), (dict(tau=float("nan")), "tau"), (dict(weights=(1, 1)), "weights"), (dict(weights=(1, 1, -1)), "weights"),
    (dict(epochs=0), "epochs")])
def test_recipes_that_do_not_fit(changes, word):
    with pytest.raises(MedsegError, match=word): MultimodalRecipe(**changes)


def test_what_cannot_be_trained(place, data, tmp_path):
    recipe = MultimodalRecipe(**RECIPE)
    cases = [(lambda: train_multimodal("unet-r50", data, recipe, tmp_path/"x"), "does not take several modalities"),
             (lambda: train_multimodal("lssc-2d", data, recipe, tmp_path/"x", setting="joint-v9"), "joint-v9"),
             (lambda: train_multimodal("lssc-3d", data, recipe, tmp_path/"x"), "does not see such images"),
             (lambda: train_multimodal(small(data).export(), data, recipe, tmp_path/"x"), "exported"),
             (lambda: train_multimodal("lssc-2d", data, replace(recipe, shots={"mr": 99}), tmp_path/"x"), "cannot keep"),
             (lambda: train_multimodal("lssc-2d", data, replace(recipe, shots={"pet": 1}), tmp_path/"x"), "no such modality"),
             (lambda: train("lssc-2d", data["ct"], Recipe(**RECIPE), tmp_path/"x"), "several modalities"),
             (lambda: MultimodalRecipe.paper("unet"), "no paper's recipe")]
    for broken, word in cases:
        with pytest.raises(MedsegError, match=word): broken()
    assert not (tmp_path/"x").exists()


def test_names_of_modalities(place):
    for name in ("c t", "a/b", "ct,mr", "x=y"):
        with pytest.raises(DatasetError, match="cannot be used"): load_modalities({name: place/"ct", "mr": place/"mr"})


@pytest.mark.parametrize("text, word", [("ct", "--data"), ("ct=", "--data"), ("=x", "--data")])
def test_pairs_that_do_not_read(text, word):
    with pytest.raises(MedsegError, match=word): read_pairs(text, "--data")
    assert read_pairs("ct=a,mr=b", "--data") == {"ct": "a", "mr": "b"}
    with pytest.raises(MedsegError, match="NUMBER"): read_pairs("ct=a", "--shots", int)


def test_command_line(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"map.json").write_text(json.dumps({m: FEW for m in ("ct", "mr")}))
    both = f"ct={place/'ct'},mr={place/'mr'}"
    words = ["train", "lssc-2d", "--data", both, "--label-map", "map.json", "--setting", "joint-v3", "--shots", "mr=1", "--epochs", "1"]
    assert main([*words, "--out", "run"]) == 0
    assert (tmp_path/"run"/"report.html").exists() and "-- mr" in capsys.readouterr().out
    image = next((place/"mr"/"imagesTr").iterdir())
    assert main(["predict", "run", str(image), "--modality", "mr", "--out", "mask.nii.gz"]) == 0 and (tmp_path/"mask.nii.gz").exists()
    assert main(["predict", "run/exported", str(image), "--modality", "mr", "--out", "again.nii.gz"]) == 0
    assert (tmp_path/"mask.nii.gz").read_bytes() == (tmp_path/"again.nii.gz").read_bytes()
    assert main(["evaluate", "run", "--modality", "ct", "--out", "ct.csv"]) == 0 and set(pd.read_csv("ct.csv")["modality"]) == {"ct"}
    capsys.readouterr()
    refused = {("predict", "run", str(image), "--out", "m.nii.gz"): "which modality",
               ("predict", "run", str(image), "--modality", "pet", "--out", "m.nii.gz"): "pet",
               ("train", "lssc-2d", "--data", str(place/"ct")): "several modalities", ("train", "unet-r50", "--data", both): "one collection",
               ("train", "unet-r50", "--data", str(place/"ct"), "--shots", "ct=1"): "--shots",
               ("train", "lssc-2d", "--data", both, "--label-map", "none.json"): "cannot be read",
               ("compare", "--table", "lssc-9", "--data", both): "no table has this name"}
    for words, said in refused.items():
        assert main(list(words)) == 2 and said in capsys.readouterr().err, words
    assert not (tmp_path/"m.nii.gz").exists()


def test_tables_of_settings(place, data, tmp_path, monkeypatch):
    "A table of two rows: runs are kept, scores are one a case and class, gains are paired."
    monkeypatch.setitem(LSSC_TABLES, "two", lambda modalities: plan_trials("lssc-settings", modalities)[1:3])
    recipe = MultimodalRecipe(**{**RECIPE, "epochs": 1})
    first = compare_modalities("two", data, recipe, (0,), tmp_path/"table")
    again = compare_modalities("two", data, recipe, (0, 1), tmp_path/"table")
    assert len(again.runs) == 4 and len(again.scores) == 2*len(first.scores)
    pd.testing.assert_frame_equal(first.scores, again.scores[again.scores["seed"] == 0], check_dtype=False)
    assert list(settings_table(again.scores).index) == ["baseline", "joint-v1"] and set(again.gains["trial"]) == {"joint-v1"}
    ct = again.scores[again.scores["modality"] == "ct"].groupby(["model", "case"])["DSC"].mean().unstack(0)
    row = again.gains[(again.gains["modality"] == "ct") & (again.gains["metric"] == "DSC")].iloc[0]
    assert row["difference"] == pytest.approx((ct["joint-v1"] - ct["baseline"]).mean(), abs=1e-9)
    with pytest.raises(CheckpointError, match="lr"): compare_modalities("two", data, replace(recipe, lr=1.0), (0, 1), tmp_path/"table")
    assert gains(again.scores, plan_trials("lssc-tau", ["ct"]), data).empty
