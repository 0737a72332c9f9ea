"LSSC: every setting has the parts it says, learns with all of them, and exports to a plain network with the same logits."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.core import CheckpointError, MedsegError, ShapeError
from medseg_nb.losses import consistency_losses, structured_losses
from medseg_nb.models import build_model, load_model, save_model
from medseg_nb.models.lssc import LSSC2D, LSSC3D, SETTINGS, ImageEmbedding, OneModality
from medseg_nb.models.nnformer import NNFormer
from medseg_nb.models.swin_unet import SwinUNet
from medseg_nb.models.zoo import count_macs, count_parameters

SWIN = dict(width=8, depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), window=3, patch=2, drop_path=0., init_std=None)
VOLUME = dict(width=8, depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), windows=(2, 2, 2, 2), patch=(2, 2, 1), drop_path=0.)
KINDS = {2: (LSSC2D, SWIN, (32, 32)), 3: (LSSC3D, VOLUME, (32, 32, 16))}
JOINT = [name for name, setting in SETTINGS.items() if setting.joint]


def small(dims=2, setting="ours", classes=3, **changes):
    "A model of a few thousand numbers, away from its start, in eval mode."
    torch.manual_seed(0)
    network, sizes, _ = KINDS[dims]
    model = network(1, classes, setting, **{**sizes, **changes}).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1*torch.randn_like(p))
    return model


def batch(model, dims=2, classes=3):
    "Images and labels for every modality, of different batch sizes."
    sides = KINDS[dims][2]
    x = {m: torch.randn(1 + k % 2, 1, *sides) for k, m in enumerate(model.modalities)}
    return x, {m: torch.randint(0, classes, (len(v), *sides)) for m, v in x.items()}


def losses(model, x, y):
    s = model.setting
    return structured_losses(model(x, aux=True), y, auxiliary=s.auxiliary, mcr=s.mcr, icr=s.icr)


@pytest.mark.parametrize("dims", (2, 3))
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_trainable_number_learns(setting, dims):
    "No parameter of any setting waits for a gradient that never comes."
    model = small(dims, setting).train()
    terms = losses(model, *batch(model, dims))
    terms["total"].backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert not silent, silent
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert all(n.endswith("kernel") for n in frozen) and bool(frozen) == (model.setting.auxiliary and not model.setting.icr)
    asked = {"seg", *(["aux"] if model.setting.auxiliary else []), *(["mcr"] if model.setting.mcr else []), *(["icr"] if model.setting.icr else [])}
    assert {name.split()[0] for name in terms} == asked | {"total"}


@pytest.mark.parametrize("dims", (2, 3))
@pytest.mark.parametrize("setting", SETTINGS)
def test_export_gives_the_same_logits_without_the_equipment(setting, dims):
    model = small(dims, setting)
    x, plain = torch.randn(2, 1, *KINDS[dims][2]), model.export()
    for m in model.modalities: assert torch.equal(plain(x, m), model(x, m))
    kept = set(plain.state_dict())
    assert not [k for k in kept if any(word in k for word in ("class_embeddings", "paths", "attentions", "w1", "W2"))]
    assert not plain.training and any(k.startswith("scaling") for k in kept) == model.setting.scaling
    assert set(plain(x, plain.modalities[0], aux=True).maps) == {"F_1", "F_2", "F_3"}
    if model.setting.scaling: assert (plain(x, "ct") - plain(x, "mr")).abs().max() > 1e-4


@pytest.mark.parametrize("name, setting", [("lssc-2d", "ours"), ("lssc-2d", "joint-v1"), ("lssc-2d", "baseline"), ("lssc-3d", "joint-v3")])
def test_both_kinds_are_saved_and_loaded(tmp_path, name, setting):
    dims = int(name[-2])
    names = ("image",) if not SETTINGS[setting].joint else ("t1", "t2", "ct")
    model = build_model(name, 1, 3, size="teach", setting=setting, modalities=names, **KINDS[dims][1]).eval()
    x = torch.randn(1, 1, *KINDS[dims][2])
    for folder, net in (("whole", model), ("plain", model.export())):
        save_model(net, tmp_path/folder)
        loaded = load_model(tmp_path/folder)
        assert loaded.exported == (folder == "plain") and loaded.modalities == names
        for m in names: assert torch.equal(loaded(x, modality=m), model(x, m))
    (tmp_path/"plain"/"model.safetensors").write_bytes((tmp_path/"whole"/"model.safetensors").read_bytes())
    with pytest.raises(CheckpointError): load_model(tmp_path/"plain")


