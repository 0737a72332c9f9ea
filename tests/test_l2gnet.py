"L2GNet's bottleneck: its parts in order, any size, every weight learns, numbers that do not fit."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.core import MedsegError
from medseg_nb.models import EncoderDecoder, L2GBottleneck
from medseg_nb.models.encoder_decoder import ResidualEncoder, TimmEncoder, UNetDecoder

SMALL = dict(dim=16, codebook_size=8, references=64, heads=2, anchors=6)


def small(in_channels=1, classes=2, spatial_dims=2, **changes):
    "A network that fits in a blink."
    encoder = ResidualEncoder(in_channels, (4, 8, 8), spatial_dims, first_stride=2)
    slot = L2GBottleneck(8, spatial_dims=spatial_dims, norm="instance", **{**SMALL, **changes})
    return EncoderDecoder(encoder, slot, UNetDecoder(encoder, 16, classes, norm="instance", blocks=1))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([dict(), dict(unpool="grid"), dict(position="index"), dict(kernel="linear"), dict(codebook_size=0), dict(position=None, references=7)]),
       st.integers(2, 3), st.integers(1, 3), st.integers(2, 5), st.lists(st.integers(5, 33), min_size=3, max_size=3))
def test_any_size_any_channels(changes, dims, channels, classes, sides):
    model, x = small(channels, classes, dims, **changes), torch.randn(1, channels, *sides[:dims])
    out = model(x, aux=True)
    assert out.logits.shape == (1, classes, *sides[:dims]) and out.logits.isfinite().all()
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("changes", [dict(), dict(unpool="grid"), dict(kernel="linear"), dict(codebook_size=0), dict(position="index")])
def test_every_weight_learns(changes):
    model = small(**changes)
    out = model(torch.randn(2, 1, 24, 24), aux=True)
    (out.logits.square().mean() + sum(out.losses.values())).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent, silent
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_parts_in_their_order():
    torch.manual_seed(0)
    b, z = L2GBottleneck(6, **SMALL).eval(), torch.randn(2, 6, 5, 4)
    slot = b(z)
    z_con = b.pre(z)
    rows, codebook = z_con.movedim(1, -1), b.quantizer.codebook
    codes = torch.cdist(rows.flatten(0, 2), codebook).argmin(1)
    z_dis = codebook[codes].view_as(rows).movedim(-1, 1)
    torch.testing.assert_close(slot.z, b.post(b.mapper(z_dis)))
    torch.testing.assert_close(slot.losses["quantization"], 2*F.mse_loss(z_dis, z_con))
    torch.testing.assert_close(slot.maps["plan"], b.mapper.plan(z_dis))
    assert torch.equal(slot.maps["codes"].flatten(), codes) and slot.maps["plan"].shape == (2, 2, 20, 64)
    assert {"continuous", "discrete", "codes", "plan", "perplexity", "usage"} <= slot.maps.keys()


def test_without_a_codebook_nothing_is_quantized():
    b, z = L2GBottleneck(6, **{**SMALL, "codebook_size": 0}).eval(), torch.randn(2, 6, 5, 4)
    slot = b(z)
    assert slot.losses == {} and not {"codes", "perplexity", "usage"} & slot.maps.keys()
    torch.testing.assert_close(slot.z, b.post(b.mapper(b.pre(z))))


def test_on_resnet50_at_the_papers_width():
    encoder = TimmEncoder("resnet50", in_channels=1)
    slot = L2GBottleneck(encoder.channels[-1])
    model = EncoderDecoder(encoder, slot, UNetDecoder(encoder, slot.out_channels, 9)).eval()
    with torch.inference_mode(): out = model(torch.randn(1, 1, 64, 80), aux=True)
    assert out.logits.shape == (1, 9, 64, 80) and out.maps["plan"].shape == (1, 4, 20, 64) and out.maps["discrete"].shape == (1, 512, 4, 5)


@pytest.mark.parametrize("changes", [
    dict(dim=0), dict(codebook_size=-1), dict(references=0), dict(heads=0), dict(anchors=0), dict(alpha=0), dict(eps=0), dict(n_iters=0), dict(references=12),
    dict(references=16, spatial_dims=3), dict(spatial_dims=4), dict(kernel="cubic"), dict(unpool="up"), dict(position="here"), dict(beta=-1)])
def test_numbers_that_do_not_fit(changes):
    with pytest.raises(MedsegError): L2GBottleneck(8, **{**SMALL, **changes})
