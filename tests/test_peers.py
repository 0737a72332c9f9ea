"""The networks the papers compare with: against independent implementations, official sizes, and numbers that do not fit."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medseg_nb.core import CheckpointError, ShapeError
from medseg_nb.losses.segmentation import BCEDice
from medseg_nb.models import build_model
from medseg_nb.models.encoder_decoder import ResidualEncoder, conv_layer
from medseg_nb.models.peers import (
    ASPP,
    AttentionDecoder,
    AttentionGate,
    CascadedUpsampler,
    DeepLabDecoder,
    Transformer,
    TransformerLayer,
    TransVQBottleneck,
    ViTBottleneck,
    VQBottleneck,
    resample_positions,
)
from medseg_nb.models.zoo import count_parameters

PEERS = ("attunet-r50", "deeplabv3plus-r50", "r50-vit", "transunet", "vqunet", "transvqunet-2s2h", "transvqunet-8s2h")


def same_gradients(ours, theirs, inputs, ours_parts, theirs_parts):
    "Values, and gradients of inputs and of weights pair by pair, agree."
    torch.testing.assert_close(ours, theirs)
    probe = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, [*inputs, *ours_parts], probe), torch.autograd.grad(theirs, [*inputs, *theirs_parts], probe), strict=True):
        torch.testing.assert_close(a, b)


# ---- attention gate

def test_gate_by_hand():
    "One channel: W_x = 1, W_g = -1, b_g = 0.5, psi = 2, b_psi = -1 on x = 1, g = 0.5: relu(1) = 1, sigmoid(1)."
    gate = AttentionGate(1, 1, width=1)
    with torch.no_grad():
        for p, v in ((gate.skip.weight, 1), (gate.gate.weight, -1), (gate.gate.bias, 0.5), (gate.psi.weight, 2), (gate.psi.bias, -1)): p.fill_(v)
    alpha = gate.weights(torch.ones(1, 1, 2, 2), torch.full((1, 1, 1, 1), 0.5))
    torch.testing.assert_close(alpha, torch.full((1, 1, 2, 2), 1/(1 + torch.e**-1)))


@pytest.mark.parametrize("dims", (1, 2, 3))
def test_gate_is_monais(dims):
    from monai.networks.nets.attentionunet import AttentionBlock
    ours, theirs = AttentionGate(6, 10, dims, width=3).double(), AttentionBlock(dims, 3, 10, 6).double()
    for layer in (theirs.W_g, theirs.W_x, theirs.psi): layer[1] = nn.Identity()          # batch normalisation: Oktay et al. have none
    with torch.no_grad(): theirs.W_x[0].conv.bias.zero_()                                # nor a bias here
    pairs = [(ours.skip.weight, theirs.W_x[0].conv.weight), (ours.gate.weight, theirs.W_g[0].conv.weight), (ours.gate.bias, theirs.W_g[0].conv.bias),
             (ours.psi.weight, theirs.psi[0].conv.weight), (ours.psi.bias, theirs.psi[0].conv.bias)]
    with torch.no_grad():
        for a, b in pairs: b.copy_(a)
    x, g = torch.randn(2, 6, *(8,)*dims, dtype=torch.double, requires_grad=True), torch.randn(2, 10, *(4,)*dims, dtype=torch.double, requires_grad=True)
    up = F.interpolate(g, size=x.shape[2:], mode=("linear", "bilinear", "trilinear")[dims-1])     # ours enlarges after its 1-wide convolution
    same_gradients(ours(x, g), theirs(g=up, x=x), (x, g), *zip(*pairs, strict=True))


def test_gate_that_is_open_is_a_unet():
    "With alpha = 1 the attention U-Net computes what the U-Net computes."
    torch.manual_seed(0); gated = build_model("attunet-r50", 1, 3, size="teach", widths=(4, 8, 8)).eval()
    plain = build_model("unet-r50", 1, 3, size="teach", widths=(4, 8, 8)).eval()
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if ".gate." not in k})
    for level in gated.decoder.levels: nn.init.constant_(level.gate.psi.bias, 100)
    x = torch.randn(1, 1, 24, 24)
    with torch.inference_mode(): torch.testing.assert_close(gated(x), plain(x))


# ---- transformer

@pytest.mark.parametrize("heads", (1, 2, 4))
def test_layer_is_pytorchs(heads):
    ours = TransformerLayer(8, heads, 20).double()
    theirs = nn.TransformerEncoderLayer(8, heads, 20, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True).double()
    renamed = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}
    names = {k: next((k.replace(a, b) for a, b in renamed.items() if a in k), k) for k in ours.state_dict()}
    theirs.load_state_dict({b: ours.state_dict()[a] for a, b in names.items()})
    x = torch.randn(2, 7, 8, dtype=torch.double, requires_grad=True)
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    same_gradients(ours(x), theirs(x), (x,), [mine[a] for a in names], [other[b] for b in names.values()])


def test_layer_is_timms_weight_for_weight():
    from timm.models.vision_transformer import Block
    ours, theirs = TransformerLayer(12, 3, 24).double(), Block(12, 3, mlp_ratio=2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 12, dtype=torch.double, requires_grad=True)
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    same_gradients(ours(x), theirs(x), (x,), mine.values(), [other[k] for k in mine])


def test_transformer_without_positions_does_not_see_order():
    "Tokens permuted in, tokens permuted out; with positions not."
    net, z, order = Transformer(8, 2, 2, 16, grid=4).eval(), torch.randn(1, 8, 4, 4), torch.randperm(16)
    shuffle = lambda m: m.flatten(2)[:, :, order].reshape(m.shape)
    with torch.inference_mode():
        assert (net(shuffle(z)) - shuffle(net(z))).abs().max() > 1e-4
        net.positions.zero_()
        torch.testing.assert_close(net(shuffle(z)), shuffle(net(z)))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_positions_on_any_grid(dims, grid, sides):
    "The right shape, the same grid untouched, a constant stays one, nothing leaves the range it had."
    positions, size = torch.randn(1, 4, *(grid,)*dims), sides[:dims]
    there = resample_positions(positions, size)
    assert there.shape == (1, 4, *size) and torch.equal(resample_positions(positions, (grid,)*dims), positions)
    assert there.amax() <= positions.amax() + 1e-5 and there.amin() >= positions.amin() - 1e-5
    torch.testing.assert_close(resample_positions(torch.full_like(positions, 3), size), torch.full_like(there, 3))


# ---- ASPP

@pytest.mark.parametrize("dims", (1, 2, 3))
def test_aspp_branch_by_loops(dims):
    "A tap every `rate` tokens, zeros outside, each channel by itself: the separable branch before its 1-wide convolution."
    each = ASPP(2, 3, rates=(2,), spatial_dims=dims, norm="instance").branches[1][0].double()
    z, side = torch.randn(1, 2, *(5,)*dims, dtype=torch.double), range(5)
    expected, at = torch.zeros_like(z), lambda *i: torch.cartesian_prod(*[torch.tensor(i)]*dims).reshape(-1, dims).tolist()
    for c in range(2):
        for p in at(*side):
            for tap in at(-1, 0, 1):
                q = [a + 2*t for a, t in zip(p, tap, strict=True)]
                if all(v in side for v in q): expected[(0, c, *p)] += each.weight[(c, 0, *[t + 1 for t in tap])] * z[(0, c, *q)]
    torch.testing.assert_close(each(z), expected)


def test_aspp_is_smps():
    "segmentation-models-pytorch's pyramid and decoder with our weights: values and gradients."
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import ASPP as TheirASPP
    ours, theirs = ASPP(6, 4, rates=(1, 2, 3), dropout=0.0).double(), TheirASPP(6, 4, (1, 2, 3), separable=True, dropout=0.0).double()
    theirs.convs[4][2] = nn.Identity()                                               # ours has a bias there instead of batch normalisation
    theirs.convs[4][1] = nn.Conv2d(6, 4, 1).double()
    for m in theirs.modules():
        for key, child in m.named_children():
            if isinstance(child, nn.ReLU): setattr(m, key, nn.LeakyReLU(0.01))
    ours_list, theirs_list = [*ours.branches.parameters(), *ours.whole.parameters(), *ours.project[0].parameters()], list(theirs.parameters())
    assert [p.shape for p in ours_list] == [p.shape for p in theirs_list]
    with torch.no_grad():
        for a, b in zip(ours_list, theirs_list, strict=True): b.copy_(a)
    ours.project = ours.project[:2]                                                  # what smp's class holds
    z = torch.randn(2, 6, 7, 8, dtype=torch.double, requires_grad=True)
    same_gradients(ours(z).z, theirs(z), (z,), ours_list, theirs_list)


@pytest.mark.parametrize("dims", (2, 3))
@pytest.mark.parametrize("side", (1, 9))
def test_pooled_branch_survives_one_image(dims, side):
    "One image of a few pixels, in training mode: no statistics are taken over a single vector."
    model = build_model("deeplabv3plus-r50", 1, 2, size="teach", widths=(4, 8, 8), dim=8, spatial_dims=dims).train()
    model(torch.randn(1, 1, *(side,)*dims)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert build_model("deeplabv3plus-r50", 3, 2, encoder="resnet18").train()(torch.randn(1, 3, 20, 20)).isfinite().all()


# ---- official sizes

def test_deeplab_has_the_parameters_of_smp():
    import segmentation_models_pytorch as smp
    with torch.device("meta"): ours = build_model("deeplabv3plus-r50", in_channels=3, classes=9)
    theirs = smp.DeepLabV3Plus("resnet50", encoder_weights=None, in_channels=3, classes=9)
    assert count_parameters(ours) - count_parameters(theirs) == -256   # a bias of 256 in place of the pooled branch's 2 x 256 of batch normalisation


def test_transunet_has_the_official_parameters():
    "105.28 M with 9 classes; the head is 1-wide here, 3-wide there: 16 * 9 * 8 fewer. The rest is the same."
    with torch.device("meta"): model = build_model("transunet", in_channels=3, classes=9)
    assert abs(count_parameters(model)/105.28e6 - 1) < 0.001
    resnet, vit, decoder = model.encoder, model.bottleneck, model.decoder
    assert count_parameters(resnet) == 11_894_848                                                                        # ResNetV2 (3,4,9)
    assert count_parameters(vit.transformer.layers) + count_parameters(vit.transformer.norm) == 12*7_087_872 + 2*768     # ViT-B/16
    assert count_parameters(decoder) == sum(9*(i + s)*o + 9*o*o + 4*o for i, s, o in ((512, 512, 256), (256, 256, 128), (128, 64, 64), (64, 0, 16))) + 16*9 + 9


def test_hybrid_is_timms():
    "Encoder and transformer with timm's weights compute what timm's hybrid computes, up to its class token."
    import timm

    from medseg_nb.models.peers import HybridEncoder
    vit = timm.create_model("vit_base_r50_s16_224", num_classes=0, depth=1, class_token=False, pos_embed="learn", global_pool="avg", fc_norm=False)
    encoder, slot = HybridEncoder().eval(), ViTBottleneck(1024, layers=1).eval()
    encoder.body.load_state_dict(vit.patch_embed.backbone.state_dict()); slot.copy_vit(vit)
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        features = encoder(x)
        ours = slot.transformer(slot.embed(features[-1]))
        torch.testing.assert_close(ours.flatten(2).mT, vit.eval().forward_features(x), rtol=1e-4, atol=1e-4)
    assert [tuple(f.shape[1:]) for f in features] == [(64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14)]


def test_weights_that_cannot_be_had(monkeypatch):
    import timm
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(CheckpointError, match="pretrained=False"): build_model("transunet", pretrained=True)


# ---- skips and codes

@pytest.mark.parametrize("decoder, reads", [(CascadedUpsampler, ()), (AttentionDecoder, (0, 1)), (DeepLabDecoder, (1,))])
def test_which_skips_a_decoder_reads(decoder, reads):
    encoder = ResidualEncoder(1, (4, 6, 8), first_stride=2)
    features = [torch.randn(1, c, 16//2**i, 16//2**i, requires_grad=True) for i, c in enumerate((4, 6, 8))]
    out = decoder(encoder, 8, 2, norm="instance")(features[-1], features, (32, 32))
    out.square().sum().backward()
    assert out.shape == (1, 2, 32, 32)
    assert [i for i, f in enumerate(features[:-1]) if f.grad is not None and f.grad.abs().sum() > 0] == list(reads)


@pytest.mark.parametrize("bottleneck", (VQBottleneck, TransVQBottleneck))
def test_only_codes_pass_the_quantizer(bottleneck):
    "Two maps with the same codes give the same output: nothing continuous goes round the quantizer."
    small = dict(layers=1, mlp=8, soft_heads=2, hard_heads=2) if bottleneck is TransVQBottleneck else {}
    slot = bottleneck(3, 8, 2, norm="instance", **small).eval()
    z = torch.randn(1, 3, 6, 6)
    with torch.inference_mode(): a, b = slot(z), slot(z + 1e-4*torch.randn_like(z))
    assert torch.equal(a.maps["codes"], b.maps["codes"]) and not torch.equal(a.maps["continuous"], b.maps["continuous"])
    assert torch.equal(a.z, b.z) and a.losses["quantization"].shape == ()


# ---- all of them

@pytest.mark.parametrize("name", PEERS)
def test_trains(name):
    "Forty steps on one picture bring the loss well down: a bright square on noise."
    torch.manual_seed(0)
    y = torch.zeros(2, 32, 32, dtype=torch.long); y[:, 8:24, 8:20] = 1
    x, loss = 0.3*torch.randn(2, 1, 32, 32) + y[:, None], BCEDice()
    model = build_model(name, 1, 2, size="teach", widths=(8, 16, 16), dim=16)
    optimiser, seen = torch.optim.AdamW(model.parameters(), 5e-3), []
    for _ in range(40):
        out = model(x, aux=True); part = loss(out.logits, y); seen.append(float(part.detach()))
        optimiser.zero_grad(); (part + sum(out.losses.values())).backward(); optimiser.step()
    assert seen[-1] < 0.6*seen[0], seen


@pytest.mark.parametrize("name, changes", [
    ("transunet", dict(heads=5)), ("transunet", dict(heads=0)), ("transunet", dict(layers=0)), ("transunet", dict(grid=0)), ("transunet", dict(mlp=0)),
    ("transvqunet-8s2h", dict(dim=20)), ("transvqunet-2s2h", dict(hard_heads=3)), ("transvqunet-2s2h", dict(soft_heads=0)), ("vqunet", dict(codebook_size=0)),
    ("vqunet", dict(soft_heads=2)), ("deeplabv3plus-r50", dict(rates=())), ("deeplabv3plus-r50", dict(rates=(0, 2))), ("deeplabv3plus-r50", dict(widths=(8,))),
    ("deeplabv3plus-r50", dict(decoder_widths=(8, 8))), ("r50-vit", dict(soft_heads=8)), ("attunet-r50", dict(rates=(2,))), ("transunet", dict(nonsense=1)),
    ("transunet", dict(size="paper", spatial_dims=3)), ("transunet", dict(encoder="resnet1800"))])
def test_numbers_that_do_not_fit(name, changes):
    with pytest.raises(ShapeError): build_model(name, **{"size": "teach", **changes})


def test_convolutions_of_four_dimensions_are_refused():
    with pytest.raises(ShapeError): AttentionGate(2, 2, dims=4)
    with pytest.raises(ShapeError): conv_layer(0)
