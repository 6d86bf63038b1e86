"""Reference implementation of every op in plain PyTorch, for any device, dtype and thread count.

Convention (used throughout the package; other packages use its inverse, so check before combining them).
    theta (m,), m = k(k-1)/2, packs a skew-symmetric K row by row over the strict upper triangle:
    K[i, j] = +theta for i < j and K[j, i] = -theta.
    Cayley transform  G = (I - K)(I + K)^-1  (orthogonal),  E = G - I = -2 K (I + K)^-1.
    Adapted weight    W' = W + U core V^T,  core = diag(delta) + diag(sigma + delta) E  (input side).

Sources: SSVD, arXiv 2509.02830, eq. 8-13 (rotation and shift); Cayley (1846) for the transform.
`dispatch` calls these functions when no faster backend is available, and the tests compare the faster ones with them.
None of them uses a batched LU: on the CPU that is wrong for n > 150 with two or more threads (PyTorch issue 142815).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.constants import LARGE, LATTICE, NOT_UNIT
from .places import Places

LEAF = 64  # blocks of at most so many rows are inverted in float64


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """No autocast on the tensor's device, which need not have any ("meta")."""
    if not torch.compiler.is_compiling():
        return torch._C._DisableAutocast()  # on all devices, in a tenth of torch.autocast's Python calls
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


@torch.compiler.assume_constant_result  # not traced: torch 2.11 cannot
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def skew(theta: Tensor, k: int) -> Tensor:
    """Unpacks theta (..., m) into the skew-symmetric K (..., k, k)."""
    K = theta.new_zeros(*theta.shape[:-1], k, k)
    i, j = torch.triu_indices(k, k, offset=1, device=theta.device)
    K[..., i, j] = theta
    K[..., j, i] = -theta
    return K


def unskew(Z: Tensor) -> Tensor:
    """Adjoint of `skew`: the strict upper triangle of Z - Z^T, (..., k, k) -> (..., m)."""
    i, j = torch.triu_indices(Z.shape[-1], Z.shape[-1], offset=1, device=Z.device)
    return Z[..., i, j] - Z[..., j, i]


def banded(theta: Tensor, k: int, band: int) -> Tensor:
    """Off-diagonals of SVFT's M (arXiv 2405.19597): theta (..., 2 band k - band (band+1)) -> E (..., k, k), zero on the
    diagonal and where |i - j| > band.

    theta is the part above the diagonal and then that below it, each diagonal by diagonal from the main one outwards,
    from the top left: E[0,1], E[1,2], ..., E[0,2], E[1,3], ... and E[1,0], E[2,1], ..., E[2,0], E[3,1], ...
    """
    E = theta.new_zeros(*theta.shape[:-1], k, k)
    i, j = band_indices(k, band, theta.device)
    above, below = theta.chunk(2, dim=-1)
    E[..., i, j] = above
    E[..., j, i] = below
    return E


