"""rows_product: a batch of products, each with one of many matrices, which stay where they are."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ssvd_kernels.ops.kernels.launch import aligned, launch
from ssvd_kernels.ops.kernels.tile_sizes import GROUP, cdiv, rows_config, table_key
from ssvd_kernels.ops.kernels.tiles import accumulate, cast, grouped_program


@triton.jit(do_not_specialize=["T"])
def _rows_product_kernel(
    z_ptr,
    cores_ptr,
    index_ptr,
    out_ptr,
    stride_z_r,
    stride_z_t,
    stride_z_k,
    stride_cores_n,
    stride_cores_row,
    stride_cores_col,
    stride_out_r,
    stride_out_t,
    stride_out_k,
    T,
    k,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    r = tl.program_id(1).to(tl.int64)
    n = tl.load(index_ptr + r).to(tl.int64)
    pid_t, pid_d = grouped_program(T, k, BLOCK_T, BLOCK_D, GROUP_T)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t, mask_d = offs_t < T, offs_d < k
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)  # [BLOCK_T, BLOCK_D]
    acc = accumulate(
        acc, z_ptr + r * stride_z_r, stride_z_t, stride_z_k,
        cores_ptr + n * stride_cores_n, stride_cores_row, stride_cores_col,
        offs_t, mask_t, offs_d, mask_d, 0, tl.where(n < 0, 0, k), BLOCK_K,
    )  # fmt: skip
    row_t, row_d = offs_t.to(tl.int64)[:, None], offs_d.to(tl.int64)[None, :]
    out = out_ptr + r * stride_out_r + row_t * stride_out_t + row_d * stride_out_k
    tl.store(out, cast(acc, out_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_d[None, :])


def rows_product(z: Tensor, cores: Tensor, index: Tensor) -> Tensor:
    """z[r] cores[index[r]]^T (R, T, k), accumulated in float32, in z's dtype; zero where index is -1.

    z (R, T, k), cores (N, k, k) in any dtype, index (R,); any strides.
    """
    R, T, k = z.shape
    out = z.new_empty(z.shape)
    if out.numel():
        readable = aligned(z[0], cores[0]) and (z.stride(0) | cores.stride(0)) % 16 == 0
        config = rows_config(table_key(z.dtype, (cores.dtype,), readable), R, T, k)
        launch(
            _rows_product_kernel, (cdiv(T, config.rows) * cdiv(k, config.cols), R, 1), (z, cores, index, out),
            (*z.stride(), *cores.stride(), *out.stride(), T, k), (config.rows, config.cols, config.depth, GROUP),
            config,
        )  # fmt: skip
    return out
