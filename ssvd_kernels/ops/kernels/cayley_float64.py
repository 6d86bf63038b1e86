"""Where float32 does not serve the Cayley transform: how that is seen, and elimination in float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssvd_kernels.ops.kernels.constants import LARGE, NOT_UNIT
from ssvd_kernels.ops.kernels.launch import launch
from ssvd_kernels.ops.kernels.tile_sizes import CAYLEY_PACK, CAYLEY_WIDE, cdiv


@triton.jit
def gauss_jordan(a, n, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """a = A - ONE I becomes A^-1 - ONE I, without pivoting; with ONE = 1 nothing is lost of a small a."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    for p in range(n):
        row = tl.sum(tl.where(i == p, a, 0.0), axis=0)[None, :]
        col = tl.sum(tl.where(j == p, a, 0.0), axis=1)[:, None]
        pivot = tl.sum(tl.where(i == p, col, 0.0))
        inverse = 1.0 / (ONE + pivot)
        scaled = tl.where(j == p, inverse, row * inverse)
        own = -pivot * inverse if ONE else inverse
        a = tl.where(i == p, tl.where(j == p, own, scaled), tl.where(j == p, 0.0, a) - col * scaled)
    return a


@triton.jit
def _cayley_check_kernel(
    theta_ptr,
    e_ptr,
    failed_ptr,
    k,
    n,
    LARGE: tl.constexpr,
    NOT_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Whether a block of columns of K or of G = I + E is one that float32 may not serve, see csrc/cayley.h."""
    batch, col, offs = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK, tl.arange(0, BLOCK)
    theta_ptr += batch * (k * (k - 1) // 2)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)  # of the columns of K
    excess = tl.zeros((BLOCK,), dtype=tl.float32)  # of those of G, over 1
    for row in range(0, k, BLOCK):
        i, j = row + offs[:, None], col + offs[None, :]
        e = tl.load(e_ptr + batch * n * n + i * n + j, mask=(i < k) & (j < k), other=0.0)
        excess += tl.sum(e * tl.where(i == j, e + 2, e), axis=0)
        i, j = min(row, col) + offs[:, None], max(row, col) + offs[None, :]
        place = i * (2 * k - i - 1) // 2 - i - 1 + j
        upper = tl.load(theta_ptr + place, mask=(i < j) & (j < k), other=0.0)
        if row <= col:
            squares += tl.sum(upper * upper, axis=0)
        if row >= col:
            squares += tl.sum(upper * upper, axis=1)
    served = (squares <= LARGE) & (tl.abs(excess) <= NOT_UNIT)  # false for what is not a number
    tl.store(failed_ptr + batch * tl.num_programs(1) + tl.program_id(1), 1 - tl.min(served.to(tl.int32)))


@triton.jit
def _load_wide(high_ptr, low_ptr, i, j, n):
    return tl.load(high_ptr + i * n + j).to(tl.float64) + tl.load(low_ptr + i * n + j).to(tl.float64)


@triton.jit
def _store_wide(high_ptr, low_ptr, i, j, n, value):
    tl.debug_barrier()  # what `value` was made of has been read
    high = value.to(tl.float32)
    tl.store(high_ptr + i * n + j, high)
    tl.store(low_ptr + i * n + j, (value - high.to(tl.float64)).to(tl.float32))


@triton.jit
def _cayley_wide_kernel(
    theta_ptr,
    e_ptr,
    low_ptr,
    failed_ptr,
    blocks,
    k,
    n,
    BLOCK: tl.constexpr,
):
    """E (n, n) anew where a block of it failed: block Gauss-Jordan on A = I + K in float64, A stored as e + low.

    Of few matrices, so one program does a whole one, and needs no memory of its own.
    """
    batch, offs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    theta_ptr += batch * (k * (k - 1) // 2)
    e_ptr += batch * n * n
    low_ptr += batch * n * n
    failed = 0
    for block in range(blocks):
        failed += tl.load(failed_ptr + batch * blocks + block)
    if failed > 0:
        for row in range(0, n, BLOCK):
            for col in range(0, n, BLOCK):
                i, j = row + offs[:, None], col + offs[None, :]
                first, last = tl.minimum(i, j), tl.maximum(i, j)
                place = first * (2 * k - first - 1) // 2 - first - 1 + last
                upper = tl.load(theta_ptr + place, mask=(i != j) & (last < k), other=0.0)
                value = tl.where(i < j, upper, tl.where(i > j, -upper, 1.0)).to(tl.float64)
                _store_wide(e_ptr, low_ptr, i, j, n, value)
        for p in range(0, n, BLOCK):
            r, c = p + offs[:, None], p + offs[None, :]
            tl.debug_barrier()
            pivot = gauss_jordan(_load_wide(e_ptr, low_ptr, r, c, n), BLOCK, 0, BLOCK)
            for col in range(0, n, BLOCK):
                if col != p:
                    j = col + offs[None, :]
                    value = tl.dot(pivot, _load_wide(e_ptr, low_ptr, r, j, n), out_dtype=tl.float64)
                    _store_wide(e_ptr, low_ptr, r, j, n, value)
            tl.debug_barrier()
            for row in range(0, n, BLOCK):
                if row != p:
                    i = row + offs[:, None]
                    column = _load_wide(e_ptr, low_ptr, i, c, n)
                    for col in range(0, n, BLOCK):
                        if col != p:
                            j = col + offs[None, :]
                            value = _load_wide(e_ptr, low_ptr, i, j, n)
                            value -= tl.dot(column, _load_wide(e_ptr, low_ptr, r, j, n), out_dtype=tl.float64)
                            _store_wide(e_ptr, low_ptr, i, j, n, value)
                    _store_wide(e_ptr, low_ptr, i, c, n, -tl.dot(column, pivot, out_dtype=tl.float64))
            _store_wide(e_ptr, low_ptr, r, c, n, pivot)
        tl.debug_barrier()
        for row in range(0, n, BLOCK):
            for col in range(0, n, BLOCK):
                i, j = row + offs[:, None], col + offs[None, :]
                value = 2 * (_load_wide(e_ptr, low_ptr, i, j, n) - tl.where(i == j, 1.0, 0.0))
                _store_wide(e_ptr, low_ptr, i, j, n, value)


def redo_large_(E: Tensor, theta: Tensor, k: int, scratch: Tensor) -> None:
    """Does those matrices of the batch again, in float64, that float32 did not serve."""
    B, n, blocks = len(E), E.shape[-1], cdiv(k, CAYLEY_PACK.rows)
    failed = torch.empty((B, blocks), dtype=torch.int32, device=E.device)
    constants = LARGE, NOT_UNIT, CAYLEY_PACK.rows
    launch(_cayley_check_kernel, (B, blocks, 1), (theta, E, failed), (k, n), constants, CAYLEY_PACK)
    numbers = blocks, k, n
    launch(_cayley_wide_kernel, (B, 1, 1), (theta, E, scratch, failed), numbers, (CAYLEY_WIDE.rows,), CAYLEY_WIDE)
