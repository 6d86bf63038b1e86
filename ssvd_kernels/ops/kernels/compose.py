"""add_product: y + q basis^T, accumulated in float32, each element written once; compose: W' = W + (U core) V^T;
add_update: y + update.

The reference implementations are `reference.add_product`, `compose_operand_ref` and `add_update`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssvd_kernels.ops.kernels.launch import aligned, launch, padded_core
from ssvd_kernels.ops.kernels.tile_sizes import ELEMENTS, GROUP, TileConfig, cdiv, linear_config, table_key
from ssvd_kernels.ops.kernels.tiles import accumulate, cast, grouped_program, round_stochastically


@triton.jit(do_not_specialize=["T"])
def _add_product_kernel(
    y_ptr,
    q_ptr,
    basis_ptr,
    out_ptr,
    stride_y_t,
    stride_y_d,
    stride_q_t,
    stride_q_k,
    stride_basis_d,
    stride_basis_k,
    stride_out_t,
    stride_out_d,
    T,
    d,
    n,
    k,
    STOCHASTIC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    pid_t, pid_d = grouped_program(T, d, BLOCK_T, BLOCK_D, GROUP_T)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t, mask_d = offs_t < T, offs_d < d
    mask = mask_t[:, None] & mask_d[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)  # [BLOCK_T, BLOCK_D]
    acc = accumulate(
        acc, q_ptr, stride_q_t, stride_q_k, basis_ptr, stride_basis_d, stride_basis_k,
        offs_t, mask_t, offs_d, mask_d, 0, n, BLOCK_K, k,
    )  # fmt: skip
    row_t, row_d = offs_t.to(tl.int64)[:, None], offs_d.to(tl.int64)[None, :]
    y = tl.load(y_ptr + row_t * stride_y_t + row_d * stride_y_d, mask=mask, other=0.0)
    dtype = out_ptr.dtype.element_ty
    if STOCHASTIC:
        acc += cast(y, dtype).to(tl.float32)
        out = round_stochastically(acc, row_t, row_d)
    else:
        acc += y.to(tl.float32)
        out = cast(acc, dtype)
    tl.store(out_ptr + row_t * stride_out_t + row_d * stride_out_d, out, mask=mask)


def add_product(
    y: Tensor,
    q: Tensor,
    basis: Tensor,
    dtype: torch.dtype,
    stochastic: bool,
    config: TileConfig,
) -> Tensor:
    """y + q basis^T (T, d) in `dtype`: y (T, d), q (T, n), basis (d, k), q zero beyond its k columns; any strides.

    The sum is rounded to nearest; `stochastic`, for bfloat16: y to nearest, and the sum stochastically.
    """
    T, d = y.shape
    out = torch.empty((T, d), dtype=dtype, device=y.device)
    if T:
        launch(
            _add_product_kernel, (cdiv(T, config.rows) * cdiv(d, config.cols), 1, 1), (y, q, basis, out),
            (*y.stride(), *q.stride(), *basis.stride(), *out.stride(), T, d, q.shape[1], basis.shape[1]),
            (stochastic, config.rows, config.cols, config.depth, GROUP), config,
        )  # fmt: skip
    return out


def compose(weight: Tensor, U: Tensor, V: Tensor, core: Tensor) -> Tensor:
    """W' = W + U core V^T: weight (d_out, d_in), U (d_out, k), V (d_in, k), core (k, k) -> (d_out, d_in) in U's dtype.

    core may be smaller where the last columns of U and V are zero. bfloat16 is rounded stochastically.
    """
    P, dtype = U @ padded_core(core, U.shape[1], U.dtype), U.dtype
    config = linear_config(table_key(dtype, (weight.dtype,), aligned(weight, P, V)), *weight.shape)
    return add_product(weight, P, V, dtype, dtype == torch.bfloat16, config)


@triton.jit
def _add_update_kernel(
    y_ptr,
    update_ptr,
    out_ptr,
    size,
    d,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + place, mask=place < size, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, round_stochastically(y + update, place // d, place % d), mask=place < size)


def add_update(y: Tensor, update: Tensor) -> Tensor:
    """y + update (..., d) in bfloat16, the sum rounded stochastically."""
    y, update = y.contiguous(), update.contiguous()
    out = torch.empty_like(y)
    if y.numel():
        grid, numbers = (cdiv(y.numel(), ELEMENTS.cols), 1, 1), (y.numel(), y.shape[-1])
        launch(_add_update_kernel, grid, (y, update, out), numbers, (ELEMENTS.cols,), ELEMENTS)
    return out
