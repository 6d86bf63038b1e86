"""Chooses backend and mode for each op, and can say why a backend was refused.

A fallback changes speed, never mathematics. A backend forced by SSVD_BACKEND or `use_backend`, or a mode forced by
`mode=`, that cannot serve raises.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import _ext, reference
from . import triton as triton_backend
from .costs import linear_flops
from .workspace import Compose, Workspace

BACKENDS = ("auto", "reference", "ext", "triton")
MODES = ("auto", "composed", "factored")
_HALF = (torch.float16, torch.bfloat16)
_forced = os.environ.get("SSVD_BACKEND", "auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend within a `with` block: "reference", "ext" (the C++/CUDA op), "triton", or "auto".

    An op that the named backend does not have at all (Triton has no Cayley, the extension no linear) keeps its own
    choice; one that it has but cannot serve raises RuntimeError.
    """
    global _forced
    _check_choice("name", name, BACKENDS)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def refusals(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For `op` "cayley" or "linear": backend -> why it refuses these inputs (None = it serves), fastest first."""
    if op == "cayley":
        return {"ext": _ext.supports(device), "reference": None}
    return {"triton": triton_backend.unavailable_reason(device, dtype), "reference": None}


@torch.compiler.assume_constant_result  # not traced: it may load the extension
def backend_for(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that will serve `op` on these inputs. Raises RuntimeError if the forced one cannot."""
    if _forced != "auto":
        _check_choice("SSVD_BACKEND", _forced, BACKENDS)
        options = refusals(op, device, dtype)
        if options.get(_forced) is not None:
            raise RuntimeError(f"backend {_forced!r} cannot serve {op} on {device} in {dtype}: {options[_forced]}")
        if _forced in options:
            return _forced
    if op == "linear" and not (device.type == "cuda" and dtype in _HALF):
        return "reference"  # float32 products are the vendor library's; the interpreter is for tests
    return next(name for name, reason in refusals(op, device, dtype).items() if reason is None)


def linear_mode(
    dtype: torch.dtype, T: int, weight_shape: tuple[int, ...], k: int, mode: str, backward: bool, compositions: int
) -> str:
    """The mode of a call in `dtype` on T tokens: "composed" (W' is built, then one product) or "factored".

    Half precision is factored: composing onto a half-precision base by round-to-nearest loses small updates, and a
    float32 base often holds half-precision values. In float32 and float64 the cheaper one by FLOP count, where W' has
    to be built `compositions` times (0 where it is kept).
    """
    _check_choice("mode", mode, MODES)
    if mode != "auto":
        return mode
    if dtype in _HALF:
        return "factored"
    d_out, d_in = weight_shape
    composed, factored = (linear_flops(m, T, d_in, d_out, k, backward, compositions) for m in ("composed", "factored"))
    return "composed" if composed <= factored else "factored"


def cayley_delta(theta: Tensor, k: int) -> Tensor:
    """E (B, k, k) from theta (B, m)."""
    if backend_for("cayley", theta.device, theta.dtype) == "ext":
        return torch.ops.ssvd_kernels.cayley_delta(theta, k)
    with _full_precision():
        return reference.cayley_delta_ref(theta, k)


def cayley_delta_backward(grad: Tensor, E: Tensor) -> Tensor:
    """dtheta (B, m) from dE and E (B, k, k)."""
    if backend_for("cayley", E.device, E.dtype) == "ext":
        return torch.ops.ssvd_kernels.cayley_delta_backward(grad, E)
    with _full_precision():
        return reference.cayley_delta_backward_ref(grad, E)


def ssvd_linear(
    x: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    core: Tensor,
    bias: Tensor | None,
    mode: str,
    need_z: bool,
    workspace: Workspace | None,
) -> tuple[Tensor, Tensor | None]:
    """(y, z = x V if needed); arguments and formula as `reference.ssvd_linear_ref`."""
    if mode == "factored" and _linear_backend(x) == "triton":
        from .triton import ssvd_linear as kernels

        return kernels.ssvd_linear_fwd(x, weight, U, V, core, bias, need_z)
    composed = _composed(x, weight, U, V, core, workspace) if mode == "composed" else None
    return reference.ssvd_linear_ref(x, weight, U, V, core, bias, composed, need_z)


def ssvd_linear_backward(
    dy: Tensor,
    z: Tensor | None,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    core: Tensor,
    mode: str,
    need_dx: bool,
    workspace: Workspace | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dcore), None where not needed; arguments and formula as `reference.ssvd_linear_backward_ref`."""
    on_triton = _linear_backend(dy) == "triton"
    if mode == "factored" and on_triton:
        from .triton import ssvd_linear as kernels

        return kernels.ssvd_linear_bwd(dy, z, weight, U, V, core, need_dx)
    composed = _composed(dy, weight, U, V, core, workspace) if mode == "composed" and need_dx else None
    if on_triton:
        from .triton import core_grad

        dx = None if composed is None else dy @ composed
        if z is None:
            return dx, None
        projected = core_grad.core_grad(dy.reshape(-1, dy.shape[-1]), z.reshape(-1, z.shape[-1]))
        return dx, (U.to(projected.dtype).mT @ projected).to(core.dtype)
    return reference.ssvd_linear_backward_ref(dy, z, weight, U, V, core, composed, need_dx)


def _composed(x: Tensor, weight: Tensor, U: Tensor, V: Tensor, core: Tensor, workspace: Workspace | None) -> Tensor:
    make: Compose = reference.compose_ref
    if _linear_backend(x) == "triton":
        from .triton.compose import compose as make
    if workspace is None:
        return make(weight, U, V, core, x.dtype)
    return workspace.composed(weight, U, V, core, x.dtype, make)


def _linear_backend(x: Tensor) -> str:
    if _forced == "auto" and torch.compiler.is_compiling():
        return "reference"  # its products are fused by the compiler; the launchers' host code cannot be traced
    return backend_for("linear", x.device, x.dtype)


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32: tf32 or bf16, where the user allows them, would cost the rotation 3e-4."""
    allowed = torch.get_float32_matmul_precision()
    if allowed == "highest" or torch.compiler.is_compiling():
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def _check_choice(argument: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{argument}={value!r} is unknown: allowed are {', '.join(map(repr, allowed))}")
