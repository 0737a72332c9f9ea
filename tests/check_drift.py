"""Does the library follow from the notebooks? Exports a copy and compares.

`python tests/check_drift.py` fails if a module, README.md or a notebook's metadata differs from what the notebooks give,
or if a module has no notebook. `--write` rewrites README.md from nbs/index.ipynb.
"""
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
FIRST_LINE = "<!-- Written from nbs/index.ipynb by `make readme`; edit the notebook. -->\n\n"


def table(match: re.Match) -> str:
    "The Markdown table of a CSV file named in a comment."
    with open(ROOT/match[1], newline="") as file: head, *rows = csv.reader(file)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def readme(root: Path) -> str:
    "README.md as nbs/index.ipynb gives it: markdown cells and pictures, paths seen from the project's root."
    import nbformat
    notebook = nbformat.read(root/"nbs"/"index.ipynb", 4)
    cells = [c.source for c in notebook.cells if c.cell_type == "markdown"]
    text = "\n\n".join(cells).strip() + "\n"
    text = re.sub(r"\]\((?!https?://|#|\.\./)", "](nbs/", text)     # a notebook beside index.ipynb
    text = re.sub(r"<!-- table: (\S+) -->", table, text)
    return FIRST_LINE + text.replace("](../", "](")


def files(root: Path) -> dict[str, bytes]:
    "Every file the notebooks determine, by its path."
    found = [*root.glob("nbs/**/*.ipynb"), *(p for p in root.glob("medseg_nb/**/*.py") if p.name != "__init__.py")]
    return {str(p.relative_to(root)): p.read_bytes() for p in found if ".ipynb_checkpoints" not in p.parts}


def exported_copy(folder: Path) -> Path:
    "A copy of the project with its modules deleted, exported and cleaned afresh."
    copy = folder/"project"
    shutil.copytree(ROOT/"nbs", copy/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "setup.py"): shutil.copy(ROOT/name, copy/name)
    for p in ROOT.glob("medseg_nb/**/__init__.py"):
        (copy/p.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True); shutil.copy(p, copy/p.relative_to(ROOT))
    for command in ("nbdev-export", "nbdev-clean"):
        subprocess.run([BIN/command], cwd=copy, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    return copy


def main() -> int:
    if "--write" in sys.argv:
        (ROOT/"README.md").write_text(readme(ROOT), encoding="utf-8")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        want, have = files(exported_copy(Path(folder))), files(ROOT)
    drifted = sorted(p for p in {*want, *have} if want.get(p) != have.get(p))
    for p in drifted:
        why = "has no notebook" if p not in want else "was not exported" if p not in have else "differs from its notebook, or is not clean"
        print(f"{p} {why}")
    if (ROOT/"README.md").read_text(encoding="utf-8") != readme(ROOT):
        drifted.append("README.md"); print("README.md differs from nbs/index.ipynb; run: make readme")
    print("drift: run nbdev-export and nbdev-clean" if drifted else f"no drift in {len(have)} files")
    return bool(drifted)


if __name__ == "__main__": sys.exit(main())
