"""The SSVD linear op: every mode and backend against float64, derivatives, dispatch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bounds import DRAWS, twice, unit_roundoff
from cases import LINEAR_SHAPES, linear_inputs, naive_linear, relative_error, together
from models import op_passes
from torch.autograd import gradcheck

import ssvd_kernels as sk
from ssvd_kernels.ops import dispatch, flops, reference
from ssvd_kernels.ops import kernels as triton_backend
from ssvd_kernels.ops.functional import linear

CPU = torch.device("cpu")
_WHY_NOT = triton_backend.unavailable_reason(CPU, torch.float32)
HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("mode", ["composed", "factored", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_errors_are_at_most_twice_those_of_plain_pytorch(mode, dtype, shape):
    check_against_float64("reference", mode, dtype, shape)


@pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))
@pytest.mark.parametrize("mode", ["composed", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_triton_through_the_public_function(mode, dtype):
    check_against_float64("triton", mode, dtype, (40, 130, 67, 33))


def check_against_float64(backend, mode, dtype, shape):
    count = 1 if min(shape) > 16 else DRAWS if min(shape) > 1 else DRAWS**2  # of one number each
    draws = [linear_inputs(shape, dtype, seed=1000 * seed) for seed in range(count)]
    narrow, scale = dtype, 1.0
    if dtype == torch.float64:  # float32's error to scale, once more for the oracle, which is no better
        narrow, scale = torch.float32, 1.5 * unit_roundoff(torch.float64) / unit_roundoff(torch.float32)
    plain, exact = (together(naive_linear(inputs, of) for inputs in draws) for of in (narrow, torch.float64))
    with sk.use_backend(backend):
        found = together(op_passes(inputs, mode) for inputs in draws)
    for name, truth in exact.items():
        assert relative_error(found[name], truth) <= scale * twice(plain[name], truth, narrow), name


@pytest.mark.parametrize("mode", ["composed", "factored"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_and_gradgradcheck(mode, bias):
    inputs = linear_inputs((4, 6, 5, 3), torch.float64)
    x, core, b = (inputs[name].requires_grad_() for name in ("x", "core", "bias"))

    def op(x, core, b):
        return sk.ssvd_linear(x, inputs["weight"], inputs["U"], inputs["V"], core, b if bias else None, mode=mode)

    arguments = (x, core, b) if bias else (x, core, None)
    assert gradcheck(op, arguments)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (1, 6), (2, 3, 6), (2, 0, 6)])
def test_update_alone_is_the_linear_op_over_a_zero_weight(shape):
    inputs = linear_inputs((4, 6, 5, 3), torch.float64)
    U, V, core = inputs["U"], inputs["V"], inputs["core"].requires_grad_()
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    expected = sk.ssvd_linear(x, torch.zeros(5, 6, dtype=torch.float64), U, V, core, mode="factored")
    update = linear(x, None, U, V, core, None, "factored")
    assert torch.equal(update, expected)
    grads, references = (torch.autograd.grad(y.sin().sum(), [x, core]) for y in (update, expected))
    assert all(map(torch.equal, grads, references))
    if x.numel():
        assert gradcheck(lambda x, core: linear(x, None, U, V, core, None, "factored"), (x, core))


def assert_equal_up_to_rounding(values, references):
    """In float64: two results, each of three sums of at most 12 terms in a row."""
    for value, expected in zip(values, references, strict=True):
        assert value.shape == expected.shape
        assert relative_error(value, expected) <= 2 * 3 * 12 * unit_roundoff(torch.float64)


@pytest.mark.parametrize("mode", ["composed", "factored", "auto"])
@pytest.mark.parametrize("shape", [(6,), (0, 6), (1, 6), (2, 3, 6), (2, 0, 6), (2, 1, 3, 6)])
def test_any_leading_shape(mode, shape):
    inputs = linear_inputs((4, 6, 5, 3), torch.float64)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    core = inputs["core"].requires_grad_()
    y = sk.ssvd_linear(x, inputs["weight"], inputs["U"], inputs["V"], core, inputs["bias"], mode=mode)
    expected = F.linear(x, inputs["weight"] + inputs["U"] @ core @ inputs["V"].mT, inputs["bias"])
    grads, references = (torch.autograd.grad(out.sum(), [x, core]) for out in (y, expected))
    assert_equal_up_to_rounding([y, *grads], [expected, *references])


@pytest.mark.parametrize("mode", ["composed", "factored"])
def test_strided_and_expanded_inputs(mode):
    inputs = linear_inputs((4, 6, 5, 3), torch.float64)
    frozen = {name: inputs[name].mT.contiguous().mT for name in ("weight", "U", "V")}
    for x in (torch.randn(6, 4, dtype=torch.float64).mT, torch.randn(1, 6, dtype=torch.float64).expand(4, 6)):
        x, core = x.detach().requires_grad_(), inputs["core"].mT.detach().requires_grad_()
        y = sk.ssvd_linear(x, core=core, bias=inputs["bias"], mode=mode, **frozen)
        expected = F.linear(x, inputs["weight"] + inputs["U"] @ core @ inputs["V"].mT, inputs["bias"])
        dy = torch.randn(5, 4, dtype=torch.float64).mT
        grads, references = (torch.autograd.grad(out, [x, core], dy) for out in (y, expected))
        assert_equal_up_to_rounding([y, *grads], [expected, *references])


def test_autocast_takes_its_dtype_and_gradients_keep_theirs():
    inputs = linear_inputs((8, 16, 12, 4), torch.float32)
    x, core = inputs["x"].requires_grad_(), inputs["core"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sk.ssvd_linear(x, inputs["weight"], inputs["U"], inputs["V"], core, inputs["bias"])
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == core.grad.dtype == torch.float32


def test_gradients_that_nobody_needs_are_not_computed(monkeypatch):
    seen = []
    original = reference.ssvd_linear_bwd

    def spy(dy, z, *rest):
        seen.append((z is not None, rest[-1]))
        return original(dy, z, *rest)

    monkeypatch.setattr(reference, "ssvd_linear_bwd", spy)
    inputs = linear_inputs((4, 6, 5, 3), torch.float32)
    frozen = (inputs["weight"], inputs["U"], inputs["V"])
    sk.ssvd_linear(inputs["x"], *frozen, inputs["core"].requires_grad_()).sum().backward()
    sk.ssvd_linear(inputs["x"].requires_grad_(), *frozen, inputs["core"].detach()).sum().backward()
    assert seen == [(True, False), (False, True)]


@pytest.mark.parametrize(("mode", "kept"), [("composed", [(8, 5), (96, 64)]), ("factored", [(8, 5)])])
def test_the_backward_keeps_x_v_and_a_composed_weight(mode, kept):
    inputs = linear_inputs((8, 64, 96, 5), torch.float32)
    frozen = [inputs[name] for name in ("weight", "U", "V")]
    known = {tensor.data_ptr() for tensor in (*frozen, inputs["core"])}
    saved = []
    x, core = inputs["x"].requires_grad_(), inputs["core"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sk.ssvd_linear(x, *frozen, core, inputs["bias"], mode=mode)
    extra = [tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in known]
    assert extra == kept


def test_auto_is_factored_in_half_precision_and_the_cheaper_mode_else():
    def choose(dtype, T, mode="auto", k=409):
        threshold = dispatch.composed_from(dtype, (1024, 1024), k, mode, True, "reference")
        return "composed" if T >= threshold else "factored"

    assert choose(torch.bfloat16, 4096) == "factored"
    assert choose(torch.bfloat16, 4096, "composed") == choose(torch.float32, 64, "composed") == "composed"
    assert choose(torch.float32, 4096, "factored") == "factored"
    for k in (16, 409, 1024):
        for T in range(1, 4096, 17):
            composed, factored = (flops.linear_flops(mode, T, 1024, 1024, k, True) for mode in ("composed", "factored"))
            assert choose(torch.float32, T, k=k) == ("composed" if composed <= factored else "factored")


def test_forced_backend_that_cannot_serve_raises():
    inputs = linear_inputs((4, 6, 5, 3), torch.float64)
    arguments = [inputs[name] for name in ("x", "weight", "U", "V", "core")]
    refusal = r"'triton' does not support linear on cpu in .*float64"
    with sk.use_backend("triton"), pytest.raises(RuntimeError, match=refusal):
        sk.ssvd_linear(*arguments)
    assert set(dispatch.refusals("linear", CPU, torch.float64)) == {"triton", "reference"}


def test_second_derivatives_are_those_of_torch_func_or_refused():
    inputs = linear_inputs((3, 6, 5, 3), torch.float64)
    frozen = (inputs["weight"], inputs["U"], inputs["V"])
    x, core = inputs["x"].requires_grad_(), inputs["core"]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return sk.ssvd_linear(x, *frozen, core).square().sum()

    W = frozen[0] + frozen[1] @ core @ frozen[2].mT
    hessian = torch.func.hessian(loss)(x.detach())
    expected = 2 * torch.einsum("ab,ij->aibj", torch.eye(3, dtype=torch.float64), W.mT @ W)
    assert_equal_up_to_rounding([hessian], [expected])
    with pytest.raises(RuntimeError, match=r"second derivatives .* use torch\.func"):
        torch.autograd.grad(loss(x), x, create_graph=True)
