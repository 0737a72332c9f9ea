"ExternalAttention and semantic_correlations: against loops and PyTorch's attention, absent classes, any size."
import pytest
import torch
from common import assert_same, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medseg_nb.blocks import ExternalAttention, semantic_correlations
from medseg_nb.core import MedsegError, ShapeError


def loop_correlations(Q, A, W):
    "Eq. 9 to 11 as written, one number at a time: A (B,Z,N,*S)."
    B, Z, N = A.shape[:3]
    A, rows = A.flatten(3), []
    Q = Q.expand(B, *Q.shape[-2:])
    for b in range(B):
        for i in range(Z):
            K = torch.stack([(Q[b, i] * W[i, :, h]).sum() for h in range(N)])
            S = torch.stack([sum(K[h]*A[b, j, h] for h in range(N)) for j in range(Z)])                 # (Z,n)
            gate = S.exp() / S.exp().sum(0)                                                             # (Z,n)
            rows += [sum((A[b, j, h]*gate[j]).sum() for h in range(N)) / gate[j].sum() for j in range(Z)]
    return torch.stack(rows).view(B, Z, Z)


def example(B=2, Z=3, N=2, width=4, shape=(3, 5), scale=1., batched=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    return draw(B, Z, width) if batched else draw(Z, width), draw(B, Z, N, *shape)*scale, draw(Z, width, N)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 3), (1, 1)])
@pytest.mark.parametrize("batched", [False, True])
def test_correlations_equal_the_loops(shape, batched):
    inputs = example(shape=shape, batched=batched)
    assert_same(gradients(semantic_correlations, inputs), gradients(loop_correlations, inputs))


def test_correlations_by_hand():
    "Two classes, one head, two positions; K^1 = ln 2, K^2 = 0."
    Q, W = torch.tensor([[2.], [0.]]).log().nan_to_num(neginf=0), torch.ones(2, 1, 1)
    A = torch.tensor([[[[2., 0.]], [[0., 1.]]]])                                  # (1,2,1,2)
    expected = torch.tensor([[[24/17, 10/13], [1., 0.5]]])                         # K^2 = 0: plain means
    torch.testing.assert_close(semantic_correlations(Q, A, W), expected)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in example(B=1, Z=2, N=2, width=3, shape=(4,))]
    assert torch.autograd.gradcheck(semantic_correlations, inputs)


def peer_of(block):
    "nn.MultiheadAttention with the block's matrices."
    mca = block.mca
    peer = nn.MultiheadAttention(mca.dim, mca.heads, bias=False, batch_first=True).double()
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([mca.query.weight, mca.key.weight, mca.value.weight]))
        peer.out_proj.weight.copy_(mca.out.weight)
    return peer


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("heads", [1, 3])
def test_embeddings_equal_multihead_attention(shape, heads):
    torch.manual_seed(0)
    block = ExternalAttention(12, 4, heads).double()
    for norm in (block.norm_query, block.norm_map): nn.init.normal_(norm.weight)
    peer = peer_of(block)

    def by_peer(Q, F):
        Q, x = Q.expand(len(F), -1, -1), block.norm_map(F.flatten(2).mT)
        Q = Q + peer(block.norm_query(Q), x, x)[0]
        return block.shrink(Q + block.mlp(block.norm_mlp(Q)))

    Q, F = torch.randn(4, 12, dtype=torch.float64), torch.randn(2, 12, *shape, dtype=torch.float64)
    assert_same(gradients(lambda Q, F: block(Q, F)[0], [Q, F]), gradients(by_peer, [Q, F]))
    weights = peer(block.norm_query(Q).expand(2, -1, -1), *[block.norm_map(F.flatten(2).mT)]*2, average_attn_weights=False)[1]
    A = block(Q, F)[1]                                                             # (B,Z,N,*S)
    torch.testing.assert_close(A.flatten(3).softmax(-1).transpose(1, 2), weights)


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (5, 3), (7, 1), (3, 5, 2)])
def test_shapes_of_any_size(shape):
    block = ExternalAttention(8, 5, 2)
    Q_next, A, E = block(torch.randn(5, 8), torch.randn(3, 8, *shape))
    assert Q_next.shape == (3, 5, 4) and A.shape == (3, 5, 2, *shape) and E.shape == (3, 5, 5)
    Q_last, A, E = ExternalAttention(4, 5, 2, next_width=0)(Q_next, torch.randn(3, 4, *shape))
    assert Q_last is None and A.shape == (3, 5, 2, *shape) and E.shape == (3, 5, 5)
    assert ExternalAttention(9, 5, 3, next_width=6)(torch.randn(5, 9), torch.randn(1, 9, *shape))[0].shape == (1, 5, 6)


