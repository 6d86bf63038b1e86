"""N-concatenated product for composed layers of small d: [y | z] = x [W'^T | V], in one pass over x.

The same kernel serves the backward, [dx | dyU] = dy [W' | U]. Two library products would read x twice, and for small d
they are limited by that; beyond CONCAT_MAX_D they are limited by the tensor cores and nothing is gained. Each output
tile belongs to one program, which stores it once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ssvd_kernels.ops.kernels.launch import aligned, current_device
from ssvd_kernels.ops.kernels.tile_sizes import GROUP, linear_config, table_key
from ssvd_kernels.ops.kernels.tiles import accumulate, cast, grouped_program


@triton.jit(do_not_specialize=["T"])
def _ssvd_linear_concat_kernel(
    x_ptr,
    stride_x_t,
    stride_x_d,
    w_ptr,
    stride_w_n,
    stride_w_d,
    v_ptr,
    stride_v_d,
    stride_v_k,
    b_ptr,
    stride_b_n,
    y_ptr,
    stride_y_t,
    stride_y_n,
    z_ptr,
    stride_z_t,
    stride_z_k,
    T,
    d_in,
    d_out,
    k,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks_y = tl.cdiv(d_out, BLOCK_N)
    pid_t, pid_n = grouped_program(T, blocks_y * BLOCK_N + k, BLOCK_T, BLOCK_N, GROUP_T)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t, row_t = offs_t < T, offs_t.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)  # [BLOCK_T, BLOCK_N]
    if pid_n < blocks_y:
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < d_out
        acc = accumulate(
            acc, x_ptr, stride_x_t, stride_x_d, w_ptr, stride_w_n, stride_w_d,
            offs_t, mask_t, offs_n, mask_n, 0, d_in, BLOCK_K, PRECISION,
        )  # fmt: skip
        if HAS_BIAS:
            acc += tl.load(b_ptr + offs_n * stride_b_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        y_ptrs = y_ptr + row_t * stride_y_t + offs_n[None, :] * stride_y_n
        tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_n[None, :])
    else:
        offs_r = (pid_n - blocks_y) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_r = offs_r < k
        acc = accumulate(
            acc, x_ptr, stride_x_t, stride_x_d, v_ptr, stride_v_k, stride_v_d,
            offs_t, mask_t, offs_r, mask_r, 0, d_in, BLOCK_K, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # else the compiler merges the branches where they are equal, and doubles the shared memory
        z_ptrs = z_ptr + row_t * stride_z_t + offs_r[None, :] * stride_z_k
        tl.store(z_ptrs, cast(acc, z_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_r[None, :])


def concat(x: Tensor, composed: Tensor, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y = x W'^T + b (..., d_out) and z = x V (..., k): x (..., d_in), W' `composed` (d_out, d_in), V (d_in, k)."""
    rows = x.reshape(-1, x.shape[-1])
    (T, d_in), d_out, k = rows.shape, composed.shape[0], V.shape[1]
    y, z = x.new_empty((T, d_out)), x.new_empty((T, k))
    key = table_key(x.dtype, (composed.dtype, V.dtype), aligned(rows, composed, V))

    config = linear_config(key, T, d_out + k)
    columns = triton.cdiv(d_out, config.cols) + triton.cdiv(k, config.cols)
    if T:
        with current_device(x):
            _ssvd_linear_concat_kernel[(triton.cdiv(T, config.rows) * columns,)](
                rows, *rows.stride(), composed, *composed.stride(), V, *V.stride(),
                y if bias is None else bias, 0 if bias is None else bias.stride(0), y, *y.stride(), z, *z.stride(),
                T, d_in, d_out, k,
                HAS_BIAS=bias is not None, BLOCK_T=config.rows, BLOCK_N=config.cols, BLOCK_K=config.depth,
                GROUP_T=GROUP, PRECISION="ieee", **config.options,
            )  # fmt: skip
    return y.view(*x.shape[:-1], d_out), z.view(*x.shape[:-1], k)
