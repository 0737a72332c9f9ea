"""The shape of the house: imports point left along the data flow, heavy libraries load late, functions stay small."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent/"medseg_nb"
FLOW = ["core", "data", "blocks", "models", "losses", "evaluation", "training", "explain", "experiments", "cli"]
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py")
LATE = ("monai", "pytorch_grad_cam", "ot", "timm")


def room(path: Path) -> str:
    "The place of a module in the flow: its subpackage, or its own name."
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_rooms(path: Path) -> set[str]:
    "The rooms a module imports from, at any depth of the code."
    package = ("medseg_nb", *path.relative_to(PACKAGE).parent.parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) if node.level else ""
            names = [".".join(filter(None, (base, node.module)))]
        else: continue
        rooms |= {n.split(".")[1] for n in names if n.startswith("medseg_nb.")}
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_left(path):
    if path == PACKAGE/"__init__.py": return
    here = FLOW.index(room(path))
    wrong = {r for r in imported_rooms(path) if FLOW.index(r) > here}
    assert not wrong, f"{path.name} imports {wrong}, to its right in {' -> '.join(FLOW)}"


def test_flow_names_every_room():
    assert {room(p) for p in MODULES} - {"__init__"} <= set(FLOW)


def test_heavy_libraries_load_late():
    names = [".".join(("medseg_nb", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__") for p in MODULES]
    code = f"import sys, importlib\nfor n in {names!r}: importlib.import_module(n)\nprint([m for m in {LATE!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]", f"loaded at import time: {out}"


def test_import_is_light():
    code = "import torch, time; t = time.process_time(); import medseg_nb, medseg_nb.models, medseg_nb.blocks, medseg_nb.losses; print(time.process_time() - t)"
    seconds = min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(2))
    assert seconds < 1.0


def functions(tree, stem):
    "Every function of a module, and of its classes; not those inside functions."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef): yield pytest.param(node, id=f"{stem}.{node.name}")
        elif isinstance(node, ast.ClassDef): yield from functions(node, stem)


UNSAID = ("forward", "backward", "extra_repr")   # the class says what they do


@pytest.mark.parametrize("node", [f for p in MODULES for f in functions(ast.parse(p.read_text()), p.stem)])
def test_functions_are_small_and_said(node):
    body = node.end_lineno - node.body[0].lineno + 1
    assert body <= 30, f"{node.name} has {body} lines"
    if not node.name.startswith("_") and node.name not in UNSAID: assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_no_pickle_and_no_star_imports():
    for path in MODULES:
        source = path.read_text()
        assert "import pickle" not in source and "torch.load(" not in source and "import *" not in source, path
