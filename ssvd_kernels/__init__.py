"""SSVD: fine-tuning by rotating and shifting a weight's top singular triplets, with fused kernels.

    import ssvd_kernels as sk
    report = sk.inject(model, sk.SSVDConfig(ratio=0.4, targets="whisper"))

Importing this package needs neither triton, nor the compiled extension, nor a GPU; names are loaded on first use, so
that `python -m ssvd_kernels info` can say what is missing even where torch is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "config": ["SSVDConfig", "SpectralFTConfig"],
    "functional": ["cayley", "cayley_delta", "ssvd_linear"],
    "layers": ["SSVDLinear"],
    "spectralft": ["SpectralFTLinear"],
    "quantized": ["SSVDQuantizedLinear"],
    "adapted": ["adapted_layers"],
    "model": ["InjectReport", "inject", "merge", "remove", "ssvd_layers", "unmerge"],
    "adapter_file": ["AdapterError"],
    "checkpoint": ["load_adapter", "save_adapter"],
    "adapters": [
        "adapter_names",
        "add_adapter",
        "average_adapters",
        "delete_adapter",
        "disable_adapter",
        "set_adapter",
    ],
    "planner": ["RankPlan", "plan"],
    "probe": ["TrainingReport", "check_training"],
    "convert": ["ConversionError", "from_espnet", "to_espnet"],
    "dispatch": ["use_backend"],
    "export": ["LoraReport", "export_merged", "to_lora"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterError",
    "ConversionError",
    "InjectReport",
    "LoraReport",
    "RankPlan",
    "SSVDConfig",
    "SSVDLinear",
    "SSVDQuantizedLinear",
    "SpectralFTConfig",
    "SpectralFTLinear",
    "TrainingReport",
    "adapted_layers",
    "adapter_names",
    "add_adapter",
    "average_adapters",
    "cayley",
    "cayley_delta",
    "check_training",
    "delete_adapter",
    "disable_adapter",
    "export_merged",
    "from_espnet",
    "inject",
    "load_adapter",
    "merge",
    "plan",
    "remove",
    "save_adapter",
    "set_adapter",
    "ssvd_layers",
    "ssvd_linear",
    "to_espnet",
    "to_lora",
    "unmerge",
    "use_backend",
]

if TYPE_CHECKING:
    from .adapted import adapted_layers
    from .adapter_file import AdapterError
    from .adapters import (
        adapter_names,
        add_adapter,
        average_adapters,
        delete_adapter,
        disable_adapter,
        set_adapter,
    )
    from .checkpoint import load_adapter, save_adapter
    from .config import SpectralFTConfig, SSVDConfig
    from .convert import ConversionError, from_espnet, to_espnet
    from .dispatch import use_backend
    from .export import LoraReport, export_merged, to_lora
    from .functional import cayley, cayley_delta, ssvd_linear
    from .layers import SSVDLinear
    from .model import InjectReport, inject, merge, remove, ssvd_layers, unmerge
    from .planner import RankPlan, plan
    from .probe import TrainingReport, check_training
    from .quantized import SSVDQuantizedLinear
    from .spectralft import SpectralFTLinear


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
