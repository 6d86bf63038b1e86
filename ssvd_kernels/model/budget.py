"""The number of trainable parameters of each method in a layer, and the ranks that are possible there."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Sequence

from ..config import METHODS, check_choice
from ..ops.functional import theta_length

PEFT_METHODS = ("lora", "dora", "pissa", "vera", "oft", "psoft")  # the peft package provides these
Shape = tuple[int, int]  # of a weight: (d_out, d_in)


def trainable(
    method: str, shape: Shape, rank: int, rank_out: int | None = None, *, rotation: str = "cayley", top: int = 256
) -> int:
    """How many parameters `method` trains in a layer whose weight has the shape (d_out, d_in), n = min(d_out, d_in).

    method        rank                parameters                                                   source
    "ssvd"        k                   k(k-1)/2 + k; k^2 + k for rotation="free"                    arXiv 2509.02830
    "ssvd-o"      k_in (and k_out)    k_in(k_in-1)/2 + k_out(k_out-1)/2 + max(k_in, k_out),        arXiv 2601.12600
                                      or k_in^2 + k_out^2 + max(k_in, k_out)                       (our reading)
    "svft"        band q              n q + (n - q)(q + 1)                                         arXiv 2405.19597
    "spectralft"  r of the top p      r (d_out + d_in + 2 p), p = min(top, n)                      arXiv 2501.03829
    "lora"        r                   r (d_in + d_out); so "pissa"; "dora" has d_out more          peft
    "vera"        r                   r + d_out                                                    peft
    "oft"         block size b        (d_in / b) b(b-1)/2, b a divisor of d_in                     peft
    "psoft"       r                   r(r-1)/2 + 2 r                                               peft

    rank_out: of "ssvd-o" alone, by default `rank`. rotation: "cayley", "linear" or "free". `ranks` lists the ranks
    there are. Raises ValueError for another method, rotation or rank.
    """
    check_choice("method", method, METHODS)
    check_choice("rotation", rotation, ("cayley", "linear", "free"))
    (d_out, d_in), n = shape, min(shape)
    low, high = 0 if method == "svft" else 1, _highest(method, shape, top)
    for name, value in (("rank", rank), ("rank_out", rank_out)):
        if value is not None and not low <= value <= high:
            limits = f"between {low} and {high}" if math.isfinite(high) else f">= {low}"
            raise ValueError(f"`{name}` must be {limits} for method={method!r} and shape {shape}, got {value}")
    if rank_out is not None and method != "ssvd-o":
        raise ValueError(f"`rank_out` must be None for method={method!r}, got {rank_out}")
    match method:
        case "ssvd":
            return theta_length(rank, rotation) + rank
        case "ssvd-o":
            rank_out = rank if rank_out is None else rank_out
            return theta_length(rank, rotation) + theta_length(rank_out, rotation) + max(rank, rank_out)
        case "svft":
            return theta_length(n, "banded", rank) + n
        case "spectralft":
            return rank * (d_out + d_in + 2 * min(top, n))
        case "dora":
            return rank * (d_in + d_out) + d_out
        case "vera":
            return rank + d_out
        case "oft":
            return d_in // rank * theta_length(rank, "cayley")
        case "psoft":
            return theta_length(rank, "cayley") + 2 * rank
        case _:  # lora, pissa
            return rank * (d_in + d_out)


def _highest(method: str, shape: Shape, top: int) -> float:
    match method:
        case "svft":
            return min(shape) - 1
        case "spectralft":
            return min(top, *shape)
        case "oft":
            return shape[1]
        case "lora" | "dora" | "vera":
            return math.inf
        case _:
            return min(shape)


def ranks(method: str, shapes: Collection[Shape], *, top: int = 256) -> dict[Shape, Sequence[int]]:
    """Weight shape -> the ranks (bands, block sizes) that `method` can have there, ascending, see `trainable`.

    PEFT's methods have one rank for all layers. LoRA's and DoRA's stop where no layer can use more; VeRA's, which only
    its cost bounds, at twice that; PiSSA's and PSOFT's at the smallest layer's, above which PEFT would clip or refuse.
    OFT's block sizes divide every d_in, so that PEFT has none to adjust; there may be none at all.
    """
    check_choice("method", method, METHODS)
    smallest = [min(shape) for shape in shapes]
    match method:
        case "ssvd" | "ssvd-o":
            return {shape: range(1, min(shape) + 1) for shape in shapes}
        case "svft":
            return {shape: range(min(shape)) for shape in shapes}
        case "spectralft":
            return {shape: range(1, min(top, *shape) + 1) for shape in shapes}
        case "oft":
            common = math.gcd(*(d_in for _, d_in in shapes))
            return dict.fromkeys(shapes, tuple(b for b in range(2, common + 1) if common % b == 0))
        case "pissa" | "psoft":
            return dict.fromkeys(shapes, range(1, min(smallest) + 1))
        case _:  # lora, dora, vera
            most = max(smallest) * (2 if method == "vera" else 1)
            return dict.fromkeys(shapes, range(1, most + 1))


def inner_outer(rank: int, inner_share: float, rotation: str) -> tuple[int, int]:
    """(k_in, k_out) of SSVD-O: `rank` is the larger one, and theta has `inner_share` of the rotations' parameters.

    The smaller one is the largest whose rotation has no more than its share, or 1 (no rotation; for rotation="free" one
    parameter) if there is none.
    """
    small, large = sorted((inner_share, 1 - inner_share))
    allowed = theta_length(rank, rotation) * small / large
    other = max(1, bisect_right(range(1, rank + 1), allowed, key=lambda k: theta_length(k, rotation)))
    return (rank, other) if inner_share >= 0.5 else (other, rank)
