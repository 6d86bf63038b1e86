"""Adapters on disk: what was trained, and what identifies the basis that it refers to.

One safetensors file. Per layer: theta, delta_sigma (theta_out; of SpectralFT, A and B), and a sketch (6, k) of U and V;
U, sigma and V themselves only where they cannot be recomputed safely, or on request. All tensors of `modules_to_save`.
Metadata: format version, names of those modules, each layer's ranks, choices, shape and base-weight fingerprint, and a
digest over everything. Loading factorises the base weight again, compares with the sketch, repairs signs, and refuses
anything that does not match, before it changes anything.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..basis.batch import Plan, factorize_all
from ..basis.factorize import BASIS, SAFE_GAP, Factorization, basis_error, fingerprint, match_signs
from ..basis.linears import base_weight, check_adaptable, features
from ..layers.adapt import check_method
from ..layers.base import AdaptedLinear, module_paths, own_layers
from ..layers.inactive import own_tensors
from ..layers.saved import SavedModule
from ..layers.ssvd import SSVDAdapter
from ..model.inject import install
from ..model.lookup import check_not_ddp, require_layers, saved_modules, unwrapped
from ..model.targets import check_saved
from ..utils.fsdp import assign, gathered, is_sharded
from ..utils.safetensors_io import digest, write_atomically
from .file_format import FORMAT_VERSION, AdapterError, AdapterFile, config_of, read_adapter

logger = logging.getLogger(__name__)


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], save_bases: bool = False, *, adapter: str | None = None
) -> None:
    """Writes every SSVD layer of `model`, and its `modules_to_save`, to one safetensors file, atomically.

    adapter: of several adapters (see `add_adapter`) the one to save; by default the one in use.

    save_bases=True adds every U, sigma and V: such an adapter also loads on a rounding (fp16, bf16) of its base.
    Layers whose singular values lie too close together to recompute their basis safely are stored with it anyway,
    and a log line says so. Raises ValueError if the model has no SSVD layer or no such adapter, or if a parameter is
    not finite, and FileNotFoundError if the folder does not exist; nothing is left half-written. Warns, with their
    names, of other parameters that train (a new head, biases): they are not saved.
    A model that FSDP2 has sharded is gathered: every process must call this, the first one writes, and all return when
    it has. Otherwise nothing is sent, and whoever calls it writes; under DDP that may be the first process alone.
    """
    present, modules = require_layers(model), saved_modules(model)
    if _writes(present):
        own = [layer.adapter() for layer in present.values()] + [own_tensors(m.module) for m in modules.values()]
        _warn_of_others(model, {id(parameter) for tensors in own for parameter in tensors.values()})
    first = next(iter(present.values()))
    write_adapter(
        path,
        present,
        {name: (layer.adapter(adapter), layer.description()) for name, layer in present.items()},
        {name: module.adapter(adapter or first.active_adapter) for name, module in modules.items()},
        first.strength_of(adapter),
        save_bases,
    )


def write_adapter(
    path: str | os.PathLike[str],
    present: Mapping[str, AdaptedLinear],
    values: Mapping[str, tuple[Mapping[str, Tensor], dict[str, Any]]],
    modules: Mapping[str, Mapping[str, Tensor]],
    strength: float = 1.0,
    save_bases: bool = False,
) -> None:
    """Writes what was trained of each layer with its description, in the bases of `present`; see `save_adapter`."""
    path, sharded, writes = Path(path), any(layer.sharded for layer in present.values()), _writes(present)
    if writes and not path.parent.is_dir():
        raise FileNotFoundError(f"`path` must be in an existing folder, got {str(path)!r}")
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    unsafe = []
    for name, layer in present.items():
        if not layer.basis.fingerprint:  # ESPnet: the pretrained weights come later
            raise ValueError(f"{name} has no singular vectors yet: load the pretrained weights before saving")
        close = layer.basis.gap < SAFE_GAP
        if close and not save_bases:
            unsafe.append(name)
        trained, description = values[name]
        basis = {key: getattr(layer, key) for key in BASIS} if save_bases or close else {}
        tensors |= _finite(name, {**trained, **basis})
        tensors[f"{name}.sketch"] = layer.basis.sketch
        layers[name] = {**description, "fingerprint": layer.basis.fingerprint}
    for name, own in modules.items():
        tensors |= _finite(name, own)
    if unsafe:
        logger.warning(
            "%d of %d layers have singular values too close to recompute their bases; stored U and V of %s",
            len(unsafe),
            len(layers),
            ", ".join(unsafe[:3]) + (", ..." if len(unsafe) > 3 else ""),
        )
    try:
        if writes:
            write_file(path, layers, tensors, list(modules), strength)
    finally:
        if sharded:
            dist.barrier()


def write_file(
    path: Path, layers: dict[str, dict[str, Any]], tensors: dict[str, Tensor], modules: list[str], strength: float
) -> None:
    """An adapter file that `read_adapter` reads."""
    header = {"version": FORMAT_VERSION, "layers": layers, "modules_to_save": modules, "strength": strength}
    header["digest"] = digest(header, tensors)
    # one entry only: safetensors writes several in random order, and equal adapters should be equal files
    write_atomically(path, tensors, {"ssvd_kernels": json.dumps(header, separators=(",", ":"))})


def _writes(present: Mapping[str, AdaptedLinear]) -> bool:
    """Whether this process is one that writes."""
    return not any(layer.sharded for layer in present.values()) or dist.get_rank() == 0


def _finite(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the module `name`, as they are written."""
    values = {f"{name}.{key}": gathered(tensor).detach().cpu().contiguous() for key, tensor in tensors.items()}
    for key, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{key} contains NaN or infinity: nothing was saved")
    return values


