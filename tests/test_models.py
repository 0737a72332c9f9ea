"""Networks: any size in, the same size out; numbers that do not fit are refused before anything is built."""
import hashlib
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.core import CheckpointError, MedsegError, ShapeError
from medseg_nb.models import build_model, list_models, list_settings, load_model, model_dims, save_model

SMALL = dict(widths=(4, 8, 8), dim=16, codebook_size=8, width=16, mlp=32, layers=2, grid=3, decoder_skip_width=4)
OWN = {"swin-unet": dict(width=8, depths=(2, 1, 2), heads=(1, 2, 4), window=3),
       "cmaformer": dict(widths=(4, 8, 8, 8), layers=1, heads=2), "resunet++": dict(widths=(4, 8, 8, 8)),
       "swin-unetr": dict(width=12, depths=(1, 1, 1, 1)), "unetr": dict(width=16, heads=2, features=2, grid=2),
       "nnformer": dict(width=4, heads=(1, 2, 2, 4), windows=(2, 2, 3, 2), patch=(4, 4, 2))}
OWN |= {f"lssc-{d}d": OWN[name] | dict(setting="backbone") for d, name in ((2, "swin-unet"), (3, "nnformer"))}   # tests/test_lssc.py has the others
SIDES = {2: (24, 24), 3: (64, 32, 32)}   # two tokens along an axis at the bottom


def small(name="synergynet-8s2h", **changes):
    "A network that fits in a blink, made small by those settings it takes."
    takes = list_settings(name, "teach")
    return build_model(name, **{**{k: v for k, v in SMALL.items() if k in takes}, **OWN.get(name, {}), "size": "teach", **changes})


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(n, d) for n in list_models() for d in model_dims(n)]), st.integers(1, 4), st.integers(2, 6),
       st.lists(st.integers(5, 33), min_size=3, max_size=3))
@torch.no_grad()
def test_any_size_any_channels(model, channels, classes, sides):
    name, dims = model
    x = torch.randn(1, channels, *sides[:dims])
    model = small(name, in_channels=channels, classes=classes, spatial_dims=dims)
    out = model(x, aux=True)
    assert out.logits.shape == (1, classes, *sides[:dims]) and out.logits.isfinite().all()
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("name", list_models())
def test_every_weight_learns(name):
    model = small(name, classes=3)
    out = model(torch.randn(2, 1, *SIDES[model_dims(name)[0]]), aux=True)
    (out.logits.square().mean() + sum(out.losses.values())).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent, silent


@pytest.mark.parametrize("name", list_models())
def test_other_images_are_refused(name):
    sides = SIDES[model_dims(name)[0]]
    with torch.device("meta"): model = small(name, in_channels=2)
    for shape in ((1, 1, *sides), (1, 2, *sides, 4), (1, 2, 0, *sides[1:])):
        with pytest.raises(ShapeError, match="does not fit the model.*2 channels"): model(torch.zeros(shape, device="meta"))


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


def test_a_model_sees_its_own_kind_of_image():
    for name, dims in (("nnformer", 2), ("swin-unet", 3), ("unet-r50", 4)):
        with pytest.raises(ShapeError, match="--dims"): small(name, spatial_dims=dims)
    with pytest.raises(ShapeError, match="timm"): build_model("unet-r50", spatial_dims=3)
    with pytest.raises(ShapeError, match="its own encoder"): build_model("nnformer", encoder="resnet18")
    with pytest.raises(ShapeError, match="wings"): small("swin-unet", wings=2)
    assert small("nnformer").config["spatial_dims"] == 3


def test_settings_of_another_model_are_refused():
    for wrong in (dict(soft_heads=2), dict(beta=0.5), dict(layers=2), dict(dilate=True)):
        with pytest.raises(ShapeError, match=next(iter(wrong))): build_model("unet-r50", size="teach", **wrong)
    assert build_model("unet-r50", size="teach", encoder="resnet18", stride=32).encoder.strides[-1] == 32


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("size", ("teach", "paper"))
def test_settings_are_listed_and_can_be_said_again(name, size):
    "Saying every listed value gives the same network; the settings of a size may be said of every model."
    said = list_settings(name, size)
    assert not [k for k, v in said.items() if v is inspect.Parameter.empty]
    both = dict(dim=said.get("dim", 64), codebook_size=said.get("codebook_size", 8))
    with torch.device("meta"): nets = [build_model(name, 1, 3, size=size, **s) for s in ({}, said, both)]
    shapes = [[(k, v.shape) for k, v in net.state_dict().items()] for net in nets]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("name, entries", [("synergynet-8s2h", "a34825dd0ae3034cf98539c7f29ab1f8"), ("unet-r50", "a064f9b4d5ef52af083189373691edad")])
def test_names_of_weights_stay(name, entries):
    "Runs that were saved load for good: names and shapes of all weights, in order, as a digest."
    state = build_model(name, 1, 4, size="teach").state_dict()
    assert hashlib.md5(str([(k, tuple(v.shape)) for k, v in state.items()]).encode()).hexdigest() == entries


def test_codebook_of_one_code():
    assert small(codebook_size=1)(torch.randn(1, 1, 16, 16), aux=True).maps["perplexity"] == 1


def test_pretrained_without_a_network_is_an_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants
    import timm.models._hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(timm.models._hub, "has_hf_hub", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(CheckpointError, match="pretrained=False"): build_model("unet-r50", pretrained=True)


@pytest.mark.parametrize("name", ("synergynet-8s2h", "swin-unet", "nnformer"))
def test_saved_loaded_equal_and_no_pickle(tmp_path, name):
    model = small(name, classes=3).eval(); save_model(model, tmp_path)
    x = torch.randn(1, 1, *SIDES[model_dims(name)[0]])
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
