"VectorQuantizer beyond its notebook: gradients, state, layouts, types, several processes, memory."
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.blocks import vector_quantization as module
from medseg_nb.blocks.vector_quantization import VectorQuantizer
from medseg_nb.core import MedsegError, ShapeError


def reference(z, codebook, beta):
    "Autograd version: rows, cdist, two stop-gradient terms."
    tokens = z.movedim(1, -1)                                                                # (B,*S,C)
    flat = tokens.reshape(-1, z.shape[1]).detach()
    codes = (flat[:, None] - codebook.detach()).square().sum(-1).argmin(1).view(tokens.shape[:-1])
    chosen = codebook[codes]
    loss = F.mse_loss(chosen, tokens.detach()) + beta*F.mse_loss(tokens, chosen.detach())
    return (tokens + (chosen - tokens).detach()).movedim(-1, 1), codes, loss


@settings(max_examples=30, deadline=None)
@given(S=st.lists(st.integers(1, 5), min_size=1, max_size=3), B=st.integers(1, 3), C=st.integers(1, 5),
       K=st.integers(1, 9), beta=st.sampled_from([0., .25, 1., 2.]),
       chunk=st.sampled_from([1, 7, 40, 2**22]), seed=st.integers(0, 999))
def test_values_and_gradients_match_autograd_for_any_chunk(S, B, C, K, beta, chunk, seed):
    torch.manual_seed(seed)
    before, module.SCORES_PER_CHUNK = module.SCORES_PER_CHUNK, chunk
    try:
        vq = VectorQuantizer(C, K, beta=beta).double()
        z = torch.randn(B, C, *S, dtype=torch.float64, requires_grad=True)
        w = torch.randn_like(z)
        q = vq(z)
        ((q.z*w).sum() + 3*q.loss).backward()
    finally: module.SCORES_PER_CHUNK = before
    z2, E = z.detach().clone().requires_grad_(), vq.codebook.detach().clone().requires_grad_()
    out, codes, loss = reference(z2, E, beta)
    ((out*w).sum() + 3*loss).backward()
    assert torch.equal(q.codes, codes)
    for ours, theirs in [(q.z, out), (q.loss, loss), (z.grad, z2.grad), (vq.codebook.grad, E.grad)]:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", [0., .25, 1.])
def test_loss_gradients_are_the_finite_differences_of_the_mean_square(beta):
    "The value is (1 + beta) m with m the mean square: codes get dm/dE, tokens beta dm/dz."
    torch.manual_seed(0)
    vq = VectorQuantizer(3, 5, beta=beta).double()
    z = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    vq(z).loss.backward()
    for x, weight in [(vq.codebook, 1), (z, beta)]:
        numeric = torch.zeros_like(x)
        for i in range(x.numel()):
            sides = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    x.view(-1)[i] += step
                    sides.append(vq(z).loss.item()/(1 + beta))
                    x.view(-1)[i] -= step
            numeric.view(-1)[i] = weight*(sides[0] - sides[1])/2e-6
        torch.testing.assert_close(x.grad, numeric, rtol=1e-5, atol=1e-8)


def test_only_the_loss_or_only_the_output_may_be_used():
    vq, z = VectorQuantizer(4, 6), torch.randn(2, 4, 3, 3, requires_grad=True)
    vq(z).z.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))
    assert not vq.codebook.grad.any()
    vq(z.detach()).loss.backward()
    assert vq.codebook.grad.any()


def test_value_of_the_loss_does_not_depend_on_grad_mode():
    vq, z = VectorQuantizer(4, 6), torch.randn(2, 4, 3, 3)
    with torch.no_grad(): quiet = vq(z).loss
    assert torch.equal(quiet, vq(z).loss)
    vq.requires_grad_(False)
    assert torch.equal(quiet, vq(z).loss)


def test_ties_go_to_the_lowest_index():
    vq = VectorQuantizer(2, 4)
    vq.codebook.data = torch.tensor([[9., 9], [1, 0], [-1, 0], [1, 0]])
    z = torch.tensor([[[0., 1, 0], [0, 0, 5]]])   # tokens (0,0), (1,0), (0,5)
    assert vq(z).codes.tolist() == [[1, 1, 1]]


