"A killed run goes on as if nothing had happened; two processes are one with the double batch; bad input is refused."
import json
import signal

import pandas as pd
import pytest
import torch
from common import TWO_PROCESSES, assert_same_run, quiet, run_child
from safetensors import SafetensorError
from safetensors.torch import load_file

from medseg_nb.core import CheckpointError, DatasetError, MedsegError, ShapeError
from medseg_nb.data.collections import load_collection
from medseg_nb.data.phantoms import make_phantom
from medseg_nb.models.zoo import build_model, load_model
from medseg_nb.training import supervised
from medseg_nb.training.supervised import (
    Recipe,
    RunningAverage,
    autocast_type,
    batch_plan,
    deepest_side,
    fill_optimiser,
    load_run,
    make_optimiser,
    optimiser_tensors,
    poly_rate,
    read_tensors,
    train,
    write_tensors,
)

# What a child process runs: jobs one after another; it kills itself (SIGKILL) at step `die_at_step` or around the
# n-th file it writes.
CHILD = '''
import json, os, sys
import torch
torch.set_num_threads(1)
from common import die, die_at_step
from medseg_nb.data.collections import load_collection
from medseg_nb.models.zoo import build_model
from medseg_nb.core import set_seed
from medseg_nb.training import supervised
jobs = json.loads(sys.argv[1])
job = jobs[0]
replace, files = os.replace, []
def counted_replace(a, b):
    files.append(b)
    if len(files) == job.get("die_before_file"): die()
    replace(a, b)
    if len(files) == job.get("die_after_file"): die()
os.replace = counted_replace
die_at_step(supervised.Session, job.get("die_at_step"))
for job in jobs:
    set_seed(0)
    model = build_model(job.get("model", "synergynet-2s2h"), 1, 4, size="teach", widths=(4, 8), **job.get("parts", {}))
    recipe = supervised.Recipe(**job["recipe"])
    supervised.train(model, load_collection(job["collection"]), recipe, job["out"], resume=job.get("resume", False))
print("processes", supervised.make_accelerator().num_processes)
'''

PARTS = dict(dim=8, codebook_size=16)
RECIPE = dict(epochs=4, batch_size=2, lr=3e-3, optimiser="sgd", ema=0.9, seed=3)

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a small phantom collection, and the environment of child processes."
    folder = tmp_path_factory.mktemp("training")
    make_phantom("cardiac-mr", 6, 0, folder/"phantom", shape=(32, 32, 4))
    return folder

@pytest.fixture(autouse=True)
def quiet_cache(place):
    with quiet(place/"cache"): yield

def child(place, *jobs, **launcher):
    return run_child(place/"child.py", CHILD, [{"collection": str(place/"phantom"), "recipe": RECIPE, "parts": PARTS, **job} for job in jobs], **launcher)

def tiny(seed=0):
    torch.manual_seed(seed)
    return build_model("unet-r50", 1, 4, size="teach", widths=(4, 8))

def test_killed_anywhere_and_resumed_is_bit_identical(place):
    whole, broken = place/"whole", place/"broken"
    # In the middle of an epoch, between two files, before a rename.
    for death in (dict(die_at_step=1), dict(die_after_file=3), dict(die_before_file=5)):
        result = child(place, dict(out=str(broken), resume=True, **death))
        assert result.returncode == -signal.SIGKILL, result.stderr
    assert 0 < read_tensors(broken/"state.safetensors")[1]["epoch"] < RECIPE["epochs"]
    result = child(place, dict(out=str(broken), resume=True), dict(out=str(whole)))
    assert result.returncode == 0, result.stderr
    assert len(pd.read_csv(whole/"metrics.csv")) == RECIPE["epochs"]
    assert_same_run(whole, broken)                                # no halves left

