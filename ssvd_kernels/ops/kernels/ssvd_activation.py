"""SSVD on an activation: x + (((x - shift) basis) core^T) basis^T and its gradients.

The products with k columns are the library's. Their results are padded to a multiple of 16 columns, so that they can be
read in wide loads; basis is not, which stored transposed has wide rows of d elements whatever k is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssvd_kernels.ops.kernels.compose import add_product
from ssvd_kernels.ops.kernels.launch import aligned, core_grad, padded_core
from ssvd_kernels.ops.kernels.tile_sizes import linear_config, table_key


def _project(x: Tensor, basis: Tensor, shift: Tensor | None = None) -> Tensor:
    """(x - shift) basis (T, n), zero beyond its k columns: x (T, d), basis (d, k), shift (d,)."""
    k = basis.shape[1]
    pad = -k % 16
    z = (x.new_zeros if pad else x.new_empty)((len(x), k + pad))
    if shift is None:
        torch.mm(x, basis, out=z[:, :k])
    else:
        torch.addmm(shift.to(x.dtype) @ basis, x, basis, beta=-1, out=z[:, :k])
    return z


def _add(x: Tensor, q: Tensor, basis: Tensor, stochastic: bool) -> Tensor:
    config = linear_config(table_key(x.dtype, (), aligned(x, q, basis)), *x.shape)
    return add_product(x, q, basis, x.dtype, stochastic, config)


def ssvd_activation_fwd(x: Tensor, basis: Tensor, core: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x + (z core^T) basis^T (..., d), z = (x - shift) basis (..., n)) in x's dtype, n = k padded to a multiple of 16.

    x (..., d), basis (d, k) in x's dtype, core (k, k) or (n, n) with zeros, shift (d,); any strides. A bfloat16 sum is
    rounded stochastically: it is x bit for bit where core is zero.
    """
    rows = x.reshape(-1, x.shape[-1])
    z = _project(rows, basis, shift)
    q = z @ padded_core(core, z.shape[1], x.dtype).mT
    return _add(rows, q, basis, x.dtype == torch.bfloat16).view_as(x), z.view(*x.shape[:-1], z.shape[1])


def ssvd_activation_bwd(
    dy: Tensor, z: Tensor | None, basis: Tensor, core: Tensor, need_dx: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx = dy + (g core) basis^T (T, d) if `need_dx`, g = dy basis; dcore = g^T z (n, n) in float32 if z is given.

    dy (T, d), z (T, n) in dy's dtype; the parameters as in `ssvd_activation_fwd`.
    """
    g = _project(dy, basis)
    dx = _add(dy, g @ padded_core(core, g.shape[1], dy.dtype), basis, False) if need_dx else None
    return dx, None if z is None else core_grad(g, z)
