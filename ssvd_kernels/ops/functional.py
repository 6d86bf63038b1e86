"""Public functions: argument checks, flattening, dtype policy. The convention of theta, K and G is in reference.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import check_choice
from . import dispatch, reference
from .autograd import (
    AddUpdateFunction,
    CayleyDeltaFunction,
    ComposeFunction,
    ProductFunction,
    RowsProductFunction,
    SSVDActivationFunction,
    SSVDLinearFunction,
    apply_activation,
    apply_cayley,
    apply_linear,
)
from .places import Places


def cayley_delta(theta: Tensor, k: int) -> Tensor:
    """E = G - I = -2 K (I + K)^-1 without the cancellation of forming G first.

    theta (..., m) with m = k(k-1)/2, any leading shape, batch 0 and k = 1 included -> E (..., k, k).
    Arithmetic and result are float64 for float64 theta, otherwise float32 (half-precision theta is upcast, also
    under autocast). Differentiable twice. In float32 the relative error is about 1e-7 for ||K|| <= 1, and up to
    ||K|| = 1000 no entry of E is off by more than 1e-6 for random K (2e-5 for the worst K found).
    Raises TypeError for a non-floating theta, ValueError if theta's last dimension is not k(k-1)/2.
    Source: Cayley transform as in SSVD, arXiv 2509.02830; backward dK = Z - Z^T, Z = -2 B^T dE B^T, B = I + E/2.
    """
    check_theta("theta", theta, k, "cayley")
    dtype = torch.promote_types(theta.dtype, torch.float32)
    flat = theta.to(dtype).reshape(math.prod(theta.shape[:-1]), theta.shape[-1])
    with reference.without_autocast(theta):
        if dispatch.transforming():
            E = reference.cayley_delta_ref(flat, k)
        else:
            apply = CayleyDeltaFunction.apply if torch.compiler.is_compiling() else apply_cayley
            E = apply(flat.contiguous(), k)
    return E[:, :k, :k].view(*theta.shape[:-1], k, k)


def cayley(theta: Tensor, k: int) -> Tensor:
    """G = (I - K)(I + K)^-1 = I + E, orthogonal; theta (..., m) -> G (..., k, k). See `cayley_delta` for the rest."""
    E = cayley_delta(theta, k)
    return E + torch.eye(k, dtype=E.dtype, device=E.device)


def rotation_delta(theta: Tensor, k: int, rotation: str, band: int | None = None) -> Tensor:
    """E = G - I (..., k, k) of a rotation "cayley", "linear" (E = -2 K) or "free" (E = theta reshaped); of "banded" the
    off-diagonals of M (see `reference.banded`)."""
    if rotation == "cayley":
        return cayley_delta(theta, k)
    check_theta("theta", theta, k, rotation, band)
    theta = theta.to(torch.promote_types(theta.dtype, torch.float32))
    if rotation == "free":
        return theta.view(*theta.shape[:-1], k, k)
    if band is not None:
        return reference.banded(theta, k, band)
    return -2 * reference.skew(theta, k)


class Kind(NamedTuple):
    """What turns an adapter's Parameters into its core."""

    k: int
    k_in: int
    k_out: int | None  # of theta_out
    side: str
    rotation: str
    band: int | None
    strength: float = 1.0  # by which theta, theta_out and delta are multiplied
    form: str = "weight"


