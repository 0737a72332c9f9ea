"Swin-Unet: windows against a loop over tokens and against timm's blocks, any size in and out, channel scaling in every block."
import pytest
import torch
import torch.nn.functional as F
from common import assert_same, gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.blocks.channel_scaling import NetworkScaling, fold_scale
from medseg_nb.blocks.window_attention import WindowAttention, WindowBlock, join_windows, partition_windows, relative_position_index, window_regions
from medseg_nb.core import ShapeError
from medseg_nb.models.swin_unet import PatchExpanding, PatchMerging, SwinUNet
from medseg_nb.models.zoo import count_parameters

SMALL = dict(width=8, depths=(2, 1, 2), heads=(1, 2, 4), window=3, patch=2, drop_path=0.)
OURS = ("norm1", "attention.project", "attention.out", "norm2", "mlp.0", "mlp.2")
TIMMS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
sides = st.tuples(st.integers(1, 11), st.integers(1, 11))


def loop_attention(block, x):
    "Window attention one token at a time: the tokens of the same window, before any padding or rolling."
    B, H, W, C = x.shape
    ((a, b), (s, t), _), side = block.fit((H, W)), block.window[0]
    # A token belongs to the window that the shifted grid puts it in; the first s rows (t columns) are a window of their own.
    home = {(i, j): ((i - s)//a, (j - t)//b) for i in range(H) for j in range(W)}
    q, k, v = block.project(x).unflatten(-1, (3, block.heads, -1)).unbind(3)              # (B,H,W,heads,d)
    out = torch.zeros_like(q)
    for i, j in home:
        others = [p for p in home if home[p] == home[i, j]]
        rows = [(i - y + side - 1)*(2*side - 1) + j - z + side - 1 for y, z in others]
        keys, values = (torch.stack([m[:, y, z] for y, z in others], 1) for m in (k, v))  # (B,n,heads,d)
        score = (q[:, i, j, None]*keys).sum(-1)/q.shape[-1]**0.5 + block.bias_table[rows]
        out[:, i, j] = (score.softmax(1)[..., None]*values).sum(1)
    return block.out(out.flatten(3))


def timm_block(ours, size):
    "timm's block with the weights of ours, for maps of one size."
    from timm.models.swin_transformer import SwinTransformerBlock
    mine = ours.attention
    (a, b), (w, _) = mine.fit(size)[0], mine.window
    peer = SwinTransformerBlock(mine.out.in_features, size, mine.heads, window_size=w, shift_size=mine.shift[0])
    peer = peer.to(mine.out.weight.dtype)
    table = mine.bias_table.detach().view(2*w - 1, 2*w - 1, -1)[w-a:w+a-1, w-b:w+b-1].flatten(0, 1)
    state = dict(ours.state_dict())
    renamed = {"attn.relative_position_bias_table": table}
    for ours_name, name in zip(OURS, TIMMS, strict=True):
        for part in ("weight", "bias"): renamed[f"{name}.{part}"] = state[f"{ours_name}.{part}"]
    left = peer.load_state_dict(renamed, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"attn.relative_position_index", "attn_mask"}
    return peer


@given(sides, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_windows_are_put_back(grid, batch, a, b):
    x = torch.randn(batch, grid[0]*a, grid[1]*b, 2)
    windows = partition_windows(x, (a, b))
    assert windows.shape == (batch*grid[0]*grid[1], a*b, 2)
    assert torch.equal(windows[0], x[0, :a, :b].flatten(0, 1)) and torch.equal(join_windows(windows, (a, b), x.shape[1:3]), x)


@given(sides, st.integers(2, 5), st.booleans())
@settings(max_examples=25, deadline=None)
def test_attention_equals_a_loop_over_tokens(size, window, shift):
    torch.manual_seed(0)
    block = WindowAttention(4, (window, window), 2, shift).double()
    torch.nn.init.normal_(block.bias_table)
    x = torch.randn(2, *size, 4, dtype=torch.double)
    assert_same(gradients(block, [x], block.parameters()), gradients(lambda z: loop_attention(block, z), [x], block.parameters()), 1e-9)


@pytest.mark.parametrize("size", [(14, 21), (7, 7), (5, 4), (4, 14)])
@pytest.mark.parametrize("shift", [False, True])
def test_block_equals_timm(size, shift):
    torch.manual_seed(0)
    ours = WindowBlock(12, (7, 7), 3, shift).double()
    torch.nn.init.normal_(ours.attention.bias_table)
    peer = timm_block(ours, size)
    x = torch.randn(2, *size, 12, dtype=torch.double)
    weights = [[net.get_submodule(n).weight for n in names] for net, names in ((ours, OURS), (peer, TIMMS))]
    assert_same(gradients(ours, [x], weights[0]), gradients(peer, [x], weights[1]), 1e-9)
    if min(size) >= 7:
        tables = ours.attention.bias_table, peer.attn.relative_position_bias_table
        assert_same(*(gradients(net, [x], [table]) for net, table in zip((ours, peer), tables, strict=True)), 1e-9)


def test_relative_index_and_merging_equal_timm():
    from timm.models.swin_transformer import PatchMerging as Peer
    from timm.models.swin_transformer import get_relative_position_index
    assert torch.equal(relative_position_index((5, 5)), get_relative_position_index(5, 5))
    ours, peer = PatchMerging(6), Peer(6)
    peer.load_state_dict({"norm.weight": ours.norm.weight, "norm.bias": ours.norm.bias, "reduction.weight": ours.reduce.weight})
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(ours(x), peer(x))


def test_expanding_by_hand():
    expand = PatchExpanding(3, 2, 5)
    x = torch.randn(2, 3, 4, 3)
    y = expand(x)
    token = expand.expand(x[1, 2, 3]).view(2, 2, 5)                     # the four children of one token
    for i in range(2):
        for j in range(2): torch.testing.assert_close(y[1, 4+i, 6+j], F.layer_norm(token[i, j], (5,)))


def test_pixels_of_a_token_start_alike():
    model = SwinUNet(1, 3, **SMALL).eval()
    with torch.no_grad(): logits = model(torch.randn(1, 1, 16, 16))
    blocks = F.pixel_unshuffle(logits, 2).view(3, 4, -1)
    torch.testing.assert_close(blocks, blocks[:, :1].expand_as(blocks))
    assert blocks.std(-1).min() > 0


def count_pairs(size, window, shift):
    "How many pairs of tokens meet in every window."
    regions = window_regions(size, window, shift)
    return (regions[:, :, None] == regions[:, None]).sum((1, 2)).tolist()


def test_masks_of_an_8_by_8_map():
    regions = window_regions((8, 8), (4, 4), (2, 2))
    assert regions.shape == (4, 16) and regions.unique().tolist() == [0, 1, 3, 4]
    assert count_pairs((8, 8), (4, 4), (2, 2)) == [256, 128, 128, 64]           # one, two, two and four groups a window
    assert not window_regions((8, 8), (4, 4), (0, 0)).any()
    assert count_pairs((8, 5), (4, 4), (0, 0)) == [256, 16 + 144]*2             # 4 tokens, 12 of padding


@pytest.mark.parametrize("depth, crosses", [(1, False), (2, True)])
def test_information_crosses_windows_only_with_the_shift(depth, crosses):
    torch.manual_seed(0)
    blocks = [WindowBlock(4, (4, 4), 1, bool(i % 2)) for i in range(depth)]
    x = torch.randn(1, 8, 8, 4, requires_grad=True)
    y = x
    for block in blocks: y = block(y)
    seen = torch.autograd.grad(y[0, 1, 3].sum(), x)[0][0].abs().sum(-1) > 0
    assert seen[:4, :4].all() and bool(seen[:4, 4:].any()) == crosses


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(1, 4), st.integers(2, 5), st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_any_size_any_channels(size, channels, classes, batch):
    model = SwinUNet(channels, classes, **SMALL).eval()
    x = torch.randn(batch, channels, *size)
    with torch.no_grad(): out, again = model(x, aux=True), model(x)
    assert out.logits.shape == (batch, classes, *size) and out.logits.isfinite().all() and torch.equal(out.logits, again)
    assert out.losses == {} and list(out.maps) == ["F_1", "F_2"]
    for (name, z), stride, width in zip(out.maps.items(), (4, 2), (16, 8), strict=True):
        assert z.shape == (batch, width, *[-(-s//stride) for s in size]), name


def test_a_sample_does_not_depend_on_its_batch():
    model, x = SwinUNet(1, 3, **SMALL).eval(), torch.randn(3, 1, 20, 26)
    with torch.no_grad(): torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


def test_every_weight_learns():
    model = SwinUNet(2, 3, **SMALL)
    model(torch.randn(2, 2, 24, 32)).square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent, silent


def test_tiny_has_the_published_number_of_parameters():
    assert abs(count_parameters(SwinUNet(3, 9))/27.17e6 - 1) < 0.001


def test_whole_network_from_timms_parts():
    "The same network wired from timm's blocks and merging, with copied weights."
    torch.manual_seed(0)
    model = SwinUNet(1, 3, **{**SMALL, "depths": (2, 2, 2)}).eval()
    x = torch.randn(2, 1, 24, 48)
    def stage(blocks, z):
        for block in blocks: z = timm_block(block, z.shape[1:3]).eval()(z)
        return z
    def expand(part, z):
        B, H, W, _ = z.shape
        z = F.pixel_shuffle(part.expand(z).unflatten(-1, (part.scale**2, -1)).transpose(-1, -2).flatten(3).movedim(-1, 1), part.scale)
        return part.norm(z.movedim(1, -1))
    encoder, skips = model.encoder, []
    with torch.no_grad():
        z = encoder.embed_norm(encoder.embed(x).permute(0, 2, 3, 1))
        for i, blocks in enumerate(encoder.stages):
            if i < 2: skips.append(z)
            z = stage(blocks, z)
            if i < 2: z = encoder.merges[i](z)
        z = encoder.norm(z)
        for level in model.decoder.levels:
            z = stage(level.stage, level.fuse(torch.cat([expand(level.expand, z), skips.pop()], -1)))
        z = F.conv2d(expand(model.decoder.expand, model.decoder.norm(z)).permute(0, 3, 1, 2), model.decoder.head.weight[..., None, None])
        torch.testing.assert_close(model(x), z, rtol=1e-4, atol=1e-5)


def random_scales(model, width=6, classes=3):
    scaling = NetworkScaling(width, model.block_channels, classes)
    for p in scaling.parameters(): torch.nn.init.normal_(p, std=0.5)
    return scaling


def test_scales_of_one_change_nothing_and_others_reach_every_block():
    torch.manual_seed(0)
    model, x = SwinUNet(1, 3, **SMALL).eval(), torch.randn(2, 1, 24, 24)
    Q = torch.randn(3, 6, requires_grad=True)
    assert torch.equal(model(x), model(x, scales=NetworkScaling(6, model.block_channels, 3)(Q)))
    scaling = random_scales(model)
    model(x, scales=scaling(Q)).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in scaling.parameters()) and Q.grad.abs().sum() > 0


def test_a_batch_may_mix_modalities():
    torch.manual_seed(0)
    model, x, Q = SwinUNet(1, 3, **SMALL).eval(), torch.randn(2, 1, 24, 24), torch.randn(2, 3, 6)
    scaling = random_scales(model)
    with torch.no_grad():
        mixed = model(x, scales=scaling(Q))
        for i in range(2): torch.testing.assert_close(mixed[i:i+1], model(x[i:i+1], scales=scaling(Q[i])), rtol=1e-4, atol=1e-5)


def test_fixed_scales_fold_into_the_plain_network():
    torch.manual_seed(0)
    model, x, Q = SwinUNet(1, 3, **SMALL).eval(), torch.randn(2, 1, 24, 24), torch.randn(3, 6)
    scales = random_scales(model)(Q)
    with torch.no_grad():
        before = model(x, scales=scales)
        assert not torch.allclose(before, model(x), atol=1e-3)
        blocks = [m for m in model.modules() if isinstance(m, WindowBlock)]
        for block, (phi_1, phi_2) in zip(blocks, scales, strict=True):
            fold_scale(block.attention.out, phi_1)
            fold_scale(block.mlp[2], phi_2)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_stochastic_depth_sleeps_at_test_time():
    model, z = SwinUNet(1, 2, **{**SMALL, "drop_path": 0.5}), torch.randn(1, 1, 16, 16)
    assert not torch.equal(model.train()(z), model(z)) and torch.equal(model.eval()(z), model(z))


def test_bf16_autocast():
    model, x = SwinUNet(1, 3, **SMALL).eval(), torch.randn(1, 1, 24, 30)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): half = model(x)
    assert (half.float() - model(x)).abs().max() < 0.1*model(x).abs().max()


@pytest.mark.parametrize("changes", [
    dict(heads=(3, 2, 4)), dict(heads=(1, 0, 4)), dict(window=1), dict(window=0), dict(width=0), dict(depths=(2, 0, 2)), dict(depths=()), dict(depths=(2, 2)),
    dict(depths=(2,), heads=(1,)), dict(patch=0), dict(drop_path=1.), dict(classes=1), dict(in_channels=0), dict(mlp_ratio=0)])
def test_settings_that_do_not_fit(changes):
    with pytest.raises(ShapeError): SwinUNet(**{"in_channels": 1, "classes": 3, **SMALL, **changes})


@pytest.mark.parametrize("shape", [(1, 2, 16, 16), (1, 16, 16), (1, 1, 0, 16), (0, 1, 16, 16), (1, 1, 8, 16, 16)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(ShapeError): SwinUNet(1, 3, **SMALL)(torch.zeros(shape))


def test_scales_that_do_not_fit():
    model, x = SwinUNet(1, 3, **SMALL), torch.zeros(2, 1, 16, 16)
    good = [(torch.ones(c), torch.ones(c)) for c in model.block_channels]
    for scales in (good[:-1], [*good, good[0]], [(torch.ones(5), None), *good[1:]], [(torch.ones(3, 8), None), *good[1:]]):
        with pytest.raises(ShapeError): model(x, scales=scales)
