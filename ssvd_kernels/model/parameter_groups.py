"""Learning rates for layers of different ranks."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..config import check_integer
from .lookup import ssvd_layers

EXPONENT = 1.5


def parameter_groups(model: nn.Module, lr: float, k_ref: int = 153) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: `lr` is the learning rate at rank k_ref, lr (k_ref / k)^1.5 that at rank k.

        optimizer = torch.optim.AdamW(sk.parameter_groups(model, lr=2e-4), weight_decay=0.0)

    One group for each rank, of the parameters that require gradients: theta and delta_sigma of the layers that SSVD
    rotates by k x k matrices (side="both": theta by the inner rank, theta_out by the outer one, delta_sigma by the
    larger). What else trains has a group at `lr`: modules_to_save, and layers of SVFT and SpectralFT, whose rates were
    not measured. Schedulers that multiply the groups' rates keep the ratios. Also for PEFT's models.

    Source: measured here on Whisper tiny.en and base at k = 48 to 242 under three domain shifts: of the exponents tried
    1.5 loses least (experiments/asr/results/README.md). Adam moves each entry of theta by about its rate, and the sum
    of |dL / d theta| over the k (k - 1) / 2 entries grows as k^1.5. At smaller ranks it extrapolates (at k = 8 to 84
    times `lr`): there, pass a k_ref among the model's own ranks.

    Raises TypeError or ValueError for an `lr` or `k_ref` that is not positive, and ValueError if no rotation trains.
    """
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
        raise ValueError(f"`lr` must be a number > 0, got {lr!r}")
    check_integer("k_ref", k_ref)
    ranks: dict[nn.Parameter, int | None] = {}
    for layer in ssvd_layers(model).values():
        if layer.rotation != "banded":
            own = {"theta": layer.k_in, "theta_out": layer.k_out}
            ranks |= {parameter: own.get(name, layer.k) for name, parameter in layer.adapter().items()}
    groups: dict[int | None, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(ranks.get(parameter), []).append(parameter)
    if not any(groups):
        raise ValueError(f"`model` ({type(model).__name__}) has no SSVD rotation that trains: call inject() first")
    return [
        {"params": members, "lr": lr if k is None else lr * (k_ref / k) ** EXPONENT} for k, members in groups.items()
    ]
