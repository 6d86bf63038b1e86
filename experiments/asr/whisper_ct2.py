"""Reads a Whisper model in CTranslate2's binary format (model.bin, format 6) into transformers' Whisper.

The file, little-endian: uint32 format, string spec, uint32 revision, uint32 number of variables; per variable a string
name, uint8 rank, rank x uint32 dimensions, uint8 dtype, uint32 bytes, data; then uint32 number of aliases and as many
string pairs (alias, variable). A string is a uint16 length, its NUL included, and the bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from experiments.asr import DemoError

FORMAT = 6
MULTILINGUAL = 51865  # tokens at least; the English-only vocabulary is one token shorter
DTYPES: dict[int, np.dtype] = {
    0: np.dtype("<f4"),
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
}


@dataclass
class CT2File:
    spec: str
    revision: int
    variables: dict[str, NDArray]


def _unpack(stream: BinaryIO, layout: str) -> tuple[int, ...]:
    size = struct.calcsize("<" + layout)
    data = stream.read(size)
    if len(data) != size:
        raise DemoError(f"{stream.name}: ends early, at byte {stream.tell()}: the file is truncated")
    return struct.unpack("<" + layout, data)


def _string(stream: BinaryIO) -> str:
    (length,) = _unpack(stream, "H")
    return b"".join(_unpack(stream, f"{length}s")).rstrip(b"\0").decode()  # type: ignore[arg-type]


def read_ct2(path: Path) -> CT2File:
    """All variables of the file by name, aliases included. Raises DemoError where it isn't a whole format-6 file."""
    with path.open("rb") as stream:
        (version,) = _unpack(stream, "I")
        if version != FORMAT:
            raise DemoError(f"{path}: must have CTranslate2 format {FORMAT}, got {version}")
        spec = _string(stream)
        revision, count = _unpack(stream, "II")
        variables: dict[str, NDArray] = {}
        for _ in range(count):
            name = _string(stream)
            (rank,) = _unpack(stream, "B")
            shape = _unpack(stream, f"{rank}I")
            code, size = _unpack(stream, "BI")
            if code not in DTYPES:
                raise DemoError(f"{path}: {name} must have one of the dtype codes {sorted(DTYPES)}, got {code}")
            expected = int(np.prod(shape, dtype=np.int64)) * DTYPES[code].itemsize
            if size != expected:
                raise DemoError(f"{path}: {name} {shape} must take {expected} bytes, got {size}")
            (data,) = _unpack(stream, f"{size}s")
            variables[name] = np.frombuffer(data, DTYPES[code]).reshape(shape)  # type: ignore[call-overload]
        for _ in range(_unpack(stream, "I")[0]):
            alias, name = _string(stream), _string(stream)
            if name not in variables:
                raise DemoError(f"{path}: alias {alias} names {name}, which the file does not contain")
            variables[alias] = variables[name]
        if stream.read(1):
            raise DemoError(f"{path}: continues after its end, at byte {stream.tell() - 1}")
    return CT2File(spec, revision, variables)


def is_ct2_whisper(folder: Path) -> bool:
    """Whether the folder holds a CTranslate2 Whisper model (and not a Hugging Face one)."""
    path = folder / "model.bin"
    return path.is_file() and path.open("rb").read(17)[4:] == struct.pack("<H", 12) + b"WhisperSpec"


class _Variables:
    """Takes the variables one by one, as float32 tensors, and remembers which were asked for."""

    def __init__(self, path: Path, variables: dict[str, NDArray]) -> None:
        self.path, self.variables, self.used = path, variables, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.variables:
            raise DemoError(f"{self.path}: has no variable {name}: not a Whisper model that this reader knows")
        array = self.variables[name]
        if array.dtype.kind != "f":
            raise DemoError(f"{self.path}: {name} must be float16 or float32, got {array.dtype}")
        self.used.add(name)
        return torch.from_numpy(array.astype(np.float32))

    def count_layers(self, side: str) -> int:
        return len(
            {
                name.split("/")[1]
                for name in self.variables
                if name.startswith(f"{side}/layer_") and name.split("/")[1].removeprefix("layer_").isdigit()
            }
        )


