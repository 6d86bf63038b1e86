"""Adapters on disk: what was trained, and what identifies the basis that it refers to.

One safetensors file. Per layer: theta, delta_sigma (theta_out; of SpectralFT, A and B), and a sketch (6, k) of U and V;
U, sigma and V themselves only where they cannot be recomputed safely, or on request. Metadata: format version, each
layer's ranks, choices, shape and base-weight fingerprint, and a digest over everything. Loading factorises the base
weight again, compares with the sketch, repairs signs, and refuses anything that does not match, before it changes
anything.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..basis.batch import Plan, factorize_all
from ..basis.factorize import BASIS, SAFE_GAP, Factorization, basis_error, fingerprint, match_signs
from ..basis.linears import base_weight, check_adaptable
from ..layers.base import AdaptedLinear, adapted_layers, check_own
from ..layers.quantized import check_method
from ..model.inject import install
from ..model.lookup import check_not_ddp, require_layers, unwrapped
from ..utils.fsdp import assign, gathered, is_sharded
from ..utils.safetensors_io import digest, write_atomically
from .file_format import FORMAT_VERSION, AdapterError, config_of, read_adapter, trained_shapes

logger = logging.getLogger(__name__)


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], save_bases: bool = False, *, adapter: str | None = None
) -> None:
    """Writes every SSVD layer of `model` to one safetensors file, atomically.

    adapter: of several adapters (see `add_adapter`) the one to save; by default the one in use.

    save_bases=True adds every U, sigma and V: such an adapter also loads on a rounding (fp16, bf16) of its base.
    Layers whose singular values lie too close together to recompute their basis safely are stored with it anyway,
    and a log line says so. Raises ValueError if the model has no SSVD layer or no such adapter, or if a parameter is
    not finite, and FileNotFoundError if the folder does not exist; nothing is left half-written.
    A model that FSDP2 has sharded is gathered: every rank must call this, rank 0 writes, and all return when it has.
    Otherwise nothing is sent, and whoever calls it writes; under DDP that may be rank 0 alone.
    """
    path, present = Path(path), require_layers(model)
    sharded = any(layer.sharded for layer in present.values())
    writes = not sharded or dist.get_rank() == 0
    if writes and not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: the folder {str(path.parent)!r} does not exist")
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    unsafe = []
    for name, layer in present.items():
        if not layer.basis.fingerprint:  # ESPnet: the pretrained weights come later
            raise ValueError(f"{name} has no singular vectors yet: load the pretrained weights before saving")
        close = layer.basis.gap < SAFE_GAP
        if close and not save_bases:
            unsafe.append(name)
        kept: dict[str, Tensor] = dict(layer.adapter(adapter))
        kept |= {key: getattr(layer, key) for key in BASIS} if save_bases or close else {}
        for key, tensor in kept.items():
            value = gathered(tensor).detach().cpu().contiguous()
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name}.{key} holds NaN or infinity: nothing was saved")
            tensors[f"{name}.{key}"] = value
        tensors[f"{name}.sketch"] = layer.basis.sketch
        layers[name] = {**layer.description(), "fingerprint": layer.basis.fingerprint}
    if unsafe:
        logger.warning(
            "%d of %d layers have singular values too close to recompute their bases; stored U and V of %s",
            len(unsafe),
            len(layers),
            ", ".join(unsafe[:3]) + (", ..." if len(unsafe) > 3 else ""),
        )
    header = {"version": FORMAT_VERSION, "layers": layers}
    header["digest"] = digest(header, tensors)
    try:
        if writes:
            # one entry only: safetensors writes several in random order, and equal adapters should be equal files
            write_atomically(path, tensors, {"ssvd_kernels": json.dumps(header, separators=(",", ":"))})
    finally:
        if sharded:
            dist.barrier()


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    progress: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    share: bool = True,
) -> list[str]:
    """Loads an adapter into `model` and returns the names of its layers. cache_dir and share are as in `inject`.

    A model without SSVD layers is injected as the file says (other parameters frozen); one with SSVD layers must have
    the same ones, and of several adapters the one in use is replaced. Raises FileNotFoundError, or AdapterError for a
    file that is damaged, altered, of another version, for another base model, whose basis cannot be matched, or whose
    precision would be lost; the model is then unchanged.
    """
    path = Path(path)
    described, tensors = read_adapter(path)
    if not adapted_layers(model):
        check_not_ddp(model)
    model = unwrapped(model)
    present = adapted_layers(model)
    check_own(present)
    found: dict[str, Factorization] = {}
    if any(layer.inactive for layer in present.values()):  # whose bases belong to other adapters, too
        for name, values in adapter_values(present, path).items():
            _copy(values, present[name])
        return list(described)
    if present:
        _check_present(path, present, described)
    else:
        plan = _plan(path, model, described)
        for name, (linear, _) in plan.items():
            if f"{name}.U" not in tensors:
                _check_fingerprint(path, name, described[name], fingerprint(base_weight(linear, name)))
        missing = {name: entry for name, entry in plan.items() if f"{name}.U" not in tensors}
        found = {**factorize_all(missing, progress, cache_dir, share), **_stored_bases(path, plan, described, tensors)}
    signs = {}
    for name in described:
        dtype = (
            present[name].first_trained.dtype
            if present
            else torch.promote_types(plan[name][0].weight.dtype, torch.float32)
        )
        _check_precision(path, name, described[name], tensors, dtype)
        identity = present[name].basis if present else found[name]
        if f"{name}.U" in tensors:
            if present:
                _check_base(path, name, described[name], gathered(present[name].base_weight), tensors)
            continue
        _check_fingerprint(path, name, described[name], identity.fingerprint)
        remedy = "save the adapter with save_bases=True"
        signs[name] = _matched_signs(path, name, tensors, identity.sketch, remedy)
    if not present:
        install(model, plan, found)
        present = adapted_layers(model)
    for name in described:
        _fill(present[name], name, tensors, signs.get(name))
    return list(described)


def _fill(layer: AdaptedLinear, name: str, tensors: dict[str, Tensor], signs: Tensor | None) -> None:
    if signs is None:
        layer.set_basis(*(tensors[f"{name}.{key}"] for key in BASIS))
    elif bool((signs < 0).any()):
        layer.flip_basis(signs)
    _copy({key: tensors[f"{name}.{key}"] for key in layer.adapter()}, layer)


def _copy(values: dict[str, Tensor], layer: AdaptedLinear) -> None:
    with torch.no_grad():
        for key, parameter in layer.adapter().items():
            assign(parameter, values[key])
    layer._forget()


def adapter_values(layers: dict[str, AdaptedLinear], path: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """Layer name -> what was trained, from an adapter file, in terms of the bases that `layers` hold.

    Where the file means another sign of a singular pair, these values change instead of the basis.
    Raises as `load_adapter` does, and AdapterError where the file's basis is another one altogether.
    """
    path = Path(path)
    described, tensors = read_adapter(path)
    _check_present(path, layers, described)
    values = {}
    for name, layer in layers.items():
        _check_precision(path, name, described[name], tensors, layer.first_trained.dtype)
        if f"{name}.U" in tensors:
            _check_base(path, name, described[name], gathered(layer.base_weight), tensors)
        else:
            _check_fingerprint(path, name, described[name], layer.basis.fingerprint)
        remedy = "the adapters of one model share its bases, so load this one into a model of its own"
        signs = _matched_signs(path, name, tensors, layer.basis.sketch, remedy)
        values[name] = layer.flipped({key: tensors[f"{name}.{key}"] for key in layer.adapter()}, signs)
    return values


def _matched_signs(path: Path, name: str, tensors: dict[str, Tensor], sketch: Tensor, remedy: str) -> Tensor:
    signs = match_signs(tensors[f"{name}.sketch"], sketch)
    if signs is None:
        raise AdapterError(
            f"{path}: the singular vectors of {name} cannot be matched with those that were adapted, although the "
            f"base weight is the same: {remedy}"
        )
    return signs


def _check_present(path: Path, present: dict[str, AdaptedLinear], described: dict[str, dict[str, Any]]) -> None:
    if set(present) != set(described):
        differing = sorted(set(present) ^ set(described))
        raise AdapterError(
            f"{path} adapts {len(described)} layers and the model has {len(present)} SSVD layers; they differ, e.g. in "
            f"{differing[0]!r}: inject the model as for the adapter, or load into the base model"
        )
    for name, layer in present.items():
        if not layer.basis.fingerprint:
            raise AdapterError(f"{name} has no singular vectors yet: load the pretrained weights before {path}")
        if layer.merged:
            raise AdapterError(f"{name} is merged: unmerge before loading {path}")
        if layer.sharded and not is_sharded(layer.first_trained):  # what is written now would not reach the shards
            raise AdapterError(f"FSDP2 left {name} whole after a forward: reshard() the model before loading {path}")
        mine = layer.description()
        theirs = {key: described[name].get(key) for key in mine}
        if mine != theirs:
            raise AdapterError(f"{path} was saved for {name} as {theirs}, but the model has {mine}")


def _plan(path: Path, model: nn.Module, described: dict[str, dict[str, Any]]) -> Plan:
    modules = dict(model.named_modules())
    plan = {}
    for name, layer in described.items():
        linear = modules.get(name)
        if linear is None:
            raise AdapterError(
                f"{path} adapts {name!r}, which {type(model).__name__} does not have: another base model?"
            )
        try:
            check_adaptable(linear, name)
            assert isinstance(linear, nn.Linear)
            shape = [linear.out_features, linear.in_features]
            if shape != layer["shape"]:
                raise AdapterError(f"{path} was saved for {name} of shape {layer['shape']}, but the model has {shape}")
            config = config_of(layer)
            check_method(linear, config, name)
            config.triplets(linear.in_features, linear.out_features)
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, AdapterError) else AdapterError(f"{path}: {name}: {error}") from None
        plan[name] = (linear, config)
    return plan


def _check_precision(
    path: Path, name: str, layer: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Refuses to round what was trained: theta in the file may not be wider than the layer's."""
    for key in trained_shapes(layer):
        value = tensors[f"{name}.{key}"]
        if torch.promote_types(value.dtype, dtype) != dtype:
            raise AdapterError(
                f"{path}: {name}.{key} is {value.dtype} and the model's is {dtype}, which would lose precision: "
                f"load the adapter before casting the model, or cast the model to {value.dtype}"
            )


