"""Triton kernels and their launchers: tensors in, tensors out, no autograd.

Importable without Triton; `unavailable_reason` says whether the kernels can run. The launchers are in cayley, compose,
rows_product, ssvd_activation and ssvd_linear, the tile sizes in tile_sizes.
"""

from __future__ import annotations

import functools

import torch

OLDEST = (3, 6)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def _import_error() -> str | None:
    try:
        import triton
    except Exception as error:  # a broken installation fails in many ways
        return f"triton cannot be imported: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"triton {triton.__version__} is older than {OLDEST[0]}.{OLDEST[1]}"
    return None


@functools.cache
def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the Triton kernels serve tensors of `dtype` on `device`, otherwise why not."""
    if (reason := _import_error()) is not None:
        return reason
    if dtype not in DTYPES:
        return f"dtype {dtype} is not supported, only float32, float16 and bfloat16"
    from ssvd_kernels.ops.kernels.tiles import INTERPRETED

    if INTERPRETED.value:
        return None if device.type in ("cpu", "cuda") else f"device {device} is not supported by Triton's interpreter"
    if device.type == "cpu":
        return "device cpu requires Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
    if device.type != "cuda":
        return f"device {device} is not supported, only CUDA devices"
    if torch.version.hip is not None:
        return "ROCm builds of torch are not supported: the kernels are compiled and tested for CUDA only"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"CUDA capability {major}.{minor} of {device} is below 8.0"
