"""Counted against the formulas: FLOPs and bytes of every path, and the bytes that autograd saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import LINEAR_SHAPES, linear_inputs
from models import saved_for_backward, trained_layer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ssvd_kernels as sk
from ssvd_kernels.ops import dispatch, flops, reference

F32, BF16 = torch.float32, torch.bfloat16
MODES = ["composed", "factored"]
aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.addmm.out: 1,
    aten.bmm.default: 0,
}  # op -> arguments before the two factors


class Counter(TorchDispatchMode):
    """Numbers read and written by matrix products, and by everything else that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.products += sum(tensor.numel() for tensor in (*args[PRODUCTS[func] :], out))
            self.others += sum(tensor.numel() for tensor in args[: PRODUCTS[func]])  # what is added
        elif not func.is_view:
            self.others += sum(t.numel() for t in (*args, out) if isinstance(t, Tensor))
        return out


@contextmanager
def counted(expected: int, products: list[flops.Product], others: int) -> Iterator[None]:
    with FlopCounterMode(display=False) as flop_counter, Counter() as counter:
        yield
    assert flop_counter.get_total_flops() == expected == flops.flops(products)
    assert counter.products == sum(product.elements for product in products)
    assert counter.others <= others


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", LINEAR_SHAPES[3:], ids=str)
def test_a_layer_does_the_products_of_the_cost_model_and_copies_nothing(shape, mode):
    T, d_in, d_out, k = shape
    inputs = linear_inputs(shape, torch.float32)
    dy = inputs.pop("dy")
    inputs["x"].requires_grad_()
    inputs["core"].requires_grad_()
    compose = flops.compose_products(d_in, d_out, k) if mode == "composed" else []
    forward = compose + flops.forward_products(mode, T, d_in, d_out, k)
    backward = flops.backward_products(mode, T, d_in, d_out, k)
    weight = d_in * d_out if mode == "composed" else 0  # read where W' is composed
    own = T * d_out if mode == "factored" else 0  # the base product, to which the update is added
    with counted(flops.flops(forward), forward, weight + own + d_out):  # and the bias
        y = sk.ssvd_linear(**inputs, mode=mode)
    own = T * d_in if mode == "factored" else 0
    with counted(flops.flops(backward), backward, own):
        torch.autograd.grad(y, [inputs["x"], inputs["core"]], dy)
    both = flops.linear_flops(mode, T, d_in, d_out, k, True)
    assert both == flops.flops(forward) + flops.flops(backward)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("need_x", "need_core"), [(True, False), (False, True), (False, False)])
def test_only_the_needed_products_are_done(mode, need_x, need_core):
    shape = T, d_in, d_out, k = (13, 64, 48, 31)
    inputs = linear_inputs(shape, torch.float32)
    dy = inputs.pop("dy")
    leaves = [inputs[name].requires_grad_() for name, need in (("x", need_x), ("core", need_core)) if need]
    compose = flops.compose_products(d_in, d_out, k) if mode == "composed" else []
    forward = compose + flops.forward_products(mode, T, d_in, d_out, k, need_z=need_core)
    with counted(flops.flops(forward), forward, 10**6):
        y = sk.ssvd_linear(**inputs, mode=mode)
    if leaves:
        backward = flops.backward_products(mode, T, d_in, d_out, k, need_dx=need_x, need_dcore=need_core)
        with counted(flops.flops(backward), backward, 10**6):
            torch.autograd.grad(y, leaves, dy)


def test_the_formulas_are_those_of_the_published_cost_model():
    """Square layer, per token, in units of 2 d^2: frozen 1 + 1; factored 1 + 2 rho + rho^2 each way and the core;
    composed 1 + rho each way, besides 2 d k (d + k) once."""
    d, k, T = 1024, 256, 4096
    unit, rho = 2 * T * d * d, k / d
    factored = flops.linear_flops("factored", T, d, d, k, True)
    assert factored == unit * (1 + 2 * rho + rho**2 + 1 + 2 * rho + 2 * rho**2)
    composed = flops.linear_flops("composed", T, d, d, k, True)
    assert composed == unit * (2 + 2 * rho) + 2 * d * k * (d + k) + 2 * d * k * k
    assert dispatch.composed_from(torch.float32, (d, d), k, "auto", True, "reference") <= T


@pytest.mark.parametrize("k", [33, 64, 153])
def test_the_cayley_twin_does_six_k_cubed(k):
    """2 k^3 forward (less the divisions of the single pivots) and 4 k^3 backward, as the compiled op in its blocks."""
    theta = torch.randn(1, k * (k - 1) // 2, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        E = 2 * reference.inverse_delta_ref(reference.skew(theta, k))
    assert 2 * k**3 - k**2 <= counter.get_total_flops() <= 2 * k**3
    with FlopCounterMode(display=False) as counter:
        reference.cayley_delta_backward_ref(torch.randn_like(E), E)
    assert counter.get_total_flops() == 4 * k**3


@pytest.mark.parametrize(("dtype", "amp"), [(F32, False), (F32, True), (BF16, False)], ids=["f32", "amp", "bf16"])
@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.parametrize("mode", MODES)
def test_saved_bytes_of_a_layer(mode, side, dtype, amp):
    """T k elements of x in the compute dtype, matrices of the core's size, and W' where it was composed."""
    T, d_in, d_out, k = 200, 48, 64, 12
    layer = trained_layer(d_in, d_out, mode, dtype, rank=k, side=side, **({"rank_out": k} if side == "both" else {}))
    x = torch.randn(T, d_in, dtype=dtype, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in [*layer.parameters(), x]}
    with saved_for_backward(known) as saved, torch.autocast("cpu", BF16, enabled=amp):
        y = layer(x)
    size = 2 if amp else dtype.itemsize
    of_x, weight = T * k * size, d_out * d_in * size
    of_weight = weight if mode == "composed" else 0
    assert of_x + of_weight <= sum(saved.values()) <= of_x + of_weight + 6 * 4 * k * k
    assert (weight in saved.values()) == (mode == "composed")
    y.sum().backward()
    assert layer.theta.grad.abs().max() > 0
    assert y.requires_grad and of_x in saved.values()
