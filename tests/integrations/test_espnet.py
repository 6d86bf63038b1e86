"""The ESPnet adapter on ESPnet's own encoders, decoder, adapter table and loader of pretrained weights."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from bounds import assert_within
from espnet_checkpoints import effective
from espnet_models import (
    FEATURES,
    FRAMES,
    asr_model,
    batch,
    create_adapter,
    encoder,
    init_param,
    integration,
    outputs,
    trained_part,
)  # fmt: skip
from models import references
from plain import effective as in_plain_pytorch
from refusals import refused
from torch import nn

import ssvd_kernels as sk

pytestmark = pytest.mark.usefixtures("one_thread")
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


def train_randomly(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sk.ssvd_layers(model).values():
            for parameter in (layer.theta, layer.delta_sigma):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_come_first_and_the_factorisation_with_the_weights(kind, base, caplog):
    path, plain = base(kind)
    model = adapted(kind)
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
        fresh = sk.SSVDLinear.from_linear(plain.get_submodule(name), sk.SSVDConfig(rank=layer.k))
        for key in ("U", "sigma", "V"):
            assert torch.equal(getattr(layer, key), getattr(fresh, key)), (name, key)
        assert layer.basis.fingerprint == fresh.basis.fingerprint and layer.basis.gap == fresh.basis.gap > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotation_map", ["linear", "cayley"])
def test_gradients_reach_every_adapter_and_the_function_is_the_formula(kind, rotation_map, base):
    path, plain = base(kind)
    model = adapted(kind, rotation_map=rotation_map, target_modules="espnet")
    init_param(model, path)
    train_randomly(model)
    model.train()
    loss, *_ = model(**batch())
    loss.backward()
    layers = sk.ssvd_layers(model)
    for name, layer in layers.items():
        if not name.endswith("linear_k"):  # softmax does not see what all keys share, such as their bias
            assert layer.theta.grad.abs().max() > 0 and layer.delta_sigma.grad.abs().max() > 0, name
    for name, layer in layers.items():
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
def test_an_encoder_alone_and_the_weights_it_holds_now(kind):
    model = encoder(kind).eval()
    x, lengths = torch.randn(2, FRAMES, FEATURES), torch.tensor([FRAMES, FRAMES])
    with torch.no_grad():
        before = model(x, lengths)[0]
        create_adapter(model, "ssvd_kernels", {"rank": 3, "weights": "now"})
        assert torch.equal(model(x, lengths)[0], before)
    layers = sk.ssvd_layers(model)
    assert len(layers) == (2 * 12 if kind == "e_branchformer" else 2 * 6)
    assert {layer.rotation for layer in layers.values()} == {"linear"} and {layer.k for layer in layers.values()} == {3}


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
        (
            {"target_modules": ["attn.linear_q", "query"]},
            ValueError,
            "`target_modules` contains 'query'.*ESPnetASRModel ends",
        ),
        ({"target_modules": []}, ValueError, "`targets` must not be empty"),
        ({"target_modules": ["feed_forward"]}, TypeError, "`targets`.* got PositionwiseFeedForward"),
        ({"target_modules": "caley"}, ValueError, "`targets` must be a preset .*got 'caley'"),
        ({"rotation_map": "free"}, ValueError, "`rotation_map` must be one of 'linear', 'cayley', got 'free'"),
        ({"weights": "soon"}, ValueError, "`weights` must be one of 'later', 'now', got 'soon'"),
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


def test_weights_may_come_in_parts(base):
    path, plain = base()
    model = adapted()
    init_param(model, f"{path}:encoder:encoder")
    with torch.no_grad():
        frames, lengths = model.encode(batch()["speech"], batch()["speech_lengths"])
        with pytest.raises(RuntimeError, match="no pretrained weight was loaded"):
            model.decoder(frames, lengths, batch()["text"].clamp(min=0), batch()["text_lengths"])
    init_param(model, f"{path}:::encoder,ctc", ignore_init_mismatch=True)  # all but these
    init_param(model, f"{path}:ctc:ctc")
    assert torch.equal(outputs(model), outputs(plain))


def test_layers_that_no_weight_was_loaded_into_stay_unusable(base):
    path, _ = base()
    model = adapted()
    init_param(model, f"{path}:::decoder")  # everything else; the decoder gets its own random weights back
    layers = sk.ssvd_layers(model)
    assert {name.partition(".")[0] for name, layer in layers.items() if not layer.factorized} == {"decoder"}
    with pytest.raises(RuntimeError, match="no pretrained weight was loaded"):
        outputs(model)


def test_a_base_loaded_again_is_refused_unless_it_is_the_same(base):
    path, _ = base()
    model = adapted()
    init_param(model, path)
    train_randomly(model)
    expected = outputs(model)
    init_param(model, path)
    assert torch.equal(outputs(model), expected)
    other = asr_model().state_dict()
    with pytest.raises(RuntimeError, match="base weight differs from the one that was factorised"):
        model.load_state_dict(other, strict=False)
    torch.save(other, path)
    with pytest.raises(RuntimeError, match="base weight differs from the one that was factorised"):
        init_param(model, path)


def test_state_dicts_carry_all_that_outputs_need(base):
    path, _ = base()
    model = adapted()
    init_param(model, path)
    train_randomly(model)
    whole, part, expected = model.state_dict(), trained_part(model), outputs(model)
    assert {name.rpartition(".")[2] for name in part if ".linear_q." in name} == {
        "theta",
        "delta_sigma",
        "_extra_state",
    }

    fresh = adapted()
    fresh.load_state_dict(whole, strict=True)
    assert torch.equal(outputs(fresh), expected)

    fresh = adapted()
    init_param(fresh, path)
    fresh.load_state_dict(part, strict=False)
    assert torch.equal(outputs(fresh), expected)

    for twin in (copy.deepcopy(model), copy.deepcopy(adapted())):
        twin.load_state_dict(whole)
        assert torch.equal(outputs(twin), expected)


def test_signs_of_singular_vectors_are_repaired(base):
    """As if another machine's SVD had turned them: theta means another update then."""
    path, _ = base()
    model = adapted()
    init_param(model, path)
    for layer in sk.ssvd_layers(model).values():
        layer.flip_basis(torch.where(torch.arange(layer.k) % 3 == 0, -1.0, 1.0))
    train_randomly(model)
    fresh = adapted()
    init_param(fresh, path)
    fresh.load_state_dict(trained_part(model), strict=False)
    assert torch.equal(outputs(fresh), outputs(model))
    layer = next(iter(sk.ssvd_layers(fresh).values()))
    assert layer.basis.gap > 0  # still known as the weight's own