def test_settings_hold_what_the_paper_says():
    assert list(SETTINGS) == ["backbone", "baseline", "joint-v1", "joint-v2", "joint-v3", "joint-v1-cr", "joint-v2-cr", "ours", "v3-mcr", "v3-icr"]
    v1, v2, v3 = (small(setting=f"joint-v{k}") for k in (1, 2, 3))
    encoder = sum(p.numel() for p in v2.network.encoder.parameters())
    count = [sum(p.numel() for p in m.parameters()) for m in (v1, v2, v3)]
    assert count[0] - count[1] == encoder and count[2] - count[1] == sum(p.numel() for p in v3.scaling.parameters())
    for plain, net in ((small(setting="backbone"), SwinUNet(1, 3, **SWIN)), (small(3, "backbone"), NNFormer(1, 3, deep_supervision=False, **VOLUME))):
        assert {k.removeprefix("network."): v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_v2_and_v3_start_from_the_same_function():
    "Scales of one and embeddings of identity: before training both contrasts see the plain backbone."
    torch.manual_seed(0)
    model, x = LSSC2D(1, 3, "ours", **SWIN).eval(), torch.randn(2, 1, 32, 32)
    for m in model.modalities: torch.testing.assert_close(model(x, m), model.network(x))


@pytest.mark.parametrize("dims", (2, 3))
def test_maps_of_every_scale(dims):
    model = small(dims, classes=4)
    x, _ = batch(model, dims)
    out = model(x, aux=True)
    for m, o in out.items():
        F = [o.maps[f"F_{k}"] for k in (1, 2, 3)]
        assert [f.shape[1] for f in F] == [32, 16, 8] and o.maps["Q"].shape == (4, 32)
        for k, f in enumerate(F, 1):
            assert o.maps[f"A_{k}"].shape == (len(f), 4, 4, *f.shape[2:]) and o.maps[f"E_{k}"].shape == (len(f), 4, 4)
            assert o.maps[f"aux_{k}"].shape == (len(f), 4, *f.shape[2:])
        torch.testing.assert_close(model(x[m], m), o.logits)


def test_modalities_do_not_touch_each_other():
    "The segmentation of one modality moves shared parts and its own, nothing of the other's."
    model = small().train()
    x, y = batch(model)
    structured_losses({"ct": model(x["ct"], "ct", aux=True)}, {"ct": y["ct"]}, mcr=False, icr=False)["total"].backward()
    for parts in (model.embeddings, model.paths):
        assert all(p.grad is None for p in parts[1].parameters()) and any(p.grad is not None for p in parts[0].parameters())
    assert model.class_embeddings[0].grad.abs().sum() > 0 and model.class_embeddings[1].grad is None


def test_image_consistency_reaches_the_shared_weights_from_both():
    model = small()
    x, _ = batch(model)
    consistency_losses(model(x, aux=True), mcr=False)["icr"].backward()
    assert all(p.grad.abs().sum() > 0 for p in (model.network.encoder.embed.weight, model.embeddings[0][0].weight, model.embeddings[1][0].weight))


def test_three_modalities():
    model = small(modalities=["t1", "t2", "ct"], setting="joint-v1-cr").train()
    terms = losses(model, *batch(model))
    assert len(terms) == 9 and terms["total"].isfinite() and model.export()(torch.randn(1, 1, 20, 20), "ct").shape == (1, 3, 20, 20)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(3, 37), min_size=2, max_size=2), st.sampled_from(JOINT))
def test_any_size(sides, setting):
    model = small(setting=setting)
    out = model(torch.randn(1, 1, *sides), "mr", aux=True)
    assert out.logits.shape == (1, 3, *sides) and all(m.isfinite().all() for m in out.maps.values())


def test_embeddings_start_as_the_identity():
    for dims in (2, 3):
        x = torch.randn(2, 3, *(5, 4, 3)[:dims])
        assert torch.equal(ImageEmbedding(3, dims)(x), x)


@pytest.mark.parametrize("dims", (2, 3))
def test_costs_are_counted(dims):
    model = small(dims)
    plain, shape = model.export(), (1, 1, *KINDS[dims][2])
    assert count_macs(model, shape) >= count_macs(plain, shape) > 0 and count_parameters(plain) < count_parameters(model)