def test_channels_last_and_strided_inputs():
    vq, z = VectorQuantizer(4, 6), torch.randn(2, 4, 5, 3)
    expected = vq(z)
    last, strided = z.to(memory_format=torch.channels_last), torch.stack([z, z], -1)[..., 0]
    for other in (last, strided):
        q = vq(other)
        assert torch.equal(q.codes, expected.codes)
        torch.testing.assert_close(q.z, expected.z)
    assert vq(last).z.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype):
    vq, z = VectorQuantizer(4, 6), torch.randn(2, 4, 5).to(dtype).requires_grad_()
    q = vq(z)
    assert q.z.dtype == dtype
    assert q.loss.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(q.codes, vq(z.to(q.loss.dtype)).codes)
    (q.z.sum() + q.loss).backward()
    assert z.grad.dtype == dtype and vq.codebook.grad.dtype == torch.float32


def test_autocast_computes_distances_in_float32():
    torch.manual_seed(0)
    vq, z = VectorQuantizer(64, 128), torch.randn(2, 64, 50)
    expected = vq(z)
    with torch.autocast("cpu", torch.bfloat16): q = vq(z)
    assert torch.equal(q.codes, expected.codes) and torch.equal(q.loss, expected.loss)


def test_perplexity_and_usage():
    vq = VectorQuantizer(1, 4)
    vq.codebook.data = torch.tensor([[0.], [1], [2], [3]])
    q = vq(torch.tensor([[[0., 1, 2, 3]]]))
    assert q.perplexity.item() == pytest.approx(4) and q.usage.item() == 1
    q = vq(torch.zeros(2, 1, 7))
    assert q.perplexity.item() == pytest.approx(1) and q.usage.item() == .25


def test_ema_is_vq_vaes_running_sum_over_running_count():
    torch.manual_seed(0)
    vq, g = VectorQuantizer(3, 4, ema_decay=.8), .8
    N, m = torch.ones(4), vq.codebook.clone()
    for _ in range(20):
        z = torch.randn(2, 3, 30)
        codes = vq(z).codes
        hot = F.one_hot(codes.flatten(), 4).float()                                 # (60,4)
        N, m = g*N + (1-g)*hot.sum(0), g*m + (1-g)*hot.T @ z.movedim(1, 2).reshape(-1, 3)
        torch.testing.assert_close(vq.codebook, m/N[:, None], rtol=1e-4, atol=1e-5)


def test_ema_learns_without_gradient_and_only_in_training():
    vq, z = VectorQuantizer(3, 4, beta=.5, ema_decay=.9), torch.randn(2, 3, 30, requires_grad=True)
    assert not list(vq.parameters())
    before = vq.codebook.clone()
    q = vq.eval()(z)
    assert torch.equal(vq.codebook, before)
    torch.testing.assert_close(q.loss, .5*F.mse_loss(q.z, z))   # the commitment term alone
    vq.train()(z).loss.backward()   # the codebook moves, the gradient is that of the old one
    assert not torch.equal(vq.codebook, before)
    torch.testing.assert_close(z.grad, .5*2/z.numel()*(z - q.z).detach())


def test_unused_codes_stay_put_for_any_number_of_steps():
    vq = VectorQuantizer(1, 2, ema_decay=.5)
    vq.codebook.copy_(torch.tensor([[0.], [100]]))
    for _ in range(500): vq(torch.randn(1, 1, 8))
    assert vq.codebook[1].item() == 100 and vq.codebook.isfinite().all()


@pytest.mark.parametrize("ema_decay", [None, .9])
def test_restart_waits_moves_onto_a_token_and_repeats(ema_decay):
    def run():
        torch.manual_seed(3)
        vq = VectorQuantizer(2, 8, ema_decay=ema_decay, restart_after=3)
        vq.codebook.data[1:] += 50
        z, places = torch.randn(1, 2, 40), []
        for _ in range(4):
            vq(z)
            places.append(vq.codebook.detach().clone())
        return z, places
    (z, places), (_, again) = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(places, again, strict=True))
    assert (places[1][1:] > 40).all()                                       # two idle steps: patience
    moved = places[2][1:]                                                   # third: onto tokens
    assert all((z[0].T == code).all(1).any() for code in moved)


def test_restart_leaves_evaluation_alone():
    vq = VectorQuantizer(2, 8, restart_after=1).eval()
    before = vq.codebook.detach().clone()
    vq(torch.randn(1, 2, 5))
    assert torch.equal(vq.codebook, before) and not vq.idle.any()


def test_state_dict_carries_everything_so_a_resumed_run_is_the_same():
    def make(): return VectorQuantizer(2, 8, ema_decay=.9, restart_after=2)
    torch.manual_seed(0)
    a, batches = make(), torch.randn(8, 1, 2, 30)
    for z in batches[:4]: a(z)
    b = make()
    b.load_state_dict(a.state_dict())
    assert set(a.state_dict()) == {"codebook", "ema_count", "idle"}
    for vq in (a, b):
        torch.manual_seed(1)
        for z in batches[4:]: vq(z)
    for name, value in a.state_dict().items(): assert torch.equal(value, b.state_dict()[name]), name