def _warn_of_others(model: nn.Module, saved: Container[int]) -> None:
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if others:
        logger.warning(
            "%d other parameters train and are not saved with the adapter: %s. Save them yourself, or freeze them "
            "(requires_grad_(False))",
            len(others),
            ", ".join(others[:5]) + (", ..." if len(others) > 5 else ""),
        )


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    progress: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    share: bool = True,
    into: str | None = None,
) -> list[str]:
    """Loads an adapter into `model` and returns the names of its layers. cache_dir and share are as in `inject`.

    A model without SSVD layers is injected as the file says (other parameters are frozen). A model with SSVD layers
    must have the same ones, and the same `modules_to_save`; of several adapters the active one is replaced. Raises
    FileNotFoundError, or AdapterError for a file that is damaged, altered, of another version, for another base model,
    whose basis cannot be matched, or whose precision would be lost; the model is then unchanged.

    into: the adapter to replace, in use or not. Its tensors stay where they are, and SSVD's its strength, by which the
    values are divided instead: a model under torch.compile is not compiled again. ValueError for an unknown name.
    """
    file = read_adapter(Path(path))
    inner = unwrapped(model)
    layers = own_layers(inner)
    if into is not None and not layers:
        raise ValueError(f"`into` must be an adapter of the model, which has no SSVD layers, got {into!r}")
    for layer in layers.values():
        layer.adapter(into)
    if not layers:
        check_not_ddp(model)
        plan, parts = _plan(file, inner), _parts(file, inner)
        found = _factorizations(file, plan, progress, cache_dir, share)
        changes = {name: _change(file, name, found[name].sketch) for name in plan}
        install(inner, plan, found, saved=parts)
        layers = own_layers(inner)
    elif into is not None or any(layer.inactive for layer in layers.values()):  # whose bases stay as they are
        theirs = adapter_values(layers, saved_modules(inner), file)
        changes = {name: _Change(theirs[name]) for name in layers}
    else:
        _check_same_layers(file, layers, saved_modules(inner))
        changes = {name: _change(file, name, layer.basis.sketch, file.basis(name)) for name, layer in layers.items()}
    for name, change in changes.items():
        change.apply(layers[name], into, file.strength)
    with torch.no_grad():
        for name, module in saved_modules(inner).items():
            for key, tensor in module.adapter(into or next(iter(layers.values())).active_adapter).items():
                tensor.copy_(file.saved[name][key])
    return list(file.layers)


class _Change(NamedTuple):
    """What a file changes in one layer, checked already."""

    values: dict[str, Tensor]  # of the trained Parameters
    signs: Tensor | None = None  # by which the pairs (u_i, v_i) of its basis flip
    basis: tuple[Tensor, ...] | None = None  # which replaces the layer's

    @torch.no_grad()
    def apply(self, layer: AdaptedLinear, into: str | None, strength: float) -> None:
        if self.basis is not None:
            layer.set_basis(*self.basis)
        elif self.signs is not None and bool((self.signs < 0).any()):
            layer.flip_basis(self.signs)
        present = layer.strength_of(into)
        scales = into is not None and present and present != strength and isinstance(layer, SSVDAdapter)
        if not scales:
            layer.set_strength(strength, into)
        for key, parameter in layer.adapter(into).items():
            assign(parameter, self.values[key] * (strength / present) if scales else self.values[key])
        layer.forget()


