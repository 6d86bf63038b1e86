"""Whole models: what the presets adapt, identity before training, and the published sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from models import RANK, inject
from speech_models import ATTENTION, MODELS, inputs, run, whisper
from torch import nn

import ssvd_kernels as sk
from ssvd_kernels.ops.functional import theta_length

pytestmark = pytest.mark.usefixtures("one_thread")


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_preset_matches_every_attention_and_feed_forward_layer_and_nothing_else(name):
    make, preset, count = MODELS[name]
    model = make()
    feed_forward = ("fc1", "fc2", "intermediate_dense", "output_dense")
    expected = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in ATTENTION}
    expected |= {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in feed_forward}
    report = inject(model, targets=preset)
    assert set(report.modules) == expected and len(expected) == count
    assert report.trainable == count * RANK * (RANK + 1) // 2
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{module}.{part}" for module in expected for part in ("theta", "delta_sigma")}
    assert f"{count} layers" in str(report) and f"{report.trainable:,}" in str(report)


def test_report_counts_the_base_and_what_was_added():
    model = whisper()
    before = sum(p.numel() for p in model.parameters())
    report = inject(model, targets="whisper")
    assert report.total == before + report.trainable


@pytest.mark.parametrize("targets", ["all-linear", "whisper", r".*(proj|proj_out|fc\d)"])
def test_tied_weights_are_left_alone(targets):
    model = whisper()
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    inject(model, targets=targets)
    assert type(model.proj_out) is nn.Linear
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert not model.proj_out.weight.requires_grad


def test_listed_tied_weight_is_refused():
    with pytest.raises(ValueError, match=r"'proj_out'.*tied to 'model\.decoder\.embed_tokens\.weight'"):
        inject(whisper(), targets=["q_proj", "proj_out"])


def test_untied_output_embedding_is_adapted_only_by_name():
    model = whisper(tie_word_embeddings=False)
    model.proj_out.weight = nn.Parameter(model.proj_out.weight.detach().clone())
    assert "proj_out" not in inject(copy.deepcopy(model), targets="all-linear").modules
    assert inject(model, targets=["proj_out"]).modules == ["proj_out"]


# -- identity before training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_bit_identical_before_training(name, side):
    """Without gradients the base is frozen too: of a strided 3-D x (WavLM's), the library's own product depends on
    whether the weight requires a gradient, by an ulp."""
    make, preset, _ = MODELS[name]
    base = make()
    model, frozen = copy.deepcopy(base), copy.deepcopy(base).requires_grad_(False)
    inject(model, targets=preset, side=side)
    for training in (True, False):
        for network in (base, model, frozen):
            network.train(training)
        assert torch.equal(run(model), run(base))
        with torch.no_grad():
            assert torch.equal(run(model), run(frozen))
        with torch.inference_mode():
            assert torch.equal(run(model), run(frozen))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(model), run(base))
            with torch.no_grad():
                assert torch.equal(run(model), run(frozen))
    sk.remove(model)
    assert torch.equal(run(model), run(base))


@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "wavlm"])
def test_bf16_model_is_bit_identical_before_training(name):
    make, preset, _ = MODELS[name]
    base = make().to(torch.bfloat16).eval()
    model = copy.deepcopy(base)
    inject(model, targets=preset)
    cast = {key: v.bfloat16() if v.is_floating_point() else v for key, v in inputs(base).items()}
    assert torch.equal(model(**cast)[0], base(**cast)[0])
    with torch.no_grad():
        assert torch.equal(model(**cast)[0], base(**cast)[0])


# -- published sizes ---------------------------------------------------------------------------------------------------


PUBLISHED = [  # (layers, k) -> millions of trainable parameters, as printed in arXiv 2509.02830, Table IV
    (128, 384, 153, 1.51), (128, 384, 239, 3.67), (128, 384, 320, 6.57),
    (380, 1024, 227, 9.83), (380, 1024, 256, 12.50), (380, 1024, 292, 16.26), (380, 1024, 341, 22.16),
    (380, 1024, 409, 31.86), (258, 2048, 341, 15.04), (258, 2048, 409, 21.63), (258, 2048, 512, 33.88),
]  # fmt: skip


@pytest.mark.parametrize(("count", "d", "k", "millions"), PUBLISHED)
def test_trainable_parameters_equal_the_published_ones(count, d, k, millions):
    config = sk.SSVDConfig(rank=k)
    assert config.resolve_ranks(4 * d, d) == config.resolve_ranks(d, d) == (k, None)
    per_layer = theta_length(k, "cayley") + k
    assert theta_length(k, "linear") == theta_length(k, "cayley")
    assert theta_length(k, "free") + k == k * k + k
    assert abs(count * per_layer / 1e6 - millions) <= 0.00501


def test_trainable_parameters_of_real_layers_equal_the_published_ones():
    net = nn.Sequential(nn.Linear(384, 384), nn.Linear(384, 1536), nn.Linear(1536, 384))
    report = inject(net, rank=153)
    assert report.trainable == 3 * 153 * 154 // 2 == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert round(128 * report.trainable / 3 / 1e6, 2) == 1.51
    assert sk.SSVDConfig(ratio=0.4).resolve_ranks(384, 1536)[0] == 153
