"""The batched Cayley transform of float32 matrices on tensor cores: Gauss-Jordan leaves and the products between them.

The algorithm is that of csrc/cayley.h: E = 2 [(I + K)^-1 - I] by 2x2 block elimination, with its backward in closed
form. Ranks are zero-padded to a multiple of 16, which is exact, keeps rows aligned and avoids ragged tiles.
Each product splits its fp32 operands into bf16 terms, multiplies those on the tensor cores and accumulates in fp32.
Three terms ("bf16x6", six products of terms) keep float32 accuracy. Two ("bf16x3") keep 16 bits, the meaning of
`torch.set_float32_matmul_precision("high")` in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssvd_kernels.ops.kernels.launch import current_device
from ssvd_kernels.ops.kernels.tile_sizes import CAYLEY_LEAF, CAYLEY_PACK, cayley_config
from ssvd_kernels.ops.kernels.tiles import accumulate


@triton.jit
def _skew_kernel(theta_ptr, k_ptr, stride_k_b, stride_k_row, k, padded, BLOCK: tl.constexpr):
    """Block (r, c) of K, r <= c, and its mirror image; zero beyond k."""
    batch, row, col = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if row <= col:
        i = row * BLOCK + tl.arange(0, BLOCK)[:, None]
        j = col * BLOCK + tl.arange(0, BLOCK)[None, :]
        place = i * (2 * k - i - 1) // 2 - i - 1 + j
        tile = tl.load(theta_ptr + batch * (k * (k - 1) // 2) + place, mask=(i < j) & (j < k), other=0.0)
        i_t = row * BLOCK + tl.arange(0, BLOCK)[None, :]
        j_t = col * BLOCK + tl.arange(0, BLOCK)[:, None]
        mirror = -tl.trans(tile)  # [j, i]
        if row == col:
            tile += mirror
        base = k_ptr + batch * stride_k_b
        tl.store(base + i * stride_k_row + j, tile, mask=(i < padded) & (j < padded))
        if row < col:
            tl.store(base + j_t * stride_k_row + i_t, mirror, mask=(i_t < padded) & (j_t < padded))


@triton.jit
def _unskew_kernel(z_ptr, stride_z_b, stride_z_row, dtheta_ptr, k, BLOCK: tl.constexpr):
    """dtheta[i < j] = 2 (Z[j, i] - Z[i, j])."""
    batch, row, col = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if row <= col:
        i = row * BLOCK + tl.arange(0, BLOCK)[:, None]
        j = col * BLOCK + tl.arange(0, BLOCK)[None, :]
        i_t = row * BLOCK + tl.arange(0, BLOCK)[None, :]
        j_t = col * BLOCK + tl.arange(0, BLOCK)[:, None]
        base = z_ptr + batch * stride_z_b
        upper = tl.load(base + i * stride_z_row + j, mask=(i < k) & (j < k), other=0.0)
        lower = tl.load(base + j_t * stride_z_row + i_t, mask=(i_t < k) & (j_t < k), other=0.0)
        place = i * (2 * k - i - 1) // 2 - i - 1 + j
        dtheta = 2 * (tl.trans(lower) - upper)
        tl.store(dtheta_ptr + batch * (k * (k - 1) // 2) + place, dtheta, mask=(i < j) & (j < k))


@triton.jit
def _cayley_leaf_kernel(n_ptr, stride_n_b, stride_n_row, n, BLOCK: tl.constexpr):
    """N (n, n) becomes 2 [(I + N)^-1 - I]: Gauss-Jordan without pivoting, in float64, on A = I + N kept as A - I."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (i < n) & (j < n)
    ptrs = n_ptr + tl.program_id(0).to(tl.int64) * stride_n_b + i * stride_n_row + j
    a = tl.load(ptrs, mask=mask, other=0.0).to(tl.float64)  # [BLOCK, BLOCK]
    for p in range(n):
        row = tl.sum(tl.where(i == p, a, 0.0), axis=0)[None, :]
        col = tl.sum(tl.where(j == p, a, 0.0), axis=1)[:, None]
        pivot = tl.sum(tl.where(i == p, col, 0.0))
        inverse = 1.0 / (1.0 + pivot)
        scaled = tl.where(j == p, inverse, row * inverse)
        a = tl.where(i == p, tl.where(j == p, -pivot * inverse, scaled), tl.where(j == p, 0.0, a) - col * scaled)
    tl.store(ptrs, (2 * a).to(tl.float32), mask=mask)


