"""check_training, and modules that read `.weight` and never call the layer: what they compute, and that they train."""

from __future__ import annotations

import copy

import pytest
import torch
from bounds import assert_within
from cases import relative_error
from models import Stack, gradients, inject, loss_of, references, train_randomly
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssvd_kernels as sk

NAMES = ["encoder.blocks.0.0", "encoder.blocks.0.2", "encoder.blocks.1.0", "encoder.blocks.1.2", "head"]


@pytest.fixture
def model() -> Stack:
    stack = Stack()
    inject(stack)
    return stack


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 8)


def lists(report: sk.TrainingReport) -> dict[str, list[str]]:
    found = {key: getattr(report, key) for key in ("ok", "none", "zero", "nonfinite")}
    return {key: names for key, names in found.items() if names}


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("rotation", ["cayley", "linear", "free"])
def test_at_initialisation_every_layer_that_is_called_trains(x, rotation, rank):
    model = Stack()
    inject(model, rotation=rotation, rank=rank)
    report = sk.check_training(model, model(x).square().mean())
    assert lists(report) == {"ok": NAMES}
    assert str(report) == "the loss trains 5 of 5 adapted layers"


def test_a_loss_is_differentiated_without_a_trace(model, x):
    model(x).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    loss = model(x).square().mean()
    sk.check_training(model, loss)
    for name, grad in before.items():
        assert torch.equal(model.get_parameter(name).grad, grad)
    model.zero_grad()
    loss.backward()  # the graph is still there
    ours = gradients(model)
    model(x).square().mean().backward()
    assert all(torch.equal(ours[name], grad) for name, grad in gradients(model).items())


def test_layers_that_a_loss_does_not_reach(model, x):
    report = sk.check_training(model, model.encoder.blocks[0](x).sum())  # alone: without batched rotations
    assert lists(report) == {"ok": NAMES[:2], "none": NAMES[2:]}
    assert str(report).splitlines() == [
        "the loss trains 2 of 5 adapted layers",
        "  without any gradient: 3 (encoder.blocks.1.0, encoder.blocks.1.2, head)",
    ]
    with torch.no_grad():
        assert lists(sk.check_training(model, model(x).sum())) == {"none": NAMES}
    assert lists(sk.check_training(model)) == {"none": NAMES}  # before any backward
    long = sk.TrainingReport(none=[f"layer{i}" for i in range(9)])
    assert str(long).endswith("9 (layer0, layer1, layer2, layer3, layer4, layer5, ...)")


def test_zeros_and_values_that_are_not_finite(model, x):
    assert lists(sk.check_training(model, model(x).sum() * 0.0)) == {"zero": NAMES}
    model(x).square().sum().backward()
    model.head.theta.grad[2] = float("nan")
    model.encoder.blocks[0][0].delta_sigma.grad[0] = float("inf")
    model.encoder.blocks[1][0].theta.grad.zero_()
    model.encoder.blocks[1][2].theta.grad = None
    assert lists(sk.check_training(model)) == {"ok": NAMES[1:2], "zero": NAMES[2:4], "nonfinite": [NAMES[0], "head"]}


def test_left_out_layers_have_zeros_where_rotations_are_batched(model, x):
    """As LayerDrop leaves them: a shorter path through the model."""
    model.encoder.blocks[1].forward = lambda x: x
    assert lists(sk.check_training(model, model(x).sum())) == {"ok": [*NAMES[:2], "head"], "zero": NAMES[2:4]}


def test_frozen_parameters_and_parked_adapters_are_not_expected_to_train(model, x):
    sk.add_adapter(model, "b")
    model.head.requires_grad_(False)
    model.encoder.blocks[0][0].theta.requires_grad_(False)
    assert lists(sk.check_training(model, model(x).sum())) == {"ok": NAMES[:-1]}


def test_reentrant_checkpointing_is_read_from_the_gradients(model, x):
    x.requires_grad_()
    for wholly in (True, False):  # checkpointed, or only the blocks
        model.zero_grad()
        model.encoder.checkpointing = None if wholly else {"use_reentrant": True}
        loss = (checkpoint(model, x, use_reentrant=True) if wholly else model(x)).square().mean()
        with pytest.raises(ValueError, match=r"use_reentrant=True.*without the loss"):
            sk.check_training(model, loss)
        loss.backward()
        assert lists(sk.check_training(model)) == {"ok": NAMES}
    model.encoder.checkpointing = {"use_reentrant": False}
    assert lists(sk.check_training(model, model(x).sum())) == {"ok": NAMES}


