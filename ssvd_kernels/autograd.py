"""One autograd Function per op: they know the algebra, never the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, reference


class CayleyDeltaFunction(torch.autograd.Function):
    """theta (B, m) -> E (B, k, k); the backward needs E alone (see `reference.cayley_delta_backward_ref`)."""

    @staticmethod
    def forward(theta: Tensor, k: int) -> Tensor:
        return dispatch.cayley_delta(theta, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (E,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the twin is made of differentiable operations
            return reference.cayley_delta_backward_ref(grad, E), None
        return dispatch.cayley_delta_backward(grad.contiguous(), E), None


class SSVDLinearFunction(torch.autograd.Function):
    """(x, weight, U, V, core, bias) -> y = x (W + U core V^T)^T + b.

    Saves z = x V (T, k) and the frozen tensors that the layer holds anyway; nothing weight-sized is added. Gradients
    reach x, core and bias; weight, U and V are frozen. Second derivatives are refused.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        U: Tensor,
        V: Tensor,
        core: Tensor,
        bias: Tensor | None,
        mode: str,
        need_z: bool,
    ) -> tuple[Tensor, Tensor | None]:
        return dispatch.ssvd_linear(x, weight, U, V, core, bias, mode, need_z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor | None]) -> None:
        _, weight, U, V, core, bias, ctx.mode, need_z = inputs
        z = output[1] if need_z else None
        if z is not None:
            ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(z, weight, U, V, core)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _dz: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        z, weight, U, V, core = ctx.saved_tensors
        dx, dcore = dispatch.ssvd_linear_backward(dy, z, weight, U, V, core, ctx.mode, ctx.needs_input_grad[0])
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[5] else None
        return dx, None, None, None, dcore, dbias, None, None
