"""Every kernel as it can be launched, for the tests that compile all of them: each tile size with its signatures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from ssvd_kernels.ops.kernels.tile_sizes import (
    CAYLEY,
    CAYLEY_LEAF,
    CAYLEY_PACK,
    COMPOSE,
    COMPOSE_PRECISION,
    CORE_GRAD,
    GROUP,
    LINEAR,
    ONE_PASS,
    TileConfig,
)


class Case(NamedTuple):
    """One kernel as it can be launched: what the compile gate needs to build its signature.

    Pointers not named have the dtype `dtype`; strides in `unit` are 1; other integers are 32-bit, and divisible by 16
    unless `odd`.
    """

    kernel: str  # module:function
    config: TileConfig
    dtype: str
    pointers: dict[str, str]
    unit: tuple[str, ...]
    odd: bool
    constants: Mapping[str, object]
    tensor_cores: bool

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


def _operands(key: str, halves: tuple[str, ...] = ("bf16",)) -> list[tuple[str, str, str]]:
    """(x, weight, U and V) dtypes that a table serves: fp16 needs what bf16 needs, but for `compose`."""
    if key.startswith("float32"):
        return [("fp32", "fp32", "fp32"), ("fp32", "bf16", "fp32")]
    return [(half, half if key.startswith("half") else "fp32", half) for half in halves]


def _pointers(weight: str, bases: str) -> dict[str, str]:
    return {"w_ptr": weight, "u_ptr": bases, "v_ptr": bases, "b_ptr": weight, "core_ptr": "fp32", "p_ptr": "fp32"}


def _linear_cases() -> Iterator[Case]:
    unit = ("stride_x_d", "stride_u_k", "stride_b_n", "stride_y_n", "stride_q_k")
    flags: dict[str, object] = {"GROUP_T": GROUP, "HAS_BIAS": True, "PRECISION": "ieee"}
    for key, config, (x, w, uv) in _entries(LINEAR):
        for layout in ("stride_w_d", "stride_w_n"):
            odd = key.endswith("odd")
            blocks = {"BLOCK_T": config.rows, "BLOCK_N": config.cols, "BLOCK_K": config.depth}
            name, strides = "ssvd_linear:_ssvd_linear_fwd_kernel", (layout, *unit)
            yield Case(name, config, x, _pointers(w, uv), strides, odd, {**blocks, **flags}, x != "fp32")


def _concat_cases() -> Iterator[Case]:
    unit = ("stride_x_d", "stride_v_k", "stride_b_n", "stride_y_n", "stride_z_k")
    flags: dict[str, object] = {"GROUP_T": GROUP, "HAS_BIAS": True, "PRECISION": "ieee"}
    for key, config, (x, w, _) in _entries(LINEAR):
        for layout in ("stride_w_d", "stride_w_n") if key.startswith("half") else ():
            odd = key.endswith("odd")
            blocks = {"BLOCK_T": config.rows, "BLOCK_N": config.cols, "BLOCK_K": config.depth}
            name, strides = "linear_and_projection:_ssvd_linear_concat_kernel", (layout, *unit)
            yield Case(name, config, x, {"b_ptr": w}, strides, odd, {**blocks, **flags}, x != "fp32")


def _one_pass_cases() -> Iterator[Case]:
    unit = ("stride_x_d", "stride_u_k", "stride_b_n", "stride_y_n", "stride_v_k", "stride_z_k")
    flags: dict[str, object] = {"GROUP_T": GROUP, "HAS_BIAS": True, "NEED_Z": True, "PRECISION": "ieee"}
    for key, config, (x, w, uv) in _entries(ONE_PASS):
        for layout, core in (("stride_w_d", "stride_core_j"), ("stride_w_n", "stride_core_i")):
            odd = key.endswith("odd")
            for rank in (r for r in (16, 32, 64, 128) if r <= config.max_k):
                blocks = {"BLOCK_T": config.rows, "BLOCK_N": config.cols, "BLOCK_K": config.depth, "BLOCK_R": rank}
                name, strides = "ssvd_linear:_ssvd_linear_one_pass_kernel", (layout, core, *unit)
                yield Case(name, config, x, _pointers(w, uv), strides, odd, {**blocks, **flags}, x != "fp32")


def _compose_cases() -> Iterator[Case]:
    unit = ("stride_w_d", "stride_v_k", "stride_p_k", "stride_out_d")
    for key, config, (out, w, uv) in _entries(COMPOSE, "bf16", "fp16"):
        blocks = {"BLOCK_N": config.rows, "BLOCK_D": config.cols, "BLOCK_K": config.depth}
        flags: dict[str, object] = {"GROUP_N": GROUP, "PRECISION": COMPOSE_PRECISION[DTYPES[out]]}
        if out == "fp16" and not key.endswith("odd"):
            continue
        for odd in (False, True) if out == "fp16" else (key.endswith("odd"),):
            name = "compose:_compose_kernel"
            yield Case(name, config, out, _pointers(w, uv), unit, odd, {**blocks, **flags}, out != "fp32")


def _core_grad_cases() -> Iterator[Case]:
    unit = ("stride_a_k", "stride_b_k", "stride_out_b")
    for key, config, (dtype, weight, _) in _entries(CORE_GRAD):
        blocks = {"BLOCK_A": config.rows, "BLOCK_B": config.cols, "BLOCK_T": config.depth}
        if dtype == weight:
            name, half = "split_k:_core_grad_kernel", dtype != "fp32"
            yield Case(name, config, dtype, {"out_ptr": "fp32"}, unit, key.endswith("odd"), blocks, half)


def _cayley_cases() -> Iterator[Case]:
    for precision, table in CAYLEY.items():
        for config in table:
            blocks = {"BLOCK_M": config.rows, "BLOCK_N": config.cols, "BLOCK_K": config.depth}
            constants = {**blocks, "PRECISION": precision}
            # A B, A B^T (backward) and A^T B (backward)
            for unit in (("stride_a_k", "stride_b_n"), ("stride_a_k", "stride_b_k"), ("stride_a_m", "stride_b_n")):
                yield Case("cayley:_cayley_product_kernel", config, "fp32", {}, unit, False, constants, True)
    leaf, pack = {"BLOCK": CAYLEY_LEAF.rows}, {"BLOCK": CAYLEY_PACK.rows}
    yield Case("cayley:_cayley_leaf_kernel", CAYLEY_LEAF, "fp32", {}, (), False, leaf, False)
    yield Case("cayley:_skew_kernel", CAYLEY_PACK, "fp32", {}, (), False, pack, False)
    yield Case("cayley:_unskew_kernel", CAYLEY_PACK, "fp32", {}, (), False, pack, False)


def _entries(
    tables: dict[str, tuple[TileConfig, ...]], *halves: str
) -> Iterator[tuple[str, TileConfig, tuple[str, str, str]]]:
    for key in tables:
        for config in tables[key]:
            yield from ((key, config, operands) for operands in _operands(key, halves or ("bf16",)))


def cases() -> list[Case]:
    """Every configuration that can be launched, with a representative signature each."""
    return [
        *_linear_cases(),
        *_concat_cases(),
        *_one_pass_cases(),
        *_compose_cases(),
        *_core_grad_cases(),
        *_cayley_cases(),
    ]


def sample() -> list[Case]:
    """Of each kernel the case with the largest tile."""
    largest: dict[str, Case] = {}
    for case in sorted(cases(), key=lambda case: case.config.rows * case.config.cols):
        largest[case.kernel] = case
    return list(largest.values())
