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
    "config": ["SSVDConfig"],
    "functional": ["cayley", "cayley_delta", "ssvd_linear"],
    "layers": ["SSVDLinear"],
    "model": ["InjectReport", "inject", "merge", "remove", "ssvd_layers", "unmerge"],
    "checkpoint": ["AdapterError", "load_adapter", "save_adapter"],
    "convert": ["ConversionError", "from_espnet", "to_espnet"],
    "dispatch": ["use_backend"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterError",
    "ConversionError",
    "InjectReport",
    "SSVDConfig",
    "SSVDLinear",
    "cayley",
    "cayley_delta",
    "from_espnet",
    "inject",
    "load_adapter",
    "merge",
    "remove",
    "save_adapter",
    "ssvd_layers",
    "ssvd_linear",
    "to_espnet",
    "unmerge",
    "use_backend",
]

if TYPE_CHECKING:
    from .checkpoint import AdapterError, load_adapter, save_adapter
    from .config import SSVDConfig
    from .convert import ConversionError, from_espnet, to_espnet
    from .dispatch import use_backend
    from .functional import cayley, cayley_delta, ssvd_linear
    from .layers import SSVDLinear
    from .model import InjectReport, inject, merge, remove, ssvd_layers, unmerge


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
