"""Reports which adapted layers a loss reaches, and which it silently does not."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# an adapter's Parameter, also inside a wrapper that adds a prefix or the adapter's name; not SpectralFT's A_in and
# A_out, whose gradients are zero before training, as B is
_TRAINED = re.compile(r"(?:(?P<layer>.+)\.)?(?:ssvd_)?(?:theta|theta_out|delta_sigma|B_in|B_out)(?:\.[^.]+)?")


@dataclass
class TrainingReport:
    """Names of the adapted layers by what the loss gave them; a layer is in one list.

    ok         every Parameter has a finite gradient that is not zero
    none       no Parameter has a gradient: the loss does not depend on the layer
    zero       some Parameter has only zeros, or none
    nonfinite  some gradient holds NaN or infinity
    """

    ok: list[str] = field(default_factory=list)
    none: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lists = {
            "without any gradient": self.none,
            "with gradients of zero": self.zero,
            "with NaN or infinity in a gradient": self.nonfinite,
        }
        total = len(self.ok) + sum(map(len, lists.values()))
        head = f"the loss trains {len(self.ok)} of {total} adapted layers"
        return "\n".join([head, *(f"  {what}: {_listed(names)}" for what, names in lists.items() if names)])


def check_training(model: nn.Module, loss: Tensor | None = None) -> TrainingReport:
    """Tells which adapted layers of `model` a loss trains. Print it after the first batch.

    loss: a scalar whose graph still exists. It is differentiated without touching any `.grad`, and can be
    differentiated again afterwards. Without it, the `.grad` that `loss.backward()` left are read.

    A layer without gradient is one that the model does not call, or whose weight it reads other than by `weight`, the
    effective one. At initialisation, too, gradients of zero are suspicious: theta (of SpectralFT, B) is zero there, its
    gradient is not. But a layer that LayerDrop left out has zeros (the rotations of all layers are computed in one
    batch), so check in eval mode or with LayerDrop off. Works on models whose layers are wrapped (PEFT), as it goes by
    parameter names.
    Raises ValueError if the model has no adapted layer that trains, for a loss that is not a scalar, and for one that
    went through reentrant checkpointing, whose graph shows no parameters: check after its backward, without it.
    """
    layers: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        found = _TRAINED.fullmatch(name)
        if found and parameter.requires_grad and parameter.numel():  # at k = 1 theta has no elements
            layers.setdefault(found["layer"] or type(model).__name__, []).append(parameter)
    if not layers:
        raise ValueError(f"`model` ({type(model).__name__}) has no trainable SSVD layer: call inject() first")
    parameters = [parameter for members in layers.values() for parameter in members]
    gradients = [parameter.grad for parameter in parameters] if loss is None else _differentiate(loss, parameters)
    left = iter(gradients)
    report = TrainingReport()
    for name, members in layers.items():
        getattr(report, _judge([next(left) for _ in members])).append(name)
    return report


def _differentiate(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    if loss.numel() != 1:
        raise ValueError(f"`loss` must be a scalar, got shape {tuple(loss.shape)}")
    if not loss.requires_grad:  # it depends on nothing that trains
        return [None] * len(parameters)
    if _checkpointed_reentrantly(loss):
        raise ValueError(
            "`loss` has parts without a graph, because they were checkpointed with use_reentrant=True: call "
            "loss.backward() first, then check_training(model) without the loss"
        )
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))


def _checkpointed_reentrantly(loss: Tensor) -> bool:
    left, seen = [loss.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            return True
        left += [following for following, _ in node.next_functions]
    return False


def _judge(gradients: list[Tensor | None]) -> str:
    if any(grad is not None and not bool(torch.isfinite(grad).all()) for grad in gradients):
        return "nonfinite"
    if all(grad is None for grad in gradients):
        return "none"
    return "ok" if all(grad is not None and bool(grad.any()) for grad in gradients) else "zero"


def _listed(names: list[str], most: int = 6) -> str:
    return f"{len(names)} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
