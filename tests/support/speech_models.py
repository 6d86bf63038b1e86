"""Tiny models of the speech families that have a preset. Without transformers, files that import this are skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import adapt, gradients, loss_of
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def whisper(**options) -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=51, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=20,
        max_target_positions=24, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None, **options,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _wav2vec2_like(config_class: str, model_class: str) -> Callable[..., nn.Module]:
    def make(**options) -> nn.Module:
        config = getattr(transformers, config_class)(
            vocab_size=12, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
            conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
            **{"layerdrop": 0.0, **options},
        )  # fmt: skip
        return getattr(transformers, model_class)(config)

    return make


# name -> (constructor, preset, transformer layers x adapted linear layers in each)
MODELS = {
    "whisper": (whisper, "whisper", 2 * 6 + 2 * 10),
    "wav2vec2": (_wav2vec2_like("Wav2Vec2Config", "Wav2Vec2Model"), "wav2vec2", 3 * 6),
    "wav2vec2-ctc": (_wav2vec2_like("Wav2Vec2Config", "Wav2Vec2ForCTC"), "wav2vec2", 3 * 6),
    "hubert": (_wav2vec2_like("HubertConfig", "HubertModel"), "hubert", 3 * 6),
    "wavlm": (_wav2vec2_like("WavLMConfig", "WavLMModel"), "wavlm", 3 * 6),
}


def adapted(name: str, seed: int = 1, **options) -> nn.Module:
    make, preset, _ = MODELS[name]
    return adapt(make(), seed, targets=preset, **options)


def llama() -> nn.Module:
    """A language model, which has no preset."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def inputs(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """In the model's dtype."""
    generator, dtype = torch.Generator().manual_seed(seed), next(model.parameters()).dtype
    if model.config.model_type == "llama":
        return {"input_ids": torch.randint(3, 32, (2, 6), generator=generator)}
    if model.config.model_type == "whisper":
        return {
            "input_features": torch.randn(2, 8, 40, generator=generator).to(dtype),
            "decoder_input_ids": torch.randint(3, 50, (2, 6), generator=generator),
        }
    return {"input_values": torch.randn(2, 200, generator=generator).to(dtype)}


def run(model: nn.Module, seed: int = 0) -> Tensor:
    torch.manual_seed(100 + seed)  # dropout
    return model(**inputs(model, seed))[0]


def assert_bit_identical(model: nn.Module, base: nn.Module) -> None:
    """Without gradients a frozen `base`: torch's product of a strided 3-D x (WavLM's) differs by an ulp otherwise."""
    frozen = copy.deepcopy(base).requires_grad_(False)
    for training in (True, False):
        for network in (base, model, frozen):
            network.train(training)
        assert torch.equal(run(model), run(base))
        for without_gradients in (torch.no_grad(), torch.inference_mode()):
            with without_gradients:
                assert torch.equal(run(model), run(frozen))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(model), run(base))
            with torch.no_grad():
                assert torch.equal(run(model), run(frozen))


def loss_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(run(model)).backward()
    return gradients(model)


def require_input_gradients(model: nn.Module) -> None:
    """What reentrant checkpointing needs of any model whose first layers are frozen."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Embedding)):
            module.register_forward_hook(lambda module, args, output: output.requires_grad_())


def scaled_passes(model: nn.Module) -> tuple[Tensor, Tensor]:
    """(output, all gradients) of a loss that is scaled for float16."""
    output = run(model)
    (2.0**10 * loss_of(output.to(torch.promote_types(output.dtype, torch.float32)))).backward()
    return output.detach(), torch.cat([grad.flatten() for grad in gradients(model).values()])
