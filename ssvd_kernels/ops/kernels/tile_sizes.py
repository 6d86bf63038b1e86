"""Tile sizes of every kernel, and how they are chosen by shape.

Plain Python, without Triton. Tables are keyed by the dtype and alignment of the loads:
    half      x float16 or bfloat16, as the other operands     mixed   x half, some operand in float32
    float32   x float32 (IEEE products, no tensor cores)       *_odd   likewise, where some operand cannot be
                                                                       read 16 elements at a time (d = 1021, say)
Scalar loads need many more registers, so the odd tables have smaller tiles. Tables run from small to large tiles.
The choice depends on shapes alone, so the same shapes give the same bits on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

GROUP = 8  # row blocks that share their column tiles in L2
MIN_PROGRAMS = 128  # about one program per multiprocessor of a large GPU
ONE_PASS_MAX_T = 256  # above it, BLOCK_R / BLOCK_N more products cost more than two saved launches


class TileConfig(NamedTuple):
    rows: int
    cols: int
    depth: int  # extent of the reduction loop's tiles
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """Of a launch; a product and a sum are fused into one operation, whatever the default of Triton's version."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


LINEAR = {
    "half": (
        TileConfig(16, 32, 128, 4, 4),
        TileConfig(32, 64, 64, 4, 4),
        TileConfig(64, 64, 64, 4, 4),
        TileConfig(64, 128, 64, 8, 3),
        TileConfig(128, 128, 64, 8, 3),
    ),
    "half_odd": (
        TileConfig(16, 32, 64, 4, 2),
        TileConfig(32, 64, 32, 4, 2),
        TileConfig(64, 64, 32, 8, 2),
        TileConfig(64, 128, 32, 8, 2),
    ),
    "mixed": (
        TileConfig(16, 32, 64, 4, 4),
        TileConfig(32, 64, 64, 4, 4),
        TileConfig(64, 128, 32, 4, 3),
        TileConfig(128, 128, 32, 8, 3),
    ),
    "mixed_odd": (TileConfig(16, 32, 64, 4, 3), TileConfig(32, 64, 32, 4, 3), TileConfig(64, 128, 32, 8, 3)),
    "float32": (TileConfig(16, 32, 16, 4, 4), TileConfig(32, 32, 16, 4, 3)),
    "float32_odd": (TileConfig(16, 32, 16, 4, 4),),
}
# By the largest k that the tiles serve: z's accumulator stays in registers, the pipeline within a block's shared memory
# (99 KB on consumer GPUs).
ONE_PASS: dict[str, dict[int, tuple[TileConfig, ...]]] = {
    "half": {
        64: (TileConfig(16, 32, 128, 4, 4), TileConfig(32, 64, 64, 4, 4), TileConfig(64, 64, 64, 4, 3)),
        128: (TileConfig(16, 32, 128, 4, 3),),
    },
    "half_odd": {64: (TileConfig(16, 32, 32, 4, 2), TileConfig(32, 32, 32, 8, 2))},
    "mixed": {
        64: (TileConfig(16, 32, 64, 4, 2), TileConfig(32, 64, 64, 4, 3)),
        128: (TileConfig(16, 32, 64, 4, 2),),
    },
    "mixed_odd": {64: (TileConfig(16, 32, 32, 4, 3), TileConfig(32, 32, 32, 4, 3))},
    "float32": {32: (TileConfig(16, 16, 16, 4, 3), TileConfig(32, 32, 16, 4, 3))},
    "float32_odd": {},  # would spill
}
# Batches of k x k matrices in float32. The largest tile, measured on an H200, is faster only where there are many to a
# matrix: k = 409 fills four of them in each direction by 80 %.
CAYLEY = (TileConfig(32, 32, 32, 4, 2), TileConfig(64, 64, 32, 4, 3), TileConfig(128, 128, 32, 8, 3))
CAYLEY_LARGEST_FROM = 512  # rows and columns
CAYLEY_LEAF = TileConfig(64, 64, 16, 4, 1)  # the block that one program inverts by itself; deeper products spill
ELEMENTS = TileConfig(1, 1024, 0, 4, 1)  # where there are no products
CAYLEY_PACK = TileConfig(64, 64, 0, 4, 1)
CAYLEY_WIDE = TileConfig(16, 16, 0, 4, 1)  # one stage: no load may pass a barrier


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes 5 us."""
    return -(-a // b)


def _pick(table: tuple[TileConfig, ...], rows: int, cols: int, batch: int = 1) -> TileConfig:
    """The largest tile that the rows fill at least half and that leaves MIN_PROGRAMS programs, else the smallest."""
    for config in reversed(table):
        programs = batch * cdiv(rows, config.rows) * cdiv(cols, config.cols)
        if 2 * rows > config.rows and programs >= MIN_PROGRAMS:
            return config
    return table[0]


def table_key(dtype: torch.dtype, others: tuple[torch.dtype, ...], aligned: bool) -> str:
    """Key of the tables for x of `dtype` and operands of the dtypes `others`."""
    wider = any(other.itemsize > dtype.itemsize for other in others)
    key = "float32" if dtype == torch.float32 else "mixed" if wider else "half"
    return key if aligned else key + "_odd"


def linear_config(key: str, T: int, d_out: int) -> TileConfig:
    return _pick(LINEAR[key], T, d_out)


def rows_config(key: str, R: int, T: int, k: int) -> TileConfig:
    return _pick(LINEAR[key], T, k, R)


def one_pass_config(key: str, T: int, d_out: int, k: int) -> TileConfig | None:
    """A configuration that holds z (BLOCK_T, k) in registers, or None where two library products are the better way."""
    tiles = one_pass_tiles(key, k)
    return _pick(tiles, T, d_out) if tiles and T <= ONE_PASS_MAX_T else None


def one_pass_tiles(key: str, k: int) -> tuple[TileConfig, ...]:
    return next((tiles for max_k, tiles in ONE_PASS[key].items() if k <= max_k), ())


def one_pass_rank(k: int) -> int:
    """BLOCK_R: k padded to a power of two that a tensor core can multiply."""
    return max(16, 1 << (k - 1).bit_length())


def cayley_config(batch: int, rows: int, cols: int) -> TileConfig:
    return _pick(CAYLEY if min(rows, cols) >= CAYLEY_LARGEST_FROM else CAYLEY[:-1], rows, cols, batch)
