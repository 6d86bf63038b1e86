"""A tiny Whisper as CTranslate2 writes it, tones as speech, and a manifest of them, for the speech experiment's tests.

A test file that imports this is skipped on a machine without the extra `demo`.
"""

# ruff: noqa: E402  (the imports below need that extra)
from __future__ import annotations

import csv
import json
import struct
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

for _needed in ("transformers", "av", "jiwer", "matplotlib", "tokenizers"):
    pytest.importorskip(_needed, reason="the speech experiment needs the extra `demo`")

import av
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperForConditionalGeneration

from experiments.asr import fetch, speech
from experiments.asr.audio import RATE
from experiments.asr.whisper_ct2 import DTYPES

SPECIALS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|startofprev|>", "<|notimestamps|>"]


def tiny_tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    specials = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def tiny_model(tokenizer: Tokenizer) -> WhisperForConditionalGeneration:
    start, end = (tokenizer.token_to_id(name) for name in ("<|startoftranscript|>", "<|endoftext|>"))
    config = WhisperConfig(vocab_size=tokenizer.get_vocab_size(), num_mel_bins=8, d_model=16, encoder_layers=2,
                           decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=4, encoder_ffn_dim=24,
                           decoder_ffn_dim=20, max_source_positions=100, max_target_positions=64,
                           decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end,
                           suppress_tokens=None, begin_suppress_tokens=None)  # fmt: skip
    torch.manual_seed(1)
    return WhisperForConditionalGeneration(config).eval()


