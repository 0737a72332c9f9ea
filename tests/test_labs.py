"""The labs: empty they stop with words, filled with the solutions they pass, and each check knows the typical mistakes."""
import importlib.util
import math
import re
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F

LABS = Path(__file__).resolve().parent.parent/"nbs"/"labs"
sys.path.insert(0, str(LABS))
import check  # noqa: E402
import checks_lab_1 as c1  # noqa: E402
import checks_lab_2 as c2  # noqa: E402
import checks_lab_3 as c3  # noqa: E402
import checks_lab_4 as c4  # noqa: E402
from frames import TwoHeadedUNet, load_frames  # noqa: E402
from hearts import overlaps  # noqa: E402
from marking import NotYet, ____  # noqa: E402

ALL = sorted(LABS.glob("lab_*.ipynb"))


def module(path):
    "A Python file as a module."
    spec = importlib.util.spec_from_file_location(f"solution_{path.stem}", path)
    found = importlib.util.module_from_spec(spec); spec.loader.exec_module(found)
    return found

s1, s2, s3, s4 = (module(LABS/"solutions"/f"lab_{i}.py") for i in (1, 2, 3, 4))


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
    assert said[:2] == ["anna.ipynb", "  1  the nearest code: right"]
    assert said[2].startswith("  2  straight through: not yet: the values are right, but no gradient gets through to z")
    assert said[3] == "  3  the loss and its gradient: not yet: no cell begins with `# Exercise 3:`"
    assert said[4].startswith("  4  perplexity, and a cure: not yet: NameError: name 'perplexity' is not defined")
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


# ---- lab 2: typical mistakes -----------------------------------------------------------------------------------------------
HAND = {
    "a mass of 1/4, not 1": ([[1, 0], [1, 0], [0, 1], [0, 1]], .75),
    "each row must sum to 1/4": ([[1/2, 0], [1/2, 0], [0, 1/2], [0, 1/2]], .75),
    "each column must sum to 1/2": ([[1/4, 0], [1/4, 0], [1/4, 0], [0, 1/4]], .75),
    "allowed, but costs 2.000": ([[1/8, 1/8]]*4, .75),
    "mass cannot be negative": ([[1/2, -1/4], [0, 1/4], [0, 1/4], [0, 1/4]], .75),
    "transpose it": ([[1/4, 1/4, 0, 0], [0, 0, 1/4, 1/4]], .75),
    "weigh each by the mass": (s2.hand_plan, 3),
    "the cost: not right": (s2.hand_plan, .5),
    "there is still a blank": ([[____, 0], *s2.hand_plan[1:]], .75),
}
def exponential(what):
    "A Gibbs kernel with one mistake."
    return lambda cost, eps: what(cost, eps)
KERNEL = {
    "the sign is missing": exponential(lambda c, e: (c/e).exp()),
    "do not multiply": exponential(lambda c, e: (-c*e).exp()),
    "eps is missing": exponential(lambda c, e: (-c).exp()),
    "the exponential is missing": exponential(lambda c, e: -c/e),
}
def turns(mass=lambda n, t: (1/n, 1/t), first="rows", count=lambda k: k, result=lambda u, K, v: u[:,None]*K*v):
    "Scalings with one mistake."
    def answer(cost, eps, n_iters):
        K, (a, b) = (-cost/eps).exp(), mass(*cost.shape)
        u, v = torch.ones(len(K)).to(K), torch.ones(K.shape[1]).to(K)
        for _ in range(count(n_iters)):
            if first == "columns": v = b/(K.T @ u)
            u = a/(K @ v)
            if first == "rows": v = b/(K.T @ u)
        return result(u, K, v)
    return answer
SCALE = {
    "the masses are missing": turns(mass=lambda n, t: (1, 1)),
    "the masses are exchanged": turns(mass=lambda n, t: (1/t, 1/n)),
    "you scale the columns first": turns(first="columns"),
    "you only did one iteration": turns(count=lambda k: 1),
    "one iteration too few": turns(count=lambda k: k - 1),
    "without the kernel": turns(result=lambda u, K, v: u[:,None]*v),
    "v is missing": turns(result=lambda u, K, v: u[:,None]*K),
    "u is missing": turns(result=lambda u, K, v: K*v),
    "transpose it": turns(result=lambda u, K, v: (u[:,None]*K*v).T),
    "the factors of the rows": turns(result=lambda u, K, v: u),
    "your code stopped in line": lambda cost, eps, n_iters: cost @ cost,
}
def logs(sign=-1, mass=lambda n, t: (1/n, 1/t), count=None, result=torch.exp, naive=False):
    "Log-domain iterations with one mistake."
    lse = (lambda x, dim: x.exp().sum(dim).log()) if naive else torch.logsumexp
    def answer(cost, eps, n_iters):
        L, f, g = sign*cost/eps, 0*cost[:,:,0], 0*cost[:,0]
        a, b = (torch.tensor(m).to(cost).log() for m in mass(*cost.shape[1:]))
        for _ in range(count or n_iters):
            f = a - lse(L + g[:,None], 2)
            g = b - lse(L + f[..., None], 1)
        return result(L + f[..., None] + g[:,None])
    return answer
