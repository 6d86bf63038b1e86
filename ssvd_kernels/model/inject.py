"""Adapts a model in place."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..basis.batch import Plan, factorize_all
from ..basis.factorize import Factorization, check_weight
from ..basis.linears import base_weight, check_adaptable, features, parameter_count
from ..config import Config
from ..layers.adapt import adapt, check_basis, check_method
from ..layers.adapter import Adapter
from ..layers.base import AdaptedLinear, check_not_adapted, module_paths
from ..layers.saved import SavedModule
from .lookup import check_not_ddp, replace_modules
from .planner import RankPlan
from .rotations import watch_forwards
from .saving import guard_saving, warn_of_adapter_beside
from .targets import find_saved, find_targets

KINDS = {nn.Linear: "linear layers", _ConvNd: "convolutions", nn.Module: "other matrices"}  # the first that fits


@dataclass
class InjectReport:
    """What `inject` did: adapted module names, and counts of trainable and of all (base + trainable) parameters.

    modules_to_save: name and parameter count of each module that trains whole.
    left_out: by kind ("linear layers", "convolutions", "other matrices", e.g. of experts or raw attention weights) the
    name and size of each weight that was not adapted; no embeddings.
    """

    modules: list[str]
    trainable: int
    total: int
    modules_to_save: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(repr=False, default_factory=dict)
    layers: list[AdaptedLinear] = field(repr=False, default_factory=list)

    def __str__(self) -> str:
        kinds = Counter(f"{layer.out_features}x{layer.in_features}, {layer.summary()}" for layer in self.layers)
        rows = [f"  {count:4d} x {kind}" for kind, count in kinds.items()]
        head = (
            f"{len(self.modules)} layers adapted, {self.trainable:,} trainable of {self.total:,} parameters "
            f"({100 * self.trainable / self.total:.2f} %)"
        )
        if self.modules_to_save:
            names, count = list(self.modules_to_save), sum(self.modules_to_save.values())
            rows.append(f"  trained whole: {len(names)} modules ({count:,} parameters), e.g. {names[0]}")
        for kind, sizes in self.left_out.items():
            share = 100 * sum(sizes.values()) / self.total
            rows.append(f"  left out: {len(sizes)} {kind} ({share:.1f} % of the parameters), e.g. {next(iter(sizes))}")
        return "\n".join([head, *rows])


def inject(
    model: nn.Module,
    config: Config | RankPlan,
    *,
    progress: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    share: bool = True,
) -> InjectReport:
    """Replaces the linear layers that `config` targets by SSVDLinear (by SpectralFTLinear for a SpectralFTConfig), in
    place, and freezes all other parameters.

    config: an SSVDConfig, a SpectralFTConfig, or what `plan` made for this model, with ranks of its own for each layer.
    The weights are factorised here, in float64 on their own device, with a progress bar. The rotations of all layers
    are computed in one batched call at the start of each forward of `model`. Linear layers that bitsandbytes or torchao
    quantised become SSVDQuantizedLinear; SpectralFT refuses them.
    cache_dir: a folder that caches factorisations across runs (default: the environment's SSVD_CACHE, else none).
    share: where torch.distributed is initialised, every process must call this, on the same weights; each factorises a
    part and sends it to all. With share=False each factorises everything.
    Nothing changes if anything is refused: ValueError or TypeError name the module, the value and what is allowed (no
    module matched, a tied weight named explicitly, NaN or infinite weights, a rank that does not fit, a second
    injection, modules to save that do not exist or are tied, a model wrapped by DDP or FSDP2 already, processes that
    hold different weights, a plan for other layers or for a method that PEFT provides).
    """
    if not isinstance(config, Config | RankPlan):
        raise TypeError(f"`config` must be an SSVDConfig, a SpectralFTConfig or a RankPlan, got {config!r}")
    check_not_ddp(model)
    check_not_adapted(model)
    warn_of_adapter_beside(model)
    if isinstance(model, nn.Linear):
        raise ValueError(
            "`model` is itself a linear layer, which cannot be replaced in place: use SSVDLinear.from_linear"
        )
    saved = {}
    if isinstance(config, RankPlan):
        plan = config.assign(model)
    else:
        saved = find_saved(model, config)
        plan = {name: (linear, config) for name, linear in find_targets(model, config).items()}
    for name, (linear, layer_config) in plan.items():
        check_adaptable(linear, name)
        check_method(linear, layer_config, name)
        check_weight(base_weight(linear, name), f"{name}.weight")
        try:
            layer_config.triplets(*features(linear))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return install(model, plan, factorize_all(plan, progress, cache_dir, share), saved=saved)


def install(
    model: nn.Module,
    plan: Plan,
    found: Mapping[str, Factorization],
    make: Callable[[Any, Any, Factorization], AdaptedLinear] = adapt,
    saved: Mapping[str, nn.Module] = MappingProxyType({}),
) -> InjectReport:
    """The part of `inject` that changes the model, given the factorisations; `make` makes each layer; `saved` train."""
    linears = {linear for linear, _ in plan.values()}
    for module in model.modules():
        if module._modules.get("_orig_mod") in linears:
            raise ValueError("`model` has a linear layer that torch.compile wraps by itself: adapt it before compiling")
    for name, (linear, config) in plan.items():
        check_basis(linear, config, found[name], name)
    trainable_before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    total = parameter_count(model)
    model.requires_grad_(False)
    layers = {name: make(linear, config, found[name]) for name, (linear, config) in plan.items()}
    replace_modules(model, {plan[name][0]: layer for name, layer in layers.items()})
    whole = {}
    for name, module in saved.items():
        SavedModule.train_whole(module)
        whole[name] = sum(parameter.numel() for parameter in module._parameters.values() if parameter is not None)
    watch_forwards(model, trainable_before)
    guard_saving(model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total += trainable - sum(whole.values())
    left_out = _left_out(model, set(saved.values()))
    return InjectReport(list(layers), trainable, total, whole, left_out, list(layers.values()))


def _left_out(model: nn.Module, saved: Collection[nn.Module]) -> dict[str, dict[str, int]]:
    """Kind -> name -> size of every matrix that neither an adapted layer nor one of `saved` holds."""
    others = (layer for layer in model.modules() if isinstance(layer, (Adapter, nn.Embedding)) or layer in saved)
    seen = {id(parameter) for other in others for part in other.modules() for parameter in part._parameters.values()}
    found: dict[str, dict[str, int]] = {}
    for path, module in module_paths(model):
        kind = next(kind for cls, kind in KINDS.items() if isinstance(module, cls))
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                size = parameter.numel()
                if isinstance(module, nn.Linear):
                    size = module.out_features * module.in_features  # not as packed
                found.setdefault(kind, {})[f"{path}.{name}".lstrip(".")] = size
    return found
