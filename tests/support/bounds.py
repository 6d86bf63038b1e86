"""The one rule for the error bounds of this suite.

A result may have at most twice the error of the same computation in plain PyTorch in the same dtype, both against
float64. Bounds are computed beside the result, never written down as numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from cases import relative_error
from torch import Tensor

from ssvd_kernels.ops.reference import skew, unskew

DRAWS = 16  # of results with few elements, whose rounding error in one draw is a matter of luck
ORTHOGONAL = 5e-6  # promised of every number of G^T G - I in float32: 42 eps, for sums of up to 1024 terms
# Promised in float32 of any K, ||K||_2 <= 1000: of every number of E, of G^T G - I, and of dtheta relative to its norm.
ANY_K = {"E": 1e-5, "G^T G": 2e-5, "dtheta": 2e-4}
Results = dict[str, Tensor]


def unit_roundoff(dtype: torch.dtype) -> float:
    """eps / 2: the largest relative error of rounding an exact number to `dtype`."""
    return torch.finfo(dtype).eps / 2


def in_float64(k: int) -> float:
    """Of rotations, where the oracle is float64, too: two results, each of three sums of k terms in a row."""
    return 6 * k * unit_roundoff(torch.float64)


def twice(plain: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> float:
    """Twice the relative error of `plain`, which computes in `dtype` (its own if not given), at least its roundoff."""
    return max(2 * relative_error(plain, exact), unit_roundoff(dtype or plain.dtype))


def twice_of_draws(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest `twice(plain, exact)` over several draws of the same computation."""
    return max(twice(plain, exact) for plain, exact in pairs)


def draws(compute: Callable[[], tuple[Tensor, Tensor]], count: int = DRAWS) -> float:
    """`twice_of_draws` of `count` calls of compute() -> (plain, exact), which draws new inputs at each call."""
    return twice_of_draws(compute() for _ in range(count))


def assert_within(value: Tensor, plain: Tensor, exact: Tensor, what: str = "") -> None:
    """`value` has at most twice the error of `plain`, against the float64 result `exact`."""
    error, bound = relative_error(value, exact), twice(plain, exact)
    assert error <= bound, f"{what}: error {error:.2e}, plain PyTorch in {plain.dtype} allows {bound:.2e}".lstrip(": ")


def assert_bounded(found: Results, references: Callable[[int], tuple[Results, Results]]) -> None:
    """What was `found` of draw 0 has at most twice the error of the twin; references(draw) -> (twin's, exact)."""
    pairs = [references(0)]
    if any(value.numel() < 64 for value in found.values()):
        pairs += [references(draw) for draw in range(1, DRAWS)]
    for name, value in found.items():
        exact = pairs[0][1][name]
        bound = twice_of_draws((twin[name], e[name]) for twin, e in (pairs if exact.numel() < 64 else pairs[:1]))
        assert value.shape == exact.shape
        assert relative_error(value, exact) <= bound, name


def assert_right_for_any_k(theta: Tensor, grad: Tensor, k: int, E: Tensor, dtheta: Tensor) -> None:
    """E and dtheta of float32 theta (B, m) and dE = grad are those of float64 within ANY_K."""
    eye = torch.eye(k, dtype=torch.float64)
    B = torch.stack([torch.linalg.inv(eye + K) for K in skew(theta.detach().double(), k)])
    Z = B.mT @ grad.double() @ B.mT
    G = eye + E.detach().double()
    error = {
        "E": float((G + eye - 2 * B).abs().max()),
        "G^T G": float((G.mT @ G - eye).abs().max()),
        "dtheta": relative_error(dtheta, unskew(-2 * Z)),
    }
    assert all(error[name] <= bound for name, bound in ANY_K.items()), error