LOGS = {
    "the logarithms of the masses are missing": logs(mass=lambda n, t: (1, 1)),
    "the sign of the cost": logs(sign=1),
    "this is log T": logs(result=lambda x: x),
    "the masses are exchanged": logs(mass=lambda n, t: (1/t, 1/n)),
    "multiplied by n t": logs(result=lambda x: x.exp()*24),
    "you only did one iteration": logs(count=1),
    "an exponential is taken before the logarithm": logs(naive=True),
    "the batch got lost": logs(result=lambda x: x.exp()[0]),
}
def off(plan): return plan.sum(1) - 1/len(plan), plan.sum(0) - 1/plan.shape[1]
ERROR = {
    "the absolute values are missing": lambda p: sum(x.sum() for x in off(p)),
    "only the rows are counted": lambda p: off(p)[0].abs().sum(),
    "only the columns are counted": lambda p: off(p)[1].abs().sum(),
    "you squared": lambda p: sum(x.square().sum() for x in off(p)),
    "you averaged": lambda p: sum(x.abs().mean() for x in off(p)),
    "compared with 1": lambda p: (p.sum(1) - 1).abs().sum() + (p.sum(0) - 1).abs().sum(),
    "1/n and 1/t are exchanged": lambda p: (p.sum(1) - 1/p.shape[1]).abs().sum() + (p.sum(0) - 1/len(p)).abs().sum(),
    "one number is asked for": lambda p: off(p)[0].abs(),
}
def count(start=1, back=0):
    "A search that begins or ends at the wrong place."
    def answer(error_after, tolerance):
        k = start
        while error_after(k) > tolerance: k += 1
        return k + back
    return answer
COUNT = {"one too few": count(back=-1), "one too many": count(back=1), "begin with 1": count(start=0), "yours is 1": lambda e, t: 1,
         "is the `return` missing?": lambda e, t: None}
LARGE = {
    "the mass must sum to 1": lambda c: torch.ones_like(c),
    "rows must sum to 1/n": lambda c: torch.ones_like(c)/c.shape[1],
    "still depends on the cost": lambda c: (-c).softmax(-1)/len(c),
}
def one_each(rows, columns, mass):
    "A plan that sends a mass from each row to one column."
    plan = torch.zeros(3, 3).double()
    plan[list(rows), list(columns)] = mass
    return plan
def assigned(c, mass=1/3, **how):
    rows, columns = s2.linear_sum_assignment(c.numpy(), **how)
    return one_each(rows, columns, mass)
SMALL = {
    "each carries a mass of 1/n, not 1": lambda c: assigned(c, 1.),
    "you sent each token to its nearest reference; then one": lambda c: one_each(range(3), c.argmin(1), 1/3),
    "and the mass of a pair is 1/n": lambda c: one_each(range(3), c.argmin(1), 1.),
    "this is the dearest": lambda c: assigned(c, maximize=True),
    "rows and columns are exchanged": lambda c: assigned(c).T,
    "the numbers of the references": lambda c: c.argmin(1),
}
def spectrum(f, turn=lambda V, d: V @ d @ V.T):
    "A function of a matrix through its eigenvalues."
    def answer(A, floor):
        values, vectors = torch.linalg.eigh(A)
        return turn(vectors, f(values, floor).diag())
    return answer
ROOT = {
    "the root of the *matrix* is meant": lambda A, floor: A.rsqrt(),
    "this is the inverse": spectrum(lambda v, f: 1/v.clamp_min(f)),
    "this is the square root": spectrum(lambda v, f: v.clamp_min(f).sqrt()),
    "as columns": spectrum(lambda v, f: v.clamp_min(f).rsqrt(), lambda V, d: V.T @ d @ V),
    "raise eigenvalues below `floor`": spectrum(lambda v, f: v.abs().rsqrt()),
}
def psi(x, w, alpha, unit=lambda v: F.normalize(v, dim=-1), units=None, one=1, root=True, sign=1):
    "Nystrom features with one mistake."
    x, w = unit(x), (units or unit)(w)
    kernel = lambda a, b: (sign*alpha*(a @ b.mT - one)).exp()
    return kernel(x, w) @ s2.inverse_square_root(kernel(w, w), 1e-4) if root else kernel(x, w)
def with_psi(**mistake): return lambda x, w, alpha: psi(x, w, alpha, **mistake)
NYSTROM = {
    "tokens and anchors must be scaled": with_psi(unit=lambda v: v),
    "the tokens are not scaled": with_psi(unit=lambda v: v, units=lambda w: F.normalize(w, dim=-1)),
    "not along the tokens": with_psi(unit=lambda v: F.normalize(v, dim=1), units=lambda w: F.normalize(w, dim=-1)),
    "this is kappa(x, w) alone": with_psi(root=False),
    "alpha is missing": lambda x, w, alpha: psi(x, w, 1.),
    "the -1 is missing": with_psi(one=0),
    "the sign is the wrong way round": with_psi(sign=-1),
    "the batch got lost": lambda x, w, alpha: psi(x, w, alpha)[0],
}
POOL = {
    "sqrt(t) of eq. 3 is missing": lambda p, x: p.mT @ x,
    "sqrt(t), not t": lambda p, x: p.shape[2]*p.mT @ x,
    "not of n (tokens)": lambda p, x: p.shape[1]**.5*p.mT @ x,
    "multiplied, not divided": lambda p, x: p.mT @ x/p.shape[2]**.5,
    "references come first": lambda p, x: 2*x.mT @ p,
    "the plan is transposed": lambda p, x: x,
}
BACK = {
    "the factor n is missing": lambda p, q: p @ q,
    "the factor is n (tokens), not t": lambda p, q: p.shape[2]*p @ q,
    "the factor is n, not its root": lambda p, q: p.shape[1]**.5*p @ q,
    "each token takes from all references": lambda p, q: q,
}
COST = {
    "exchanged": lambda n, t, k: (3*n*t*k, 2*n*n*k), "you counted one": lambda n, t, k: (n*n*k, 3*n*t*k), "three products": lambda n, t, k: (2*n*n*k, n*t*k),
    "attention needs n n k": lambda n, t, k: (2*n*k, 3*n*t*k), "the plan needs n t k three times": lambda n, t, k: (2*n*n*k, n*n*t),
    "return two numbers": lambda n, t, k: n,
}
LAB_2 = [("check_by_hand", HAND, lambda a: a), ("check_scalings", KERNEL, lambda a: (a, s2.scale)), ("check_scalings", SCALE, lambda a: (s2.gibbs_kernel, a)),
         ("check_log_sinkhorn", LOGS, lambda a: (a,)), ("check_marginal_error", ERROR, lambda a: (a, s2.iterations_needed)),
         ("check_marginal_error", COUNT, lambda a: (s2.marginal_error, a)), ("check_limits", LARGE, lambda a: (a, s2.plan_of_small_eps)),
         ("check_limits", SMALL, lambda a: (s2.plan_of_large_eps, a)), ("check_nystrom", ROOT, lambda a: (a, s2.nystrom)),
         ("check_nystrom", NYSTROM, lambda a: (s2.inverse_square_root, a)), ("check_pool", POOL, lambda a: (a, s2.back, s2.multiplications)),
         ("check_pool", BACK, lambda a: (s2.pool, a, s2.multiplications)), ("check_pool", COST, lambda a: (s2.pool, s2.back, a)),
         ("check_answer", WORDS, lambda a: (a,))]
