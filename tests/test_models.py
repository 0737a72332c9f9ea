"""Networks: any size in, the same size out; numbers that do not fit are refused before anything is built."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.core import CheckpointError, MedsegError, ShapeError
from medseg_nb.models import build_model, list_models, load_model, save_model

SMALL = dict(size="teach", widths=(4, 8, 8), dim=16, codebook_size=8)


def small(name="synergynet-8s2h", **changes):
    "A network that fits in a blink; the UNet takes no bottleneck settings."
    settings_ = {**SMALL, **changes}
    if name.startswith("unet"): settings_ = {k: v for k, v in settings_.items() if k not in ("dim", "codebook_size")}
    return build_model(name, **settings_)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(list_models()), st.integers(2, 3), st.integers(1, 4), st.integers(2, 6), st.lists(st.integers(5, 33), min_size=3, max_size=3))
def test_any_size_any_channels(name, dims, channels, classes, sides):
    x = torch.randn(1, channels, *sides[:dims])
    model = small(name, in_channels=channels, classes=classes, spatial_dims=dims)
    out = model(x, aux=True)
    assert out.logits.shape == (1, classes, *sides[:dims]) and out.logits.isfinite().all()
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("name", [n for n in list_models() if n.startswith("synergynet")])
def test_every_weight_learns(name):
    model = small(name, classes=3)
    out = model(torch.randn(2, 1, 24, 24), aux=True)
    (out.logits.square().mean() + sum(out.losses.values())).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent, silent


@pytest.mark.parametrize("stride", (16, 32))
@pytest.mark.parametrize("encoder", ("resnet18", "resnet34", "resnet50", "resnet101", "efficientnet_b0", "efficientnet_b7"))
def test_the_six_encoders(encoder, stride):
    model = build_model("synergynet-2s2h", classes=2, encoder=encoder, stride=stride, dim=16, codebook_size=8).eval()
    with torch.inference_mode(): out = model(torch.randn(1, 1, 70, 64), aux=True)
    assert out.logits.shape == (1, 2, 70, 64) and out.maps["codes"].shape[1:] == ((5, 4) if stride == 16 else (3, 2))


@pytest.mark.parametrize("changes", [
    dict(dim=20), dict(codebook_size=0), dict(soft_heads=3), dict(hard_heads=5), dict(in_channels=0), dict(classes=1), dict(spatial_dims=4), dict(nonsense=1)])
def test_numbers_that_do_not_fit(changes):
    with pytest.raises(ShapeError): small(**changes)


def test_codebook_of_one_code():
    assert small(codebook_size=1)(torch.randn(1, 1, 16, 16), aux=True).maps["perplexity"] == 1


def test_pretrained_without_a_network_is_an_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants
    import timm.models._hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(timm.models._hub, "has_hf_hub", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(CheckpointError, match="pretrained=False"): build_model("unet-r50", pretrained=True)


def test_saved_loaded_equal_and_no_pickle(tmp_path):
    model = small(classes=3).eval(); save_model(model, tmp_path)
    x = torch.randn(1, 1, 20, 20)
    with torch.inference_mode(): assert torch.equal(model(x), load_model(tmp_path)(x))
    assert b"pickle" not in (tmp_path/"model.safetensors").read_bytes()[:4096] and not list(tmp_path.glob("*.pt"))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_cut_weights_are_refused(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("m"); save_model(small(classes=3), folder)
    whole = (folder/"model.safetensors").read_bytes(); (folder/"model.safetensors").write_bytes(whole[:min(cut, len(whole) - 1)])
    with pytest.raises(CheckpointError): load_model(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": 3}', '{"model": {"name": "unet-r50", "wings": 2}}', '{"model": {"name": "no-such"}}'])
def test_wrong_config_is_refused(tmp_path, text):
    save_model(small(classes=3), tmp_path); (tmp_path/"config.json").write_text(text)
    with pytest.raises(MedsegError): load_model(tmp_path)