def test_nan_shows_in_the_loss_and_spoils_nothing_for_good():
    for options in (dict(ema_decay=.9), dict(restart_after=1), dict(ema_decay=.9, restart_after=1)):
        vq, z = VectorQuantizer(2, 4, **options), torch.randn(1, 2, 6)
        z[0, 1] = torch.tensor(float("nan"))
        assert vq(z).loss.isnan()
        assert vq.codebook.isfinite().all()
        assert vq(torch.randn(1, 2, 6)).loss.isfinite()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0, 4)])
def test_empty_batches(shape):
    z = torch.zeros(shape, requires_grad=True)
    q = VectorQuantizer(3, 4, ema_decay=.9, restart_after=1)(z)
    assert q.z.shape == z.shape and q.loss.item() == 0 and q.usage.item() == 0
    (q.loss + q.z.sum()).backward()


@pytest.mark.parametrize("options", [dict(dim=0), dict(codebook_size=0), dict(codebook_size=-3)])
def test_sizes_are_checked(options):
    with pytest.raises(ShapeError, match="at least 1"): VectorQuantizer(**{"dim": 4, "codebook_size": 8, **options})


@pytest.mark.parametrize("options", [dict(beta=-1), dict(ema_decay=1.), dict(ema_decay=-.1), dict(restart_after=0)])
def test_options_are_checked(options):
    with pytest.raises(MedsegError): VectorQuantizer(4, 8, **options)


@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (4, 3), (4,)])
def test_shapes_are_checked(shape):
    with pytest.raises(ShapeError, match=r"expected \(B, 4, \*S\)"): VectorQuantizer(4, 8)(torch.zeros(shape))


def test_exports_as_a_graph():
    vq = VectorQuantizer(4, 8).eval()
    z = torch.randn(2, 4, 5, 5)
    with torch.no_grad(): graph = torch.export.export(vq, (z,))
    assert torch.equal(graph.module()(z).codes, vq(z).codes)


PROCESS = """
import os, sys, torch, torch.distributed as dist
from medseg_nb.blocks.vector_quantization import VectorQuantizer
rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1: dist.init_process_group("gloo", init_method="file://" + file + ".sync", rank=rank, world_size=world)
torch.manual_seed(0)
vq, batches = VectorQuantizer(3, 16, ema_decay=.9), torch.randn(6, 4, 3, 10)
restarting = VectorQuantizer(3, 16, restart_after=2)
restarting.codebook.data[3:] += 30
torch.manual_seed(rank)
for z in batches:
    part = z.chunk(world)[rank]
    vq(part)
    restarting(part)
torch.save([vq.codebook, vq.ema_count, restarting.codebook.data, restarting.idle], f"{file}.{world}.{rank}")
"""


def test_two_processes_learn_the_codebook_of_one_with_both_batches(tmp_path):
    file, env = str(tmp_path/"state"), {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), str(world), file], env=env)
            for world in (1, 2) for rank in range(world)]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    one, left, right = (torch.load(f"{file}.{name}") for name in ("1.0", "2.0", "2.1"))
    for a, b in zip(left, right, strict=True): assert torch.equal(a, b)                # no process drifts away
    for a, b in zip(one[:2], left[:2], strict=True): torch.testing.assert_close(a, b)  # running means of all tokens


def benchmark(monkeypatch):
    path = Path(__file__).parents[1]/"benchmarks"/"vector_quantization.py"
    monkeypatch.syspath_prepend(path.parent)   # it stands on measure.py beside it
    spec = importlib.util.spec_from_file_location("benchmark_of_vq", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_peak_memory_is_at_most_half_of_the_plain_version(monkeypatch):
    b = benchmark(monkeypatch)
    size = (2, 128, 64, 1024)   # a quarter of the batch and width of the stated size: the same tokens per image
    assert b.peak(b.OURS, size, "cpu") <= .5*b.peak(b.PLAIN, size, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    torch.manual_seed(0)
    vq, z = VectorQuantizer(16, 64), torch.randn(3, 16, 20, 20)
    w, results = torch.randn_like(z), []
    for device in ("cpu", "cuda"):
        vq.zero_grad()
        x = z.to(device).requires_grad_()
        q = vq.to(device)(x)
        ((q.z*w.to(device)).sum() + q.loss).backward()
        results.append([t.detach().cpu() for t in (q.z, q.codes, q.loss, q.perplexity, x.grad, vq.codebook.grad)])
    for a, b in zip(*results, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
