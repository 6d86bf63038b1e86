"""The launchers as torch custom operators: torch.compile treats them as opaque, as it cannot trace their host code.

Names, arguments and formulas are those of the launchers, except that a result that is not needed is an empty tensor
instead of None inside the graph. `torch.library` reads the annotations at run time.
"""

import torch
from torch import Tensor

from . import cayley as _cayley
from . import compose as _compose
from . import linear_and_projection as _concat
from . import split_k as _core_grad
from . import ssvd_linear as _linear


def _or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if value is None else value


def _lead(x: Tensor, last: int, needed: bool = True) -> Tensor:
    return x.new_empty((*x.shape[:-1], last) if needed else (0,))


@torch.library.custom_op("ssvd_kernels::triton_cayley_delta", mutates_args=())
def cayley_delta(theta: Tensor, k: int) -> Tensor:
    """As `cayley.cayley_delta`."""
    return _cayley.cayley_delta(theta, k)


@cayley_delta.register_fake
def _(theta, k):
    n = k + -k % 16
    return theta.new_empty((theta.shape[0], n, n))


@torch.library.custom_op("ssvd_kernels::triton_cayley_delta_backward", mutates_args=())
def cayley_delta_backward(grad: Tensor, E: Tensor, k: int) -> Tensor:
    """As `cayley.cayley_delta_backward`."""
    return _cayley.cayley_delta_backward(grad, E, k)


@cayley_delta_backward.register_fake
def _(grad, E, k):
    return grad.new_empty((grad.shape[0], k * (k - 1) // 2))


@torch.library.custom_op("ssvd_kernels::triton_linear_fwd", mutates_args=())
def _fwd(
    x: Tensor, weight: Tensor, U: Tensor, V: Tensor, core: Tensor, bias: Tensor | None, need_z: bool
) -> tuple[Tensor, Tensor]:
    y, z = _linear.ssvd_linear_fwd(x, weight, U, V, core, bias, need_z)
    return y, _or_empty(z, x)


@_fwd.register_fake
def _(x, weight, U, V, core, bias, need_z):
    return _lead(x, weight.shape[0]), _lead(x, V.shape[1], need_z)


@torch.library.custom_op("ssvd_kernels::triton_linear_bwd", mutates_args=())
def _bwd(
    dy: Tensor, z: Tensor | None, weight: Tensor, U: Tensor, V: Tensor, core: Tensor, need_dx: bool
) -> tuple[Tensor, Tensor]:
    dx, dcore = _linear.ssvd_linear_bwd(dy, z, weight, U, V, core, need_dx)
    return _or_empty(dx, dy), _or_empty(dcore, core)


@_bwd.register_fake
def _(dy, z, weight, U, V, core, need_dx):
    dcore = core.new_empty((0,) if z is None else (U.shape[1],) * 2, dtype=torch.float32)
    return _lead(dy, weight.shape[1], need_dx), dcore


@torch.library.custom_op("ssvd_kernels::triton_compose", mutates_args=())
def compose(weight: Tensor, U: Tensor, V: Tensor, core: Tensor, dtype: torch.dtype) -> Tensor:
    """As `compose.compose`."""
    return _compose.compose(weight, U, V, core, dtype)


@compose.register_fake
def _(weight, U, V, core, dtype):
    return weight.new_empty(weight.shape, dtype=dtype)


@torch.library.custom_op("ssvd_kernels::triton_core_gradient", mutates_args=())
def core_gradient(dy: Tensor, z: Tensor, U: Tensor) -> Tensor:
    """As `ssvd_linear.core_gradient`."""
    return _linear.core_gradient(dy, z, U)


@core_gradient.register_fake
def _(dy, z, U):
    return dy.new_empty((U.shape[1], z.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("ssvd_kernels::triton_concat", mutates_args=())
def concat(x: Tensor, composed: Tensor, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `concat.concat`."""
    return _concat.concat(x, composed, V, bias)


@concat.register_fake
def _(x, composed, V, bias):
    return _lead(x, composed.shape[0]), _lead(x, V.shape[1])


@torch.library.custom_op("ssvd_kernels::triton_core_grad", mutates_args=())
def core_grad(a: Tensor, b: Tensor) -> Tensor:
    """As `core_grad.core_grad`."""
    return _core_grad.core_grad(a, b)


@core_grad.register_fake
def _(a, b):
    return a.new_empty((a.shape[1], b.shape[1]), dtype=torch.float32)


def ssvd_linear_fwd(
    x: Tensor, weight: Tensor, U: Tensor, V: Tensor, core: Tensor, bias: Tensor | None, need_z: bool
) -> tuple[Tensor, Tensor | None]:
    """As `ssvd_linear.ssvd_linear_fwd`."""
    y, z = _fwd(x, weight, U, V, core, bias, need_z)
    return y, z if need_z else None


def ssvd_linear_bwd(
    dy: Tensor, z: Tensor | None, weight: Tensor, U: Tensor, V: Tensor, core: Tensor, need_dx: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As `ssvd_linear.ssvd_linear_bwd`."""
    dx, dcore = _bwd(dy, z, weight, U, V, core, need_dx)
    return dx if need_dx else None, None if z is None else dcore