def test_exporting_changes_nothing():
    model = small()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    model.export().network.decoder.head.weight.data.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(torch.get_rng_state(), state)
    assert model.double().export()(torch.randn(1, 1, 9, 9, dtype=torch.double), "ct").dtype == torch.double


@pytest.mark.parametrize("changes, word", [
    (dict(setting="joint-v4"), "joint-v3"), (dict(modalities=("ct",)), "two or more"), (dict(modalities=()), "two or more"),
    (dict(setting="baseline", modalities=()), "no modality"), (dict(modalities=("ct", "ct")), "different"), (dict(modalities="ct"), "list"),
    (dict(modalities=("ct", "")), "list"), (dict(modalities=(1, 2)), "list"), (dict(classes=1), "classes"), (dict(attention_heads=3), "heads"),
    (dict(attention_heads=0), "heads")])
def test_requests_that_do_not_fit(changes, word):
    with pytest.raises(ShapeError, match=word): LSSC2D(1, **{"classes": 3, **SWIN, **changes})


@pytest.mark.parametrize("setting", ["backbone", "baseline"])
def test_single_settings_are_a_network_a_modality(setting):
    "Nothing one modality learns from moves the other's network; the first is what it would be alone."
    both = small(setting=setting, modalities=("ct", "mr")).train()
    x = torch.randn(1, 1, 16, 16)
    both(x, "mr").sum().backward()
    assert all(p.grad is None for p in both.network.parameters()) and all(p.grad is not None for p in both.others.parameters())
    assert not torch.equal(both(x, "mr"), both(x, "ct"))
    alone = small(setting=setting)
    alone.network.load_state_dict(both.network.state_dict())
    torch.testing.assert_close(alone(x), both.eval()(x, "ct"))


def test_one_modality_is_a_plain_network():
    model = small()
    view, x = OneModality(model, "mr"), torch.randn(1, 1, 16, 16)
    assert torch.equal(view(x), model(x, "mr")) and torch.equal(view(x, aux=True).logits, view(x))
    with pytest.raises(ShapeError, match="pet"): OneModality(model, "pet")


def test_images_and_names_that_do_not_fit():
    model = small()
    x = torch.randn(1, 1, 16, 16)
    for bad, word in ((dict(), "which modality"), (dict(modality="pet"), "'pet'")):
        with pytest.raises(ShapeError, match=word): model(x, **bad)
        with pytest.raises(ShapeError, match=word): model.export()(x, **bad)
    for shape in ((1, 2, 16, 16), (1, 1, 16), (1, 1, 16, 16, 16), (1, 1, 0, 16), (0, 1, 16, 16)):
        with pytest.raises(ShapeError, match="image does not fit"): model(torch.zeros(shape), "ct")
    single = small(setting="baseline")
    assert torch.equal(single(x), single(x, "image"))
    with pytest.raises(ShapeError, match="built for"): single(x, "ct")
    with pytest.raises(ShapeError, match="does not take wings"): build_model("lssc-2d", size="teach", wings=2)


def test_losses_that_cannot_be_had():
    model, plain = small(), small(setting="backbone")
    x, y = batch(model)
    for broken in (lambda: structured_losses(model(x, aux=True), {"ct": y["ct"]}), lambda: structured_losses({}, {}),
                   lambda: consistency_losses({"ct": model(x["ct"], "ct", aux=True)}), lambda: consistency_losses(model.export()(x, aux=True)),
                   lambda: structured_losses({"image": plain(x["ct"], aux=True)}, {"image": y["ct"]}, mcr=False, icr=False),
                   lambda: structured_losses(model(x, aux=True), {m: v[..., :-1] for m, v in y.items()}, auxiliary=False),
                   lambda: structured_losses(model(x, aux=True), y, tau=0)):
        with pytest.raises(MedsegError): broken()


def test_a_few_steps_bring_the_embeddings_together():
    model = small().train()
    x, y = batch(model)
    optimiser, history = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3), []
    for _ in range(12):
        terms = losses(model, x, y)
        optimiser.zero_grad(); terms["total"].backward(); optimiser.step()
        history.append({k: float(v.detach()) for k, v in terms.items()})
    assert all(history[-1][k] < history[0][k] for k in ("total", "mcr", "aux ct", "aux mr"))
