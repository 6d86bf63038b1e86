"""core_grad = a^T b over T tokens, split over T, with bitwise reproducible results.

The product has few outputs and a long sum, so T is cut into S chunks. Program (tile, chunk) writes one tile of a
float32 partial result (S, ka, kb) once. The partial results are added in the order of the chunks, never with atomics.
S depends on the shape alone, not on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssvd_kernels.ops.kernels.launch import aligned, current_device
from ssvd_kernels.ops.kernels.tile_sizes import core_grad_config, core_grad_splits, table_key
from ssvd_kernels.ops.kernels.tiles import accumulate


@triton.jit(do_not_specialize=["T", "chunk"])
def _core_grad_kernel(
    a_ptr,
    stride_a_t,
    stride_a_k,
    b_ptr,
    stride_b_t,
    stride_b_k,
    out_ptr,
    stride_out_s,
    stride_out_a,
    stride_out_b,
    T,
    ka,
    kb,
    chunk,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    blocks_b = tl.cdiv(kb, BLOCK_B)
    pid, split = tl.program_id(0), tl.program_id(1)
    offs_a = pid // blocks_b * BLOCK_A + tl.arange(0, BLOCK_A)
    offs_b = pid % blocks_b * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_a, mask_b = offs_a < ka, offs_b < kb
    start = split * chunk
    acc = tl.zeros((BLOCK_A, BLOCK_B), dtype=tl.float32)  # [BLOCK_A, BLOCK_B]
    acc = accumulate(
        acc, a_ptr, stride_a_k, stride_a_t, b_ptr, stride_b_k, stride_b_t,
        offs_a, mask_a, offs_b, mask_b, start, min(start + chunk, T), BLOCK_T, "ieee",
    )  # fmt: skip
    out_ptrs = out_ptr + split.to(tl.int64) * stride_out_s
    out_ptrs += offs_a.to(tl.int64)[:, None] * stride_out_a + offs_b[None, :] * stride_out_b
    tl.store(out_ptrs, acc, mask=mask_a[:, None] & mask_b[None, :])


def core_grad(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in float32, bit-reproducible: a (T, ka), b (T, kb), any strides -> (ka, kb) float32; zeros for T = 0."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    T, ka = a.shape
    kb = b.shape[1]
    config = core_grad_config(table_key(dtype, (), aligned(a, b)), ka, kb)
    chunk, splits = core_grad_splits(config, T, ka, kb)
    out = torch.empty((splits, ka, kb), dtype=torch.float32, device=a.device)
    grid = (triton.cdiv(ka, config.rows) * triton.cdiv(kb, config.cols), splits)
    with current_device(a):
        _core_grad_kernel[grid](
            a, *a.stride(), b, *b.stride(), out, *out.stride(), T, ka, kb, chunk,
            BLOCK_A=config.rows, BLOCK_B=config.cols, BLOCK_T=config.depth, **config.options,
        )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)
