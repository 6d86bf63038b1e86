"""The batched Cayley transform of float32 matrices on tensor cores: Gauss-Jordan leaves and the products between them.

The algorithm is that of csrc/cayley.h: E = 2 [(I + K)^-1 - I] by 2x2 block elimination, with its backward in closed
form. Ranks are zero-padded to a multiple of 16, which is exact, keeps rows aligned and avoids ragged tiles.
Each product splits its float32 operands into two terms of float16, multiplies those on the tensor cores and accumulates
in float32 (Ootomo and Yokota, arXiv 2203.03341). For float16's narrow range, operands are scaled by a power of two for
each matrix: by the largest |theta|, of which every operand is a moderate multiple where float32 serves at all (see
csrc/cayley.h), or the largest |dE|.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssvd_kernels.ops.kernels.cayley_float64 import gauss_jordan, redo_large_
from ssvd_kernels.ops.kernels.launch import launch
from ssvd_kernels.ops.kernels.tile_sizes import CAYLEY_LEAF, CAYLEY_PACK, cayley_config, cdiv
from ssvd_kernels.ops.kernels.tiles import accumulate, scale_for

CONVERGENT = tl.constexpr(0.25)  # ||N N||_F^2 up to which a leaf is inverted by a series
E_SCALE = tl.constexpr(256.0)  # of E, whose entries are at most 2


@triton.jit
def _skew_kernel(
    theta_ptr,
    k_ptr,
    stride_k_b,
    stride_k_row,
    k,
    padded,
    BLOCK: tl.constexpr,
):
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
def _unskew_kernel(
    z_ptr,
    dtheta_ptr,
    stride_z_b,
    stride_z_row,
    k,
    BLOCK: tl.constexpr,
):
    """dtheta[i < j] = 2 (Z[i, j] - Z[j, i])."""
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
        dtheta = 2 * (upper - tl.trans(lower))
        tl.store(dtheta_ptr + batch * (k * (k - 1) // 2) + place, dtheta, mask=(i < j) & (j < k))


@triton.jit
def _square_product(a_ptr, stride_a, a, b_ptr, stride_b, b, n, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """a b of matrices (n, n) in memory and in registers: products of whole tiles in registers would spill them."""
    offs = tl.arange(0, BLOCK)
    inside = offs < n
    scale_a, scale_b = scale_for(tl.max(tl.abs(a))), scale_for(tl.max(tl.abs(b)))
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    acc = accumulate(
        acc, a_ptr, stride_a, 1, b_ptr, 1, stride_b, offs, inside, offs, inside, 0, n, DEPTH, None,
        scale_a, scale_b,
    )  # fmt: skip
    return acc * (1 / scale_a) * (1 / scale_b)


@triton.jit
def _cayley_leaf_kernel(
    n_ptr,
    f_ptr,
    r_ptr,
    stride_b,
    stride_row,
    n,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """N (n, n) becomes 2 F, F = (I + N)^-1 - I = (I - N) (I + N^2) (I + N^4) ... - I; in float64 where N is large.

    Elimination takes n steps one after the other; the series two to five pairs of products, F += R + F R and R = R R
    from F = -N and R = N N. The last R is the true residual, -(N + F + N F), which takes back what rounding left.
    """
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    batch, mask = tl.program_id(0).to(tl.int64), (i < n) & (j < n)
    n_ptr += batch * stride_b
    f_ptr += batch * stride_b
    r_ptr += batch * BLOCK * BLOCK
    n_ptrs, f_ptrs, r_ptrs = n_ptr + i * stride_row + j, f_ptr + i * stride_row + j, r_ptr + i * BLOCK + j
    F = -tl.load(n_ptrs, mask=mask, other=0.0)  # [BLOCK, BLOCK]
    R = _square_product(n_ptr, stride_row, F, n_ptr, stride_row, F, n, BLOCK, DEPTH)
    size = tl.sum(R * R)
    if size > CONVERGENT:
        tl.store(n_ptrs, (2 * gauss_jordan(-F.to(tl.float64), n, 1, BLOCK)).to(tl.float32), mask=mask)
    else:
        small = tl.sum(F * F) * 2.0**-26  # an R of this size leaves less than the rounding of F after a last step
        steps = 0
        while size > small:
            size *= size
            steps += 1
        for _ in range(steps):
            tl.debug_barrier()
            tl.store(f_ptrs, F, mask=mask)
            tl.store(r_ptrs, R, mask=mask)
            tl.debug_barrier()
            F += R + _square_product(f_ptr, stride_row, F, r_ptr, BLOCK, R, n, BLOCK, DEPTH)
            R = _square_product(r_ptr, BLOCK, R, r_ptr, BLOCK, R, n, BLOCK, DEPTH)
        tl.debug_barrier()
        tl.store(f_ptrs, F, mask=mask)
        tl.debug_barrier()
        N = tl.load(n_ptrs, mask=mask, other=0.0)
        R = -(N + F + _square_product(n_ptr, stride_row, N, f_ptr, stride_row, F, n, BLOCK, DEPTH))
        tl.store(r_ptrs, R, mask=mask)
        tl.debug_barrier()
        F += R + _square_product(f_ptr, stride_row, F, r_ptr, BLOCK, R, n, BLOCK, DEPTH)
        tl.store(n_ptrs, 2 * F, mask=mask)


@triton.jit
def _cayley_product_kernel(
    out_ptr,
    c_ptr,
    a_ptr,
    b_ptr,
    e_ptr,
    largest_ptr,
    stride_out_b,
    stride_out_m,
    stride_c_b,
    stride_c_m,
    stride_c_n,
    stride_a_b,
    stride_a_m,
    stride_a_k,
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
    HOLLOW: tl.constexpr,
):
    """out = beta C + alpha A B, scaled by `largest` (batch,). The operand that HOLLOW names, "a" or "b", is E: instead
    of its diagonal one takes 1 + E[i, i] / 2, by which C's rows or columns are multiplied."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * blocks_n
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    offs_m = tile // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    scale = scale_for(tl.load(largest_ptr + batch))
    scale_a = E_SCALE if HOLLOW == "a" else scale
    scale_b = E_SCALE if HOLLOW == "b" else scale
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)  # [BLOCK_M, BLOCK_N]
    acc = accumulate(
        acc, a_ptr + batch * stride_a_b, stride_a_m, stride_a_k, b_ptr + batch * stride_b_b, stride_b_n, stride_b_k,
        offs_m, mask_m, offs_n, mask_n, 0, K, BLOCK_K, None, scale_a, scale_b, HOLLOW,
    )  # fmt: skip
    mask = mask_m[:, None] & mask_n[None, :]
    row, col = offs_m.to(tl.int64)[:, None], offs_n[None, :]
    c = tl.load(c_ptr + batch * stride_c_b + row * stride_c_m + col * stride_c_n, mask=mask, other=0.0)
    if HOLLOW == "a":
        c *= 1 + tl.load(e_ptr + batch * M * M + row * (M + 1), mask=mask_m[:, None], other=0.0) / 2
    elif HOLLOW == "b":
        c *= 1 + tl.load(e_ptr + batch * N * N + col * (N + 1), mask=mask_n[None, :], other=0.0) / 2
    out = beta * c + alpha * (acc * (1 / scale_a) * (1 / scale_b))
    tl.store(out_ptr + batch * stride_out_b + row * stride_out_m + col, out, mask=mask)


