"""Accuracy of the Cayley op and of merging, as Markdown: `python -m bench.accuracy > bench/results/NAME.md`.

The largest errors against float64 (one torch.linalg.solve a matrix) over RANKS and KAPPAS; see docs/results.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ssvd_kernels as sk
from bench.cases import cayley_by_solve
from ssvd_kernels.ops.reference import skew

RANKS = (16, 153, 409, 1024)
KAPPAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # ||K||_2
MERGE = (1024, 409)  # d, k


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def theta_of_norm(k: int, kappa: float) -> Tensor:
    theta = torch.randn(k * (k - 1) // 2, dtype=torch.float64)
    return kappa * theta / torch.linalg.matrix_norm(skew(theta, k), 2)


def rotation_errors(dtype: torch.dtype) -> tuple[float, float]:
    """(relative error of E, largest entry of |G^T G - I|)."""
    error = orthogonality = 0.0
    for k in RANKS:
        for kappa in KAPPAS:
            theta = theta_of_norm(k, kappa).to(dtype)
            error = max(error, relative(sk.cayley_delta(theta, k), cayley_by_solve(theta.double(), k)))
            G = sk.cayley(theta, k).double()
            orthogonality = max(orthogonality, float((G.mT @ G - torch.eye(k)).abs().max()))
    return error, orthogonality


def merge_error(dtype: torch.dtype) -> float:
    """Merged against unmerged output of one layer, the worse of composed and factored, ||K|| = 0.5."""
    d, k = MERGE
    layer = sk.SSVDLinear.from_linear(nn.Linear(d, d, dtype=dtype), sk.SSVDConfig(rank=k))
    with torch.no_grad():
        layer.theta.copy_(theta_of_norm(k, 0.5))
        layer.delta_sigma.normal_(0, 0.02)
    x, outputs = torch.randn(64, d, dtype=dtype), []
    for mode in ("composed", "factored"):
        layer.mode = mode
        outputs.append(layer(x).detach())
    layer.eval().merge()
    return max(relative(output, layer(x).detach()) for output in outputs)


def main() -> None:
    torch.manual_seed(0)
    print(f"Largest over k = {RANKS} and ||K|| = {KAPPAS}; torch {torch.__version__}, CPU.\n")
    print("| dtype | relative error of E | largest entry of G^T G - I | merged against unmerged, d = 1024, k = 409 |")
    print("|---|---:|---:|---:|")
    for dtype in (torch.float32, torch.float64):
        error, orthogonality = rotation_errors(dtype)
        name = str(dtype).removeprefix("torch.")
        print(f"| {name} | {error:.1e} | {orthogonality:.1e} | {merge_error(dtype):.1e} |")


if __name__ == "__main__":
    main()
