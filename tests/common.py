"What several files of tests use: values and gradients, their agreement, memory."
import torch

from medseg_nb.experiments.comparison import peak_memory


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
    return peak_memory(f, torch.device("cpu"))
