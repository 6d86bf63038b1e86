"""`launch`: what it remembers of a launch, and what it must not. See triton_driver for the GPUs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock, patch

import pytest

pytest.importorskip("triton")

import torch
from triton.runtime import JITFunction
from triton_driver import Launch, compiling, gpu

from ssvd_kernels.ops.kernels import compose
from ssvd_kernels.ops.kernels import launch as module
from ssvd_kernels.ops.kernels.tile_sizes import TileConfig

pytestmark = pytest.mark.xdist_group("launches")
BF16, TILE = torch.bfloat16, TileConfig(16, 32, 64, 4, 4)


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    with compiling() as process:
        yield process


def call(T: int = 3, d: int = 64, shift: int = 0, dtype: torch.dtype = BF16, tile: TileConfig = TILE) -> None:
    """`shift`: by how many elements y's memory is not aligned."""
    y, q = torch.zeros(T * d + shift, dtype=dtype)[shift:].view(T, d), torch.zeros(T, 16, dtype=dtype)
    compose.add_product(y, q, torch.zeros(d, 16, dtype=dtype), dtype, False, tile)


def of_each(calls: list[dict[str, Any]], capability: int = 90) -> tuple[list[bool], list[Launch]]:
    """Whether Triton looked at the arguments of each call, and the launches."""
    looked, run = [], JITFunction.run

    def noting(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        looked[-1] = True
        return run(self, *args, **kwargs)

    with patch.object(JITFunction, "run", noting), gpu(capability) as launches:
        for options in calls:
            looked.append(False)
            call(**options)
    return looked, [launch for launch in launches if launch.grid]


def on_two_devices() -> list[bool]:
    return [looked for capability in (90, 80, 90) for looked in of_each([{}], capability)[0]]


def remembering_two() -> tuple[list[bool], int]:
    with patch.object(module, "MOST", 2):
        looked, _ = of_each([{"T": T} for T in (1, 2, 3, 3, 1)])
    return looked, len(module._COMPILED)


def left_alive() -> int:
    """Tensors that live on after their launches."""
    references = []
    with gpu(90):
        for _ in range(2):
            y, q, basis = (torch.zeros(16, 16, dtype=BF16) for _ in range(3))
            references += [
                weakref.ref(tensor) for tensor in (y, q, basis, compose.add_product(y, q, basis, BF16, False, TILE))
            ]
            del y, q, basis
    gc.collect()
    return sum(reference() is not None for reference in references)


def test_the_second_launch_goes_past_triton_and_is_the_same(compiler):
    looked, (first, second) = compiler.submit(of_each, [{}, {}]).result()
    assert looked == [True, False] and first == second and first.name == "_add_product_kernel"


@pytest.mark.parametrize(
    "other", [{"T": 4}, {"d": 48}, {"shift": 4}, {"dtype": torch.float16}, {"tile": TILE._replace(warps=8)}], ids=str
)
def test_whatever_a_kernel_depends_on_makes_another(compiler, other):
    """And the one before is not forgotten."""
    assert compiler.submit(of_each, [{}, other, other, {}]).result()[0][1:] == [True, False, False]


def test_each_device_has_its_own(compiler):
    assert compiler.submit(on_two_devices).result()[1:] == [True, False]


def test_not_without_end(compiler):
    looked, count = compiler.submit(remembering_two).result()
    assert looked == [True, True, True, False, True] and count <= 2


def test_no_tensor_is_kept(compiler):
    assert compiler.submit(left_alive).result() == 0


def test_a_launch_is_on_the_device_of_the_tensors(monkeypatch):
    """Twice: as Triton does it, and past it."""
    current, seen = [0], []

    @contextmanager
    def device(number: int) -> Iterator[None]:
        current.append(number)
        yield
        current.pop()

    def compiled(*arguments: Any, stream: int) -> None:
        seen.append((current[-1], stream))

    def first(*arguments: Any, **options: Any) -> Any:
        seen.append((current[-1], None))
        return {(1, 1, 1): compiled}

    active = SimpleNamespace(get_current_device=lambda: current[-1], get_current_stream=lambda device: 10 + device)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "_COMPILED", {})
    monkeypatch.setattr(torch.cuda, "device", device)
    tensor = Mock(dtype=BF16, get_device=lambda: 1, data_ptr=lambda: 0)
    kernel = MagicMock()
    kernel.__getitem__.return_value = first
    for _ in range(2):
        module.launch(kernel, (1, 1, 1), (tensor,), (), (), TILE)
    assert seen == [(1, None), (1, 11)] and current == [0]
