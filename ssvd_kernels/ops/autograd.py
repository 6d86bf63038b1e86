"""One autograd Function per op. These define the gradients and are independent of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference
from .weight_cache import WeightCache


class CayleyDeltaFunction(torch.autograd.Function):
    """theta (B, m) -> E (B, n, n), zero beyond k <= n; the backward needs E alone (see `reference`)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, k: int) -> Tensor:
        return dispatch.cayley_delta(theta, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.k = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (E,), k = ctx.saved_tensors, ctx.k
        if torch.is_grad_enabled():  # create_graph: the reference is made of differentiable operations
            return reference.cayley_delta_backward_ref(grad[:, :k, :k], E[:, :k, :k]), None
        return dispatch.cayley_delta_backward(grad.contiguous(), E, k), None


class SSVDLinearFunction(torch.autograd.Function):
    """(x, weight, U, V, core, bias) -> y = x (W + U core V^T)^T + b, computed in `dtype`; without `weight`, of W = 0.

    Besides the frozen tensors that the layer holds anyway it saves what dcore needs of x: `saves` is "z" for
    z = x V (T, k), "x" for x itself, of which z is computed again, or "" for nothing. Nothing weight-sized is added.
    Gradients reach x, core and bias; weight, U and V are frozen. z is an output of its own, so that second derivatives
    reach x through it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        U: Tensor,
        V: Tensor,
        core: Tensor,
        bias: Tensor | None,
        mode: str,
        dtype: torch.dtype,
        saves: str,
        weight_cache: WeightCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        return dispatch.ssvd_linear(x.to(dtype), weight, U, V, core, bias, mode, saves == "z", weight_cache)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor | None]) -> None:
        x, weight, U, V, core, bias, ctx.mode, ctx.dtype, ctx.saves, ctx.weight_cache = inputs
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.inputs = None if ctx.weight_cache is None else ctx.weight_cache.inputs
        ctx.save_for_backward({"z": output[1], "x": x, "": None}[ctx.saves], weight, U, V, core)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        z, weight, U, V, core = ctx.saved_tensors
        ctx.inputs = None  # what was saved has been read, or recomputed
        twice = torch.is_grad_enabled()  # create_graph: the references are made of differentiable operations
        if ctx.saves == "x" and dy is not None:
            x = z.to(ctx.dtype)
            z = x @ V.to(ctx.dtype) if twice else dispatch.project(x, V)
        need_dx, need_dbias = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        dx = dcore = dbias = None
        if dy is not None:
            if twice:
                z = None if z is None else z[..., : len(core)]
                dx, dcore = reference.ssvd_linear_backward_ref(dy, z, weight, U, V, core, None, need_dx)
            else:
                rest = (ctx.mode, need_dx, ctx.weight_cache)
                dx, dcore = dispatch.ssvd_linear_backward(dy, z, weight, U, V, core, *rest)
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if need_dbias else None
        if dz is not None and need_dx:
            through_z = dz[..., : len(core)] @ V.to(dz.dtype).mT
            dx = through_z if dx is None else dx + through_z
        return dx, None, None, None, dcore, dbias, None, None, None, None