def core_of(kind: Kind, theta: Tensor, theta_out: Tensor | None, delta: Tensor, sigma: Tensor) -> Tensor:
    """core M (..., k, k) of theta (..., m), theta_out, delta and sigma (..., k), in float32 at least; C of the
    activation form (see `reference.activation_core_ref`)."""
    if kind.strength != 1:
        theta, delta = kind.strength * theta, kind.strength * delta
        theta_out = None if theta_out is None else kind.strength * theta_out
    E, E_out = rotation_delta(theta, kind.k_in, kind.rotation, kind.band), None
    if theta_out is not None:
        assert kind.k_out is not None
        E, E_out = (_pad(each, kind.k) for each in (E, rotation_delta(theta_out, kind.k_out, kind.rotation)))
    activation = kind.form == "activation"
    with reference.without_autocast(E):
        sigma, delta = sigma.to(E.dtype), delta.to(E.dtype)
        if kind.rotation == "banded":
            core = reference.banded_core_ref(E, delta)
            return core / sigma.unsqueeze(-1) if activation else core
        if activation:
            return reference.activation_core_ref(E, sigma, delta, kind.side, E_out)
        return reference.core_ref(E, sigma, delta, kind.side, E_out, product)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b whose gradients autocast does not round."""
    return a @ b if dispatch.transforming() else ProductFunction.apply(a, b)


def add_update(y: Tensor, update: Tensor) -> Tensor:
    """`reference.add_update`, differentiable."""
    if dispatch.transforming():
        return y + update.to(y.dtype)
    choose = dispatch.linear_backend.__wrapped__ if torch.compiler.is_compiling() else dispatch.linear_backend
    return AddUpdateFunction.apply(y, update, choose(y.device, y.dtype, dispatch.forced))


def compose(weight: Tensor, U: Tensor, V: Tensor, core: Tensor) -> Tensor:
    """W' = weight + U core V^T (d_out, d_in), computed in float32 at least and rounded once to the weight's dtype."""
    with reference.without_autocast(weight):
        make = reference.compose_ref if dispatch.transforming() else ComposeFunction.apply
        return make(weight, U, V, core)


def _pad(E: Tensor, k: int) -> Tensor:
    extra = k - E.shape[-1]
    return F.pad(E, (0, extra, 0, extra)) if extra else E


def flip_theta(theta: Tensor, signs: Tensor, rotation: str, band: int | None = None) -> Tensor:
    """theta (m,) that means in the basis (s_i u_i, s_i v_i) what the given one means in (u_i, v_i): K' = S K S, and
    M' = S M S for rotation="banded".

    signs (k,) of +-1, of the pairs that theta rotates; exact, as only signs change.
    """
    products = torch.outer(signs, signs).to(theta.device, theta.dtype)
    if rotation == "free":
        return theta * products.flatten()
    if band is not None:
        i, j = reference.band_indices(len(signs), band, theta.device)
        return theta * products[i, j].repeat(2)
    rows, columns = torch.triu_indices(len(signs), len(signs), 1, device=theta.device)
    return theta * products[rows, columns]


def ssvd_linear(
    x: Tensor, weight: Tensor, U: Tensor, V: Tensor, core: Tensor, bias: Tensor | None = None, mode: str = "auto"
) -> Tensor:
    """y = x W'^T + b with W' = weight + U core V^T, i.e. y = x weight^T + ((x V) core^T) U^T + b.

    x (..., d_in), weight (d_out, d_in), U (d_out, k), V (d_in, k), core (k, k), bias (d_out,) -> y (..., d_out).
    Arithmetic is in x's dtype (autocast's, where that is on) with products accumulated in float32 at least.
    mode: "composed" builds W' once and multiplies once, "factored" never builds it, "auto" takes the cheaper one, in
    half precision among those that lose no update to rounding (see `dispatch.linear_mode`).
    Gradients reach x, core and bias; weight, U and V are frozen and must not require them. torch.func's transforms
    (vmap, jvp, grad of grad) compute by plain PyTorch.
    Raises ValueError naming the argument for shapes, dtypes or devices that do not fit or an unknown mode.
    Source: SSVD, arXiv 2509.02830, eq. 8-13, written as an update of the frozen weight.
    """
    _check_linear(x, weight, U, V, core, bias)
    check_choice("mode", mode, dispatch.MODES)
    return linear(x, weight, U, V, core, bias, mode)


class Operands(Protocol):
    casts: bool  # whether `weight` may have another dtype than x

    def operands(self, core: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]: ...


def linear(
    x: Tensor,
    weight: Tensor | None,
    U: Tensor,
    V: Tensor,
    core: Tensor,
    bias: Tensor | None,
    mode: str,
    operands: Operands | None = None,
) -> Tensor:
    """`ssvd_linear` of operands that fit; without `weight` the update ((x V) core^T) U^T alone.

    operands: has U, V and maybe the core as the Triton kernels read them.
    """
    compiling, grad, narrow = torch.compiler.is_compiling(), torch.is_grad_enabled(), None
    dtype, need_z, backend, chosen = x.dtype, grad and core.requires_grad, "reference", "factored"
    if compiling or torch._C._is_any_autocast_enabled():
        dtype = compute_dtype(x)
    if weight is not None:
        if dtype != weight.dtype and (dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type)):
            if operands is None or not operands.casts:
                raise ValueError(f"without autocast `weight` must have the dtype of `x` ({dtype}), got {weight.dtype}")
        call = dispatch.linear_call.__wrapped__ if compiling else dispatch.linear_call
        backward = need_z or (grad and x.requires_grad)
        backend, elements = call(x.device, dtype, weight.shape, core.shape[0], mode, backward, dispatch.forced)
        exporting = compiling and torch.compiler.is_exporting()  # maybe for any number of tokens
        if x.numel() >= elements if not exporting else elements == 0:
            chosen = "composed"
    if dispatch.transforming():
        with reference.without_autocast(x):
            return reference.ssvd_linear_ref(x.to(dtype), weight, U, V, core, bias, chosen)
    choices = chosen, dtype, backend, need_z
    if compiling:
        return SSVDLinearFunction.apply(x, weight, U, V, core, bias, choices)
    if backend == "triton" and operands is not None:
        U, V, narrow = operands.operands(core, dtype)
    return apply_linear(x, weight, U, V, core, bias, choices, narrow)


def activation(
    x: Tensor,
    basis: Tensor,
    core: Tensor,
    shift: Tensor | None = None,
    narrow: Callable[[torch.dtype], Tensor | None] | None = None,
) -> Tensor:
    """x + (((x - shift) basis) core^T) basis^T, the change of a layer's input (V, C) or output (U, C_out, its bias).

    x (..., d), basis (d, k), core (k, k), shift (d,) -> (..., d), in x's dtype or autocast's; a sum in bfloat16 is
    rounded stochastically, so that small updates survive. Gradients reach x and core.
    narrow: gives the core as the Triton kernels read it in a dtype, where that is made already.
    """
    compiling, dtype = torch.compiler.is_compiling(), x.dtype
    if compiling or torch._C._is_any_autocast_enabled():
        dtype = compute_dtype(x)
    if dispatch.transforming():
        with reference.without_autocast(x):
            return reference.ssvd_activation_ref(x.to(dtype), basis, core, shift)
    choose = dispatch.linear_backend.__wrapped__ if compiling else dispatch.linear_backend
    backend = choose(x.device, dtype, dispatch.forced)
    if compiling:
        return SSVDActivationFunction.apply(x, basis, core, shift, dtype, backend)
    made = narrow(dtype) if backend == "triton" and narrow is not None else None
    return apply_activation(x, basis, core, shift, dtype, backend, made)


def add_rows(
    y: Tensor,
    x: Tensor,
    V: Tensor,
    U: Tensor,
    cores: Tensor,
    places: Places | None,
    shift: Tensor | None = None,
) -> Tensor:
    """y + (((x - shift) V) core_r^T) U^T (B, ..., d_out), where each of R rows has its own core.

    y (B, ..., d_out), x (B, ..., d_in), V (d_in, k), U (d_out, k), shift (d_in,); B is a multiple of R, and each B / R
    entries are a row. cores (N, k, k), of which `places` says a row's, or without it (R, k, k). A row of no core is y's
    bit for bit. Arithmetic and rounding as in `activation`. Gradients reach y, x and cores.
    """
    dtype = compute_dtype(x)
    x, V, U = x.to(dtype), V.to(dtype), U.to(dtype)
    z = F.linear(x, V.mT, None if shift is None else -(shift.to(dtype) @ V))
    rows = z.reshape(len(cores if places is None else places), -1, z.shape[-1])
    if places is None:
        q = torch.bmm(rows, cores.to(dtype).mT)
    else:
        backend = dispatch.linear_backend(x.device, dtype, dispatch.forced)
        q = RowsProductFunction.apply(rows, cores, places, backend)
    q = q.view_as(z)
    if dtype == torch.bfloat16:
        return add_update(y.to(dtype), F.linear(q, U))
    return reference.add_product(y.to(dtype), q, U)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the op computes on x: autocast's where that is on (float64 stays), else x's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def check_theta(argument: str, theta: Tensor, k: int, rotation: str, band: int | None = None) -> None:
    """Raises unless theta is a floating tensor (..., m) of the length that `rotation` needs at rank k."""
    if not theta.is_floating_point():
        raise TypeError(f"`{argument}` must have a floating-point dtype, got {theta.dtype}")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"`k` must be an integer >= 1, got {k!r}")
    if theta.ndim == 0 or theta.shape[-1] != theta_length(k, rotation, band):
        formula = {"free": "k^2", "banded": f"2 k band - band (band+1), band={band},"}.get(rotation, "k(k-1)/2")
        raise ValueError(
            f"`{argument}` must have shape (..., {theta_length(k, rotation, band)}), i.e. {formula} elements for "
            f"k={k} and rotation={rotation!r}, got {tuple(theta.shape)}"
        )


def theta_length(k: int, rotation: str, band: int | None = None) -> int:
    """Elements of theta: k^2 for "free", 2 k band - band (band+1) for "banded", else k(k-1)/2."""
    if rotation == "banded":
        assert band is not None
        return 2 * k * band - band * (band + 1)
    return k * k if rotation == "free" else k * (k - 1) // 2


def _check_linear(x: Tensor, weight: Tensor, U: Tensor, V: Tensor, core: Tensor, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"`x` must have a floating-point dtype, got {x.dtype}")
    if weight.ndim != 2 or U.ndim != 2:
        raise ValueError(
            "`weight` and `U` must have shapes (d_out, d_in) and (d_out, k), got "
            f"{tuple(weight.shape)} and {tuple(U.shape)}"
        )
    (d_out, d_in), k = weight.shape, U.shape[1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "U": (U, (d_out, k)),
        "V": (V, (d_in, k)),
        "core": (core, (k, k)),
        "bias": (bias, (d_out,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"`{name}` must have shape {shape} for a weight of shape {(d_out, d_in)}, got {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"`{name}` must have a floating-point dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"`{name}` must be on the same device as `x` ({x.device}), got {tensor.device}")
    if x.ndim == 0 or x.shape[-1] != d_in:
        raise ValueError(
            f"`x` must have shape (..., {d_in}) for a weight of shape {(d_out, d_in)}, got {tuple(x.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"`weight` must be on the same device as `x` ({x.device}), got {weight.device}")
    for name, tensor in (("weight", weight), ("U", U), ("V", V)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"`{name}` must be frozen, got requires_grad=True (SSVD trains only the core)")
