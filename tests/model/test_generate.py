"""Whisper's generate(), with and without its cache, greedy and with beams: unmerged, merged, and with SSVD removed."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from models import adapt, plain_copy
from speech_models import adapted, inputs
from torch import Tensor, nn

import ssvd_kernels as sk

CHOICES = product((True, False), (1, 3))
WAYS = [{"use_cache": c, "num_beams": b, "do_sample": False, "max_new_tokens": 8} for c, b in CHOICES]


def check(model: nn.Module, base: nn.Module, features: Tensor, ways: list[dict]) -> None:
    """Every way of generating gives what plain layers that hold W' give, and after remove() what the base gives."""
    twin = plain_copy(model).eval()
    with torch.no_grad():
        expected = [twin.generate(features, **way) for way in ways]
        assert all(tokens.shape[1] > 2 for tokens in expected)
        for action in (None, sk.merge, sk.unmerge):
            if action is not None:
                action(model)
            for way, tokens in zip(ways, expected):
                assert torch.equal(model.generate(features, **way), tokens), (action, way)
        sk.remove(model)
        for way in ways:
            assert torch.equal(model.generate(features, **way), base.generate(features, **way)), way


def test_tiny_whisper_generates_what_its_effective_weights_do():
    model = adapted("whisper", seed=4).eval()
    base = copy.deepcopy(model)
    sk.remove(base)
    check(model, base, inputs(model)["input_features"], WAYS)


@pytest.mark.data
@pytest.mark.slow
def test_real_whisper_generates_what_its_effective_weights_do():
    real_data = pytest.importorskip("asr_tiny").real_data
    from experiments.asr import fetch, speech
    from experiments.asr.recognizer import load_recognizer

    data = real_data(fetch.MODEL, fetch.ASTERISK)
    recognizer = load_recognizer(None, data, torch.device("cpu"))
    recognizer.set_window(10)
    clips = speech.source_speech(data)["prompts as recorded"][:1]
    features = recognizer.features([clip.read() for clip in clips])
    model = recognizer.model
    base = copy.deepcopy(model)
    adapt(model, targets="whisper", rank=8)
    with torch.no_grad():
        for layer in sk.ssvd_layers(model).values():  # little enough to go on speaking
            layer.theta.mul_(0.2)
            layer.delta_sigma.mul_(0.2)
    model.eval()
    check(model, base, features, [{**way, "max_new_tokens": 6} for way in WAYS])