def _check_fingerprint(path: Path, name: str, described: dict[str, Any], found: str) -> None:
    if described["fingerprint"] != found:
        raise AdapterError(
            f"{path} was trained on another base model: the weight of {name} differs. If yours is a half-precision "
            "copy of that base, load the adapter before casting, or save it with save_bases=True; a quantised base is "
            "a base of its own"
        )


def _check_base(path: Path, name: str, described: dict[str, Any], weight: Tensor, tensors: dict[str, Tensor]) -> None:
    """For an adapter with its own bases: the base is the same weight, or a rounding of it."""
    if described["fingerprint"] == fingerprint(weight):
        return
    error = basis_error(weight, *(tensors[f"{name}.{key}"] for key in BASIS))
    W = weight.detach().float()
    roundings = [dtype for dtype in (torch.float16, torch.bfloat16) if torch.equal(W, W.to(dtype).float())]
    allowed = max((torch.finfo(dtype).eps / 2 for dtype in roundings), default=0.0)
    if not error <= allowed:
        raise AdapterError(
            f"{path} was trained on another base model: U^T W V of {name} differs from the singular values by "
            f"{error:.2g} of ||W|| (allowed is {allowed:.2g}, the rounding of a half-precision copy)"
        )
    logger.warning("%s: the base weight of %s is a rounding of the one that was adapted", path, name)


def _stored_bases(
    path: Path, plan: Plan, described: dict[str, dict[str, Any]], tensors: dict[str, Tensor]
) -> dict[str, Factorization]:
    stored = {}
    for name, (linear, _) in plan.items():
        if f"{name}.U" not in tensors:
            continue
        weight = base_weight(linear, name)
        _check_base(path, name, described[name], weight, tensors)
        wide = torch.promote_types(weight.dtype, torch.float32)
        # copies: the file's tensors are views of a mapped file, and aligned as the file is
        U, sigma, V = (tensors[f"{name}.{key}"].to(weight.device, wide, copy=True) for key in BASIS)
        stored[name] = Factorization(U, sigma, V, fingerprint(weight), 0.0, tensors[f"{name}.sketch"].clone())
    return stored
