"""Host-side helpers shared by all launchers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from ssvd_kernels.ops.kernels.tile_sizes import TileConfig

INTERPRETED = triton.knobs.runtime.interpret
CPU = -1  # as a device of tensors
MOST = 4096  # launches that are remembered: each number of rows is another one, and some models have many
_COMPILED: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    config: TileConfig,
) -> None:
    """kernel[grid](*tensors, *numbers, *constants), on the device of the tensors.

    At every launch Triton looks at each argument and asks for the kernel that is compiled for such ones, which takes
    longer than many a kernel runs. So that kernel is remembered, with all that it depends on.
    """
    if INTERPRETED:
        kernel[grid](*tensors, *numbers, *constants, **config.options)
        return
    device, current = tensors[0].get_device(), driver.active.get_current_device()
    if device not in (current, CPU):  # Triton launches on CUDA's current device
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, constants, config)
        return
    kinds = tuple([(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors])
    key = kernel, current, kinds, numbers, constants, config
    compiled = _COMPILED.get(key)
    if compiled is None:
        if len(_COMPILED) >= MOST:
            _COMPILED.clear()
        _COMPILED[key] = kernel[grid](*tensors, *numbers, *constants, **config.options)
    else:
        stream = driver.active.get_current_stream(current)
        compiled[grid](*tensors, *numbers, *constants, stream=stream)


def padded_core(core: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """core in `dtype`, with zeros up to (k, k)."""
    rank = core.shape[0]
    if rank == k:
        return core if core.dtype == dtype else core.to(dtype)
    padded = core.new_zeros((k, k), dtype=dtype)
    padded[:rank, :rank] = core
    return padded


def core_grad(a: Tensor, b: Tensor) -> Tensor:
    """a^T b (ka, kb) in float32, by the library: a (T, ka) and b (T, kb) of one dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a.mT, b, out_dtype=torch.float32)
    return a.to(torch.float32).mT @ b.to(torch.float32)


def aligned(*tensors: Tensor) -> bool:
    """Whether every matrix can be read 16 elements at a time along one of its axes (what Triton specialises on)."""
    for tensor in tensors:
        if tensor.data_ptr() % 16 or not _readable(tensor.shape, tensor.stride()):
            return False
    return True


@functools.lru_cache(MOST)
def _readable(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    wide = any(s == 1 and n % 16 == 0 for s, n in zip(strides, shape, strict=True))
    return wide and all(s % 16 == 0 for s in strides if s != 1)
