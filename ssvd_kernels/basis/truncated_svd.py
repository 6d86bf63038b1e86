"""Truncated SVD of a float64 matrix, at a fraction of the cost of a full SVD wherever that loses no accuracy.

The eigenvectors of the smaller Gram matrix are singular vectors, but they are computed from squared singular values:
rounding perturbs them by eps sigma_1^2 / (sigma_i^2 - sigma_j^2), an SVD by eps sigma_1 / (sigma_i - sigma_j). One step
of one-sided Jacobi removes the difference among the top k, because it works on the products U^T U directly. It cannot
detect how the top k mix with later vectors. Where that mixing or the step itself is too large, a full SVD is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SQUARED_GAP = 1e-7  # (sigma_k^2 - sigma_{k+1}^2) / sigma_1^2: the top k mix with the rest by eps / 1e-7 = 2e-9
MAX_STEP = 1e-7  # of Jacobi's rotations: their squares, which one step leaves behind, are float64 rounding
ROWS, COLUMNS = 1024, 256  # of W taken to float64, and of the Gram matrix computed, at once

Triplets = tuple[Tensor, Tensor, Tensor, Tensor]  # U (d_out, k), sigma (k,), V (d_in, k), sigma_{k+1} () or 0 for none


def top_triplets(W: Tensor, k: int) -> Triplets:
    """The k largest singular triplets of W (d_out, d_in), 1 <= k <= min(d_out, d_in), and the next sigma, in float64.

    Up to signs, the singular vectors agree with an SVD's to its own accuracy, plus 2e-9 at most of the k+1-th and later
    ones (float32 rounds by 6e-8); U and V are orthonormal to about 1e-14.
    """
    return by_gram(W, k) or by_svd(W, k)


def cost(d_out: int, d_in: int, k: int) -> float:
    """FLOPs of `by_gram` at a matrix product's speed, for time estimates; eigh takes as long as 10 r^3 of those."""
    r, longer = min(d_out, d_in), max(d_out, d_in)
    return 10.0 * r**3 + 1.2 * longer * r**2 + 2.0 * longer * k * (r + 2 * k) + 2.0 * r * k**2


def by_svd(W: Tensor, k: int) -> Triplets:
    """`top_triplets` by LAPACK's (on CUDA, cuSOLVER's) SVD."""
    U, S, Vh = torch.linalg.svd(W.to(torch.float64), full_matrices=False)
    return U[:, :k], S[:k], Vh[:k].mT, _next(S, k)


def by_gram(W: Tensor, k: int) -> Triplets | None:
    """`top_triplets` by the eigenvectors of W^T W or W W^T, the smaller one; None where that would be less accurate.

    Needs no float64 copy of W: beside the result, 4 min(d_out, d_in)^2 elements and a block of rows.
    """
    if W.shape[0] < W.shape[1]:
        found = by_gram(W.mT, k)
        return None if found is None else (found[2], found[1], found[0], found[3])
    squares, vectors = torch.linalg.eigh(_gram(W))  # ascending; reads the lower triangle
    squares, V = squares.flip(0).clamp(min=0), vectors[:, -k:].flip(1)
    if not bool((squares[0] > 0) & (squares[k - 1] - _next(squares, k) >= MIN_SQUARED_GAP * squares[0])):
        return None
    S = squares[:k].sqrt()
    U = _product(W, V / S)
    # Jacobi: U S (I + F) has orthogonal columns to first order, and V (I + F) too, as F is antisymmetric
    products = U.mT @ U
    differences = S.square() - S.square().unsqueeze(1)
    differences.fill_diagonal_(torch.inf)
    F = (products * S * S.unsqueeze(1) / differences).triu(1)
    F = F - F.mT
    if not bool(F.abs().max() <= MAX_STEP):  # infinite or NaN for equal singular values
        return None
    lengths = products.diagonal().sqrt()
    U = torch.addmm(U, U, F * S.unsqueeze(1) / S).div_(lengths)
    return U, S * lengths, torch.addmm(V, V, F), _next(squares, k).sqrt()


def _next(values: Tensor, k: int) -> Tensor:
    """The k+1-th of `values`, or zero if there are k."""
    return values[k] if k < len(values) else values.new_zeros(())


def _gram(W: Tensor) -> Tensor:
    """W^T W in float64, its lower triangle: what lies above the diagonal's blocks is left zero."""
    n = W.shape[1]
    G = W.new_zeros(n, n, dtype=torch.float64)
    for rows in W.split(ROWS):
        rows = rows.to(torch.float64)
        for start in range(0, n, COLUMNS):
            G[start:, start : start + COLUMNS].addmm_(rows[:, start:].mT, rows[:, start : start + COLUMNS])
    return G


def _product(W: Tensor, right: Tensor) -> Tensor:
    """W (m, n) times a float64 matrix (n, k), in float64."""
    out = right.new_empty(W.shape[0], right.shape[1])
    for rows, part in zip(W.split(ROWS), out.split(ROWS)):
        torch.mm(rows.to(torch.float64), right, out=part)
    return out
