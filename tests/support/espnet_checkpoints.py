"""Checkpoints as ESPnet's own SSVD adapter writes them, and the W' they mean, made from the formulas in float64 numpy.

W = u diag(s_pre) v   (of W^T where d_out < d_in),   W' = u diag(s_pre + s sigmoid(gate), 0...) A v,
A = I - 2K on the first k rows ("linear"), or (I - K)(I + K)^-1 ("cayley"),   K[i, j] = K_vec = -K[j, i], i < j
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SHAPES = {"tall": (24, 16), "square": (16, 16), "wide": (16, 24)}
BIAS = {"tall": True, "square": True, "wide": False}
RANK = {"tall": 6, "square": 16, "wide": 5}


def layer(
    shape: tuple[int, int], k: int, rotation_map: str, *, merged: bool, bias: bool, seed: int, scale: float = 0.1
) -> tuple[dict[str, Tensor], np.ndarray]:
    """(the layer's tensors in float32, W)."""
    random = np.random.default_rng(seed)
    d_out, d_in = shape
    W = random.standard_normal(shape).astype(np.float32)
    tall = d_out >= d_in
    u, s_pre, v = np.linalg.svd(W if tall else W.T, full_matrices=False)
    u, s_pre, v = (a.astype(np.float32) for a in (u, s_pre, v))
    K_vec = (scale * random.standard_normal(k * (k - 1) // 2)).astype(np.float32)
    s = (0.5 * random.standard_normal(k)).astype(np.float32)
    gate = random.standard_normal(1).astype(np.float32)
    adapted = _compose(u, s_pre, v, K_vec, s, gate, rotation_map)
    tensors = {
        "weight": (adapted if tall else adapted.T).astype(np.float32) if merged else W,
        "K_vec": K_vec,
        "s": s,
        "gate": gate,
        "u": u,
        "v": v,
        "s_pre": s_pre,
        "svd_initialized": np.array(True),
        "K_triu_idx": np.stack(np.triu_indices(k, 1)).astype(np.int64),
    }
    if bias:
        tensors["bias"] = random.standard_normal(d_out).astype(np.float32)
    found = {key: torch.tensor(array.copy()) for key, array in tensors.items()}
    return found, W


def effective(tensors: dict[str, Tensor], rotation_map: str, dtype: type = np.float64) -> np.ndarray:
    """W' as ESPnet computes it from a layer's tensors, whatever its `weight` holds."""
    arrays = [tensors[key].double().numpy() for key in ("u", "s_pre", "v", "K_vec", "s", "gate")]
    adapted = _compose(*arrays, rotation_map, dtype)
    d_out, d_in = tensors["weight"].shape
    return adapted if d_out >= d_in else adapted.T


def both(tensors: dict[str, Tensor], rotation_map: str) -> tuple[Tensor, Tensor]:
    """W' in float32, the yardstick of the bounds, and in float64."""
    found = (effective(tensors, rotation_map, dtype) for dtype in (np.float32, np.float64))
    return tuple(torch.tensor(weight) for weight in found)


def rebuilt(tensors: dict[str, Tensor]) -> Tensor:
    """u diag(s_pre) v, which is W but for rounding, in float32."""
    weight = (tensors["u"] * tensors["s_pre"]) @ tensors["v"]
    d_out, d_in = tensors["weight"].shape
    return weight if d_out >= d_in else weight.mT


def _compose(u, s_pre, v, K_vec, s, gate, rotation_map: str, dtype: type = np.float64) -> np.ndarray:
    u, s_pre, v, K_vec, s, gate = (array.astype(dtype) for array in (u, s_pre, v, K_vec, s, gate))
    k = len(s)
    K = np.zeros((k, k), dtype)
    K[np.triu_indices(k, 1)] = K_vec  # row by row
    K = K - K.T
    eye = np.eye(k, dtype=dtype)
    A = eye - 2 * K if rotation_map == "linear" else (eye - K) @ np.linalg.inv(eye + K)
    sigma, rotated = s_pre.copy(), v.copy()
    sigma[:k] += s / (1 + np.exp(-gate))
    rotated[:k] = A @ rotated[:k]
    return (u * sigma) @ rotated


def checkpoint(
    rotation_map: str, *, merged: bool = True, scale: float = 0.1
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """(state dict with a tall, a square and a wide adapted layer and others, the base model's, layer -> `both`)."""
    state: dict[str, Tensor] = {"encoder.embed.weight": torch.randn(7, 3), "encoder.norm.bias": torch.randn(3)}
    base, adapted = dict(state), {}
    for seed, (kind, shape) in enumerate(SHAPES.items()):
        name = f"encoder.{seed}.{kind}"
        tensors, W = layer(shape, RANK[kind], rotation_map, merged=merged, bias=BIAS[kind], seed=seed, scale=scale)
        adapted[name] = both(tensors, rotation_map)
        state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        base[f"{name}.weight"] = torch.tensor(W)
        if "bias" in tensors:
            base[f"{name}.bias"] = tensors["bias"]
    return state, base, adapted
