"""Tiny models under PEFT. A test file that imports this is skipped without peft or transformers."""

# ruff: noqa: E402  (the imports below need that extra)
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="PEFT's integration needs the extra `peft`")
transformers = pytest.importorskip("transformers", reason="PEFT's integration is tested on transformers' models")

import models
import speech_models

import ssvd_kernels as sk
from ssvd_kernels.config import PRESETS
from ssvd_kernels.integrations.peft import SSVDPeftConfig
from ssvd_kernels.integrations.peft_layer import SSVDPeftLinear

RANK = models.RANK
ROOT = Path(__file__).resolve().parents[2]


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


# name -> (constructor, adapted layers where the configuration names none)
MODELS = {**{name: (make, count) for name, (make, _, count) in speech_models.MODELS.items()}, "llama": (llama, 2 * 7)}


def base_model(name: str = "whisper", seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name][0]().eval()


def inputs(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    if model.config.model_type == "llama":
        return {"input_ids": torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(seed))}
    return speech_models.inputs(model, seed)


def run(model: nn.Module, seed: int = 0) -> Tensor:
    """The output, in the model's dtype."""
    torch.manual_seed(100 + seed)  # dropout
    dtype = next(model.parameters()).dtype
    cast = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs(model, seed).items()}
    return model(**cast)[0]


def config(**options) -> SSVDPeftConfig:
    return SSVDPeftConfig(**({"rank": RANK} if "ratio" not in options else {}) | options)


def adapted(name: str = "whisper", **options) -> nn.Module:
    """A PEFT model with one adapter that was trained, in eval."""
    return models.train_randomly(peft.get_peft_model(base_model(name), config(**options))).eval()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By the layer's name and the parameter's own, as in a plain model's."""
    return {name.replace(".ssvd_adapter.default", ""): grad for name, grad in models.gradients(model).items()}


def loss_gradients(model: nn.Module) -> dict[str, Tensor]:
    models.loss_of(run(model)).backward()
    return gradients(model)


def layers(model: nn.Module) -> dict[str, SSVDPeftLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SSVDPeftLinear)}


def twin_in_place(name: str, adapter: dict[str, Tensor], **options) -> nn.Module:
    """The base model injected by this package itself, with the tensors of a PEFT adapter: what PEFT's must equal."""
    model = base_model(name)
    targets = name if name in PRESETS else "all-linear"
    report = sk.inject(model, sk.SSVDConfig(rank=RANK, targets=targets, **options), progress=False)
    for path, layer in zip(report.modules, report.layers, strict=True):
        for key in ("theta", "delta_sigma", "theta_out"):
            if getattr(layer, key) is not None:
                with torch.no_grad():
                    getattr(layer, key).copy_(adapter[f"base_model.model.{path}.ssvd_adapter.{key}"])
    return model


def in_new_process(program: str, **environment: str) -> None:
    """Runs `program` in another interpreter, which must end well."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support", ROOT / "tests" / "integrations")))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