LEAF = CAYLEY_LEAF.rows


def cayley_delta(theta: Tensor, k: int) -> Tensor:
    """E (B, n, n) from theta (B, k(k-1)/2), float32; n is k rounded up to a multiple of 16, E zero beyond k."""
    B, n = theta.shape[0], cdiv(k, 16) * 16
    if not theta.numel():  # k = 1, or an empty batch
        return theta.new_zeros((B, n, n))
    E = theta.new_empty((B, n, n))
    launch(_skew_kernel, _block_pairs(B, n), (theta, E), (*E.stride()[:2], k, n), (CAYLEY_PACK.rows,), CAYLEY_PACK)
    scratch, rest = torch.empty_like(E), theta.new_empty((B, LEAF, LEAF))
    largest = _largest(theta) if n > LEAF else rest  # a leaf alone has scales of its own
    _inverse_delta_(E, scratch, rest, largest)
    if n > LEAF:
        redo_large_(E, theta, k, scratch)
    return E


def cayley_delta_backward(grad: Tensor, E: Tensor, k: int) -> Tensor:
    """dtheta (B, k(k-1)/2) = strict upper triangle of 2 (Z - Z^T), Z = B dE^T B, B = I + E/2; dE and E (B, n, n).

    In this order no first factor of a product is transposed, for which a tile would be turned in registers.
    B's diagonal is multiplied apart from the rest, see `reference.cayley_delta_backward_ref`.
    """
    B = E.shape[0]
    dtheta = grad.new_empty((B, k * (k - 1) // 2))
    if dtheta.numel():
        E, largest, X, Z = E.contiguous(), _largest(grad), torch.empty_like(E), torch.empty_like(E)
        _multiply_add(X, 1.0, grad.mT, 0.5, E, grad.mT, largest, "a", E)
        _multiply_add(Z, 1.0, X, 0.5, X, E, largest, "b", E)
        numbers = *Z.stride()[:2], k
        launch(_unskew_kernel, _block_pairs(B, k), (Z, dtheta), numbers, (CAYLEY_PACK.rows,), CAYLEY_PACK)
    return dtheta


def _inverse_delta_(N: Tensor, scratch: Tensor, rest: Tensor, largest: Tensor) -> None:
    """N (B, n, n) becomes 2 [(I + N)^-1 - I]; the off-diagonal blocks of `scratch` hold L and R, the leaves use the
    others and `rest`. See csrc/cayley.h."""
    n = N.shape[-1]
    if n <= LEAF:
        constants = CAYLEY_LEAF.rows, CAYLEY_LEAF.depth
        numbers = *N.stride()[:2], n
        launch(_cayley_leaf_kernel, (N.shape[0], 1, 1), (N, scratch, rest), numbers, constants, CAYLEY_LEAF)
        return
    h = LEAF * (cdiv(n, LEAF) // 2)
    N11, N12, N21, N22 = N[:, :h, :h], N[:, :h, h:], N[:, h:, :h], N[:, h:, h:]
    R, L = scratch[:, :h, h:], scratch[:, h:, :h]
    _inverse_delta_(N11, scratch[:, :h, :h], rest, largest)  # E11
    _multiply_add(L, 1.0, N21, 0.5, N21, N11, largest)  # L = N21 (I + N11)^-1
    _multiply_add(R, 1.0, N12, 0.5, N11, N12, largest)  # R = (I + N11)^-1 N12
    _multiply_add(N22, 1.0, N22, -1.0, L, N12, largest)  # Schur complement less I
    _inverse_delta_(N22, scratch[:, h:, h:], rest, largest)  # E22
    _multiply_add(N12, -2.0, R, -1.0, R, N22, largest)  # E12 = -2 R (I + S)^-1
    _multiply_add(N21, -2.0, L, -1.0, N22, L, largest)  # E21 = -2 (I + S)^-1 L
    _multiply_add(N11, 1.0, N11, -1.0, N12, L, largest)  # E11 = 2 F11 - E12 L


def _multiply_add(
    out: Tensor,
    beta: float,
    C: Tensor,
    alpha: float,
    A: Tensor,
    B: Tensor,
    largest: Tensor,
    hollow: str = "",
    E: Tensor | None = None,
) -> None:
    """out = beta C + alpha A B for batches of matrices; out is C or overlaps nothing. `hollow`: see the kernel."""
    batch, M, N = out.shape
    config = cayley_config(batch, M, N)
    launch(
        _cayley_product_kernel, (batch * cdiv(M, config.rows) * cdiv(N, config.cols), 1, 1),
        (out, C, A, B, out if E is None else E, largest),
        (*out.stride()[:2], *C.stride(), *A.stride(), *B.stride(), beta, alpha, M, N, A.shape[-1]),
        (config.rows, config.cols, config.depth, hollow), config,
    )  # fmt: skip


def _largest(batch: Tensor) -> Tensor:
    """The largest absolute value in each of a batch (B,)."""
    return torch.linalg.vector_norm(batch.flatten(1), math.inf, dim=1)


def _block_pairs(batch: int, n: int) -> tuple[int, int, int]:
    blocks = cdiv(n, CAYLEY_PACK.rows)
    return batch, blocks, blocks
