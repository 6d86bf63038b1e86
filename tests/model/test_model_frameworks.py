"""Whole models and PyTorch around them: buffers and DDP, what is saved for the backward, compile."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import models
import pytest
import torch
from bounds import assert_within
from models import Stack, adapt, assert_all_within, gradients, references, saved_for_backward, square_gradients, step
from speech_models import adapted, inputs, run, whisper
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.ops import reference


def test_nothing_is_a_buffer_and_ddp_sends_only_what_trains():
    model = whisper()
    buffers = {name for name, _ in model.named_buffers()}
    report = models.inject(model, targets="whisper")
    assert {name for name, _ in model.named_buffers()} == buffers
    sent = [p for p in model.parameters() if p.requires_grad]  # what DDP's reducer takes; it broadcasts all buffers
    assert sum(p.numel() for p in sent) == report.trainable
    model(**inputs(model))
    models.train_randomly(model)
    with torch.no_grad():
        run(model.eval())  # caches
    assert {name for name, _ in model.named_buffers()} == buffers


def test_whole_model_keeps_little_more_than_the_frozen_one():
    model = adapted("wav2vec2").eval()
    base = copy.deepcopy(model)
    sk.remove(base)
    for layer in sk.ssvd_layers(model).values():
        layer.mode = "factored"

    def kept(network: nn.Module, leaf: bool) -> int:
        known = {p.untyped_storage().data_ptr() for p in network.parameters() if p.numel()}
        values = torch.randn(2, 2000, requires_grad=leaf)
        with saved_for_backward(known) as saved:
            output = network(values)[0]
        assert output.requires_grad
        return sum(saved.values())

    base.requires_grad_(False)
    tokens, ranks = 2 * 199, [layer.k for layer in sk.ssvd_layers(model).values()]
    allowed = sum(tokens * k * 4 + 12 * 4 * k * k for k in ranks)
    assert kept(model, leaf=True) <= kept(base, leaf=True) + allowed


@pytest.mark.slow
def test_compile_fullgraph():
    torch._dynamo.reset()
    model = adapt(Stack())
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(16, 8)

    def evaluated(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return network.eval()(x)

    for _ in range(2):
        compiled.train()(x).square().mean().backward()
        assert_all_within(gradients(model), *references(twin, lambda network: square_gradients(network, x)))
        for _ in range(2):  # the second with parameters that changed under a compiled eval
            assert_within(evaluated(compiled), *references(twin, evaluated))
            step(model)
            step(twin)


@pytest.mark.parametrize("mode", ["composed", "factored"])
def test_compile_one_layer_with_changing_batch(mode):
    torch._dynamo.reset()
    layer = models.trained_layer(12, 10, mode, rank=4, side="both")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(tokens, 12) for tokens in (7, 9, 11)):
        assert_within(compiled(x), *references(nn.Sequential(layer), lambda network, x=x: network(x).detach()))


def test_weight_never_falls_back_to_the_base_weight_in_silence(monkeypatch):
    """`weight` is a property of an nn.Module, whose __getattr__ finds the base weight if the property fails."""
    layer = models.trained_layer(6, 5, rank=3)
    broken = Mock(side_effect=AttributeError("a name that this version of torch does not have"))
    monkeypatch.setattr(reference, "compose_ref", broken)
    with pytest.raises((AttributeError, RuntimeError)):
        _ = layer.weight
