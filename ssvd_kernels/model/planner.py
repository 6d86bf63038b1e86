"""Chooses the rank of each layer so that a method stays within a budget of trainable parameters."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..basis.factorize import check_weight
from ..basis.linears import base_weight, features, parameter_count
from ..config import ALLOCATIONS, METHODS, Allocation, Config, Method, SpectralFTConfig, SSVDConfig, check_choice
from ..layers.base import check_not_adapted
from .budget import PEFT_METHODS, Shape, inner_outer, ranks, trainable
from .targets import find_targets

OPTIONS: dict[str, dict[str, Any]] = {  # of the methods that have any, with their defaults
    "ssvd": {"side": "input", "rotation": "cayley", "form": "auto"},
    "ssvd-o": {"inner_share": 0.5, "rotation": "cayley", "form": "auto"},
    "spectralft": {"top": 256},
}
_ALLOWED = {
    "side": ("input", "output", "smaller"), "rotation": ("cayley", "linear", "free"),
    "form": ("weight", "activation", "auto"),
}  # fmt: skip
_RANK = {"ssvd": "k", "ssvd-o": "k", "svft": "band", "oft": "block"}  # what a rank is called, if not r


class PlannedLayer(NamedTuple):
    """A targeted layer: its weight's shape (d_out, d_in), its rank (see `budget.trainable`) and parameter count."""

    name: str
    shape: Shape
    rank: int
    rank_out: int | None
    trainable: int


@dataclass(frozen=True)
class RankPlan:
    """What `plan` chose: a rank for each targeted layer. `inject(model, plan)` adapts a model so; str() is a table.

    method, options     the method and its options, as resolved
    allocation, threshold   the rule, and the ratio, share or rank that it came to: see `plan`
    budget, total       trainable parameters allowed, and the parameters of the model
    largest             whether no layer can have a higher rank, whatever the budget
    """

    method: str
    options: dict[str, Any]
    allocation: str
    threshold: float
    budget: int
    total: int
    largest: bool
    targets: str | Sequence[str]
    exclude: str | Sequence[str]
    layers: tuple[PlannedLayer, ...]

    @property
    def trainable(self) -> int:
        """Trainable parameters of all layers."""
        return sum(layer.trainable for layer in self.layers)

    def __str__(self) -> str:
        groups: dict[tuple, list[PlannedLayer]] = {}
        for layer in self.layers:
            groups.setdefault(layer[1:], []).append(layer)
        table = [("layers", "weight", _RANK.get(self.method, "r"), "parameters each", "parameters", "")]
        for members in groups.values():
            first, n = members[0], len(members)
            rank = str(first.rank) if first.rank_out is None else f"{first.rank}+{first.rank_out}"
            names = first.name + (", ..." if n > 1 else "")
            parameters = (f"{first.trainable:,}", f"{n * first.trainable:,}")
            table.append((str(n), "x".join(map(str, first.shape)), rank, *parameters, names))
        widths = [max(map(len, column)) for column in zip(*table)][:-1]
        rows = ["  ".join(["", *map(str.rjust, row, widths), row[-1]]).rstrip() for row in table]
        options = "".join(f", {name}={value}" for name, value in self.options.items() if value != "auto")
        unused = self.budget - self.trainable
        foot = (
            f"{len(self.layers)} layers, {self.trainable:,} trainable parameters: "
            f"{100 * self.trainable / self.total:.2f} % of the model's {self.total:,} parameters, {unused:,} "
            f"({100 * unused / self.budget:.2f} %) under the budget of {self.budget:,}"
        )
        if self.largest:
            foot += f"; no budget gives {self.method}{options} higher ranks here"
        return "\n".join([f"{self.method}{options}; {self.allocation}: {self._rule()}", *rows, foot])

    def _rule(self) -> str:
        if self.allocation == "spectrum":
            return f"the top k hold more than {100 * self.threshold:.4g} % of ||W||^2"
        if self.method in ("ssvd", "ssvd-o"):
            return f"k = {100 * self.threshold:.1f} % of min(d_out, d_in)"
        return f"{_RANK.get(self.method, 'r')} = {self.threshold:.0f}"

    def assign(self, model: nn.Module) -> dict[str, tuple[nn.Module, Config]]:
        """Module name -> (layer of `model`, its configuration), as `inject` uses them.

        Raises ValueError if the model's targeted layers are not those of the plan, or PEFT provides the method.
        """
        if self.method in PEFT_METHODS:
            raise ValueError(
                f"`config` must not be a plan for method={self.method!r}, which the peft package provides: "
                "use peft.get_peft_model(model, plan.peft_config(model))"
            )
        targets = self._targets(model)
        return {layer.name: (targets[layer.name], self._config(layer)) for layer in self.layers}

    def _targets(self, model: nn.Module) -> dict[str, nn.Module]:
        targets = find_targets(model, _targeting(self.targets, self.exclude))
        planned, found = {layer.name: layer.shape for layer in self.layers}, _shapes(targets)
        if planned != found:
            differing = [name for name in {**planned, **found} if planned.get(name) != found.get(name)]
            raise ValueError(
                f"the plan has {len(planned)} layers, but its targets match {len(found)} layers of this "
                f"{type(model).__name__}; they differ, e.g. in {differing[0]!r}: make a plan for this model"
            )
        return targets

    def _config(self, layer: PlannedLayer) -> Config:
        if self.method == "svft":
            return SSVDConfig(ratio=1.0, rotation="banded", band=layer.rank)
        if self.method == "spectralft":
            return SpectralFTConfig(top=min(self.options["top"], *layer.shape), rank=layer.rank)
        options = {name: value for name, value in self.options.items() if name != "inner_share"}
        if self.method == "ssvd-o":
            options["side"] = "both"
        return SSVDConfig(rank=layer.rank, rank_out=layer.rank_out, **options)

    def peft_config(self, model: nn.Module, **kwargs: Any) -> Any:
        """PEFT's configuration of the plan: for these layers, of this rank (block size), and else PEFT's defaults.

        kwargs: further arguments of that configuration, e.g. lora_alpha, which PEFT does not derive from r. Those that
        train something else as well (bias, modules_to_save, use_dora, psoft_orth, ...) add to what was planned.
        Raises ValueError for a method that PEFT does not provide and for a model that has other layers than the plan,
        and TypeError for an argument that is planned.
        """
        if self.method not in PEFT_METHODS:
            raise ValueError(f"a plan for method={self.method!r} has no PEFT configuration: use inject(model, plan)")
        self._targets(model)
        import peft

        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "lora": (peft.LoraConfig, {}),
            "dora": (peft.LoraConfig, {"use_dora": True}),
            "pissa": (peft.LoraConfig, {"init_lora_weights": "pissa"}),
            "vera": (peft.VeraConfig, {}),
            "oft": (peft.OFTConfig, {}),
            "psoft": (peft.PsoftConfig, {}),
        }
        kind, planned = kinds[self.method]
        planned["oft_block_size" if self.method == "oft" else "r"] = self.layers[0].rank
        # not a list: PEFT takes its items for suffixes, and another layer's name may end as one of these does
        planned["target_modules"] = "|".join(re.escape(layer.name) for layer in self.layers)
        return kind(**planned, **kwargs)


