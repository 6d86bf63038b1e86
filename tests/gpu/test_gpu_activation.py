"""On a CUDA device: accuracy of the activation op, strides, host syncs, repeatability, small updates."""

from __future__ import annotations

import pytest
import torch
from bounds import DRAWS, assert_within
from cases import activation_inputs, naive_activation, together
from gain import GAIN, gain
from models import activation_passes

import ssvd_kernels as sk

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [(0, 64, 16), (1, 64, 8), (1, 7, 1), (37, 61, 41), (257, 1024, 409), (1500, 1280, 512)]  # (tokens, d, k)


def activation_on_device(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> dict:
    return {name: tensor.to(DEVICE) for name, tensor in activation_inputs(shape, dtype, seed).items()}


def activation_is_accurate(draws: list[dict], dtype: torch.dtype) -> None:
    """Output and gradients, those of all draws taken together."""
    with sk.use_backend("triton"):
        found = together(map(activation_passes, draws))
    plain, exact = (together(naive_activation(inputs, kind) for inputs in draws) for kind in (dtype, torch.float64))
    for name, value in found.items():
        assert_within(value, plain[name], exact[name], name)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_activation_error(shape, dtype):
    count = 1 if min(shape) > 16 else DRAWS if shape[-1] > 1 else DRAWS**2
    activation_is_accurate([activation_on_device(shape, dtype, 1000 * seed) for seed in range(count)], dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_triton_activation_takes_any_strides(dtype):
    inputs = activation_on_device((90, 96, 33), dtype)
    strided = {name: torch.stack([t, t], -1)[..., 0] for name, t in inputs.items()}
    for case in (strided, inputs | {"basis": inputs["basis"].contiguous(), "dy": inputs["dy"][:1].expand(90, 96)}):
        activation_is_accurate([case], dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_activation_does_not_wait_and_gives_the_same_bits(as_trained, no_sync, dtype):
    inputs = activation_on_device((4096, 384, 153), dtype)
    with sk.use_backend("triton"):
        first = activation_passes(inputs)
        no_sync()
        again = [activation_passes(inputs) for _ in range(5)]
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(each[name], first[name]) for each in again for name in first)


@pytest.mark.parametrize("kappa", [1e-4, 1e-3, 1e-2, 1e-1])
def test_activation_keeps_small_updates_in_bf16(as_trained, kappa):
    inputs = activation_on_device((16384, 1024, 409), BF16)
    inputs["core"] *= kappa * 4 * (1024 / 409) ** 0.5  # the update is kappa times x
    out = activation_passes(inputs)["out"].double()
    exact = naive_activation(inputs, torch.float64)["out"]
    assert abs(gain(out - inputs["x"].double(), exact - inputs["x"].double()) - 1) <= GAIN
    still = activation_passes(inputs | {"core": torch.zeros_like(inputs["core"])})["out"]
    assert torch.equal(still, inputs["x"])
