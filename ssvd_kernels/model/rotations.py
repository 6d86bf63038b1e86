"""Hooks on the root module that make the cores of all layers in batches at the start of each forward."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import running
from ..layers.adapter import Adapter
from ..layers.caching import Kept, capturing
from ..layers.inactive import TRAINED, InactiveAdapters
from ..layers.quantized import prevent_repacking
from ..layers.ssvd import SSVDAdapter
from ..ops.functional import core_of

MAX_BYTES = 2**27  # of one batch of cores, of which a backward holds several temporaries
PADDING = 1.25  # ranks within this factor share a batch


@dataclass
class _Root:
    """What `inject` remembers on the module that it was given, and the layers found in it."""

    trainable_before: list[str]
    owner: int | None = None  # id of the module: a replica of DataParallel shares this object, but not its layers
    structure: int = -1
    adapters: list[Adapter] = field(default_factory=list)
    layers: list[SSVDAdapter] = field(default_factory=list)  # those of SSVD
    active: list[SSVDAdapter] = field(default_factory=list)
    batches: list[_Batch] = field(default_factory=list)
    in_graphs: list[list[_Batch]] = field(default_factory=list)  # what captured CUDA graphs read


def watch_forwards(root: nn.Module, trainable_before: Iterable[str] = ()) -> None:
    """From now on one batched call makes the cores of all SSVD layers at the start of each forward of `root`."""
    prevent_repacking(root)
    root.__dict__["_ssvd_root"] = _Root(list(trainable_before))
    root.register_forward_pre_hook(_begin_forward)
    root.register_forward_hook(_end_forward, always_call=True)


def unwatch_forwards(root: nn.Module) -> list[str]:
    """Undoes `watch_forwards` and returns its `trainable_before`."""
    for hooks in (root._forward_pre_hooks, root._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_begin_forward, _end_forward)]:
            del hooks[key]
            root._forward_hooks_always_called.pop(key, None)
    found: _Root = root.__dict__.pop("_ssvd_root")
    return found.trainable_before


def is_watched(root: nn.Module) -> bool:
    """Whether `watch_forwards` was called on `root`."""
    return "_ssvd_root" in root.__dict__


def watched_roots(model: nn.Module) -> Iterator[nn.Module]:
    return filter(is_watched, model.modules())


def _begin_forward(root: nn.Module, args: Any) -> None:
    """Forward pre-hook of the root. A layer that runs outside of its forward makes a core of its own."""
    compiling = torch.compiler.is_compiling()
    cores: running.Cores = {}
    batches: list[running.Batch] = []
    values = running.Values() if torch.is_grad_enabled() and not compiling else None
    for batch in _batches(root):
        made = batch.cores()
        some = dict(zip(batch.layers, made.unbind() if batch.even else _Split.apply(made, batch.ranks)))
        cores |= some
        batches.append((batch.layers, made))
        if values is not None:
            values.add(some, made)
    running.enter(cores, batches, None if compiling else sys._getframe(1))


def _end_forward(root: nn.Module, args: Any, output: Any) -> None:
    running.leave()


class _Split(torch.autograd.Function):
    """Cores (B, K, K), zero beyond the rank k of each -> B cores (k, k)."""

    @staticmethod
    def forward(ctx: Any, batch: Tensor, ranks: list[int]) -> tuple[Tensor, ...]:
        ctx.like = batch.new_empty(0), batch.shape
        return tuple([batch[place, :k, :k] for place, k in enumerate(ranks)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        like, shape = ctx.like
        batch = like.new_zeros(shape)
        for place, grad in enumerate(grads):
            batch[place, : grad.shape[0], : grad.shape[0]].copy_(grad)
        return batch, None


class Member:
    """Of one layer, what one of many adapters trains, in the layer's own place."""

    def __init__(self, layer: SSVDAdapter, values: Mapping[str, Tensor], strength: float) -> None:
        self._parameters: dict[str, Any] = {name: values.get(name) for name in TRAINED}
        self.theta, self.sigma, self.k, self.kind = values["theta"], layer.sigma, layer.k, layer.kind
        self.kind = self.kind._replace(strength=strength)


def cores_of(members: Sequence[Member]) -> list[Tensor]:
    """The core of each, made in batches."""
    found: dict[Member, Tensor] = {}
    for same in _grouped(members):  # type: ignore[arg-type]
        batch = _Batch(same)
        made = batch.cores()
        found |= zip(same, made.unbind() if batch.even else _Split.apply(made, batch.ranks))  # type: ignore[arg-type]
    return [found[member] for member in members]


