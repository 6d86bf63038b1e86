"""The ESPnet adapter on ESPnet's own encoders, decoder, adapter table and loader of pretrained weights."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from bounds import assert_within
from espnet_checkpoints import effective
from espnet_models import FEATURES, FRAMES, asr_model, batch, create_adapter, encoder, init_param, outputs, trained_part
from models import references
from plain import effective as in_plain_pytorch
from refusals import refused
from roundtrip import train_randomly
from torch import nn

import ssvd_kernels as sk
from ssvd_kernels.integrations import espnet as integration

KINDS = ["e_branchformer", "transformer"]
CONF = {"rotation_ratio": 0.5, "rotation_map": "cayley", "target_modules": ["attn.linear_q", "feed_forward.w_2"]}


@pytest.fixture
def base(tmp_path):
    """Pretrained weights in a file, and the model that holds them."""

    def make(kind: str = "e_branchformer"):
        torch.manual_seed(3)
        model = asr_model(kind)
        torch.save(model.state_dict(), tmp_path / "base.pth")
        return tmp_path / "base.pth", model

    return make


def adapted(kind: str = "e_branchformer", **conf) -> nn.Module:
    """A model as ESPnet builds it: random weights, then the adapter."""
    torch.manual_seed(4)
    model = asr_model(kind)
    create_adapter(model, "ssvd_kernels", {**CONF, **conf})
    return model


def pretrained(path, kind: str = "e_branchformer", **conf) -> nn.Module:
    """`adapted`, and then the weights from a file."""
    model = adapted(kind, **conf)
    init_param(model, path)
    return model


@pytest.fixture(params=["weight", "activation"])
def form(request) -> str:
    return request.param


@pytest.fixture
def trained(base, form) -> nn.Module:
    model = pretrained(base()[0], form=form)
    train_randomly(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_come_first_and_the_factorisation_with_the_weights(kind, base, form, caplog):
    path, plain = base(kind)
    model = adapted(kind, form=form)
    before = {name: (id(parameter), parameter.shape) for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError, match="no pretrained weight was loaded into this SSVD layer"):
        outputs(model)
    layer = next(iter(sk.ssvd_layers(model).values()))
    for use in (layer.compose, lambda: layer.weight, lambda: sk.merge(model)):
        with pytest.raises(RuntimeError, match="no pretrained weight was loaded"):
            use()
    with caplog.at_level(logging.INFO):
        init_param(model, path)
    assert caplog.text.count("SSVD: factorised") == len(sk.ssvd_layers(model))
    assert {name: (id(parameter), parameter.shape) for name, parameter in model.named_parameters()} == before
    assert torch.equal(outputs(model), outputs(plain))
    for name, layer in sk.ssvd_layers(model).items():
        config = sk.SSVDConfig(rank=layer.k, side="smaller", form=form)
        fresh = sk.SSVDLinear.from_linear(plain.get_submodule(name), config)
        assert [key for key, _ in layer.named_parameters()] == [key for key, _ in fresh.named_parameters()]
        for key in ("U", "sigma", "V"):
            assert torch.equal(getattr(layer, key), getattr(fresh, key)), (name, key)
        assert layer.basis.fingerprint == fresh.basis.fingerprint and layer.basis.gap == fresh.basis.gap > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotation_map", ["linear", "cayley"])
def test_gradients_reach_every_adapter_and_the_function_is_the_formula(kind, rotation_map, base, form):
    path, plain = base(kind)
    model = pretrained(path, kind, rotation_map=rotation_map, target_modules="espnet", form=form)
    train_randomly(model)
    loss, *_ = model.train()(**batch())
    loss.backward()
    for name, layer in sk.ssvd_layers(model).items():
        if not name.endswith("linear_k"):  # softmax does not see what all keys share, such as their bias
            assert layer.theta.grad.abs().max() > 0 and layer.delta_sigma.grad.abs().max() > 0, name
        tall = layer.out_features >= layer.in_features
        assert layer.side == ("input" if tall else "output")
        u, v = (layer.U, layer.V.mT) if tall else (layer.V, layer.U.mT)
        tensors = {"u": u, "s_pre": layer.sigma, "v": v, "K_vec": layer.theta, "weight": layer.base_weight}
        tensors |= {"s": 2 * layer.delta_sigma, "gate": torch.zeros(1)}
        tensors = {key: tensor.detach() for key, tensor in tensors.items()}
        none = {"K_vec": 0 * tensors["K_vec"], "s": 0 * tensors["s"]}
        update = effective(tensors, rotation_map) - effective({**tensors, **none}, rotation_map)
        expected = plain.get_submodule(name).weight.detach().double() + torch.tensor(update)
        assert_within(layer.weight.detach(), in_plain_pytorch(layer.base_weight, layer)[0], expected, name)
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(expected)
    found = outputs(model.eval())  # also frees the attention that a training forward keeps, and no copy can hold
    assert_within(found, outputs(plain), references(model, outputs)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_alone_and_the_weights_it_holds_now(kind, form):
    model = encoder(kind).eval()
    x, lengths = torch.randn(2, FRAMES, FEATURES), torch.tensor([FRAMES, FRAMES])
    with torch.no_grad():
        before = model(x, lengths)[0]
        create_adapter(model, "ssvd_kernels", {"rank": 3, "weights": "now", "form": form})
        assert torch.equal(model(x, lengths)[0], before)
    layers = sk.ssvd_layers(model)
    assert len(layers) == (2 * 12 if kind == "e_branchformer" else 2 * 6)
    assert {(layer.rotation, layer.k, layer.form) for layer in layers.values()} == {("linear", 3, form)}


def test_modules_are_named_by_their_endings_as_in_espnet():
    layers = sk.ssvd_layers(adapted(target_modules=["attn.linear_q", "linear_v"]))
    assert len(layers) == 2 * 2 + 2 * 2 * 2 and all(name.endswith(("linear_q", "linear_v")) for name in layers)
    assert "decoder.decoders.0.src_attn.linear_q" in layers  # "attn.linear_q" is its ending, too
    assert len(sk.ssvd_layers(adapted(target_modules=r"encoder\..*\.w_1"))) == 2 * 2


def test_other_parameters_stay_as_freeze_param_left_them(caplog):
    model = asr_model()
    model.encoder.requires_grad_(False)
    kept = {name: p.requires_grad for name, p in model.named_parameters()}
    create_adapter(model, "ssvd_kernels", CONF)
    layers = sk.ssvd_layers(model)
    for name, parameter in model.named_parameters():
        owner, _, key = name.rpartition(".")
        expected = key in ("theta", "delta_sigma") if owner in layers else kept[name]
        assert parameter.requires_grad == expected, name
    assert "other parameters of the model also train: freeze_param freezes them" in caplog.text
    caplog.clear()
    model = asr_model().requires_grad_(False)
    create_adapter(model, "ssvd_kernels", CONF)
    assert "other parameters" not in caplog.text


@pytest.mark.parametrize(
    ("conf", "error", "match"),
    [
        ({"target_modules": ["w_2", "query"]}, ValueError, "`target_modules` contains 'query'.*ESPnetASRModel ends"),
        ({"target_modules": []}, ValueError, "`targets` must not be empty"),
        ({"target_modules": ["feed_forward"]}, TypeError, "`targets`.* got PositionwiseFeedForward"),
        ({"target_modules": "caley"}, ValueError, "`targets` must be a preset .*got 'caley'"),
        ({"rotation_map": "free"}, ValueError, "`rotation_map` must be one of 'linear', 'cayley', got 'free'"),
        ({"weights": "soon"}, ValueError, "`weights` must be one of 'later', 'now', got 'soon'"),
        ({"form": "input"}, ValueError, "`form` must be one of 'weight', 'activation', 'auto', got 'input'"),
        ({"rotation_ratio": None}, ValueError, "exactly one of `rank` and `ratio`"),
        ({"rotation_ratio": 1.5}, ValueError, r"`ratio` must be a number in .*got 1\.5"),
        ({"rotation_ratio": 0.01}, ValueError, r"`ratio` must be at least .*got 0\.01, which gives rank 0"),
        ({"alpha": 8}, TypeError, "alpha"),
    ],
)
def test_a_configuration_without_effect_is_refused(conf, error, match):
    model = asr_model()
    with refused(model, error, match):
        create_adapter(model, "ssvd_kernels", {**CONF, **conf})


def test_a_second_adapter_and_a_taken_name_are_refused():
    model = adapted()
    with refused(model, ValueError, "SSVD layers already"):
        create_adapter(model, "ssvd_kernels", CONF)
    with pytest.raises(ValueError, match="`name` must differ from those of ESPnet's adapters, got 'lora'"):
        integration.register("lora")
    integration.register()  # again


def test_weights_may_come_in_parts(base, form):
    path, plain = base()
    model = pretrained(f"{path}:encoder:encoder", form=form)
    with torch.no_grad():
        frames, lengths = model.encode(batch()["speech"], batch()["speech_lengths"])
        with pytest.raises(RuntimeError, match="no pretrained weight was loaded"):
            model.decoder(frames, lengths, batch()["text"].clamp(min=0), batch()["text_lengths"])
    init_param(model, f"{path}:::encoder,ctc", ignore_init_mismatch=True)  # all but these
    init_param(model, f"{path}:ctc:ctc")
    assert torch.equal(outputs(model), outputs(plain))


def test_layers_that_no_weight_was_loaded_into_stay_unusable(base, form, tmp_path):
    model = pretrained(f"{base()[0]}:::decoder", form=form)  # the decoder gets its own random weights back
    layers = sk.ssvd_layers(model)
    assert {name.partition(".")[0] for name, layer in layers.items() if not layer.factorized} == {"decoder"}
    with pytest.raises(RuntimeError, match="no pretrained weight was loaded"):
        outputs(model)
    with pytest.raises(ValueError, match=r"decoder\..* has no singular vectors yet"):
        sk.save_adapter(model, tmp_path / "a.safetensors")


def test_a_base_loaded_again_is_refused_unless_it_is_the_same(base, trained):
    path, _ = base()
    expected = outputs(trained)
    init_param(trained, path)
    assert torch.equal(outputs(trained), expected)
    other = asr_model().state_dict()
    with pytest.raises(RuntimeError, match="base weight differs from the one that was factorised"):
        trained.load_state_dict(other, strict=False)
    torch.save(other, path)
    with pytest.raises(RuntimeError, match="base weight differs from the one that was factorised"):
        init_param(trained, path)


def test_state_dicts_carry_all_that_outputs_need(base, trained, form):
    whole, part, expected = trained.state_dict(), trained_part(trained), outputs(trained)
    keys = {name.rpartition(".")[2] for name in part if ".linear_q." in name}
    assert keys == {"theta", "delta_sigma", "_extra_state"}

    bases = {name.rpartition(".")[2] for name in whole if re.search("linear_q|w_2", name)} - keys
    assert bases == {"weight", "bias", "sigma", *(("U", "V") if form == "weight" else ("Uh", "Vh"))}

    fresh = pretrained(base()[0], form=form)
    fresh.load_state_dict(part, strict=False)
    assert torch.equal(outputs(fresh), expected)

    for twin in (adapted(form=form), copy.deepcopy(trained), copy.deepcopy(adapted(form=form))):
        twin.load_state_dict(whole)
        assert torch.equal(outputs(twin), expected)
        fresh.load_state_dict(trained_part(twin), strict=False)  # which identifies the basis as exactly
        assert torch.equal(outputs(fresh), expected)


def test_a_state_dict_serves_the_other_form(base, trained, form):
    """What trained means the same; a whole state dict has the other form's bases, and its weights are factorised."""
    other, plain, exact = "activation" if form == "weight" else "weight", *references(trained, outputs)
    model = pretrained(base()[0], form=other)
    for target, state in ((model, trained_part(trained)), (adapted(form=other), trained.state_dict())):
        target.load_state_dict(state, strict=False)
        assert_within(outputs(target), plain, exact)
        assert {layer.form for layer in sk.ssvd_layers(target).values()} == {other}


