"""The launchers as torch custom operators: torch.compile treats them as opaque, as it cannot trace their host code.

Names, arguments and formulas are those of the launchers, except that a result that is not needed is an empty tensor
instead of None inside the graph. `torch.library` reads the annotations at run time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import launchers


def _operator(name: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """`launcher` as an operator, of which fake(*arguments) gives empty results of the right shapes."""
    operator = torch.library.custom_op(f"ssvd_kernels::triton_{name}", launcher, mutates_args=())
    operator.register_fake(fake)
    return operator


def _lead(x: Tensor, last: int, needed: bool = True) -> Tensor:
    return x.new_empty((*x.shape[:-1], last) if needed else (0,))


def _square(like: Tensor, batch: int, k: int) -> Tensor:
    n = k + -k % 16
    return like.new_empty((batch, n, n))


def _float32(like: Tensor, rows: int, cols: int) -> Tensor:
    return like.new_empty((rows, cols), dtype=torch.float32)


def _or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if value is None else value


def _forward(
    x: Tensor, weight: Tensor, U: Tensor, V: Tensor, core: Tensor, bias: Tensor | None, need_z: bool
) -> tuple[Tensor, Tensor]:
    y, z = launchers.ssvd_linear_fwd(x, weight, U, V, core, bias, need_z)
    return y, _or_empty(z, x)


def _backward(
    dy: Tensor, z: Tensor | None, weight: Tensor, U: Tensor, V: Tensor, core: Tensor, need_dx: bool
) -> tuple[Tensor, Tensor]:
    dx, dcore = launchers.ssvd_linear_bwd(dy, z, weight, U, V, core, need_dx)
    return _or_empty(dx, dy), _or_empty(dcore, core)


def _activation_backward(
    dy: Tensor, z: Tensor | None, basis: Tensor, core: Tensor, need_dx: bool
) -> tuple[Tensor, Tensor]:
    dx, dcore = launchers.ssvd_activation_bwd(dy, z, basis, core, need_dx)
    return _or_empty(dx, dy), _or_empty(dcore, core)


def _gradients(dy: Tensor, z: Tensor | None, core: Tensor, width: int, need_dx: bool) -> tuple[Tensor, Tensor]:
    dcore = core.new_empty(0) if z is None else _float32(core, z.shape[1], z.shape[1])
    return _lead(dy, width, need_dx), dcore


cayley_delta = _operator("cayley_delta", launchers.cayley_delta, lambda theta, k: _square(theta, theta.shape[0], k))
cayley_delta_backward = _operator(
    "cayley_delta_backward",
    launchers.cayley_delta_backward,
    lambda grad, E, k: grad.new_empty((grad.shape[0], k * (k - 1) // 2)),
)
compose = _operator(
    "compose", launchers.compose, lambda weight, U, V, core: weight.new_empty(weight.shape, dtype=U.dtype)
)
add_update = _operator("add_update", launchers.add_update, lambda y, update: torch.empty_like(y))
core_grad = _operator("core_grad", launchers.core_grad, lambda a, b: _float32(a, a.shape[1], b.shape[1]))
_linear_fwd = _operator(
    "linear_fwd",
    _forward,
    lambda x, weight, U, V, core, bias, need_z: (_lead(x, weight.shape[0]), _lead(x, V.shape[1], need_z)),
)
_linear_bwd = _operator(
    "linear_bwd",
    _backward,
    lambda dy, z, weight, U, V, core, need_dx: _gradients(dy, z, core, weight.shape[1], need_dx),
)
ssvd_activation_fwd = _operator(
    "activation_fwd",
    launchers.ssvd_activation_fwd,
    lambda x, basis, core, shift: (_lead(x, x.shape[-1]), _lead(x, basis.shape[1] + -basis.shape[1] % 16)),
)
_activation_bwd = _operator(
    "activation_bwd",
    _activation_backward,
    lambda dy, z, basis, core, need_dx: _gradients(dy, z, core, dy.shape[1], need_dx),
)


def ssvd_linear_fwd(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """As `ssvd_linear.ssvd_linear_fwd`."""
    y, z = _linear_fwd(*arguments)
    return y, z if arguments[-1] else None


def ssvd_linear_bwd(*arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    """As `ssvd_linear.ssvd_linear_bwd`."""
    return _or_none(_linear_bwd, arguments)


def ssvd_activation_bwd(*arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    """As `ssvd_activation.ssvd_activation_bwd`."""
    return _or_none(_activation_bwd, arguments)


def _or_none(backward: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None]:
    dx, dcore = backward(*arguments)
    return dx if arguments[-1] else None, None if arguments[1] is None else dcore