@triton.jit
def _cayley_product_kernel(
    out_ptr,
    stride_out_b,
    stride_out_m,
    c_ptr,
    stride_c_b,
    stride_c_m,
    a_ptr,
    stride_a_b,
    stride_a_m,
    stride_a_k,
    b_ptr,
    stride_b_b,
    stride_b_k,
    stride_b_n,
    beta,
    alpha,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * blocks_n
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    offs_m = tile // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)  # [BLOCK_M, BLOCK_N]
    acc = accumulate(
        acc, a_ptr + batch * stride_a_b, stride_a_m, stride_a_k, b_ptr + batch * stride_b_b, stride_b_n, stride_b_k,
        offs_m, mask_m, offs_n, mask_n, 0, K, BLOCK_K, PRECISION,
    )  # fmt: skip
    mask = mask_m[:, None] & mask_n[None, :]
    row, col = offs_m.to(tl.int64)[:, None], offs_n[None, :]
    c = tl.load(c_ptr + batch * stride_c_b + row * stride_c_m + col, mask=mask, other=0.0)
    tl.store(out_ptr + batch * stride_out_b + row * stride_out_m + col, beta * c + alpha * acc, mask=mask)


LEAF = CAYLEY_LEAF.rows


def cayley_delta(theta: Tensor, k: int) -> Tensor:
    """E (B, n, n) from theta (B, k(k-1)/2), float32; n is k rounded up to a multiple of 16, E zero beyond k."""
    B, n = theta.shape[0], triton.cdiv(k, 16) * 16
    if not theta.numel():  # k = 1, or an empty batch
        return theta.new_zeros((B, n, n))
    E = theta.new_empty((B, n, n))
    with current_device(theta):
        _skew_kernel[_block_pairs(B, n)](theta, E, *E.stride()[:2], k, n, BLOCK=CAYLEY_PACK.rows, **CAYLEY_PACK.options)
        _inverse_delta_(E, torch.empty_like(E), _precision(k))
    return E


def cayley_delta_backward(grad: Tensor, E: Tensor, k: int) -> Tensor:
    """dtheta (B, k(k-1)/2) = strict upper triangle of 2 (Z^T - Z), Z = B^T dE B^T, B = I + E/2; dE and E (B, n, n)."""
    B = E.shape[0]
    dtheta = grad.new_empty((B, k * (k - 1) // 2))
    if dtheta.numel():
        X, Z = torch.empty_like(E), torch.empty_like(E)
        with current_device(grad):
            _multiply_add(X, 1.0, grad, 0.5, grad, E.mT, _precision(k))
            _multiply_add(Z, 1.0, X, 0.5, E.mT, X, _precision(k))
            _unskew_kernel[_block_pairs(B, k)](
                Z, *Z.stride()[:2], dtheta, k, BLOCK=CAYLEY_PACK.rows, **CAYLEY_PACK.options
            )
    return dtheta


def _inverse_delta_(N: Tensor, scratch: Tensor, precision: str) -> None:
    """N (B, n, n) becomes 2 [(I + N)^-1 - I]; the off-diagonal blocks of `scratch` hold L and R. See csrc/cayley.h."""
    n = N.shape[-1]
    if n <= LEAF:
        _cayley_leaf_kernel[(N.shape[0],)](N, *N.stride()[:2], n, BLOCK=CAYLEY_LEAF.rows, **CAYLEY_LEAF.options)
        return
    h = LEAF * (triton.cdiv(n, LEAF) // 2)
    N11, N12, N21, N22 = N[:, :h, :h], N[:, :h, h:], N[:, h:, :h], N[:, h:, h:]
    R, L = scratch[:, :h, h:], scratch[:, h:, :h]
    _inverse_delta_(N11, scratch[:, :h, :h], precision)  # E11
    _multiply_add(L, 1.0, N21, 0.5, N21, N11, precision)  # L = N21 (I + N11)^-1
    _multiply_add(R, 1.0, N12, 0.5, N11, N12, precision)  # R = (I + N11)^-1 N12
    _multiply_add(N22, 1.0, N22, -1.0, L, N12, precision)  # Schur complement less I
    _inverse_delta_(N22, scratch[:, h:, h:], precision)  # E22
    _multiply_add(N12, -2.0, R, -1.0, R, N22, precision)  # E12 = -2 R (I + S)^-1
    _multiply_add(N21, -2.0, L, -1.0, N22, L, precision)  # E21 = -2 (I + S)^-1 L
    _multiply_add(N11, 1.0, N11, -1.0, N12, L, precision)  # E11 = 2 F11 - E12 L


def _multiply_add(out: Tensor, beta: float, C: Tensor, alpha: float, A: Tensor, B: Tensor, precision: str) -> None:
    """out = beta C + alpha A B for batches of matrices; out is C or overlaps nothing."""
    batch, M, N = out.shape
    config = cayley_config(precision, batch, M, N)
    _cayley_product_kernel[(batch * triton.cdiv(M, config.rows) * triton.cdiv(N, config.cols),)](
        out, *out.stride()[:2], C, *C.stride()[:2], A, *A.stride(), B, *B.stride(), beta, alpha, M, N, A.shape[-1],
        BLOCK_M=config.rows, BLOCK_N=config.cols, BLOCK_K=config.depth, PRECISION=precision, **config.options,
    )  # fmt: skip


def _precision(k: int) -> str:
    """Two terms where torch may use them and there is something to gain."""
    return "bf16x6" if torch.get_float32_matmul_precision() == "highest" or k <= LEAF else "bf16x3"


def _block_pairs(batch: int, n: int) -> tuple[int, int, int]:
    blocks = triton.cdiv(n, CAYLEY_PACK.rows)
    return batch, blocks, blocks
