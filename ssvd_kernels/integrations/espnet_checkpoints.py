"""Converts checkpoints of ESPnet's own SSVD adapter to adapters of this package, and back.

For each layer, such a checkpoint contains weight (the base weight W, or W' if it was saved after eval()), bias, K_vec,
s, gate, u, v, s_pre, svd_initialized and K_triu_idx. With K from K_vec, G = I - 2K ("linear") or the Cayley transform,
and D = diag(s_pre + sigmoid(gate) s on the first k):

    d_out >= d_in   W = u diag(s_pre) v        W' = u D G v      our side "input",  U = u, V = v^T
    d_out <  d_in   W = (u diag(s_pre) v)^T    W' = (u D G v)^T  our side "output", U = v^T, V = u

The file records neither the map nor whether weight is W or W'. The caller specifies the map; W or W' is determined by
comparison. The singular vectors are copied: recomputed ones would differ, and theta would describe a different update.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters.file_format import read_adapter
from ..adapters.save_load import load_adapter, save_adapter
from ..basis.factorize import MATCH_TOLERANCE, Factorization, fingerprint, sketch
from ..config import SSVDConfig, check_choice
from ..layers.adapter import Adapter
from ..layers.base import adapted_layers
from ..layers.quantized import plain_linear
from ..layers.ssvd import SSVDLinear
from ..model.lookup import ssvd_layers

logger = logging.getLogger(__name__)

RotationMap = Literal["linear", "cayley"]
MAPS: tuple[RotationMap, ...] = ("linear", "cayley")
Held = Literal["W", "W'", "nothing"]
Source = str | os.PathLike[str] | Mapping[str, Any]
_NEEDED = ("K_vec", "s", "gate", "u", "v", "s_pre")
_OWN = (*_NEEDED, "svd_initialized", "K_triu_idx")  # what only an adapted layer has


class ConversionError(ValueError):
    """A checkpoint or an adapter that cannot be converted without changing what it computes."""


@dataclass
class Conversion:
    """What was converted: layer name -> rank, the map, and layer name -> what its `weight` held."""

    ranks: dict[str, int]
    rotation_map: RotationMap
    weights: dict[str, Held]

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        rank = f"k = {low}" if low == high else f"k = {low} to {high}"
        merged = sum(held == "W'" for held in self.weights.values())
        return f"{len(self.ranks)} layers, {rank}, rotation_map {self.rotation_map}, {merged} of them merged"


def from_espnet(
    checkpoint: Source,
    path: str | os.PathLike[str],
    *,
    rotation_map: RotationMap | None = None,
    base: Source | None = None,
    base_path: str | os.PathLike[str] | None = None,
) -> Conversion:
    """Writes the adapter of an ESPnet SSVD checkpoint to `path`, with its singular vectors, for `load_adapter`.

    checkpoint     a .pth file (read with weights_only=True) or a state dict; partial ones need no weight
    rotation_map   the map that the checkpoint was trained with; None takes ESPnet's default "linear" and logs that
    base           .pth file or state dict of the model before fine-tuning. Without it the adapter belongs to the
                   weights of the checkpoint: to `weight` where that is W, to u diag(s_pre) v where it is W'
    base_path      writes those base weights, and all else the checkpoint holds, as a plain ESPnet model file

    W' of the loaded adapter is the checkpoint's to float32 rounding. Raises FileNotFoundError for a missing file and
    ConversionError, with nothing written, for a checkpoint without SSVD layers, a layer that lacks a tensor, has one
    of a wrong shape, was never factorised, or whose weight is neither W nor W'.
    """
    if rotation_map is None:
        logger.warning("`rotation_map` was not given and checkpoints do not store it: assuming the default, 'linear'")
        rotation_map = "linear"
    check_choice("rotation_map", rotation_map, MAPS)
    _check_folder("base_path", base_path)
    state = _read(checkpoint, "checkpoint")
    originals = {} if base is None else _read(base, "base")
    names = [key.removesuffix(".K_vec") for key in state if key.endswith(".K_vec")]
    if not names:
        raise ConversionError("`checkpoint` must contain layers of ESPnet's SSVD adapter, but no key ends in '.K_vec'")
    model, weights = nn.Module(), {}
    for name in names:
        W0 = originals.get(f"{name}.weight")
        if base is not None and W0 is None:
            raise ConversionError(f"`base` has no {name}.weight, which the checkpoint adapts")
        layer = _parse(name, state, W0)
        weights[name] = held = _held(layer, rotation_map)
        if W0 is None:
            W0 = layer.weight if held == "W" and layer.weight is not None else layer.W
        _place(model, name, layer.over(W0, rotation_map))
    rebuilt = [name for name, held in weights.items() if held != "W"]
    if rebuilt and base is None:
        logger.warning(
            "%d of %d layers do not contain their base weight: the adapter belongs to u diag(s_pre) v, which differs "
            "from the original by rounding. Pass `base`, or save those weights with `base_path`",
            len(rebuilt),
            len(names),
        )
    save_adapter(model, path, save_bases=True)
    layers = ssvd_layers(model)
    if base_path is not None:
        own = {f"{name}.{key}" for name in names for key in _OWN}
        plain = {key: value for key, value in state.items() if key not in own}
        torch.save(plain | {f"{name}.weight": layer.base_weight.detach() for name, layer in layers.items()}, base_path)
    return Conversion({name: layer.k for name, layer in layers.items()}, rotation_map, weights)


def to_espnet(
    adapter: str | os.PathLike[str],
    base: Source,
    path: str | os.PathLike[str] | None = None,
    *,
    merged: bool = True,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The state dict of ESPnet's SSVD adapter for an adapter file and its base model; written to `path` if given.

    base      .pth file or state dict of the base model, whose other tensors are taken over
    merged    whether `weight` holds W', as in the files that ESPnet writes, or W

    gate is 0 and s twice delta_sigma. ESPnet's configuration needs the adapter's rotation_map and rank, which are
    logged. Raises what `load_adapter` raises if the adapter does not fit the base, and ConversionError for what ESPnet
    does not have: SVFT, SpectralFT, rotation="free", side="both", a rotation of the larger side, several rotations,
    or `modules_to_save`.
    """
    _check_folder("path", path)
    state = _read(base, "base")
    model = nn.Module()
    for key, weight in state.items():
        if key.endswith(".weight") and isinstance(weight, Tensor) and weight.ndim == 2:
            name = key.removesuffix(".weight")
            _place(model, name, plain_linear(weight, state.get(f"{name}.bias")))
    whole = read_adapter(Path(adapter)).saved
    if whole:
        raise ConversionError(f"ESPnet's adapter has no modules that train whole, but this one has {list(whole)}")
    load_adapter(model, adapter, progress=progress)
    layers = {name: _exportable(name, layer) for name, layer in adapted_layers(model).items()}
    rotations = sorted({layer.rotation for layer in layers.values()})
    if len(rotations) > 1:
        raise ConversionError(f"the adapter's layers must all have the same rotation, as in ESPnet, got {rotations}")
    converted = dict(state)
    for name, layer in layers.items():
        converted |= {f"{name}.{key}": tensor for key, tensor in _export(layer, merged).items()}
    ranks = sorted({layer.k for layer in layers.values()})
    logger.info("ESPnet's adapter_conf: adapter_type: ssvd, rotation_map: %s, rank: %s", rotations[0], ranks)
    if path is not None:
        torch.save(converted, path)
    return converted


