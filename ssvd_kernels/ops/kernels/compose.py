"""compose: W' = W + (U core) V^T, accumulated in float32, each element written once.

For bf16, W is rounded to nearest, the update is added, and the sum is rounded stochastically; other dtypes round to
nearest. The reference implementation is `reference.compose_operand_ref`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssvd_kernels.ops.kernels.launch import aligned, current_device, padded_core
from ssvd_kernels.ops.kernels.tile_sizes import COMPOSE_PRECISION, GROUP, compose_config, table_key
from ssvd_kernels.ops.kernels.tiles import accumulate, cast, grouped_program, round_stochastically


@triton.jit
def _compose_kernel(
    w_ptr,
    stride_w_n,
    stride_w_d,
    p_ptr,
    stride_p_n,
    stride_p_k,
    v_ptr,
    stride_v_d,
    stride_v_k,
    out_ptr,
    stride_out_n,
    stride_out_d,
    d_out,
    d_in,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_n, pid_d = grouped_program(d_out, d_in, BLOCK_N, BLOCK_D, GROUP_N)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < d_out, offs_d < d_in
    mask = mask_n[:, None] & mask_d[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)  # [BLOCK_N, BLOCK_D]
    acc = accumulate(
        acc, p_ptr, stride_p_n, stride_p_k, v_ptr, stride_v_d, stride_v_k,
        offs_n, mask_n, offs_d, mask_d, 0, k, BLOCK_K, PRECISION,
    )  # fmt: skip
    row_n, row_d = offs_n.to(tl.int64)[:, None], offs_d.to(tl.int64)[None, :]
    w = tl.load(w_ptr + row_n * stride_w_n + row_d * stride_w_d, mask=mask, other=0.0)
    dtype = out_ptr.dtype.element_ty
    if dtype == tl.bfloat16:
        acc += cast(w, dtype).to(tl.float32)
        out = round_stochastically(acc, row_n, row_d)
    else:
        acc += w.to(tl.float32)
        out = cast(acc, dtype)
    tl.store(out_ptr + row_n * stride_out_n + row_d * stride_out_d, out, mask=mask)


def compose(weight: Tensor, U: Tensor, V: Tensor, core: Tensor, dtype: torch.dtype) -> Tensor:
    """W' = W + U core V^T: weight (d_out, d_in), U (d_out, k), V (d_in, k), core (k, k) -> (d_out, d_in) in `dtype`.

    core may be smaller where the last columns of U and V are zero. Half outputs take the products through the tensor
    cores (tf32, for float16 in three terms): what that loses is below the rounding of the sum, whatever the size of the
    update.
    """
    (d_out, d_in), k = weight.shape, V.shape[1]
    P = U.to(torch.float32) @ padded_core(core, k, torch.float32)
    out = torch.empty((d_out, d_in), dtype=dtype, device=weight.device)
    key = table_key(dtype, (weight.dtype, V.dtype), dtype != torch.float16 and aligned(weight, P, V))

    config = compose_config(key, d_out, d_in)
    with current_device(weight):
        _compose_kernel[(triton.cdiv(d_out, config.rows) * triton.cdiv(d_in, config.cols),)](
            weight, *weight.stride(), P, *P.stride(), V, *V.stride(), out, *out.stride(), d_out, d_in, k,
            BLOCK_N=config.rows, BLOCK_D=config.cols, BLOCK_K=config.depth, GROUP_N=GROUP,
            PRECISION=COMPOSE_PRECISION[dtype], **config.options,
        )  # fmt: skip
    return out
