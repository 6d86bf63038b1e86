"""What the launchers launch, and that it fits, on GPUs that need not be here; see triton_driver.

The GPU of the fast tests is the one with the least shared memory; all of them are slow tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

import pytest

pytest.importorskip("triton")

import torch
from triton.runtime.errors import OutOfResources
from triton_driver import SHARED, Launch, compiling, gpu

from ssvd_kernels.ops.autograd import apply_linear
from ssvd_kernels.ops.kernels import cayley, tile_sizes
from ssvd_kernels.ops.kernels.tile_sizes import TileConfig
from ssvd_kernels.ops.triton_linear import operand

pytestmark = pytest.mark.xdist_group("launches")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ADA, HOPPER = 89, 90
D = 256


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    with compiling() as process:
        yield process


# -- in the process that compiles ---------------------------------------------------------------------------------


def linear(
    capability: int, dtype: torch.dtype, T: int, k: int, weight: torch.dtype | None = None, mode: str = "factored"
) -> list[Launch]:
    """Of the op forward and backward, with the operands that a layer caches."""
    W, b = torch.zeros(D, D, dtype=weight or dtype), torch.zeros(D, dtype=weight or dtype)
    U, V = (operand(torch.zeros(D, k), dtype) for _ in range(2))
    x, core, dy = torch.zeros(T, D, dtype=dtype), torch.zeros(k, k), torch.zeros(T, D, dtype=dtype)
    leaves = x.requires_grad_(), core.requires_grad_()
    with gpu(capability) as launches:
        y = apply_linear(x, W, U, V, core, b, mode, dtype, "triton", True)
        torch.autograd.grad(y, leaves, dy)
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


# -- tests --------------------------------------------------------------------------------------------------------


def assert_fit(launches: list[Launch]) -> None:
    assert not [launch for launch in launches if launch.spilled]


@pytest.mark.parametrize(("dtype", "T", "k"), [(BF16, 1, 8), (BF16, 256, 64), (BF16, 16, 100)])
def test_the_linear_op(compiler, dtype, T, k):
    """One pass forward, one backward, and the gradient of the core."""
    launches = compiler.submit(linear, ADA, dtype, T, k).result()
    assert [launch.name for launch in launches] == 2 * ["_ssvd_linear_one_pass_kernel"] + ["_core_grad_kernel"]
    assert_fit(launches)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize(("dtype", "weight"), [(BF16, BF16), (F16, F16), (BF16, F32)])
def test_the_linear_op_on_every_gpu(compiler, capability, dtype, weight):
    """Beyond k = 128, z and q are the library's products: four of them, with two casts of the core to 9 launches."""
    for T in (1, 16, 256):
        for k, launched in ((8, 3), (24, 3), (64, 3), (100, 3), (192, 9)):
            launches = compiler.submit(linear, capability, dtype, T, k, weight).result()
            assert len(launches) <= launched, launches
            assert_fit(launches)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_the_composed_op_of_a_small_layer(compiler, capability):
    """Its largest tiles."""
    launches = compiler.submit(linear, capability, BF16, 32768, 100, None, "composed").result()
    assert [launch.name for launch in launches].count("_ssvd_linear_concat_kernel") == 2
    assert_fit(launches)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "launched"), [(16, 6), (64, 6), (100, 13), (256, 27)])
def test_the_cayley_transform(compiler, k, launched):
    launches = compiler.submit(rotations, HOPPER, k, 64).result()
    assert len(launches) <= launched, [launch.name for launch in launches]
    assert_fit(launches)


def test_a_tile_that_needs_too_much_shared_memory_is_refused(compiler):
    with pytest.raises(OutOfResources, match="135168"):
        compiler.submit(linear_with_four_stages, ADA).result()
    assert len(compiler.submit(linear_with_four_stages, HOPPER).result()) == 3