def test_singular_values_too_small_to_divide_by_are_refused_as_they_come(base, tmp_path):
    path, plain = base()
    name = "encoder.encoders.1.attn.linear_q"
    with torch.no_grad():
        plain.get_submodule(name).weight[:, 4:] *= 1e-6
    torch.save(plain.state_dict(), path)
    with pytest.raises(RuntimeError, match=rf"{name}: its weight: form='activation' divides by .* at least 0\.0001 "):
        pretrained(path, form="activation")
    torch.save(pretrained(path).state_dict(), path)
    with pytest.raises(RuntimeError, match="form='activation' divides by singular values"):
        pretrained(path, form="activation")


def test_signs_of_singular_vectors_are_repaired(base, trained, form):
    """As if another machine's SVD had turned them: theta means another update then."""
    for layer in sk.ssvd_layers(trained).values():
        layer.flip_basis(torch.where(torch.arange(layer.k) % 3 == 0, -1.0, 1.0))
    fresh, twin = pretrained(base()[0], form=form), adapted(form=form)
    twin.load_state_dict({**fresh.state_dict(), **trained_part(trained)})  # a basis, and theta in one of other signs
    for model, state in ((fresh, trained_part(trained)), (fresh, trained_part(twin))):
        model.load_state_dict(state, strict=False)
        assert torch.equal(outputs(model), outputs(trained)) and torch.equal(outputs(twin), outputs(trained))
    layer = next(iter(sk.ssvd_layers(fresh).values()))
    assert layer.basis.gap > 0  # still known as the weight's own


