"""The labs: empty they stop with words, filled with the solutions they pass, and each check knows the typical mistakes."""
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F

LABS = Path(__file__).resolve().parent.parent/"nbs"/"labs"
sys.path.insert(0, str(LABS))
import check  # noqa: E402
import checks_lab_1 as c1  # noqa: E402
from marking import NotYet, ____  # noqa: E402

ALL = sorted(LABS.glob("lab_*.ipynb"))


def module(path):
    "A Python file as a module."
    spec = importlib.util.spec_from_file_location(f"solution_{path.stem}", path)
    found = importlib.util.module_from_spec(spec); spec.loader.exec_module(found)
    return found

s1 = module(LABS/"solutions"/"lab_1.py")


# ---- whole notebooks -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lab", ALL, ids=lambda p: p.stem[:5])
def test_filled_lab_passes(lab, tmp_path):
    "With the solutions every check is content and no cell stops or warns."
    notebook = check.fill(check.read(lab), check.solutions(lab))
    nbformat.write(notebook, tmp_path/"student.ipynb")
    found, others = check.mark(tmp_path/"student.ipynb")
    assert found == dict.fromkeys(range(1, 9)) and others == []

@pytest.mark.parametrize("lab", ALL, ids=lambda p: p.stem[:5])
def test_empty_lab_says_what_to_do(lab):
    "Handed out as it is, the first check names the blank, and every other check its own."
    found, _ = check.mark(lab)
    assert re.fullmatch(r"Exercise 1 \(.+\): there is still a blank.*: replace every ____ by your own code.", found[1])
    assert all(words and words.startswith(f"Exercise {n} (") and "blank" in words for n, words in found.items())

@pytest.mark.parametrize("lab", ALL, ids=lambda p: p.stem[:5])
def test_lab_is_handed_out_empty(lab):
    "No solution and no output is left in the notebook; each exercise has a blank, a check and a solution."
    notebook, checks, answers = check.read(lab), check.check_cells(check.read(lab)), check.solutions(lab)
    exercises = {check.exercise_of(c.source): c.source for c in notebook.cells if c.cell_type == "code" and check.exercise_of(c.source)}
    assert set(exercises) == set(checks) == set(answers) == set(range(1, 9))
    assert all("____" in source for source in exercises.values()) and not any("____" in source for source in answers.values())
    assert all(source.startswith("check_") for source in checks.values())
    assert not any(c.get("outputs") for c in notebook.cells)
    assert not any("solutions" in c.source for c in notebook.cells)

def test_labs_stay_out_of_the_run_of_notebooks():
    "nbdev-test leaves out a folder that holds .notest; without it the empty labs would fail there."
    done = subprocess.run([Path(sys.executable).parent/"nbdev-test", "nbs/labs"], cwd=LABS.parent.parent, capture_output=True, text=True)
    assert "No files were eligible" in done.stdout and done.returncode == 0, done.stdout + done.stderr


# ---- the teacher's command -------------------------------------------------------------------------------------------------
STUDENT = ["# Exercise 2: straight through\ndef straight_through(z, z_q): return z_q", "check_straight_through(lambda z, z_q: z + (z_q - z).detach())",
           "1/0", "# Exercise 4: perplexity\ndef perplexity(codes, K) return 1"]

