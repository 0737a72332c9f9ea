"CMAformer: its blocks against loops and PyTorch, images that never read each other, any size, the switches of Table III, its peers."
import pytest
import torch
from common import assert_same, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medseg_nb.blocks.channel_spatial_attention import AdditiveGate, ChannelAttention, CrossAttention, QueryNormBlock, RelativeAttention, SpatialAttention
from medseg_nb.blocks.window_attention import relative_position_index
from medseg_nb.core import ShapeError
from medseg_nb.models import build_model
from medseg_nb.models.cmaformer import CMAformer, PatchEmbedding
from medseg_nb.models.cmaformer_peers import UNETR, ResUNetPlusPlus
from medseg_nb.models.zoo import count_parameters

SMALL = dict(widths=(4, 8, 8, 16), layers=1, heads=2, mlp_ratio=2., grid=4, rates=(1, 2, 3))
SWITCHES = [dict(), dict(cross="gate"), dict(cross=False), dict(vit=False), dict(vit=False, cross=False)]
sides = st.tuples(st.integers(1, 6), st.integers(1, 6))


def loop_attention(layer, q, kv, size):
    "Eq. 1 of one image, one query at a time: q, kv (n,dim)."
    at = [(i, j) for i in range(size[0]) for j in range(size[1])]
    table, heads = layer.bias_table.view(*[2*g - 1 for g in layer.grid], -1), layer.heads
    far = [g - 1 for g in layer.grid]
    q, k, v = (m(t).unflatten(-1, (heads, -1)) for m, t in ((layer.query, q), (layer.key, kv), (layer.value, kv)))     # (n,heads,d)
    out = []
    for n, (i, j) in enumerate(at):
        offset = [(max(-far[0], min(far[0], i - y)), max(-far[1], min(far[1], j - x))) for y, x in at]
        bias = torch.stack([table[a + far[0], b + far[1]] for a, b in offset])                                         # (n,heads)
        weights = ((q[n]*k).sum(-1)/q.shape[-1]**0.5 + bias).softmax(0)
        out.append((weights[..., None]*v).sum(0).flatten())
    return layer.out(torch.stack(out))


@given(sides, st.integers(1, 4), st.integers(1, 4), st.booleans())
@settings(max_examples=20, deadline=None)
def test_relative_attention_equals_a_loop(size, a, b, same):
    torch.manual_seed(0)
    layer = RelativeAttention(4, 2, (a, b)).double()
    nn.init.normal_(layer.bias_table)
    q = torch.randn(2, size[0]*size[1], 4).double()
    kv = q if same else torch.randn_like(q)
    mine = lambda q, kv: layer(q, kv, size)
    loop = lambda q, kv: torch.stack([loop_attention(layer, *t, size) for t in zip(q, kv, strict=True)])
    assert_same(gradients(mine, [q, kv], layer.parameters()), gradients(loop, [q, kv], layer.parameters()), 1e-9)
    torch.testing.assert_close(layer.attention(q, kv, size).sum(-1), torch.ones(2, 2, q.shape[1]).double())


def test_offsets_beyond_the_table_share_its_border():
    index = relative_position_index((9, 9), (3, 3)).view(9, 9, 9, 9)
    table = torch.arange(25).view(5, 5)
    assert index[8, 0, 0, 8] == table[4, 0] and index[0, 0, 8, 8] == table[0, 0] and index[5, 4, 4, 4] == table[3, 2]
    assert torch.equal(relative_position_index((4, 5)), relative_position_index((4, 5), (4, 5)))