def test_two_processes_equal_the_double_batch(place):
    still = {**RECIPE, **dict(flips=(), rotate=0, scale=0, gain=0, noise=0, epochs=2, precision="fp32")}
    # Model, recipe, relative tolerance: arg-min and arg-max of SynergyNet turn rounding into other choices.
    cases = {"unet-batch": ("unet-r50", {}, {**still, "batch_dice": True}, 1e-4),
             "unet-image": ("unet-r50", {}, {**still, "batch_dice": False}, 1e-4),
             "synergynet": ("synergynet-2s2h", PARTS, {**still, "batch_dice": True}, 2e-3)}
    jobs = [dict(out=str(place/f"two-{key}"), model=name, parts=parts, recipe=recipe)
            for key, (name, parts, recipe, _) in cases.items()]
    result = child(place, *jobs, launcher=TWO_PROCESSES)
    assert result.returncode == 0 and result.stdout.split().count("2") == 2, result.stderr
    for key, (name, parts, recipe, tolerance) in cases.items():
        torch.manual_seed(0)
        model = build_model(name, 1, 4, size="teach", widths=(4, 8), **parts)
        double = Recipe(**{**recipe, "batch_size": 2*recipe["batch_size"]})
        one, two = train(model, load_collection(place/"phantom"), double, place/f"one-{key}"), place/f"two-{key}"
        a, b = (pd.read_csv(f/"metrics.csv").filter(regex="epoch|lr|loss_") for f in (one.folder, two))
        assert {"loss_bce", "loss_dice", "loss_total"} < set(a)
        pd.testing.assert_frame_equal(a, b, rtol=tolerance, atol=1e-6, obj=key)
        weights = load_file(two/"model.safetensors")
        for k, tensor in load_file(one.folder/"model.safetensors").items():
            atol = 1e-5 + 20*tolerance*tensor.std(correction=0).item()
            torch.testing.assert_close(weights[k], tensor, rtol=1e-2, atol=atol)

KINDS = [(2, "sgd", "bce-dice"), (2, "adamw", "ce-dice"), (3, "adamw", "bce-dice")]

@pytest.mark.parametrize("dims, optimiser, loss", KINDS)
def test_run_folder_and_load_run(place, tmp_path, dims, optimiser, loss):
    collection = load_collection(place/"phantom")
    shape = dict(neighbours=1) if dims == 2 else dict(patch=(16, 16, 4))
    recipe = Recipe.teach(epochs=2, dims=dims, optimiser=optimiser, loss=loss, **shape)
    run = train("unet-r50", collection, recipe, tmp_path/"run")
    files = sorted(p.name for p in run.folder.iterdir())
    assert files == ["config.json", "metrics.csv", "model.safetensors", "state.safetensors"]
    assert run.history["loss_total"].between(0, 10).all() and run.history["val_dice"].between(0, 1).all()
    again = load_run(tmp_path/"run")
    assert again.recipe == recipe and again.split == run.split and again.preparation == run.preparation
    pd.testing.assert_frame_equal(again.history, run.history)
    x = torch.randn(1, 3 if dims == 2 else 1, *(16,)*dims)
    assert torch.equal(again.model(x), run.model.cpu()(x))
    assert torch.equal(load_model(tmp_path/"run")(x), again.model(x))
    assert {c.id for c in again.cases("train")}.isdisjoint(c.id for c in again.cases("test"))

def test_loss_falls(place, tmp_path):
    recipe = Recipe.teach(epochs=40, lr=1e-2, validate_every=40)
    run = train(tiny(), load_collection(place/"phantom"), recipe, tmp_path/"run")
    assert run.history["loss_total"].iloc[-1] < 0.9 * run.history["loss_total"].iloc[0]

def test_resume_of_a_finished_run_changes_nothing(place, tmp_path):
    collection, recipe = load_collection(place/"phantom"), Recipe.teach(epochs=1)
    train(tiny(), collection, recipe, tmp_path/"run")
    before = {p.name: p.read_bytes() for p in (tmp_path/"run").iterdir()}
    train(tiny(seed=1), collection, recipe, tmp_path/"run", resume=True)
    assert before == {p.name: p.read_bytes() for p in (tmp_path/"run").iterdir()}

def test_what_resume_refuses(place, tmp_path):
    collection, recipe, out = load_collection(place/"phantom"), Recipe.teach(epochs=1), tmp_path/"run"
    train(tiny(), collection, recipe, out)
    with pytest.raises(DatasetError, match="resume=True"): train(tiny(), collection, recipe, out)
    with pytest.raises(CheckpointError, match="another recipe.*'lr'"):
        train(tiny(), collection, Recipe.teach(epochs=1, lr=1), out, resume=True)
    other = build_model("unet-r50", 1, 4, size="teach", widths=(4, 4))
    with pytest.raises(CheckpointError, match="another model"): train(other, collection, recipe, out, resume=True)
    state = out/"state.safetensors"
    state.write_bytes(state.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="damaged"): train(tiny(), collection, recipe, out, resume=True)
    state.write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"): train(tiny(), collection, recipe, out, resume=True)
    with pytest.raises(DatasetError, match="is a file"): train(tiny(), collection, recipe, state)

