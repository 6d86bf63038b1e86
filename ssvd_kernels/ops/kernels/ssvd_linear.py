"""Factored SSVD linear: y = x W^T + ((x V) core^T) U^T + b and its gradients, every element written once.

Two kernels serve both directions. dx = dy W + ((dy U) core) V^T is the forward with U and V swapped and `weight` and
`core` transposed, which only changes strides:

    _ssvd_linear_fwd_kernel       y = [x | q] [W | U]^T + b, q = z core^T: one float32 accumulator over d and then k.
    _ssvd_linear_one_pass_kernel  small k: x W^T and z = x V accumulate together, so x is read once and z, q stay in
                                  registers; costs BLOCK_R / BLOCK_N more products, saves two launches and q.

Each output tile belongs to exactly one program, which stores it once (z: the programs of column block 0).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssvd_kernels.ops.kernels.launch import aligned, core_grad, launch, padded_core
from ssvd_kernels.ops.kernels.tile_sizes import (
    GROUP,
    TileConfig,
    cdiv,
    linear_config,
    one_pass_config,
    one_pass_rank,
    table_key,
)
from ssvd_kernels.ops.kernels.tiles import accumulate, cast, grouped_program, product


@triton.jit(do_not_specialize=["T"])
def _ssvd_linear_fwd_kernel(
    x_ptr,
    w_ptr,
    q_ptr,
    u_ptr,
    b_ptr,
    y_ptr,
    stride_x_t,
    stride_x_d,
    stride_w_n,
    stride_w_d,
    stride_q_t,
    stride_q_k,
    stride_u_n,
    stride_u_k,
    stride_b_n,
    stride_y_t,
    stride_y_n,
    T,
    d_in,
    d_out,
    k,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    pid_t, pid_n = grouped_program(T, d_out, BLOCK_T, BLOCK_N, GROUP_T)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_t, mask_n = offs_t < T, offs_n < d_out
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)  # [BLOCK_T, BLOCK_N]
    acc = accumulate(
        acc, x_ptr, stride_x_t, stride_x_d, w_ptr, stride_w_n, stride_w_d,
        offs_t, mask_t, offs_n, mask_n, 0, d_in, BLOCK_K,
    )  # fmt: skip
    acc = accumulate(
        acc, q_ptr, stride_q_t, stride_q_k, u_ptr, stride_u_n, stride_u_k,
        offs_t, mask_t, offs_n, mask_n, 0, k, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(b_ptr + offs_n * stride_b_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_t.to(tl.int64)[:, None] * stride_y_t + offs_n[None, :] * stride_y_n
    tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["T"])
def _ssvd_linear_one_pass_kernel(
    x_ptr,
    w_ptr,
    v_ptr,
    core_ptr,
    u_ptr,
    b_ptr,
    y_ptr,
    z_ptr,
    stride_x_t,
    stride_x_d,
    stride_w_n,
    stride_w_d,
    stride_v_d,
    stride_v_k,
    stride_core_i,
    stride_core_j,
    stride_u_n,
    stride_u_k,
    stride_b_n,
    stride_y_t,
    stride_y_n,
    stride_z_t,
    stride_z_k,
    T,
    d_in,
    d_out,
    k,
    rank,
    HAS_BIAS: tl.constexpr,
    NEED_Z: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    pid_t, pid_n = grouped_program(T, d_out, BLOCK_T, BLOCK_N, GROUP_T)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_t, mask_n, mask_r = offs_t < T, offs_n < d_out, offs_r < k
    row_t, row_n = offs_t.to(tl.int64), offs_n.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64)
    x_ptrs = x_ptr + row_t[:, None] * stride_x_t + offs_d[None, :] * stride_x_d
    w_ptrs = w_ptr + row_n[None, :] * stride_w_n + offs_d[:, None] * stride_w_d
    v_ptrs = v_ptr + offs_d[:, None] * stride_v_d + offs_r[None, :] * stride_v_k
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    acc_z = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for j in range(0, d_in, BLOCK_K):
        mask_d = j + tl.arange(0, BLOCK_K) < d_in
        x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_T, BLOCK_K]
        w = tl.load(w_ptrs, mask=mask_d[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        v = tl.load(v_ptrs, mask=mask_d[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = product(x, cast(w, dtype), acc)
        acc_z = product(x, cast(v, dtype), acc_z)
        x_ptrs += step * stride_x_d
        w_ptrs += step * stride_w_d
        v_ptrs += step * stride_v_d
    z = cast(acc_z, dtype)  # [BLOCK_T, BLOCK_R]
    if NEED_Z:
        if pid_n == 0:
            z_ptrs = z_ptr + row_t[:, None] * stride_z_t + offs_r[None, :] * stride_z_k
            tl.store(z_ptrs, z, mask=mask_t[:, None] & mask_r[None, :])
    core_ptrs = core_ptr + offs_r[None, :] * stride_core_i + offs_r[:, None] * stride_core_j
    mask_core = (offs_r < rank)[None, :] & (offs_r < rank)[:, None]
    core_t = tl.load(core_ptrs, mask=mask_core, other=0.0)  # [BLOCK_R, BLOCK_R]
    acc_q = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    acc_q = product(z, cast(core_t, dtype), acc_q)  # [BLOCK_T, BLOCK_R]
    u_ptrs = u_ptr + row_n[None, :] * stride_u_n + offs_r[:, None] * stride_u_k
    u_t = tl.load(u_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
    acc = product(cast(acc_q, dtype), cast(u_t, dtype), acc)
    if HAS_BIAS:
        acc += tl.load(b_ptr + offs_n * stride_b_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + row_t[:, None] * stride_y_t + offs_n[None, :] * stride_y_n
    tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_n[None, :])


def _products(x: Tensor, weight: Tensor, q: Tensor, U: Tensor, bias: Tensor | None) -> Tensor:
    """[x | q] [weight | U]^T + bias in x's dtype: x (T, d_in), weight (d_out, d_in), q (T, k), U (d_out, k)."""
    (T, d_in), d_out, k = x.shape, weight.shape[0], q.shape[1]
    y = torch.empty((T, d_out), dtype=x.dtype, device=x.device)
    key = table_key(x.dtype, (weight.dtype, U.dtype), aligned(x, weight, q, U))

    config = linear_config(key, T, d_out)
    b, grid = y if bias is None else bias, cdiv(T, config.rows) * cdiv(d_out, config.cols)
    launch(
        _ssvd_linear_fwd_kernel, (grid, 1, 1), (x, weight, q, U, b, y),
        (*x.stride(), *weight.stride(), *q.stride(), *U.stride(), b.stride(-1), *y.stride(), T, d_in, d_out, k),
        (bias is not None, config.rows, config.cols, config.depth, GROUP), config,
    )  # fmt: skip
    return y


