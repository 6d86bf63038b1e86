"""Whole models in training: effective weights, gradients, one batched rotation, autocast."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from bounds import assert_within, twice
from cases import relative_error
from models import adapt, counted, gradients, inject, loss_of, plain_copy, references
from speech_models import MODELS, adapted, loss_gradients, run, scaled_passes, whisper

import ssvd_kernels as sk


@pytest.mark.parametrize("name", MODELS)
def test_trained_model_computes_with_the_effective_weights(name):
    model = adapted(name)
    for training in (True, False):
        plain, exact = references(model.train(training), lambda network: run(network).detach())
        assert_within(run(model), plain, exact)
        with torch.no_grad():
            assert_within(run(model), plain, exact)
    unmerged = run(model).detach()
    sk.merge(model)
    assert_within(run(model), plain, exact, "merged")
    sk.unmerge(model)
    assert torch.equal(run(model).detach(), unmerged)


@pytest.mark.parametrize("rotation", ["cayley", "linear", "free"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter_and_are_right(name, rotation):
    """Directional derivative in float64 along a random direction through every trained parameter."""
    model = adapted(name, rotation=rotation).double().eval()
    grads = loss_gradients(model)
    assert all(grad.abs().max() > 0 for grad in grads.values())
    direction = {key: torch.randn_like(grad) for key, grad in grads.items()}
    slope = sum((grads[key] * direction[key]).sum() for key in grads)
    step, values = 1e-5, []  # small: the difference is off by step^2, and by the rounding of the loss over the step
    for sign in (1, -2):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key in direction:
                    parameter += sign * step * direction[key]
        values.append(loss_of(run(model)).item())
    assert math.isclose((values[0] - values[1]) / (2 * step), float(slope), rel_tol=1e-6, abs_tol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_one_batched_rotation_per_forward(monkeypatch, name):
    model, count = adapted(name), MODELS[name][2]
    with counted(monkeypatch) as calls:
        loss = loss_of(run(model.train()))
        assert calls["cayley_delta"] == [count]
        loss.backward()
        assert calls == {"cayley_delta": [count], "cayley_delta_backward": [count]}
        with torch.no_grad():
            run(model)
        assert calls["cayley_delta"] == [count, count]
        model.eval()
        with torch.no_grad():
            for seed in range(3):
                run(model, seed)  # the first needs them, the others use what is kept
        assert calls["cayley_delta"] == [count, count, count]


def test_two_ranks_and_both_sides_are_two_calls(monkeypatch):
    model = whisper()
    inject(model, targets="whisper", side="both", rank=5, rank_out=3)
    with counted(monkeypatch) as calls:
        run(model.train()).sum().backward()
    assert sorted(calls["cayley_delta"]) == sorted(calls["cayley_delta_backward"]) == [32, 32]


def test_dropped_layers_get_no_gradient_and_the_others_do(monkeypatch):
    make, preset, count = MODELS["wav2vec2"]
    model = adapt(make(layerdrop=0.5).train(), targets=preset)
    layers = sk.ssvd_layers(model)
    ran: set[str] = set()
    for key, layer in layers.items():
        layer.register_forward_hook(lambda *_, key=key: ran.add(key))
    some = False
    for seed in range(6):
        ran.clear()
        model.zero_grad()
        with counted(monkeypatch) as calls:
            loss_of(run(model, seed)).backward()
        assert calls["cayley_delta"] == [count]
        for key, layer in layers.items():
            for parameter in (layer.theta, layer.delta_sigma):
                assert (parameter.grad is not None and bool(parameter.grad.any())) == (key in ran)
        some |= 0 < len(ran) < count
    assert some, "no seed dropped a layer"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "wavlm"])
def test_autocast_trains_and_evaluates(name, dtype):
    model = adapted(name).eval()
    twin = plain_copy(model)
    _, (exact, exact_grads) = references(model, scaled_passes)
    with torch.autocast("cpu", dtype):
        output, grads = scaled_passes(model)
        (_, plain_grads), plain = references(model, scaled_passes)[0], run(twin).detach()
        assert grads.dtype == torch.float32
        assert_within(output, plain, exact)
        assert relative_error(grads, exact_grads) <= twice(plain_grads, exact_grads, dtype)
        with torch.no_grad():
            assert_within(run(model), plain, exact, "what is kept")
            sk.merge(model)
            assert_within(run(model), plain, exact, "merged")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "wavlm"])
def test_half_precision_model_with_a_float32_adapter(name, dtype):
    """No autocast: everything but theta, delta_sigma and the basis is half; WavLM's attention reads the weights."""
    make, preset, _ = MODELS[name]
    model = adapt(make().to(dtype), targets=preset).eval()
    exact, plain = (run(plain_copy(each)).detach() for each in (copy.deepcopy(model).double(), model))
    output = run(model)
    assert output.dtype == dtype
    assert_within(output, plain, exact)
    (2.0**10 * loss_of(output.float())).backward()
    for grad in gradients(model).values():
        assert grad.dtype == torch.float32 and grad.abs().max() > 0
    for rounding in ("nearest", "stochastic"):
        sk.merge(model, rounding=rounding)
        assert_within(run(model), plain, exact, rounding)
        sk.unmerge(model)