def test_wrong_class_count_is_refused(place, tmp_path):
    with pytest.raises(ShapeError, match="one output per class"):
        train(torch.nn.Conv2d(1, 3, 1), load_collection(place/"phantom"), Recipe.teach(epochs=1), tmp_path/"run")

class Explodes(torch.nn.Module):
    "Gives infinite scores from its third forward pass in training on."
    def __init__(self): super().__init__(); self.layer, self.calls = torch.nn.Conv2d(1, 4, 1), 0
    def forward(self, x):
        self.calls += self.training
        return self.layer(x) * (float("inf") if self.calls > 2 else 1)

def test_a_loss_that_is_no_number_stops_the_run(place, tmp_path):
    with pytest.raises(MedsegError, match="from step 2 on.*lower lr"):
        train(Explodes(), load_collection(place/"phantom"), Recipe.teach(epochs=9, batch_size=4), tmp_path/"run")
    tensors, facts = read_tensors(tmp_path/"run"/"state.safetensors")
    assert all(v.isfinite().all() for v in tensors.values()) and facts["epoch"] < 9

def test_minutes_fix_the_number_of_epochs_once(place, tmp_path):
    collection, recipe = load_collection(place/"phantom"), Recipe.teach(minutes=0.05, epochs=99)
    model = tiny()
    run = train(model, collection, recipe, tmp_path/"run")
    epochs = json.loads((tmp_path/"run"/"config.json").read_text())["epochs"]
    assert len(run.history) == epochs and run.history["lr"].iloc[-1] > 0
    assert len(train(tiny(), collection, recipe, tmp_path/"run", resume=True).history) == epochs

def plain():
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 1))

def test_bf16_and_other_models_on_cpu(place, tmp_path):
    run = train(plain(), load_collection(place/"phantom"), Recipe.teach(epochs=1, precision="bf16"), tmp_path/"run")
    assert run.history["loss_total"].notna().all() and next(run.model.parameters()).dtype == torch.float32
    again = load_run(tmp_path/"run", model=plain())
    for a, b in zip(again.model.parameters(), run.model.parameters(), strict=True): assert torch.equal(a, b)
    with pytest.raises(CheckpointError): load_run(tmp_path/"run")

@pytest.mark.parametrize("change", [
    dict(epochs=0), dict(epochs=1.5), dict(batch_size=-1), dict(lr=0), dict(lr="fast"), dict(optimiser="lion"),
    dict(ema=1), dict(loss="mse"), dict(dims=4), dict(size="huge"), dict(precision="int8"), dict(clip=0),
    dict(minutes=0), dict(patch=(0, 1, 1), dims=3), dict(dims=3, neighbours=1), dict(neighbours=-1),
    dict(intensity="magic"), dict(foreground=2), dict(spacing=(1, 1)), dict(seed=-1)])
def test_recipe_refuses(change):
    with pytest.raises(MedsegError): Recipe.teach(**change)

def test_recipes():
    paper = Recipe.paper("synergynet", epochs=3)
    assert (paper.optimiser, paper.lr, paper.momentum, paper.weight_decay) == ("sgd", 0.01, 0.9, 1e-4)
    assert paper.batch_size == 8
    assert (paper.inplane, paper.pretrained, paper.size, paper.epochs) == (224, True, "paper", 3)
    with pytest.raises(MedsegError, match="synergynet"): Recipe.paper("resnet")
    assert Recipe.from_dict(json.loads(json.dumps({"patch": [8, 8, 8], "dims": 3}))).patch == (8, 8, 8)
    with pytest.raises(MedsegError, match="not a recipe"): Recipe.from_dict({"learning_rate": 1})