def test_one_image_does_not_see_the_other():
    torch.manual_seed(0)
    block, Q, F = ExternalAttention(8, 3, 2), torch.randn(3, 8), torch.randn(2, 8, 4, 5)
    together, alone = block(Q, F), [block(Q, F[b:b+1]) for b in (0, 1)]
    for i in range(3): torch.testing.assert_close(together[i], torch.cat([out[i] for out in alone]))


def test_every_parameter_learns_from_what_uses_it():
    torch.manual_seed(0)
    for next_width in (None, 0):
        block = ExternalAttention(8, 3, 2, next_width)
        Q = nn.Parameter(torch.randn(3, 8))
        Q_next, A, E = block(Q, torch.randn(2, 8, 4, 4))
        (E.square().sum() + A.square().sum() + (0 if Q_next is None else Q_next.square().sum())).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [Q, *block.parameters()])
    block = ExternalAttention(8, 3, 2)
    block(torch.randn(3, 8), torch.randn(2, 8, 4, 4))[1].sum().backward()
    assert block.kernel.grad is None                                               # only E teaches W^i


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1., 10., 1e4]), shape=st.sampled_from([(1,), (4, 3), (2, 2, 2)]))
def test_correlations_stay_between_the_extremes_of_the_map(seed, scale, shape):
    Q, A, W = (x.float() for x in example(seed=seed, scale=scale, shape=shape))
    E, a = semantic_correlations(Q, A, W), A.sum(2).flatten(2)                     # a (B,Z,n)
    slack = 1e-4*scale
    assert bool((E >= a.amin(-1)[:, None] - slack).all() and (E <= a.amax(-1)[:, None] + slack).all())


def test_finite_where_the_formula_is_not():
    Q, A, W = (x.float() for x in example())
    Q, W = Q.abs() + .1, W.abs() + .1
    A[:, 1] -= 1000                                                                # class 1 answers nowhere: its gate is 0
    g = torch.einsum("bih,bjhn->bijn", torch.einsum("biw,iwh->bih", Q, W), A.flatten(3)).softmax(2)
    formula = torch.einsum("bijn,bjn->bij", g, A.sum(2).flatten(2)) / g.sum(-1)
    assert not bool(formula.isfinite().all())                                      # 0/0
    assert all(bool(x.isfinite().all()) for x in gradients(semantic_correlations, [Q, A, W]))
    torch.testing.assert_close(semantic_correlations(Q, A, W), semantic_correlations(Q.double(), A.double(), W.double()).float(),
                               rtol=1e-3, atol=1e-1)


def test_repeating_positions_changes_nothing():
    Q, A, W = example(shape=(3, 5))
    larger = A.repeat_interleave(4, -1).repeat_interleave(3, -2)
    torch.testing.assert_close(semantic_correlations(Q, larger, W), semantic_correlations(Q, A, W))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_order_of_classes_and_of_positions_does_not_matter(seed):
    Q, A, W = example(seed=seed, Z=4)
    g = torch.Generator().manual_seed(seed)
    order, places = torch.randperm(4, generator=g), torch.randperm(15, generator=g)
    E = semantic_correlations(Q, A, W)
    torch.testing.assert_close(semantic_correlations(Q[:, order], A[:, order], W[order]), E[:, order][:, :, order])
    torch.testing.assert_close(semantic_correlations(Q, A.flatten(3)[..., places], W), E)


