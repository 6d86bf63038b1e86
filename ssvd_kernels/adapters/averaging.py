"""Averages of adapters of one base model: of what they trained, in a model or of files, or exactly of their updates."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..basis.factorize import match_signs
from ..config import check_choice
from ..layers.base import AdaptedLinear
from ..layers.saved import SavedModule
from ..layers.ssvd import SSVDLinear
from ..model.lookup import saved_modules
from ..ops.functional import core_of, flip_theta
from .file_format import AdapterError, AdapterFile, read_adapter
from .save_load import write_adapter, write_file
from .switching import add_adapter, ready_layers, set_strength

OF = ("rotations", "updates")


@torch.no_grad()
def average_adapters(
    model: torch.nn.Module, weights: Mapping[str, float], into: str | os.PathLike[str], of: str = "rotations"
) -> None:
    """The weighted mean of the adapters named in `weights`, each at its strength s_a.

    of="rotations"   theta = sum_a w_a s_a theta_a / sum_a w_a, and so for delta_sigma: with rotation="cayley" the mean
                     of K in the Lie algebra, so that G = cayley(K) stays orthogonal. `into` names a new adapter, or one
                     that is overwritten; its strength is 1.
    of="updates"     the exact mean of the updates, U mean(M_a) V^T, which is no rotation any more: `into` is a file, of
                     an adapter with rotation="free", E = (Sigma + dSigma)^-1 (mean(M_a) - dSigma), dSigma the mean.
    `modules_to_save` are averaged as they are. weights: name -> number >= 0, not all zero. Raises ValueError for
    others, unknown names and merged models, where Sigma + dSigma has a zero, and for SpectralFT: its update is a
    product of what trains, and the mean of factors is not the factor of a mean.
    """
    check_choice("of", of, OF)
    layers, shares = ready_layers(model, *weights), dict(zip(weights, _shares(weights.values())))
    ours: dict[str, SSVDLinear] = {}
    for name, layer in layers.items():
        if not isinstance(layer, SSVDLinear):
            raise ValueError(
                f"only SSVD adapters, whose average has the same rank, can be averaged, but {name} is adapted by "
                f"{layer.config_type.method}, whose update is a product of its trainable parameters"
            )
        ours[name] = layer
    if of == "updates":
        means = {name: (_mean_update(name, layer, shares), _free(layer)) for name, layer in ours.items()}
        modules = {name: _mean_of(module, shares) for name, module in saved_modules(model).items()}
        write_adapter(into, layers, means, modules)
        return
    name = str(into)
    if not all(name in layer.adapter_names() for layer in layers.values()):
        add_adapter(model, name)
    together: list[AdaptedLinear | SavedModule] = [*layers.values(), *saved_modules(model).values()]
    for module in together:
        mean = _mean_of(module, shares)
        for key, tensor in module.adapter(name).items():
            tensor.copy_(mean[key])
    set_strength(model, 1.0, name)
    for layer in layers.values():
        layer.forget()


def average_files(
    paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], weights: Sequence[float] | None = None
) -> None:
    """Writes the adapter `out` with the mean of rotations (see `average_adapters`) of adapter files of one base model.

    Needs no model. Raises AdapterError, naming file, layer and value, where a file has another base, layer, rank, side
    or rotation than the first one, and ValueError for SpectralFT.
    """
    files = [read_adapter(Path(path)) for path in paths]
    if len(files) < 2 or len(files) != len(weights or files):
        raise ValueError(f"`paths` must be two files at least, one for each weight, got {len(files)}")
    shares = _shares(weights or [1.0] * len(files))
    for file in files[1:]:
        _check_same(files[0], file)
    tensors = dict(files[0].tensors)
    for name, layer in files[0].layers.items():
        if "method" in layer:
            raise ValueError(f"only SSVD adapters can be averaged, but {name} is adapted by {layer['method']}")
        found = [_aligned(files[0], file, name) for file in files]
        for key in found[0]:
            terms = [(share * file.strength, own[key]) for share, file, own in zip(shares, files, found)]
            tensors[f"{name}.{key}"] = _mean(terms).to(found[0][key])
    for name, own in files[0].saved.items():
        for key, tensor in own.items():
            terms = [(share, file.saved[name][key]) for share, file in zip(shares, files)]
            tensors[f"{name}.{key}"] = _mean(terms).to(tensor)
    if not Path(out).parent.is_dir():
        raise FileNotFoundError(f"`out` must be in an existing folder, got {str(out)!r}")
    write_file(Path(out), files[0].layers, tensors, list(files[0].saved), 1.0)


def _shares(weights: Collection[float]) -> list[float]:
    if not weights or not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
        raise ValueError(f"`weights` must be numbers >= 0, not all zero, got {list(weights)!r}")
    return [weight / sum(weights) for weight in weights]


def _mean_of(module: AdaptedLinear | SavedModule, shares: Mapping[str, float]) -> dict[str, Tensor]:
    terms = [(share * module.strength_of(name), module.adapter(name)) for name, share in shares.items()]
    return {key: _mean([(share, own[key]) for share, own in terms]).to(t) for key, t in terms[0][1].items()}


def _mean_update(name: str, layer: SSVDLinear, shares: Mapping[str, float]) -> dict[str, Tensor]:
    """theta and delta_sigma of the free core, computed in float64."""
    sigma = layer.sigma.double()
    mean, delta = torch.zeros_like(sigma).diag(), torch.zeros_like(sigma)
    for adapter, share in shares.items():
        own = {key: tensor.double() for key, tensor in layer.adapter(adapter).items()}
        strength = layer.strength_of(adapter)
        kind = layer.kind._replace(strength=strength)
        mean += share * core_of(kind, own["theta"], own.get("theta_out"), own["delta_sigma"], sigma)
        delta += share * strength * own["delta_sigma"]
    scale = sigma + delta
    if bool((scale == 0).any()):
        raise ValueError(f"{name} has a singular value that is 0 once shifted: its mean update has no free core")
    E = (mean - torch.diag(delta)) / scale.unsqueeze(1)
    return {"theta": E.flatten().to(layer.theta.dtype), "delta_sigma": delta.to(layer.theta.dtype)}


def _free(layer: SSVDLinear) -> dict[str, object]:
    """The description of a layer with a free core and the same basis."""
    shape = layer.description()["shape"]
    return {"k": layer.k, "k_out": None, "side": "input", "rotation": "free", "shape": shape}


def _mean(terms: list[tuple[float, Tensor]]) -> Tensor:
    first, *others = [share * tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for share, tensor in terms]
    for other in others:
        first += other
    return first


def _aligned(first: AdapterFile, file: AdapterFile, name: str) -> dict[str, Tensor]:
    """What was trained, expressed in the basis of the first file."""
    layer, values = file.layers[name], file.trained(name)
    signs = match_signs(first.sketch(name), file.sketch(name))
    if signs is None:
        raise AdapterError(f"{file.path}: the singular vectors of {name} are others than in {first.path}")
    thetas = {key: layer[k] for key, k in (("theta", "k"), ("theta_out", "k_out")) if key in values}
    return values | {
        key: flip_theta(values[key], signs[:k], layer["rotation"], layer.get("band")) for key, k in thetas.items()
    }


def _check_same(first: AdapterFile, file: AdapterFile) -> None:
    if differing := sorted(first.layers.keys() ^ file.layers.keys()):
        raise AdapterError(f"{file.path} adapts other layers than {first.path}, e.g. {differing[0]!r}")
    for name, layer in first.layers.items():
        for key in layer.keys() | file.layers[name].keys():
            mine, theirs = layer.get(key), file.layers[name].get(key)
            if mine != theirs:
                raise AdapterError(f"{file.path}: {name} has {key}={theirs!r}, but in {first.path} it has {mine!r}")
    shapes = [{n: {k: t.shape for k, t in own.items()} for n, own in each.saved.items()} for each in (first, file)]
    if shapes[0] != shapes[1]:
        raise AdapterError(f"{file.path} has other modules_to_save than {first.path}")
