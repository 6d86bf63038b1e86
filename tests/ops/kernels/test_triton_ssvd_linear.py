"""The Triton kernels against float64, without a GPU in Triton's interpreter; memory is NaN, see conftest.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bounds import Results, assert_bounded
from cases import linear_inputs
from torch import Tensor

from ssvd_kernels.ops import reference
from ssvd_kernels.ops.reference import compose_operand_ref, compose_ref

pytest.importorskip("triton")

from ssvd_kernels.ops.kernels import tile_sizes as tables
from ssvd_kernels.ops.kernels import unavailable_reason
from ssvd_kernels.ops.kernels.compose import compose
from ssvd_kernels.ops.kernels.launch import core_grad
from ssvd_kernels.ops.kernels.ssvd_linear import ssvd_linear_bwd, ssvd_linear_fwd

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = unavailable_reason(DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]  # (x, parameters)
SMALL_K = [(29, 37, 41, 1), (1, 19, 23, 2), (17, 48, 32, 16), (37, 50, 70, 17), (13, 67, 61, 33), (31, 64, 80, 64)]
LARGE_K = [(29, 37, 41, 1), (17, 48, 32, 16), (19, 66, 71, 65), (33, 128, 144, 128), (17, 157, 163, 153)]
PATHS = [("one pass", shape) for shape in SMALL_K] + [("products", shape) for shape in LARGE_K]


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, params: torch.dtype, draw: int = 0
) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in linear_inputs(shape, dtype, params, 1000 * draw).items()}


def force(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    if path == "products":
        monkeypatch.setattr(tables, "ONE_PASS_MAX_T", -1)


def check_linear(shape: tuple[int, int, int, int], dtype: torch.dtype, params: torch.dtype, bias: bool = True) -> None:
    """Forward, dx and dcore of one case; z goes into the backward as the forward gave it."""

    def case_of(draw: int) -> Results:
        case = inputs(shape, dtype, params, draw)
        case |= {name: case[name].to(dtype) for name in ("U", "V")}
        return case if bias else {name: tensor for name, tensor in case.items() if name != "bias"}

    case = case_of(0)
    factors = [case[name] for name in ("weight", "U", "V", "core")]
    y, z = ssvd_linear_fwd(case["x"], *factors, case.get("bias"), True)
    dx, dcore = ssvd_linear_bwd(case["dy"], z, *factors, True)
    assert z is not None and dx is not None and dcore is not None
    assert y.dtype == z.dtype == dx.dtype == dtype and dcore.dtype == case["core"].dtype
    assert_bounded({"y": y, "z": z, "dx": dx, "dcore": dcore}, twins(case_of))


def twins(case_of: Callable[[int], Results]) -> Callable[[int], tuple[Results, Results]]:
    """`references` of assert_bounded for the linear op, its gradients and W' of case_of(draw)."""

    def twin(case: Results) -> Results:
        factors = [case[name] for name in ("weight", "U", "V", "core")]
        y, z, _ = reference.ssvd_linear_fwd(case["x"], *factors, case.get("bias"), "factored", True)
        assert z is not None
        dy, rows = case["dy"].reshape(-1, case["dy"].shape[-1]), z.reshape(-1, z.shape[-1])
        dx, dcore = reference.ssvd_linear_bwd(dy, rows, *factors, None, True)
        return {"y": y, "z": z, "dx": dx, "dcore": dcore, "W'": compose_ref(*factors)}

    def references(draw: int) -> tuple[Results, Results]:
        case = case_of(draw)
        return twin(case), twin({name: tensor.double() for name, tensor in case.items()})

    return references


@pytest.mark.parametrize(("path", "shape"), PATHS)
@pytest.mark.parametrize(("dtype", "params"), DTYPES)
def test_linear_and_its_gradients(dtype, params, path, shape, monkeypatch):
    force(monkeypatch, path)
    check_linear(shape, dtype, params, bias=shape[0] != 17)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "config"), [(key, c) for key, table in tables.LINEAR.items() for c in table])
