"DisConX and HardAttention: against dense references and PyTorch's own attention, and the memory they take."
import pytest
import torch
import torch.nn.functional as F
from common import assert_same, gradients, peak
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medseg_nb.blocks import hard_attention
from medseg_nb.blocks.disconx import DisConX, merge_heads, split_heads, to_tokens
from medseg_nb.blocks.hard_attention import HardAttention, row_blocks
from medseg_nb.core import MedsegError, ShapeError


def heads_of(weight, x, heads):
    return split_heads(weight(to_tokens(x)), heads)


def dense_hard(block, z):
    "HardAttention with n x n one-hot weights, `hard + soft - soft.detach()`."
    q, k, v = (heads_of(w, z, block.heads) for w in (block.query, block.key, block.value))
    s = q @ k.mT / q.shape[-1]**0.5
    if block.exclude_self: s = s.masked_fill(torch.eye(s.shape[-1], dtype=torch.bool), -torch.inf)
    soft, hard = s.softmax(-1), F.one_hot(s.argmax(-1), s.shape[-1]).to(s)
    if block.estimator == "none": soft = soft.detach()
    return block.out(merge_heads((hard + soft - soft.detach()) @ v)).mT.reshape(z.shape)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_disconx_equals_multihead_attention(shape, dtype, tol):
    torch.manual_seed(0)
    block, peer = DisConX(12, 3).to(dtype), nn.MultiheadAttention(12, 3, bias=False, batch_first=True).to(dtype)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([block.query.weight, block.key.weight, block.value.weight]))
        peer.out_proj.weight.copy_(block.out.weight)

    def by_peer(z_dis, z_con):
        kv = to_tokens(z_con)
        return peer(to_tokens(z_dis), kv, kv)[0].mT.reshape(z_dis.shape)

    maps = torch.randn(2, 2, 12, *shape, dtype=dtype)
    ours = gradients(block, maps, block.parameters())
    *rest, packed, out = gradients(by_peer, maps, [peer.in_proj_weight, peer.out_proj.weight])
    assert_same(ours, [*rest, *packed.chunk(3), out], tol)
    weights = peer(to_tokens(maps[0]), *[to_tokens(maps[1])]*2, average_attn_weights=False)[1]
    torch.testing.assert_close(block.attention(*maps), weights, rtol=tol, atol=tol)


@pytest.mark.parametrize("limit", [7, 50, 200, 2**19])   # rows one by one, some rows, some matrices, everything
@pytest.mark.parametrize("estimator", ["straight-through", "none"])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("shape", [(11,), (3, 5), (2, 3, 4)])
def test_hard_attention_equals_the_dense_version(monkeypatch, limit, estimator, exclude_self, shape):
    monkeypatch.setitem(hard_attention.BLOCK, "cpu", limit)
    torch.manual_seed(0)
    block = HardAttention(12, 3, estimator, exclude_self)
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        block, z = block.to(dtype), torch.randn(2, 12, *shape, dtype=dtype)
        assert_same(gradients(block, [z], block.parameters(), allow_unused=True),
                    gradients(lambda z: dense_hard(block, z), [z], block.parameters(), allow_unused=True), tol)  # noqa: B023


@settings(max_examples=60, deadline=None)
@given(groups=st.integers(1, 40), n=st.integers(1, 60), limit=st.integers(1, 5000))
def test_blocks_cover_every_row_once(groups, n, limit):
    q, before = torch.zeros(groups, n, 1), hard_attention.BLOCK["cpu"]
    try:
        hard_attention.BLOCK["cpu"] = limit
        blocks = row_blocks(q)
    finally: hard_attention.BLOCK["cpu"] = before
    for block in blocks:
        assert q[block].shape[:2].numel() * n <= max(limit, n)   # never more than the limit, one row at least
        q[block] += 1
    assert bool((q == 1).all())


def test_forward_is_the_indicator_of_eq_6():
    torch.manual_seed(0)
    block, z = HardAttention(8, 2), torch.randn(2, 8, 4, 5)
    q, k, v = (heads_of(w, z, 2) for w in (block.query, block.key, block.value))
    s = q @ k.mT
    indicator = (s == s.amax(-1, keepdim=True)).to(s)
    assert bool((indicator.sum(-1) == 1).all())                  # no ties in random numbers
    torch.testing.assert_close(block(z), block.out(merge_heads(indicator @ v)).mT.reshape(z.shape))
    assert torch.equal(block.winners(z), indicator.argmax(-1))


def test_ties_go_to_the_lowest_index():
    block, z = HardAttention(4, 2), torch.randn(1, 4, 1).expand(1, 4, 300).contiguous()   # all tokens equal
    assert bool((block.winners(z) == 0).all())
    winners = HardAttention(4, 2, exclude_self=True).winners(z)
    assert winners[0, :, 0].tolist() == [1, 1] and bool((winners[:, :, 1:] == 0).all())


