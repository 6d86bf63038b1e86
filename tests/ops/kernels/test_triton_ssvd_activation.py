"""The activation op by the Triton kernels against float64, as test_triton_ssvd_linear.py has the linear op."""

from __future__ import annotations

import pytest
import torch
from bounds import Results, assert_bounded
from cases import activation_inputs, naive_activation
from gain import GAIN, gain
from torch import Tensor

from ssvd_kernels.ops import reference

pytest.importorskip("triton")

from ssvd_kernels.ops.kernels import tile_sizes as tables
from ssvd_kernels.ops.kernels import unavailable_reason
from ssvd_kernels.ops.kernels.ssvd_activation import ssvd_activation_bwd, ssvd_activation_fwd
from ssvd_kernels.ops.triton_linear import core_operand

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = unavailable_reason(DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [
    (0, 96, 41), (1, 37, 1), (1, 96, 41), (5, 64, 64), (5, 130, 70), (130, 48, 32), (130, 64, 41), (130, 37, 33)
]  # fmt: skip


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, draw: int = 0) -> Results:
    return {name: tensor.to(DEVICE) for name, tensor in activation_inputs(shape, dtype, 1000 * draw).items()}


def framed(tensor: Tensor) -> Tensor:
    """The same values amid NaN."""
    frame = tensor.new_full([size + 16 for size in tensor.shape], float("nan"))
    inside = frame[tuple(slice(size) for size in tensor.shape)]
    return inside.copy_(tensor)


def passes(case: Results, core: Tensor) -> Results:
    """Forward and backward; z goes into the backward as the forward gave it."""
    k, dtype = case["basis"].shape[1], case["x"].dtype
    out, z = ssvd_activation_fwd(case["x"], case["basis"], core, case["shift"])
    dx, dcore = ssvd_activation_bwd(case["dy"], z, case["basis"], core, True)
    assert dx is not None and dcore is not None
    assert out.dtype == z.dtype == dx.dtype == dtype and dcore.dtype == F32
    assert z.shape[1] % 16 == 0 and dcore.shape == 2 * (z.shape[1],)
    assert not z[:, k:].any() and not dcore[k:].any() and not dcore[:, k:].any()
    return {"out": out, "z": z[:, :k], "dx": dx, "dcore": dcore[:k, :k]}


def references(case: Results) -> tuple[Results, Results]:
    """In x's dtype, and exact."""
    return naive_activation(case, case["x"].dtype), naive_activation(case, torch.float64)


def check_activation(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = inputs(shape, dtype)
    assert_bounded(passes(case, case["core"]), lambda draw: references(inputs(shape, dtype, draw)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_activation_and_its_gradients(dtype, shape):
    check_activation(shape, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_core_may_be_padded(dtype):
    case = inputs((5, 48, 19), dtype)
    plain, padded = passes(case, case["core"]), passes(case, core_operand(case["core"], dtype))
    assert all(torch.equal(plain[name], padded[name]) for name in plain)


@pytest.mark.parametrize("k", [41, 48])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_any_strides_and_nothing_read_beside_them(dtype, k):
    """Framed by NaN, transposed, and expanded (stride 0) operands give what their contiguous copies give."""
    case = inputs((19, 96, k), dtype)
    case["dy"] = case["dy"][:, :1].expand(19, 96)
    layouts = [
        {name: framed(tensor) for name, tensor in case.items()},
        {name: framed(tensor.mT).mT if tensor.ndim == 2 else tensor for name, tensor in case.items()},
    ]
    assert not any(layout["basis"].is_contiguous() for layout in layouts)
    for layout in (*layouts, {name: tensor.contiguous() for name, tensor in case.items()}):
        assert_bounded(passes(layout, layout["core"]), lambda _: references(case))


@pytest.mark.parametrize("lead", [(), (0,), (3, 0), (2, 3), (2, 1, 3)])
def test_leading_shapes_and_what_is_asked_for(lead):
    case = inputs((1, 24, 6), F32)
    x, parameters = torch.randn(*lead, 24, device=DEVICE), (case["basis"], case["core"])
    out, z = ssvd_activation_fwd(x, *parameters, None)
    assert out.shape == x.shape and z.shape == (*lead, 16)
    rows, z = x.reshape(-1, 24), z.reshape(-1, 16)
    dx, dcore = ssvd_activation_bwd(rows, z, *parameters, True)
    assert dx.shape == rows.shape and dcore.shape == (16, 16) and (x.numel() > 0 or not dcore.any())
    assert ssvd_activation_bwd(rows, None, *parameters, False) == (None, None)
    only_dx, none = ssvd_activation_bwd(rows, None, *parameters, True)
    none_dx, only_dcore = ssvd_activation_bwd(rows, z, *parameters, False)
    assert none is None and none_dx is None
    assert torch.equal(only_dx, dx) and torch.equal(only_dcore, dcore)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_nothing_trained_changes_no_bit(dtype):
    case = inputs((70, 96, 41), dtype)
    still = case | {"core": torch.zeros_like(case["core"])}
    results = passes(still, still["core"])
    assert torch.equal(results["out"], case["x"]) and torch.equal(results["dx"], case["dy"])


def test_the_sum_is_rounded_as_everywhere():
    """Bit for bit, but where the float32 sums differ in their last place across a rounding threshold."""
    case = inputs((130, 96, 41), BF16)
    out, z = ssvd_activation_fwd(case["x"], case["basis"], case["core"], case["shift"])
    q = z[:, :41] @ case["core"].to(BF16).mT
    expected = reference.round_stochastically(case["x"].float() + q.float() @ case["basis"].float().mT)
    assert (out != expected).float().mean() < 0.01


def test_small_updates_survive_in_bf16(monkeypatch):
    """One of 1e-4 x; to nearest, 6 % of it would. The largest tile, of which the interpreter needs the fewest."""
    monkeypatch.setattr("ssvd_kernels.ops.kernels.ssvd_activation.linear_config", lambda *_: tables.LINEAR["half"][-1])
    case = inputs((1024, 1024, 64), BF16)
    core = 16e-4 * case["core"]
    out, z = ssvd_activation_fwd(case["x"], case["basis"], core, None)
    true = z.double() @ core.double().mT @ case["basis"].double().mT
    assert 0.5e-4 < true.norm() / case["x"].double().norm() < 2e-4
    assert abs(gain(out.double() - case["x"].double(), true) - 1) <= GAIN
    nearest = case["x"] + true.to(BF16)
    assert gain(nearest.double() - case["x"].double(), true) < 0.2


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_two_runs_give_the_same_bits(dtype):
    case = inputs((40, 48, 19), dtype)
    first, second = passes(case, case["core"]), passes(case, case["core"])
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "config"), [(key, c) for key, of in tables.LINEAR.items() for c in of if not key.startswith("mixed")]
)
def test_every_configuration(key, config, monkeypatch):
    """More than one tile in each direction, whatever the shape would have picked."""
    monkeypatch.setattr("ssvd_kernels.ops.kernels.ssvd_activation.linear_config", lambda *_: config)
    d = config.cols + (5 if key.endswith("odd") else 16)
    check_activation((config.rows + 3, d, 19), F32 if key.startswith("float32") else BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("shape", [(4096, 1024, 409), (1000, 4096, 416), (256, 1280, 64), (1, 1280, 512)])
def test_large_shapes(dtype, shape):
    check_activation(shape, dtype)