def test_every_linear_configuration(key, config, monkeypatch):
    """More than one tile in each direction, whatever the shape would have picked."""
    force(monkeypatch, "products")
    monkeypatch.setattr(tables, "_pick", lambda *_: config)
    monkeypatch.setitem(tables.LINEAR, key, (config,))
    dtype = F32 if key.startswith("float32") else F16
    check_linear((config.rows + 3, 70, config.cols + 5, 19), dtype, F32 if key.startswith("mixed") else dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "max_k", "config"), [(key, k, c) for key, of in tables.ONE_PASS.items() for k in of for c in of[k]]
)
def test_every_one_pass_configuration(key, max_k, config, monkeypatch):
    monkeypatch.setattr("ssvd_kernels.ops.kernels.ssvd_linear.one_pass_config", lambda *_: config)
    dtype = F32 if key.startswith("float32") else F16
    shape = (config.rows + 3, config.depth + 35, config.cols + 35, max_k // 2 + 1)
    check_linear(shape, dtype, F32 if key.startswith("mixed") else dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 41, 17), (70, 130, 65), (160, 153, 153)])
@pytest.mark.parametrize(("dtype", "params"), [*DTYPES, (F32, BF16)])
def test_compose(dtype, params, shape):
    d_out, d_in, k = shape
    check_compose((1, d_in, d_out, k), dtype, params)


def check_compose(shape: tuple[int, int, int, int], dtype: torch.dtype, params: torch.dtype) -> None:
    def factors(draw: int) -> list[Tensor]:
        case = inputs(shape, dtype, params, draw)
        return [case[name] for name in ("weight", "U", "V", "core")]

    def references(draw: int) -> tuple[Results, Results]:
        args = factors(draw)
        exact = compose_ref(*(tensor.double() for tensor in args))
        return {"W'": compose_operand_ref(*args, dtype)}, {"W'": exact}

    weight, U, V, core = factors(0)
    assert_bounded({"W'": compose(weight, U.to(dtype), V.to(dtype), core)}, references)


@pytest.mark.parametrize(("key", "config"), [(key, c) for key, table in tables.LINEAR.items() for c in table])
def test_every_compose_configuration(key, config, monkeypatch):
    monkeypatch.setattr("ssvd_kernels.ops.kernels.compose.linear_config", lambda *_: config)
    dtype = F32 if key.startswith("float32") else BF16
    check_compose((1, config.cols + 5, config.rows + 3, 19), dtype, F32 if key.startswith("mixed") else dtype)


