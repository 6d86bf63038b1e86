"""SSVD: parameter-efficient fine-tuning by rotating a weight's top singular vectors and shifting its singular values.

    import ssvd_kernels as sk
    report = sk.inject(model, sk.SSVDConfig(ratio=0.4, targets="whisper"))

Importing this package requires neither Triton, nor the compiled extension, nor a GPU. Names are loaded on first use, so
`python -m ssvd_kernels info` can report what is missing even without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "config": ["SSVDConfig", "SpectralFTConfig"],
    "ops.functional": ["cayley", "cayley_delta", "ssvd_linear"],
    "layers.ssvd": ["SSVDLinear"],
    "layers.spectralft": ["SpectralFTLinear"],
    "layers.quantized": ["SSVDQuantizedLinear"],
    "layers.base": ["adapted_layers"],
    "model.inject": ["InjectReport", "inject"],
    "model.lookup": ["ssvd_layers"],
    "model.merge": ["merge", "remove", "unmerge"],
    "adapters.file_format": ["AdapterError"],
    "adapters.save_load": ["load_adapter", "save_adapter"],
    "adapters.bank": ["AdapterBank"],
    "adapters.averaging": ["average_adapters", "average_files"],
    "adapters.switching": [
        "adapter_names",
        "add_adapter",
        "delete_adapter",
        "disable_adapter",
        "set_adapter",
        "set_strength",
    ],
    "model.parameter_groups": ["parameter_groups"],
    "model.planner": ["RankPlan", "plan"],
    "model.check_training": ["TrainingReport", "check_training"],
    "integrations.espnet_checkpoints": ["ConversionError", "from_espnet", "to_espnet"],
    "ops.dispatch": ["use_backend"],
    "adapters.export": ["LoraReport", "export_merged", "to_lora"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterBank",
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
    "average_files",
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
    "parameter_groups",
    "plan",
    "remove",
    "save_adapter",
    "set_adapter",
    "set_strength",
    "ssvd_layers",
    "ssvd_linear",
    "to_espnet",
    "to_lora",
    "unmerge",
    "use_backend",
]

if TYPE_CHECKING:
    from .adapters.averaging import average_adapters, average_files
    from .adapters.bank import AdapterBank
    from .adapters.export import LoraReport, export_merged, to_lora
    from .adapters.file_format import AdapterError
    from .adapters.save_load import load_adapter, save_adapter
    from .adapters.switching import (
        adapter_names,
        add_adapter,
        delete_adapter,
        disable_adapter,
        set_adapter,
        set_strength,
    )
    from .config import SpectralFTConfig, SSVDConfig
    from .integrations.espnet_checkpoints import ConversionError, from_espnet, to_espnet
    from .layers.base import adapted_layers
    from .layers.quantized import SSVDQuantizedLinear
    from .layers.spectralft import SpectralFTLinear
    from .layers.ssvd import SSVDLinear
    from .model.check_training import TrainingReport, check_training
    from .model.inject import InjectReport, inject
    from .model.lookup import ssvd_layers
    from .model.merge import merge, remove, unmerge
    from .model.parameter_groups import parameter_groups
    from .model.planner import RankPlan, plan
    from .ops.dispatch import use_backend
    from .ops.functional import cayley, cayley_delta, ssvd_linear


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