def band_indices(k: int, band: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries with 0 < j - i <= band, in theta's order."""
    distance, end = torch.triu_indices(
        band, k - 1, device=device
    )  # entries with j = end + 1, on the diagonal j - i = distance + 1
    return end - distance, end + 1


def inverse_delta_ref(N: Tensor) -> Tensor:
    """F = (I + N)^-1 - I for N (..., n, n) whose symmetric part is positive semidefinite.

    Recursive 2x2 block elimination without pivoting: every pivot block I + N11 and every Schur complement has a
    symmetric part >= I, so it is stable at any block size. Carrying F instead of I + F loses nothing for small N.
    """
    n = N.shape[-1]
    if n == 1:
        return -N / (1 + N)
    if n <= LEAF and N.dtype == torch.float32:
        return inverse_delta_ref(N.double()).float()
    h = n // 2
    N11, N12, N21, N22 = N[..., :h, :h], N[..., :h, h:], N[..., h:, :h], N[..., h:, h:]
    F11 = inverse_delta_ref(N11)
    L = N21 + N21 @ F11
    R = N12 + F11 @ N12
    F22 = inverse_delta_ref(N22 - L @ N12)
    X12 = -(R + R @ F22)
    X21 = -(L + F22 @ L)
    top = torch.cat([F11 - X12 @ L, X12], dim=-1)
    return torch.cat([top, torch.cat([X21, F22], dim=-1)], dim=-2)


def inverse_ref(A: Tensor) -> Tensor:
    """A^-1 for A (..., n, n) whose symmetric part is >= I, by block Gauss-Jordan without pivoting.

    Of blocks of at most LEAF rows alone the inverse is a factor in what follows: right for large A, where
    `inverse_delta_ref` is not, and slower.
    """
    n = A.shape[-1]
    if n == 1:
        return 1 / A
    size = LEAF if n > LEAF else 1
    for start in range(0, n, size):
        stop = min(start + size, n)
        column, pivot = A[..., start:stop], inverse_ref(A[..., start:stop, start:stop])
        row = (pivot @ A[..., start:stop, :]).slice_scatter(pivot, -1, start, stop)
        A = A.slice_scatter(torch.zeros_like(column), -1, start, stop) - column @ row
        A = A.slice_scatter(row, -2, start, stop)
    return A


def cayley_delta_ref(theta: Tensor, k: int) -> Tensor:
    """E = G - I = -2 K (I + K)^-1 = 2 [(I + K)^-1 - I]; theta (..., m) -> (..., k, k), float32 or float64.

    The rounding errors of `inverse_delta_ref` grow with ||K||, and leave the rows of G no unit vectors: then it is
    float64's `inverse_ref`. Where the host cannot look at values, that in any case.
    """
    if theta.numel() == 0:  # k = 1, or an empty batch
        return theta.new_zeros(*theta.shape[:-1], k, k)
    K = skew(theta, k)
    if _readable(K) and _excess(K) <= LARGE:
        E = 2 * inverse_delta_ref(K)
        if _excess(E) <= NOT_UNIT:
            return E
    K = (K.cpu() if K.device.type == "mps" else K).double()  # mps has no float64
    eye = torch.eye(k, dtype=K.dtype, device=K.device)
    B = inverse_ref(eye + K)
    small = K.square().sum((-2, -1), keepdim=True) < 1  # where B - I would lose the last digits of E
    return torch.where(small, -2 * K @ B, 2 * (B - eye)).to(theta)


def _excess(E: Tensor) -> float:
    """The largest | ||g||^2 - 1 | of a row g of I + E."""
    lengths = torch.linalg.vector_norm(E, dim=-1, dtype=torch.float64)
    return float((lengths.square() + 2 * E.diagonal(dim1=-2, dim2=-1)).abs().max())


def _readable(tensor: Tensor) -> bool:
    """Whether the host can look at values at once: no device must be waited for, and no graph is being traced."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not traced  # a fake tensor is a subclass


def cayley_delta_backward_ref(grad: Tensor, E: Tensor) -> Tensor:
    """dtheta = strict upper triangle of Z - Z^T, Z = -2 B^T dE B^T, B = (I + K)^-1 = I + E/2. Differentiable.

    B's diagonal is multiplied apart from the rest: sums that begin with I, or cancel it for large K, round more.
    """
    diagonal = E.diagonal(dim1=-2, dim2=-1)
    rest, own = E.diagonal_scatter(torch.zeros_like(diagonal), dim1=-2, dim2=-1).mT, 2 + diagonal
    X = torch.addcmul(grad @ rest, grad, own.unsqueeze(-2))  # 2 dE B^T
    return -0.5 * unskew(torch.addcmul(rest @ X, X, own.unsqueeze(-1)))


def core_ref(
    E: Tensor,
    sigma: Tensor,
    delta: Tensor,
    side: str,
    E_out: Tensor | None = None,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """core M (..., k, k) with W' = W + U M V^T, exactly zero where E and delta are; sigma and delta (..., k).

    input   M = diag(delta) + D E,            D = diag(sigma + delta)
    output  M = diag(delta) + E^T D
    both    M = diag(delta) + E_H D + D E + E_H D E,  E_H = E_out^T
    """
    D = sigma + delta
    if side == "output":
        return torch.diag_embed(delta) + E.mT * D.unsqueeze(-2)
    right = D.unsqueeze(-1) * E
    if side == "input":
        return torch.diag_embed(delta) + right
    assert E_out is not None
    left = E_out.mT
    return torch.diag_embed(delta) + left * D.unsqueeze(-2) + right + product(left, right)


def banded_core_ref(E: Tensor, delta: Tensor) -> Tensor:
    """core M = diag(delta) + E (..., k, k) of SVFT, W' = U (Sigma + M) V^T: E is added to Sigma, not multiplied by
    it."""
    return torch.diag_embed(delta) + E


def compose_ref(weight: Tensor, U: Tensor, V: Tensor, core: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """W' = W + U core V^T, (d_out, d_in): computed in at least float32, rounded once to `dtype` (weight's own)."""
    wide = weight.dtype if weight.dtype.itemsize >= 4 else torch.float32
    if not weight.dtype == U.dtype == core.dtype == wide:
        return torch.addmm(weight.to(wide), U.to(wide) @ core.to(wide), V.to(wide).mT).to(dtype or weight.dtype)
    out = torch.addmm(weight, U @ core, V.mT)
    return out if dtype is None or dtype == wide else out.to(dtype)


def compose_operand_ref(weight: Tensor, U: Tensor, V: Tensor, core: Tensor, dtype: torch.dtype) -> Tensor:
    """W' as the operand of a product in `dtype`: `compose_ref`, but for bfloat16 W rounded to nearest, plus U core V^T,
    their float32 sum rounded stochastically. Not differentiable.

    Rounding the sum to nearest would lose updates below half a unit in the last place: at ||K|| = 1e-4 only a twentieth
    of the update survives. Rounded up or down with probabilities that make it unbiased, its projection on the true one
    is 1, and W' is exactly the rounded W where the update is zero.
    """
    if dtype != torch.bfloat16:
        return compose_ref(weight, U, V, core, dtype)
    P = U.to(dtype) @ core.to(dtype)
    return round_stochastically(weight.to(dtype).float() + P.float() @ V.float().mT)


def round_stochastically(values: Tensor) -> Tensor:
    """float32 (rows, cols) to bfloat16, up or down with probabilities that make it unbiased; Inf and NaN stay.

    The noise (i LATTICE[0] + j LATTICE[1]) mod 2^16 of element (i, j) is the same everywhere, and even along every row
    and column: the R2 sequence (Roberts, 2018), in units of the last of the 16 bits that are cut off.
    """
    rows = ((torch.arange(values.shape[0], device=values.device) * LATTICE[0]) & 0xFFFF).int()
    cols = ((torch.arange(values.shape[1], device=values.device) * LATTICE[1]) & 0xFFFF).int()
    noise = (rows.unsqueeze(1) + cols).bitwise_and_(0xFFFF)
    bits = noise.add_(values.view(torch.int32)).bitwise_and_(-0x10000)
    return torch.where(values.isnan(), values, bits.view(torch.float32)).to(torch.bfloat16)


def add_update(y: Tensor, update: Tensor) -> Tensor:
    """y + update (..., d_out) in y's dtype; a sum in bfloat16 is rounded stochastically, which keeps small updates.

    To nearest, 5 % of an update would arrive in the sum at ||K|| = 1e-4, and half of it at 1e-3. y itself is returned
    bit for bit where the update is zero. Not differentiable.
    """
    if y.dtype != torch.bfloat16:
        return y + update.to(y.dtype)
    rows = y.reshape(-1, y.shape[-1])
    return round_stochastically(rows.float() + update.reshape(rows.shape)).view(y.shape)


def ssvd_linear_ref(
    x: Tensor, weight: Tensor | None, U: Tensor, V: Tensor, core: Tensor, bias: Tensor | None, mode: str
) -> Tensor:
    """y = x W'^T + b, W' = weight + U core V^T, in x's dtype: x (..., d_in) -> (..., d_out). Differentiable.

    mode: "composed" builds W', "factored" computes x weight^T + ((x V) core^T) U^T. Without `weight` y is the update
    alone.
    """
    dtype = x.dtype
    bias = None if bias is None else bias.to(dtype)
    if mode == "composed" and weight is not None:
        return F.linear(x, compose_ref(weight, U, V, core, dtype), bias)
    update = ((x @ V.to(dtype)) @ core.to(dtype).mT) @ U.to(dtype).mT
    return update if weight is None else F.linear(x, weight.to(dtype), bias) + update


def ssvd_linear_fwd(
    x: Tensor, weight: Tensor | None, U: Tensor, V: Tensor, core: Tensor, bias: Tensor | None, mode: str, need_z: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, z, W'): y of `ssvd_linear_ref`; z = x V (..., k) where the backward needs it, W' where it was composed."""
    dtype = x.dtype
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if mode == "composed":
        assert weight is not None
        composed = compose_operand_ref(weight, U, V, core, dtype)
        return F.linear(x, composed, bias), x @ V.to(dtype) if need_z else None, composed
    if not dtype == U.dtype == core.dtype:
        U, V, core = U.to(dtype), V.to(dtype), core.to(dtype)
    z = x @ V
    q = F.linear(z, core)
    if weight is None:
        return F.linear(q, U), z if need_z else None, None
    y = F.linear(x, weight if weight.dtype == dtype else weight.to(dtype), bias)
    return add_product(y, q, U), z if need_z else None, None


