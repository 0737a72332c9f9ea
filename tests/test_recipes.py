"""The papers' tables as recipes: each takes a step of each kind at teaching size on a small replica; recipes, splits and metrics are the paper's;
a dry run writes nothing; TransUNet's convention is in voxels."""
import itertools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from common import quiet
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.cli import asked_changes, main, make_parser, make_recipe
from medseg_nb.core import MedsegError
from medseg_nb.data import load_collection, load_modalities, make_phantom
from medseg_nb.evaluation.cases import measured_as, with_unit
from medseg_nb.evaluation.metrics import evaluate_case, hd95
from medseg_nb.experiments import comparison
from medseg_nb.experiments.before_a_run import MultimodalOutline, Outline, bytes_of, counted_saved, dry_run, recipe_line
from medseg_nb.experiments.comparison import Variant, beside, compare, fit_missing, printed_classes, published_caption, summarise_models
from medseg_nb.experiments.modalities import (
    LSSC_TABLES,
    LSSC_TITLES,
    ModalityTable,
    beside_settings,
    fit_trials,
    lssc_printed,
    plan_trials,
    trial_model,
    write_beside,
)
from medseg_nb.experiments.tables import STAND_IN, TABLES, choose_rows, compare_table, table_plan, table_recipe
from medseg_nb.training import semisupervised, supervised
from medseg_nb.training.multimodal import MultimodalData, MultimodalRecipe
from medseg_nb.training.semisupervised import SemisupervisedData, SemisupervisedRecipe
from medseg_nb.training.supervised import Recipe, TrainingData

SHAPES = {"skin-lesion": (5, (24, 32, 1)), "brain-tumour": (10, (24, 24, 1)), "cardiac-mr": (10, (24, 24, 4)), "abdomen-ct": (5, (24, 24, 4)),
          "liver-tumour-ct": (7, (32, 32, 4)), "abdomen-mr": (4, (24, 24, 4))}
