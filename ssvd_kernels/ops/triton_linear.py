"""The linear op by the Triton kernels: pads operands, and chooses among the kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .places import Places

ALIGNMENT = 16  # columns


def ssvd_linear_fwd(
    x: Tensor, weight: Tensor | None, U: Tensor, V: Tensor, core: Tensor, bias: Tensor | None, mode: str, need_z: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `reference.ssvd_linear_fwd`; z may have columns of zeros beyond its k."""
    assert weight is not None
    U, V = operand(U, x.dtype), operand(V, x.dtype)
    if mode == "factored":
        return *kernels().ssvd_linear_fwd(x, weight, U, V, core, bias, need_z), None
    composed = kernels().compose(weight, U, V, core)
    y = F.linear(x, composed, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))
    return y, x @ V if need_z else None, composed


def ssvd_linear_bwd(
    dy: Tensor,
    z: Tensor | None,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    core: Tensor,
    composed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """As `reference.ssvd_linear_bwd`; dcore may have rows and columns of zeros beyond the core's."""
    U = operand(U, dy.dtype)
    if composed is None:
        return kernels().ssvd_linear_bwd(dy, z, weight, U, operand(V, dy.dtype), core, need_dx)
    # dcore in this order for any T: the other one, U^T (dy^T z), takes a product in float32
    return dy @ composed if need_dx else None, None if z is None else kernels().core_grad(dy @ U, z)


def ssvd_activation_fwd(x: Tensor, basis: Tensor, core: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `reference.ssvd_activation_fwd`; z may have columns of zeros beyond its k."""
    return kernels().ssvd_activation_fwd(x, basis.to(x.dtype), core, shift)


def ssvd_activation_bwd(
    dy: Tensor, z: Tensor | None, basis: Tensor, core: Tensor, need_dx: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As `reference.ssvd_activation_bwd`; dcore may have rows and columns of zeros beyond the core's."""
    return kernels().ssvd_activation_bwd(dy, z, basis.to(dy.dtype), core, need_dx)


def add_update(y: Tensor, update: Tensor) -> Tensor:
    """As `reference.add_update`, in one pass."""
    return kernels().add_update(y, update) if y.dtype == torch.bfloat16 else reference.add_update(y, update)


def rows_product_fwd(z: Tensor, cores: Tensor, places: Places) -> Tensor:
    """As `reference.rows_product_fwd`."""
    from .kernels.rows_product import rows_product  # not compiled by torch: rows differ from call to call

    return rows_product(z, cores, places.index)


def rows_product_bwd(
    dq: Tensor, z: Tensor | None, cores: Tensor, places: Places, need_dz: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As `reference.rows_product_bwd`."""
    dz = rows_product_fwd(dq, cores.mT, places) if need_dz else None
    return dz, None if z is None else reference.rows_core_grad(dq, z, cores, places)


def operand(basis: Tensor, dtype: torch.dtype) -> Tensor:
    """U or V (d, k) as the kernels read it: with columns of zeros up to a multiple of ALIGNMENT.

    Zeros change no product, but rows of 409 half-precision elements, say, cannot be read in wide loads.
    """
    extra = -basis.shape[1] % ALIGNMENT
    if extra:
        return F.pad(basis.to(dtype), (0, extra))
    return basis if basis.dtype == dtype else basis.to(dtype)  # which takes time even where it does nothing


def core_operand(core: Tensor, dtype: torch.dtype) -> Tensor:
    """Cores (..., k, k) as the kernels read them, padded as U and V."""
    extra = -core.shape[-1] % ALIGNMENT
    return F.pad(core.to(dtype), (0, extra, 0, extra)) if extra else core.to(dtype)


def kernels() -> Any:
    """The Triton launchers; while torch.compile traces, as operators."""
    if torch.compiler.is_compiling():
        from .kernels import custom_ops

        return custom_ops
    from .kernels import launchers

    return launchers