CASES_2 = [(name, words, pack(answer)) for name, cases, pack in LAB_2 for words, answer in cases.items()]

@pytest.mark.parametrize(("name", "words", "answers"), CASES_2, ids=lambda x: x if isinstance(x, str) else "")
def test_lab_2_knows_the_mistake(name, words, answers): says(getattr(c2, name), answers, words)


# ---- lab 3: typical mistakes -----------------------------------------------------------------------------------------------
def all_at_once(loaders): yield from zip(*loaders.values())
def by_turns(loaders):
    for m, loader in loaders.items():
        for batch in loader: yield {m: batch}
def steps(count=lambda lengths: max(lengths), stream=s3.endless, form=dict):
    "A balanced epoch with one mistake."
    def answer(loaders):
        streams = {m: stream(loader) for m, loader in loaders.items()}
        for _ in range(count([len(loader) for loader in loaders.values()])): yield form((m, next(s)) for m, s in streams.items())
    return answer
def first_only(loader):
    while True: yield next(iter(loader))
def backwards(loader):
    while True: yield from list(loader)[::-1]
BALANCED = {
    "it stops with the shortest loader": (s3.endless, steps(min)),
    "it does not end": (s3.endless, steps(lambda lengths: 1000)),
    "as many steps as all loaders have batches together": (s3.endless, steps(sum)),
    "3 steps; the longest loader has 5 batches": (s3.endless, steps(lambda lengths: 3)),
    "each step must be a dict": (s3.endless, all_at_once),
    "each step must hold a batch of every modality": (s3.endless, lambda loaders: ({"ct": batch} for batch in loaders["ct"])),
    "endless: the first round is repeated in the same order": (cycle, s3.balanced),
    "balanced, mr: the first round is repeated": (s3.endless, steps(stream=cycle)),
    "only its first batch is ever seen": (first_only, s3.balanced),
    "balanced, ct: the loader is begun anew": (s3.endless, steps(stream=first_only)),
    "endless: not the batches in their order": (backwards, s3.balanced),
    "these are not the batches of mr's loader": (lambda loader: iter([1]*5), s3.balanced),
    "endless: it ends after 2 batches": (iter, s3.balanced),
    "it must be a generator": (lambda loader: list(loader), s3.balanced),
    "hand on each step with `yield`": (s3.endless, lambda loaders: None),
    "takes a batch of every modality at once": (s3.endless, by_turns),
}
def table(axis=1, kernel="iw,iwh->ih", scores="ih,jhn->ijn", scale=1, gate=None, finish=lambda total, g: total/g.sum(2), numerator=lambda total, g: total):
    "E with one mistake."
    def answer(Q, A, W, divide=True):
        K = torch.einsum(kernel, Q, W)
        S = torch.einsum(scores, K, A)*scale
        g = S.softmax(axis) if gate is None else gate(S)
        total = (A*g[:,:,None]).sum((2, 3))
        return finish(total, g) if divide else numerator(total, g)
    return answer
