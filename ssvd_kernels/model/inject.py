"""Adapting a whole model: inject, merge, unmerge, remove; one batched rotation per forward."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from ..basis.cache import cache_folder, load, store
from ..basis.distributed import Task, Tasks, several_ranks, share_out
from ..basis.factorize import Factorization, check_weight, factorize
from ..basis.linears import base_weight, parameter_count
from ..basis.truncated_svd import cost
from ..config import Config
from ..layers.base import AdaptedLinear, adapted_layers, check_not_adapted, check_own
from ..layers.handover import HandedRotations
from ..layers.quantized import SSVDQuantizedLinear, adapt, check_method, forget_quantization, prevent_repacking
from ..layers.ssvd import SSVDLinear
from ..ops.functional import rotation_deltas
from ..ops.weight_cache import InputSharing
from .planner import RankPlan
from .targets import find_targets

_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"  # tqdm's own, without the cost's digits


@dataclass
class InjectReport:
    """What `inject` did: adapted module names, and numbers of trainable and of all (base + trainable) parameters."""

    modules: list[str]
    trainable: int
    total: int
    layers: list[AdaptedLinear] = field(repr=False, default_factory=list)

    def __str__(self) -> str:
        kinds = Counter(f"{layer.out_features}x{layer.in_features}, {layer.summary()}" for layer in self.layers)
        rows = [f"  {count:4d} x {kind}" for kind, count in kinds.items()]
        head = (
            f"{len(self.modules)} layers adapted, {self.trainable:,} trainable of {self.total:,} parameters "
            f"({100 * self.trainable / self.total:.2f} %)"
        )
        return "\n".join([head, *rows])


@dataclass
class _Root:
    """What `inject` remembers on the module that it was given."""

    trainable_before: list[str]
    sharing: InputSharing = field(default_factory=InputSharing)


def ssvd_layers(model: nn.Module) -> dict[str, SSVDLinear]:
    """Name -> SSVDLinear for every layer of `model` that is adapted by SSVD (or SVFT)."""
    return {name: layer for name, layer in adapted_layers(model).items() if isinstance(layer, SSVDLinear)}


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
    cache_dir: a folder that keeps factorisations for the next time (default: the environment's SSVD_CACHE, else none).
    share: where torch.distributed is initialised, every rank must call this, on the same weights; each factorises a
    part and sends it to all. share=False has a rank factorise everything alone.
    Nothing changes if anything is refused: ValueError or TypeError name the module, the value and what is allowed (no
    module matched, a tied weight named explicitly, NaN or infinite weights, a rank that does not fit, a second
    injection, a model wrapped by DDP or FSDP2 already, ranks that hold different weights, a plan of other layers or of
    a method of PEFT's).
    """
    if not isinstance(config, Config | RankPlan):
        raise TypeError(f"config={config!r}: allowed is an SSVDConfig, a SpectralFTConfig or a RankPlan")
    check_not_ddp(model)
    check_not_adapted(model)
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model is itself a linear layer, which cannot be replaced in place: use SSVDLinear.from_linear"
        )
    if isinstance(config, RankPlan):
        plan = config.assign(model)
    else:
        plan = {name: (linear, config) for name, linear in find_targets(model, config).items()}
    for name, (linear, layer_config) in plan.items():
        check_method(linear, layer_config, name)
        check_weight(base_weight(linear, name), f"{name}.weight")
        try:
            layer_config.triplets(linear.in_features, linear.out_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return install(model, plan, factorize_all(plan, progress, cache_dir, share))


Plan = Mapping[str, tuple[nn.Linear, Config]]  # module name -> the layer and how to adapt it


def factorize_all(
    plan: Plan, progress: bool, cache_dir: str | os.PathLike[str] | None = None, share: bool = True
) -> dict[str, Factorization]:
    """The factorisation of each planned layer, from the cache or made one by one; shared out over ranks (`inject`)."""
    folder = cache_folder(cache_dir)
    tasks = {}
    for name, (linear, config) in plan.items():
        d_in, d_out = linear.in_features, linear.out_features
        k = config.triplets(d_in, d_out)
        tasks[name] = Task(partial(base_weight, linear, name), k, cost(d_out, d_in, k))
    if share and several_ranks():
        return share_out(tasks, partial(_factorize_each, folder=folder, progress=progress and dist.get_rank() == 0))
    return _factorize_each(tasks, folder, progress)


def _factorize_each(tasks: Tasks, folder: Path | None, progress: bool) -> dict[str, Factorization]:
    cached = {} if folder is None else {name: load(folder, task.weight(), task.k) for name, task in tasks.items()}
    found = {name: entry for name, entry in cached.items() if entry is not None}
    missing = {name: task for name, task in tasks.items() if name not in found}
    total = sum(task.cost for task in missing.values())
    # by cost, not by layer, so that the time that is left is not a guess
    with tqdm(total=total, desc="factorising", bar_format=_BAR, smoothing=0, disable=not (progress and missing)) as bar:
        for number, (name, task) in enumerate(missing.items(), 1):
            found[name] = factorize(task.weight(), task.k, f"{name}.weight")
            if folder is not None:
                store(folder, task.weight(), found[name])
            bar.set_postfix_str(f"{number} of {len(missing)} layers", refresh=False)
            bar.update(task.cost)
    return found


def install(
    model: nn.Module,
    plan: Plan,
    found: Mapping[str, Factorization],
    make: Callable[[nn.Linear, Any, Factorization], AdaptedLinear] = adapt,
) -> InjectReport:
    """The part of `inject` that changes the model, given the factorisations; `make` makes each layer."""
    trainable_before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    total = parameter_count(model)
    model.requires_grad_(False)
    layers = {name: make(linear, config, found[name]) for name, (linear, config) in plan.items()}
    for name, layer in layers.items():
        _replace(model, name, layer)
    watch_forwards(model, trainable_before)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return InjectReport(list(layers), trainable, total + trainable, list(layers.values()))


def merge(model: nn.Module, unload: bool = False, *, rounding: str = "nearest") -> None:
    """Fixes W' = W + U core V^T in every SSVD layer. W is kept, so that `unmerge` is exact.

    unload=True leaves plain nn.Linear layers that hold W' instead (their base weights are gone); in place of quantised
    ones in the dtype of the rest of the model, which transformers then saves as a plain one.
    rounding="stochastic" rounds a bfloat16 W' as the composed mode of the Triton kernels does, up or down by a fixed
    hash: no small update is lost (its projection on the true one is 1.00 +- 0.02 from ||K|| = 1e-4 on), but rounding
    costs up to 2.3e-3 of ||W|| instead of 1.7e-3. It affects no other dtype, and no layer that is merged already.
    (Autocast rounds a merged float32 W' to nearest in every call, like any weight: unmerged, small updates survive.)
    Raises ValueError, with nothing changed, if there is no SSVD layer, FSDP2 has sharded one, a W' would not be finite,
    or `rounding` is unknown, and for a quantised base unless unload=True. Warns if a half-precision W' loses the update
    to rounding.
    """
    layers = whole_layers(model)
    quantized = [layer for layer in layers.values() if isinstance(layer, SSVDQuantizedLinear)]
    for layer in quantized:
        layer.unloaded_dtype = getattr(model, "dtype", None)  # transformers' models have one; quantised layers took any
    composed = {name: layer.composed_for_merge(name, rounding, unload) for name, layer in layers.items()}
    if unload:
        _take_out(model, {name: layers[name].unloaded(weight) for name, weight in composed.items()})
        if quantized:
            forget_quantization(model)
        return
    for name, weight in composed.items():
        layers[name].merge(weight)


def unmerge(model: nn.Module) -> None:
    """Undoes `merge` exactly: the untouched base weights were kept. Raises ValueError if there is no SSVD layer."""
    for layer in require_layers(model).values():
        layer.unmerge()


def remove(model: nn.Module) -> None:
    """Puts the original nn.Linear modules back, weights bit for bit, and makes trainable what was so before inject."""
    _take_out(model, {name: layer.original() for name, layer in whole_layers(model).items()})


def _take_out(model: nn.Module, replacements: Mapping[str, nn.Linear]) -> None:
    for name, linear in replacements.items():
        _replace(unwrapped(model), name, linear)
    for module in list(_roots(model)):
        parameters = dict(module.named_parameters())
        for name in unwatch_forwards(module):
            if name in parameters:
                parameters[name].requires_grad_(True)


def watch_forwards(root: nn.Module, trainable_before: Iterable[str] = ()) -> None:
    """From now on one batched call computes the rotations of all SSVD layers at the start of each forward of `root`."""
    prevent_repacking(root)
    root.__dict__["_ssvd_root"] = _Root(list(trainable_before))
    root.register_forward_pre_hook(_hand_out_rotations)
    root.register_forward_hook(_end_of_forward, always_call=True)


def unwatch_forwards(root: nn.Module) -> list[str]:
    """Undoes `watch_forwards` and returns its `trainable_before`."""
    for hooks in (root._forward_pre_hooks, root._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_hand_out_rotations, _end_of_forward)]:
            del hooks[key]
            root._forward_hooks_always_called.pop(key, None)
    found: _Root = root.__dict__.pop("_ssvd_root")
    return found.trainable_before


