"""One autograd Function per op: they know the algebra, never the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    reach x, core and bias; weight, U and V are frozen. z is an output of its own, so that second derivatives reach x
    through it.
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
        _, weight, U, V, core, bias, ctx.mode, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(output[1], weight, U, V, core)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        z, weight, U, V, core = ctx.saved_tensors
        # create_graph: the twin is made of differentiable operations
        step = reference.ssvd_linear_backward_ref if torch.is_grad_enabled() else dispatch.ssvd_linear_backward
        need_dx, need_dbias = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        dx = dcore = dbias = None
        if dy is not None:
            dx, dcore = step(dy, z, weight, U, V, core, ctx.mode, need_dx)
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if need_dbias else None
        if dz is not None and need_dx:
            through_z = dz @ V.to(dz.dtype).mT
            dx = through_z if dx is None else dx + through_z
        return dx, None, None, None, dcore, dbias, None, None