def test_block_by_its_own_formula():
    torch.manual_seed(0)
    block, x, context = QueryNormBlock(8, 2, (3, 3)).double(), torch.randn(2, 8, 3, 4).double(), torch.randn(2, 8, 3, 4).double()
    theirs = nn.MultiheadAttention(8, 2, bias=False, batch_first=True).double()
    mine = block.attention
    theirs.load_state_dict({"in_proj_weight": torch.cat([m.weight for m in (mine.query, mine.key, mine.value)]), "out_proj.weight": mine.out.weight})
    def by_torch(x, context):
        q, kv = block.norm_query(x.flatten(2).mT), context.flatten(2).mT
        h = q + theirs(q, kv, kv, attn_mask=mine.bias((3, 4)).repeat(2, 1, 1))[0]
        return (h + block.mlp(block.norm_mlp(h))).mT.reshape(x.shape)
    assert_same(gradients(block, [x, context]), gradients(by_torch, [x, context]), 1e-9)
    assert_same(gradients(lambda x: block(x), [x]), gradients(lambda x: by_torch(x, x), [x]), 1e-9)


@given(st.integers(1, 40), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_channel_attention_does_not_start_silent(channels, dims):
    "Of every pair of hidden units one speaks at the start, whatever the image: some gradient arrives."
    layer, x = ChannelAttention(channels, 1), torch.randn(2, channels, *(3,)*dims)
    weights = layer.weights(x)
    assert ((weights > 0) & (weights < 1)).all() and torch.equal(layer(x), x*weights.view(2, channels, *(1,)*dims))
    assert (layer.squeeze(x.flatten(2).mean(-1)) > 0).any()


@given(st.integers(1, 4), st.integers(1, 3), st.permutations([0, 1, 2]))
@settings(max_examples=15, deadline=None)
def test_cross_attention_is_a_mean_of_values(scale, heads, order):
    "Constant maps answer with their value; the scales may be asked in any order."
    torch.manual_seed(0)
    layer = CrossAttention(6, (2, 3, 4), heads)
    z, maps = torch.randn(2, 6, 4, 4), [torch.randn(2, c, 4*s, 4*s) for c, s in ((2, scale), (3, 2), (4, 1))]
    weights = layer.attention(z, maps)
    assert weights.shape == (2, heads, 16, 3, 16)
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, heads, 16))
    turned = CrossAttention(6, [(2, 3, 4)[i] for i in order], heads)
    turned.query, turned.out, turned.norm = layer.query, layer.out, layer.norm
    turned.key, turned.value = (nn.ModuleList(m[i] for i in order) for m in (layer.key, layer.value))
    torch.testing.assert_close(turned(z, [maps[i] for i in order]), layer(z, maps), rtol=1e-4, atol=1e-5)
    for m in layer.value: nn.init.zeros_(m.weight)
    assert torch.equal(layer(z, maps), z)


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_images_never_read_each_other(changes):
    torch.manual_seed(0)
    model, x = CMAformer(1, 3, **SMALL, **changes).double().eval(), torch.randn(4, 1, 24, 40).double()
    for buffer in model.modules():
        if isinstance(buffer, nn.BatchNorm2d): nn.init.uniform_(buffer.running_var, 0.5, 2)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(model(x[order]), y[order])
        for i in range(4): torch.testing.assert_close(model(x[i:i+1]), y[i:i+1])
    x.requires_grad_()
    grad = torch.autograd.grad(model(x)[1].sum(), x)[0].abs().amax((1, 2, 3))
    assert grad[1] > 0 and (grad[[0, 2, 3]] == 0).all()


def test_permuting_the_batch_permutes_the_output_in_training():
    "Batch statistics do not know the order either."
    torch.manual_seed(0)
    model, x, order = CMAformer(1, 3, **SMALL).double(), torch.randn(4, 1, 24, 24).double(), torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(model(x[order]), model(x)[order])


