"""Every preset that tests of its own do not serve, on a small model of the real class: what it adapts, and that all of
it trains, comes back and merges."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from bounds import assert_within
from models import inject, loss_of, references, train_randomly
from torch import Tensor, nn

import ssvd_kernels as sk

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LANGUAGE = {"vocab_size": 12, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, **SIZES}
FRONT_END = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SEAMLESS = {
    "vocab_size": 12, "hidden_size": 16, "feature_projection_input_dim": 8, "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 2, "speech_encoder_intermediate_size": 24, "decoder_layers": 2,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "conv_depthwise_kernel_size": 3, "adaptor_kernel_size": 2,
    "adaptor_stride": 2,
}  # fmt: skip
FRONT = {"feature_projection.projection"}
TOKENS = torch.tensor([[3, 4, 5, 6], [4, 3, 6, 5]])
PROMPT = torch.tensor([[3, 11, 11, 4, 5]] * 2)  # with a token for each vector of audio


class Case(NamedTuple):
    """Of each preset: a model, its inputs, how many layers are adapted, and the linear layers that are not."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    adapted: int
    left_out: set[str]


def of_transformers(name: str, config: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name)(getattr(transformers, config)(**options))


def of_speechbrain(module: str, name: str, **options: Any) -> nn.Module:
    return getattr(pytest.importorskip("test_speechbrain")._speechbrain(module)[0], name)(**options)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