# -- one layer of ESPnet's ---------------------------------------------------------------------------------------


@dataclass
class _Layer:
    """In our terms: the top triplets U, sigma, V of W (d_out, d_in), what was trained, and what `weight` held."""

    name: str
    side: Literal["input", "output"]
    U: Tensor
    sigma: Tensor
    V: Tensor
    W: Tensor
    theta: Tensor
    delta_sigma: Tensor
    weight: Tensor | None
    allowed: float  # difference of equal matrices, relative to their norm

    def over(self, base: Tensor, rotation: RotationMap) -> SSVDLinear:
        """The adapted layer over a base weight."""
        base = base.to(self.W.dtype).contiguous()
        config = SSVDConfig(rank=len(self.sigma), side=self.side, rotation=rotation)
        # gap 0: another factorisation does not give this basis
        triplets = Factorization(self.U, self.sigma, self.V, fingerprint(base), 0.0, sketch(self.U, self.V))
        layer = SSVDLinear(plain_linear(base, None), config, triplets)
        with torch.no_grad():
            layer.theta.copy_(self.theta)
            layer.delta_sigma.copy_(self.delta_sigma)
        return layer


def _parse(name: str, state: Mapping[str, Any], W0: Tensor | None) -> _Layer:
    """The layer `name` of a checkpoint, checked; W0 is its original weight, if known."""
    absent = [key for key in _NEEDED if f"{name}.{key}" not in state]
    if absent:
        raise ConversionError(f"{name} lacks {', '.join(absent)}, so it cannot be converted")
    if not bool(state.get(f"{name}.svd_initialized", True)):
        raise ConversionError(f"{name}.svd_initialized is False: u, v and s_pre were never computed")
    used = {key: state[f"{name}.{key}"] for key in (*_NEEDED, "weight") if f"{name}.{key}" in state}
    for key, tensor in used.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            got = "NaN or infinity" if tensor.is_floating_point() else tensor.dtype
            raise ConversionError(f"{name}.{key} must contain finite floats, got {got}")
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in [*used.values(), used["u"] if W0 is None else W0])
    wide = torch.promote_types(used["u"].dtype, torch.float32)
    K_vec, s, gate, u, v, s_pre = (used[key].to(wide) for key in _NEEDED)
    k, weight = _rank(name, K_vec, s, s_pre), used.get("weight")
    d_out, d_in = _shape(name, u, v, s_pre, W0 if weight is None else weight, state.get(f"{name}.bias"))
    W = ((u.double() * s_pre.double()) @ v.double()).to(wide)
    theta, delta_sigma = _theta(name, K_vec, state.get(f"{name}.K_triu_idx"), k), s * torch.sigmoid(gate)
    allowed = max(MATCH_TOLERANCE, 2 * coarsest)
    sigma, left, right = s_pre[:k].clone(), u[:, :k].contiguous(), v[:k].mT.contiguous()
    if d_out >= d_in:
        layer = _Layer(name, "input", left, sigma, right, W, theta, delta_sigma, weight, allowed)
    else:
        layer = _Layer(name, "output", right, sigma, left, W.mT, theta, delta_sigma, weight, allowed)
    if W0 is not None and not _difference(W0, layer.W) <= allowed:
        raise ConversionError(
            f"`base` is a different model: its {name}.weight differs from u diag(s_pre) v by a relative error of "
            f"{_difference(W0, layer.W):.2g} (tolerance {allowed:.2g})"
        )
    return layer