@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (13, 17, 33), (700, 16, 16), (300, 70, 153)])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_core_grad(dtype, shape):
    def draw(number: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(number)
        a, b = (torch.randn(shape[0], width, device=DEVICE).to(dtype) for width in shape[1:])
        return a, b

    def references(number: int) -> tuple[Results, Results]:
        a, b = draw(number)
        return {"a^T b": a.mT @ b}, {"a^T b": a.double().mT @ b.double()}

    value = core_grad(*draw(0))
    assert value.dtype == F32
    assert_bounded({"a^T b": value}, references)


@pytest.mark.parametrize(("path", "dtype"), [("one pass", F32), ("products", BF16)])
def test_two_runs_give_the_same_bits(path, dtype, monkeypatch):
    force(monkeypatch, path)
    case = inputs((70, 40, 50, 17), dtype, dtype)
    params = [case[name] for name in ("weight", "U", "V", "core")]

    def run() -> list[Tensor | None]:
        y, z = ssvd_linear_fwd(case["x"], *params, case["bias"], True)
        a = case["dy"].repeat(10, 1)
        return [y, z, *ssvd_linear_bwd(case["dy"], z, *params, True), compose(*params), core_grad(a, a)]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.parametrize("path", ["one pass", "products"])
def test_strided_and_expanded_operands(path, monkeypatch):
    """Transposed, sliced and expanded (stride 0) operands give what their contiguous copies give."""
    force(monkeypatch, path)

    def strided(draw: int) -> Results:
        case = inputs((11, 24, 20, 6), F32, F32, draw)
        return {
            "x": case["x"][:1].expand(11, -1),
            "weight": case["weight"].mT.contiguous().mT,
            "U": case["U"][:, :1].expand(-1, 6),
            "V": torch.cat([case["V"]] * 2, dim=1)[:, 6:],
            "core": torch.stack([case["core"]] * 2, dim=-1)[..., 1],
            "bias": case["bias"][:1].expand(20),
            "dy": case["dy"][:1].expand(11, -1),
        }

    case = strided(0)
    assert not any(tensor.is_contiguous() for tensor in case.values())
    for operands in (case, {name: tensor.contiguous() for name, tensor in case.items()}):
        factors = [operands[name] for name in ("weight", "U", "V", "core")]
        y, z = ssvd_linear_fwd(operands["x"], *factors, operands["bias"], True)
        dx, dcore = ssvd_linear_bwd(operands["dy"], z.mT.contiguous().mT, *factors, True)
        found = {"y": y, "z": z, "dx": dx, "dcore": dcore, "W'": compose(*factors)}
        assert_bounded(found, twins(strided))


@pytest.mark.parametrize("lead", [(), (0,), (3, 0), (2, 3), (2, 1, 3)])
def test_leading_shapes_and_what_is_asked_for(lead):
    def case_of(draw: int) -> Results:
        torch.manual_seed(draw)
        case = inputs((1, 24, 20, 6), F32, F32)
        x, dy = torch.randn(*lead, 24, device=DEVICE), torch.randn(*lead, 20, device=DEVICE)
        return {"x": x, "dy": dy, **{name: case[name] for name in ("weight", "U", "V", "core")}}

    x, dy, *params = case_of(0).values()
    y, z = ssvd_linear_fwd(x, *params, None, True)
    assert y.shape == (*lead, 20) and z is not None and z.shape == (*lead, 6)
    bare, nothing = ssvd_linear_fwd(x, *params, None, False)
    assert nothing is None and torch.equal(bare, y)
    dy, z = dy.reshape(-1, 20), z.reshape(-1, 6)
    dx, dcore = ssvd_linear_bwd(dy, z, *params, True)
    assert dx is not None and dx.shape == (len(dy), 24) and dcore is not None and dcore.shape == (6, 6)
    assert bool(torch.isfinite(dcore).all()) and (x.numel() > 0 or not dcore.any())
    assert ssvd_linear_bwd(dy, None, *params, False) == (None, None)
    only_dx, none = ssvd_linear_bwd(dy, None, *params, True)
    none_dx, only_dcore = ssvd_linear_bwd(dy, z, *params, False)
    assert none is None and none_dx is None and torch.equal(only_dx, dx)
    assert_bounded({"dcore": dcore}, twins(case_of))
    assert_bounded({"dcore": only_dcore}, twins(case_of))


def test_refusals():
    assert "float64" in str(unavailable_reason(DEVICE, torch.float64))
    assert "meta" in str(unavailable_reason(torch.device("meta"), F32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ("", "TRITON_INTERPRET"),
        ("import sys; sys.modules['triton'] = None", "triton cannot be imported"),
        ("import triton; triton.__version__ = '3.5.1'", "older than 3.6"),
    ],
)
def test_reason_on_a_cpu_that_cannot(setup, words):
    """The package imports all the same, and says why."""
    code = f"import torch\n{setup}\nfrom ssvd_kernels.ops.kernels import unavailable_reason as why\n"
    code += "print(why(torch.device('cpu'), torch.float32))"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, timeout=120)
    assert words in done.stdout, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "params"), DTYPES)
@pytest.mark.parametrize("shape", [(4096, 1024, 1024, 409), (1000, 1024, 4096, 416), (256, 4096, 1024, 64)])
def test_large_shapes(dtype, params, shape):
    check_linear(shape, dtype, params)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """x of 70,000 x 32,768 elements: row offsets pass 2^31."""
    T, d_in, d_out, k = 70_000, 32_768, 16, 8
    case = inputs((2, d_in, d_out, k), BF16, BF16)
    params = [case[name] for name in ("weight", "U", "V", "core")]
    x = torch.zeros(T, d_in, dtype=BF16, device=DEVICE)
    x[-2:] = case["x"]
    y, z = ssvd_linear_fwd(x, *params, None, True)

    def case_of(draw: int) -> Results:
        return {name: t for name, t in inputs((2, d_in, d_out, k), BF16, BF16, draw).items() if name != "bias"}

    assert_bounded({"y": y[-2:], "z": z[-2:]}, twins(case_of))
    assert not y[:-2].any() and not z[:-2].any()