SMALL = [Variant("plain", "unet-r50", dict(widths=(4, 8))), Variant("vq", "vqunet", dict(widths=(4, 8), dim=8, codebook_size=16))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A small replica of each collection, drawn; prepared volumes are kept beside them."
    folder = tmp_path_factory.mktemp("recipes")
    with quiet(folder/"cache"), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MEDSEG_DATA", raising=False)
        for seed, (kind, (n, shape)) in enumerate(SHAPES.items()): make_phantom(kind, n, seed, folder/kind, shape=shape)
        yield folder


@pytest.fixture(scope="module")
def replicas(place): return {kind: load_collection(place/kind, check=False) for kind in SHAPES}


@pytest.fixture(scope="module")
def pair(place): return load_modalities({"ct": place/"abdomen-ct", "mr": place/"abdomen-mr"})


@pytest.fixture
def one_step(monkeypatch):
    "An epoch is one step."
    whole = supervised.batch_plan
    for module in (supervised, semisupervised): monkeypatch.setattr(module, "batch_plan", lambda *a, **k: whole(*a, **k)[:1])


def files_below(*folders):
    "All files and when they changed."
    return {p: p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def no_pictures(monkeypatch):
    "Tables alone: other tests look at figures, costs and the page."
    monkeypatch.setattr(comparison, "measure_costs", lambda variants, *a: pd.DataFrame({"model": [v.label for v in variants], "peak MiB": 0.0}))
    monkeypatch.setattr(comparison, "worst_pictures", lambda *a: [])
    for name in ("plot_boxes", "plot_seeds", "worst_page", "write_figure", "write_comparison_report"): monkeypatch.setattr(comparison, name, lambda *a: None)


# ---- every table

@pytest.mark.parametrize("name", TABLES)
def test_every_table_runs_at_teaching_size(name, replicas, tmp_path, one_step):
    collection = replicas[STAND_IN[TABLES[name].data]]
    models, _, published = table_plan(name)
    recipe = table_recipe(name, collection, epochs=1, batch_size=2, dims=2)
    chosen = models[-2:] if name == "cmaformer-2" else models[:2]                        # half the labels, and all
    scores = fit_missing(chosen, collection, recipe, [0], tmp_path)
    table = beside(published, summarise_models(scores))
    mine = table[table["our model"].isin([v.label for v in chosen])] if "our model" in table else table.iloc[:1]
    for m in TABLES[name].metrics: assert any(c.startswith("ours:") and with_unit(m) in c for c in table), m
    ours = mine[[c for c in mine if c.startswith("ours:") and "DSC" in c and "SynergyNet" not in c]]
    assert len(mine) and (ours != "–").any(axis=None)
    classes = set(collection.classes.values()) - {"background"}
    shown = len(published.metrics) + len(printed_classes(published.printed, classes))
    assert not {"RV", "Aorta"} & set(published.printed) or sum(c.startswith("ours:") for c in table) == shown > len(published.metrics)


@pytest.mark.parametrize("name", LSSC_TITLES)
def test_every_table_of_two_modalities_runs(name, pair, tmp_path, one_step):
    trials, model = plan_trials(name, ["ct", "mr"]), trial_model(name) if name == "lssc-3" else "lssc-2d"      # volumes once: they take longer
    frame = dict(dims=3, patch=(16, 16, 8), per_case=1) if model == "lssc-3d" else dict(dims=2)
    recipe = MultimodalRecipe.teach(pair, epochs=1, batch_size=1, **frame)
    chosen = trials[-2:-1] if name == "lssc-4" else trials[:1]
    scores = fit_trials(chosen, pair, recipe, [0], tmp_path, model)
    table = beside_settings(name, scores)
    assert list(table.index) == list(lssc_printed(name).index) and (table["our trial"] == chosen[0].label).sum() == 1
    assert table.loc[table["our trial"] == chosen[0].label, "ours: ct liver"].iloc[0] != "–"
    assert [c for c in table if c.startswith("published: ")] == [f"published: {c}" for c in lssc_printed(name)]


@pytest.mark.parametrize("name", TABLES)
def test_some_rows_and_a_model_below_them(name):
    models, reference, published = plan = table_plan(name)
    others = [m for m in ("swin-unet", "resunet++") if m not in [v.label for v in models]]
    chosen, first, layout = choose_rows(plan, [models[-1].label, *others])
    assert [v.label for v in chosen] == [models[-1].label, *others] and first == (reference if reference == models[-1].label else models[-1].label)
    whole = {m: [label if label == models[-1].label else None for label in labels] for m, labels in published.ours.items()}
    for i, (method, labels) in enumerate(layout.ours.items()): assert labels == whole[method] + (others if i == 0 else [None]*len(others))
    pd.testing.assert_frame_equal(layout.printed.head(len(published.printed)), published.printed, check_dtype=False)
    assert layout.printed.tail(len(others)).drop(columns=list(published.keys)).isna().all(axis=None)


def test_lssc_tables_hold_what_the_paper_prints():
    assert lssc_printed("lssc-2").loc["Ours", "overall mean"] == "91.4" and lssc_printed("lssc-3", "ASSD").loc["Joint V1+CR", "MRI R-kdy"] == "0.94 ± 0.43"
    assert lssc_printed("lssc-4").loc["One annotated CT", "MRI mean"] == "87.6" and lssc_printed("lssc-fig6").loc["tau 4", "overall mean"] == "92.7"
    for name, metric in itertools.product(("lssc-2", "lssc-3", "lssc-4", "lssc-5"), ("DSC", "ASSD")): assert lssc_printed(name, metric).shape[1] == 11
    means = lssc_printed("lssc-3")[["CT mean", "MRI mean", "overall mean"]].astype(float)
    assert (means[["CT mean", "MRI mean"]].mean(axis=1) - means["overall mean"]).abs().max() < 0.11    # rounding
    assert [t.label for t in plan_trials("lssc-4", ["ct", "mr"])] == ["baseline", "ours", "ours, 1 mr", "ours, 3 mr", "ours, 1 ct", "ours, 3 ct"]
    assert {(t.setting, t.tau) for t in plan_trials("lssc-fig6", ["ct", "mr"])[1:]} == {("v3-icr", tau) for tau in (1., 2., 4., 8.)}
    with pytest.raises(MedsegError, match="lssc-fig6"): lssc_printed("lssc-9")


def test_lssc_tables_are_written_beside_the_paper(tmp_path):
    rows = [{"model": m, "seed": 0, "modality": k, "case": c, "class": "LVM", **dict.fromkeys(comparison.METRICS, v)}
            for m in ("baseline", "ours") for k in ("ct", "mr") for c, v in (("a", 0.5), ("b", 0.7))]
    write_beside("lssc-2", ModalityTable(tmp_path, pd.DataFrame(rows), pd.DataFrame(), pd.DataFrame()))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"published_{m}.{end}" for m in ("ASSD", "DSC") for end in ("csv", "md", "tex")]
    table = pd.read_csv(tmp_path/"published_DSC.csv", index_col=0)
    assert table.loc["Ours", ["our trial", "ours: mr LVM", "published: MRI LVM"]].tolist() == ["ours", "60.0 ± 14.1", "81.6 ± 2.5"]
    assert table.loc["UMMKD", ["our trial", "ours: ct LVM"]].tolist() == ["–", "–"] and "not to be compared" in (tmp_path/"published_DSC.md").read_text()


# ---- the papers' recipes, splits and metrics

def test_every_paper_has_its_own_recipe(replicas):
    synergynet = dict(optimiser="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4, batch_size=8, inplane=224, size="paper", dims=2)
    cmaformer = dict(optimiser="sgd", lr=0.001, momentum=0.99, weight_decay=3e-5, power=0.9, inplane=512, size="paper", dims=2)
    for name, table in TABLES.items():
        recipe = table_recipe(name, replicas["abdomen-ct"], "paper")
        expected = cmaformer if name.startswith("cmaformer") else synergynet
        assert {k: getattr(recipe, k) for k in expected} == expected, name
        assert isinstance(recipe, SemisupervisedRecipe) == (name in ("cmaformer-2", "cmaformer-3"))
        assert table.paper == ("cmaformer" if name.startswith("cmaformer") else "synergynet")
    assert not isinstance(Recipe.paper("cmaformer"), SemisupervisedRecipe) and SemisupervisedRecipe.paper().supervision == "mse"
    hearts, volumes = MultimodalRecipe.paper("lssc-2d"), MultimodalRecipe.paper(trial_model("lssc-3"))
    assert (hearts.lr, hearts.batch_size, hearts.epochs, hearts.crop) == (1e-4, 12, 100, 224) and (volumes.batch_size, volumes.patch) == (2, (128, 128, 64))


def test_a_table_takes_the_papers_split_unless_the_collection_brings_one(replicas):
    livers = replicas["liver-tumour-ct"]
    assert table_recipe("cmaformer-3", livers).split == "80/15/5" and table_recipe("synergynet-1", livers).split == "auto"
    ids = [c.id for c in livers.cases]
    divided = replace(livers, splits={"train": ids[:4], "validation": ids[4:5], "test": ids[5:]})
    assert table_recipe("cmaformer-3", divided).split == "auto" and Outline(divided, table_recipe("cmaformer-1", divided)).split["test"] == ids[5:]
    assert table_recipe("cmaformer-3", divided, split="random").split == "random"


def test_the_command_line_trains_cmaformer_as_its_paper_does(replicas):
    def asked(*words): return make_recipe(make_parser().parse_args(["train", *words, "--size", "paper"]), replicas["cardiac-mr"])
    assert asked("cmaformer").lr == 0.001 and asked("cmaformer", "--lr", "0.5").lr == 0.5
    assert asked("unet-r50").lr == 0.01 and isinstance(asked("cmaformer", "--labelled", "0.5"), SemisupervisedRecipe)
    assert asked_changes(make_parser().parse_args(["train", "unet-r50", "--epochs", "3"])) == {"epochs": 3}


@pytest.mark.parametrize("column, name", [("KidneyL", "kidney L"), ("KidneyL", "left kidney"), ("KidneyR", "right_kidney"), ("Myo", "MYO"),
                                          ("Myo", "myocardium"), ("Tumour", "tumor"), ("Aorta", "aorta"), ("RV", "RV")])
def test_classes_are_known_by_other_spellings(column, name):
    assert printed_classes(["DSC", column, f"HD {column}"], [name, "colon"]) == {column: (name, "DSC"), f"HD {column}": (name, "HD95")}
    assert not printed_classes([column, "Synapse HD"], ["colon"])


def test_the_layout_is_the_papers_and_says_the_unit():
    frame = pd.DataFrame([{"model": "unet-r50", "seed": 0, "case": c, "class": k, **dict.fromkeys(comparison.METRICS, v)}
                          for c, v in (("a", 0.5), ("b", 0.7)) for k in ("RV", "MYO", "LV")])
    for convention, unit in (("medpy", "mm"), ("transunet", "voxels")):
        frame.attrs = measured_as(convention)
        _, _, published = table_plan("l2gnet-2")
        table = beside(published, summarise_models(frame))
        row = table.loc["UNet", ["ours: DSC (%)", f"ours: HD95 ({unit})", "ours: Myo (%)", f"ours: HD RV ({unit})"]]
        assert row.tolist() == ["60.00", "0.60", "60.00", "0.60"]
        assert f"ours in {unit}" in published_caption(published, convention)
    assert "Distances" not in published_caption(table_plan("synergynet-3")[2])


# ---- before a run

def test_an_outline_counts_as_the_data_do(replicas, pair, tmp_path):
    hearts, livers = replicas["cardiac-mr"], replicas["liver-tumour-ct"]
    def facts(d): return len(d.samples), d.window, d.classes, d.in_channels, getattr(d, "split", None)
    for collection, recipe in ((hearts, Recipe(batch_size=2)), (hearts, Recipe(inplane=16, neighbours=1)),
                               (livers, Recipe(dims=3, patch=(16, 16, 8), split="80/15/5")), (livers, Recipe(spacing=(14., 14., 16.))),
                               (livers, Recipe(crop_volume=16))):
        assert facts(Outline(collection, recipe)) == facts(TrainingData(collection, recipe, tmp_path))
    for method, dims in (("ours", 2), ("all-labels-ldc", 2), ("ours", 3)):
        recipe = SemisupervisedRecipe(method=method, dims=dims, patch=(16, 16, 8) if dims == 3 else None, labelled=2)
        ours, data = Outline(livers, recipe), SemisupervisedData(livers, recipe, tmp_path)
        for part in ("samples", "labelled", "unlabelled"): assert len(getattr(ours, part)) == len(getattr(data, part)), part
        assert ours.window == data.window and ours.known == data.known
    for recipe in (MultimodalRecipe(), MultimodalRecipe(dims=3, patch=(16, 16, 8), shots={"mr": 1})):
        ours, data = MultimodalOutline(pair, recipe), MultimodalData(pair, recipe, tmp_path)
        assert (len(ours.samples), ours.window) == (len(data.samples), data.window)
        assert [facts(d) for d in ours.each.values()] == [facts(d) for d in data.each.values()]


def test_saved_activations_are_counted_once():
    conv, x = torch.nn.Conv2d, torch.zeros(8, 1, 64, 64)
    net = torch.nn.Sequential(conv(1, 16, 3, padding=1), torch.nn.ReLU(), conv(16, 2, 3, padding=1))
    with counted_saved(net.parameters()) as seen: net(x).sum()
    assert sum(seen.values()) == x.nbytes + 8*16*64*64*4 and bytes_of([x, x]) == x.nbytes


def test_a_plan_adds_up(replicas):
    recipe = Recipe(batch_size=2, epochs=3)
    plan = dry_run(SMALL, replicas["cardiac-mr"], recipe, (0, 1))
    slices = len(Outline(replicas["cardiac-mr"], recipe).samples)
    assert plan["model"].tolist() == ["plain", "vq"] and (plan["steps a run"] == 3*(slices//2)).all()
    assert np.allclose(plan["h in all"], 2*plan["h a run"]) and np.allclose(3600*plan["h a run"], plan["steps a run"]*plan["s a step"])
    adam, sgd = (dry_run(SMALL[:1], replicas["cardiac-mr"], replace(recipe, optimiser=o), (0,))["GiB"].iloc[0]*2**30 for o in ("adamw", "sgd"))
    assert adam - sgd == pytest.approx(4e6*plan["M parameters"].iloc[0], rel=0.05)             # one more number a parameter
    assert "3 epochs" in recipe_line(recipe) and "windows of 16 x 16 x 8" in recipe_line(Recipe(dims=3, patch=(16, 16, 8)))


@pytest.mark.parametrize("words", [["--table", "synergynet-8"], ["--models", "unet-r50,vqunet", "--data", "cardiac-mr"],
                                   ["--table", "synergynet-2", "--models", "unet-r50,l2gnet-4ref", "--data", "cardiac-mr"],
                                   ["--table", "cmaformer-3", "--data", "liver-tumour-ct"], ["--table", "lssc-2", "--data", "ct=abdomen-ct,mr=abdomen-mr"]])
def test_a_dry_run_writes_nothing(words, place, tmp_path, monkeypatch, capsys):
    (tmp_path/"here").mkdir(); monkeypatch.chdir(tmp_path/"here")
    where = {"MEDSEG_CACHE": tmp_path/"cache", "HOME": tmp_path, "MEDSEG_DATA": place}     # names find the replicas
    for name, value in where.items(): monkeypatch.setenv(name, str(value))
    if words[1] == "synergynet-8": words = [*words, "--data", str(place/"cardiac-mr")]
    if words[1] == "lssc-2": monkeypatch.setitem(LSSC_TABLES, "lssc-2", lambda modalities: plan_trials("lssc-settings", modalities)[1:3])
    before = files_below(tmp_path, place)
    assert main(["compare", *words, "--dry-run", "--seeds", "0,1", "--epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert "x 2 seeds (0, 1)" in said and "Nothing was written" in said and "s a step" in said and ("estimate" in said or torch.cuda.is_available())
    assert files_below(tmp_path, place) == before and list((tmp_path/"here").iterdir()) == []


def test_a_dry_run_refuses_what_the_run_would(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"taken").mkdir(); (tmp_path/"taken"/"letter.txt").write_text("mine")
    hearts = ["--data", str(place/"cardiac-mr"), "--dry-run"]
    for words, said in ((["--table", "synergynet-8", *hearts, "--out", "taken"], "holds something else"),
                        (["--table", "synergynet-17", *hearts], "no table has this name"),
                        (["--table", "synergynet-2", "--models", "unet-r50,unet-r51", *hearts], "unet-r51"), (hearts, "--models or --table"),
                        (["--table", "cmaformer-3", *hearts, "--dims", "3"], "sees such images")):
        assert main(["compare", *words]) == 2 and said in capsys.readouterr().err


# ---- TransUNet's convention

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0., .2, .6]), st.sampled_from([0., .2, .6]), st.tuples(*[st.floats(0.3, 9)]*3))
def test_transunets_convention_is_in_voxels_and_a_missed_class_is_zero(seed, p, q, spacing):
    rng = np.random.default_rng(seed)
    pred, truth = (rng.random((4, 5, 3)) < share for share in (p, q))
    row = evaluate_case(pred, truth, spacing, {0: "background", 1: "organ"}, convention="transunet").iloc[0]
    if pred.any() and truth.any():
        assert row["HD95"] == hd95(pred, truth, (1, 1, 1)) and row["DSC"] == 2*(pred & truth).sum()/(pred.sum() + truth.sum())
    else: assert (row["DSC"], row["HD95"]) == ((1, 0) if pred.any() else (0, 0))            # as its public evaluation returns
    assert hd95(pred, truth, spacing, "transunet") == row["HD95"]
    ours = evaluate_case(pred, truth, spacing, {0: "background", 1: "organ"}).iloc[0]
    assert np.isnan(ours["HD95"]) == (not pred.any() or not truth.any())                    # ours says that there is none


def test_units_stand_in_the_titles():
    titles = [with_unit(m, c) for m, c in (("HD95", "medpy"), ("ASSD", "transunet"), ("DSC", "transunet"), ("HD95", None))]
    assert titles == ["HD95 (mm)", "ASSD (voxels)", "DSC", "HD95 (mm)"]
    assert measured_as("transunet")["empty"] == "transunet" and measured_as("monai", "nan") == {"convention": "monai", "empty": "nan"}
    with pytest.raises(MedsegError, match="transunet"): measured_as("itk")


def test_a_comparison_is_scored_either_way_and_trained_once(replicas, tmp_path, monkeypatch, no_pictures):
    recipe, hearts = Recipe(epochs=1, batch_size=4), replicas["cardiac-mr"]
    with pytest.raises(MedsegError, match="no such convention"): compare(SMALL, hearts, recipe, (0,), tmp_path/"out", convention="itk")
    first = compare(SMALL, hearts, recipe, (0,), tmp_path/"out")
    assert "HD95 (mm)" in (tmp_path/"out"/"summary.md").read_text() and first.convention == "medpy"
    def no_step(*_): raise AssertionError("trained")
    monkeypatch.setattr(supervised.Session, "run_epoch", no_step)
    voxels = compare(SMALL, hearts, recipe, (0,), tmp_path/"out", convention="transunet")
    text = (tmp_path/"out"/"summary.md").read_text()
    assert "HD95 (voxels)" in text and "TransUNet" in text and "(mm)" not in text and voxels.convention == "transunet"
    assert json.loads((tmp_path/"out"/"comparison.json").read_text())["measured"]["convention"] == "transunet"
    both = first.scores.merge(voxels.scores, on=["model", "seed", "case", "class"]).dropna()
    assert len(both) and not np.allclose(both["HD95_x"], both["HD95_y"]) and (both["DSC_x"] == both["DSC_y"]).all()
    pd.testing.assert_frame_equal(compare(SMALL, hearts, recipe, (0,), tmp_path/"out").scores, first.scores, check_dtype=False)


def test_the_command_line_scores_either_way(place, tmp_path, monkeypatch, capsys, no_pictures, one_step):
    monkeypatch.chdir(tmp_path)
    words = ["compare", "--table", "synergynet-8", "--data", str(place/"cardiac-mr"), "--seeds", "0", "--epochs", "1", "--out", "cmp"]
    assert main([*words, "--convention", "transunet"]) == 0
    assert "HD95 (voxels)" in capsys.readouterr().out and "ours: HD95 (voxels)" in pd.read_csv("cmp/published.csv")
    run = str(next((tmp_path/"cmp"/"runs").iterdir()))
    for convention, unit in (("transunet", "voxels"), ("medpy", "mm")):
        assert main(["evaluate", run, "--convention", convention]) == 0 and f"HD95 ({unit})" in capsys.readouterr().out
    both = f"ct={place/'abdomen-ct'},mr={place/'abdomen-mr'}"
    assert main(["compare", "--table", "lssc-2", "--data", both, "--convention", "transunet"]) == 2 and "in mm" in capsys.readouterr().err


def test_the_metrics_of_a_table_reach_its_files(replicas, tmp_path, monkeypatch, no_pictures, one_step):
    monkeypatch.setattr("medseg_nb.experiments.tables.table_plan", lambda *a: (SMALL, "plain", table_plan("synergynet-3")[2]))
    result = compare_table("synergynet-3", replicas["skin-lesion"], Recipe(epochs=1, batch_size=2), (0,), tmp_path/"out")
    assert result.metrics == ("IoU", "DSC", "ACC", "SP", "SE")
    head = (tmp_path/"out"/"summary.md").read_text().splitlines()[0]
    assert [c.strip() for c in head.strip("|").split("|")] == ["class", "model", *result.metrics]
    assert [c for c in pd.read_csv(tmp_path/"out"/"published.csv") if c.startswith("ours")] == [f"ours: {m} (%)" for m in result.metrics]
