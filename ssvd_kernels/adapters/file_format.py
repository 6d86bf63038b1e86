"""The adapter file format and its reader, which rejects damaged, altered and foreign files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..basis.factorize import BASIS, SKETCH_ROWS
from ..config import ROTATIONS, SIDES, Config, SpectralFTConfig, SSVDConfig, check_strength
from ..ops.functional import theta_length
from ..utils.safetensors_io import digest

FORMAT_VERSION = 2  # 1 had no modules_to_save and no strength; a reader refuses entries that it does not know


class AdapterError(ValueError):
    """An adapter file that cannot be used: damaged, of another format, or made for another base model."""


class AdapterFile(NamedTuple):
    """An adapter file that was read and found complete and unaltered."""

    path: Path
    version: int
    layers: dict[str, dict[str, Any]]  # name -> description
    tensors: dict[str, Tensor]
    strength: float
    saved: dict[str, dict[str, Tensor]]  # of a module that trains whole, by the names of its Parameters and buffers

    def trained(self, name: str) -> dict[str, Tensor]:
        """What was trained of the layer `name`, by the names of its Parameters."""
        return {key: self.tensors[f"{name}.{key}"] for key in trained_shapes(self.layers[name])}

    def basis(self, name: str) -> tuple[Tensor, ...] | None:
        """U, sigma and V of the layer, where the file stores them."""
        found = [self.tensors.get(f"{name}.{key}") for key in BASIS]
        return None if found[0] is None else tuple(tensor for tensor in found if tensor is not None)

    def sketch(self, name: str) -> Tensor:
        """Sketch (6, k) of the basis that the layer's values refer to."""
        return self.tensors[f"{name}.sketch"]


def read_adapter(path: Path) -> AdapterFile:
    """The file at `path`; AdapterError unless it is complete, unaltered and of a version that is known."""
    if not path.is_file():
        raise FileNotFoundError(f"`path` must be an existing adapter file, got {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged or not a safetensors file: {error}") from None
    if "ssvd_kernels" not in metadata:
        raise AdapterError(f"{path} is not an adapter of ssvd_kernels: its metadata has no 'ssvd_kernels' entry")
    try:
        header = json.loads(metadata["ssvd_kernels"])
        version = header["version"]
        if version not in (1, FORMAT_VERSION):
            raise AdapterError(
                f"{path} must have format version 1 or {FORMAT_VERSION}, got version {version!r}: a newer ssvd_kernels "
                "reads newer ones"
            )
        saved_digest = header.pop("digest")
        _check_known(path, "header", header, {"version", "layers", "modules_to_save", "strength"})
        layers, strength = header["layers"], _strength(path, header)
        saved: dict[str, dict[str, Tensor]] = {name: {} for name in header.get("modules_to_save", [])}
        if not isinstance(layers, dict):
            raise AdapterError(f"{path} has a damaged header: `layers` must be a mapping, got {layers!r}")
        for name, layer in layers.items():
            _check_description(path, name, layer)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path} has a damaged header ({type(error).__name__}: {error})") from None
    if saved_digest != digest(header, tensors):
        raise AdapterError(f"{path} was changed or damaged after it was saved: its digest does not match")
    expected = {key: shape for name, layer in layers.items() for key, shape in _expected_shapes(name, layer).items()}
    for key, shape in expected.items():
        stored = key.rpartition(".")[2] not in BASIS or f"{key.rpartition('.')[0]}.U" in tensors
        if stored and (key not in tensors or tuple(tensors[key].shape) != shape):
            found = tuple(tensors[key].shape) if key in tensors else "no such tensor"
            raise AdapterError(f"{path}: {key} must have shape {shape}, got {found}")
    for key, value in tensors.items():
        name, _, own = key.rpartition(".")
        if name in saved and name not in layers:
            saved[name][own] = value
        elif key not in expected:
            raise AdapterError(f"{path} contains {key!r}, which none of its layers has")
        elif not value.is_floating_point():
            raise AdapterError(f"{path}: {key} must have a floating-point dtype, got {value.dtype}")
        if not bool(torch.isfinite(value).all()):
            raise AdapterError(f"{path}: {key} contains NaN or infinity")
    return AdapterFile(path, version, layers, tensors, strength, saved)


def _strength(path: Path, header: dict[str, Any]) -> float:
    try:
        return check_strength(header.get("strength", 1.0))
    except ValueError as error:
        raise AdapterError(f"{path} has a damaged header: {error}") from None


def _check_known(path: Path, what: str, found: dict[str, Any], known: Collection[str]) -> None:
    unknown = sorted(found.keys() - known)
    if unknown:
        raise AdapterError(
            f"{path}: its {what} has entries that this version of ssvd_kernels does not know: {', '.join(unknown)}"
        )


def _check_description(path: Path, name: str, layer: dict[str, Any]) -> None:
    if not isinstance(layer, dict):
        raise AdapterError(f"{path}: its description of {name} must be a mapping, got {layer!r}")
    allowed: dict[str, Callable[[Any], bool]] = {
        "k": _is_rank,
        "shape": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_rank, value)),
        "fingerprint": lambda value: isinstance(value, str),
    }
    if "method" in layer:  # SSVD's, the first, has none
        allowed |= {"method": lambda value: value == SpectralFTConfig.method, "rank": _is_rank}
    else:
        allowed |= {
            "k_out": lambda value: value is None or _is_rank(value),
            "side": lambda value: value in SIDES,
            "rotation": lambda value: value in ROTATIONS,
        }
    if layer.get("rotation") == "banded":
        allowed["band"] = lambda value: type(value) is int and value >= 0
    _check_known(path, f"description of {name}", layer, allowed)
    for key, check in allowed.items():
        if key not in layer:
            raise AdapterError(f"{path}: its description of {name} has no {key!r}: {layer!r}")
        if not check(layer[key]):
            raise AdapterError(f"{path}: its description of {name} is invalid: {key}={layer[key]!r}")


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def config_of(layer: dict[str, Any]) -> Config:
    """The configuration, but for its targets, of a layer described in a file. Raises as the configurations do."""
    if "method" in layer:
        return SpectralFTConfig(top=layer["k"], rank=layer["rank"])
    side, rotation, band = layer["side"], layer["rotation"], layer.get("band")
    return SSVDConfig(rank=layer["k"], rank_out=layer["k_out"], side=side, rotation=rotation, band=band)


def trained_shapes(layer: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what was trained of a layer described in a file."""
    k = layer["k"]
    if "method" in layer:
        (d_out, d_in), r = layer["shape"], layer["rank"]
        return {"A_out": (d_out, r), "B_out": (r, k), "A_in": (d_in, r), "B_in": (r, k)}
    k_out, rotation = layer["k_out"], layer["rotation"]
    theta = theta_length(k, rotation, layer.get("band"))
    outer = {} if k_out is None else {"theta_out": (theta_length(k_out, rotation),)}
    return {"theta": (theta,), **outer, "delta_sigma": (max(k, k_out or 0),)}


def _expected_shapes(name: str, layer: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d_out, d_in = layer["shape"]
    k = max(layer["k"], layer.get("k_out") or 0)
    shapes = trained_shapes(layer)
    shapes |= {"sketch": (2 * SKETCH_ROWS, k), "U": (d_out, k), "sigma": (k,), "V": (d_in, k)}
    return {f"{name}.{key}": shape for key, shape in shapes.items()}
