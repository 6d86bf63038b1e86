"""Chooses the backend and mode of each op, and reports why a backend was refused.

A fallback changes speed, never mathematics. A backend forced by SSVD_BACKEND or `use_backend`, or a mode forced by
`mode=`, raises an error if it does not support the inputs.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import check_choice
from . import extension, reference, triton_linear
from . import kernels as triton_backend
from .flops import linear_flops

BACKENDS = ("auto", "reference", "ext", "triton")
MODES = ("auto", "composed", "factored")
_HALF = (torch.float16, torch.bfloat16)
forced = os.environ.get("SSVD_BACKEND", "auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend within a `with` block: "reference", "ext" (the C++/CUDA op), "triton", or "auto".

    An op that the named backend does not have at all (the extension has no linear) is dispatched as by "auto"; one that
    it has but cannot serve raises RuntimeError.
    """
    global forced
    check_choice("name", name, BACKENDS)
    before, forced = forced, name
    try:
        yield
    finally:
        forced = before


def refusals(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For `op` "cayley" or "linear": backend -> why it refuses these inputs (None = it serves), fastest first."""
    if op == "cayley":
        wide = f"dtype {dtype} is not supported, only float32" if dtype != torch.float32 else None
        triton = wide or triton_backend.unavailable_reason(device, dtype)
        return {"triton": triton, "ext": extension.supports(device), "reference": None}
    return {"triton": triton_backend.unavailable_reason(device, dtype), "reference": None}


@torch.compiler.assume_constant_result  # not traced: it may load the extension
def backend_for(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that will serve `op` on these inputs. Raises RuntimeError if the forced one cannot."""
    if forced != "auto":
        check_choice("SSVD_BACKEND", forced, BACKENDS)
        options = refusals(op, device, dtype)
        if options.get(forced) is not None:
            raise RuntimeError(f"backend {forced!r} does not support {op} on {device} in {dtype}: {options[forced]}")
        if forced in options:
            return forced
    serving = [name for name, reason in refusals(op, device, dtype).items() if reason is None]
    # the interpreter is for tests, and float32 linears are left to the vendor library
    passed_over = device.type != "cuda" or (op == "linear" and dtype not in _HALF)
    return next(name for name in serving if not (passed_over and name == "triton"))


def composed_from(
    dtype: torch.dtype, weight_shape: tuple[int, ...], k: int, mode: str, backward: bool, backend: str
) -> float:
    """Tokens from which a call in `dtype` is composed (W' is built, then one product) rather than factored.

    The cheaper mode by FLOP count; but half precision is factored, except bfloat16 where the Triton kernels compose it
    with stochastic rounding: by round-to-nearest small updates would be lost.
    """
    check_choice("mode", mode, MODES)
    if mode != "auto":
        return 0.0 if mode == "composed" else math.inf
    if dtype in _HALF and not (backend == "triton" and dtype == torch.bfloat16):
        return math.inf
    d_out, d_in = weight_shape
    ends = 0, 64 * (d_in + d_out)  # costs grow linearly with T, except where the order of dcore's products changes

    def cheaper(T: int) -> bool:
        composed, factored = (linear_flops(m, T, d_in, d_out, k, backward) for m in ("composed", "factored"))
        return composed <= factored

    if not cheaper(ends[1]):
        return math.inf
    while ends[1] - ends[0] > 1:
        middle = sum(ends) // 2
        ends = (ends[0], middle) if cheaper(middle) else (middle, ends[1])
    return float(ends[1])


@functools.cache
def linear_call(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], k: int, mode: str, backward: bool, forced: str
) -> tuple[str, float]:
    """Backend of a call of the linear op, and the elements of x from which it is composed; see `composed_from`.

    forced: the present one, by which results are cached, too.
    """
    backend = backend_for("linear", device, dtype)
    return backend, composed_from(dtype, shape, k, mode, backward, backend) * shape[1]


@functools.cache
def linear_backend(device: torch.device, dtype: torch.dtype, forced: str) -> str:
    """Backend of a call of the activation op, which is that of linears in factored mode; `forced` as above."""
    return backend_for("linear", device, dtype)


def cayley_delta(theta: Tensor, k: int) -> Tensor:
    """E (B, n, n) from theta (B, m): n = k, or more with zeros beyond k where the kernels want it."""
    backend = backend_for("cayley", theta.device, theta.dtype)
    if backend == "triton":
        return triton_linear.kernels().cayley_delta(theta, k)
    if backend == "ext":
        return torch.ops.ssvd_kernels.cayley_delta(theta, k)
    with _full_precision():
        return reference.cayley_delta_ref(theta, k)


def cayley_delta_backward(grad: Tensor, E: Tensor, k: int) -> Tensor:
    """dtheta (B, m) from dE and E (B, n, n), as `cayley_delta` gave it."""
    backend = backend_for("cayley", grad.device, grad.dtype)
    if backend == "triton":
        pad = -E.shape[-1] % 16  # nonzero only where another backend computed E
        grad, E = (F.pad(matrix, (0, pad, 0, pad)) if pad else matrix for matrix in (grad, E))
        return triton_linear.kernels().cayley_delta_backward(grad, E, k)
    grad, E = grad[:, :k, :k].contiguous(), E[:, :k, :k].contiguous()
    if backend == "ext":
        return torch.ops.ssvd_kernels.cayley_delta_backward(grad, E)
    with _full_precision():
        return reference.cayley_delta_backward_ref(grad, E)


def transforming() -> bool:
    """Whether torch.func transforms a call, which only the reference can serve: RuntimeError if another is forced."""
    if not torch._C._are_functorch_transforms_active():
        return False
    if forced not in ("auto", "reference"):
        raise RuntimeError(
            f"backend {forced!r} does not support torch.func's transforms (vmap, grad, jvp): call them inside "
            "ssvd_kernels.use_backend('reference')"
        )
    return True


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32: tf32 or bf16, where the user allows them, would cost the rotation 3e-4 in error."""
    if torch.compiler.is_compiling() or torch.get_float32_matmul_precision() == "highest":
        yield
        return
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