def test_what_cannot_be_checked_is_refused(model, x):
    base = Stack()
    with pytest.raises(ValueError, match="no trainable SSVD layer"):
        sk.check_training(base, base(x).sum())
    with pytest.raises(ValueError, match=r"`loss` must be a scalar, got shape \(4, 8\)"):
        sk.check_training(model, model(x))


def test_wrapped_parameters_are_found_by_their_names():
    """Of a layer that keeps its adapters in dictionaries, under names with a prefix."""

    def wrapped() -> nn.Module:
        kept = {name: {"default": nn.Parameter(torch.ones(3))} for name in ("ssvd_theta", "ssvd_delta_sigma", "scale")}
        return nn.ModuleDict({name: nn.ParameterDict(values) for name, values in kept.items()})

    model = nn.ModuleDict({"a": wrapped(), "b": wrapped()})
    loss = model["a"]["ssvd_theta"]["default"].sum() + model["a"]["ssvd_delta_sigma"]["default"].sum()
    assert lists(sk.check_training(model, loss)) == {"ok": ["a"], "none": ["b"]}


def _speech(name: str) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    speech_models = pytest.importorskip("speech_models")
    make, preset, _ = speech_models.MODELS[name]
    model = make()
    inject(model, targets=preset)
    return model, speech_models.inputs(model), [*speech_models.ATTENTION]


def _t5() -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5Model(config)
    inject(model)
    return model, {"input_ids": torch.arange(2, 12)[None], "decoder_input_ids": torch.arange(3, 9)[None]}, []


def _torch(model: nn.Module, *names: str, **options) -> tuple[nn.Module, dict, list[str]]:
    """torch's own attention or layer: out_proj is never called, and in inference one function reads every weight."""
    inject(model)
    return model, {**dict.fromkeys(names, torch.randn(2, 6, 8)), **options}, ["out_proj"]


READERS = {
    "wavlm": lambda: _speech("wavlm"),
    "attention": lambda: _torch(
        nn.MultiheadAttention(8, 2, batch_first=True), "query", "key", "value", need_weights=False
    ),
    "transformer layer": lambda: _torch(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), "src"),
    "t5": _t5,
}


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(1)  # dropout
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("training", [True, False])
def test_modules_that_read_the_weight_use_and_train_the_adapter(name, training):
    model, inputs, reading = READERS[name]()
    assert len(sk.ssvd_layers(model)) >= 1 and all(any(n.endswith(r) for n in sk.ssvd_layers(model)) for r in reading)
    model.train(training)
    report = sk.check_training(model, loss_of(output_of(model, inputs)))
    assert lists(report) == {"ok": list(sk.ssvd_layers(model))}
    train_randomly(model)
    plain, exact = references(model, lambda network: output_of(network, inputs).detach())
    with torch.no_grad():  # where the fused functions serve
        base = copy.deepcopy(model)
        sk.remove(base)
        assert_within(output_of(model, inputs), plain, exact)
        assert relative_error(output_of(base, inputs), exact) > 1e-3
    assert_within(output_of(model, inputs), plain, exact)


@pytest.mark.parametrize("name", [name for name in READERS if name != "t5"])  # T5 reads but its dtype
def test_the_check_tells_where_the_base_weight_is_read_instead(monkeypatch, name):
    """Were `weight` the base weight, as an nn.Module's attribute would be, those layers would silently not train."""
    model, inputs, reading = READERS[name]()
    monkeypatch.setattr(sk.SSVDLinear, "weight", property(lambda layer: layer.base_weight))
    inert = [n for n in sk.ssvd_layers(model) if n.endswith(tuple(reading))]
    loss = loss_of(output_of(model, inputs))
    report = sk.check_training(model, loss)
    assert inert and report.none + report.zero == inert and not report.nonfinite
    assert set(report.ok) == {*sk.ssvd_layers(model)} - {*inert}
    assert inert[0] in str(report)
    if loss.requires_grad:
        loss.backward()
    assert lists(sk.check_training(model)) == lists(report)
