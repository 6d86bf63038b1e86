"""Hooks on the root module that compute all rotations in one batch at the start of each forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..layers.adapter import Adapter
from ..layers.input_sharing import InputSharing
from ..layers.precomputed import PrecomputedRotation
from ..layers.quantized import prevent_repacking
from ..layers.ssvd import SSVDAdapter
from ..ops.functional import rotation_deltas


@dataclass
class _Root:
    """What `inject` remembers on the module that it was given."""

    trainable_before: list[str]
    sharing: InputSharing = field(default_factory=InputSharing)


def watch_forwards(root: nn.Module, trainable_before: Iterable[str] = ()) -> None:
    """From now on one batched call computes the rotations of all SSVD layers at the start of each forward of `root`."""
    prevent_repacking(root)
    root.__dict__["_ssvd_root"] = _Root(list(trainable_before))
    root.register_forward_pre_hook(_precompute_rotations)
    root.register_forward_hook(_end_of_forward, always_call=True)


def unwatch_forwards(root: nn.Module) -> list[str]:
    """Undoes `watch_forwards` and returns its `trainable_before`."""
    for hooks in (root._forward_pre_hooks, root._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_precompute_rotations, _end_of_forward)]:
            del hooks[key]
            root._forward_hooks_always_called.pop(key, None)
    found: _Root = root.__dict__.pop("_ssvd_root")
    return found.trainable_before


def is_watched(root: nn.Module) -> bool:
    """Whether `watch_forwards` was called on `root`."""
    return "_ssvd_root" in root.__dict__


def watched_roots(model: nn.Module) -> Iterator[nn.Module]:
    return filter(is_watched, model.modules())


def _precompute_rotations(root: nn.Module, args: Any) -> None:
    """Forward pre-hook of the root: one batched rotation for all SSVD layers, which use it until the forward ends.

    A layer that runs outside of it (alone, or recomputed by a checkpoint during backward) computes its own.
    """
    layers = [layer for layer in _rotating(root) if layer.in_use and type(layer.theta) is nn.Parameter]
    if not torch.is_grad_enabled():
        layers = [layer for layer in layers if not layer.kept.holds(layer)]
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
        layer._precomputed = PrecomputedRotation(E, E_out.get(id(layer)), inputs)


def _end_of_forward(root: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        _sharing(root).end()
    for layer in _rotating(root):
        layer._precomputed = None


def _rotating(root: nn.Module) -> Iterator[SSVDAdapter]:
    return (layer for layer in _walk(root, set()) if isinstance(layer, SSVDAdapter))


def _walk(module: nn.Module, seen: set[nn.Module]) -> Iterator[Adapter]:
    """Adapted layers below `module`, not entered: a compiled forward would be bound to the adapters parked there."""
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, Adapter):
        yield module
        return
    for child in module.children():
        yield from _walk(child, seen)


def _sharing(root: nn.Module) -> InputSharing:
    sharing: InputSharing = root.__dict__["_ssvd_root"].sharing
    return sharing