@pytest.mark.parametrize("n", [3, 8, 21])
def test_batch_plan_shares_one_global_order(n):
    single = batch_plan(n, 4, seed=1, epoch=2)
    halves = [batch_plan(n, 2, seed=1, epoch=2, rank=r, processes=2) for r in (0, 1)]
    for k, batch in enumerate(single): assert sorted(batch) == sorted(halves[0][k] + halves[1][k])
    assert all(len(b) == 4 for b in single) and len(single) == max(n // 4, 1)
    assert batch_plan(n, 4, seed=1, epoch=3) != single

def test_poly_rate():
    assert [poly_rate(s, 4, 1.0, 1.0) for s in range(4)] == [1, .75, .5, .25]

@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_state_goes_through_a_file(tmp_path, optimiser):
    model, recipe = tiny(), Recipe.teach(optimiser=optimiser)
    def steps(model, opt, n, seed):
        torch.manual_seed(seed)
        for _ in range(n):
            opt.zero_grad(); model(torch.randn(1, 1, 8, 8)).square().mean().backward(); opt.step()
    opt = make_optimiser(model.parameters(), recipe); steps(model, opt, 3, 0)
    write_tensors(tmp_path/"m.safetensors", model.state_dict(), {"a": [1, 2.5, None]})
    write_tensors(tmp_path/"o.safetensors", optimiser_tensors(opt))
    weights, facts = read_tensors(tmp_path/"m.safetensors")
    assert facts == {"a": [1, 2.5, None]}
    other = tiny(seed=5); other.load_state_dict(weights)
    fresh = make_optimiser(other.parameters(), recipe); fill_optimiser(fresh, read_tensors(tmp_path/"o.safetensors")[0])
    steps(model, opt, 2, 1); steps(other, fresh, 2, 1)
    for a, b in zip(model.parameters(), other.parameters(), strict=True): assert torch.equal(a, b)

def test_bf16_is_not_chosen_where_cpus_get_it_wrong():
    cpu = torch.device("cpu")
    small = build_model("unet-r50", 1, 4, size="teach", spatial_dims=3)
    assert small.encoder.strides[-1] == 8
    assert [deepest_side(small, window) for window in ((16, 16, 4), (48, 48, 24), (9, 99, 99))] == [1, 3, 2]
    assert deepest_side(plain(), (64, 64)) == 0
    assert autocast_type("auto", cpu, 2) is None and autocast_type("fp32", cpu) is None
    assert autocast_type("bf16", cpu, 1) is torch.bfloat16

@pytest.mark.parametrize("dims, window", [(3, (16, 16, 4)), (3, (24, 24, 24)), (2, (24, 24))])
def test_gradients_are_repeatable_in_the_format_chosen(dims, window):
    torch.manual_seed(0)
    model, x = build_model("unet-r50", 1, 4, size="teach", spatial_dims=dims), torch.randn(2, 1, *window)
    kind = autocast_type("auto", torch.device("cpu"), deepest_side(model, window))
    def gradients():
        spoil = [torch.full((n,), float("nan")) for n in (1000, 5000, 20000, 70000, 200000, 500000) * 3]
        del spoil                                        # freed memory full of nan, for whoever reads before writing
        with torch.autocast("cpu", kind or torch.bfloat16, enabled=kind is not None): out = model(x)
        model.zero_grad(); out.float().square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]
    first = gradients()
    for _ in range(4):
        for a, b in zip(first, gradients(), strict=True): assert torch.equal(a, b)

def test_running_average():
    model = torch.nn.BatchNorm1d(1)
    average = RunningAverage(model, 0.5)
    with torch.no_grad(): model.weight.fill_(3.0); model.num_batches_tracked.fill_(7)
    average.update(model, step=100)
    assert average.model.weight.item() == 2 and average.model.num_batches_tracked.item() == 7     # 0.5 * 1 + 0.5 * 3

def test_full_disk_leaves_the_old_state(place, tmp_path, monkeypatch):
    write_tensors(tmp_path/"s.safetensors", {"a": torch.ones(1)})
    def no_room(*args, **kwargs): raise SafetensorError("No space left on device")
    monkeypatch.setattr(supervised, "save_file", no_room)
    with pytest.raises(DatasetError, match="No space left"):
        write_tensors(tmp_path/"s.safetensors", {"a": torch.zeros(1)})
    assert read_tensors(tmp_path/"s.safetensors")[0]["a"].item() == 1 and len(list(tmp_path.iterdir())) == 1