CORRELATIONS = {
    "the denominator of eq. 11 is missing": table(finish=lambda t, g: t),
    "softmax over the positions": table(axis=2),
    "softmax over the classes i": table(axis=0),
    "the softmax of the gate is missing": table(gate=lambda S: S),
    "there is no gate at all": table(gate=torch.ones_like),
    "the gate is a sigmoid": table(gate=torch.sigmoid),
    "divided by the number of heads": table(finish=lambda t, g: t/g.sum(2)/2),
    "divided by the number of positions": table(finish=lambda t, g: t/5),
    "what the gates of all classes sum to": table(finish=lambda t, g: t/g.sum((1, 2))[:,None]),
    "rows and columns are exchanged": table(finish=lambda t, g: (t/g.sum(2)).mT),
    "the W of the first class": lambda Q, A, W, divide=True: s3.correlations(Q, A, W[:1].expand(3, -1, -1), divide),
    "you have it the other way round": table(scores="jh,ihn->ijn"),
    "divides by no root": table(scale=2**-.5),
    "sum over the positions too": table(finish=lambda t, g: g),
    "there is no batch here": table(finish=lambda t, g: (t/g.sum(2))[None]),
    "divide=False: this is E": table(numerator=lambda t, g: t/g.sum(2)),
    "divide=False: this is a mean over positions": table(numerator=lambda t, g: t/5),
    "your code stopped in line": table(kernel="iw,jwh->ijh"),
}
def cosines(Q1, Q2): return F.cosine_similarity(Q1, Q2, dim=1)
def lengths(Q1, Q2): return Q1.norm(dim=1)*Q2.norm(dim=1)
MODALITIES = {
    "you took the mean": lambda a, b: (1 - cosines(a, b)).mean(),
    "the lengths are missing": lambda a, b: (1 - (a*b).sum(1)).sum(),
    "not by their squares": lambda a, b: (1 - (a*b).sum(1)/lengths(a, b)**2).sum(),
    "these are the cosines": lambda a, b: cosines(a, b).sum(),
    "the 1 belongs inside the sum": lambda a, b: 1 - cosines(a, b).sum(),
    "opposite embeddings alike": lambda a, b: (1 - cosines(a, b).abs()).sum(),
    "one cosine of all embeddings": lambda a, b: 1 - F.cosine_similarity(a.flatten(), b.flatten(), dim=0),
    "the cosines run over the classes": lambda a, b: (1 - F.cosine_similarity(a, b, dim=0)).sum(),
    "you compare each class with every class": lambda a, b: (1 - F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).sum(),
    "twice too large": lambda a, b: (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(),
    "add over the classes": lambda a, b: 1 - cosines(a, b),
    "is the `return` missing?": lambda a, b: None,
}
LARGEST = {
    "what right angles give": lambda Z: Z, "that is for one class": lambda Z: 2, "yours is 7": lambda Z: Z + 2, "is the `return` missing?": lambda Z: None,
}
def kl(p, q): return (p*(p/q).log()).sum(-1)
def images(both=lambda p, q: kl(p, q) + kl(q, p), soft=lambda E, tau: (E/tau).softmax(-1), pairs=True, finish=lambda d: d.sum(-1).mean()):
    "Eq. 14 with one mistake."
    def answer(E1, E2, tau=4.):
        p, q = soft(E1, tau), soft(E2, tau)
        return finish(both(p[:,None], q[None]) if pairs else both(p, q))
    return answer
IMAGES = {
    "only one direction, KL(p||q)": images(kl),
    "only one direction, KL(q||p)": images(lambda p, q: kl(q, p)),
    "you took their mean": images(lambda p, q: (kl(p, q) + kl(q, p))/2),
    "the sign is the wrong way round": images(lambda p, q: -kl(p, q) - kl(q, p)),
    "tau is missing": images(soft=lambda E, tau: E.softmax(-1)),
    "divide by tau, do not multiply": images(soft=lambda E, tau: (E*tau).softmax(-1)),
    "runs down the columns": images(lambda p, q: kl(p.mT, q.mT) + kl(q.mT, p.mT), lambda E, tau: (E/tau).softmax(-2)),
    "you averaged over the classes": images(finish=lambda d: d.mean()),
    "you added over the pairs": images(finish=lambda d: d.sum()),
    "you only compare image 1 with image 1": images(pairs=False),
    "you averaged E over the images": lambda E1, E2, tau=4.: s3.image_level(E1.mean(0, True), E2.mean(0, True), tau),
    "has no factor tau^2": lambda E1, E2, tau=4.: tau**2*s3.image_level(E1, E2, tau),
    "these are the pairs": images(finish=lambda d: d.sum(-1)),
    "add over the classes, take the mean": images(finish=lambda d: d),
    "is there a log of 0": images(),
    "two images against three: not right": lambda E1, E2, tau=4.: s3.image_level(E1, E2[:2], tau),
}
SHRINKS = {"so does ln p - ln q": 2, "is it *divided*": .25, "a factor above 1": -4, "the factor is 4.00, yours is 8": 8, "there is still a blank": ____}
def total(seg=sum, aux=sum, weigh=lambda s, a, m, i, w: s + w[0]*a + w[1]*m + w[2]*i, scales=sum, q="Q", pair=lambda maps: maps, y_seg=0, y_aux=0):
    "Eq. 15 with one mistake."
    def answer(outputs, labels, segment, auxiliary, modality_level, image_level, weights=(.5, .5, .5)):
        outs, ys = list(outputs.values()), list(labels.values())
        judge = lambda what, look, shift: [look(what(out), ys[(k + shift) % len(ys)]) for k, out in enumerate(outs)]
        L_seg, L_aux = seg(judge(lambda out: out.logits, segment, y_seg)), aux(judge(lambda out: out.maps, auxiliary, y_aux))
        if len(outs) == 1: return weigh(L_seg, L_aux, 0, 0, weights)
        one, two = pair([out.maps for out in outs])
        return weigh(L_seg, L_aux, modality_level(one["Q"], two["Q"]), scales([image_level(one[n], two[n]) for n in ("E_1", "E_2")]), weights)
    return answer
def half(x): return sum(x)/2 if len(x) == 2 else sum(x)
def two_only(weigh): return total(weigh=lambda s, a, m, i, w: weigh(s, a, m, i, w) if isinstance(m, torch.Tensor) else s + w[0]*a)
TOTAL = {
    "L_aux is missing, or has no weight": total(weigh=lambda s, a, m, i, w: s + a + m + i),
    "one modality alone: L_aux is missing.": total(weigh=lambda s, a, m, i, w: s),
    "the weights are missing": two_only(lambda s, a, m, i, w: s + a + m + i),
    "your weights are 0.5": two_only(lambda s, a, m, i, w: s + (a + m + i)/2),
    "alpha weighs the segmentation too": two_only(lambda s, a, m, i, w: w[0]*(s + a) + w[1]*m + w[2]*i),
    "L_seg is averaged": total(seg=half),
    "the total: L_aux is averaged": total(aux=half),
    "L_seg and L_aux are averaged": total(seg=half, aux=half),
    "the total: L_seg is missing": two_only(lambda s, a, m, i, w: w[0]*a + w[1]*m + w[2]*i),
    "the total: L_aux is missing": two_only(lambda s, a, m, i, w: s + w[1]*m + w[2]*i),
    "L_mcr is missing": two_only(lambda s, a, m, i, w: s + w[0]*a + w[2]*i),
    "L_icr is missing": two_only(lambda s, a, m, i, w: s + w[0]*a + w[1]*m),
    "only the first scale": total(scales=lambda x: x[0]),
    "averaged over the scales": total(scales=lambda x: sum(x)/2),
    "only one modality is in L_seg": total(seg=lambda x: x[0]),
    "only one modality is in L_seg. ": total(seg=lambda x: x[-1]),
    "only one modality is in L_aux": total(aux=lambda x: x[0]),
    "the total: logits meet the labels of the other": total(y_seg=1),
    "the total: maps meet the labels of the other": total(y_aux=1),
    "logits and maps meet the labels": total(y_seg=1, y_aux=1),
    "beta and gamma are exchanged": total(weigh=lambda s, a, m, i, w: s + w[0]*a + w[2]*m + w[1]*i),
    "L_icr compares a modality with itself": total(pair=lambda maps: (maps[0], {**maps[0], "Q": maps[-1]["Q"]})),
    "L_mcr compares a modality with itself": total(pair=lambda maps: (maps[0], {**maps[-1], "Q": maps[0]["Q"]})),
}
PHI = {
    "the 1 is missing": lambda Q, w1, W: w1 @ Q @ W,
    "w1 is missing": lambda Q, w1, W: 1 + Q.sum(0) @ W,
    "you took the mean over the classes": lambda Q, w1, W: 1 + Q.mean(0) @ W,
    "no sign is turned round": lambda Q, w1, W: 1 - w1 @ Q @ W,
    "one vector a modality": lambda Q, w1, W: 1 + Q @ W,
    "it still needs W": lambda Q, w1, W: w1 @ Q,
}
FOLD = {
    "it came back unscaled.": lambda W, b, phi: (W, phi*b),
    "the weight: multiply, do not divide": lambda W, b, phi: (W/phi[:,None], phi*b),
    "scaled twice": lambda W, b, phi: (W*phi[:,None]**2, phi*b),
    "not what goes in": lambda W, b, phi: (W*phi, phi*b),
    "phi (W x + b) holds phi b": lambda W, b, phi: (W*phi[:,None], b),
    "the bias: multiply, do not divide": lambda W, b, phi: (W*phi[:,None], b/phi),
    "return two tensors": lambda W, b, phi: W*phi[:,None],
}
def flips(far, finish=lambda hits: hits.double().mean(), before=lambda d: d):
    "Sign flips with one mistake."
    def answer(d):
        signs = torch.tensor(list(c3.product((-1., 1.), repeat=len(d)))).to(d)
        return finish(far((signs*before(d)).mean(1), d.mean()))
    return answer
def at_least(m, s): return m.abs() >= s.abs() - 1e-9
FLIPS = {
    "only one side": flips(lambda m, s: m >= s - 1e-9),
    "the signs that were seen count themselves": flips(lambda m, s: m.abs() > s.abs() + 1e-9),
    "no farther from 0": flips(lambda m, s: m.abs() <= s.abs() + 1e-9),
    "nearer to 0 than yours": flips(lambda m, s: m.abs() < s.abs() - 1e-9),
    "divide by how many there are": flips(at_least, lambda hits: hits.double().sum()),
    "absolute values come after the mean": flips(lambda m, s: at_least(m*0 + 1, s)),
    "a mean (divide by n) meets a sum": flips(lambda m, s: m.abs() >= 5*s.abs() - 1e-9),
    "one number is asked for": flips(at_least, lambda hits: hits.double()),
    "where it is below, you count the wrong side": flips(lambda m, s: m.abs() >= s - 1e-9),
}
SMALLEST = {
    "never 0": lambda n: 0, "all plus reaches as far as all minus": lambda n: 2.**-n, "yours is 0.2": lambda n: 1/n,
    "is the `return` missing?": lambda n: None,
}
LAB_3 = [("check_balanced", BALANCED, lambda a: a), ("check_correlations", CORRELATIONS, lambda a: (a,)),
         ("check_modality_level", MODALITIES, lambda a: (a, s3.largest)), ("check_modality_level", LARGEST, lambda a: (s3.modality_level, a)),
         ("check_image_level", IMAGES, lambda a: (a, s3.shrinks_by)), ("check_image_level", SHRINKS, lambda a: (s3.image_level, a)),
         ("check_total", TOTAL, lambda a: (a,)), ("check_scale", PHI, lambda a: (a, s3.fold)), ("check_scale", FOLD, lambda a: (s3.scale_vector, a)),
         ("check_sign_flips", FLIPS, lambda a: (a, s3.smallest_share)), ("check_sign_flips", SMALLEST, lambda a: (s3.sign_flips, a)),
         ("check_answer", WORDS, lambda a: (a,))]
CASES_3 = [(name, words, pack(answer)) for name, cases, pack in LAB_3 for words, answer in cases.items()]

@pytest.mark.parametrize(("name", "words", "answers"), CASES_3, ids=lambda x: x if isinstance(x, str) else "")
def test_lab_3_knows_the_mistake(name, words, answers): says(getattr(c3, name), answers, words)

# ---- lab 4: typical mistakes -----------------------------------------------------------------------------------------------
def parted(pick, give=lambda a, b: (a, b)):
    "A division whose first list `pick` chooses: (people, order, labelled, person_of) -> a test of a case and its person."
    def answer(person_of, labelled, seed=0):
        people = sorted(set(person_of.values()))
        order = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed)).tolist()
        belongs = pick(people, order, labelled, person_of)
        return give(*([case for case, who in person_of.items() if belongs(case, who) == side] for side in (True, False)))
    return answer
