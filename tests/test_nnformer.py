"Attention in windows and nnFormer: against a dense definition, other libraries' code, and the published sizes."
import itertools

import pytest
import torch
from common import assert_same, gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.blocks.channel_scaling import NetworkScaling, fold_scale
from medseg_nb.blocks.disconx import merge_heads, split_heads
from medseg_nb.blocks.window_attention import DropPath, WindowAttention, WindowBlock, join_windows, partition_windows, relative_position_index, window_regions
from medseg_nb.core import ShapeError
from medseg_nb.models.nnformer import NNFORMER_SIZES, NNFormer

TINY = dict(width=4, heads=(1, 2, 2, 4), windows=(2, 2, 3, 2), patch=(4, 4, 2), drop_path=0.0)


def dense(block, x, context=None):
    "Window attention as one n x n attention: two positions meet where floor((i - shift)/window) agrees on every axis."
    sides = x.shape[1:-1]
    window = [min(w, s) for w, s in zip(block.window, sides, strict=True)]
    shift = [m if s > w else 0 for m, s, w in zip(block.shift, sides, block.window, strict=True)]
    at = torch.tensor(list(itertools.product(*[range(s) for s in sides])))                        # (n,d)
    cell = torch.div(at - torch.tensor(shift), torch.tensor(window), rounding_mode="floor")
    together = (cell[:, None] == cell).all(-1)                                                    # (n,n)
    offset = at[:, None] - at + torch.tensor(block.window) - 1                                    # (n,n,d)
    table = block.bias_table.view(*[2*w - 1 for w in block.window], -1)
    limit = torch.tensor(block.window)*2 - 2
    bias = table[tuple(offset.clamp(min=0).minimum(limit).unbind(-1))]                            # (n,n,heads); far pairs are masked
    bias = bias.permute(2, 0, 1).masked_fill(~together, -torch.inf)
    tokens, source = x.flatten(1, -2), (x if context is None else context).flatten(1, -2)
    parts = block.project(source).chunk(2 if block.cross else 3, -1)
    q, k, v = (split_heads(t, block.heads) for t in ((tokens, *parts) if block.cross else parts))
    weights = (q @ k.mT / q.shape[-1]**0.5 + bias).softmax(-1)
    return block.out(merge_heads(weights @ v)).view(x.shape)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=3), st.booleans(), st.booleans(), st.integers(0, 99))
def test_window_attention_equals_the_definition(axes, shift, cross, seed):
    torch.manual_seed(seed)
    sides, window = zip(*axes, strict=True)
    block = WindowAttention(4, window, 2, shift=shift, cross=cross).double()
    maps = [torch.randn(2, *sides, 4, dtype=torch.float64) for _ in range(2 if cross else 1)]
    assert_same(gradients(block, maps, block.parameters()), gradients(lambda *m: dense(block, *m), maps, block.parameters()), 1e-10)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3))
def test_joining_undoes_cutting(axes):
    sides, window = [c*w for c, w in axes], [w for _, w in axes]
    x = torch.randn(2, *sides, 3)
    assert torch.equal(join_windows(partition_windows(x, window), window, sides), x)


def test_offsets_have_rows_of_their_own():
    index = relative_position_index((2, 3, 4))
    rows = {}
    for (i, p), (j, q) in itertools.product(enumerate(itertools.product(range(2), range(3), range(4))), repeat=2):
        assert rows.setdefault(tuple(a - b for a, b in zip(p, q, strict=True)), index[i, j].item()) == index[i, j]
    assert sorted(rows.values()) == list(range(3*5*7))


def test_regions_by_hand():
    assert window_regions((5,), (4,), (2,)).tolist() == [[0, 0, 0, 2], [2, 2, 1, 1]]      # 2 3 4 pad | pad pad 0 1


