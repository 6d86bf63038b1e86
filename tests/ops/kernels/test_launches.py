"""What the launchers launch, and that it fits, on GPUs that need not be here; see triton_driver.

The GPU of the fast tests is one with the least shared memory; all of them, and every tile, are slow tests.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("triton")

import torch
from triton.runtime.errors import OutOfResources
from triton_driver import SHARED, Launch, compiling, gpu

import ssvd_kernels as sk
from ssvd_kernels.ops import dispatch, triton_linear
from ssvd_kernels.ops.autograd import apply_activation, apply_linear
from ssvd_kernels.ops.kernels import cayley, tile_sizes
from ssvd_kernels.ops.kernels.tile_sizes import ONE_PASS_MAX_T, TileConfig
from ssvd_kernels.ops.places import Places
from ssvd_kernels.ops.triton_linear import core_operand, operand, rows_product_bwd, rows_product_fwd

pytestmark = pytest.mark.xdist_group("launches")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ADA, HOPPER = 89, 90
MODULES = ("cayley", "cayley_float64", "compose", "rows_product", "ssvd_linear")
CORE_GRAD = ["_to_copy", "_to_copy", "mm"]  # on the CPU; on a GPU it is one product
NO_PRODUCT = ("_skew_kernel", "_unskew_kernel", "_cayley_check_kernel", "_add_update_kernel")
FLOAT64 = ("_cayley_wide_kernel",)  # multiplies without tensor cores where these have no float64


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    with compiling() as process:
        yield process


# -- in the process that compiles ---------------------------------------------------------------------------------


def linear(
    capability: int,
    dtype: torch.dtype,
    T: int,
    k: int,
    weight: torch.dtype | None = None,
    d: int = 256,
    mode: str = "factored",
) -> list[Launch]:
    """Of the op forward and backward, with the operands that a layer caches."""
    W, b = torch.zeros(d, d, dtype=weight or dtype), torch.zeros(d, dtype=weight or dtype)
    U, V = (operand(torch.zeros(d, k), dtype) for _ in range(2))
    x, core, dy = torch.zeros(T, d, dtype=dtype), torch.zeros(k, k), torch.zeros(T, d, dtype=dtype)
    leaves = x.requires_grad_(), core.requires_grad_()
    with gpu(capability) as launches:
        y = apply_linear(x, W, U, V, core, b, (mode, dtype, "triton", True))
        torch.autograd.grad(y, leaves, dy)
    return launches


def activation(capability: int, dtype: torch.dtype, T: int, k: int, d: int = 256) -> list[Launch]:
    """Of the op forward and backward, with the operands that a layer keeps: the basis is stored transposed."""
    basis, core = torch.zeros(k, d, dtype=dtype).mT, torch.zeros(k, k)
    x, dy = torch.zeros(T, d, dtype=dtype), torch.zeros(T, d, dtype=dtype)
    leaves, narrow = (x.requires_grad_(), core.requires_grad_()), core_operand(core.detach(), dtype)
    with gpu(capability) as launches:
        out = apply_activation(x, basis, core, None, dtype, "triton", narrow)
        torch.autograd.grad(out, leaves, dy)
    return launches


def rows(capability: int, dtype: torch.dtype, T: int, k: int, cores: torch.dtype = F32) -> list[Launch]:
    """Of the products of four rows with their own cores, and of the gradient of z."""
    z, places = torch.zeros(4, T, k, dtype=dtype), Places([1, 0, None, 1], torch.device("cpu"))
    with gpu(capability) as launches:
        index = places.index
        launches.clear()
        assert rows_product_fwd(z, torch.zeros(2, k, k, dtype=cores), places).shape == z.shape and index.numel() == 4
        rows_product_bwd(z, None, torch.zeros(2, k, k, dtype=cores), places, True)
    return launches


def layers(capability: int, number: int, k: int) -> list[Launch]:
    """Of a training step of a model of linear layers, factored; the rotations are computed by operations of PyTorch."""
    d = 256
    model = torch.nn.Sequential(*(torch.nn.Linear(d, d, dtype=BF16) for _ in range(number)))
    sk.inject(model, sk.SSVDConfig(rank=k))
    x = torch.zeros(16, d, dtype=BF16, requires_grad=True)
    with patch.object(dispatch, "linear_call", lambda *arguments: ("triton", math.inf)), gpu(capability) as launches:
        for _ in range(2):  # the first also makes operands of U and V
            launches.clear()
            model.zero_grad()
            model(x).backward(x)
    return launches


def linear_with_four_stages(capability: int) -> list[Launch]:
    with patch.dict(tile_sizes.ONE_PASS, half={128: (TileConfig(16, 32, 128, 4, 4),)}):
        return linear(capability, BF16, 1, 128)


def rotations(capability: int, k: int, batch: int) -> list[Launch]:
    """Of the batched Cayley transform forward and backward."""
    theta = torch.zeros(batch, k * (k - 1) // 2)
    with gpu(capability) as launches:
        E = cayley.cayley_delta(theta, k)
        cayley.cayley_delta_backward(torch.zeros_like(E), E, k)
    return launches


def with_tile(capability: int, table: str, key: str, rank: int, tile: TileConfig) -> list[Launch]:
    """Of all that takes `tile` from its table where it is the only one there; float16 needs what bfloat16 needs."""
    if table == "CAYLEY":
        with patch.object(cayley, "cayley_config", lambda *_: tile):
            return rotations(capability, 128, 2)
    kind, d = key.removesuffix("_odd"), 63 if key.endswith("_odd") else 64
    weights = {"half": [BF16], "mixed": [F32], "float32": [F32, BF16]}[kind]
    dtype = F32 if kind == "float32" else BF16
    found: list[Launch] = []
    with patch.dict(getattr(tile_sizes, table), {key: {rank: (tile,)} if rank else (tile,)}):
        for weight in weights:
            if table == "ONE_PASS":
                for k in (rank - 3, rank):
                    found += linear(capability, dtype, 1, k, weight, d)
                continue
            for mode in ("composed", "factored"):
                found += linear(capability, dtype, ONE_PASS_MAX_T + 1, 16, weight, d, mode)
            found += rows(capability, dtype, ONE_PASS_MAX_T + 1, d, weight)
            if weight == dtype:
                found += activation(capability, dtype, ONE_PASS_MAX_T + 1, 13, d)
    return found


def sums(capability: int) -> list[Launch]:
    """Of an update that is added."""
    y = torch.zeros(3, 40, dtype=BF16)
    with gpu(capability) as launches:
        triton_linear.add_update(y, y)
    return launches


# -- tests --------------------------------------------------------------------------------------------------------


def faults(launches: list[Launch], exact: bool = False) -> list[Launch]:
    """Kernels of ours that spill registers, do not fuse products and sums, or multiply without tensor cores unless
    `exact`."""

    def bad(launch: Launch) -> bool:
        on_tensor_cores = exact or launch.tensor_cores or launch.name in (*NO_PRODUCT, *FLOAT64)
        return bool(launch.spilled) or not (launch.fused and on_tensor_cores)

    return [launch for launch in launches if launch.grid and bad(launch)]


def assert_fit(launches: list[Launch]) -> None:
    assert not faults(launches)


def test_faults():
    good = Launch("kernel", (1, 1, 1), tensor_cores=True)
    assert not faults([good, Launch("mm"), good._replace(name="_skew_kernel", tensor_cores=False)])
    assert all(faults([good._replace(**bad)]) for bad in ({"spilled": 8}, {"tensor_cores": False}, {"fused": False}))


@pytest.mark.parametrize(("dtype", "T", "k"), [(BF16, 1, 8), (BF16, 256, 64), (BF16, 16, 100)])
def test_the_linear_op(compiler, dtype, T, k):
    """One pass forward, one backward, and the gradient of the core."""
    launches = compiler.submit(linear, ADA, dtype, T, k).result()
    assert [launch.name for launch in launches] == 2 * ["_ssvd_linear_one_pass_kernel"] + CORE_GRAD
    assert_fit(launches)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize(("dtype", "weight"), [(BF16, BF16), (F16, F16), (BF16, F32)])
def test_the_linear_op_on_every_gpu(compiler, capability, dtype, weight):
    """Beyond k = 128, z and q are the library's products: four of them, with two casts of the core and the core's
    gradient to 11 launches."""
    for T in (1, 16, 256):
        for k, launched in ((8, 5), (24, 5), (64, 5), (100, 5), (192, 11)):
            launches = compiler.submit(linear, capability, dtype, T, k, weight).result()
            assert len(launches) <= launched, launches
            assert_fit(launches)


@pytest.mark.parametrize(("T", "k"), [(1, 192), (200, 200)])
def test_the_activation_op(compiler, T, k):
    """Two products of the library and one kernel forward and backward, and the gradient of the core."""
    launches = compiler.submit(activation, ADA, BF16, T, k).result()
    one_way = ["new_zeros"] * (k % 16 > 0) + ["mm", "mm", "_add_product_kernel"]
    assert [launch.name for launch in launches] == [*one_way, *one_way, *CORE_GRAD]
    assert_fit(launches)


@pytest.mark.parametrize(("T", "k"), [(1, 32), (1500, 153)])
def test_rows_with_their_own_cores(compiler, T, k):
    """One kernel each way: the cores are not gathered."""
    launches = compiler.submit(rows, ADA, BF16, T, k).result()
    assert [launch.name for launch in launches if launch.grid] == 2 * ["_rows_product_kernel"]
    assert_fit(launches)


@pytest.mark.slow
@pytest.mark.parametrize("k", [192, 200])
def test_a_training_step(compiler, k):
    """Launches of a further layer, whose core is cast and padded with those of the others."""
    few, many = (compiler.submit(layers, ADA, number, k).result() for number in (2, 4))
    assert len(many) - len(few) <= 2 * 9, [launch.name for launch in many]


@pytest.mark.slow
@pytest.mark.parametrize(("k", "launched"), [(16, 7), (64, 7), (100, 17), (256, 31)])
def test_the_cayley_transform(compiler, k, launched):
    launches = compiler.submit(rotations, HOPPER, k, 64).result()
    assert len(launches) <= launched, [launch.name for launch in launches]
    assert_fit(launches)


def test_a_tile_that_needs_too_much_shared_memory_is_refused(compiler):
    with pytest.raises(OutOfResources, match="135168"):
        compiler.submit(linear_with_four_stages, ADA).result()
    assert len(compiler.submit(linear_with_four_stages, HOPPER).result()) == 2 + len(CORE_GRAD)


def every_tile() -> Iterator[tuple[str, str, int, TileConfig]]:
    """(table, key, padded rank where the table goes by it, tile)"""
    yield from (("LINEAR", key, 0, tile) for key, tiles in tile_sizes.LINEAR.items() for tile in tiles)
    yield from (("CAYLEY", "", 0, tile) for tile in tile_sizes.CAYLEY)
    for key in tile_sizes.ONE_PASS:
        for rank in (16, 32, 64, 128):
            yield from (("ONE_PASS", key, rank, tile) for tile in tile_sizes.one_pass_tiles(key, rank))


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_tile(capability):
    """All fit, and together they are those of all kernels."""
    bad, launched = [], set[str]()
    with compiling(2) as processes:
        jobs: dict[tuple, Any] = {tile: processes.submit(with_tile, capability, *tile) for tile in every_tile()}
        jobs["sums", "", 0, None] = processes.submit(sums, capability)
        for tile, job in jobs.items():
            try:
                launches = job.result()
            except OutOfResources as error:
                bad.append((tile, error))
                continue
            launched |= {launch.name for launch in launches}
            bad += [(tile, fault) for fault in faults(launches, exact=tile[1].startswith("float32"))]
    assert not bad, "\n".join(map(str, bad))
    modules = [importlib.import_module(f"{tile_sizes.__package__}.{name}") for name in MODULES]
    assert launched >= {name for module in modules for name in vars(module) if name.endswith("_kernel")}