def test_report_names_right_and_wrong(tmp_path, monkeypatch, capsys):
    "One right, one wrong (and silenced by the student), one deleted, one that is no Python, and another cell that stopped."
    looks = ["check_nearest_code(nearest_code)", "check_straight_through(straight_through)", "check_hard_weights(hard_weights)",
             "check_perplexity(perplexity, 0)"]
    monkeypatch.setattr(check, "check_cells", lambda lab: dict(enumerate(looks, 1)))
    head = "from checks_lab_1 import check_nearest_code, check_perplexity, check_straight_through\nimport torch"
    cells = [nbformat.v4.new_code_cell(source) for source in (head, check.solutions(ALL[0])[1], *STUDENT)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/"anna.ipynb")
    assert check.main([str(tmp_path/"anna.ipynb")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["anna.ipynb", "  1  right"]
    assert said[2].startswith("  2  not yet (straight through): the values are right, but no gradient gets through to z")
    assert said[3] == "  3  not yet: no cell begins with `# Exercise 3:`"
    assert said[4].startswith("  4  not yet: NameError: name 'perplexity' is not defined")
    assert said[5].startswith("  1 of 4 right; 2 other cells stopped, the first with ZeroDivisionError: division by zero")

def test_not_a_lab(tmp_path, capsys):
    "Other files are refused in one line, with status 2."
    (tmp_path/"notes.ipynb").write_text("not JSON")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1+1")]), tmp_path/"other.ipynb")
    assert check.main([str(tmp_path/"notes.ipynb"), str(tmp_path/"other.ipynb"), str(tmp_path/"missing.ipynb")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "cannot be read" in lines[0] and "not one of the labs" in lines[1] and "FileNotFoundError" in lines[2]
    done = subprocess.run([sys.executable, LABS/"check.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "python nbs/labs/check.py" in done.stdout


# ---- what every check shares -----------------------------------------------------------------------------------------------
def says(look, answers, words):
    "The check refuses the answers with these words."
    with pytest.raises(NotYet) as error: look(*answers)
    assert words in str(error.value), str(error.value)
    assert f"Exercise {look.number} ({look.title}): " in str(error.value)
    assert error.value._render_traceback_() == [f"Not yet. {error.value}"]

def unfilled(z, codebook):
    tokens = z.movedim(1, -1)
    return tokens.sum(____)

def dies(z, codebook):
    a = z + 1
    return a @ codebook

SHARED = {
    "a blank, and its line": (unfilled, "there is still a blank in line"),
    "nothing returned": (lambda z, e: None, "is the `return` missing?"),
    "a list": (lambda z, e: [1, 2], "you returned a list, expected a tensor of shape (2, 4, 5)"),
    "a blank returned": (lambda z, e: globals()["____"], "there is still a blank"),
    "an exception, and its line": (dies, f"your code stopped in line {dies.__code__.co_firstlineno + 2} of the cell with RuntimeError"),
    "real instead of whole numbers": (lambda z, e: torch.zeros(2, 4, 5), "expected whole numbers, you returned torch.float32"),
    "not a function": (3, "cannot be checked (TypeError: 'int' object is not callable"),
    "something else": (lambda z, e: torch.full((2, 4, 5), 2), "of 40 differ; the first at position (0, 0, "),
}

@pytest.mark.parametrize("case", SHARED)
def test_what_every_check_says(case): says(c1.check_nearest_code, SHARED[case][:1], SHARED[case][1])

def test_solutions_are_right(capsys):
    "Without a notebook, quickly; and a check leaves the random numbers of the student alone."
    torch.manual_seed(3); expected = torch.rand(1); torch.manual_seed(3)
    for look in (c1.check_nearest_code, c1.check_straight_through): look(getattr(s1, look.__name__.removeprefix("check_")))
    assert torch.rand(1) == expected
    assert capsys.readouterr().out.splitlines()[0] == "Exercise 1 (the nearest code): right."


# ---- lab 1: typical mistakes -----------------------------------------------------------------------------------------------
def distances(z, e): return (z.movedim(1, -1)[..., None, :] - e).square().sum(-1)          # (B,h,w,K)

NEAREST = {
    "expected (2, 4, 5): did you reshape back": lambda z, e: distances(z, e).argmin(-1).flatten(1),
    "largest distance instead of the smallest": lambda z, e: distances(z, e).argmax(-1),
    "mixed channels and positions": lambda z, e: torch.cdist(z.reshape(-1, 3), e).argmin(1).view(2, 4, 5),
    "largest dot product": lambda z, e: (z.movedim(1, -1) @ e.T).argmax(-1),
    "the lowest index wins": lambda z, e: 6 - distances(z, e).flip(-1).argmin(-1),
    "arg-min over the tokens": lambda z, e: distances(z, e).flatten(0, 2).argmin(0),
    "the arg-min is missing": distances,
    "their numbers are asked for": lambda z, e: e[distances(z, e).argmin(-1)],
    "h and w have changed places": lambda z, e: distances(z, e).argmin(-1).mT,
}
STRAIGHT = {
    "no gradient gets through to z: it all goes to z_q": lambda z, q: q,
    "no gradient gets through to z: everything has been detached": lambda z, q: q.detach(),
    "you hand on z": lambda z, q: q + (z - q).detach(),
    "a gradient also goes to z_q": lambda z, q: z - z.detach() + q,
    "the sign is the wrong way round": lambda z, q: z + (z - q).detach(),
    "subtract its value again": lambda z, q: z + q.detach(),
    "arrives twice": lambda z, q: 2*z + (q - 2*z).detach(),
    "it all goes to z_q. Detach": lambda z, q: z + (q - z),
}
def two(first, second, how=torch.mean): return lambda z, e, b: how(first(z, e).square()) + b*how(second(z, e).square())
def held_z(z, e): return z.detach() - e
def held_e(z, e): return z - e.detach()
LOSS = {
    "you added the squares up": two(held_z, held_e, torch.sum),
    "added over the channels": two(held_z, held_e, lambda x: x.sum(1).mean()),
    "the detach() are exchanged": two(held_e, held_z),
    "nothing is held fixed": two(lambda z, e: z - e, lambda z, e: z - e),
    "you only have one term": lambda z, e, b: held_z(z, e).square().mean(),
    "only have the commitment term": lambda z, e, b: b*held_e(z, e).square().mean(),
    "both terms are weighted": lambda z, e, b: b*(held_z(z, e).square().mean() + held_e(z, e).square().mean()),
    "neither term is weighted": lambda z, e, b: held_z(z, e).square().mean() + held_e(z, e).square().mean(),
    "one number is asked for": lambda z, e, b: held_z(z, e).square() + b*held_e(z, e).square(),
}
PAPER = {
    "gradient of z has the wrong sign": lambda z, e, b: (2*b*(e - z)/z.numel(), 2*(e - z)/z.numel()),
    "in the gradient of z the 2 of the square": lambda z, e, b: (b*(z - e)/z.numel(), 2*(e - z)/z.numel()),
    "in the gradient of z the mean is missing": lambda z, e, b: (2*b*(z - e), 2*(e - z)/z.numel()),
    "z only feels the commitment term": lambda z, e, b: (2*(z - e)/z.numel(), 2*(e - z)/z.numel()),
    "gradient of e has the wrong sign": lambda z, e, b: (2*b*(z - e)/z.numel(), 2*(z - e)/z.numel()),
    "in the gradient of e the mean is missing": lambda z, e, b: (2*b*(z - e)/z.numel(), 2*(e - z)),
    "which has no beta": lambda z, e, b: (2*b*(z - e)/z.numel(), 2*b*(e - z)/z.numel()),
    "return two tensors": lambda z, e, b: 2*b*(z - e)/z.numel(),
}
def shares(codes, K): return torch.bincount(codes.flatten(), minlength=K)/codes.numel()
def entropy(codes, K): return torch.special.entr(shares(codes, K)).sum()
PERPLEXITY = {
    "this is the entropy; the perplexity": entropy,
    "the entropy in bits": lambda c, K: entropy(c, K)/torch.log(torch.tensor(2.)),
    "the same base for both": lambda c, K: (entropy(c, K)/torch.log(torch.tensor(2.))).exp(),
    "the minus sign": lambda c, K: (-entropy(c, K)).exp(),
    "a log of 0": lambda c, K: (-(shares(c, K)*shares(c, K).log()).sum()).exp(),
    "you counted the codes in use": lambda c, K: (shares(c, K) > 0).sum().float(),
    "add over the codes": lambda c, K: torch.special.entr(shares(c, K)).exp(),
}
def move(which, rows, give=lambda new, moved: new):
    "A cure that moves the codes `which` says onto the tokens `rows` says."
    def restart(codebook, tokens, codes):
        mask = which(torch.bincount(codes.flatten(), minlength=len(codebook)))
        codebook[mask] = rows(tokens, int(mask.sum()))
        return give(codebook, codebook[mask])
    return restart
def at_random(tokens, n): return tokens[torch.randint(len(tokens), (n,))]
RESTART = {
    "you moved the codes in use instead": move(lambda n: n > 0, at_random),
    "you also moved codes that are in use": move(lambda n: n > -1, at_random),
    "a dead code stayed where it was": move(lambda n: n < 0, at_random),
    "all dead codes land on the same token": move(lambda n: n == 0, lambda t, n: t[torch.randint(len(t), (1,))].expand(n, -1)),
    "the same tokens every time": move(lambda n: n == 0, lambda t, n: t[:n]),
    "must land exactly on one of the tokens": move(lambda n: n == 0, lambda t, n: t.mean(0).expand(n, -1)),
    "is the `return` missing?": move(lambda n: n == 0, at_random, lambda new, moved: None),
    "return the whole codebook": move(lambda n: n == 0, at_random, lambda new, moved: moved),
}
def attention(turn=lambda d, c: (d, c, c), cut=None, axis=-1, power=-.5, wide=False, put=None):
    "Cross-attention with one mistake."
    def answer(dis, con, Wq, Wk, Wv, heads):
        q, k, v = (x @ W for x, W in zip(turn(dis, con), (Wq, Wk, Wv), strict=True))
        q, k, v = (x.reshape(len(x), heads, x.shape[1], -1) if cut else x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scale = (q.shape[-1]*(heads if wide else 1))**power
        out = (q @ k.mT*scale).softmax(axis) @ v
        return out.reshape(dis.shape) if put == "flat" else out if put == "none" else out.transpose(1, 2).flatten(2)
    return answer
DISCONX = {
    "the roles are exchanged": attention(lambda d, c: (c, d, d)),
    "the query comes from the continuous map too": attention(lambda d, c: (c, c, c)),
    "key and value come from the discrete map too": attention(lambda d, c: (d, d, d)),
    "the softmax runs over the queries": attention(axis=-2),
    "not divided by the square root": attention(power=0),
    "the root of all channels": attention(wide=True),
    "divided by d, not by its square root": attention(power=-1),
    "you used one head": lambda *a: attention()(*a[:-1], 1),
    "the heads cut the tokens": attention(cut=True, put="flat"),
    "put side by side wrongly": attention(put="flat"),
    "have not been put side by side": attention(put="none"),
}
def hot(i): return F.one_hot(i, 5).double()
def behind(hard, soft): return hard + soft - soft.detach()
HARD = {
    "your weights are the softmax": lambda s: s.softmax(-1),
    "your row has two winners": lambda s: behind((s == s.amax(-1, keepdim=True)).double(), s.softmax(-1)),
    "you took the last": lambda s: behind(hot(4 - s.flip(-1).argmax(-1)), s.softmax(-1)),
    "smallest score instead of the largest": lambda s: behind(hot(s.argmin(-1)), s.softmax(-1)),
    "down the columns": lambda s: behind(hot(s.argmax(-2)).mT, s.softmax(-1)),
    "taken away again": lambda s: hot(s.argmax(-1)) + s.softmax(-1),
    "no gradient gets through": lambda s: hot(s.argmax(-1)),
    "the gradient is that of the scores themselves": lambda s: behind(hot(s.argmax(-1)), s),
    "the softmax behind the hard weights runs over the queries": lambda s: behind(hot(s.argmax(-1)), s.softmax(-2)),
    "the wrong sign": lambda s: hot(s.argmax(-1)) - s.softmax(-1) + s.softmax(-1).detach(),
    "these are the winners' numbers": lambda s: s.argmax(-1),
    "expected real numbers": lambda s: F.one_hot(s.argmax(-1), 5),
}
def three(synergy, discrete=lambda d, c: d, loss=lambda kind, q: q):
    "Three bottlenecks with one mistake."
    def answer(kind, z, quantize, disconx, refine):
        if kind == "continuous": return z, 0.
        dis, q = quantize(z)
        return (discrete(dis, z) if kind == "discrete" else synergy(dis, z, disconx, refine)), loss(kind, q)
    return answer
def whole(d, c, x, r): f = d + c + x(d, c); return f + r(f)
def partly(f, r): return f + r(f)
FEATURES = {
    "z_f without the refinement": three(lambda d, c, x, r: d + c + x(d, c)),
    "the refined map alone": three(lambda d, c, x, r: r(d + c + x(d, c))),
    "z_con is missing": three(lambda d, c, x, r: partly(d + x(d, c), r)),
    "z_dis is missing": three(lambda d, c, x, r: partly(c + x(d, c), r)),
    "DisConX is missing": three(lambda d, c, x, r: partly(d + c, r)),
    "the roles in DisConX are exchanged": three(lambda d, c, x, r: partly(d + c + x(c, d), r)),
    "refine z_f, not z_dis": three(lambda d, c, x, r: d + c + x(d, c) + r(d)),
    "you return the continuous features": three(whole, lambda d, c: c),
    "that is for the synergy": three(whole, lambda d, c: d + c),
    "synergy: the second thing returned is the quantization loss": three(whole, loss=lambda kind, q: q if kind == "discrete" else 0.),
    "return two things": lambda kind, z, *blocks: z,
}
WORDS = {"there is still a blank": "\n____\n", "5 words; two or three sentences": "the synergy is the best", "write it as text": 3}

LAB_1 = [("check_nearest_code", NEAREST, lambda a: (a,)), ("check_straight_through", STRAIGHT, lambda a: (a,)),
         ("check_quantization_loss", LOSS, lambda a: (a, s1.loss_gradient)), ("check_quantization_loss", PAPER, lambda a: (s1.quantization_loss, a)),
         ("check_perplexity", PERPLEXITY, lambda a: (a, s1.restart_dead)), ("check_perplexity", RESTART, lambda a: (s1.perplexity, a)),
         ("check_cross_attention", DISCONX, lambda a: (a,)), ("check_hard_weights", HARD, lambda a: (a,)),
         ("check_features", FEATURES, lambda a: (a,)), ("check_answer", WORDS, lambda a: (a,))]
CASES_1 = [(name, words, pack(answer)) for name, cases, pack in LAB_1 for words, answer in cases.items()]

@pytest.mark.parametrize(("name", "words", "answers"), CASES_1, ids=lambda x: x if isinstance(x, str) else "")
def test_lab_1_knows_the_mistake(name, words, answers): says(getattr(c1, name), answers, words)
