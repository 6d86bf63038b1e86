"""transformers' models as users quantise them: by from_pretrained. Skipped without transformers or accelerate."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from quantized_nets import needs
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers needs accelerate to quantise")

_CONFIGS = {
    "nf4": lambda: transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
    "torchao_int8": lambda: transformers.TorchAoConfig(
        importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()
    ),
}
KINDS = [*(needs("bitsandbytes", kind) for kind in ("nf4", "int8")), needs("torchao", "torchao_int8")]


def quantized(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model that was saved in `folder`, in eval; what is not quantised is in `dtype`."""
    load = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0]).from_pretrained
    return load(folder, quantization_config=_CONFIGS[kind](), device_map="cpu", dtype=dtype)
