"""Comparisons: same cases for all, resumable, paired tests with Holm's correction, the papers' tables beside ours, bad input refused."""
import itertools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from common import quiet
from hypothesis import given
from hypothesis import strategies as st

from medseg_nb.cli import main
from medseg_nb.core import CheckpointError, DatasetError, MedsegError, ShapeError
from medseg_nb.data.collections import load_collection
from medseg_nb.data.phantoms import make_phantom
from medseg_nb.evaluation.cases import IN_MM, METRICS, summarise
from medseg_nb.experiments import comparison, tables
from medseg_nb.experiments.comparison import (
    Variant,
    as_variants,
    beside,
    check_seeds,
    compare,
    holm,
    paired_differences,
    paired_tests,
    publish,
    run_folder,
    seconds_spent,
    seed_average,
    signed_rank,
    summarise_models,
    summary_cells,
)
from medseg_nb.experiments.tables import compare_table, list_tables, paper_table, printed_means, table_plan
from medseg_nb.models.zoo import list_models
from medseg_nb.training import supervised
from medseg_nb.training.supervised import Recipe

SMALL = dict(widths=(4, 8))
MODELS = [Variant("plain", "unet-r50", SMALL), Variant("synergy", "synergynet-2s2h", dict(**SMALL, dim=8, codebook_size=16))]
RECIPE = Recipe(epochs=1, batch_size=4, lr=3e-3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Small phantom hearts, and prepared volumes kept among them; one thread, as in the child processes of other tests."
    folder = tmp_path_factory.mktemp("comparison")
    with quiet(folder/"cache"):
        make_phantom("cardiac-mr", 8, 0, folder/"hearts", shape=(32, 32, 4))
        yield folder


@pytest.fixture(scope="module")
def hearts(place): return load_collection(place/"hearts")


@pytest.fixture(scope="module")
def done(place, hearts): return compare(MODELS, hearts, RECIPE, (0, 1), place/"done", rounds=1)


def by_hand():
    "Two models, two seeds, three cases (two of one person), two classes; one value missing."
    rows = []
    for model, seed, shift in (("a", 0, 0.0), ("a", 1, 0.2), ("b", 0, 0.1), ("b", 1, 0.1)):
        for case, value in (("p1_frame01", 0.4), ("p1_frame02", 0.6), ("p2_frame01", 0.2)):
            for name, more in (("liver", 0.1), ("spleen", 0.0)):
                rows.append({"model": model, "seed": seed, "case": case, "class": name, "DSC": value + more + shift})
    frame = pd.DataFrame(rows)
    frame.loc[(frame["model"] == "b") & (frame["case"] == "p2_frame01") & (frame["class"] == "spleen"), "DSC"] = np.nan
    return frame


# ---- one comparison, from runs to files

def test_every_run_is_scored_on_the_same_cases(done):
    s = done.scores
    assert list(s) == ["model", "seed", "case", "class", *METRICS]
    runs = s.groupby(["model", "seed"])
    assert len(runs) == 4 and runs["case"].apply(lambda c: tuple(c)).nunique() == 1
    config = json.loads((done.folder/"comparison.json").read_text())
    assert sorted(set(s["case"])) == sorted(config["comparison"]["data"]["split"]["test"])


def test_files_are_whole_and_the_page_needs_no_other(done):
    names = {p.name for p in done.folder.iterdir()}
    assert {"scores.csv", "summary.csv", "summary.md", "summary.tex", "tests.csv", "costs.csv", "runs.csv", "boxes.png", "boxes.pdf", "seeds.png",
            "worst.png", "report.html", "comparison.json"} <= names
    assert not [p for p in done.folder.rglob(".half-*")]
    page = (done.folder/"report.html").read_text()
    assert "<img" in page and 'src="http' not in page and all(f'href="{n}"' in page for n in ("scores.csv", "tests.csv", "costs.csv"))
    pd.testing.assert_frame_equal(pd.read_csv(done.folder/"scores.csv"), done.scores, check_dtype=False)


def test_costs_and_runs_are_measured(done):
    costs, runs = done.costs.set_index("model"), done.runs
    model = comparison.build_variant(MODELS[0], load_collection(done.folder.parent/"hearts"), RECIPE)
    assert costs.loc["plain", "M parameters"]*1e6 == sum(p.numel() for p in model.parameters())
    assert (costs[["GMAC", "step ms", "peak MiB"]] > 0).all(axis=None) and costs["step ratio"].iloc[0] == 1
    assert costs.loc["synergy", "M parameters"] > costs.loc["plain", "M parameters"]
    assert len(runs) == 4 and (runs["epochs"] == 1).all() and runs["steps"].nunique() == 1 and (runs["seconds"] > 0).all()


def test_peak_memory_counts_what_is_alive_at_once():
    def work(): [torch.ones(1 << 20).sum() for _ in range(4)]      # 4 MiB each, one after another
    assert comparison.peak_memory(work, torch.device("cpu")) == pytest.approx(4, abs=0.5)


def test_finished_runs_are_not_trained_again_and_models_may_be_added(place, hearts, done, monkeypatch):
    weights = sorted(done.folder.glob("runs/*/model.safetensors"))
    before = [w.stat().st_mtime_ns for w in weights]
    def no_step(*_): raise AssertionError("trained")
    monkeypatch.setattr(supervised.Session, "run_epoch", no_step)
    again = compare(MODELS, hearts, RECIPE, (0, 1), done.folder, rounds=1)
    assert [w.stat().st_mtime_ns for w in weights] == before
    pd.testing.assert_frame_equal(again.scores, done.scores)
    with pytest.raises(AssertionError, match="trained"): compare(MODELS, hearts, RECIPE, (0, 1, 2), done.folder, rounds=1)


def test_a_stopped_comparison_goes_on_to_the_same_numbers(place, hearts, done, monkeypatch):
    step, calls, stop = supervised.Session.step, [], int(2.5*done.runs["steps"].iloc[0])      # in the middle of the third run
    def counted(self, *args):
        calls.append(1)
        if len(calls) > stop: raise KeyboardInterrupt
        return step(self, *args)
    monkeypatch.setattr(supervised.Session, "step", counted)
    with pytest.raises(KeyboardInterrupt): compare(MODELS, hearts, RECIPE, (0, 1), place/"stopped", rounds=1)
    monkeypatch.setattr(supervised.Session, "step", step)
    runs = sorted(p.parent.name for p in (place/"stopped").glob("runs/*/cases.csv"))
    assert len(runs) == 2 and seconds_spent(run_folder(place/"stopped", MODELS[0], 1)/"seconds.json") > 0
    result = compare(MODELS, hearts, RECIPE, (0, 1), place/"stopped", rounds=1)
    pd.testing.assert_frame_equal(result.scores, done.scores)


def test_publish_copies_no_weights(place, done, tmp_path):
    files = publish(done.folder, tmp_path/"results")
    assert {"scores.csv", "tests.csv", "epochs.csv", "boxes.pdf", "worst.png"} <= {f.name for f in files}
    assert not list((tmp_path/"results").rglob("*.safetensors")) and sum(f.stat().st_size for f in files) < 1e6
    assert pd.read_csv(tmp_path/"results"/"epochs.csv")["run"].nunique() == 4
    assert str(place) not in "".join(f.read_text() for f in files if f.suffix in (".csv", ".json", ".md", ".tex"))
    with pytest.raises(DatasetError, match="not finished"): publish(tmp_path, tmp_path/"other")


# ---- what is refused, before anything is written

def test_another_comparison_in_the_folder_is_refused(place, hearts, done, tmp_path):
    before = (done.folder/"comparison.json").read_bytes()
    with pytest.raises(CheckpointError, match="another recipe.*lr"): compare(MODELS, hearts, replace(RECIPE, lr=1e-4), (0, 1), done.folder)
    with pytest.raises(CheckpointError, match="other seeds"): compare(MODELS, hearts, RECIPE, (0,), done.folder)
    changed = [MODELS[0], replace(MODELS[1], overrides={**SMALL, "dim": 16})]
    with pytest.raises(CheckpointError, match="other models"): compare(changed, hearts, RECIPE, (0, 1), done.folder)
    assert (done.folder/"comparison.json").read_bytes() == before
    (tmp_path/"letter.txt").write_text("dear")
    with pytest.raises(DatasetError, match="something else"): compare(MODELS, hearts, RECIPE, (0,), tmp_path)
    with pytest.raises(DatasetError, match="is a file"): compare(MODELS, hearts, RECIPE, (0,), tmp_path/"letter.txt")
    (tmp_path/"comparison.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"): compare(MODELS, hearts, RECIPE, (0,), tmp_path)


@pytest.mark.parametrize("models, seeds, reference, kind, said", [
    (["unet-r50"], (0,), None, MedsegError, "at least two"), (["unet-r50", "unet-r50"], (0,), None, MedsegError, "same label"),
    (["unet-r50", "unet-r51"], (0,), None, ShapeError, "no model is called unet-r51"), (MODELS, (), None, MedsegError, "no seeds"),
    (MODELS, (0, 0), None, MedsegError, "twice"), (MODELS, (-1,), None, MedsegError, "does not fit"), (MODELS, (0.5,), None, MedsegError, "does not fit"),
    (MODELS, (0,), "transunet", MedsegError, "not among"),
    ([MODELS[0], Variant("x", "synergynet-8s2h", dict(colour="red"))], (0,), None, ShapeError, "colour")])
def test_bad_requests_write_nothing(hearts, tmp_path, models, seeds, reference, kind, said):
    with pytest.raises(kind, match=said): compare(models, hearts, RECIPE, seeds, tmp_path/"out", reference)
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("words", [
    [], ["--models", "unet-r50"], ["--models", "unet-r50,no-such-model"], ["--models", "unet-r50,synergynet-8s2h", "--seeds", ""],
    ["--models", "unet-r50,synergynet-8s2h", "--seeds", "0,0"], ["--models", "unet-r50,synergynet-8s2h", "--seeds", "0,-1"],
    ["--models", "unet-r50,synergynet-8s2h", "--reference", "vqunet"], ["--table", "synergynet-17"],
    ["--table", "synergynet-5", "--models", "unet-r50,no-such-model"], ["--models", "unet-r50,synergynet-8s2h", "--data", "no/such/folder"]])
def test_command_line_refuses_in_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("medseg: ") and err.strip().count("\n") == 0 and not list(tmp_path.iterdir())


def test_command_line_from_a_stop_to_published_results(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["compare", "--table", "synergynet-8", "--data", str(place/"hearts"), "--seeds", "0", "--epochs", "1", "--dims", "2",
             "--out", "cmp", "--publish", "kept"]
    monkeypatch.setattr(comparison, "fit_missing", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(words) == 2 and "same command" in capsys.readouterr().err
    monkeypatch.undo(); monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    assert "report: cmp/report.html" in capsys.readouterr().out
    kept = pd.read_csv(tmp_path/"kept"/"published.csv")
    assert list(kept["Method"]) == ["SynergyNet(Fusion)", "SynergyNet"] and list(kept["published: ACDC DSC"]) == [88.20, 89.03]
    assert kept["our model"].tolist() == ["synergynet-fusion", "synergynet-8s2h"]
    assert json.loads((tmp_path/"kept"/"comparison.json").read_text())["command"].startswith("medseg compare --table synergynet-8")
    assert "Published figures: other data, other budget" in (tmp_path/"cmp"/"report.html").read_text()


# ---- numbers

def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])      # 4 x .005, 3 x .01, 2 x .03, then never below
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
    np.testing.assert_allclose(holm([0.02, np.nan, 0.5]), [0.04, np.nan, 0.5])
    assert holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_stepping_down_rejects(p):
    adjusted, order = holm(p), np.argsort(p, kind="stable")
    rejected, k = np.zeros(len(p), bool), len(p)
    for i, j in enumerate(order):                              # the definition: stop at the first that is too large
        if p[j]*(k - i) > 0.05: break
        rejected[j] = True
    assert np.array_equal(adjusted <= 0.05, rejected)
    assert np.all(adjusted >= np.asarray(p)) and np.all(adjusted <= np.minimum(np.asarray(p)*k, 1))


def test_signed_rank_is_the_exact_one():
    d = np.array([1.5, -0.3, 2.0, 0.7, 1.1, -0.2, 0.9])
    ranks = np.abs(d).argsort().argsort() + 1
    seen = min(ranks[d > 0].sum(), ranks[d < 0].sum())
    sums = [sum(r for r, sign in zip(ranks, signs) if sign) for signs in itertools.product((0, 1), repeat=len(d))]
    assert signed_rank(d) == pytest.approx(min(1, 2*np.mean(np.array(sums) <= seen)))
    assert signed_rank([0.0, 0.0]) == 1 and np.isnan(signed_rank([]))


def test_differences_pair_class_by_class_and_average_a_person():
    d = paired_differences(by_hand(), "b", "a", "DSC")
    assert list(d.index) == ["p1", "p2"]                       # two frames of p1 are one person
    np.testing.assert_allclose(d, [0.0, 0.0], atol=1e-12)      # a averages shift 0.1; the missing spleen is left out of both


def test_tests_table_says_where_nothing_can_be_significant(done):
    t = done.tests
    assert list(t["metric"]) == list(METRICS) and (t["reference"] == "plain").all() and (t["n"] <= 2).all()
    assert t["note"].str.contains("no p Holm below").all() and ((t["p Holm"] >= t["p"]) | t["p"].isna()).all()
    rng = np.random.default_rng(0)
    rows = [{"model": m, "seed": 0, "case": f"c{i}", "class": "x", "DSC": rng.normal() + 3*(m == "b")} for i in range(12) for m in "abc"]
    clear = paired_tests(pd.DataFrame(rows), "a").set_index("model")
    assert (clear["note"] == "").all() and clear.loc["b", "p Holm"] < 0.01 and clear.loc["b", "p Holm"] == pytest.approx(2*clear.loc["b", "p"])


def test_two_spreads_are_two_numbers():
    table = summarise_models(by_hand()).set_index(["model", "class"])
    a = table.loc[("a", "liver")]
    assert a["DSC"] == pytest.approx(0.6) and a["DSC sd seeds"] == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert a["DSC sd cases"] == pytest.approx(np.std([0.6, 0.8, 0.4], ddof=1)) and a["cases"] == 3 and a["seeds"] == 2
    assert table.loc[("b", "spleen"), "DSC nan"] == 2          # one case in two seeds
    one = by_hand().query("model == 'b' and seed == 0")
    assert table.loc[("b", "mean"), "DSC"] == pytest.approx(summarise(one).loc["mean", "DSC"])
    cells = summary_cells(summarise_models(by_hand()), ["DSC"])
    assert cells.index[0] == "mean" and cells["DSC"].iloc[2] == "0.600 ± 0.141 (0.200)" and cells["DSC"].iloc[5].endswith(", 2 nan")
    assert len(seed_average(by_hand())) == 12


# ---- the papers' tables

def test_tables_hold_what_the_papers_print():
    assert paper_table("synergynet-1").set_index("Method").loc["SynergyNet-8s2h", "Stomach"] == 81.30
    assert paper_table("synergynet-5").set_index("K").loc["64", "Synapse HD"] == 88.67
    assert paper_table("l2gnet-3").set_index("K_dim").loc["512", "Synapse L2GNet DSC"] == 82.23
    assert paper_table("l2gnet-2").set_index("Method").loc["L2GNet(2-ref)", "HD RV"] == 1.42
    assert paper_table("l2gnet-5")["q SynergyNet"].tolist() == ["2-2", "8-2"]
    assert paper_table("cmaformer-1").set_index("Method").loc["LeViT-UNet-384s", "Pancreas"] == 59.07
    assert paper_table("cmaformer-2").set_index("Method").loc["CMAformer", "Tumour"] == 93.34 and paper_table("cmaformer-3")["Tumour"].iloc[-1] == 94.21
    for name in tables.PRINTED: assert not paper_table(name).isna().any(axis=None), name
    with pytest.raises(MedsegError, match="synergynet-5"): paper_table("synergynet-0")


def test_printed_means_that_are_not_the_mean_of_their_classes():
    found = printed_means().set_index(["table", "method"])
    assert found.loc[("synergynet-1", "R50 Att-UNet"), "mean of classes"] == pytest.approx(72.10, abs=0.01)
    assert ("synergynet-1", "TransUNet") not in found.index
    assert found.loc[("cmaformer-3", "yes yes yes"), "difference"] == pytest.approx(0.43) and "cmaformer-2" not in found.index.get_level_values(0)


@pytest.mark.parametrize("size", ["teach", "paper"])
@pytest.mark.parametrize("name", list_tables())
def test_every_table_has_a_plan(name, size):
    models, reference, published = table_plan(name, size)
    assert len(models) >= 2 and reference in [v.label for v in models] == list(dict.fromkeys(v.label for v in models))
    assert all(len(labels) == len(published.printed) for labels in published.ours.values())
    values = {m: 3.0 if m in IN_MM else 0.5 for m in METRICS} | {f"{m} sd seeds": np.nan if m in IN_MM else 0.01 for m in METRICS}
    table = beside(published, pd.DataFrame({"model": [models[0].label], "class": "mean", **values}))
    assert len(table) == len(published.printed) and any("50.00 ± 1.00" in row for row in table.to_numpy())
    assert ("3.00" in table.to_numpy()) == ("HD95" in published.metrics) == any("(mm)" in c for c in table)
    assert sum(c.startswith("published: ") for c in table) == published.printed.shape[1] - len(published.keys)


def test_a_comparison_has_one_kind_of_image():
    plan = lambda *args: [v.name for v in table_plan(*args)[0]]
    assert plan("cmaformer-2") == plan("cmaformer-2", "paper", 2) == ["resunet++", "transunet", "cmaformer", "cmaformer"]
    assert plan("cmaformer-1", "teach", 3) == ["transunet", *plan("cmaformer-1", "paper", 3)] == ["transunet", "swin-unetr", "unetr", "nnformer"]
    assert table_plan("cmaformer-1")[1] == "cmaformer" and table_plan("cmaformer-1", "paper", 3)[1] == "swin-unetr"
    assert plan("synergynet-1", "teach", 3) == plan("synergynet-1")
    for name, size in (("cmaformer-3", "teach"), ("synergynet-1", "paper")):
        with pytest.raises(ShapeError, match="--dims"): table_plan(name, size, 3)


@pytest.mark.parametrize("name", [*(f"synergynet-{k}" for k in (5, 6, 7, 8, 9)), "cmaformer-2", "cmaformer-3"])
def test_ablations_build_at_teaching_size(name, hearts):
    for v in table_plan(name)[0]:
        assert v.name in list_models() and comparison.build_variant(v, hearts, Recipe()).config["name"] == v.name


def test_cited_methods_stand_only_in_the_published_block():
    models, _, published = table_plan("peers")
    assert not {"SSNet", "TranSSNet"} & {v.name for v in models}
    rows = dict(zip(published.printed["Method"], published.ours[""]))
    assert rows["SSNet (cited only)"] is None and rows["l2gnet-4ref"] == "l2gnet-4ref"
    assert published.printed.set_index("Method").loc["unet-r50", ["Synapse DSC", "Synapse in L2GNet DSC"]].tolist() == [74.68, 77.54]


def test_scaled_values_are_a_quarter():
    for name in ("synergynet-5", "synergynet-6"):
        teach, paper = (table_plan(name, size)[0] for size in ("teach", "paper"))
        assert [{k: 4*x for k, x in v.overrides.items()} for v in teach] == [v.overrides for v in paper]


def test_a_table_with_an_unknown_model_is_refused_before_training(monkeypatch, hearts, tmp_path):
    unknown = replace(tables.TABLES["synergynet-8"], models=lambda row, size: {"": Variant(row["Method"], "net-of-tomorrow")})
    monkeypatch.setitem(tables.TABLES, "synergynet-8", unknown)
    with pytest.raises(ShapeError, match="net-of-tomorrow"): compare_table("synergynet-8", hearts, RECIPE, (0,), tmp_path/"out")
    assert not (tmp_path/"out").exists()
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--table", "synergynet-8"]) == 2 and not list(tmp_path.iterdir())


def test_seeds_and_names():
    assert check_seeds(np.arange(3)) == [0, 1, 2]
    assert [v.slug for v in as_variants(["unet-r50", Variant("K 256, dim 128", "synergynet-8s2h")])] == ["unet-r50", "K-256-dim-128"]