def _held(layer: _Layer, rotation_map: RotationMap) -> Held:
    """Whether `weight` is W or W': the nearer of the two, which it must be to rounding."""
    if layer.weight is None:
        return "nothing"

    def distance(rotation: RotationMap) -> float:
        assert layer.weight is not None
        return _difference(layer.weight, layer.over(layer.W, rotation).compose())

    from_W, from_adapted = _difference(layer.weight, layer.W), distance(rotation_map)
    if min(from_W, from_adapted) <= layer.allowed:
        return "W" if from_W <= from_adapted else "W'"
    fitting = [other for other in MAPS if other != rotation_map and distance(other) <= layer.allowed]
    hint = f"it fits rotation_map={fitting[0]!r}" if fitting else "an average of merged weights is neither"
    raise ConversionError(
        f"{layer.name}.weight has a relative error of {from_W:.2g} to W and of {from_adapted:.2g} to W' with "
        f"rotation_map={rotation_map!r} (tolerance {layer.allowed:.2g}): {hint}"
    )


def _rank(name: str, K_vec: Tensor, s: Tensor, s_pre: Tensor) -> int:
    """k with k(k-1)/2 = len(K_vec)."""
    m = K_vec.numel()
    k = (1 + math.isqrt(1 + 8 * m)) // 2
    if k * (k - 1) // 2 != m or s.shape != (k,) or not k <= s_pre.numel():
        raise ConversionError(
            f"{name}: K_vec, s and s_pre must have k(k-1)/2, k and at least k elements, got {m}, {s.numel()} and "
            f"{s_pre.numel()}"
        )
    return k


