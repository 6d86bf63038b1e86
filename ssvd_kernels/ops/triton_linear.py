"""The linear op by the Triton kernels: pads operands, and chooses among the kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .kernels.tile_sizes import CONCAT_MAX_D
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
    composed = kernels().compose(weight, U, V, core, x.dtype)
    if need_z and _concatenated(x, weight):
        return *kernels().concat(x, composed, V, bias), composed
    y = F.linear(x, composed, None if bias is None else bias.to(x.dtype))
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
        V = operand(V, dy.dtype)
        dx, dcore = kernels().ssvd_linear_bwd(dy, z, weight, U, V, core, need_dx)
    elif need_dx and z is not None and _concatenated(dy, weight):
        dx, dyU = kernels().concat(dy, composed.mT, U, None)
        dcore = kernels().core_grad(dyU, z)
    else:
        dx = dy @ composed if need_dx else None
        if z is None:
            dcore = None
        elif len(dy) < len(U):  # the three factors in the cheaper order
            dcore = kernels().core_grad(dy @ U, z)
        else:
            dcore = U.to(torch.float32).mT @ kernels().core_grad(dy, z)
    return dx, dcore


def ssvd_activation_fwd(x: Tensor, basis: Tensor, core: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `reference.ssvd_activation_fwd`; z may have columns of zeros beyond its k."""
    return kernels().ssvd_activation_fwd(x, basis.to(x.dtype), core, shift)


def ssvd_activation_bwd(
    dy: Tensor, z: Tensor | None, basis: Tensor, core: Tensor, need_dx: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As `reference.ssvd_activation_bwd`; dcore may have rows and columns of zeros beyond the core's."""
    return kernels().ssvd_activation_bwd(dy, z, basis.to(dy.dtype), core, need_dx)


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
    return F.pad(basis.to(dtype), (0, extra)) if extra else basis.to(dtype)


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


def _concatenated(x: Tensor, weight: Tensor) -> bool:
    """Whether one kernel computes both products of x: by the weight and by the basis."""
    return x.dtype.itemsize == 2 and max(weight.shape) <= CONCAT_MAX_D