def ct2_variables(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    config, found = model.config, {}

    def put(target: str, *sources: str) -> None:
        weights = [state[f"model.{s}.weight"] for s in sources]
        biases = [state.get(f"model.{s}.bias", np.zeros(len(w), np.float32)) for s, w in zip(sources, weights)]
        found[f"{target}/weight"], found[f"{target}/bias"] = np.concatenate(weights), np.concatenate(biases)

    def norm(target: str, source: str) -> None:
        found[f"{target}/gamma"], found[f"{target}/beta"] = (state[f"model.{source}.{n}"] for n in ("weight", "bias"))

    for side, layers, heads in (("encoder", config.encoder_layers, 2), ("decoder", config.decoder_layers, 4)):
        found[f"{side}/num_heads"] = np.array(heads, np.int16)
        found[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for i in range(layers):
            ours, theirs = f"{side}/layer_{i}", f"{side}.layers.{i}"
            put(f"{ours}/self_attention/linear_0", *(f"{theirs}.self_attn.{n}_proj" for n in "qkv"))
            put(f"{ours}/self_attention/linear_1", f"{theirs}.self_attn.out_proj")
            norm(f"{ours}/self_attention/layer_norm", f"{theirs}.self_attn_layer_norm")
            if side == "decoder":
                put(f"{ours}/attention/linear_0", f"{theirs}.encoder_attn.q_proj")
                put(f"{ours}/attention/linear_1", *(f"{theirs}.encoder_attn.{n}_proj" for n in "kv"))
                put(f"{ours}/attention/linear_2", f"{theirs}.encoder_attn.out_proj")
                norm(f"{ours}/attention/layer_norm", f"{theirs}.encoder_attn_layer_norm")
            put(f"{ours}/ffn/linear_0", f"{theirs}.fc1")
            put(f"{ours}/ffn/linear_1", f"{theirs}.fc2")
            norm(f"{ours}/ffn/layer_norm", f"{theirs}.final_layer_norm")
    put("encoder/conv1", "encoder.conv1")
    put("encoder/conv2", "encoder.conv2")
    found["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    return found


def write_ct2(path: Path, variables: dict[str, np.ndarray], version: int = 6, spec: str = "WhisperSpec") -> None:
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    codes = {dtype: code for code, dtype in DTYPES.items()}
    out = struct.pack("<I", version) + string(spec) + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        head = struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        out += string(name) + head + struct.pack("<BI", codes[array.dtype], array.nbytes) + array.tobytes()
    out += struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight")
    path.write_bytes(out)


def write_ct2_folder(folder: Path) -> SimpleNamespace:
    """The tiny model, and what it was written from."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"lang_ids": [tokenizer.token_to_id("<|en|>")], "suppress_ids": [1], "suppress_ids_begin": [2]}
    (folder / "config.json").write_text(json.dumps(settings))
    variables = ct2_variables(model)
    write_ct2(folder / "model.bin", variables)
    return SimpleNamespace(path=folder, model=model, variables=variables)


def logits(model: WhisperForConditionalGeneration) -> torch.Tensor:
    mel = torch.randn(2, 8, 200, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_features=mel, decoder_input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]])).logits


def real_data(*names: str) -> Path:
    """The folder that holds these parts whole, or a skip."""
    folder = fetch.default_data()
    if broken := [f"{name}: {why}" for name in names if (why := fetch.damage(folder / name))]:
        pytest.skip(f"no real data in {folder} ({'; '.join(broken)}): python -m experiments.asr.fetch --all gets them")
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def encode(path: Path, codec: str, samples: np.ndarray, rate: int = RATE, bit_rate: int = 32000) -> Path:
    """Mono samples at 16 kHz in the file format that the name tells."""
    frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
    frame.sample_rate = RATE
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = "mono"
        stream.bit_rate = bit_rate
        made = av.AudioResampler(format=stream.codec_context.format or "flt", layout="mono", rate=rate).resample(frame)
        container.mux([packet for each in (*made, None) for packet in stream.encode(each)])
    return path


def float_wav(path: Path, samples: np.ndarray) -> Path:
    """Samples (n, channels) at 16 kHz as a 32-bit float WAV file."""
    data, channels = samples.astype("<f4").tobytes(), samples.shape[1]
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, channels, RATE, 4 * channels * RATE, 4 * channels, 32)
    path.write_bytes(
        struct.pack("<4sI4s", b"RIFF", 36 + len(data), b"WAVE") + form + struct.pack("<4sI", b"data", len(data)) + data
    )
    return path


def tone(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def pitch(samples: np.ndarray) -> float:
    """The loudest frequency, to the 1 / seconds Hz of a Fourier transform: what its comparisons allow."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * RATE / len(samples))


def tone_clips(folder: Path) -> speech.Speech:
    """Five short clips, each a tone of another pitch."""
    made = [speech.Clip(str(i), f"text {i}", write_wav(folder / f"{i}.wav", tone(150 + 90 * i, 1.2))) for i in range(5)]
    return speech.Speech(made, "test")


def write_built_in(data: Path) -> None:
    """Under `data` 40 English prompts of silence, and two sets of four tones, of which the last lasts too long."""
    (prompts := data / fetch.ASTERISK / "audio").mkdir(parents=True)
    lines = [f"p{i}: This is prompt number {i}.\n" for i in range(40)]
    prompts.with_name("prompts.txt").write_text("".join(lines))
    for i in range(len(lines)):
        (prompts / f"p{i}.g722").write_bytes(bytes(4000))  # half a second
    for name in ("librivox", "cards"):
        (folder := data / fetch.SPHINX / name).mkdir(parents=True)
        (folder / "test.transcription").write_text("".join(f"<s> words of {i} </s> ({i})\n" for i in range(4)))
        for i in range(4):
            write_wav(folder / f"{i}.wav", tone(300, 1 if i < 3 else speech.MAX_PROMPT_SECONDS + 1))


def manifest(folder: Path, *lines: object) -> Path:
    path = folder / "m.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def command(folder: Path, count: int, step: float, seconds: float) -> list[str]:
    """Arguments for the tiny model and a manifest of `count` tones, `step` Hz apart."""
    files = [write_wav(folder / f"{i}.wav", tone(150 + step * i, seconds)) for i in range(count)]
    lines = manifest(folder, *({"audio": file.name, "text": f"tone number {file.stem}"} for file in files))
    model = write_ct2_folder(folder).path
    return ["--model", str(model), "--manifest", str(lines), "--no-source", "--device", "cpu"]