def plan(
    model: nn.Module,
    *,
    budget: float,
    method: Method = "ssvd",
    allocation: Allocation = "uniform",
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    progress: bool = True,
    **options: Any,
) -> RankPlan:
    """The highest ranks of `method` in the targeted layers of `model` that train at most `budget` parameters.

    budget       number of trainable parameters, an integer > 1, or a share in (0, 1) of the model's parameters.
                 One that is larger than the method can use gives the largest plan, which says so.
    method       "ssvd" (options: side= "input", "output" or "smaller"; rotation=; form=), "ssvd-o" (inner_share= the
                 input side's share, in [0, 1], of the rotations' parameters; rotation=; form=), "svft", "spectralft"
                 (top=); and, with one rank for all layers, the peft package's "lora", "dora", "pissa", "vera", "oft"
                 and "psoft". form: as in SSVDConfig. `budget.trainable` has formulas and sources.
    allocation   "uniform": one ratio k / min(d_out, d_in) for all layers (SSVD's paper; of SSVD-O the larger k), or
                 one rank, band or block size where a method has no ratio; no less than 1, no more than fits a layer.
                 "spectrum" (SSVD and SSVD-O): the fewest singular values that hold more than a share of the layer's
                 ||W||^2, the same for all layers: what stays frozen has the same relative size everywhere. Computes
                 the singular values of every layer in float64, O(d_out d_in min(d_out, d_in)) each. A step then
                 launches the rotations' kernels for each group of similar ranks, not once for all layers.
    targets, exclude   as in SSVDConfig.

    Ratio and share are the largest that stay within the budget. "uniform" reads no weights: a model on the meta device
    will do. Nothing of the model changes. Raises ValueError or TypeError naming the argument, its value and what is
    allowed: also for a budget below that of the lowest ranks, and for a model that has SSVD layers already.
    """
    check_choice("method", method, METHODS)
    check_choice("allocation", allocation, ALLOCATIONS)
    if allocation == "spectrum" and method not in ("ssvd", "ssvd-o"):
        raise ValueError(f"allocation='spectrum' requires method='ssvd' or 'ssvd-o', got method={method!r}")
    options = _resolved(method, options)
    check_not_adapted(model)
    total = parameter_count(model)
    allowed = _parameters(budget, total)
    wanted = _targeting(targets, exclude)
    linears = find_targets(model, wanted)
    shapes = _shapes(linears)
    choices = _choices(method, set(shapes.values()), options)
    if allocation == "spectrum":
        bar = tqdm(linears.items(), desc="plan: singular values", disable=not progress)
        marks = {name: _held_before(base_weight(linear, name), name) for name, linear in bar}
    else:
        marks = {name: _marks(method, shape, choices[shape]) for name, shape in shapes.items()}
    ladders = {name: _Ladder(marks[name], choices[shape]) for name, shape in shapes.items()}
    threshold = _largest_threshold(list(ladders.values()), allowed)
    if threshold is None:
        smallest = sum(ladder.choices[0].trainable for ladder in ladders.values())
        raise ValueError(
            f"`budget` must be at least {smallest:,} trainable parameters for method={method!r} and these "
            f"{len(linears)} layers, got {budget!r}, i.e. {allowed:,}"
        )
    chosen = {name: ladder.at(threshold) for name, ladder in ladders.items()}
    return RankPlan(
        method=method,
        options=options,
        allocation=allocation,
        threshold=threshold,
        budget=allowed,
        total=total,
        largest=all(choice is ladders[name].choices[-1] for name, choice in chosen.items()),
        targets=wanted.targets,
        exclude=wanted.exclude,
        layers=tuple(PlannedLayer(name, shapes[name], *choice) for name, choice in chosen.items()),
    )