def test_timm_swin_block_2d():
    from timm.models.swin_transformer import SwinTransformerBlock
    torch.manual_seed(0)
    peer = SwinTransformerBlock(8, (12, 8), num_heads=2, window_size=4, shift_size=2).double().eval()
    with torch.no_grad():
        for p in peer.parameters(): p.add_(0.1*torch.randn_like(p))
    block = WindowBlock(8, (4, 4), 2, shift=True).double()
    names = {"attn.qkv": "attention.project", "attn.proj": "attention.out", "attn.relative_position_bias_table": "attention.bias_table",
             "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    def ours(name):
        for a, b in names.items(): name = name.replace(a, b)
        return name
    block.load_state_dict({ours(k): v for k, v in peer.state_dict().items() if "index" not in k and k != "attn_mask"})
    x = torch.randn(2, 12, 8, 8, dtype=torch.float64)                         # sides divide: timm shows its padding to everybody
    torch.testing.assert_close(block(x), peer(x), rtol=1e-10, atol=1e-10)


def test_monai_window_attention_3d():
    from monai.networks.nets.swin_unetr import WindowAttention as Peer
    torch.manual_seed(0)
    peer = Peer(8, 2, (2, 3, 4), qkv_bias=True).double().eval()
    block = WindowAttention(8, (2, 3, 4), 2).double()
    block.project.load_state_dict(peer.qkv.state_dict()); block.out.load_state_dict(peer.proj.state_dict())
    block.bias_table.data.copy_(peer.relative_position_bias_table)
    x = torch.randn(3, 2, 3, 4, 8, dtype=torch.float64)                       # one window an image
    torch.testing.assert_close(block(x).flatten(1, 3), peer(x.flatten(1, 3), None), rtol=1e-10, atol=1e-10)


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(20000, 3)
    y = DropPath(0.3)(x)
    assert {round(v, 4) for v in y.unique().tolist()} == {0, round(1/0.7, 4)} and (y == y[:, :1]).all()
    assert abs(y.mean() - 1) < 0.03 and DropPath(0.3).eval()(x) is x


@pytest.mark.parametrize("size, classes, millions", [("synapse", 14, 150.05), ("acdc", 4, 37.20)])
def test_published_sizes(size, classes, millions):
    with torch.device("meta"): model = NNFormer(1, classes, **NNFORMER_SIZES[size])
    assert abs(sum(p.numel() for p in model.parameters())/1e6 - millions) < 0.01
    assert model.block_channels == [model.block_channels[0]*m for m in (1, 1, 2, 2, 4, 4, 8, 8, 4, 4, 2, 2, 1, 1)]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 37), min_size=3, max_size=3), st.integers(1, 3), st.integers(2, 4), st.booleans())
