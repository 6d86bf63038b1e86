"""Parts of a model's work apart: decoding one token, and what a training step pays besides its linear layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench import layers, work
from bench.harness import Case, Run, Version
from bench.layers import Factors
from bench.versions import PEER_BOUND, chosen, held, in_float64, leaf, passes_of, twice
from ssvd_kernels import SSVDConfig
from ssvd_kernels.model.inject import install


def decode_case(dtype: torch.dtype, d_in: int, d_out: int, k: int) -> Case:
    """One token through one layer in eval without gradients, as a decoder's step: merged, unmerged, and the base."""

    def build(device: torch.device) -> list[Version]:
        f = Factors.draw(dtype, d_in, d_out, k, device)
        x = torch.randn(1, d_in, device=device, dtype=dtype)
        base = dtype.itemsize * (d_in * d_out + d_in + d_out)
        found = []

        def version(name: str, module: nn.Module, bound: Sequence[float], exact: Tensor, **more: str | bool) -> Version:
            factors = 0 if name == "frozen linear" or more.get("mode") == "merged" else 4 * k * (d_in + d_out + k)
            flops = 2 * d_in * d_out + factors / 2
            run = _evaluated(module, x)
            return Version(name, run, [exact], bound, flops, base + factors, held=held(module), **more)

        frozen, naive = layers.linear(f), layers.NaiveLayer(f)
        exact_frozen, exact = (_evaluated(copy.deepcopy(m).double(), x.double())()[0] for m in (frozen, naive))
        found.append(version("frozen linear", frozen, [PEER_BOUND[dtype]], exact_frozen))
        found.append(version("naive", naive, [PEER_BOUND[dtype]], exact, capturable=False))
        bound = twice(found[-1].run, [exact], dtype)
        for mode in ("merged", "auto"):
            layer = layers.ssvd_layer(f).eval()
            if mode == "merged":
                layer.merge()
            found.append(version("ssvd", layer, bound, exact, backend="auto", mode=mode))
        return found

    return Case("decode", dtype, build, "frozen linear", 1, d_in, d_out, k, passes=("token",))


def _evaluated(module: nn.Module, x: Tensor) -> Run:
    module.eval()

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (module(x),)

    return run


class Fan(nn.Module):
    """Layers that all read x (T, d): (B, T, d)."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts])


def extras_case(dtype: torch.dtype, B: int, T: int, d: int, k: int) -> Case:
    """Forward and backward of B layers of few tokens, W' composed: less those of the frozen layers, it is what a
    model's step pays for its rotations, compositions and projections, whatever the number of its tokens."""

    def build(device: torch.device) -> list[Version]:
        f = Factors.draw(dtype, d, d, k, device)
        x, dy = torch.randn(T, d, device=device, dtype=dtype), torch.randn(B, T, d, device=device, dtype=dtype)
        found, size = [], (T, d, d, k)

        def version(name: str, fan: Fan, exact: list[Tensor], bound: list[float], mode: str = "") -> Version:
            flops, moved = B * work.layer_flops(name, mode, *size), B * work.layer_bytes(name, dtype.itemsize, *size)
            run = passes_of(fan, leaf(x), dy, fan)
            backend = "auto" if name == "ssvd" else "torch"
            return Version(name, run, exact, bound, flops, moved, backend, mode, held=held(fan))

        frozen, naive = (Fan([make(f.clone()) for _ in range(B)]) for make in (layers.linear, layers.NaiveLayer))
        for name, fan in (("frozen linear", frozen), ("naive", naive)):
            exact = in_float64(fan, x, dy)
            found.append(version(name, fan, exact, [PEER_BOUND[dtype]] * len(exact)))
        found[-1] = replace(found[-1], capturable=False)  # torch.linalg.solve waits for the device
        bound = twice(found[-1].run, exact, dtype)
        for mode in ("composed", "factored"):
            fan = _injected(f, B)
            for layer in fan.parts:
                layer.mode = mode
            found.append(version("ssvd", fan, exact, bound, chosen(device, dtype, *size, mode)[0]))
        return found

    return Case("extras", dtype, build, "frozen linear", T, d, d, k, batch=B)


def _injected(f: Factors, B: int) -> Fan:
    """B adapted layers under one root, whose forward makes all rotations in one batch."""
    fan = Fan([layers.linear(f.clone()) for _ in range(B)])
    linears = {f"parts.{i}": part for i, part in enumerate(fan.parts)}
    known = f.factorization()
    found = {name: known._replace(U=known.U.clone(), sigma=known.sigma.clone(), V=known.V.clone()) for name in linears}
    install(fan, {name: (linear, SSVDConfig(rank=f.k)) for name, linear in linears.items()}, found)
    for layer in fan.parts:
        layers.adapted(layer, f)
    return fan
