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

from ssvd_kernels.integrations.peft import SSVDPeftConfig
from ssvd_kernels.integrations.peft_layer import SSVDPeftLinear

RANK = models.RANK
ROOT = Path(__file__).resolve().parents[2]
# name -> (constructor, adapted layers where the configuration names none)
MODELS = {name: (make, count) for name, (make, _, count) in speech_models.MODELS.items()}
MODELS["llama"] = speech_models.llama, 2 * 7
inputs, run = speech_models.inputs, speech_models.run


def base_model(name: str = "whisper", seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name][0]().eval()


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


def in_new_process(program: str, **environment: str) -> None:
    """Runs `program` in another interpreter, which must end well."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support", ROOT / "tests" / "integrations")))
    command, env = [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
