"""inspect: what an adapter file contains, and whether it fits a base model."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.file_format import AdapterFile, read_adapter
from ..adapters.save_load import load_adapter
from ..layers.base import adapted_layers
from ..layers.ssvd import SSVDLinear
from ..ops import reference
from ..ops.functional import rotation_delta
from .base import load_base

COLUMNS = {  # key of a layer's description -> heading
    "name": "layer",
    "shape": "weight",
    "rank": "k",
    "side": "side",
    "rotation": "rotation",
    "band": "band",
    "method": "method",
    "low_rank": "rank",
    "trained": "parameters",
    "turn": "||K||",
    "shift": "shift",
    "relative_shift": "/ sigma",
    "relative_update": "update",
    "basis_stored": "basis",
    "fingerprint": "base weight",
}


def run(args: argparse.Namespace) -> int:
    file = read_adapter(args.adapter)
    found = describe(file)
    if args.base is not None:
        model = load_base(args.base, given=file.tensors)
        load_adapter(model, args.adapter, progress=sys.stderr.isatty())
        _add_base(found, model)
    summary = {"file": str(args.adapter), "bytes": args.adapter.stat().st_size, "format": file.version,
               "strength": file.strength,
               "fits": None if args.base is None else str(args.base),
               "modules_to_save": {name: sum(map(Tensor.numel, own.values())) for name, own in file.saved.items()},
    }  # fmt: skip
    if args.json:
        print(json.dumps({**summary, "layers": found}, indent=1))
    else:
        print(as_text(summary, found))
    return 0


def describe(file: AdapterFile) -> list[dict[str, Any]]:
    """What the file alone tells of each layer; sizes relative to sigma where it stores the basis."""
    found = []
    for name, layer in file.layers.items():
        trained = {key: file.strength * value for key, value in file.trained(name).items()}
        thetas = {key: layer[k] for key, k in (("theta", "k"), ("theta_out", "k_out")) if key in trained}
        turns = [_turn(trained[key], k, layer["rotation"], layer.get("band")) for key, k in thetas.items()]
        shift = trained.get("delta_sigma")
        sigma = file.tensors.get(f"{name}.sigma")
        found.append(
            {
                "name": name,
                **{key: layer.get(key) for key in ("shape", "k", "k_out", "side", "rotation", "band", "fingerprint")},
                "method": layer.get("method"),
                "low_rank": layer.get("rank"),
                "trained": sum(value.numel() for value in trained.values()),
                "dtype": str(next(iter(trained.values())).dtype).removeprefix("torch."),
                "turn": max(turns, default=None),
                "shift": None if shift is None else float(shift.abs().max()),
                "relative_shift": None if shift is None or sigma is None else _relative_shift(shift, sigma),
                "relative_update": None,
                "basis_stored": sigma is not None,
            }
        )
    return found


def as_text(summary: dict[str, Any], layers: list[dict[str, Any]]) -> str:
    trained = sum(layer["trained"] for layer in layers)
    dtypes = ", ".join(sorted({layer["dtype"] for layer in layers}))
    stored = sum(layer["basis_stored"] for layer in layers)
    lines = [
        f"{summary['file']}: {summary['bytes'] / 1e6:.2f} MB, format {summary['format']}",
        f"{len(layers)} layers, {trained:,} trained parameters in {dtypes}, bases of {stored} layers stored",
    ]
    if summary["strength"] != 1:
        lines.append(f"strength {summary['strength']:g}, by which theta and delta_sigma are multiplied")
    if summary["modules_to_save"]:
        sizes = (f"{name} ({size:,} parameters)" for name, size in summary["modules_to_save"].items())
        lines.append(f"trained whole: {', '.join(sizes)}")
    if summary["fits"] is not None:
        lines.append(f"fits the base model {summary['fits']}")
    rows = [list(COLUMNS.values()), *([_cell(layer, key) for key in COLUMNS] for layer in layers)]
    shown = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in shown}
    return "\n".join([*lines, "", *("  ".join(row[i].ljust(widths[i]) for i in shown).rstrip() for row in rows)])


def _cell(layer: dict[str, Any], key: str) -> str:
    if key == "rank":
        return str(layer["k"]) if layer["k_out"] is None else f"{layer['k']}+{layer['k_out']}"
    value = layer[key]
    if key == "shape":
        return "x".join(map(str, value))
    if key == "basis_stored":
        return "stored" if value else ""
    if key == "fingerprint":
        return value[:12]
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def _add_base(found: list[dict[str, Any]], model: nn.Module) -> None:
    layers = adapted_layers(model)
    for description in found:
        layer = layers[description["name"]]
        with torch.no_grad():
            if isinstance(layer, SSVDLinear):
                description["relative_shift"] = _relative_shift(layer.delta_sigma, layer.sigma)
            norm = float(layer.base_weight.float().norm())
            description["relative_update"] = float(layer.orthonormal_factors()[-1].norm()) / norm if norm > 0 else None


def _turn(theta: Tensor, k: int, rotation: str, band: int | None) -> float:
    """||K||, or ||G - I|| of a free rotation, or of a banded M the norm off its diagonal: spectral norms."""
    if rotation in ("free", "banded"):
        matrix = rotation_delta(theta, k, rotation, band)
    else:
        matrix = reference.skew(theta, k)
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


def _relative_shift(delta: Tensor, sigma: Tensor) -> float | None:
    """Largest |delta_i| / sigma_i; None where a sigma is zero."""
    ratio = float((delta.double().abs() / sigma.double()).max())
    return ratio if math.isfinite(ratio) else None
