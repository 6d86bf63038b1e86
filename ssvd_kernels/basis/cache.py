"""Disk cache of factorisations: one safetensors file per weight and rank, so that each weight is factorised once.

A file is named by its inputs: a hash of the weight, the rank, the dtype and VERSION. Files are written atomically, so
processes can share a folder. A digest is checked on reading; a damaged file is recomputed. Any file may be deleted at
any time.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..utils.safetensors_io import digest, write_atomically
from .factorize import BASIS, Factorization, fingerprint

logger = logging.getLogger(__name__)

VERSION = 1  # of the file format and of the method: raising it invalidates all entries
_TENSORS = (*BASIS, "sketch")


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path | None:
    """The folder to use, created if it does not exist: `cache_dir`, else the environment's SSVD_CACHE, else none.

    Raises NotADirectoryError if that is a file.
    """
    name = os.environ.get("SSVD_CACHE") if cache_dir is None else cache_dir
    if not name:
        return None
    folder = Path(name).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"`cache_dir` must be a folder, which is created if it does not exist, got the file {str(folder)!r}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load(folder: Path, weight: Tensor, k: int) -> Factorization | None:
    """The stored top-k factorisation of exactly this weight, on its device; None, with a warning if it is damaged."""
    key = _key(weight, k)
    path = _path(folder, key)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["ssvd_kernels"])
            tensors = {name: file.get_tensor(name).clone() for name in _TENSORS}  # safe_open maps the file
        if header.pop("digest") != digest(header, tensors) or header["key"] != key:
            raise ValueError("its digest or its key does not match")
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        logger.warning("%s is damaged and will be replaced (%s: %s)", path, type(error).__name__, error)
        return None
    U, sigma, V = (tensors[name].to(weight.device) for name in BASIS)
    return Factorization(U, sigma, V, header["fingerprint"], header["gap"], tensors["sketch"])


def store(folder: Path, weight: Tensor, found: Factorization) -> None:
    """Stores the factorisation of `weight`; a failure is logged and otherwise ignored."""
    key = _key(weight, len(found.sigma))
    tensors = {name: getattr(found, name).cpu() for name in _TENSORS}
    header = {"key": key, "fingerprint": found.fingerprint, "gap": found.gap}
    header["digest"] = digest(header, tensors)
    try:
        write_atomically(_path(folder, key), tensors, {"ssvd_kernels": json.dumps(header)})
    except (OSError, SafetensorError) as error:
        logger.warning("could not cache a factorisation in %s (%s)", folder, error)


def _key(weight: Tensor, k: int) -> str:
    dtype = torch.promote_types(weight.dtype, torch.float32)  # in which no value of the weight is rounded
    return f"{fingerprint(weight, dtype)}-{str(dtype).removeprefix('torch.')}-k{k}-v{VERSION}"


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"
