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
import checks_lab_2 as c2  # noqa: E402
from marking import NotYet, ____  # noqa: E402

ALL = sorted(LABS.glob("lab_*.ipynb"))


def module(path):
    "A Python file as a module."
    spec = importlib.util.spec_from_file_location(f"solution_{path.stem}", path)
    found = importlib.util.module_from_spec(spec); spec.loader.exec_module(found)
    return found

s1, s2 = (module(LABS/"solutions"/f"lab_{i}.py") for i in (1, 2))


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
