"""Time to make the frozen parts of a layer from its weight: what `inject` pays once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.harness import Case, Run, Version
from bench.layers import Factors
from bench.versions import PEER_BOUND
from ssvd_kernels.basis.factorize import factorize


def inject_case(d_in: int, d_out: int, k: int) -> Case:
    """The top k of one float32 weight (d_out, d_in), by this package, by torch.linalg.svd alone and by PEFT's PSOFT.

    The gate looks at U diag(sigma) V^T against float64, and at the output of a fresh LoRA, which adds nothing.
    """

    def build(device: torch.device) -> list[Version]:
        f = Factors.draw(torch.float32, d_in, d_out, k, device)
        U, S, Vh = torch.linalg.svd(f.weight.double(), full_matrices=False)
        exact, x = (U[:, :k] * S[:k]) @ Vh[:k], torch.randn(4, d_in, device=device)
        fresh = partial(peers.fresh, "LoRA r16", f)
        unchanged = F.linear(x, f.weight, f.bias)
        return [
            _version("ssvd", lambda: factorize(f.weight, k)[:3], exact),
            _version("svd float32", partial(_svd, f, torch.float32), exact),
            _version("svd float64", partial(_svd, f, torch.float64), exact),
            _version("PSOFT", partial(_psoft, f), exact),
            _version("LoRA r16", lambda: tuple(fresh().parameters()), unchanged, lambda: fresh()(x)),
        ]

    return Case("inject", torch.float32, build, "svd float64", "", d_in, d_out, k, passes=("init",))


def _version(name: str, run: Run, exact: Tensor, check: Callable[[], Tensor] | None = None) -> Version:
    def checked() -> tuple[Tensor, ...]:
        return (_product(*run()) if check is None else check().detach(),)

    absent = peers.absent(name) if name in peers.PEERS else ""
    return Version(
        name, run, [exact.double()], [PEER_BOUND[torch.float32]], check=checked, absent=absent, capturable=False
    )


def _product(U: Tensor, sigma: Tensor, V: Tensor) -> Tensor:
    return (U * sigma) @ V.mT


def _svd(f: Factors, dtype: torch.dtype) -> tuple[Tensor, ...]:
    U, S, Vh = torch.linalg.svd(f.weight.to(dtype), full_matrices=False)
    return U[:, : f.k].float(), S[: f.k].float(), Vh[: f.k].mT.float()


def _psoft(f: Factors) -> tuple[Tensor, ...]:
    A, B = peers.fresh("PSOFT", f)._get_psoft_ab_cache_buffers("default")
    return B, torch.ones_like(f.delta), A.mT
