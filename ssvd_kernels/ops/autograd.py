"""One autograd Function per op. These define the gradients and are independent of the backend.

They fill their contexts in `forward`, not in setup_context, for which torch binds the arguments by inspect.signature
at every call. So functorch's transforms, which require setup_context, use the reference in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference, triton_linear
from .places import Places

OPS: dict[str, Any] = {"reference": reference, "triton": triton_linear}
SECOND_DERIVATIVES = (
    "second derivatives of an adapted layer are not available here (create_graph=True): use torch.func, whose "
    "transforms compute them by plain PyTorch"
)


class CayleyDeltaFunction(torch.autograd.Function):
    """theta (B, m) -> E (B, n, n), zero beyond k <= n; the backward needs E alone (see `reference`)."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, k: int) -> Tensor:
        E = dispatch.cayley_delta(theta, k)
        ctx.k = k
        ctx.save_for_backward(E)
        return E

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (E,), k = ctx.saved_tensors, ctx.k
        if torch.is_grad_enabled():  # create_graph: the reference is made of differentiable operations
            return reference.cayley_delta_backward_ref(grad[:, :k, :k], E[:, :k, :k]), None
        return dispatch.cayley_delta_backward(grad.contiguous(), E, k), None


class SSVDLinearFunction(torch.autograd.Function):
    """(x, weight, U, V, core, bias) -> y = x (weight + U core V^T)^T + b in a dtype; without `weight` the update alone.

    Gradients reach x, core and bias; weight, U and V are frozen. Of x it saves z = x V (T, k) alone, and in composed
    mode W', which is freed with the graph. `narrow` is the core as the products read it, where that is made already.
    Autograd casts the gradients to the dtypes of their inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        U: Tensor,
        V: Tensor,
        core: Tensor,
        bias: Tensor | None,
        choices: tuple[str, torch.dtype, str, bool],  # one argument, as autograd looks at each
        narrow: Tensor | None = None,
    ) -> Tensor:
        mode, dtype, backend, need_z = choices
        ctx.k, ctx.backend = core.shape[0], backend
        core = core if narrow is None else narrow
        x = x if x.dtype == dtype else x.to(dtype)
        if mode == "composed" and dtype != torch.float32:
            with reference.without_autocast(x):
                y, z, composed = OPS[backend].ssvd_linear_fwd(x, weight, U, V, core, bias, mode, need_z)
        else:
            y, z, composed = OPS[backend].ssvd_linear_fwd(x, weight, U, V, core, bias, mode, need_z)
        if z is not None and z.ndim != 2:
            z = z.reshape(-1, z.shape[-1])
        ctx.save_for_backward(z, weight, U, V, core, composed)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_DERIVATIVES)
        z, weight, U, V, core, composed = ctx.saved_tensors
        needed = ctx.needs_input_grad
        rows = dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])
        arguments = rows, z, weight, U, V, core, composed, needed[0]
        if torch._C._is_any_autocast_enabled():
            with reference.without_autocast(dy):
                dx, dcore = OPS[ctx.backend].ssvd_linear_bwd(*arguments)
        else:
            dx, dcore = OPS[ctx.backend].ssvd_linear_bwd(*arguments)
        if dx is not None and dy.ndim != 2:
            dx = dx.view(*dy.shape[:-1], dx.shape[1])
        if dcore is not None and ctx.backend == "triton":  # padded
            dcore = dcore[: ctx.k, : ctx.k]
        dbias = rows.sum(0) if needed[5] else None
        return dx, None, None, None, dcore, dbias, None, None


class SSVDActivationFunction(torch.autograd.Function):
    """(x, basis, core, shift) -> x + (((x - shift) basis) core^T) basis^T in `dtype`; of x it saves z (T, k) alone.

    Gradients reach x and core; basis and shift are frozen. `narrow` is as in `SSVDLinearFunction`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        basis: Tensor,
        core: Tensor,
        shift: Tensor | None,
        dtype: torch.dtype,
        backend: str,
        narrow: Tensor | None = None,
    ) -> Tensor:
        ctx.k, ctx.core_dtype, ctx.dtype, ctx.backend = core.shape[0], core.dtype, x.dtype, backend
        need_z = ctx.needs_input_grad[2]
        core = core if narrow is None else narrow
        out, z = OPS[backend].ssvd_activation_fwd(x.to(dtype), basis, core, shift)
        ctx.save_for_backward(z.reshape(-1, z.shape[-1]) if need_z else None, basis, core)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_DERIVATIVES)
        z, basis, core = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        with reference.without_autocast(dy):
            dx, dcore = OPS[ctx.backend].ssvd_activation_bwd(rows, z, basis, core, ctx.needs_input_grad[0])
        if dx is not None:
            dx = dx.view_as(dy).to(ctx.dtype)
        if dcore is not None:
            dcore = dcore[: ctx.k, : ctx.k].to(ctx.core_dtype)
        return dx, None, dcore, None, None, None, None


class AddUpdateFunction(torch.autograd.Function):
    """`reference.add_update`, through which both gradients pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, update: Tensor, backend: str) -> Tensor:
        ctx.dtype = update.dtype
        return OPS[backend].add_update(y, update)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return dy, dy.to(ctx.dtype), None


class RowsProductFunction(torch.autograd.Function):
    """q (R, T, k): each row of z (R, T, k) times the transpose of its own of cores (N, k, k)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, cores: Tensor, places: Places, backend: str) -> Tensor:
        ctx.places, ctx.backend = places, backend
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, cores)
        return OPS[backend].rows_product_fwd(z, cores, places)

    @staticmethod
    def backward(ctx: Any, dq: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_DERIVATIVES)
        z, cores = ctx.saved_tensors
        with reference.without_autocast(dq):
            found = OPS[ctx.backend].rows_product_bwd(dq, z, cores, ctx.places, ctx.needs_input_grad[0])
        return *found, None, None


class ProductFunction(torch.autograd.Function):
    """a @ b of matrices or equal batches of them; the gradients are in their dtype, also under autocast."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        with reference.without_autocast(grad):
            return (
                ProductFunction.apply(grad, b.mT) if ctx.needs_input_grad[0] else None,
                ProductFunction.apply(a.mT, grad) if ctx.needs_input_grad[1] else None,
            )


class ComposeFunction(torch.autograd.Function):
    """W' = weight + U core V^T of a frozen weight, as `reference.compose_ref`; gradients as in `ProductFunction`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, U: Tensor, V: Tensor, core: Tensor) -> Tensor:
        ctx.save_for_backward(U, V, core)
        return reference.compose_ref(weight, U, V, core)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        U, V, core = ctx.saved_tensors
        _, for_U, for_V, for_core = ctx.needs_input_grad
        with reference.without_autocast(grad):
            grad = grad.to(core.dtype)
            dU = grad @ (V.to(core.dtype) @ core.mT) if for_U else None
            dV = grad.mT @ (U.to(core.dtype) @ core) if for_V else None
            dcore = U.to(core.dtype).mT @ (grad @ V.to(core.dtype)) if for_core else None
        return None, dU, dV, dcore


# `apply` without what it does for functorch, which takes 25 Python calls
apply_cayley = super(torch.autograd.Function, CayleyDeltaFunction).apply
apply_linear = super(torch.autograd.Function, SSVDLinearFunction).apply
apply_activation = super(torch.autograd.Function, SSVDActivationFunction).apply
