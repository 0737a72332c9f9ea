"""Which exercises of a lab are right?

    python nbs/labs/check.py anna.ipynb ben.ipynb      prints a line an exercise; the exit status is 0 if all are right, 1 if not, 2 for a file that is no lab

A notebook is run from top to bottom, past errors, with the checks of this folder in the place of its own. It runs the student's code:
use an account in which that may do no harm.
"""
import copy
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError

LABS = Path(__file__).resolve().parent
HEADING = re.compile(r"\A# Exercise (\d+): (.+)")


class NoLab(Exception): "A file that is not a notebook of one of the labs."


def exercise_of(
    source:str,   # of a cell
) -> int | None:  # its number
    "Which exercise a cell answers: its first line says so."
    found = HEADING.match(source.lstrip())
    return int(found[1]) if found else None

def read(
    path,  # a notebook
):
    "A notebook; raises `NoLab` where there is none to read."
    try: return nbformat.read(path, 4)
    except Exception as error: raise NoLab(f"{path}: cannot be read as a notebook ({type(error).__name__})") from error

def original_of(
    notebook,  # a student's
    path,      # its file, for the message
) -> Path:
    "The lab that was handed out; known by the checks it imports."
    found = re.search(r"from checks_(lab_\d+) import", "\n".join(c.source for c in notebook.cells))
    labs = sorted(LABS.glob(f"{found[1]}_*.ipynb")) if found else []
    if not labs: raise NoLab(f"{path}: not one of the labs in {LABS.name}/ (its set-up cell imports the checks of none)")
    return labs[0]

def check_cells(
    lab,     # the notebook that was handed out
) -> dict:   # {number: source of the check below that exercise}
    "The cell below each exercise."
    return {exercise_of(a.source): b.source for a, b in zip(lab.cells, lab.cells[1:]) if a.cell_type == "code" and exercise_of(a.source)}

def titles_of(
    lab,     # the notebook that was handed out
) -> dict:   # {number: what its first line calls it}
    "The names of the exercises."
    return {int(found[1]): found[2] for c in lab.cells if c.cell_type == "code" and (found := HEADING.match(c.source))}

def fill(
    notebook,       # a lab; changed in place
    answers:dict,   # {number: source}
):
    "Put answers into a lab; the notebook."
    for cell in notebook.cells:
        number = exercise_of(cell.source) if cell.cell_type == "code" else None
        if number in answers: cell.source = answers[number]
    return notebook

def solutions(
    lab:Path,   # e.g. lab_1_discrete_or_continuous.ipynb
) -> dict:      # {number: source}
    "The solutions of a lab, from solutions/lab_1.py."
    text = (LABS/"solutions"/("_".join(lab.stem.split("_")[:2]) + ".py")).read_text(encoding="utf-8")
    parts = [part.strip() for part in text.split("# %%\n")]
    return {exercise_of(part): part for part in parts if exercise_of(part)}

def with_our_checks(
    notebook,     # a student's; changed in place
    checks:dict,  # what `check_cells` gave
):
    "Our check after the last cell of each exercise, theirs taken out; the notebook."
    cells = [c for c in notebook.cells if c.cell_type == "code" and not re.match(r"\s*check_\w+\(", c.source)]
    last = {exercise_of(c.source): i for i, c in enumerate(cells)}
    notebook.cells = []
    for i, cell in enumerate(cells):
        notebook.cells.append(cell)
        number = exercise_of(cell.source)
        if number in checks and last[number] == i: notebook.cells.append(nbformat.v4.new_code_cell(checks[number], metadata={"exercise": number}))
    return notebook

def run(
    notebook,         # changed in place
    seconds:int=150,  # for a cell
):
    "Run a notebook in the labs' folder, past errors; once more where a kernel's answer was lost or a cell took too long."
    quiet = ["--IPKernelApp.log_level=ERROR"]
    for last in (False, True):
        tried = copy.deepcopy(notebook)
        try:
            NotebookClient(tried, timeout=seconds, kernel_name="python3", allow_errors=True, extra_arguments=quiet,
                           resources={"metadata": {"path": str(LABS)}}).execute()
            break
        except CellTimeoutError:
            if last: raise
    notebook.cells = tried.cells
    return notebook

def said(
    cell,            # a cell that was run
) -> tuple:          # the error in words or None, what it printed
    "What a cell answered."
    errors = [o.evalue if o.ename == "NotYet" else f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"]
    return (errors[0] if errors else None), "".join(o.text for o in cell.outputs if o.output_type == "stream")

def mark(
    path,      # a student's notebook
) -> tuple:    # {number: None if right, else what is wrong}, [errors of other cells]
    "Run one student's notebook with our checks."
    notebook = read(path)
    checks = check_cells(read(original_of(notebook, path)))
    run(with_our_checks(notebook, checks))
    found = {n: f"no cell begins with `# Exercise {n}:`" for n in checks}
    others = []
    for cell in notebook.cells:
        error, _ = said(cell)
        if "exercise" in cell.metadata: found[cell.metadata["exercise"]] = error
        elif error: others.append(error)
    return found, others

def report(
    path,  # a student's notebook
) -> bool:
    "Print the verdict on one notebook; whether all is right."
    found, others = mark(path)
    titles = titles_of(read(original_of(read(path), path)))
    print(Path(path).name)
    for number, words in sorted(found.items()):
        said = "right" if words is None else "not yet: " + re.sub(rf"^Exercise {number} \(.+?\): ", "", words)
        print(f"  {number}  {titles[number]}: {said}")
    right = sum(words is None for words in found.values())
    print(f"  {right} of {len(found)} right" + (f"; {len(others)} other cells stopped, the first with {others[0]}" if others else ""))
    return right == len(found)

def main(
    paths:list,  # notebooks
) -> int:        # exit status
    "Print the verdict on each notebook."
    if not paths or paths[0] in ("-h", "--help"): print(__doc__); return 0 if paths else 2
    status = 0
    for path in paths:
        try: status = max(status, 0 if report(path) else 1)
        except NoLab as error: print(error, file=sys.stderr); status = 2
    return status


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
