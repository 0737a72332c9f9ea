"""The `medseg` command: what it prints, its exit status, and that bad input leaves nothing half-written."""
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg_nb.cli import find_images, main, make_parser

BIN = Path(sys.executable).parent/"medseg"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A phantom and a run of one epoch on it, made through the command line."
    root = tmp_path_factory.mktemp("cli")
    assert main(["phantom", "cardiac-mr", "--cases", "5", "--seed", "1", "--out", str(root/"hearts")]) == 0
    assert main(["train", "unet-r50", "--data", str(root/"hearts"), "--epochs", "1", "--dims", "2", "--out", str(root/"run")]) == 0
    return root


def test_train_leaves_a_whole_run(run):
    names = {p.name for p in (run/"run").iterdir()}
    assert {"config.json", "metrics.csv", "model.safetensors", "report.html", "cases.csv"} <= names
    assert not [n for n in names if n.startswith(".half")]
    report = (run/"run"/"report.html").read_text()
    assert "<img" in report and "http://" not in report.replace("http://www.w3.org", "") and 'src="http' not in report


def test_evaluate_prints_a_table(run, capsys):
    assert main(["evaluate", str(run/"run"), "--part", "validation", "--out", str(run/"v.csv")]) == 0
    assert "DSC" in capsys.readouterr().out and "LV" in (run/"v.csv").read_text()


def test_predict_one_file_on_its_grid_with_names(run):
    image = sorted((run/"hearts"/"imagesTr").glob("*.nii.gz"))[0]
    assert main(["predict", str(run/"run"), str(image), "--out", str(run/"mask.nii.gz")]) == 0
    mask, source = nib.load(run/"mask.nii.gz"), nib.load(image)
    assert mask.shape == source.shape and np.allclose(mask.affine, source.affine)
    assert "LV" in (run/"mask.json").read_text() or any("LV" in str(e.get_content()) for e in mask.header.extensions)


def test_predict_a_folder_with_a_broken_file(run, capsys, tmp_path):
    folder = tmp_path/"images"; folder.mkdir()
    for p in sorted((run/"hearts"/"imagesTr").glob("*.nii.gz"))[:2]: (folder/p.name).write_bytes(p.read_bytes())
    (folder/"aaa_broken.nii.gz").write_bytes(b"not gzip")
    assert main(["predict", str(run/"run"), str(folder), "--out", str(tmp_path/"masks")]) == 2
    out, err = capsys.readouterr()
    assert "2 of 3" in out and "aaa_broken" in err and err.count("medseg: ") == 1    # bars may stand before it, on a slow machine
    assert len(list((tmp_path/"masks").glob("*.nii.gz"))) == 2


@pytest.mark.parametrize("words", [
    ["train", "no-such-model", "--data", "cardiac-mr"], ["train", "unet-r50", "--data", "no/such/folder"], ["phantom", "no-such-kind", "--out", "x"],
    ["evaluate", "no/such/run"], ["predict", "no/such/run", "x.nii.gz", "--out", "y"]])
def test_bad_input_is_status_2_and_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("medseg: ") and err.strip().count("\n") == 0
    assert not [p for p in tmp_path.rglob("*") if "runs/phantoms" not in p.as_posix() and p.is_file()]


def test_channels_are_gathered_by_case(tmp_path):
    for n in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz"): (tmp_path/n).touch()
    assert {k: len(v) for k, v in find_images(tmp_path).items()} == {"a": 2, "b": 1}


def test_installed_command_and_help():
    out = subprocess.run([BIN, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(word in out for word in ("models", "phantom", "data", "train", "compare", "evaluate", "predict", "surfaces"))
    for word in ("models", "phantom", "data", "train", "compare", "evaluate", "predict", "surfaces"):
        assert f"example: medseg {word}" in " ".join(subprocess.run([BIN, word, "--help"], capture_output=True, text=True, check=True).stdout.split())
    assert subprocess.run([BIN, "evaluate", "no/such/run"], capture_output=True).returncode == 2


def commands_said():
    "(where, command, whether it stands on a line of its own) of every `medseg ...` in the README and in the notebooks' text, exercises left out."
    root = Path(__file__).parents[1]
    pages = {root/"README.md": [(root/"README.md").read_text()]}
    for file in sorted((root/"nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in file.parts:
            pages[file] = ["".join(c["source"]).split("## Exercises")[0] for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "markdown"]
    for file, texts in pages.items():
        for line in "\n".join(texts).splitlines():
            if own := re.match(r"(?:    )?(?:\.venv/bin/)?(medseg [a-z][^#`]*)", line): yield file.name, own[1], True
            else: yield from ((file.name, said, False) for said in re.findall(r"`(medseg [a-z][^`]*)`", line))


def test_every_command_in_the_text_exists():
    said, parser = list(commands_said()), make_parser()
    names = next(a.choices for a in parser._actions if a.choices)
    assert len(said) > 50 and {"train", "compare", "data", "predict", "surfaces"} <= {s.split()[1] for _, s, _ in said}
    for file, command, whole in said:
        words = shlex.split(command)[1:]
        assert words[0] in names, (file, command)
        if not whole: continue
        try: parser.parse_args(words)
        except SystemExit: pytest.fail(f"{file}: {command}")