def by_order(people, order, n, person_of): return lambda case, who: who in [people[i] for i in order[:n]]
def emptied(person_of, labelled, seed=0):
    found = s4.divide(person_of, labelled, seed); person_of.popitem()
    return found
DIVIDE = {
    "you divided the cases; divide the people": parted(lambda people, order, n, person_of: lambda case, who: case in list(person_of)[:2*n]),
    "the same people whatever the seed": parted(lambda people, order, n, person_of: lambda case, who: who in people[:n]),
    "3 people were to keep their labels, here 1 do": parted(lambda people, order, n, person_of: by_order(people, order, 1, person_of)),
    "the two lists are exchanged": parted(by_order, lambda a, b: (b, a)),
    "a case is in both lists": parted(by_order, lambda a, b: (a, a + b)),
    "are in neither list": parted(by_order, lambda a, b: (a, b[1:])),
    "these are people": lambda person_of, n, seed=0: (list("abc"), list("defg")),
    "these are not cases": parted(by_order, lambda a, b: (a, [0, 1])),
    "return two lists": parted(by_order, lambda a, b: a),
    "is the `return` missing?": lambda person_of, n, seed=0: None,
    "changed the dict": emptied,
    "only `order` may decide": parted(lambda people, order, n, person_of: by_order(people, torch.randperm(len(people)).tolist(), n, person_of)),
    "hardly any different people": parted(lambda people, order, n, person_of: by_order(people, range(7) if order[0] < 4 else range(6, -1, -1), n, person_of)),
}
def trailing(rule=c4.early, share=lambda d: 1 - d, keep=lambda d: d): return c4.moving(share, keep)(rule)
def renamed(teacher, student, step, decay):
    for old, new in zip(teacher, student, strict=True): old = c4.early(step, decay)*old + new