def test_exclude_self_never_chooses_itself():
    torch.manual_seed(0)
    z = 3*torch.randn(2, 16, 9, 9)
    for exclude_self in (False, True):
        block = HardAttention(16, 4, exclude_self=exclude_self)
        for w in (block.query, block.key): nn.init.eye_(w.weight)
        own = (block.winners(z) == torch.arange(81)).sum()
        assert own == 0 if exclude_self else own > 100


def test_estimator_none_gives_queries_and_keys_no_gradient():
    block = HardAttention(8, 2, estimator="none")
    block(torch.randn(1, 8, 4, 4)).sum().backward()
    assert block.query.weight.grad is None and block.key.weight.grad is None
    assert block.value.weight.grad.norm() > 0 and block.out.weight.grad.norm() > 0


def test_mixed_precision_compares_in_single_precision():
    torch.manual_seed(0)
    block, z = HardAttention(16, 2), torch.randn(2, 16, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(z)
        assert out.dtype == torch.bfloat16
        q, k = (heads_of(w, z, 2).float() for w in (block.query, block.key))
        winners = block.winners(z)
    assert torch.equal(winners, (q @ k.mT).argmax(-1))
    out.float().square().sum().backward()
    half, whole = block.query.weight.grad, torch.autograd.grad(block(z).square().sum(), block.query.weight)[0]
    assert half.dtype == torch.float32 and F.cosine_similarity(half.flatten(), whole.flatten(), dim=0) > 0.95
    disconx = DisConX(16, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16): assert disconx(z, z).dtype == torch.bfloat16


def test_second_derivatives_are_refused():
    z = torch.randn(1, 8, 4, requires_grad=True)
    grad, = torch.autograd.grad(HardAttention(8, 2)(z).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): grad.sum().backward()


def test_memory_is_linear_in_n():
    def of(block, side, n_maps):
        maps = [torch.randn(1, 64, side, side, requires_grad=True) for _ in range(n_maps)]
        return peak(lambda: block(*maps).sum().backward())
    for block, n_maps in ((HardAttention(64, 8), 1), (DisConX(64, 8), 2)):
        small, large = (of(block, side, n_maps) for side in (28, 56))          # n grows fourfold, n x n sixteenfold
        assert large < 5*small
        assert large < 0.25*8*3136**2*4/2**20                                  # a quarter of one n x n matrix a head


def test_hard_attention_takes_a_quarter_of_the_dense_memory():
    block, z = HardAttention(256, 8), torch.randn(1, 256, 40, 40, requires_grad=True)
    ours, dense = (peak(lambda f=f: f(z).sum().backward()) for f in (block, lambda z: dense_hard(block, z)))
    assert ours < dense/4


def test_both_survive_export_and_state_dict():
    z = torch.randn(1, 8, 4, 4)
    for block, maps in ((DisConX(8, 2), (z, z)), (HardAttention(8, 2), (z,))):
        exported = torch.export.export(block.eval(), maps).module()
        torch.testing.assert_close(exported(*maps), block(*maps))
        twin = type(block)(8, 2)
        twin.load_state_dict(block.state_dict())
        assert torch.equal(twin(*maps), block(*maps))


@pytest.mark.parametrize("make", [DisConX, HardAttention])
@pytest.mark.parametrize("dim, heads", [(10, 4), (8, 0), (8, -2), (0, 1), (4, 8)])
def test_heads_that_do_not_divide_the_width(make, dim, heads):
    with pytest.raises(ShapeError, match="heads do not divide the width.*take heads from"): make(dim, heads)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 8, 0), (0, 8, 4), (1, 6, 4, 4), (1, 8, 2, 2, 2, 2), (1, 6, 0)])
def test_maps_that_do_not_fit(shape):
    z = torch.zeros(shape)
    for call in (lambda: DisConX(8, 2)(z, z), lambda: DisConX(8, 2).attention(z, z), lambda: HardAttention(8, 2)(z),
                 lambda: HardAttention(8, 2).winners(z)):
        with pytest.raises(ShapeError, match="expected"): call()


def test_other_bad_input():
    with pytest.raises(ShapeError, match="differ in shape"): DisConX(8, 2)(torch.zeros(1, 8, 4), torch.zeros(1, 8, 5))
    with pytest.raises(MedsegError, match="'straight-through' or 'none'"): HardAttention(8, 2, estimator="gumbel")
    alone = HardAttention(8, 2, exclude_self=True)
    with pytest.raises(ShapeError, match="exclude_self=False"): alone(torch.zeros(1, 8, 1))


def test_nan_is_seen_in_the_output():
    z = torch.randn(1, 8, 3, 3)
    z[0, 2, 1, 1] = torch.nan
    assert DisConX(8, 2)(z, z).isnan().all()
    assert HardAttention(8, 2)(z).isnan().all(1).sum() == 8      # all but the token itself, which compares NaN with NaN
