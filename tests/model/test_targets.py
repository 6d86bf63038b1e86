"""Whole models: what the presets adapt, identity before training, and the published sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from models import RANK, inject
from speech_models import ATTENTION, MODELS, assert_bit_identical, run, whisper
from torch import nn

import ssvd_kernels as sk


@pytest.mark.parametrize("name", MODELS)
def test_preset_matches_every_attention_and_feed_forward_layer_and_nothing_else(name):
    make, preset, count = MODELS[name]
    model = make()
    adapted = (*ATTENTION, "fc1", "fc2", "intermediate_dense", "output_dense")
    expected = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in adapted}
    before = sum(p.numel() for p in model.parameters())
    report = inject(model, targets=preset)
    assert set(report.modules) == expected and len(expected) == count
    assert report.trainable == count * RANK * (RANK + 1) // 2 == report.total - before
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{module}.{part}" for module in expected for part in ("theta", "delta_sigma")}
    assert f"{count} layers" in str(report) and f"{report.trainable:,}" in str(report)


@pytest.mark.parametrize("targets", ["all-linear", "whisper", r".*(proj|proj_out|fc\d)"])
def test_tied_weights_are_left_alone(targets):
    model = whisper()
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    inject(model, targets=targets)
    assert type(model.proj_out) is nn.Linear
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert not model.proj_out.weight.requires_grad


def test_untied_output_embedding_is_adapted_only_by_name():
    model = whisper(tie_word_embeddings=False)
    model.proj_out.weight = nn.Parameter(model.proj_out.weight.detach().clone())
    assert "proj_out" not in inject(copy.deepcopy(model), targets="all-linear").modules
    assert inject(model, targets=["proj_out"]).modules == ["proj_out"]


@pytest.mark.parametrize(
    ("name", "side", "dtype"),
    [
        *((name, side, torch.float32) for name in MODELS for side in ("input", "both")),
        *((name, "input", torch.bfloat16) for name in ("whisper", "wav2vec2", "wavlm")),
    ],
)
def test_output_is_bit_identical_before_training(name, side, dtype):
    make, preset, _ = MODELS[name]
    base = make().to(dtype)
    model = copy.deepcopy(base)
    inject(model, targets=preset, side=side)
    assert_bit_identical(model, base)
    sk.remove(model)
    assert torch.equal(run(model), run(base))


class Experts(nn.Module):
    """Linear layers, of which one stays as it is, a convolution, raw attention weights and raw expert weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.up_proj = nn.Parameter(torch.randn(4, 8, 8))
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight


def test_the_report_names_what_was_left_out():
    model = Experts()
    report = inject(model, targets=["linear"])
    assert report.left_out == {
        "other matrices": {"up_proj": 4 * 64, "attention.in_proj_weight": 3 * 64},
        "convolutions": {"conv.weight": 3 * 64},
        "linear layers": {"attention.out_proj.weight": 64},
    }
    share = 100 * (4 + 3) * 64 / report.total
    assert f"left out: 2 other matrices ({share:.1f} % of the parameters), e.g. up_proj" in str(report)