def copied(teacher, student, step, decay):
    for old, new in zip(teacher, student, strict=True): old.copy_(new)
def misled(teacher, student, step, decay): c4.trusted(student, teacher, step, decay)
FOLLOW = {
    "it has not moved; change the tensors in place": renamed,
    "the shares are exchanged": trailing(share=lambda d: d, keep=lambda d: 1 - d),
    "the student was copied": copied,
    "the student was changed": misled,
    "`step` counts from 0": trailing(lambda s, d: c4.early(s + 1, d)),
    "at first the decay must be smaller": trailing(lambda s, d: d),
    "it must not exceed `decay`": trailing(lambda s, d: (1 + s)/(10 + s)),
    "did not shrink to d": trailing(keep=lambda d: 1),
    "the whole student was added": trailing(share=lambda d: 1),
}
HALF_LIFE = {
    "half_life: the sign": lambda d: math.log(2)/math.log(d), "upside down": lambda d: math.log(d)/math.log(.5), "the mean age": lambda d: 1/(1 - d),
    "not by an amount": lambda d: .5/(1 - d), "yours is 3": lambda d: 3,
}
GAP = {
    "the gap: the sign": lambda p, y: (y - p).mean((0, 2, 3))[1:],
    "sums grow with the image": lambda p, y: (p - y).sum((0, 2, 3))[1:],
    "absolute values hide": lambda p, y: (p - y).mean((0, 2, 3))[1:].abs(),
    "before any absolute value": lambda p, y: (p - y).abs().mean((0, 2, 3))[1:],
    "you left out the last class": lambda p, y: (p - y).mean((0, 2, 3))[:-1],
    "this is a share of y": lambda p, y: (p - y).mean((0, 2, 3))[1:]/y.mean((0, 2, 3))[1:],
    "you added over the images": lambda p, y: (p - y).mean((2, 3)).sum(0)[1:],
    "p's mass alone": lambda p, y: p.mean((0, 2, 3))[1:],
    "the background is left out": lambda p, y: (p - y).mean((0, 2, 3)),
    "take the mean over the images too.": lambda p, y: (p - y).mean((2, 3))[:, 1:],
    "and leave the background out": lambda p, y: (p - y).mean((2, 3)),
    "one number a class": lambda p, y: (p - y).mean(),
    "take means over images and pixels": lambda p, y: (p - y)[:, 1:],
}
def stepping(move=lambda p, v, r: p + r*v, equal=lambda m: m, most=lambda m: m.clamp_min(0), least=lambda m: m.clamp_max(0)):
    "Dual ascent with one mistake."
    return lambda price, value, rate, relation="equal": {"equal": equal, "at most": most, "at least": least}[relation](move(price, value, rate))
