"""Tile sizes of every kernel, how a shape picks one, and the list of all of them for the compile gate.

Plain Python, no Triton needed. A table is keyed by what the loads look like:
    half      x float16 or bfloat16, as the other operands     mixed   x half, some operand in float32
    float32   x float32 (IEEE products, no tensor cores)       *_odd   likewise, where some operand cannot be
                                                                       read 16 elements at a time (d = 1021, say)
Scalar loads need many more registers, hence the smaller tiles of the odd tables. Tables run from small to large.
The choice depends on shapes alone, so the same shapes give the same bits on every device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

GROUP = 8  # row blocks that share their column tiles in L2
MIN_PROGRAMS = 128  # about one program per multiprocessor of a large GPU
ONE_PASS_MAX_T = 256  # above it, BLOCK_R / BLOCK_N more products cost more than two saved launches
MIN_CHUNK = 256  # tokens per partial of core_grad
CONCAT_MAX_D = 640  # up to it, reading x once is worth more than the library's larger tiles


class Config(NamedTuple):
    rows: int
    cols: int
    depth: int  # extent of the reduction loop's tiles
    warps: int
    stages: int
    max_k: int = 0  # one-pass only: the largest k whose accumulator stays in registers


LINEAR = {
    "half": (
        Config(16, 32, 128, 4, 4),
        Config(32, 64, 64, 4, 4),
        Config(64, 64, 64, 4, 4),
        Config(64, 128, 64, 8, 3),
        Config(128, 128, 64, 8, 3),
    ),
    "half_odd": (
        Config(16, 32, 64, 4, 2),
        Config(32, 64, 32, 4, 2),
        Config(64, 64, 32, 8, 2),
        Config(64, 128, 32, 8, 2),
    ),
    "mixed": (
        Config(16, 32, 64, 4, 4),
        Config(32, 64, 64, 4, 4),
        Config(64, 128, 32, 4, 3),
        Config(128, 128, 32, 8, 3),
    ),
    "mixed_odd": (Config(16, 32, 64, 4, 3), Config(32, 64, 32, 4, 3), Config(64, 128, 32, 8, 3)),
    "float32": (Config(16, 32, 32, 4, 3), Config(32, 32, 16, 4, 3), Config(32, 64, 16, 4, 3)),
    "float32_odd": (Config(16, 32, 32, 4, 3), Config(32, 32, 16, 4, 3)),
}
ONE_PASS = {
    "half": (Config(16, 32, 128, 4, 4, 128), Config(32, 64, 64, 4, 4, 64), Config(64, 64, 64, 4, 3, 64)),
    "half_odd": (Config(16, 32, 32, 4, 2, 64), Config(32, 32, 32, 4, 2, 64)),
    "mixed": (Config(16, 32, 64, 4, 2, 128), Config(32, 64, 64, 4, 3, 64)),
    "mixed_odd": (Config(16, 32, 32, 4, 3, 64), Config(32, 32, 32, 4, 3, 64)),
    "float32": (Config(16, 16, 32, 4, 3, 32), Config(32, 32, 16, 4, 3, 32)),
    "float32_odd": (Config(16, 16, 32, 4, 3, 32),),
}
COMPOSE = {
    "half": (Config(64, 64, 32, 4, 3), Config(128, 128, 32, 8, 3)),
    "half_odd": (Config(64, 64, 16, 4, 3),),
    "mixed": (Config(64, 64, 32, 4, 3), Config(128, 128, 32, 8, 3)),
    "mixed_odd": (Config(64, 64, 16, 4, 3),),
    "float32": (Config(32, 32, 32, 4, 3), Config(64, 64, 16, 4, 3)),
    "float32_odd": (Config(32, 32, 16, 4, 3), Config(64, 64, 16, 4, 3)),
}
# tf32 truncates the update at 2^-10, which bfloat16's rounding hides and float16's does not. The three-term products
# need as many registers as scalar loads do, so float16 uses the odd tables.
COMPOSE_PRECISION = {torch.float32: "ieee", torch.bfloat16: "tf32", torch.float16: "tf32x3"}
CORE_GRAD = {
    "half": (Config(16, 16, 128, 4, 3), Config(64, 64, 64, 4, 4), Config(128, 128, 64, 8, 3)),
    "half_odd": (Config(16, 16, 64, 4, 2), Config(64, 64, 32, 4, 2)),
    "float32": (Config(16, 16, 32, 4, 3), Config(64, 64, 16, 4, 3)),
    "float32_odd": (Config(16, 16, 32, 4, 3), Config(32, 32, 16, 4, 3)),
}
# Batches of k x k matrices in float32, by the precision of their products (see cayley.py).
CAYLEY = {
    "bf16x3": (Config(32, 32, 32, 4, 2), Config(64, 64, 32, 4, 3), Config(128, 128, 32, 8, 3)),
    "bf16x6": (Config(32, 32, 32, 4, 2), Config(64, 64, 32, 4, 3), Config(64, 128, 32, 8, 3)),
}
CAYLEY_LEAF = Config(64, 64, 0, 8, 1)  # the block that one program inverts by itself
CAYLEY_PACK = Config(32, 32, 0, 4, 1)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _pick(table: tuple[Config, ...], rows: int, cols: int, batch: int = 1) -> Config:
    """The largest tile that the rows fill at least half and that leaves MIN_PROGRAMS programs, else the smallest."""
    for config in reversed(table):
        programs = batch * _cdiv(rows, config.rows) * _cdiv(cols, config.cols)
        if 2 * rows > config.rows and programs >= MIN_PROGRAMS:
            return config
    return table[0]


def table_key(dtype: torch.dtype, others: tuple[torch.dtype, ...], aligned: bool) -> str:
    """Key of the tables for x of `dtype` and operands of the dtypes `others`."""
    wider = any(other.itemsize > dtype.itemsize for other in others)
    key = "float32" if dtype == torch.float32 else "mixed" if wider else "half"
    return key if aligned else key + "_odd"


def linear_config(key: str, T: int, d_out: int) -> Config:
    return _pick(LINEAR[key], T, d_out)


def one_pass_config(key: str, T: int, d_out: int, k: int) -> Config | None:
    """A configuration that holds z (BLOCK_T, k) in registers, or None where two library products are the better way."""
    table = tuple(config for config in ONE_PASS[key] if config.max_k >= k)
    return _pick(table, T, d_out) if table and T <= ONE_PASS_MAX_T else None


def one_pass_rank(k: int) -> int:
    """BLOCK_R: k padded to a power of two that a tensor core can multiply."""
    return max(16, 1 << (k - 1).bit_length())


def compose_config(key: str, d_out: int, d_in: int) -> Config:
    return _pick(COMPOSE[key], d_out, d_in)


def core_grad_config(key: str, ka: int, kb: int) -> Config:
    """The largest tile that ka and kb fill at least half; the split over T brings the programs."""
    return next((c for c in reversed(CORE_GRAD[key]) if 2 * min(ka, kb) > c.rows), CORE_GRAD[key][0])


def cayley_config(precision: str, batch: int, rows: int, cols: int) -> Config:
    return _pick(CAYLEY[precision], rows, cols, batch)


def core_grad_splits(config: Config, T: int, ka: int, kb: int) -> tuple[int, int]:
    """(tokens per chunk, number of chunks): every chunk holds a token (a single empty one for T = 0)."""
    tiles = _cdiv(ka, config.rows) * _cdiv(kb, config.cols)
    wanted = max(1, min(2 * MIN_PROGRAMS // tiles, _cdiv(T, MIN_CHUNK)))
    chunk = max(1, _cdiv(_cdiv(T, wanted), config.depth)) * config.depth
    return chunk, max(1, _cdiv(T, chunk))


class Case(NamedTuple):
    """One kernel as it can be launched: what the compile gate needs to build its signature.

    Pointers not named have the dtype `dtype`; strides in `unit` are 1; other integers are 32-bit, and divisible by 16
    unless `odd`. `slow`: not in the default run of the gate.
    """

    kernel: str  # module:function
    config: Config
    dtype: str
    pointers: dict[str, str]
    unit: tuple[str, ...]
    odd: bool
    constants: Mapping[str, object]
    tensor_cores: bool
    slow: bool

    @property
    def label(self) -> str:
        blocks = "x".join(str(v) for n, v in self.constants.items() if n.startswith("BLOCK"))
        dtypes = "/".join([self.dtype, *(self.pointers[p] for p in ("w_ptr", "v_ptr") if p in self.pointers)])
        layout = "w^T" if "stride_w_n" in self.unit else "w"
        odd = "odd" if self.odd else "aligned"
        launch = f"w{self.config.warps} s{self.config.stages}"
        precision = self.constants.get("PRECISION", "ieee")
        return f"{self.kernel.split(':')[1]} {dtypes} {blocks} {launch} {precision} {layout} {odd}"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _operands(key: str) -> list[tuple[str, str, str, bool]]:
    """(x, weight, U and V, slow) dtypes that a table serves."""
    if key.startswith("float32"):
        return [("fp32", "fp32", "fp32", False), ("fp32", "bf16", "fp32", True)]
    if key.startswith("half"):
        return [("bf16", "bf16", "bf16", False), ("fp16", "fp16", "fp16", True)]
    return [("bf16", "fp32", "bf16", False), ("fp16", "fp32", "fp16", True)]


def _pointers(weight: str, bases: str) -> dict[str, str]:
    return {"w_ptr": weight, "u_ptr": bases, "v_ptr": bases, "b_ptr": weight, "core_ptr": "fp32", "p_ptr": "fp32"}


def _linear_cases() -> Iterator[Case]:
    unit = ("stride_x_d", "stride_u_k", "stride_b_n", "stride_y_n", "stride_q_k")
    flags: dict[str, object] = {"GROUP_T": GROUP, "HAS_BIAS": True, "PRECISION": "ieee"}
    for key, config, (x, w, uv, slow) in _entries(LINEAR):
        for layout in ("stride_w_d", "stride_w_n"):
            odd = key.endswith("odd")
            blocks = {"BLOCK_T": config.rows, "BLOCK_N": config.cols, "BLOCK_K": config.depth}
            rare = slow or (odd and layout == "stride_w_n")
            name, strides = "ssvd_linear:_ssvd_linear_fwd_kernel", (layout, *unit)
            yield Case(name, config, x, _pointers(w, uv), strides, odd, {**blocks, **flags}, x != "fp32", rare)


def _concat_cases() -> Iterator[Case]:
    unit = ("stride_x_d", "stride_v_k", "stride_b_n", "stride_y_n", "stride_z_k")
    flags: dict[str, object] = {"GROUP_T": GROUP, "HAS_BIAS": True, "PRECISION": "ieee"}
    for key, config, (x, w, _, slow) in _entries(LINEAR):
        for layout in ("stride_w_d", "stride_w_n") if key.startswith("half") else ():
            odd = key.endswith("odd")
            blocks = {"BLOCK_T": config.rows, "BLOCK_N": config.cols, "BLOCK_K": config.depth}
            rare = slow or (odd and layout == "stride_w_n")
            name, strides = "linear_and_projection:_ssvd_linear_concat_kernel", (layout, *unit)
            yield Case(name, config, x, {"b_ptr": w}, strides, odd, {**blocks, **flags}, x != "fp32", rare)


def _one_pass_cases() -> Iterator[Case]:
    unit = ("stride_x_d", "stride_u_k", "stride_b_n", "stride_y_n", "stride_v_k", "stride_z_k")
    flags: dict[str, object] = {"GROUP_T": GROUP, "HAS_BIAS": True, "NEED_Z": True, "PRECISION": "ieee"}
    for key, config, (x, w, uv, slow) in _entries(ONE_PASS):
        for layout, core in (("stride_w_d", "stride_core_j"), ("stride_w_n", "stride_core_i")):
            odd = key.endswith("odd")
            for rank in (r for r in (16, 32, 64, 128) if r <= config.max_k):
                blocks = {"BLOCK_T": config.rows, "BLOCK_N": config.cols, "BLOCK_K": config.depth, "BLOCK_R": rank}
                rare = slow or rank != config.max_k or (odd and layout == "stride_w_n")
                name, strides = "ssvd_linear:_ssvd_linear_one_pass_kernel", (layout, core, *unit)
                yield Case(name, config, x, _pointers(w, uv), strides, odd, {**blocks, **flags}, x != "fp32", rare)


def _compose_cases() -> Iterator[Case]:
    unit = ("stride_w_d", "stride_v_k", "stride_p_k", "stride_out_d")
    for key, config, (out, w, uv, slow) in _entries(COMPOSE):
        blocks = {"BLOCK_N": config.rows, "BLOCK_D": config.cols, "BLOCK_K": config.depth}
        flags: dict[str, object] = {"GROUP_N": GROUP, "PRECISION": COMPOSE_PRECISION[DTYPES[out]]}
        if out == "fp16" and not key.endswith("odd"):
            continue
        for odd in (False, True) if out == "fp16" else (key.endswith("odd"),):
            name, rare = "compose:_compose_kernel", slow and (out, w) != ("fp16", "fp16")
            yield Case(name, config, out, _pointers(w, uv), unit, odd, {**blocks, **flags}, out != "fp32", rare)


def _core_grad_cases() -> Iterator[Case]:
    unit = ("stride_a_k", "stride_b_k", "stride_out_b")
    for key, config, (dtype, weight, _, slow) in _entries(CORE_GRAD):
        blocks = {"BLOCK_A": config.rows, "BLOCK_B": config.cols, "BLOCK_T": config.depth}
        if dtype == weight:
            name, half = "split_k:_core_grad_kernel", dtype != "fp32"
            yield Case(name, config, dtype, {"out_ptr": "fp32"}, unit, key.endswith("odd"), blocks, half, slow)


def _cayley_cases() -> Iterator[Case]:
    for precision, table in CAYLEY.items():
        for config in table:
            blocks = {"BLOCK_M": config.rows, "BLOCK_N": config.cols, "BLOCK_K": config.depth}
            constants = {**blocks, "PRECISION": precision}
            # A B, A B^T (backward) and A^T B (backward)
            for unit in (("stride_a_k", "stride_b_n"), ("stride_a_k", "stride_b_k"), ("stride_a_m", "stride_b_n")):
                slow = unit != ("stride_a_k", "stride_b_n")
                yield Case("cayley:_cayley_product_kernel", config, "fp32", {}, unit, False, constants, True, slow)
    leaf, pack = {"BLOCK": CAYLEY_LEAF.rows}, {"BLOCK": CAYLEY_PACK.rows}
    yield Case("cayley:_cayley_leaf_kernel", CAYLEY_LEAF, "fp32", {}, (), False, leaf, False, False)
    yield Case("cayley:_skew_kernel", CAYLEY_PACK, "fp32", {}, (), False, pack, False, False)
    yield Case("cayley:_unskew_kernel", CAYLEY_PACK, "fp32", {}, (), False, pack, False, False)


def _entries(tables: dict[str, tuple[Config, ...]]) -> Iterator[tuple[str, Config, tuple[str, str, str, bool]]]:
    return ((key, config, operands) for key in tables for config in tables[key] for operands in _operands(key))


def configs() -> list[Case]:
    """Every configuration that can be launched, with a representative signature each."""
    return [
        *_linear_cases(),
        *_concat_cases(),
        *_one_pass_cases(),
        *_compose_cases(),
        *_core_grad_cases(),
        *_cayley_cases(),
    ]