def is_watched(root: nn.Module) -> bool:
    """Whether `watch_forwards` was called on `root`."""
    return "_ssvd_root" in root.__dict__


def _roots(model: nn.Module) -> Iterator[nn.Module]:
    return filter(is_watched, model.modules())


def require_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """`adapted_layers` of the model within wrappers; ValueError if there is none, or if PEFT put them there."""
    layers = adapted_layers(unwrapped(model))
    if not layers:
        raise ValueError(f"model ({type(model).__name__}) has no SSVD layer: call inject() first")
    check_own(layers)
    return layers


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel's or torch.compile's wrapper: an adapter names its layers."""
    if isinstance(model, DistributedDataParallel):
        return unwrapped(model.module)
    inner = model._modules.get("_orig_mod")
    return model if inner is None else unwrapped(inner)


def check_not_ddp(model: nn.Module) -> None:
    """Raises ValueError for a model that DDP has looked over already: it would not see new parameters."""
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model is a DistributedDataParallel: inject, load or switch adapters first, then wrap the model"
        )


def whole_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """`require_layers`, or ValueError if FSDP2 has sharded one."""
    layers = require_layers(model)
    for name, layer in layers.items():
        if layer.sharded:
            raise ValueError(
                f"{name} is sharded by FSDP2: save_adapter(), and load the adapter where the model is whole"
            )
    return layers


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _hand_out_rotations(root: nn.Module, args: Any) -> None:
    """Forward pre-hook of the root: one batched rotation for all SSVD layers, which use it until the forward ends.

    A layer that runs outside of it (alone, or recomputed by a checkpoint during backward) computes its own.
    """
    layers = [layer for layer in _rotating(root) if layer.in_use and type(layer.theta) is nn.Parameter]
    if not torch.is_grad_enabled():
        layers = [layer for layer in layers if not layer.has_cache()]
    thetas = [layer.theta for layer in layers]
    ranks = [layer.k_in for layer in layers]
    outer = [layer for layer in layers if layer.theta_out is not None]
    thetas += [layer.theta_out for layer in outer if layer.theta_out is not None]
    ranks += [layer.k_out for layer in outer if layer.k_out is not None]
    rotations = [layer.rotation for layer in [*layers, *outer]]
    bands = [layer.band for layer in [*layers, *outer]]
    deltas = rotation_deltas(thetas, ranks, rotations, bands)
    E_out = dict(zip(map(id, outer), deltas[len(layers) :], strict=True))
    # compiled, the partitioner chooses what is saved
    inputs = None if torch.compiler.is_compiling() else _sharing(root).begin()
    for layer, E in zip(layers, deltas):
        layer._handed = HandedRotations(E, E_out.get(id(layer)), inputs)


def _end_of_forward(root: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        _sharing(root).end()
    for layer in _rotating(root):
        layer._handed = None


def _rotating(root: nn.Module) -> Iterator[SSVDLinear]:
    return (layer for layer in _walk(root, set()) if isinstance(layer, SSVDLinear))


def _walk(module: nn.Module, seen: set[nn.Module]) -> Iterator[AdaptedLinear]:
    """Adapted layers below `module`, not entered: a compiled forward would be bound to the adapters parked there."""
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, AdaptedLinear):
        yield module
        return
    for child in module.children():
        yield from _walk(child, seen)


def _sharing(root: nn.Module) -> InputSharing:
    sharing: InputSharing = root.__dict__["_ssvd_root"].sharing
    return sharing
