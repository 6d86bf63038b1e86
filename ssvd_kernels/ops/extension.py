"""Loads the optional C++/CUDA extension `_C` once, on first use, and records the reason if it cannot be used.

Importing this module imports neither torch nor `_C`. SSVD_DISABLE_EXT=1 prevents loading `_C`.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_INFO_PATH = Path(__file__).parents[1] / "_build_info.json"


@functools.cache
def build_info() -> dict[str, Any]:
    """What the build recorded: built ("none", "cpu" or "cuda"), failed (kind: why), torch, cuda, archs ("sm_90
    compute_90", say); {} if none."""
    try:
        info = json.loads(_INFO_PATH.read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def build_failures() -> str:
    """Why the build left out what it tried first, in one line; "" if that was built, or nothing was tried."""
    return "; ".join(f"{kind}: {why}" for kind, why in build_info().get("failed", {}).items())


def available() -> bool:
    """Whether `torch.ops.ssvd_kernels.*` can be called."""
    return _load()[0] is not None


def unavailable_reason() -> str | None:
    """Why `_C` cannot be used, None if it can."""
    return _load()[1]


def supports(device: torch.device | str) -> str | None:
    """Why the ops cannot serve tensors on `device`, None if they can."""
    import torch

    module, reason = _load()
    if module is None:
        return reason
    device = torch.device(device)
    if device.type == "cuda" and module.with_cuda:
        return _lack_of_code(device)
    if device.type == "cpu":
        return None
    return f"_C was built for {'CPU and CUDA' if module.with_cuda else 'CPU only'}, not for device type {device.type!r}"


@functools.cache
def _lack_of_code(device: torch.device) -> str | None:
    """Why no code in `_C` runs on this CUDA device, None if some does: sm_80 runs on 8.0 and later 8.x, compute_80
    (PTX) on all later ones, sm_90a on 9.0 alone."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device is available"
    capability = torch.cuda.get_device_capability(device)
    built: str = build_info().get("archs") or "unknown architectures"
    for kind, *number, only in re.findall(r"(sm|compute)_(\d+)(\d)(a?)", built):
        major, minor = map(int, number)
        older = (major, minor) <= capability and not only and (kind == "compute" or major == capability[0])
        if older or (major, minor) == capability:
            return None
    major, minor = capability
    remedy = f"reinstall with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    return f"_C was built for {built}, not for {device} (sm_{major}{minor}); {remedy}"


@functools.cache
def _load() -> tuple[Any, str | None]:
    reason = _refusal()
    if reason is not None:
        return None, reason
    try:
        module = importlib.import_module("ssvd_kernels._C")
    except ImportError as error:
        return None, f"_C could not be loaded: {error}"
    _register_fakes()
    _register_vmaps()
    return module, None


def _refusal() -> str | None:
    """Why `_C` must not even be imported: loading one built for another torch can crash the process."""
    if os.environ.get("SSVD_DISABLE_EXT", "0") not in ("", "0"):
        return f"SSVD_DISABLE_EXT={os.environ['SSVD_DISABLE_EXT']}"
    info = build_info()
    if not info:
        return f"_C was not built: {_INFO_PATH.name} is missing or unreadable"
    if info.get("built", "none") == "none":
        return f"_C was not built: {build_failures() or 'SSVD_BUILD=none'}"
    try:
        import torch
        from packaging.version import Version
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    remedy = "reinstall with --no-build-isolation"
    built, running = Version(info["torch"]), Version(torch.__version__)
    if built.release[:2] != running.release[:2]:
        return f"_C was built for torch {built}, but torch {running} is installed; {remedy}"
    wanted, cuda = info.get("cuda"), torch.version.cuda
    if wanted is not None and (cuda is None or Version(wanted).major != Version(cuda).major):
        return f"_C was built for CUDA {wanted}, but torch was built for CUDA {cuda}; {remedy}"
    return None


def _register_fakes() -> None:
    import torch

    @torch.library.register_fake("ssvd_kernels::cayley_delta")
    def _(theta: torch.Tensor, k: int) -> torch.Tensor:
        return theta.new_empty(theta.shape[0], k, k)

    @torch.library.register_fake("ssvd_kernels::cayley_delta_backward")
    def _(grad: torch.Tensor, E: torch.Tensor) -> torch.Tensor:
        k = E.shape[-1]
        return E.new_empty(E.shape[0], k * (k - 1) // 2)


def _register_vmaps() -> None:
    """Under torch.func.vmap the mapped dimension joins the batch that the ops have anyway."""
    import torch

    def batched(op: Any) -> Any:
        def call(info: Any, in_dims: tuple, *args: Any) -> tuple[torch.Tensor, int]:
            size = info.batch_size
            tensors = [
                (arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)).flatten(0, 1)
                for arg, dim in zip(args, in_dims)
                if isinstance(arg, torch.Tensor)
            ]
            rest = [arg for arg in args if not isinstance(arg, torch.Tensor)]
            result = op(*(tensor.contiguous() for tensor in tensors), *rest)
            return result.unflatten(0, (size, len(result) // size)), 0

        return call

    for name in ("cayley_delta", "cayley_delta_backward"):
        torch.library.register_vmap(f"ssvd_kernels::{name}", batched(getattr(torch.ops.ssvd_kernels, name)))
