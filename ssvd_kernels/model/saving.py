"""`save_pretrained` of models with adapted layers: of what it writes, `from_pretrained` loads the base model alone."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..layers.base import own_layers

logger = logging.getLogger(__name__)

ADAPTER_FILE = "ssvd_adapter.safetensors"


def guard_saving(model: nn.Module) -> None:
    """From now on `save_pretrained`, of `model` or of a part, also writes the adapter, or refuses a merged model."""
    for module in model.modules():
        if hasattr(type(module), "save_pretrained"):
            module.__dict__.setdefault("save_pretrained", partial(_save_pretrained, module))  # copied with the module


def unguard_saving(model: nn.Module) -> None:
    """Undoes `guard_saving`."""
    for module in model.modules():
        if getattr(module.__dict__.get("save_pretrained"), "func", None) is _save_pretrained:
            del module.__dict__["save_pretrained"]


def warn_of_adapter_beside(model: nn.Module) -> None:
    """Warns if an adapter lies in the folder that transformers loaded `model` from."""
    path = Path(getattr(model, "name_or_path", None) or os.devnull, ADAPTER_FILE)
    if path.is_file():
        logger.warning("%s is not loaded by inject, which starts from the base model: call load_adapter", path)


def _save_pretrained(model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """In place of the method of `model`."""
    from .. import save_adapter  # of a folder above, which importing this one must not need

    layers = own_layers(model).values()
    if any(layer.merged for layer in layers):
        raise ValueError(
            "save_pretrained would write the base weights of a merged model, without the adapter: call "
            "export_merged(model, folder), or merge(model, unload=True) first"
        )
    if layers and kwargs.get("push_to_hub"):
        raise ValueError("push_to_hub=True would upload the base model alone: call model.push_to_hub()")
    if any(layer.sharded for layer in layers):
        logger.warning("from_pretrained will load the base model alone: call save_adapter in every process, too")
    elif layers and (*args, kwargs.get("is_main_process", True))[0]:
        path = Path(save_directory, ADAPTER_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(model, path)
        logger.warning(
            "from_pretrained(%r) will load the base model alone; then call ssvd_kernels.load_adapter(model, %r)",
            str(save_directory),
            str(path),
        )
    return type(model).save_pretrained(model, save_directory, *args, **kwargs)