def adapter_values(
    layers: Mapping[str, AdaptedLinear], saved: Mapping[str, SavedModule], file: AdapterFile
) -> dict[str, dict[str, Tensor]]:
    """Name -> trained values of the file, those of layers expressed in the bases that `layers` hold.

    Where the file means another sign of a singular pair, these values change instead of the basis.
    Raises as `load_adapter` does, and AdapterError where the file's basis is another one altogether.
    """
    _check_same_layers(file, layers, saved)
    remedy = "the adapters of one model share its bases, so load this one into a model of its own"
    values = {name: file.trained(name) for name in layers}
    for name, layer in layers.items():
        signs = _matched_signs(file, name, layer.basis.sketch, remedy)
        if bool((signs < 0).any()):
            values[name] = layer.flipped(values[name], signs)
    return values | file.saved


def _change(file: AdapterFile, name: str, sketch: Tensor, basis: tuple[Tensor, ...] | None = None) -> _Change:
    """For a layer whose basis has this sketch, unless `basis` replaces it."""
    if basis is not None:
        return _Change(file.trained(name), basis=basis)
    signs = _matched_signs(file, name, sketch, "save the adapter with save_bases=True")
    return _Change(file.trained(name), signs)


def _plan(file: AdapterFile, model: nn.Module) -> Plan:
    """What to adapt in a base model, whose layers and dtypes fit the file."""
    modules = dict(module_paths(model, remove_duplicate=False))
    plan = {}
    for name, layer in file.layers.items():
        linear = modules.get(name)
        if linear is None:
            raise AdapterError(
                f"{file.path} adapts {name!r}, which {type(model).__name__} does not have: another base model?"
            )
        try:
            check_adaptable(linear, name)
            d_in, d_out = features(linear)
            shape = [d_out, d_in]
            if shape != layer["shape"]:
                raise AdapterError(
                    f"{file.path} was saved for {name} of shape {layer['shape']}, but the model has {shape}"
                )
            config = config_of(layer)
            check_method(linear, config, name)
            config.triplets(d_in, d_out)
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, AdapterError) else AdapterError(f"{file.path}: {name}: {error}") from None
        _check_precision(
            file, name, file.trained(name), torch.promote_types(linear.get_parameter("weight").dtype, torch.float32)
        )
        plan[name] = (linear, config)
    return plan