whole = nn.Module.state_dict


def of_another_base(path, **conf) -> nn.Module:
    torch.manual_seed(9)
    torch.save(asr_model().state_dict(), path)
    return pretrained(path, **conf)


def mixed_bases(model: nn.Module) -> dict:
    other = asr_model().state_dict()
    return {name: other.get(name, tensor) for name, tensor in whole(model).items()}


def mixed_sigmas(model: nn.Module) -> dict:
    return {name: tensor.flip(0) if name.endswith("sigma") else tensor for name, tensor in whole(model).items()}


def renamed(model: nn.Module) -> dict:
    return {name.replace("encoders.", "layers."): tensor for name, tensor in trained_part(model).items()}


def without(state: dict, ending: str) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.endswith(ending)}


def espnets_own(model: nn.Module) -> dict:
    return {"encoder.encoders.0.attn.linear_q.K_vec": torch.zeros(28), **asr_model().state_dict()}


@pytest.mark.parametrize(
    ("model", "state", "match"),
    [
        (of_another_base, trained_part, "theta was trained with the singular vectors of another base weight"),
        ({}, trained_part, "trained theta, but no base weight was loaded: load that first"),
        (
            {},
            mixed_bases,
            r"the singular vectors of the state dict belong to another weight: .* W.* differs from sigma",
        ),
        (
            {},
            mixed_sigmas,
            r"the singular vectors of the state dict belong to another weight: .* W.* differs from sigma",
        ),
        ({"rotation_map": "linear"}, whole, "trained with rotation_map='cayley', but the layer has 'linear'"),
        ({"rotation_ratio": 0.25}, whole, "size mismatch for encoder.*theta"),
        ({"target_modules": ["linear_q"]}, whole, "10 SSVD layers and ESPnetASRModel has 6; they differ, .* '.*w_2'"),
        (pretrained, renamed, "they differ, e.g. in '.*encoders.0"),
        (pretrained, lambda m: without(trained_part(m), "_extra_state"), "has theta, but no sketch of the singular"),
        ({}, lambda m: without(whole(m), "linear_q.theta"), "has delta_sigma, but not all of theta, delta_sigma"),
        ({}, espnets_own, r"ESPnet's own SSVD adapter: convert it \(python -m ssvd_kernels convert"),
    ],
    ids=range(11),
)
def test_state_dicts_that_would_load_in_silence_are_refused(model, state, match, base, trained, form):
    """strict=False, as ESPnet loads."""
    given, (path, _) = state(trained), base()
    other = model(path, form=form) if callable(model) else adapted(**model, form=form)
    with pytest.raises(RuntimeError, match=match):
        other.load_state_dict(given, strict=False)


