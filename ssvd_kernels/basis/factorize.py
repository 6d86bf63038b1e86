"""Truncated SVD of a frozen weight, with data that identifies its basis: a fingerprint, a gap and a sketch.

float32 factorisations by different drivers, thread counts or orientations differ by 1e-4 to 3e-4 and in signs; float64
ones agree to about 5e-13 up to signs. We therefore factorise in float64, store float32, and add a sketch. A later
factorisation of the same weight is compared with the sketch, and its signs are repaired.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import check_rank
from ..utils.fsdp import is_sharded
from .truncated_svd import top_triplets

BASIS = ("U", "sigma", "V")
SKETCH_ROWS = 3  # random projections of each basis; 24 k bytes a layer in float32
SAFE_GAP = 1e-7  # float64 factorisations move a vector by about 1e-15 sigma_1 / gap: below this, store the basis
MATCH_TOLERANCE = 1e-5  # of a recomputed sketch against the stored one: float32 rounding is 1e-7, another basis 1


class BasisIdentity(NamedTuple):
    """What identifies a basis among those of other factorisations."""

    fingerprint: str
    gap: float
    sketch: Tensor


class Factorization(NamedTuple):
    """Top-k triplets of W (d_out, d_in) and the identity of their basis."""

    U: Tensor  # (d_out, k)
    sigma: Tensor  # (k,)
    V: Tensor  # (d_in, k)
    fingerprint: str  # of W
    gap: float  # smallest relative distance between sigma_1..sigma_k and their neighbours
    sketch: Tensor  # (2 SKETCH_ROWS, k) float32 on the CPU


def check_weight(weight: Tensor, name: str) -> None:
    """Raises if `weight` cannot be factorised: wrong shape, integer, meta, sharded, NaN or infinite."""
    if weight.ndim != 2:
        raise ValueError(f"`{name}` must be a matrix of shape (d_out, d_in), got shape {tuple(weight.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"`{name}` must have at least one row and one column, got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"`{name}` must have a floating-point dtype, got {weight.dtype}")
    if weight.is_meta:
        raise ValueError(f"`{name}` is on the meta device and has no values: load the weights before factorising")
    if is_sharded(weight):
        raise ValueError(f"`{name}` is sharded and complete in no process: call inject before fully_shard")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"`{name}` must be finite, got NaN or infinity")


def factorize(weight: Tensor, k: int, name: str = "weight") -> Factorization:
    """Top-k SVD W = U diag(sigma) V^T of `weight` (d_out, d_in), computed in float64 with canonical signs.

    U, sigma, V come back in float32 (float64 for a float64 weight) on the weight's device. Each pair (u_i, v_i) has
    the sign that makes its first sketch coordinate positive. Raises ValueError or TypeError for a weight that
    cannot be factorised or a rank outside 1..min(d_in, d_out).
    """
    check_weight(weight, name)
    d_out, d_in = weight.shape
    check_rank("rank", k, d_in, d_out)
    W = weight.detach()
    U, sigma, V, following = top_triplets(W.to("cpu") if W.device.type == "mps" else W, k)  # mps has no float64
    gap = _relative_gap(sigma, following)
    signs = torch.where(_project(V)[0] < 0, -1.0, 1.0)
    U, V = U * signs, V * signs
    dtype = torch.promote_types(weight.dtype, torch.float32)
    U, sigma, V = (t.to(weight.device, dtype).contiguous() for t in (U, sigma, V))
    return Factorization(U, sigma, V, fingerprint(weight), gap, sketch(U, V))


def fingerprint(weight: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """SHA-256 (first 32 hexadecimal digits) of the weight's shape and its values cast to float32, or to `dtype`."""
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    digest.update(weight.detach().to("cpu", dtype).contiguous().numpy().data)
    return digest.hexdigest()[:32]


def sketch(U: Tensor, V: Tensor) -> Tensor:
    """Projections of V and U on fixed +-1 vectors: (2 SKETCH_ROWS, k) float32 on the CPU."""
    return torch.cat([_project(V), _project(U)]).to("cpu", torch.float32)


def basis_error(weight: Tensor, U: Tensor, sigma: Tensor, V: Tensor) -> float:
    """||U^T W V - diag(sigma)|| / ||W|| in float32 at least: about 1e-6 if U, sigma, V are triplets of W, else 1."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    W, U, sigma, V = (tensor.detach().to(weight.device, wide) for tensor in (weight, U, sigma, V))
    return float((U.mT @ W @ V - torch.diag(sigma)).norm() / W.norm())


def match_signs(saved: Tensor, found: Tensor, tolerance: float = MATCH_TOLERANCE) -> Tensor | None:
    """Signs (k,) that turn the basis with sketch `found` into the one with sketch `saved`; None if none do."""
    if saved.shape != found.shape:
        return None
    if torch.equal(saved, found):  # as always on one machine
        return saved.new_ones(saved.shape[1])
    signs = torch.where((saved * found).sum(0) < 0, -1.0, 1.0)
    scale = torch.maximum(saved.norm(dim=0), saved.new_tensor(1.0))
    matches = (found * signs - saved).norm(dim=0) <= tolerance * scale
    return signs if bool(matches.all()) else None


def match_rounded(saved: Tensor, bases: Mapping[str, Tensor]) -> Tensor | None:
    """`match_signs` of `bases` ("U", "V" or both), which were rounded to their dtype, with their part of `saved`."""
    rows = dict(zip("VU", saved.chunk(2)))
    found = torch.cat([_project(basis) for basis in bases.values()]).to("cpu", torch.float32)
    rounding = max(torch.finfo(basis.dtype).eps for basis in bases.values())
    return match_signs(torch.cat([rows[name] for name in bases]), found, max(MATCH_TOLERANCE, 8 * rounding))


def _relative_gap(sigma: Tensor, following: Tensor) -> float:
    if float(sigma[0]) == 0.0:
        return 0.0
    neighbours = torch.cat([sigma, following.unsqueeze(0)])  # sigma_{k+1} bounds the last pair; at full rank zero does
    return float((neighbours[:-1] - neighbours[1:]).min() / sigma[0])


def _project(basis: Tensor) -> Tensor:
    """(SKETCH_ROWS, d) signs times basis (d, k), in float64. The signs come from an integer hash, not from an RNG."""
    d = basis.shape[0]
    h = torch.arange(SKETCH_ROWS * d, dtype=torch.int64) + 1
    for multiplier in (0x45D9F3B, 0x119DE1F3, 0x3C6EF35F):  # multiply and fold, kept within 31 bits
        h = ((h ^ (h >> 15)) * multiplier) & 0x7FFFFFFF
    rows = 1.0 - 2.0 * ((h >> 16) & 1).to(torch.float64)
    return rows.view(SKETCH_ROWS, d).to(basis.device) @ basis.to(torch.float64)
