"""Chooses the backend and mode of each op, and reports why a backend was refused.

A fallback changes speed, never mathematics. A backend forced by SSVD_BACKEND or `use_backend`, or a mode forced by
`mode=`, raises an error if it does not support the inputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import check_choice
from . import extension, reference
from . import kernels as triton_backend
from .flops import linear_flops
from .kernels.tile_sizes import CONCAT_MAX_D
from .weight_cache import Compose, WeightCache, padded

BACKENDS = ("auto", "reference", "ext", "triton")
MODES = ("auto", "composed", "factored")
_HALF = (torch.float16, torch.bfloat16)
NO_VMAP = (
    "torch.func.vmap cannot batch the Triton kernels: loop over the adapters with torch.func.functional_call, or "
    "call vmap inside ssvd_kernels.use_backend('reference')"
)
_forced = os.environ.get("SSVD_BACKEND", "auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend within a `with` block: "reference", "ext" (the C++/CUDA op), "triton", or "auto".

    An op that the named backend does not have at all (the extension has no linear) keeps its own choice; one that it
    has but cannot serve raises RuntimeError.
    """
    global _forced
    check_choice("name", name, BACKENDS)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


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
    if _forced != "auto":
        check_choice("SSVD_BACKEND", _forced, BACKENDS)
        options = refusals(op, device, dtype)
        if options.get(_forced) is not None:
            raise RuntimeError(f"backend {_forced!r} does not support {op} on {device} in {dtype}: {options[_forced]}")
        if _forced in options:
            return _forced
    serving = [name for name, reason in refusals(op, device, dtype).items() if reason is None]
    # the interpreter is for tests, and the linear's float32 products are the vendor library's
    passed_over = device.type != "cuda" or (op == "linear" and dtype not in _HALF)
    return next(name for name in serving if not (passed_over and name == "triton"))


def linear_mode(
    dtype: torch.dtype,
    T: int,
    weight_shape: tuple[int, ...],
    k: int,
    mode: str,
    backward: bool,
    compositions: int,
    fused: bool = False,
) -> str:
    """The mode of a call in `dtype` on T tokens: "composed" (W' is built, then one product) or "factored".

    The cheaper one by FLOP count, where W' has to be built `compositions` times; but half precision is factored, except
    bfloat16 where `fused` kernels compose it with stochastic rounding: by round-to-nearest small updates would be lost.
    """
    check_choice("mode", mode, MODES)
    if mode != "auto":
        return mode
    if dtype in _HALF and not (fused and dtype == torch.bfloat16):
        return "factored"
    d_out, d_in = weight_shape
    composed, factored = (linear_flops(m, T, d_in, d_out, k, backward, compositions) for m in ("composed", "factored"))
    return "composed" if composed <= factored else "factored"


def cayley_delta(theta: Tensor, k: int) -> Tensor:
    """E (B, n, n) from theta (B, m): n = k, or more with zeros beyond k where the kernels want it."""
    backend = _cayley_backend(theta)
    if backend == "triton":
        return _kernels().cayley_delta(theta, k)
    if backend == "ext":
        return torch.ops.ssvd_kernels.cayley_delta(theta, k)
    with _full_precision():
        return reference.cayley_delta_ref(theta, k)


def cayley_delta_backward(grad: Tensor, E: Tensor, k: int) -> Tensor:
    """dtheta (B, m) from dE and E (B, n, n), as `cayley_delta` gave it."""
    backend = _cayley_backend(grad, E)
    if backend == "triton":
        pad = -E.shape[-1] % 16  # not zero only where another backend computed E
        return _kernels().cayley_delta_backward(F.pad(grad, (0, pad, 0, pad)), F.pad(E, (0, pad, 0, pad)), k)
    grad, E = grad[:, :k, :k].contiguous(), E[:, :k, :k].contiguous()
    if backend == "ext":
        return torch.ops.ssvd_kernels.cayley_delta_backward(grad, E)
    with _full_precision():
        return reference.cayley_delta_backward_ref(grad, E)


def _cayley_backend(*tensors: Tensor) -> str:
    """As `backend_for`; torch.func.vmap, which cannot batch Triton's launches, gets the reference."""
    backend = backend_for("cayley", tensors[0].device, tensors[0].dtype)
    if backend == "triton" and not torch.compiler.is_compiling() and vmapped(*tensors):
        if _forced == "triton":
            raise RuntimeError(NO_VMAP)
        return "reference"
    return backend