class _Batch:
    """Layers whose cores are made together: of one kind, or of ranks that are padded with zeros, which is exact."""

    def __init__(self, layers: list[SSVDAdapter]) -> None:
        self.layers, self.ranks = layers, [layer.k for layer in layers]
        K, device = max(self.ranks), layers[0].theta.device
        self.even, self.kind = min(self.ranks) == K, layers[0].kind._replace(k=K)
        if self.even:
            return
        self.kind = self.kind._replace(k_in=K)
        thetas, diagonals = [], []
        for place, k in enumerate(self.ranks):
            i, j = torch.triu_indices(k, k, 1, device=device)
            thetas.append(place * (K * (K - 1) // 2) + i * (2 * K - i - 1) // 2 - i - 1 + j)
            diagonals.append(place * K + torch.arange(k, device=device))
        self.places = Kept((torch.cat(thetas), torch.cat(diagonals)))

    def cores(self) -> Tensor:
        """(B, K, K), zero beyond each layer's rank."""
        own = [layer._parameters for layer in self.layers]
        theta, theta_out, delta = ([parameters[name] for parameters in own] for name in TRAINED)
        sigma = [p["sigma"] if "sigma" in p else layer.sigma for p, layer in zip(own, self.layers)]
        outer = None if theta_out[0] is None else torch.stack(theta_out)  # type: ignore[arg-type]
        K = self.kind.k
        thetas = self._stack(theta, K * (K - 1) // 2, 0)
        return core_of(self.kind, thetas, outer, self._stack(delta, K, 1), self._stack(sigma, K, 1, padding=1))

    def _stack(self, tensors: list[Any], size: int, where: int, padding: int = 0) -> Tensor:
        if self.even:
            return torch.stack(tensors)
        flat, places = torch.cat(tensors), self.places.read()[where]
        return flat.new_full((len(tensors) * size,), padding).index_copy(0, places, flat).view(len(tensors), size)


def _batches(root: nn.Module) -> list[_Batch]:
    """The layers whose cores a forward needs, those of one kind together, in batches of about MAX_BYTES at most."""
    if torch.compiler.is_compiling():  # which would guard on what is cached here
        layers = [each for each in _walk(root, set()) if isinstance(each, SSVDAdapter)]
        return [_Batch(same) for same in _grouped(_active(layers))]
    state: _Root = root.__dict__["_ssvd_root"]
    if state.owner != id(root) or state.structure != running.structure.number:
        adapters = list(_walk(root, set()))
        layers = [each for each in adapters if isinstance(each, SSVDAdapter)]
        state = _Root([], id(root), running.structure.number, adapters, layers, in_graphs=state.in_graphs)
        if root.__dict__["_ssvd_root"].owner in (None, id(root)):
            state.trainable_before = root.__dict__["_ssvd_root"].trainable_before
            root.__dict__["_ssvd_root"] = state
    active = _active(state.layers)
    if len(active) < len(state.adapters):
        _check_offloaded(root, state.adapters)
    if not (torch.is_grad_enabled() or root.training) and active and active[0].cache.holds(active[0]):
        return []  # in eval, where the other layers most probably have their cores cached, too
    batches = state.batches if active == state.active else [_Batch(layers) for layers in _grouped(active)]
    if active and capturing(active[0].theta):
        state.in_graphs.append(batches)
    else:
        state.active, state.batches = active, batches
    return batches


def _active(layers: list[SSVDAdapter]) -> list[SSVDAdapter]:
    """Those whose cores a forward uses; not those of functional_call, which sees no hook of the root, nor offloaded
    ones, which have their values within their own forward only."""
    thetas: list[Any] = [each._parameters["theta"] for each in layers]
    kept = [theta.__class__ is nn.Parameter and not theta.is_meta for theta in thetas]
    return [each for each, own in zip(layers, kept) if own and not each.idle]


def _check_offloaded(root: nn.Module, adapters: list[Adapter]) -> None:
    """Raises RuntimeError for layers that accelerate has offloaded, if they would not train or lack their base."""
    for each in adapters:
        if "_hf_hook" not in each.__dict__ or each.idle or not each.first_trained.is_meta:
            continue
        name = next(name for name, module in root.named_modules() if module is each)
        if each.managed_by is not None:
            raise RuntimeError(
                f"{name} is offloaded, but PEFT's layer reads its base weight itself: call merge_and_unload() before "
                "offloading, or adapt by ssvd_kernels.inject, whose layers can be offloaded"
            )
        if root.training and torch.is_grad_enabled() and each.first_trained.requires_grad:
            raise RuntimeError(
                f"{name} is offloaded and would not train: train before offloading, or call eval() for inference"
            )


def _grouped(layers: Sequence[SSVDAdapter]) -> list[list[SSVDAdapter]]:
    kinds: dict[tuple, list[SSVDAdapter]] = defaultdict(list)
    for layer in layers:
        kind = layer.kind
        if kind.k_out is None and kind.rotation in ("cayley", "linear"):
            kind = kind._replace(k=0, k_in=0)  # whatever its rank
        kinds[kind, layer.theta.dtype, layer.theta.device].append(layer)
    groups = []
    for same in kinds.values():
        same.sort(key=lambda layer: -layer.k)
        group: list[SSVDAdapter] = []
        for layer in same:
            size = len(group) * group[0].k ** 2 * layer.theta.element_size() if group else 0
            if group and (group[0].k > PADDING * layer.k or size >= MAX_BYTES):
                groups.append(group)
                group = []
            group.append(layer)
        groups.append(group)
    return groups


def _walk(module: nn.Module, seen: set[nn.Module]) -> Iterator[Adapter]:
    """Adapted layers below `module`. A compiled forward would be bound to parked adapters, if these were entered."""
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, Adapter):
        yield module
    elif not isinstance(module, InactiveAdapters):
        for child in module.children():
            yield from _walk(child, seen)
