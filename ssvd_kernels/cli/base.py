"""Loads the base model of an adapter."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from . import UsageError


def load_base(folder: Path, float32: bool = False, given: Collection[str] = ()) -> Any:
    """The transformers model in `folder`, of the class that it was saved from; in float32 or as it is stored.

    given: what an adapter brings, such as a new head, and the folder may lack.

    Raises UsageError if there is none or transformers is not installed, ValueError if it is damaged or incomplete.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} is not the folder of a transformers model (it has no config.json); "
            f"`hf download NAME --local-dir {folder}` creates one"
        )
    try:
        import transformers
    except ImportError as error:
        raise UsageError(f"this command requires transformers ({error}): pip install transformers") from None
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["AutoModel"])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise UsageError(f"{folder} contains a {name}, which transformers {transformers.__version__} does not have")
    try:
        model, found = kind.from_pretrained(
            folder, dtype="float32" if float32 else "auto", output_loading_info=True, local_files_only=True
        )
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged: {error}") from None
    missing = sorted(set(found["missing_keys"]) - set(given))
    if missing:
        raise ValueError(f"{folder} has no weights for {len(missing)} parameters of {name}, e.g. {missing[0]}")
    return model.eval()