def _one_pass(
    x: Tensor, weight: Tensor, V: Tensor, core: Tensor, U: Tensor, bias: Tensor | None, need_z: bool, config: TileConfig
) -> tuple[Tensor, Tensor | None]:
    (T, d_in), d_out, k = x.shape, weight.shape[0], V.shape[1]
    y = torch.empty((T, d_out), dtype=x.dtype, device=x.device)
    z = torch.empty((T, k), dtype=x.dtype, device=x.device) if need_z else None
    b, out_z, grid = y if bias is None else bias, y if z is None else z, cdiv(T, config.rows) * cdiv(d_out, config.cols)
    launch(
        _ssvd_linear_one_pass_kernel, (grid, 1, 1), (x, weight, V, core, U, b, y, out_z),
        (*x.stride(), *weight.stride(), *V.stride(), *core.stride(), *U.stride(), b.stride(-1), *y.stride(),
         *out_z.stride(), T, d_in, d_out, k, core.shape[0]),
        (bias is not None, need_z, config.rows, config.cols, config.depth, one_pass_rank(k), GROUP), config,
    )  # fmt: skip
    return y, z


def _apply(
    x: Tensor, weight: Tensor, V: Tensor, core: Tensor, U: Tensor, bias: Tensor | None, need_z: bool
) -> tuple[Tensor, Tensor | None]:
    """y (T, d_out) and z = x V (T, k) if needed, for x (T, d_in)."""
    (T, d_out), k = (x.shape[0], weight.shape[0]), V.shape[1]
    if T == 0:
        return x.new_empty((0, d_out)), x.new_empty((0, k)) if need_z else None
    key = table_key(x.dtype, (weight.dtype, U.dtype, V.dtype), aligned(x, weight, U, V))
    config = one_pass_config(key, T, d_out, k)
    if config is not None:
        return _one_pass(x, weight, V, core, U, bias, need_z, config)
    z = x @ V
    return _products(x, weight, z @ padded_core(core, k, x.dtype).mT, U, bias), z if need_z else None


def ssvd_linear_fwd(
    x: Tensor, weight: Tensor, U: Tensor, V: Tensor, core: Tensor, bias: Tensor | None, need_z: bool
) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + ((x V) core^T) U^T + b (..., d_out), and z = x V (..., k) if `need_z`, in x's dtype.

    x (..., d_in), weight (d_out, d_in), U (d_out, k), V (d_in, k), bias (d_out), core (k, k) or smaller where the last
    columns of U and V are zero; any strides. U and V have x's dtype; weight, bias and core may be float32 where x is
    half: their tiles are cast in the kernel.
    """
    y, z = _apply(x.reshape(-1, x.shape[-1]), weight, V, core, U, bias, need_z)
    lead = x.shape[:-1]
    return y.view(*lead, y.shape[1]), None if z is None else z.view(*lead, z.shape[1])


def ssvd_linear_bwd(
    dy: Tensor, z: Tensor | None, weight: Tensor, U: Tensor, V: Tensor, core: Tensor, need_dx: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx = dy W + ((dy U) core) V^T (T, d_in) if `need_dx`; dcore = (dy U)^T z (k, k) in float32 if z is given.

    dy (T, d_out), z (T, k) in dy's dtype; the parameters as in `ssvd_linear_fwd`.
    """
    dx = dyU = None
    if need_dx:
        dx, dyU = _apply(dy, weight.mT, U, core.mT, V, None, z is not None)
    if z is None:
        return dx, None
    return dx, core_grad(dy @ U if dyU is None else dyU, z)
