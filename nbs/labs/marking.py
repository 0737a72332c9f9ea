"""What the checks of all labs share: the blank, a verdict in words, and a comparison that recognises mistakes."""
import dis
from functools import wraps
from types import CodeType

import torch
from torch import Tensor


class Blank:
    "What `____` stands for until a student has replaced it."
    def __repr__(self): return "____"

____ = Blank()


class NotYet(Exception):
    "An answer that is not right yet, said in words; a notebook shows the words without a traceback."
    def _render_traceback_(self): return [f"Not yet. {self}"]


def wrong(
    words:str,  # what is wrong and where to look, for the student
):
    "Stop the check."
    raise NotYet(words) from None

def exercise(
    number:int,  # as in the heading of the notebook
    title:str,   # a few words
):
    "Turn a function of the student's answers into a check: it prints that they are right, or raises `NotYet`."
    def decorate(look):
        @wraps(look)
        def check(*answers):
            try:
                for answer in answers: find_blank(answer)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(number)
                    look(*answers)
            except NotYet as error: raise NotYet(f"Exercise {number} ({title}): {error}") from None
            except Exception as error: raise NotYet(f"Exercise {number} ({title}): {describe_stop(error, answers)}") from None
            print(f"Exercise {number} ({title}): right.")
        check.number, check.title = number, title
        return check
    return decorate

def code_of(
    answer,  # anything
) -> list:   # of code objects
    "The code of a function, of the functions inside it, or of a class's methods."
    if isinstance(answer, type): return [c for f in vars(answer).values() for c in code_of(f)]
    code = getattr(getattr(answer, "__func__", answer), "__code__", answer)
    if not isinstance(code, CodeType): return []
    return [code, *(c for inner in code.co_consts if isinstance(inner, CodeType) for c in code_of(inner))]

def find_blank(
    answer,  # a value or a function of the student
):
    "Stop where a blank has not been filled, and say in which line."
    if isinstance(answer, Blank): wrong("there is still a blank: replace every ____ by your own code.")
    if isinstance(answer, (tuple, list)):
        for part in answer: find_blank(part)
    for code in code_of(answer):
        for step in dis.get_instructions(code):
            if step.argval == "____": wrong(f"there is still a blank in line {step.positions.lineno} of the cell: replace every ____ by your own code.")

def describe_stop(
    error:Exception,
    answers:tuple,  # the student's functions
) -> str:
    "An exception of the student's code in words: what, and in which line of the cell."
    files, trace, line = {code.co_filename for a in answers for code in code_of(a)}, error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in files: line = trace.tb_lineno
        trace = trace.tb_next
    message = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if line is None: return f"what you hand over cannot be checked ({message})"
    return f"your code stopped in line {line} of the cell with {message}"


def close(a, b, tol=1e-4) -> bool:
    "Whether two tensors of one shape agree."
    return a.shape == b.shape and torch.allclose(a.detach().double(), b.detach().double(), rtol=tol, atol=tol)

def need_tensor(
    got,           # what the student's function returned
    want:Tensor,   # the truth
    what:str,      # e.g. "the codes"
    shapes:dict,   # {a wrong shape: where it may come from}
):
    "Stop unless `got` is a finite tensor of the shape and kind of `want`."
    if got is None: wrong(f"{what}: your function returned nothing; is the `return` missing?")
    find_blank(got)
    if isinstance(got, (int, float)) and want.ndim == 0: got = torch.tensor(got, dtype=want.dtype)
    if not isinstance(got, Tensor): wrong(f"{what}: you returned a {type(got).__name__}, expected a tensor of shape {tuple(want.shape)}.")
    if got.shape != want.shape:
        hint = shapes.get(tuple(got.shape), "")
        wrong(f"{what}: wrong shape, you returned {tuple(got.shape)}, expected {tuple(want.shape)}{': ' + hint if hint else '.'}")
    if want.is_floating_point() != got.is_floating_point():
        wrong(f"{what}: expected {'real' if want.is_floating_point() else 'whole'} numbers, you returned {got.dtype}.")
    if not got.isfinite().all(): wrong(f"{what}: {'NaN' if got.isnan().any() else 'infinity'} among the numbers; is there a log of 0, a division by 0 or an exp too large?")

def expect(
    got,                # what the student's function returned
    want:Tensor,        # the truth
    what:str,           # e.g. "the codes"
    mistakes:dict=(),   # {words: what that mistake gives}
    shapes:dict=(),     # {a wrong shape: where it may come from}
    tol:float=1e-4,
):
    "Stop with words unless `got` is `want`; a known mistake is called by its name."
    need_tensor(got, want, what, dict(shapes))
    got = torch.as_tensor(got)
    if close(got, want, tol): return
    for words, value in dict(mistakes).items():
        if close(got, value, tol): wrong(words)
    differs = ~torch.isclose(got.double(), want.double(), rtol=tol, atol=tol)
    at = tuple(int(i) for i in differs.nonzero()[0])
    place = f" at position {at}" if at else ""
    wrong(f"{what}: not right, {int(differs.sum())} of {want.numel()} differ; the first{place} is {got[at].item():.5g}, expected {want[at].item():.5g}.")

def gradients(
    loss:Tensor,     # a number, or None-free function value
    *leaves:Tensor,  # what it is derived by
) -> list:           # a gradient each, zero where nothing arrives
    "Gradients of `loss`, or zeros where it does not depend on a leaf (or on anything)."
    if not loss.requires_grad: return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]

def leaf(*shape) -> Tensor:
    "Random numbers that ask for a gradient, in double precision."
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)

def in_words(
    text,           # the student's answer
    at_least:int,   # words
):
    "Stop unless a question was answered in a few sentences; a person reads them."
    find_blank(text)
    if not isinstance(text, str): wrong(f"your answer is a {type(text).__name__}; write it as text between the quotes.")
    if "____" in text or not text.strip(): wrong("there is still a blank: write your answer between the quotes.")
    if len(text.split()) < at_least: wrong(f"your answer has {len(text.split())} words; two or three sentences (at least {at_least} words) are asked for.")
