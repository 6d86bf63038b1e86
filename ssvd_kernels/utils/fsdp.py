"""Parameters sharded by FSDP2: DTensors between uses, plain tensors within a forward or backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Whether `tensor` is a DTensor; told by an attribute because torch.distributed.tensor is slow to import."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Any) -> Tensor:
    """A sharded tensor gathered in every process (all must call this); any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def assign(target: Any, value: Tensor) -> None:
    """target.copy_(value) for an unsharded `value`, the same in all processes; a sharded target takes its part."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)