def another_base(part, whole, base):
    torch.manual_seed(9)
    path = base()[0]
    torch.save(asr_model().state_dict(), path)
    model = adapted()
    init_param(model, path)
    return model, part


def without_base(part, whole, base):
    return adapted(), part


def mixed_bases(part, whole, base):
    other = asr_model().state_dict()
    return adapted(), {name: other.get(name, tensor) for name, tensor in whole.items()}


def other_map(part, whole, base):
    return adapted(rotation_map="linear"), whole


def other_rank(part, whole, base):
    return adapted(rotation_ratio=0.25), whole


def other_targets(part, whole, base):
    return adapted(target_modules=["attn.linear_q"]), whole


def renamed(part, whole, base):
    model = adapted()
    init_param(model, base()[0])
    return model, {name.replace("encoders.", "layers."): tensor for name, tensor in part.items()}


def without_sketch(part, whole, base):
    model = adapted()
    init_param(model, base()[0])
    return model, {name: tensor for name, tensor in part.items() if not name.endswith("_extra_state")}


def without_theta(part, whole, base):
    return adapted(), {name: tensor for name, tensor in whole.items() if not name.endswith("linear_q.theta")}


def merged(part, whole, base):
    model = adapted()
    model.load_state_dict(whole)
    sk.merge(model)
    return model, whole