def _parts(file: AdapterFile, model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a base model that train whole, which fit the file."""
    modules = {name: module for name, module in module_paths(model, remove_duplicate=False) if name in file.saved}
    try:
        parts = check_saved(model, modules)
    except ValueError as error:
        raise AdapterError(f"{file.path}: {error}") from None
    _check_same_saved(file, {name: own_tensors(part) for name, part in parts.items()})
    return parts


def _factorizations(
    file: AdapterFile, plan: Plan, progress: bool, cache_dir: str | os.PathLike[str] | None, share: bool
) -> dict[str, Factorization]:
    """Of each planned layer the basis that the file stores, or else that of its weight, which must be the file's."""
    stored, missing = {}, {}
    for name, (linear, config) in plan.items():
        weight, basis = base_weight(linear, name), file.basis(name)
        if basis is None:
            _check_fingerprint(file, name, fingerprint(weight))
            missing[name] = linear, config
            continue
        _check_rounding(file, name, weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        # copies: the file's tensors are views of a mapped file, and aligned as the file is
        U, sigma, V = (tensor.to(weight.device, wide, copy=True) for tensor in basis)
        stored[name] = Factorization(U, sigma, V, fingerprint(weight), 0.0, file.sketch(name).clone())
    return {**factorize_all(missing, progress, cache_dir, share), **stored}


# -- checks: an AdapterError, or nothing -----------------------------------------------------------------------------


def _matched_signs(file: AdapterFile, name: str, sketch: Tensor, remedy: str) -> Tensor:
    signs = match_signs(file.sketch(name), sketch)
    if signs is None:
        raise AdapterError(
            f"{file.path}: the singular vectors of {name} cannot be matched with those that were adapted, although the "
            f"base weight is the same: {remedy}"
        )
    return signs


def _check_same_layers(
    file: AdapterFile, layers: Mapping[str, AdaptedLinear], saved: Mapping[str, SavedModule]
) -> None:
    if set(layers) != set(file.layers):
        differing = sorted(set(layers) ^ set(file.layers))
        raise AdapterError(
            f"{file.path} adapts {len(file.layers)} layers and the model has {len(layers)} SSVD layers; they differ, "
            f"e.g. in {differing[0]!r}: inject the model as for the adapter, or load into the base model"
        )
    for name, layer in layers.items():
        if not layer.basis.fingerprint:
            raise AdapterError(f"{name} has no singular vectors yet: load the pretrained weights before {file.path}")
        if layer.merged:
            raise AdapterError(f"{name} is merged: unmerge before loading {file.path}")
        if layer.sharded and not is_sharded(layer.first_trained):  # what is written now would not reach the shards
            raise AdapterError(
                f"FSDP2 left {name} unsharded after a forward: call reshard() before loading {file.path}"
            )
        if layer.sharded and saved:
            raise AdapterError(f"{name} is sharded by FSDP2: load modules_to_save, as {file.path} has, before sharding")
        mine = layer.description()
        theirs = {key: file.layers[name].get(key) for key in mine}
        if mine != theirs:
            raise AdapterError(f"{file.path} was saved for {name} as {theirs}, but the model has {mine}")
        _check_precision(file, name, file.trained(name), layer.first_trained.dtype)
        if file.basis(name) is None:
            _check_fingerprint(file, name, layer.basis.fingerprint)
        else:
            _check_rounding(file, name, gathered(layer.base_weight))
    _check_same_saved(file, {name: module.adapter(layer.active_adapter) for name, module in saved.items()})


def _check_same_saved(file: AdapterFile, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """For a model whose modules of these names train whole and hold these tensors."""
    if saved.keys() != file.saved.keys():
        raise AdapterError(
            f"{file.path} has modules_to_save={list(file.saved)}, and the model {list(saved)}: inject the model as for "
            "the adapter, or load into a base model that has them"
        )
    for name, tensors in saved.items():
        mine, theirs = ({key: list(t.shape) for key, t in of.items()} for of in (tensors, file.saved[name]))
        if mine != theirs:
            raise AdapterError(f"{file.path} was saved for {name} with {theirs}, but the model has {mine}")
        for key, tensor in tensors.items():
            _check_precision(file, name, {key: file.saved[name][key]}, tensor.dtype)


def _check_precision(file: AdapterFile, name: str, values: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuses to round what was trained: theta in the file may not be wider than the layer's."""
    for key, value in values.items():
        if torch.promote_types(value.dtype, dtype) != dtype:
            raise AdapterError(
                f"{file.path}: {name}.{key} is {value.dtype} and the model's is {dtype}, which would lose precision: "
                f"load the adapter before casting the model, or cast the model to {value.dtype}"
            )


def _check_fingerprint(file: AdapterFile, name: str, found: str) -> None:
    if file.layers[name]["fingerprint"] != found:
        raise AdapterError(
            f"{file.path} was trained on another base model: the weight of {name} differs. If yours is a "
            "half-precision copy of that base, load the adapter before casting, or save it with save_bases=True; a "
            "quantised base is a base of its own"
        )


def _check_rounding(file: AdapterFile, name: str, weight: Tensor) -> None:
    """For an adapter that stores its bases: the base is the same weight, or a rounding of it."""
    basis = file.basis(name)
    assert basis is not None
    if file.layers[name]["fingerprint"] == fingerprint(weight):
        return
    error = basis_error(weight, *basis)
    W = weight.detach().float()
    roundings = [dtype for dtype in (torch.float16, torch.bfloat16) if torch.equal(W, W.to(dtype).float())]
    bound = max((torch.finfo(dtype).eps / 2 for dtype in roundings), default=0.0)
    if not error <= bound:
        raise AdapterError(
            f"{file.path} was trained on another base model: U^T W V of {name} differs from the singular values by "
            f"{error:.2g} of ||W|| (tolerance {bound:.2g}, the rounding of a half-precision copy)"
        )
    logger.warning("%s: the base weight of %s is a rounding of the one that was adapted", file.path, name)
