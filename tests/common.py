"What several files of tests use: values and gradients, their agreement, memory, training in a process of its own."
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

TWO_PROCESSES = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                 "--mixed_precision", "no", "--dynamo_backend", "no")


def gradients(f, inputs, params=(), allow_unused=False):
    "What f gives, and the gradients of inputs and parameters for fixed random upstream gradients; zeros where none arrives, if that is allowed."
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outs = f(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
    grads = torch.autograd.grad(outs, [*inputs, *params], upstream, allow_unused=allow_unused, materialize_grads=allow_unused)
    return [*(out.detach() for out in outs), *grads]


def assert_same(a, b, tol=1e-11):
    "As many tensors, each within `tol` of the other's, relative or absolute."
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True): torch.testing.assert_close(x, y, rtol=tol, atol=tol)


def peak(f):
    "MiB alive at once while f runs, above what was there before."
    from medseg_nb.experiments.comparison import peak_memory
    return peak_memory(f, torch.device("cpu"))


@contextmanager
def one_thread():
    "As in the child processes."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield
    finally: torch.set_num_threads(threads)


@contextmanager
def quiet(cache):
    "Prepared volumes are kept in `cache`; one thread, here and in child processes."
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setenv("MEDSEG_CACHE", str(cache)); patch.setenv("OMP_NUM_THREADS", "1")
        yield


def run_child(script, text, job, launcher=(sys.executable,)):
    "Write a script and run it with a job, as JSON, in a process that finds this file; what came of it."
    Path(script).write_text(text)
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([*launcher, str(script), json.dumps(job)], capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths})


def die(): os.kill(os.getpid(), signal.SIGKILL)


def die_at_step(session, number):
    "The process kills itself at a step of a training session of this class."
    step = session.step
    def counted(self, x, y, n):
        if n == number: die()
        return step(self, x, y, n)
    session.step = counted


def assert_same_run(a, b):
    "Two run folders hold the same bytes."
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for name in ("model.safetensors", "state.safetensors", "metrics.csv", "config.json"): assert (a/name).read_bytes() == (b/name).read_bytes(), name


def assert_survives_death(run, broken, whole, steps):
    "Killed at each of the steps and taken up again, a run holds the bytes of one left alone; run(out=, die_at_step=) is what came of a child process."
    for death in steps:
        result = run(out=str(broken), die_at_step=death)
        assert result.returncode == -signal.SIGKILL, result.stderr
    for out in (broken, whole):
        result = run(out=str(out))
        assert result.returncode == 0, result.stderr
    assert_same_run(whole, broken)
