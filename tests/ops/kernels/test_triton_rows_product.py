"""Products of rows with their own cores by the Triton kernel against float64, and the gradients that it gives."""

from __future__ import annotations

import pytest
import torch
from bounds import Results, assert_bounded
from torch import Tensor

from ssvd_kernels.ops import triton_linear
from ssvd_kernels.ops.places import Places
from ssvd_kernels.ops.reference import rows_product_bwd, rows_product_fwd

pytest.importorskip("triton")

from ssvd_kernels.ops.kernels import tile_sizes as tables
from ssvd_kernels.ops.kernels import unavailable_reason

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = unavailable_reason(DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NUMBERS = [2, None, 0, 2, 3]  # of four cores, one of which nobody has
SHAPES = [(1, 1), (1, 41), (1, 48), (3, 16), (20, 33), (37, 64)]  # T, k


def inputs(T: int, k: int, dtype: torch.dtype, draw: int = 0) -> Results:
    generator = torch.Generator().manual_seed(draw)
    shapes = {"z": (len(NUMBERS), T, k), "cores": (4, k, k), "dq": (len(NUMBERS), T, k)}
    found = {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}
    return {name: tensor if name == "cores" else tensor.to(dtype) for name, tensor in found.items()}


def plain(case: Results, dtype: torch.dtype) -> Results:
    """By hand, in `dtype`."""
    z, cores, dq = (case[name].to(dtype) for name in ("z", "cores", "dq"))
    rows = [cores[0] * 0 if number is None else cores[number] for number in NUMBERS]
    dcores = torch.zeros_like(cores)
    for row, number in enumerate(NUMBERS):
        if number is not None:
            dcores[number] += dq[row].mT @ z[row]
    return {
        "q": torch.stack([z[row] @ core.mT for row, core in enumerate(rows)]),
        "dz": torch.stack([dq[row] @ core for row, core in enumerate(rows)]),
        "dcores": dcores,
    }


def passes(case: Results, by: object) -> Results:
    places = Places(NUMBERS, DEVICE)
    q = by.rows_product_fwd(case["z"], case["cores"], places)
    dz, dcores = by.rows_product_bwd(case["dq"], case["z"], case["cores"], places, True)
    assert q.dtype == dz.dtype == case["z"].dtype and dcores.dtype == F32
    assert not q[1].any() and not dz[1].any() and not dcores[1].any()
    assert by.rows_product_bwd(case["dq"], None, case["cores"], places, False) == (None, None)
    return {"q": q, "dz": dz, "dcores": dcores}


class Reference:
    rows_product_fwd, rows_product_bwd = staticmethod(rows_product_fwd), staticmethod(rows_product_bwd)


@pytest.mark.parametrize("by", [triton_linear, Reference], ids=["triton", "reference"])
@pytest.mark.parametrize(("T", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_products_and_gradients(dtype, T, k, by):
    def references(draw: int) -> tuple[Results, Results]:
        case = inputs(T, k, dtype, draw)
        return plain(case, dtype), plain(case, torch.float64)

    assert_bounded(passes(inputs(T, k, dtype), by), references)


def test_by_row():
    cores = inputs(1, 5, F32)["cores"]
    found = Places(NUMBERS, DEVICE).by_row(cores)
    assert torch.equal(found, torch.stack([cores[2], 0 * cores[0], cores[0], cores[2], cores[3]]))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_is_copied_and_nothing_read_beside(dtype):
    """Cores within wider rows of NaN, as in a pool of many layers, and rows of every other token."""
    case = inputs(6, 33, dtype)
    pool = torch.full((4, 2000), float("nan"), device=DEVICE)
    pool[:, 100 : 100 + 33 * 33] = case["cores"].flatten(1)
    frame = torch.full((5, 12, 40), float("nan"), device=DEVICE, dtype=dtype)
    frame[:, ::2, 3:36] = case["z"]
    places = Places(NUMBERS, DEVICE)
    strided: list[Tensor] = [frame[:, ::2, 3:36], pool[:, 100 : 100 + 33 * 33].view(4, 33, 33)]
    assert strided[1].data_ptr() == pool.data_ptr() + 400
    found = triton_linear.rows_product_fwd(*strided, places)
    assert torch.equal(found, triton_linear.rows_product_fwd(case["z"], case["cores"], places))


def test_no_tokens():
    empty = torch.zeros(5, 0, 8, device=DEVICE)
    assert (
        triton_linear.rows_product_fwd(empty, torch.zeros(4, 8, 8, device=DEVICE), Places(NUMBERS, DEVICE)).numel() == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize(("key", "config"), [(key, c) for key, of in tables.LINEAR.items() for c in of])
def test_every_configuration(key, config, monkeypatch):
    monkeypatch.setattr("ssvd_kernels.ops.kernels.rows_product.rows_config", lambda *_: config)
    test_products_and_gradients(
        F32 if key.startswith("float32") else BF16, config.rows + 3, config.cols + 5, triton_linear
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("T", "k"), [(1, 32), (1500, 153), (1, 512)])
def test_large_shapes(dtype, T, k):
    test_products_and_gradients(dtype, T, k, triton_linear)