def _config(v: _Variables, ids: dict[str, int]) -> WhisperConfig:
    conv, ffn = v["encoder/conv1/weight"], v["encoder/layer_0/ffn/linear_0/weight"]
    return WhisperConfig(
        vocab_size=v["decoder/embeddings/weight"].shape[0],
        num_mel_bins=conv.shape[1],
        d_model=conv.shape[0],
        encoder_layers=v.count_layers("encoder"),
        decoder_layers=v.count_layers("decoder"),
        encoder_attention_heads=int(v.variables["encoder/num_heads"]),
        decoder_attention_heads=int(v.variables["decoder/num_heads"]),
        encoder_ffn_dim=ffn.shape[0],
        decoder_ffn_dim=v["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=v["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=v["decoder/position_encodings/encodings"].shape[0],
        decoder_start_token_id=ids["<|startoftranscript|>"],
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def _state_dict(v: _Variables, config: WhisperConfig) -> dict[str, Tensor]:
    d = config.d_model
    state: dict[str, Tensor] = {}

    def linear(target: str, source: str, rows: slice = slice(None), bias: bool = True) -> None:
        state[f"{target}.weight"] = v[f"{source}/weight"][rows].clone()
        if bias:
            state[f"{target}.bias"] = v[f"{source}/bias"][rows].clone()
        elif v[f"{source}/bias"][rows].any():
            raise DemoError(f"{v.path}: {source}/bias has a key bias, which Whisper does not have")

    def norm(target: str, source: str) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = v[f"{source}/gamma"], v[f"{source}/beta"]

    def layer(target: str, source: str, cross: bool) -> None:
        norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
        for i, name in enumerate("qkv"):
            rows = slice(i * d, (i + 1) * d)
            linear(f"{target}.self_attn.{name}_proj", f"{source}/self_attention/linear_0", rows, bias=name != "k")
        linear(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
        if cross:
            norm(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
            linear(f"{target}.encoder_attn.q_proj", f"{source}/attention/linear_0")
            linear(f"{target}.encoder_attn.k_proj", f"{source}/attention/linear_1", slice(0, d), bias=False)
            linear(f"{target}.encoder_attn.v_proj", f"{source}/attention/linear_1", slice(d, 2 * d))
            linear(f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2")
        norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
        linear(f"{target}.fc1", f"{source}/ffn/linear_0")
        linear(f"{target}.fc2", f"{source}/ffn/linear_1")

    for side, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        state[f"model.{side}.embed_positions.weight"] = v[f"{side}/position_encodings/encodings"]
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(count):
            layer(f"model.{side}.layers.{i}", f"{side}/layer_{i}", cross=side == "decoder")
    linear("model.encoder.conv1", "encoder/conv1")
    linear("model.encoder.conv2", "encoder/conv2")
    state["model.decoder.embed_tokens.weight"] = v["decoder/embeddings/weight"]
    state["proj_out.weight"] = v["decoder/projection/weight"]
    return state


def _generation_config(config: WhisperConfig, ids: dict[str, int], settings: dict) -> GenerationConfig:
    languages = {name: i for name, i in ids.items() if i in set(settings["lang_ids"])}
    multilingual = config.vocab_size >= MULTILINGUAL
    return GenerationConfig(
        max_length=config.max_target_positions,
        decoder_start_token_id=config.decoder_start_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        is_multilingual=multilingual,
        **(
            {"lang_to_id": languages, "task_to_id": {t: ids[f"<|{t}|>"] for t in ("transcribe", "translate")}}
            if multilingual
            else {}
        ),
    )


def load_whisper_ct2(
    folder: Path,
) -> tuple[WhisperForConditionalGeneration, PreTrainedTokenizerFast, WhisperFeatureExtractor]:
    """Model in float32, tokenizer and feature extractor from model.bin, config.json and tokenizer.json of `folder`.

    Every variable of the file must find its place and every parameter of the model its variable.
    """
    path = folder / "model.bin"
    file = read_ct2(path)
    if file.spec != "WhisperSpec":
        raise DemoError(f"{path}: must contain a WhisperSpec, got {file.spec}")
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise DemoError(f"{path}: {name} is missing beside it")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    ids = tokenizer.get_vocab()
    variables = _Variables(path, file.variables)
    config = _config(variables, ids)
    state = _state_dict(variables, config)
    unused = {n for n, a in file.variables.items() if a.ndim > 0} - variables.used
    if unused:
        raise DemoError(f"{path}: {sorted(unused)} have no counterpart in transformers' Whisper")
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state, strict=True)
    model.tie_weights()
    model.generation_config = _generation_config(config, ids, settings)
    return model.eval(), tokenizer, WhisperFeatureExtractor(feature_size=config.num_mel_bins)