def espnets_own(part, whole, base):
    return adapted(), {"encoder.encoders.0.attn.linear_q.K_vec": torch.zeros(28), **base()[1].state_dict()}


@pytest.mark.parametrize(
    ("case", "match"),
    [
        (another_base, "theta was trained with the singular vectors of another base weight"),
        (without_base, "trained theta, but no base weight was loaded: load that first"),
        (mixed_bases, r"U, sigma and V of the state dict belong to another weight: U\^T W V differs"),
        (other_map, "trained with rotation_map='cayley', but the layer has 'linear'"),
        (other_rank, "size mismatch for encoder.*theta"),
        (other_targets, "has 10 SSVD layers and ESPnetASRModel has 6; they differ, e.g. in '.*w_2'"),
        (renamed, "they differ, e.g. in '.*encoders.0"),
        (without_sketch, "has theta, but no sketch of the singular vectors"),
        (without_theta, "has delta_sigma, but not all of theta, delta_sigma"),
        (merged, "is merged: unmerge before loading"),
        (espnets_own, r"ESPnet's own SSVD adapter: convert it \(python -m ssvd_kernels convert"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_state_dicts_that_would_load_in_silence_are_refused(case, match, base):
    """strict=False, as ESPnet loads."""
    path, _ = base()
    model = adapted()
    init_param(model, path)
    train_randomly(model)
    model, state = case(trained_part(model), model.state_dict(), base)
    with pytest.raises(RuntimeError, match=match):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_train_dtype(dtype, base):
    path, plain = base()
    model = asr_model().to(dtype)
    create_adapter(model, "ssvd_kernels", CONF)
    init_param(model, path)
    train_randomly(model)
    whole, layers = model.state_dict(), sk.ssvd_layers(model)
    for name, layer in layers.items():
        assert torch.equal(layer.base_weight, plain.get_submodule(name).weight.to(dtype))
        assert layer.theta.dtype == torch.promote_types(dtype, torch.float32)
    fresh = asr_model().to(dtype)
    create_adapter(fresh, "ssvd_kernels", CONF)
    fresh.load_state_dict(whole, strict=False)
    for name, layer in sk.ssvd_layers(fresh).items():
        assert torch.equal(layer.weight, layers[name].weight)


def test_a_state_dict_of_float32_loads_into_a_bfloat16_model(base):
    model = adapted()
    init_param(model, base()[0])
    train_randomly(model)
    fresh = asr_model().bfloat16()
    create_adapter(fresh, "ssvd_kernels", CONF)
    fresh.load_state_dict(model.state_dict(), strict=False)
    for name, layer in sk.ssvd_layers(fresh).items():
        source = sk.ssvd_layers(model)[name]
        (plain, _), (_, exact) = (in_plain_pytorch(W, source) for W in (layer.base_weight, source.base_weight))
        assert_within(layer.weight.detach(), plain, exact, name)


def test_adapter_files_of_this_package_are_interchangeable(base, tmp_path):
    path, plain = base()
    model = adapted()
    init_param(model, path)
    train_randomly(model)
    sk.save_adapter(model, tmp_path / "adapter.safetensors")
    sk.load_adapter(plain, tmp_path / "adapter.safetensors", progress=False)
    assert torch.equal(outputs(plain), outputs(model))
    fresh = adapted()
    with pytest.raises(sk.AdapterError, match="has no singular vectors yet"):
        sk.load_adapter(fresh, tmp_path / "adapter.safetensors", progress=False)
    init_param(fresh, path)
    sk.load_adapter(fresh, tmp_path / "adapter.safetensors", progress=False)
    assert torch.equal(outputs(fresh), outputs(model))
