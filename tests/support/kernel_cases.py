"""Every kernel as it can be launched, for the tests that compile all of them: each tile size with its signatures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from ssvd_kernels.ops.kernels import tile_sizes as tiles
from ssvd_kernels.ops.kernels.tile_sizes import TileConfig


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


def _operands(key: str, halves: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(x, weight, U and V) dtypes that a table serves."""
    if key.startswith("float32"):
        return [("fp32", "fp32", "fp32"), ("fp32", "bf16", "fp32")]
    return [(half, half if key.startswith("half") else "fp32", half) for half in halves]


def _pointers(weight: str, bases: str) -> dict[str, str]:
    return {"w_ptr": weight, "u_ptr": bases, "v_ptr": bases, "b_ptr": weight, "core_ptr": "fp32", "p_ptr": "fp32"}


def _case(kernel: str, tile: TileConfig, dtype: str, pointers: dict, unit: tuple, odd: bool, axes: str, **more) -> Case:
    """`axes`: the letters of the tile's rows, columns and depth in the kernel's constants."""
    blocks = {f"BLOCK_{axis}": size for axis, size in zip(axes, tile)}
    return Case(kernel, tile, dtype, pointers, unit, odd, {**blocks, **more}, dtype != "fp32")


def _linear_cases() -> Iterator[Case]:
    common = ("stride_x_d", "stride_b_n", "stride_y_n")
    flags = {"GROUP_T": tiles.GROUP, "HAS_BIAS": True, "PRECISION": "ieee"}
    for key, config, (x, w, uv) in _entries(tiles.LINEAR):
        for layout in ("stride_w_d", "stride_w_n"):
            odd, unit = key.endswith("odd"), (layout, *common, "stride_u_k", "stride_q_k")
            kernel = "ssvd_linear:_ssvd_linear_fwd_kernel"
            yield _case(kernel, config, x, _pointers(w, uv), unit, odd, "TNK", **flags)
            if key.startswith("half"):
                kernel = "linear_and_projection:_ssvd_linear_concat_kernel"
                unit = (layout, *common, "stride_v_k", "stride_z_k")
                yield _case(kernel, config, x, {"b_ptr": w}, unit, odd, "TNK", **flags)
    for ranks in ((16, 32, 64), (128,)):
        tables = {key: tiles.one_pass_tiles(key, ranks[0]) for key in tiles.ONE_PASS}
        for key, config, (x, w, uv) in _entries(tables):
            for layout, core in (("stride_w_d", "stride_core_j"), ("stride_w_n", "stride_core_i")):
                unit = (layout, core, *common, "stride_u_k", "stride_v_k", "stride_z_k")
                for rank in (r for r in ranks if config in tiles.one_pass_tiles(key, r)):
                    kernel, more = (
                        "ssvd_linear:_ssvd_linear_one_pass_kernel",
                        {"BLOCK_R": rank, "NEED_Z": True, **flags},
                    )
                    yield _case(kernel, config, x, _pointers(w, uv), unit, key.endswith("odd"), "TNK", **more)


def _compose_cases() -> Iterator[Case]:
    unit = ("stride_w_d", "stride_v_k", "stride_p_k", "stride_out_d")
    for key, config, (out, w, uv) in _entries(tiles.COMPOSE, ("bf16", "fp16")):
        flags = {"GROUP_N": tiles.GROUP, "PRECISION": tiles.COMPOSE_PRECISION[DTYPES[out]]}
        if out == "fp16" and not key.endswith("odd"):
            continue
        for odd in (False, True) if out == "fp16" else (key.endswith("odd"),):
            yield _case("compose:_compose_kernel", config, out, _pointers(w, uv), unit, odd, "NDK", **flags)


def _core_grad_cases() -> Iterator[Case]:
    unit = ("stride_a_k", "stride_b_k", "stride_out_b")
    for key, config, (dtype, weight, _) in _entries(tiles.CORE_GRAD):
        if dtype == weight:
            odd = key.endswith("odd")
            yield _case("split_k:_core_grad_kernel", config, dtype, {"out_ptr": "fp32"}, unit, odd, "ABT")


def _cayley_cases() -> Iterator[Case]:
    # A B, A B^T (backward) and A^T B (backward)
    products = (("stride_a_k", "stride_b_n"), ("stride_a_k", "stride_b_k"), ("stride_a_m", "stride_b_n"))
    for precision, table in tiles.CAYLEY.items():
        for config in table:
            for unit in products:
                name = "cayley:_cayley_product_kernel"
                case = _case(name, config, "fp32", {}, unit, False, "MNK", PRECISION=precision)
                yield case._replace(tensor_cores=True)
    others = {"cayley_leaf": tiles.CAYLEY_LEAF, "skew": tiles.CAYLEY_PACK, "unskew": tiles.CAYLEY_PACK}
    for name, config in others.items():
        yield _case(f"cayley:_{name}_kernel", config, "fp32", {}, (), False, "", BLOCK=config.rows)


def _entries(
    tables: dict[str, tuple[TileConfig, ...]], halves: tuple[str, ...] = ("bf16",)
) -> Iterator[tuple[str, TileConfig, tuple[str, str, str]]]:
    """Of each table's configurations and operands; fp16 needs what bf16 needs, but for `compose`."""
    return ((key, config, of) for key in tables for config in tables[key] for of in _operands(key, halves))


def cases() -> list[Case]:
    """Every configuration that can be launched, with a representative signature each."""
    return [*_linear_cases(), *_compose_cases(), *_core_grad_cases(), *_cayley_cases()]