def add_product(y: Tensor, q: Tensor, basis: Tensor) -> Tensor:
    """y + q basis^T (..., d) for q (..., k) and basis (d, k), rounded as by `add_update`."""
    # not in place: a selective checkpoint may have cached y
    if y.dtype == torch.bfloat16:
        return add_update(y, F.linear(q, basis))
    if y.ndim == 2:
        return torch.addmm(y, q, basis.mT)
    return torch.addmm(y.reshape(-1, y.shape[-1]), q.reshape(-1, q.shape[-1]), basis.mT).view_as(y)


def ssvd_linear_bwd(
    dy: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    U: Tensor,
    V: Tensor,
    core: Tensor,
    composed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = dy W' if `need_dx`, and dcore = U^T dy^T z = (dy U)^T (x V) if z is given: dy (T, d_out), z (T, k)."""
    dtype = dy.dtype
    dx = dcore = None
    if not dtype == U.dtype == core.dtype:
        U, V, core = U.to(dtype), V.to(dtype), core.to(dtype)
    if composed is not None:
        if need_dx:
            dx = dy @ composed
        if z is not None:  # the three factors in the cheaper order
            dcore = (dy @ U).mT @ z if dy.shape[0] < U.shape[0] else U.mT @ (dy.mT @ z)
    else:
        dyU = dy @ U
        if need_dx:
            dq = dyU @ core
            if weight is None:
                dx = F.linear(dq, V)
            else:
                dx = dy @ (weight if weight.dtype == dtype else weight.to(dtype))
                torch.addmm(dx, dq, V.mT, out=dx)
        if z is not None:
            dcore = dyU.mT @ z
    return dx, dcore


def ssvd_activation_ref(x: Tensor, basis: Tensor, core: Tensor, shift: Tensor | None) -> Tensor:
    """x + (((x - shift) basis) core^T) basis^T in x's dtype: x (..., d), basis (d, k), core (k, k), shift (d,).
    Differentiable."""
    basis, core = basis.to(x.dtype), core.to(x.dtype)
    z = (x if shift is None else x - shift.to(x.dtype)) @ basis
    return x + (z @ core.mT) @ basis.mT


def ssvd_activation_fwd(x: Tensor, basis: Tensor, core: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """(`ssvd_activation_ref`, rounded as by `add_update`; z = (x - shift) basis (..., k))."""
    basis, core = basis.to(x.dtype), core.to(x.dtype)
    z = F.linear(x, basis.mT, None if shift is None else -(shift.to(x.dtype) @ basis))
    return add_product(x, F.linear(z, core), basis), z


def ssvd_activation_bwd(
    dy: Tensor, z: Tensor | None, basis: Tensor, core: Tensor, need_dx: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx = dy + ((dy basis) core) basis^T if `need_dx`, dcore = (dy basis)^T z if z is given: dy (T, d), z (T, k)."""
    basis, core = basis.to(dy.dtype), core.to(dy.dtype)
    g = dy @ basis
    dx = torch.addmm(dy, g @ core, basis.mT) if need_dx else None
    return dx, None if z is None else g.mT @ z


def activation_core_ref(E: Tensor, sigma: Tensor, delta: Tensor, side: str, E_out: Tensor | None) -> Tensor:
    """C (..., k, k), by which a layer's activations change instead of its weight; arguments and M as in `core_ref`.

    With R = Sigma^-1 diag(delta), so that no k x k matrix is divided:
    input   C = Sigma^-1 M = R + (I + R) E,    W' = W (I + V C V^T)
    output  C = M Sigma^-1 = R + E^T (I + R),  W' = (I + U C U^T) W
    both    [the input side's C, E_out^T] (..., 2, k, k),  W' = (I + U E_out^T U^T) W (I + V C V^T)
    """
    C = core_ref(E, torch.ones_like(sigma), delta / sigma, "output" if side == "output" else "input")
    return C if E_out is None else torch.stack([C, E_out.mT], dim=-3)


def rows_product_fwd(z: Tensor, cores: Tensor, places: Places) -> Tensor:
    """q (R, T, k): each row of z (R, T, k) times the transpose of its own of cores (N, k, k)."""
    q = torch.zeros_like(z)
    for number, rows in places.groups:
        q[rows] = F.linear(z[rows], cores[number].to(z.dtype))
    return q


def rows_product_bwd(
    dq: Tensor, z: Tensor | None, cores: Tensor, places: Places, need_dz: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dz (R, T, k) if `need_dz`; dcores (N, k, k) if z is given."""
    dz = rows_product_fwd(dq, cores.mT, places) if need_dz else None
    return dz, None if z is None else rows_core_grad(dq, z, cores, places)


def rows_core_grad(dq: Tensor, z: Tensor, cores: Tensor, places: Places) -> Tensor:
    """dcores (N, k, k), each the sum of dq^T z over the rows that have the core."""
    dcores = torch.zeros_like(cores)
    for number, rows in places.groups:
        dcores[number] = dq[rows].flatten(0, 1).mT @ z[rows].flatten(0, 1)
    return dcores