def test_a_merged_model_is_not_loaded_into(trained):
    state = trained.state_dict()
    sk.merge(trained)
    with pytest.raises(RuntimeError, match="is merged: unmerge before loading"):
        trained.load_state_dict(state, strict=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_train_dtype(dtype, base, form):
    path, plain = base()
    conf = {**CONF, "form": form}
    model = asr_model().to(dtype)
    create_adapter(model, "ssvd_kernels", conf)
    init_param(model, path)
    train_randomly(model)
    whole, layers = model.state_dict(), sk.ssvd_layers(model)
    for name, layer in layers.items():
        assert torch.equal(layer.base_weight, plain.get_submodule(name).weight.to(dtype))
        assert layer.theta.dtype == torch.promote_types(dtype, torch.float32)
    fresh = asr_model().to(dtype)
    create_adapter(fresh, "ssvd_kernels", conf)
    fresh.load_state_dict(whole, strict=False)
    for name, layer in sk.ssvd_layers(fresh).items():
        assert torch.equal(layer.weight, layers[name].weight)
    again = asr_model().to(dtype)
    create_adapter(again, "ssvd_kernels", conf)
    init_param(again, path)
    again.load_state_dict(trained_part(fresh), strict=False)  # over a new factorisation, not a rounding of it
    for name, layer in sk.ssvd_layers(again).items():
        assert torch.equal(layer.weight, layers[name].weight)


def test_a_state_dict_of_float32_loads_into_a_bfloat16_model(trained, form):
    fresh = asr_model().bfloat16()
    create_adapter(fresh, "ssvd_kernels", {**CONF, "form": form})
    fresh.load_state_dict(trained.state_dict(), strict=False)
    for name, layer in sk.ssvd_layers(fresh).items():
        source = sk.ssvd_layers(trained)[name]
        (plain, _), (_, exact) = (in_plain_pytorch(W, source) for W in (layer.base_weight, source.base_weight))
        assert_within(layer.weight.detach(), plain, exact, name)


def test_adapter_files_of_this_package_are_interchangeable(base, trained, form, tmp_path):
    path, plain = base()
    sk.save_adapter(trained, tmp_path / "adapter.safetensors")
    expected = outputs(trained)
    model = pretrained(path, form=form)
    sk.load_adapter(model, tmp_path / "adapter.safetensors", progress=False)
    assert torch.equal(outputs(model), expected)
    sk.load_adapter(plain, tmp_path / "adapter.safetensors", progress=False)
    assert_within(outputs(plain), *references(trained, outputs))