def organs(present, size=2):
    "Maps of 4 classes on 12 x 12 positions: +3 in the own square, -3 elsewhere; a class that is absent is -3 everywhere."
    A = torch.full((1, 4, 1, 12, 12), -3., dtype=torch.float64)
    for j in range(4):
        row, col = 6*(j//2), 6*(j % 2)
        if present[j]: A[0, j, 0, row:row+size, col:col+size] = 3
    return A


def test_an_absent_class_does_not_disturb_the_others():
    Q, W = torch.ones(4, 1, dtype=torch.float64), torch.ones(4, 1, 1, dtype=torch.float64)
    here = semantic_correlations(Q, organs([True]*4), W)[0]
    gone = semantic_correlations(Q, organs([True, True, True, False]), W)[0]
    assert bool(gone.isfinite().all()) and bool((gone.abs() <= 3 + 1e-9).all())
    torch.testing.assert_close(gone[:, 3], torch.full((4,), -3., dtype=torch.float64))   # the absent class: its background
    assert float((gone[:, :3] - here[:, :3]).abs().max()) < 0.02*6                       # of the maps' range


def test_an_organ_that_becomes_background_moves_no_other_organ():
    "Class 0 fills what the others leave; erase class 3 and give its pixels to class 0."
    y = torch.zeros(1, 12, 12, dtype=torch.long)
    y[0, :4, :4], y[0, 8:, 8:], y[0, :3, 9:] = 1, 2, 3
    maps = lambda y: torch.nn.functional.one_hot(y, 4).movedim(-1, 1)[:, :, None].double()*6 - 3
    Q, W = torch.ones(4, 1, dtype=torch.float64), torch.ones(4, 1, 1, dtype=torch.float64)
    here, gone = (semantic_correlations(Q, maps(labels), W)[0] for labels in (y, y.masked_fill(y == 3, 0)))
    torch.testing.assert_close(gone[:, 1:3], here[:, 1:3])
    assert float((gone[:, 0] - here[:, 0]).abs().max()) < 1e-2 and float(here[0, 3]) > 2 and float(gone[0, 3]) == pytest.approx(-3)


def test_a_class_that_never_answers_leaves_the_others_alone():
    "The limit S^{i4} -> -inf: exactly the correlations of the other classes alone."
    Q, A, W = example(Z=4)
    A[:, 3] = -1e6
    Q, W = Q.abs() + .1, W.abs() + .1                                                    # K > 0: low A, low S
    E = semantic_correlations(Q, A, W)
    torch.testing.assert_close(E[:, :3, :3], semantic_correlations(Q[:, :3], A[:, :3], W[:3]))
    assert bool(E.isfinite().all())


def test_size_of_an_organ_hardly_matters():
    "Without eq. 11's denominator the row grows with the organ; with it, it is a mean."
    Q, W = torch.ones(4, 1, dtype=torch.float64), torch.ones(4, 1, 1, dtype=torch.float64)*2
    small, large = (semantic_correlations(Q, organs([True]*4, size), W)[0] for size in (2, 6))
    ratio = lambda A: (A.sum(2).flatten(2)*(2*A.sum(2).flatten(2)).softmax(1)).sum(-1)
    raw = [ratio(organs([True]*4, size)) for size in (2, 6)]
    assert float((small - large).abs().max()) < 6.0 and float((raw[0] - raw[1]).abs().max()) > 60


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    Q, A, W = (x.to(dtype) for x in example(shape=(40, 40)))
    assert semantic_correlations(Q, A, W).dtype == torch.float32
    torch.testing.assert_close(semantic_correlations(Q, A, W), semantic_correlations(Q.float(), A.float(), W.float()))


def test_autocast():
    torch.manual_seed(0)
    block, Q, F = ExternalAttention(8, 3, 2), torch.randn(3, 8), torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16): Q_next, A, E = block(Q, F)
    assert E.dtype == torch.float32
    for half, full in zip((Q_next, A, E), block(Q, F), strict=True):
        torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)


def test_state_dict_round_trip():
    torch.manual_seed(0)
    Q, F = torch.randn(3, 8), torch.randn(2, 8, 4, 4)
    for next_width in (None, 0):
        a, b = ExternalAttention(8, 3, 2, next_width), ExternalAttention(8, 3, 2, next_width)
        b.load_state_dict(a.state_dict())
        assert torch.equal(a(Q, F)[2], b(Q, F)[2])


@pytest.mark.parametrize("build", [
    lambda: ExternalAttention(8, 3, 3), lambda: ExternalAttention(8, 1, 2), lambda: ExternalAttention(9, 3, 3),
    lambda: ExternalAttention(0, 3, 1), lambda: ExternalAttention(8, 3, 2, next_width=-1)])
def test_blocks_that_cannot_be(build):
    with pytest.raises(ShapeError): build()


@pytest.mark.parametrize("Q, F", [
    ((3, 8), (2, 6, 4, 4)), ((4, 8), (2, 8, 4, 4)), ((3, 6), (2, 8, 4, 4)), ((3, 3, 8), (2, 8, 4, 4)), ((8,), (2, 8, 4, 4)),
    ((3, 8), (2, 8)), ((3, 8), (2, 8, 0, 4)), ((3, 8), (2, 8, 2, 2, 2, 2))])
def test_inputs_that_do_not_fit(Q, F):
    with pytest.raises(MedsegError, match="expected"): ExternalAttention(8, 3, 2)(torch.randn(Q), torch.randn(F))


@pytest.mark.parametrize("Q, A, W", [
    ((2, 3, 4), (2, 3, 2), (3, 4, 2)), ((2, 3, 4), (2, 3, 2, 0), (3, 4, 2)), ((2, 3, 4), (2, 3, 2, 5), (3, 4, 1)),
    ((2, 3, 5), (2, 3, 2, 5), (3, 4, 2)), ((1, 3, 4), (2, 3, 2, 5), (3, 4, 2)), ((3, 4), (2, 3, 2, 5), (4, 2))])
def test_correlations_that_do_not_fit(Q, A, W):
    with pytest.raises(ShapeError, match="expected"): semantic_correlations(torch.randn(Q), torch.randn(A), torch.randn(W))
