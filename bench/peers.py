"""Other methods by Hugging Face PEFT (LoRA, OFT, PSOFT) and torch's own orthogonal parametrization.

Their adapters hold small random numbers, so that nothing is skipped. PSOFT trains an orthogonal map between the top-k
singular vectors as SSVD does: it is given the known factors instead of a factorisation of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench.layers import Factors, linear
from bench.work import OFT_BLOCK, lora_rank

CONFIGS = {"LoRA": "LoraConfig", "OFT": "OFTConfig", "PSOFT": "PsoftConfig"}
PEERS = ("LoRA r16", "LoRA r32", "OFT", "PSOFT")
SPREAD = 0.02  # of the random numbers that are added to an adapter's


def absent(name: str) -> str:
    """Why this machine does not have the peer, or nothing."""
    try:
        import peft
    except Exception as error:  # it fails in many ways where its own dependencies do not fit
        return f"peft: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    kind = CONFIGS[name.partition(" ")[0]]
    return "" if hasattr(peft, kind) else f"peft {peft.__version__} has no {kind}"


def fresh(name: str, f: Factors) -> nn.Module:
    """One layer as PEFT makes it: LoRA and PSOFT without a scale of their own, PSOFT of rank k, OFT of its defaults."""
    return _injected(name, nn.Sequential(linear(f)), ["0"], f.k).get_submodule("0")


def layer(name: str, f: Factors) -> nn.Module:
    """One layer after some training."""
    return inject(name, nn.Sequential(linear(f)), ["0"], {tuple(f.weight.shape): f}).get_submodule("0")


def inject(name: str, model: nn.Module, targets: Sequence[str], known: Mapping[tuple[int, ...], Factors]) -> nn.Module:
    """Adapts the linear layers `targets` of `model` in place; `known` has the factors of each shape of weight."""
    with _known_factors(known) if name == "PSOFT" else nullcontext():
        model = _injected(name, model, targets, next(iter(known.values())).k)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(SPREAD * torch.randn_like(parameter))
    return model


def _injected(name: str, model: nn.Module, targets: Sequence[str], k: int) -> nn.Module:
    import peft

    kind = name.partition(" ")[0]
    if kind == "LoRA":
        settings = {"r": lora_rank(name), "lora_alpha": lora_rank(name)}
    else:
        settings = {"oft_block_size": OFT_BLOCK} if kind == "OFT" else {"r": k, "psoft_alpha": k}
    config = getattr(peft, CONFIGS[kind])(target_modules=list(targets), **settings)
    return peft.inject_adapter_in_model(config, model)


def _known_factors(known: Mapping[tuple[int, ...], Factors]) -> AbstractContextManager[Any]:
    from peft.tuners.psoft.layer import Linear

    def factors(self: Any, weight: Tensor, r: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        U, sigma, V = (tensor.clone() for tensor in known[tuple(weight.shape)].top())
        return U, sigma, V.mT

    return mock.patch.object(Linear, "_compute_svd_factors", factors)


class Orthogonal(nn.Module):
    """G of each theta (B, m) by torch.nn.utils.parametrizations.orthogonal(orthogonal_map="cayley").

    It maps a triangle X to (I - A/2)^-1 (I + A/2), A = X - X^T: X = -2 K gives our G. On the CPU one module a matrix.
    """

    def __init__(self, K: Tensor) -> None:
        super().__init__()
        parts = [-2 * K] if K.device.type == "cuda" else [-2 * row for row in K]
        self.parts = nn.ModuleList(map(self._part, parts))

    @staticmethod
    def _part(X: Tensor) -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(X)
        orthogonal = torch.nn.utils.parametrizations.orthogonal
        return orthogonal(module, orthogonal_map="cayley", use_trivialization=False)

    def forward(self) -> Tensor:
        found = [part.weight for part in self.parts]
        return found[0] if found[0].ndim == 3 else torch.stack(found)
