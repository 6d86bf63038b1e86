"""Host-side helpers shared by all launchers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def current_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on CUDA's current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def padded_core(core: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """core in `dtype`, with zeros up to (k, k)."""
    rank = core.shape[0]
    if rank == k:
        return core.to(dtype)
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
        strides, shape = tensor.stride(), tensor.shape
        if tensor.data_ptr() % 16 or not any(s == 1 and n % 16 == 0 for s, n in zip(strides, shape, strict=True)):
            return False
        if any(s % 16 for s in strides if s != 1):
            return False
    return True