def ssvd_linear(
    x: Tensor,
    weight: Tensor | None,
    U: Tensor,
    V: Tensor,
    core: Tensor,
    bias: Tensor | None,
    mode: str,
    need_z: bool,
    weight_cache: WeightCache | None,
) -> tuple[Tensor, Tensor | None]:
    """(y, z = x V if needed); arguments and formula as `reference.ssvd_linear_ref`.

    z may have columns of zeros beyond its k: see `WeightCache.operand`.
    """
    if weight is None:  # the base product is made elsewhere
        return reference.ssvd_linear_ref(x, None, U, V, core, None, None, need_z)
    if mode == "composed":
        composed = _composed(x, weight, U, V, core, weight_cache)
        if need_z and _concatenated(x, weight):
            return _kernels().concat(x, composed, padded(V.to(x.dtype)), bias)
        y, _ = reference.ssvd_linear_ref(x, weight, U, V, core, bias, composed, False)
        return y, project(x, V) if need_z else None
    if backend_for("linear", x.device, x.dtype) == "triton":
        return _kernels().ssvd_linear_fwd(x, weight, *_padded(x.dtype, U, V, core, weight_cache), bias, need_z)
    return reference.ssvd_linear_ref(x, weight, U, V, core, bias, None, need_z)


def ssvd_linear_backward(
    dy: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    U: Tensor,
    V: Tensor,
    core: Tensor,
    mode: str,
    need_dx: bool,
    weight_cache: WeightCache | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dcore), None where not needed; arguments and formula as `reference.ssvd_linear_backward_ref`."""
    k = core.shape[0]
    if weight is None:
        z = None if z is None else z[..., :k]
        return reference.ssvd_linear_backward_ref(dy, z, None, U, V, core, None, need_dx)
    composed = _composed(dy, weight, U, V, core, weight_cache) if mode == "composed" and need_dx else None
    if backend_for("linear", dy.device, dy.dtype) != "triton":
        z = None if z is None else z[..., :k]
        return reference.ssvd_linear_backward_ref(dy, z, weight, U, V, core, composed, need_dx)
    if mode == "composed" and composed is not None and z is not None and _concatenated(dy, weight):
        dx, dyU = _kernels().concat(dy, composed.mT, padded(U.to(dy.dtype)), None)
        dcore = _kernels().core_grad(dyU.reshape(-1, dyU.shape[-1]), z.reshape(-1, z.shape[-1]))
    elif mode == "composed":
        dx = None if composed is None else dy @ composed
        dcore = None if z is None else _kernels().core_gradient(dy, z, padded(U.to(dy.dtype)))
    else:
        operands = _padded(dy.dtype, U, V, core, weight_cache)
        dx, dcore = _kernels().ssvd_linear_bwd(dy, z, weight, *operands, need_dx)
    return dx, None if dcore is None else dcore[:k, :k].to(core.dtype)


def vmapped(*tensors: Tensor) -> bool:
    """Whether torch.func.vmap batches one of the tensors, at whatever level of nested transforms."""
    functorch = torch._C._functorch
    for tensor in tensors:
        while functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_batchedtensor(tensor):
                return True
            tensor = functorch.get_unwrapped(tensor)
    return False


def _concatenated(x: Tensor, weight: Tensor) -> bool:
    """Whether one kernel makes both products of x: the weight's and the basis'."""
    half = x.dtype in _HALF and backend_for("linear", x.device, x.dtype) == "triton"
    return half and max(weight.shape) <= CONCAT_MAX_D


def project(x: Tensor, V: Tensor) -> Tensor:
    """z = x V, with columns of zeros where the kernels that read it want them."""
    V = V.to(x.dtype)
    return x @ (padded(V) if backend_for("linear", x.device, x.dtype) == "triton" else V)


def _kernels() -> Any:
    """The Triton launchers; while torch.compile traces, as operators."""
    if torch.compiler.is_compiling():
        from .kernels import custom_ops

        return custom_ops
    from .kernels import launchers

    return launchers


def _padded(
    dtype: torch.dtype, U: Tensor, V: Tensor, core: Tensor, weight_cache: WeightCache | None
) -> tuple[Tensor, Tensor, Tensor]:
    """U and V in `dtype`, and core, all `padded` for the Triton kernels; U and V are kept in the weight_cache."""
    if weight_cache is None:
        return padded(U.to(dtype)), padded(V.to(dtype)), padded(core, both=True)
    return weight_cache.operand("U", U, dtype), weight_cache.operand("V", V, dtype), padded(core, both=True)


def _composed(
    x: Tensor, weight: Tensor, U: Tensor, V: Tensor, core: Tensor, weight_cache: WeightCache | None
) -> Tensor:
    def by_kernel(weight: Tensor, U: Tensor, V: Tensor, core: Tensor, dtype: torch.dtype) -> Tensor:
        return _kernels().compose(weight, *_padded(dtype, U, V, core, None), dtype)  # W' is kept, not its factors

    on_triton = backend_for("linear", x.device, x.dtype) == "triton"
    make: Compose = by_kernel if on_triton else reference.compose_operand_ref
    if weight_cache is None:
        return make(weight, U, V, core, x.dtype)
    return weight_cache.composed(weight, U, V, core, x.dtype, make, "operand")


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32: tf32 or bf16, where the user allows them, would cost the rotation 3e-4."""
    if torch.compiler.is_compiling() or torch.get_float32_matmul_precision() == "highest":
        yield
        return
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