CASES = {
    "wav2vec2-conformer": Case(
        partial(
            of_transformers, "Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", vocab_size=12, **SIZES, **FRONT_END,
            **POSITIONS, conv_depthwise_kernel_size=3, position_embeddings_type="relative",
        ),
        {"input_values": noise(2, 200), "labels": TOKENS}, 2 * 9, FRONT | {"lm_head"},
    ),
    "wav2vec2-bert": Case(
        partial(
            of_transformers, "Wav2Vec2BertForCTC", "Wav2Vec2BertConfig", vocab_size=12, **SIZES,
            feature_projection_input_dim=8, conv_depthwise_kernel_size=3, add_adapter=True,
            use_intermediate_ffn_before_adapter=True,
        ),
        {"input_features": noise(2, 20, 8), "labels": TOKENS}, 2 * 8 + 2 + 6,
        FRONT | {"lm_head"},
    ),
    "seamless_m4t": Case(
        partial(of_transformers, "SeamlessM4TForSpeechToText", "SeamlessM4TConfig", **SEAMLESS, **POSITIONS),
        {"input_features": noise(2, 20, 8), "labels": TOKENS}, 2 * 9 + 2 + 6 + 2 * 10, FRONT,
    ),
    "seamless_m4t_v2": Case(
        partial(of_transformers, "SeamlessM4Tv2ForSpeechToText", "SeamlessM4Tv2Config", **SEAMLESS),
        {"input_features": noise(2, 20, 8), "labels": TOKENS}, 2 * 8 + 2 + 6 + 2 * 10, FRONT,
    ),
    "parakeet": Case(
        partial(
            of_transformers, "ParakeetForCTC", "ParakeetCTCConfig", vocab_size=12, pad_token_id=0,
            encoder_config={**SIZES, "num_mel_bins": 16, "subsampling_conv_channels": 4, "subsampling_factor": 4},
        ),
        {"input_features": noise(2, 40, 16), "attention_mask": torch.ones(2, 40, dtype=torch.long), "labels": TOKENS},
        2 * 9, {"subsampling.linear"},
    ),
    "moonshine": Case(
        partial(
            of_transformers, "MoonshineForConditionalGeneration", "MoonshineConfig", vocab_size=12, hidden_size=16,
            intermediate_size=24, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
            encoder_num_attention_heads=2, decoder_num_attention_heads=2, pad_token_id=0,
        ),
        {"input_values": noise(2, 2000), "labels": TOKENS}, 2 * 6 + 2 * 10, set(),
    ),
    "speecht5": Case(
        partial(
            of_transformers, "SpeechT5ForSpeechToText", "SpeechT5Config", vocab_size=12, hidden_size=16,
            decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=24, encoder_layers=2,
            encoder_attention_heads=2, encoder_ffn_dim=24, **FRONT_END, **POSITIONS,
        ),
        {"input_values": noise(2, 200), "labels": TOKENS}, 2 * 6 + 2 * 10, FRONT,
    ),
    "qwen2_audio": Case(
        partial(
            of_transformers, "Qwen2AudioForConditionalGeneration", "Qwen2AudioConfig", audio_token_index=11,
            audio_config={"num_mel_bins": 8, "max_source_positions": 4, "encoder_layers": 2,
                          "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "d_model": 16},
            text_config={"model_type": "qwen2", **LANGUAGE},
        ),
        {
            "input_ids": PROMPT, "labels": PROMPT, "attention_mask": torch.ones(2, 5, dtype=torch.long),
            "input_features": noise(2, 8, 8), "feature_attention_mask": torch.ones(2, 8, dtype=torch.long),
        },
        2 * 6 + 2 * 7, {"multi_modal_projector.linear", "lm_head"},
    ),
    "voxtral": Case(
        partial(
            of_transformers, "VoxtralForConditionalGeneration", "VoxtralConfig", audio_token_id=11,
            audio_config={"num_mel_bins": 8, "max_source_positions": 8, **SIZES, "intermediate_size": 64},
            text_config={"model_type": "llama", **LANGUAGE},
        ),
        {"input_ids": PROMPT, "labels": PROMPT, "input_features": noise(2, 8, 16)},
        2 * 6 + 2 * 7, {"multi_modal_projector.linear_1", "multi_modal_projector.linear_2", "lm_head"},
    ),
    "granite_speech": Case(
        partial(
            of_transformers, "GraniteSpeechForConditionalGeneration", "GraniteSpeechConfig", audio_token_index=11,
            has_lora_adapter=False, downsample_rate=2, window_size=4, text_config={"model_type": "granite", **LANGUAGE},
            encoder_config={"input_dim": 8, "num_layers": 2, "hidden_dim": 16,
                            "feedforward_mult": 2, "num_heads": 2, "dim_head": 8, "output_dim": 10, "context_size": 8,
                            "max_pos_emb": 16, "conv_kernel_size": 3},
            projector_config={**SIZES, "encoder_hidden_size": 16,
                              "cross_attention_frequency": 1},
        ),
        {"input_ids": PROMPT, "labels": PROMPT, "input_features": noise(2, 4, 8)},
        2 * 7 + 2 * 10 + 2 * 7, {"encoder.input_linear", "encoder.out", "encoder.out_mid", "projector.linear"},
    ),
    "speechbrain": Case(
        partial(
            of_speechbrain, "lobes.models.transformer.TransformerASR", "TransformerASR", tgt_vocab=12, input_size=8,
            d_model=16, nhead=2, num_encoder_layers=2, num_decoder_layers=2, d_ffn=24, encoder_module="conformer",
            attention_type="RelPosMHAXL", kernel_size=3, causal=False,
            normalize_before=True,
        ),
        {"src": noise(2, 10, 8), "tgt": TOKENS}, 2 * 7 + 2 * 4, {"custom_src_module.layers.0.w"},
    ),
    "ecapa": Case(
        partial(
            of_speechbrain, "lobes.models.ECAPA_TDNN", "ECAPA_TDNN", input_size=8, lin_neurons=12,
            channels=[8, 16, 16, 16, 48], attention_channels=8, res2net_scale=4, se_channels=8,
        ),
        {"x": noise(2, 30, 8)}, 17, set(),
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request) -> tuple[str, Case, Callable[[], nn.Module]]:
    case = CASES[request.param]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return case.make().eval()

    return request.param, case, make


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(output, loss)."""
    found = model(**inputs)
    if "labels" in inputs:
        return found.logits, found.loss
    found = found if isinstance(found, Tensor) else torch.cat([part.flatten() for part in found])
    return found, loss_of(found)


def test_what_it_adapts_trains_comes_back_and_merges(case, tmp_path):
    name, (_, inputs, count, left_out), make = case
    model, again = make(), make()
    report = inject(model, targets=name)
    left = [key.removesuffix(".weight") for key in report.left_out.get("linear layers", ())]
    assert len(report.modules) == count
    assert len(left) == len(left_out) and all(key.endswith(tuple(left_out)) for key in left)
    assert sk.check_training(train_randomly(model), outputs(model, inputs)[1]).ok == report.modules
    sk.save_adapter(model, tmp_path / "a.safetensors")
    sk.load_adapter(again, tmp_path / "a.safetensors", progress=False)
    with torch.no_grad():
        found = outputs(model, inputs)[0]
        assert torch.equal(outputs(again, inputs)[0], found)
        sk.merge(again, unload=True)
        assert not sk.adapted_layers(again)
        assert_within(found, *references(again, lambda network: outputs(network, inputs)[0]))


def test_one_that_fits_blocks_in_part_says_what_it_leaves_out():
    with pytest.warns(UserWarning, match="'wav2vec2' .* only in part: .* 44 % .*: self_attn.linear_q,"):
        inject(CASES["wav2vec2-bert"].make(), targets="wav2vec2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(CASES["wav2vec2-bert"].make(), targets="wav2vec2-bert", exclude=["linear_q"])
