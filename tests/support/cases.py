"""One table of shapes, dtypes and bounds for all tests, and the float64 oracles."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ssvd_kernels.ops.reference import skew

# (tokens, d_in, d_out, k): tall, wide, square, primes, single rows and columns, full rank
LINEAR_SHAPES = [
    (1, 1, 1, 1),
    (1, 7, 5, 1),
    (5, 16, 16, 16),
    (3, 17, 33, 5),
    (13, 64, 48, 31),
    (64, 48, 96, 17),
    (127, 96, 64, 64),
    (40, 130, 67, 65),
]
CAYLEY_RANKS = [1, 2, 3, 16, 31, 64, 65, 97, 128, 153]
KAPPAS = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]  # ||K||_2


def theta_of_norm(k: int, kappa: float, batch: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random theta (batch, m) whose K has spectral norm kappa."""
    theta = torch.randn(batch, k * (k - 1) // 2, dtype=torch.float64)
    if k > 1:
        norms = torch.stack([torch.linalg.matrix_norm(K, 2) for K in skew(theta, k)])
        theta = kappa * theta / norms.unsqueeze(-1)
    return theta.to(dtype)


def _with_structure(k: int) -> dict[str, Tensor]:
    """Upper triangles of K (k, k), k >= 16, that elimination takes less well, or is easily thought to take well."""
    index, half = torch.arange(k), k // 2
    draw, first = torch.randn(k, k, dtype=torch.float64), index < half
    scales = torch.logspace(0, -4, k, dtype=torch.float64)
    turns = torch.linalg.qr(draw)[0]
    planes = torch.diag((index[:-1] % 2 == 0).double(), 1)
    pair = torch.outer(draw[0], draw[1])
    return {
        "random": draw,
        "rank 2": pair - pair.mT,
        "all ones": torch.ones_like(draw),
        "blocks": draw * (index // 8 == index[:, None] // 8),
        "banded": draw * ((index - index[:, None]).abs() <= 4),
        "halves": draw * (first[:, None] & ~first),
        "halves of rank 1": torch.sign(pair) * (first[:, None] & ~first),
        "halves, diagonal": torch.diag(1 + torch.rand(k - half, dtype=torch.float64), half),
        "the first rows": draw * (first[:, None] & ~first & (index[:, None] < k // 6)),
        "equal singular values": turns @ (planes - planes.mT) @ turns.mT,
        "one large entry": 1e-3 * draw + (index[:, None] == half - 1) * (index == half),
        "graded": draw * scales * scales[:, None],
    }


STRUCTURES = tuple(_with_structure(16))


def structured_theta(structure: str, k: int, kappa: float) -> Tensor:
    """theta (1, m) in float32 whose K of one of STRUCTURES has spectral norm kappa."""
    upper = torch.triu(_with_structure(k)[structure], 1)
    i, j = torch.triu_indices(k, k, 1)
    return (kappa * upper / torch.linalg.matrix_norm(upper - upper.mT, 2))[i, j][None].float()


def exact_delta(theta: Tensor, k: int) -> Tensor:
    """E = -2 (I + K)^-1 K in float64 by LU, one matrix at a time (a batch would be wrong on the CPU)."""
    return solved_delta(theta.double(), k)


def solved_delta(theta: Tensor, k: int) -> Tensor:
    """The same computation in theta's own dtype: what plain PyTorch gives, the yardstick of the error bounds."""
    eye = torch.eye(k, dtype=theta.dtype, device=theta.device)
    return torch.stack([-2 * torch.linalg.solve(eye + K, K) for K in skew(theta, k)])


def rotation_by_hand(theta: Tensor, k: int, rotation: str) -> Tensor:
    """G by the tests' own arithmetic, one float64 matrix; K[i < j] = +theta row by row."""
    eye = torch.eye(k, dtype=torch.float64)
    if rotation == "free":
        return eye + theta.view(k, k)
    K = torch.zeros(k, k, dtype=torch.float64)
    i, j = torch.triu_indices(k, k, 1)
    K[i, j] = theta
    K = K - K.T
    return eye - 2 * K if rotation == "linear" else torch.linalg.solve(eye + K, eye - K)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact|| in float64, inf if anything is not finite."""
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    exact = exact.detach()
    scale = exact.double().norm()
    error = (value.detach().double() - exact.double()).norm()
    return float(error / scale) if scale > 0 else float(error)


def together(results: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of several draws as one of each name: over few numbers a rounding error would be luck."""
    runs = list(results)
    return {name: torch.cat([run[name].flatten() for run in runs]) for name in runs[0]}


def linear_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype | None = None, seed: int = 0
) -> dict:
    """x, weight, orthonormal U and V, core, bias, dy for (tokens, d_in, d_out, k), exactly representable in dtype."""
    tokens, d_in, d_out, k = shape
    generator = torch.Generator().manual_seed(sum(shape) + seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    U, V = torch.linalg.qr(draw(d_out, k))[0], torch.linalg.qr(draw(d_in, k))[0]
    weight_dtype = weight_dtype or dtype
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": draw(tokens, d_in).to(dtype),
        "weight": (draw(d_out, d_in) / d_in**0.5).to(weight_dtype),
        "U": U.to(weight_dtype),
        "V": V.to(weight_dtype),
        "core": (draw(k, k) / (4 * k**0.5)).to(wide),
        "bias": draw(d_out).to(weight_dtype),
        "dy": draw(tokens, d_out).to(dtype),
    }


def naive_linear(inputs: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """y and gradients by PyTorch's autograd in `dtype` from the formula: the oracle (float64) and the yardstick."""
    cast = {name: tensor.detach().to(dtype) for name, tensor in inputs.items()}
    x, core, bias = (cast[name].requires_grad_() for name in ("x", "core", "bias"))
    z = x @ cast["V"]
    y = torch.nn.functional.linear(x, cast["weight"], bias) + (z @ core.mT) @ cast["U"].mT
    dx, dcore, dbias = torch.autograd.grad(y, [x, core, bias], cast["dy"])
    return {"y": y.detach(), "dx": dx, "dcore": dcore, "dbias": dbias}


def activation_inputs(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """x, orthonormal basis stored transposed, core and shift in float32, dy for (tokens, d, k), as `linear_inputs`."""
    tokens, d, k = shape
    inputs = linear_inputs((tokens, d, d, k), dtype, torch.float32, seed)
    basis = inputs["V"].to(dtype).mT.contiguous().mT
    return {"x": inputs["x"], "basis": basis, "core": inputs["core"], "shift": inputs["bias"], "dy": inputs["dy"]}


def naive_activation(inputs: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, z and gradients by PyTorch's autograd in `dtype` from the formula, as `naive_linear`."""
    cast = {name: tensor.detach().to(dtype) for name, tensor in inputs.items()}
    x, core = (cast[name].requires_grad_() for name in ("x", "core"))
    z = (x - cast["shift"]) @ cast["basis"]
    out = x + (z @ core.mT) @ cast["basis"].mT
    dx, dcore = torch.autograd.grad(out, [x, core], cast["dy"])
    return {"out": out.detach(), "z": z.detach(), "dx": dx, "dcore": dcore}