def nothing(m): return m
def early_cut(price, value, rate, relation="equal"): return stepping(lambda p, v, r: p)(price, value, rate, relation) + rate*value
def rising(price, value, rate, relation="equal"): return price + {"equal": nothing, "at most": F.relu, "at least": lambda m: -F.relu(-m)}[relation](rate*value)
def in_place(price, value, rate, relation="equal"): return stepping(lambda p, v, r: p.add_(r*v))(price, value, rate, relation)
ASCEND = {
    '"equal": the wrong direction': stepping(lambda p, v, r: p - r*v),
    '"equal": the rate is missing': stepping(lambda p, v, r: p + v),
    '"equal": the rate multiplies the value': stepping(lambda p, v, r: r*p + v),
    '"equal": only the change': stepping(lambda p, v, r: r*v),
    '"equal": of an equality the price may have either sign': stepping(equal=F.relu),
    '"equal": of an equality the price may have either sign; nothing is cut off. ': stepping(equal=lambda m: m.clamp_max(0)),
    '"at most": the projection is missing; this price may not go below 0': stepping(most=nothing),
    '"at most": this price may not go below 0; you have it the other way round': stepping(most=lambda m: m.clamp_max(0), least=F.relu),
    '"at least": the projection is missing; this price may not go above 0': stepping(least=nothing),
    '"at most": project what the step gives': rising,
    '"at most": project after the step': early_cut,
    "changed in place": in_place,
}
def right_one(scores): return F.cross_entropy(scores, torch.arange(len(scores)))
def asked(score=lambda t, s, tau: t.detach() @ s.mT/tau, how=right_one): return lambda t, s, tau=.1: how(score(t, s, tau))
def diagonal(x): return x.log_softmax(1).diagonal()
def without_positive(x): return (x.masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf).logsumexp(1) - x.diagonal()).mean()
QUIZ = {
    "divide by tau, do not multiply": asked(lambda t, s, tau: t @ s.mT*tau),
    "tau is missing": asked(lambda t, s, tau: t @ s.mT),
    "the roles are exchanged": asked(lambda t, s, tau: s @ t.mT/tau),
    "you added over the slices": asked(how=lambda x: -diagonal(x).sum()),
    "the sign is missing": asked(how=lambda x: diagonal(x).mean()),
    "the logarithm is missing": asked(how=lambda x: x.softmax(1).diagonal().mean()),
    "the positive is missing below": asked(how=without_positive),
    "slice by slice, then the mean": asked(how=lambda x: -x.softmax(1).diagonal().mean().log()),
    "the likeness alone": asked(how=lambda x: -x.diagonal().mean()),
    "the student is compared with the student": asked(lambda t, s, tau: s @ s.mT/tau),
    "the teacher is compared with the teacher": asked(lambda t, s, tau: t @ t.mT/tau),
    "take the mean over the slices": asked(how=lambda x: -diagonal(x)),
    "of each row the right answer": asked(how=lambda x: -x.log_softmax(1)),
    "a gradient goes to the teacher": asked(lambda t, s, tau: t @ s.mT/tau),
    "no gradient reaches the student": asked(lambda t, s, tau: (t @ s.mT/tau).detach()),
    "infinity among the numbers": asked(how=lambda x: -(x.exp().diagonal()/x.exp().sum(1)).log().mean() if x.max() < 99 else x.new_tensor(torch.inf)),
}
GUESSING = {
    "guessing: the sign": lambda n: -math.log(n), "its price is -log of it": lambda n: 1/n, "among the n": lambda n: math.log(n - 1), "in bits": math.log2,
    "yours is 0.5": lambda n: .5,
}
def target(of=lambda t: t.detach().softmax(1), put=lambda truth, p: torch.cat([truth, p[len(truth):]])):
    "What L_con holds against, with one mistake."
    return lambda y, taught: put(F.one_hot(y, taught.shape[1]).movedim(-1, 1).to(taught), of(taught))
TARGET = {
    "the labels are not used": target(put=lambda truth, p: p),
    "these are the teacher's logits": target(lambda t: t.detach()),
    "runs over the pixels": target(lambda t: t.detach().softmax(-1)),
    "runs over the pixels; it runs over the classes, axis 1. ": target(lambda t: t.detach().softmax(-2)),
    "runs over the images": target(lambda t: t.detach().softmax(0)),
    "the images with labels come first": target(put=lambda truth, p: torch.cat([p[len(truth):], truth])),
    "for the *last* images": target(put=lambda truth, p: torch.cat([truth, p[:-len(truth)]])),
    "the teacher's arg-max": target(lambda t: F.one_hot(t.argmax(1), 3).movedim(-1, 1).to(t)),
    "the sigmoids of a pixel": target(lambda t: t.detach().sigmoid()),
    "belong in the second place": target(put=lambda truth, p: torch.cat([truth, p[len(truth):]]).movedim(1, -1)),
    "an image has one target": target(put=lambda truth, p: torch.cat([truth, p])),
    "the images with labels are missing": target(put=lambda truth, p: p[len(truth):]),
    "the images without labels are missing": target(put=lambda truth, p: truth),
    "a gradient goes to the teacher": target(lambda t: t.softmax(1)),
}
def summed(factor=lambda progress, ramp: math.exp(-5*(1 - min(1, progress/ramp))**2), add=lambda w, s, k, c, f: w[0]*s + f*(w[1]*k + w[2]*c)):
    "Eq. 5 with one mistake."
    return lambda sup, contrast, con, progress, weights=(1., .1, 1.), ramp=.3: add(weights, sup, contrast, con, factor(progress, ramp))