def test_batch_first_into_a_sequence_first_layer_leaks():
    "The test above does see the mistake of the published code."
    torch.manual_seed(0)
    leaky, x = nn.MultiheadAttention(8, 2), torch.randn(3, 5, 8, requires_grad=True)         # (batch, sequence, channels): read as (sequence, batch, channels)
    y = leaky(x, x, x)[0]
    torch.testing.assert_close(leaky(*(x[[2, 0, 1]],)*3)[0], y[[2, 0, 1]])                   # a permutation sees nothing
    grad = torch.autograd.grad(y[1].sum(), x)[0].abs().amax((1, 2))
    assert (grad[[0, 2]] > 0).all()                                                          # a gradient does
    assert (leaky(*(x[:1],)*3)[0] - y[:1]).abs().max() > 1e-3


@given(st.integers(5, 40), st.integers(5, 40), st.integers(1, 3), st.sampled_from(SWITCHES), st.sampled_from([1, 2, 3]))
@settings(max_examples=15, deadline=None)
def test_any_size(height, width, channels, changes, patch):
    model = CMAformer(channels, 3, **SMALL, **changes, patch=patch)
    out = model(torch.randn(1, channels, height, width), aux=True)
    assert out.logits.shape == (1, 3, height, width) and out.logits.isfinite().all()
    assert set(out.maps) == {"transformer", "bridge"}


def test_every_switch_takes_its_weights_away():
    counts = {str(changes): count_parameters(CMAformer(1, 3, **SMALL, **changes)) for changes in SWITCHES}
    assert len(set(counts.values())) == len(SWITCHES) and min(counts, key=counts.get) == str(SWITCHES[-1])
    assert count_parameters(CMAformer(1, 3, **SMALL, cross=True)) == counts["{}"]


def test_zoo_and_levels():
    for size in ("teach", "paper"):
        with torch.device("meta"): model = build_model("cmaformer", classes=4, size=size)
        assert len(model.encoder.channels) == len(model.encoder.strides) == len(model.decoder.levels) + 1
    assert model.encoder.channels == (16, 64, 256, 512) and model.encoder.strides == (1, 4, 16, 32)
    assert count_parameters(build_model("cmaformer", size="teach", vit=False)) < count_parameters(build_model("cmaformer", size="teach"))


def test_patches_know_where_they_are():
    torch.manual_seed(0)
    embed, same = PatchEmbedding(1, 4), torch.ones(1, 1, 8, 8)
    assert embed(same).flatten(2).std(-1).min() > 1e-3
    nn.init.zeros_(embed.place.weight)
    assert embed(same).flatten(2).std(-1).max() < 1e-6


@pytest.mark.parametrize("make", [
    *(lambda s=s: CMAformer(**s) for s in (dict(in_channels=0), dict(classes=1), dict(widths=(4, 8, 8)), dict(widths=()), dict(patch=0), dict(layers=0),
                                           dict(heads=5), dict(cross="both"), dict(rates=()), dict(rates=(0,)), dict(grid=0), dict(mlp_ratio=0))),
    lambda: ChannelAttention(4, 0), lambda: SpatialAttention(0, 4), lambda: CrossAttention(4, (), 2), lambda: ResUNetPlusPlus(classes=1), lambda: UNETR(grid=0),
    lambda: CMAformer(1, 3, **SMALL)(torch.zeros(1, 2, 8, 8)), lambda: CMAformer(1, 3, **SMALL)(torch.zeros(1, 1, 8, 8, 8)),
    lambda: CMAformer(1, 3, **SMALL)(torch.zeros(1, 1, 0, 8)), lambda: AdditiveGate(4, 3)(torch.zeros(2, 4, 2, 2), torch.zeros(2, 3, 2, 3)),
    lambda: CrossAttention(4, (3,), 2)(torch.zeros(1, 4, 2, 2), [torch.zeros(1, 4, 2, 2)])])
def test_what_does_not_fit_is_refused(make):
    with pytest.raises(ShapeError): make()


def test_unetr_is_monais_at_its_size():
    torch.manual_seed(0)
    model, x = UNETR(1, 3, width=24, heads=2, mlp=32, features=4, grid=2).eval(), torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad(): torch.testing.assert_close(model(x), model.network(x))
