"""Device functions shared by the kernels: program order, casts, products and the accumulation loop."""

from __future__ import annotations

import triton
import triton.language as tl

from ssvd_kernels.ops.kernels.constants import LATTICE

# Triton's interpreter multiplies bfloat16 tiles as integers and truncates casts to bfloat16: `cast` and `product` do
# both right there, and cost nothing where the kernels are compiled.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
ROW_STEP, COL_STEP = tl.constexpr(LATTICE[0]), tl.constexpr(LATTICE[1])


@triton.jit
def cast(tile, dtype: tl.constexpr):
    """tile in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and tile.dtype == tl.float32:
        bits = tile.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        tile = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    return tile.to(dtype)


@triton.jit
def round_stochastically(tile, row, col):
    """float32 tile to bfloat16 as `reference.round_stochastically` does it; (row, col) is each element's place."""
    noise = (row.to(tl.uint32) * ROW_STEP + col.to(tl.uint32) * COL_STEP) & 0xFFFF
    bits = tile.to(tl.uint32, bitcast=True) + noise
    rounded = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    return tl.where(tile == tile, rounded, tile).to(tl.bfloat16)


@triton.jit
def scale_for(largest):
    """The power of two that brings `largest`, a float32, to 2^7 or more, less than 2^8: 2^-8 of float16's range."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    return (tl.minimum(tl.maximum(261 - exponent, 1), 253) << 23).to(tl.float32, bitcast=True)


@triton.jit
def float16_terms(tile):
    """float32 tile as the sum of two of float16, largest first: 23 of its 24 bits."""
    first = tile.to(tl.float16)
    return first, (tile - first.to(tl.float32)).to(tl.float16)


@triton.jit
def split_product(a, b, acc):
    """acc + a b of float32 tiles by the tensor cores, without the product of the second terms, 2^-24 of the first's.

    Summed apart, as tensor cores cut off sums that they carry on, where an addition rounds.
    """
    a0, a1 = float16_terms(-a)
    b0, b1 = float16_terms(b)
    part = tl.dot(a1, b0)
    part = tl.dot(a0, b1, part)
    return acc - tl.dot(a0, b0, part)  # of a sum the compiler would make one chain again


@triton.jit
def product(a, b, acc):
    """acc + a b, accumulated in float32.

    float32 tiles are summed apart: in one chain of sums over all of k the error would grow with sqrt(k).
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    if a.dtype == tl.float32:
        return acc - tl.dot(-a, b, input_precision="ieee")  # the compiler would make a sum one chain again
    return tl.dot(a, b, acc)


@triton.jit
def grouped_program(n_rows, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, GROUP: tl.constexpr):
    """The tile (row block, column block) of this program: GROUP row blocks share their column tiles in L2."""
    pid = tl.program_id(0)
    blocks_r = tl.cdiv(n_rows, BLOCK_ROWS)
    blocks_c = tl.cdiv(n_cols, BLOCK_COLS)
    first = pid // (GROUP * blocks_c) * GROUP
    height = min(blocks_r - first, GROUP)
    inside = pid % (GROUP * blocks_c)
    return first + inside % height, inside // height


@triton.jit
def accumulate(
    acc,
    a_ptr,
    stride_a_row,
    stride_a_k,
    b_ptr,
    stride_b_col,
    stride_b_k,
    offs_row,
    mask_row,
    offs_col,
    mask_col,
    start,
    stop,
    BLOCK_K: tl.constexpr,
    stop_b=None,
    scale_a=None,
    scale_b=None,
    HOLLOW: tl.constexpr = None,
):
    """acc[row, col] + sum over start <= j < stop of a[row, j] b[col, j]; b's tiles are cast to a's dtype.

    From `stop_b` on, b counts as zero, so that a, of padded rows, can be read in wide loads. So does the diagonal of
    the operand that HOLLOW names, "a" or "b". Given scales, a and b are float32, and (scale_a a) and (scale_b b) are
    multiplied as `split_product` does it. Offsets and steps are 64-bit: rows times stride passes 2^31 for long batches.
    """
    offs_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
    a_ptrs = a_ptr + offs_row.to(tl.int64)[:, None] * stride_a_row + offs_k[None, :] * stride_a_k
    b_ptrs = b_ptr + offs_col.to(tl.int64)[None, :] * stride_b_col + offs_k[:, None] * stride_b_k
    step = tl.full((), BLOCK_K, tl.int64)
    for j in range(start, stop, BLOCK_K):
        mask_k = j + tl.arange(0, BLOCK_K) < stop
        a = tl.load(a_ptrs, mask=mask_row[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_ROWS, BLOCK_K]
        mask_k = j + tl.arange(0, BLOCK_K) < (stop if stop_b is None else stop_b)
        b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_col[None, :], other=0.0)  # [BLOCK_K, BLOCK_COLS]
        if HOLLOW == "a":
            a = tl.where(offs_row[:, None] == j + tl.arange(0, BLOCK_K)[None, :], 0.0, a)
        elif HOLLOW == "b":
            b = tl.where(j + tl.arange(0, BLOCK_K)[:, None] == offs_col[None, :], 0.0, b)
        if scale_a is None:
            acc = product(a, cast(b, a.dtype), acc)
        else:
            acc = split_product(a * scale_a, b * scale_b, acc)
        a_ptrs += step * stride_a_k
        b_ptrs += step * stride_b_k
    return acc