EQ5 = {
    "the ramp is over": summed(lambda p, r: math.exp(-5*(1 - p/r)**2)),
    "the factor must not exceed 1": summed(lambda p, r: p/r),
    "the factor rises as a straight line": summed(lambda p, r: min(1, p/r)),
    "the ramp weighs L_sup too": summed(add=lambda w, s, k, c, f: f*(w[0]*s + w[1]*k + w[2]*c)),
    "the ramp is missing": summed(lambda p, r: 1),
    "L_con has no ramp": summed(add=lambda w, s, k, c, f: w[0]*s + f*w[1]*k + w[2]*c),
    "the contrast has no ramp": summed(add=lambda w, s, k, c, f: w[0]*s + w[1]*k + f*w[2]*c),
    "the square is missing": summed(lambda p, r: math.exp(-5*(1 - min(1, p/r)))),
    "the 5 is missing": summed(lambda p, r: math.exp(-(1 - min(1, p/r))**2)),
    "the minus is missing": summed(lambda p, r: math.exp(5*(1 - min(1, p/r))**2)),
    "progress is not divided by ramp": summed(lambda p, r: math.exp(-5*(1 - p)**2) if p < r else 1),
    "the factor falls": summed(lambda p, r: math.exp(-5*(p/r)**2) if p < r else 1),
    "lambda is missing": summed(add=lambda w, s, k, c, f: s + f*(w[1]*k + w[2]*c)),
    "beta and gamma are exchanged": summed(add=lambda w, s, k, c, f: w[0]*s + f*(w[2]*k + w[1]*c)),
    "the weights are missing": summed(add=lambda w, s, k, c, f: s + f*(k + c)),
    "the contrast is missing": summed(add=lambda w, s, k, c, f: w[0]*s + f*w[2]*c),
    "L_con is missing": summed(add=lambda w, s, k, c, f: w[0]*s + f*w[1]*k),
    "L_sup is missing": summed(add=lambda w, s, k, c, f: f*(w[1]*k + w[2]*c)),
}
def agreeing(**mistake): return lambda found, other, classes: c4.dice_of(found, other, classes, **mistake)
OVERLAP = {
    "counts 0": agreeing(absent=0.), "counts 1": agreeing(absent=1.), "the 2 is missing": agreeing(factor=1.),
    "the Jaccard index": agreeing(factor=1., below=lambda a, b: (a | b).sum()),
    "not of either (their union)": agreeing(below=lambda a, b: (a | b).sum()),
    "(precision)": agreeing(factor=1., below=lambda a, b: a.sum()),
    "(recall)": agreeing(factor=1., below=lambda a, b: b.sum()),
    "these are the classes 0 to 3": lambda f, o, classes: c4.dice_of(f, o, classes - 1, first=0),
    "the background is left out": agreeing(first=0),
    "you took the mean over the images": lambda f, o, classes: torch.stack([c4.dice_of(a, b, classes) for a, b in zip(f, o, strict=True)]).nanmean(0),
    "one number a class": lambda f, o, classes: torch.stack([c4.dice_of(a, b, classes) for a, b in zip(f, o, strict=True)]),
    "the mean comes later": lambda f, o, classes: c4.dice_of(f, o, classes).nanmean(),
    "return a tensor": lambda f, o, classes: c4.dice_of(f, o, classes).tolist(),
}
PERSONS = {
    "you added the frames up": lambda s, who: s.groupby(who).sum(), "one frame of each": lambda s, who: s.groupby(who).first(),
    "the best frame": lambda s, who: s.groupby(who).max(), "still a row a case": lambda s, who: s,
    "a table is asked for": lambda s, who: s.groupby(who).mean().to_numpy(), "is the `return` missing?": lambda s, who: None,
    "expected a row a person": lambda s, who: s.groupby(who).median(),
}
def ranking(ranks=lambda d: d.abs().argsort().argsort().to(d) + 1, far=lambda a, s: a >= s - 1e-9): return lambda d: c4.ranked(d, ranks(d), far)
def one_side(d):
    ranks = d.abs().argsort().argsort().to(d) + 1
    return (torch.tensor(list(c4.product((0., 1.), repeat=len(d)))).to(d) @ ranks >= ranks[d > 0].sum()).double().mean()
def low_side(d): return s4.signed_rank(d) if d.sum() > 0 else torch.tensor(.5).double()
RANKS = {
    "divide by how many there are": lambda d: s4.signed_rank(d)*2**len(d),
    "only one side": one_side,
    "the signs that were seen count themselves": ranking(far=lambda a, s: a > s + 1e-9),
    "no farther from the middle": ranking(far=lambda a, s: a <= s + 1e-9),
    "nearer to the middle": ranking(far=lambda a, s: a < s - 1e-9),
    "rank their sizes": ranking(lambda d: d.argsort().argsort().to(d) + 1),
    "ranks begin at 1": ranking(lambda d: d.abs().argsort().argsort().to(d)),
    "the largest difference has the largest rank": ranking(lambda d: len(d) - d.abs().argsort().argsort().to(d)),
    "argsort of the argsort": ranking(lambda d: d.abs().argsort().to(d) + 1),
    "the test of lab 3": ranking(lambda d: d.abs()),
    "with all signs turned": low_side,
    "the share of the ways": lambda d: torch.zeros(2**len(d)).double(),
}
LONGER = {"there is still a blank": "\n____\n", "at least 40 words": "the images helped nobody", "write it as text": 3}

LAB_4 = [("check_divide", DIVIDE, lambda a: (a,)), ("check_follow", FOLLOW, lambda a: (a, s4.half_life)),
         ("check_follow", HALF_LIFE, lambda a: (s4.follow, a)), ("check_price", GAP, lambda a: (a, s4.ascend)),
         ("check_price", ASCEND, lambda a: (s4.gap, a)), ("check_quiz", QUIZ, lambda a: (a, s4.guessing)),
         ("check_quiz", GUESSING, lambda a: (s4.quiz, a)), ("check_total", TARGET, lambda a: (a, s4.eq5)),
         ("check_total", EQ5, lambda a: (s4.hold_against, a)), ("check_overlap", OVERLAP, lambda a: (a,)),
         ("check_paired", PERSONS, lambda a: (a, s4.signed_rank)), ("check_paired", RANKS, lambda a: (s4.by_person, a)),
         ("check_answer", LONGER, lambda a: (a,))]
CASES_4 = [(name, words, pack(answer)) for name, cases, pack in LAB_4 for words, answer in cases.items()]

@pytest.mark.parametrize(("name", "words", "answers"), CASES_4, ids=lambda x: x if isinstance(x, str) else "")
def test_lab_4_knows_the_mistake(name, words, answers): says(getattr(c4, name), answers, words)

def test_frames_keep_people_apart():
    "Two frames a person, nobody on both sides, and a network that answers on the image's grid."
    frames = load_frames(16, 3, 1, "cpu", (16, 16, 4))
    assert len(frames.train) == 4 and len(frames.unseen) == 2 and not set(frames.train.values()) & set(frames.unseen.values())
    x, _ = frames.slices[min(frames.train)]
    logits, maps = TwoHeadedUNet(len(frames.classes))(x)
    assert logits.shape == (len(x), 4, 16, 16) and maps.shape == (len(x), 3, 16, 16) and maps.abs().max() < 1


def test_dice_of_a_lab():
    "Two classes by hand: one pixel of three shared; a class that nobody has is 0."
    found, truth = torch.tensor([[[1, 1, 0, 2]]]), torch.tensor([[[1, 0, 0, 2]]])
    assert overlaps(found, truth, 3) == [2/3, 1., 0.]
