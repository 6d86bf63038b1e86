"""Tiny models of ESPnet's own classes and a task for its trainer. Tests that import this are skipped without it."""

from __future__ import annotations

import importlib.util
import sys
import types
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssvd_kernels.integrations import espnet as integration

pytest.importorskip("espnet2", reason="needs ESPnet: pip install '.[espnet]' && pip install --no-deps espnet")


@contextmanager
def _torchaudio():
    """ESPnet imports torchaudio beside what is used here: where there is none, an empty module does for that."""
    if importlib.util.find_spec("torchaudio") is None:
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
        yield
        del sys.modules["torchaudio"]
    else:
        yield


with _torchaudio():
    import espnet2.layers.create_adapter
    from espnet2.asr.ctc import CTC
    from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
    from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder
    from espnet2.asr.encoder.transformer_encoder import TransformerEncoder
    from espnet2.asr.espnet_model import ESPnetASRModel
    from espnet2.tasks.abs_task import AbsTask
    from espnet2.torch_utils.load_pretrained_model import load_pretrained_model
    from espnet2.train.trainer import Trainer

__all__ = ["load_pretrained_model"]
create_adapter = espnet2.layers.create_adapter.create_adapter
TOKENS = ["<blank>", "<unk>", "a", "b", "c", "<sos/eos>"]
FEATURES, FRAMES, UTTERANCES = 8, 24, 4

integration.register()


def encoder(kind: str) -> nn.Module:
    common = {"output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 2, "dropout_rate": 0.0}
    common |= {"positional_dropout_rate": 0.0, "attention_dropout_rate": 0.0, "input_layer": "linear"}
    if kind == "transformer":
        return TransformerEncoder(FEATURES, **common)
    common |= {"use_ffn": True, "macaron_ffn": True, "cgmlp_linear_units": 40, "cgmlp_conv_kernel": 3}
    return EBranchformerEncoder(FEATURES, **common, merge_conv_kernel=3)


def asr_model(kind: str = "e_branchformer") -> ESPnetASRModel:
    """Encoder of `kind`, Transformer decoder and CTC in evaluation mode, with random weights."""
    sizes = {"attention_heads": 2, "linear_units": 24, "num_blocks": 2}
    decoder = TransformerDecoder(len(TOKENS), 16, **sizes, dropout_rate=0.0, positional_dropout_rate=0.0)
    model = ESPnetASRModel(
        len(TOKENS), TOKENS, None, None, None, None, encoder(kind), None, decoder, CTC(len(TOKENS), 16), None,
        report_cer=False, report_wer=False,
    )  # fmt: skip
    return model.eval()


def batch(seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "speech": torch.randn(2, FRAMES, FEATURES, generator=generator),
        "speech_lengths": torch.tensor([FRAMES, FRAMES - 3]),
        "text": torch.tensor([[2, 3, 4], [4, 2, -1]]),
        "text_lengths": torch.tensor([3, 2]),
    }


def outputs(model: ESPnetASRModel) -> Tensor:
    """What encoder and decoder compute for `batch`: the encoder's frames and the decoder's scores, in one vector."""
    given = batch()
    with torch.no_grad():
        frames, lengths = model.encode(given["speech"], given["speech_lengths"])
        scores, _ = model.decoder(frames, lengths, given["text"].clamp(min=0), given["text_lengths"])
    return torch.cat([frames.flatten(), scores.flatten()])


def _collate(utterances: list[tuple[str, dict[str, np.ndarray]]]) -> tuple[list[str], dict[str, Tensor]]:
    """(names, batch) of utterances of one length."""
    names, values = zip(*utterances)
    joined = {name: torch.tensor(np.stack([value[name] for value in values])) for name in values[0]}
    lengths = {f"{name}_lengths": torch.tensor([len(row) for row in rows]) for name, rows in joined.items()}
    return list(names), {**joined, **lengths}


class TinyTask(AbsTask):
    """`asr_model` under ESPnet's command line, trainer and loader."""

    num_optimizers = 1
    trainer = Trainer

    @classmethod
    def add_task_arguments(cls, parser) -> None:
        parser.add_argument("--encoder", default="e_branchformer")

    @classmethod
    def build_model(cls, args) -> ESPnetASRModel:
        return asr_model(args.encoder)

    @classmethod
    def build_collate_fn(cls, args, train):
        return _collate

    @classmethod
    def build_preprocess_fn(cls, args, train):
        return None

    @classmethod
    def required_data_names(cls, train=True, inference=False):
        return ("speech", "text")

    @classmethod
    def optional_data_names(cls, train=True, inference=False):
        return ()


def write_data(folder: Path) -> list[str]:
    """Random features and texts in ESPnet's formats; the arguments that name them."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    scp, text, shapes = [], [], []
    for index in range(UTTERANCES):
        np.save(folder / f"{index}.npy", generator.standard_normal((FRAMES, FEATURES)).astype(np.float32))
        scp.append(f"utt{index} {folder / f'{index}.npy'}")
        text.append(f"utt{index} " + " ".join(map(str, generator.integers(2, 5, size=3))))
        shapes.append(f"utt{index} {FRAMES},{FEATURES}")
    for name, lines in (("feats.scp", scp), ("text", text), ("shape", shapes)):
        (folder / name).write_text("\n".join(lines) + "\n")
    arguments = []
    for part in ("train", "valid"):
        for data in (f"{folder / 'feats.scp'},speech,npy", f"{folder / 'text'},text,text_int"):
            arguments += [f"--{part}_data_path_and_name_and_type", data]
        arguments += [f"--{part}_shape_file", str(folder / "shape")]
    return arguments


def trained_part(model: nn.Module) -> dict:
    """What ESPnet saves under save_strategy required_grad_only."""
    state = model.state_dict()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            state.pop(name)
    return state


def init_param(model: nn.Module, path, ignore_init_mismatch: bool = False) -> None:
    load_pretrained_model(str(path), model, ignore_init_mismatch)