def test_any_size_in_the_same_size_out(sides, channels, classes, thick):
    strides = ((2, 2, 1), (2, 2, 2), (2, 2, 2)) if thick else ((2, 2, 2),)*3
    model = NNFormer(channels, classes, **TINY | dict(strides=strides, patch=(4, 4, 1) if thick else (4, 4, 2)))
    x = torch.randn(2, channels, *sides)
    out = model(x, aux=True)
    assert out.logits.shape == (2, classes, *sides) and out.logits.isfinite().all() and out.losses == {}
    grid = [-(-s//p) for s, p in zip(sides, model.patch, strict=True)]
    assert out.maps["F_3"].shape == (2, 4, *grid) and out.maps["F_2"].shape[:2] == (2, 8) and out.maps["F_1"].shape[:2] == (2, 16)
    y = torch.zeros(2, *sides)
    for k, (plane, across) in enumerate([(4, 2 if thick else 4), (2, 1 if thick else 2)], 1):
        assert out.maps[f"logits_{k}"].shape == (2, classes, *y[:, ::plane, ::plane, ::across].shape[1:])
    assert torch.equal(model.eval()(x), model(x)) and set(model(x, aux=True).maps) == {"F_1", "F_2", "F_3"}


def test_images_of_a_batch_do_not_mix():
    torch.manual_seed(0)
    model, x = NNFormer(1, 3, **TINY).eval(), torch.randn(3, 1, 21, 18, 9)
    torch.testing.assert_close(model(x), torch.cat([model(one[None]) for one in x]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", (1, 2, 3))
def test_what_lies_beyond_the_window_is_not_heard(axis):
    "The first half window is cut off by the shift: neither the rest of the map nor the padding it needs changes its answer."
    torch.manual_seed(0)
    block, x = WindowBlock(8, (4, 4, 4), 2, shift=True), torch.randn(1, 9, 9, 9, 8)
    whole = block(x).narrow(axis, 0, 2)
    for side in (5, 6, 8): torch.testing.assert_close(block(x.narrow(axis, 0, side)).narrow(axis, 0, 2), whole, rtol=1e-5, atol=1e-5)


def test_every_weight_learns():
    torch.manual_seed(0)
    model = NNFormer(1, 3, **TINY)
    out = model(torch.randn(2, 1, 64, 64, 32), aux=True)                       # a bottom of 2 x 2 x 2
    sum(v.square().mean() for v in (out.logits, out.maps["logits_1"], out.maps["logits_2"])).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent, silent


def test_modality_scales():
    "All ones change nothing; other scales change all blocks; a fixed scale folds into the weights."
    torch.manual_seed(0)
    model, x = NNFormer(1, 3, **TINY).double().eval(), torch.randn(1, 1, 16, 16, 8, dtype=torch.float64)
    scaling, Q = NetworkScaling(16, model.block_channels, 3).double(), torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(model(x, scales=scaling(Q)), model(x))
    for p in scaling.parameters(): p.data.normal_(std=0.3)
    scaled = model(x, scales=scaling(Q))
    assert (scaled - model(x)).abs().max() > 1e-3
    scaled.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in scaling.parameters())
    blocks = [b for stage in (*model.encoder.stages, *model.decoder) for b in stage]
    assert [b.norm1.normalized_shape[0] for b in blocks] == model.block_channels
    for block, (first, second) in zip(blocks, scaling(Q), strict=True):
        fold_scale(block.attention.out, first.detach()); fold_scale(block.mlp[-1], second.detach())
    torch.testing.assert_close(model(x), scaled, rtol=1e-10, atol=1e-10)


def test_learns_a_phantom_ball():
    "A few steps on one volume: the loss falls to a tenth."
    torch.manual_seed(0)
    at = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, n) for n in (16, 16, 8)], indexing="ij"))
    y = (at.norm(dim=0) < 0.6).long()[None]
    x, model = y[:, None] + 0.3*torch.randn(1, 1, 16, 16, 8), NNFormer(1, 2, **TINY | dict(width=8))
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad(); loss.backward(); optimiser.step(); losses.append(loss.item())
    assert losses[-1] < 0.1*losses[0]


@pytest.mark.parametrize("changes", [
    dict(width=3), dict(width=0), dict(heads=(3, 2, 2, 4)), dict(heads=(1, 2)), dict(depths=(1, 1)), dict(depths=(0, 1, 1, 1)), dict(patch=(3, 4, 2)),
    dict(patch=(4, 4)), dict(strides=((2, 2, 2),)), dict(strides=((2, 2, 3),)*3), dict(windows=(4, 4, 4, 0)), dict(windows=((4, 4),)*4),
    dict(drop_path=1.0), dict(in_channels=0), dict(classes=1)])
def test_numbers_that_do_not_fit(changes):
    with pytest.raises(ShapeError): NNFormer(**TINY | changes)


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 2, 16, 16, 8), (1, 1, 16, 0, 8), (0, 1, 16, 16, 8)])
def test_volumes_that_do_not_fit(shape):
    with pytest.raises(ShapeError): NNFormer(**TINY)(torch.zeros(shape))


def test_scales_that_do_not_fit():
    model = NNFormer(**TINY)
    with pytest.raises(ShapeError): model(torch.zeros(1, 1, 16, 16, 8), scales=[(torch.ones(4), torch.ones(4))])
    with pytest.raises(ShapeError): model(torch.zeros(1, 1, 16, 16, 8), scales=[(torch.ones(3), torch.ones(3))]*len(model.block_channels))
