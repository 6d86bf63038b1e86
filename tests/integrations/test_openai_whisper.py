"""OpenAI's own Whisper, whose linear layers cast their weights to the input's dtype, and ESPnet's encoder of it."""

from __future__ import annotations

import copy

import pytest
import torch
from models import adapt, assert_all_within, gradients, loss_of, references
from torch import Tensor, nn

import ssvd_kernels as sk

whisper = pytest.importorskip("whisper", reason="needs OpenAI's package: pip install openai-whisper")

LAYERS = 2 * 6 + 2 * 10  # in two blocks each of an encoder and a decoder


def base_model(vocabulary: int = 51) -> nn.Module:
    torch.manual_seed(3)
    model = whisper.Whisper(whisper.ModelDimensions(80, 1500, 16, 2, 2, vocabulary, 24, 16, 2, 2)).eval()
    nn.init.normal_(model.decoder.positional_embedding)  # which comes uninitialised
    return model


def run(model: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    mel, tokens = torch.randn(1, 80, 3000, generator=generator), torch.randint(3, 50, (1, 6), generator=generator)
    return model(mel.to(dtype or next(model.parameters()).dtype), tokens)


def loss_gradients(model: nn.Module) -> dict[str, Tensor]:
    loss_of(run(model)).backward()
    return gradients(model)


@pytest.mark.parametrize("targets", ["whisper", "all-linear", r".*\.(query|key|value|out|\d)"])
def test_targets_and_what_is_given_back(targets):
    base, model = base_model(), base_model()
    report = sk.inject(model, sk.SSVDConfig(rank=5, targets=targets), progress=False)
    assert len(report.modules) == LAYERS and "linear layers" not in report.left_out
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(run(model, dtype), run(base, dtype))
    sk.merge(model, unload=True)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


def test_training():
    model = adapt(base_model(), targets="whisper").train()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm  # Whisper's own computes in float32 only, the same
    assert_all_within(loss_gradients(model), *references(model, loss_gradients))


@pytest.mark.parametrize("fp16", [True, False])
def test_decoding_with_its_cache_of_keys_and_values(fp16):
    """fp16=True is Whisper's default on GPUs: half-precision x over float32 weights."""
    model, mel = adapt(base_model(51864), targets="whisper"), torch.randn(1, 80, 3000)
    options = whisper.DecodingOptions(fp16=fp16, language="en", without_timestamps=True, sample_len=6, beam_size=2)
    tokens = [result.tokens for result in whisper.decode(model, mel, options)]
    base = [result.tokens for result in whisper.decode(base_model(51864), mel, options)]
    sk.merge(model, unload=True)
    assert tokens == [result.tokens for result in whisper.decode(model, mel, options)] != base


def test_through_peft():
    peft = pytest.importorskip("peft")
    from ssvd_kernels.integrations.peft import SSVDPeftConfig

    config, twin = SSVDPeftConfig(rank=5, target_modules="whisper"), adapt(base_model(), targets="whisper")
    model = peft.get_peft_model(base_model(), config)
    for ours, theirs in zip(*([p for p in m.parameters() if p.requires_grad] for m in (model, twin)), strict=True):
        ours.data.copy_(theirs.data)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(run(model.base_model.model, dtype), run(twin, dtype))


def test_espnet_s_encoder(monkeypatch):
    create_adapter = pytest.importorskip("espnet_models").create_adapter
    from espnet2.asr.encoder.whisper_encoder import OpenAIWhisperEncoder

    monkeypatch.setattr(whisper.audio, "N_MELS", 80, raising=False)  # older releases had it, and ESPnet asks for it
    monkeypatch.setattr(whisper, "load_model", lambda *args, **kwargs: base_model())
    encoder = OpenAIWhisperEncoder(whisper_model="tiny")
    twin, speech = copy.deepcopy(encoder), (torch.randn(2, 8000), torch.tensor([8000, 6000]))
    conf = {"rank": 5, "rotation_map": "cayley", "weights": "now", "target_modules": ["attn.query", "mlp.0"]}
    create_adapter(encoder, "ssvd_kernels", conf)
    assert len(sk.ssvd_layers(encoder)) == 2 * 2
    assert torch.equal(encoder(*speech)[0], twin(*speech)[0])
    loss_of(encoder(*speech)[0]).backward()
    for layer in sk.ssvd_layers(encoder).values():
        assert bool(layer.theta.grad.any()) and bool(layer.delta_sigma.grad.any())