def _shape(
    name: str, u: Tensor, v: Tensor, s_pre: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[int, int]:
    """(d_out, d_in) of the weight, which u (max, r), v (r, r) and s_pre (r,) fit."""
    r, long = s_pre.numel(), u.shape[0]
    if u.shape != (long, r) or v.shape != (r, r) or long < r:
        raise ConversionError(
            f"{name}: u, v and s_pre must have shapes (max(d_in, d_out), r), (r, r) and (r,), r = min(d_in, d_out), "
            f"got {tuple(u.shape)}, {tuple(v.shape)} and {tuple(s_pre.shape)}"
        )
    if weight is not None:
        shape = tuple(weight.shape)
    elif bias is not None or long == r:
        shape = (r, long) if bias is not None and bias.numel() == r else (long, r)
    else:
        raise ConversionError(f"{name} has neither weight nor bias to tell d_in from d_out: pass `base`")
    if shape not in ((long, r), (r, long)):
        raise ConversionError(f"{name}.weight must have shape {(long, r)} or {(r, long)}, to fit u and v, got {shape}")
    return shape


def _theta(name: str, K_vec: Tensor, index: Tensor | None, k: int) -> Tensor:
    """K_vec in our order: row by row over the strict upper triangle. `index` (2, m) says which entry is which."""
    ours = torch.triu_indices(k, k, offset=1)
    if index is None or k == 1:
        return K_vec
    if index.shape == ours.shape and not index.is_floating_point():
        averaged = int(index[1, 0])  # of so many checkpoints: ESPnet adds up integer tensors
        if averaged >= 1 and torch.equal(index, averaged * ours):
            return K_vec
        i, j = index
        low, high = torch.minimum(i, j), torch.maximum(i, j)
        order = torch.argsort(low * k + high)
        if torch.equal(torch.stack([low, high])[:, order], ours):
            return torch.where(i < j, K_vec, -K_vec)[order]
    raise ConversionError(f"{name}.K_triu_idx must contain each pair of 0..{k - 1} exactly once")


def _difference(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny))


def _exportable(name: str, layer: Adapter) -> SSVDLinear:
    if not isinstance(layer, SSVDLinear):
        raise ConversionError(f"{name} must be adapted by SSVD for ESPnet, got {layer.config_type.method}")
    if layer.rotation not in MAPS:
        maps = " or ".join(map(repr, MAPS))
        raise ConversionError(f"{name} must have rotation {maps} for ESPnet, got {layer.rotation!r}")
    side = "input" if layer.out_features >= layer.in_features else "output"
    if layer.side != side:
        raise ConversionError(
            f"{name} of shape ({layer.out_features}, {layer.in_features}) must have side={side!r}, the smaller side, "
            f"for ESPnet, got {layer.side!r}"
        )
    return layer


@torch.no_grad()
def _export(layer: SSVDLinear, merged: bool) -> dict[str, Tensor]:
    """The tensors of ESPnet's layer. u, v and s_pre are complete: after our k triplets come those of what is left."""
    U, sigma, V = (tensor.double() for tensor in (layer.U, layer.sigma, layer.V))
    rest = layer.base_weight.double() - (U * sigma) @ V.mT
    left, values, right = torch.linalg.svd(rest, full_matrices=False)
    r = min(rest.shape) - layer.k
    U, sigma, V = torch.cat([U, left[:, :r]], 1), torch.cat([sigma, values[:r]]), torch.cat([V, right[:r].mT], 1)
    u, v = (U, V.mT) if layer.side == "input" else (V, U.mT)
    dtype = layer.sigma.dtype
    tensors = {
        "weight": layer.compose() if merged else layer.base_weight,
        "K_vec": layer.theta,
        "s": 2 * layer.delta_sigma,
        "gate": layer.sigma.new_zeros(1),
        "u": u.to(dtype).contiguous(),
        "v": v.to(dtype).contiguous(),
        "s_pre": sigma.to(dtype),
        "svd_initialized": torch.tensor(True),
        "K_triu_idx": torch.triu_indices(layer.k, layer.k, offset=1),
    }
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


# -- files and names ---------------------------------------------------------------------------------------------


def _read(source: Source, argument: str) -> Mapping[str, Any]:
    """A state dict: as given, or from a .pth file, taken out of a trainer's or DeepSpeed's checkpoint."""
    state: Any = source
    if not isinstance(source, Mapping):
        if not Path(source).is_file():
            raise FileNotFoundError(f"`{argument}` must be an existing file, got {str(source)!r}")
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ConversionError(
                f"`{argument}` must be a model file of tensors only (read with weights_only=True), such as "
                f"15epoch.pth, got {str(source)!r} ({str(error).splitlines()[0]})"
            ) from None
    for wrapper in ("model", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise ConversionError(f"`{argument}` must contain a state dict, got {type(state).__name__}")
    return state


def _check_folder(argument: str, path: str | os.PathLike[str] | None) -> None:
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(f"`{argument}` must be in an existing folder, got {str(path)!r}")


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    """Sets model.a.b.c for name "a.b.c", with plain modules on the way."""
    *parents, child = name.split(".")
    for parent in parents:
        if parent not in model._modules:
            model.add_module(parent, nn.Module())
        model = model.get_submodule(parent)
    model.add_module(child, module)
