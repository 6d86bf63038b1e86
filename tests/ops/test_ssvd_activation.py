"""The activation op: x + (((x - shift) B) C^T) B^T, against float64 and its rounding in bfloat16."""

from __future__ import annotations

import pytest
import torch
from bounds import DRAWS, twice_of_draws
from cases import relative_error
from gain import GAIN, gain
from torch import Tensor

from ssvd_kernels.ops.functional import activation

T, D, K = 40, 24, 7


def inputs(dtype: torch.dtype, size: float = 0.3) -> list[Tensor]:
    """x (T, D), core (K, K), orthonormal basis (D, K), shift (D,), exactly representable in `dtype`."""
    basis = torch.linalg.qr(torch.randn(D, K, dtype=torch.float64)).Q.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return [torch.randn(T, D).to(dtype), (size * torch.randn(K, K)).to(wide), basis, torch.randn(D).to(dtype)]


def formula(x: Tensor, core: Tensor, basis: Tensor, shift: Tensor | None) -> Tensor:
    return x + ((x if shift is None else x - shift) @ basis) @ core.to(x.dtype).mT @ basis.mT


def passes(call, x: Tensor, core: Tensor, *frozen: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output, dx and dcore of sum(sin(output)), which computes in `dtype`."""
    x, core, *frozen = (None if t is None else t.detach().to(dtype or t.dtype) for t in (x, core, *frozen))
    leaves = [x.requires_grad_(), core.requires_grad_()]
    y = call(*leaves, *frozen)
    return [y.detach(), *torch.autograd.grad(y.to(torch.promote_types(y.dtype, torch.float32)).sin().sum(), leaves)]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_and_gradients_against_float64(dtype, shifted):
    def op(x: Tensor, core: Tensor, basis: Tensor, shift: Tensor | None) -> Tensor:
        return activation(x.unflatten(0, (8, -1)), basis, core, shift).flatten(0, 1)

    found = []
    for _ in range(DRAWS):
        x, core, basis, shift = inputs(dtype)
        args = x, core, basis, shift if shifted else None
        found.append((passes(op, *args), passes(formula, *args), passes(formula, *args, dtype=torch.float64)))
    for index, name in enumerate(("y", "dx", "dcore")):
        bound = twice_of_draws((plain[index], exact[index]) for _, plain, exact in found)
        for ours, _, exact in found:
            assert relative_error(ours[index], exact[index]) <= bound, name


@pytest.mark.parametrize("shifted", [False, True])
def test_gradcheck_and_torch_func(shifted):
    x, core, basis, shift = inputs(torch.float64)
    shift, x = shift if shifted else None, x[:4]
    leaves = (x.requires_grad_(), core.requires_grad_())

    def op(x: Tensor, core: Tensor) -> Tensor:
        return activation(x, basis, core, shift)

    assert torch.autograd.gradcheck(op, leaves)
    rows = torch.func.vmap(lambda row: op(row, core))(x)
    assert relative_error(rows.detach(), op(x, core).detach()) <= 1e-14
    first = torch.autograd.grad(op(x, core).sin().sum(), x, create_graph=False)[0]
    assert relative_error(torch.func.grad(lambda x: op(x, core).sin().sum())(x).detach(), first) <= 1e-14
    with pytest.raises(RuntimeError, match=r"second derivatives .* use torch\.func"):
        torch.autograd.grad(op(x, core).sin().sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_core_of_zeros_changes_nothing(dtype):
    x, core, basis, shift = inputs(dtype)
    assert torch.equal(activation(x, basis, 0 * core), x)
    assert torch.equal(activation(x, basis, 0 * core, shift), x)


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_small_change_survives_bfloat16(size, autocast):
    """Half the width of a bfloat16 is 2e-3: rounding to nearest would lose the smallest two."""
    _, core, basis, _ = inputs(torch.bfloat16, size / K**0.5)
    x = torch.randn(32768 if size < 1e-3 else 4096, D).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = activation(x.float() if autocast else x, basis, core)
    assert y.dtype == torch.bfloat16
    true = ((x.double() @ basis.double()) @ core.double().mT) @ basis.double().mT
    assert abs(gain(y.double() - x.double(), true) - 1) <= GAIN


def test_float64_is_not_narrowed_by_autocast():
    x, core, basis, _ = inputs(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = activation(x, basis, core)
    assert y.dtype == torch.float64 and relative_error(y, formula(x, core, basis, None)) <= 1e-14


def test_of_x_the_product_with_the_basis_alone_is_kept_for_backward():
    x, core, basis, _ = inputs(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        activation(x, basis, core.requires_grad_())
    assert sorted(kept) == sorted([(T, K), basis.shape, core.shape])