class _Choice(NamedTuple):
    rank: int
    rank_out: int | None
    trainable: int


class _Ladder(NamedTuple):
    """A layer's choices, ascending, and the threshold from which each applies (the first always does)."""

    marks: Sequence[float]
    choices: Sequence[_Choice]

    def at(self, threshold: float) -> _Choice:
        return self.choices[max(bisect_right(self.marks, threshold) - 1, 0)]


def _largest_threshold(ladders: Sequence[_Ladder], budget: int) -> float | None:
    """The largest threshold at which all layers together stay within the budget; None if there is none."""
    thresholds = sorted({0.0, *(mark for ladder in ladders for mark in ladder.marks)})
    keeping = bisect_right(thresholds, budget, key=lambda t: sum(ladder.at(t).trainable for ladder in ladders))
    return thresholds[keeping - 1] if keeping else None


def _choices(method: str, shapes: set[Shape], options: dict[str, Any]) -> dict[Shape, list[_Choice]]:
    top = {name: value for name, value in options.items() if name == "top"}
    rotation = {name: value for name, value in options.items() if name == "rotation"}
    found: dict[Shape, list[_Choice]] = {}
    for shape, values in ranks(method, shapes, **top).items():
        if not values:
            widths = sorted({d_in for _, d_in in shapes})
            raise ValueError(
                f"method={method!r} requires a block size > 1 that divides every d_in, but {widths} have no common "
                "divisor > 1: leave out some of these layers with targets or exclude"
            )
        pairs: list[tuple[int, int | None]] = [(rank, None) for rank in values]
        if method == "ssvd-o":
            pairs = [inner_outer(rank, options["inner_share"], options["rotation"]) for rank in values]
        found[shape] = [_Choice(r, r_out, trainable(method, shape, r, r_out, **rotation, **top)) for r, r_out in pairs]
    return found


def _marks(method: str, shape: Shape, choices: Sequence[_Choice]) -> list[float]:
    """The common ratio, or rank, at which a layer has each choice."""
    scale = min(shape) if method in ("ssvd", "ssvd-o") else 1
    return [max(choice.rank, choice.rank_out or 0) / scale for choice in choices]


def _held_before(weight: Tensor, name: str) -> list[float]:
    """The share of ||W||^2 that the top k - 1 singular values hold, for each k from 1 on."""
    check_weight(weight, f"{name}.weight")
    W = weight.detach()
    W = (W.to("cpu") if W.device.type == "mps" else W).to(torch.float64)  # mps has no float64
    held = torch.linalg.svdvals(W).square().cumsum(0)
    return [0.0, *(held / held[-1]).nan_to_num(1.0)[:-1].tolist()]  # weights of zeros have no share to go by


def _resolved(method: str, given: dict[str, Any]) -> dict[str, Any]:
    known = OPTIONS.get(method, {})
    for name, value in given.items():
        if name not in known:
            choices = ", ".join(known) or "none"
            raise TypeError(f"method={method!r} has no option `{name}` (options: {choices}), got {value!r}")
    options = {**known, **given}
    for name, allowed in _ALLOWED.items():
        if name in options:
            check_choice(name, options[name], allowed)
    match options:
        case {"inner_share": share} if type(share) not in (int, float) or not 0 <= share <= 1:
            raise ValueError(f"`inner_share` must be a number in [0, 1], got {share!r}")
        case {"top": top} if type(top) is not int or top < 1:
            raise ValueError(f"`top` must be an integer >= 1, got {top!r}")
    return options


def _parameters(budget: float, total: int) -> int:
    """The budget in trainable parameters."""
    message = f"`budget` must be an integer > 1, or a share of the model's parameters in (0, 1), got {budget!r}"
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(message)
    if isinstance(budget, int) and budget > 1:
        return budget
    if 0 < budget < 1:
        return int(total * budget)
    raise ValueError(message)


def _targeting(targets: str | Sequence[str], exclude: str | Sequence[str]) -> SSVDConfig:
    """For `find_targets`, which reads nothing else of it."""
    return SSVDConfig(rank=1, targets=targets, exclude=exclude)


def _shapes(linears: dict[str, nn.Module]) -> dict[str, Shape]:
    return {name: features(linear)[::-1] for name, linear in linears.items()}
