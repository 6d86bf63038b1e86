"""Accuracy of the Cayley op, of merging and of bf16 layers, as Markdown: `python -m bench.accuracy >
bench/results/NAME.md`.

The largest errors against float64 (one torch.linalg.solve a matrix) over RANKS and KAPPAS, and the share of an update
that arrives at a layer's output in bf16; see docs/results.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

import ssvd_kernels as sk
from bench.cases import cayley_by_solve
from ssvd_kernels.integrations.peft import SSVDPeftConfig
from ssvd_kernels.layers.adapt import adapt
from ssvd_kernels.layers.ssvd import SSVDAdapter
from ssvd_kernels.ops.reference import skew

RANKS = (16, 153, 409, 1024)
KAPPAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # ||K||_2
MERGE = (1024, 409)  # d, k
GAIN = (256, 102, 32768)  # d, k, tokens


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def theta_of_norm(k: int, kappa: float) -> Tensor:
    theta = torch.randn(k * (k - 1) // 2, dtype=torch.float64)
    return kappa * theta / torch.linalg.matrix_norm(skew(theta, k), 2)


def rotation_errors(dtype: torch.dtype) -> tuple[float, float]:
    """(relative error of E, largest entry of |G^T G - I|)."""
    error = orthogonality = 0.0
    for k in RANKS:
        for kappa in KAPPAS:
            theta = theta_of_norm(k, kappa).to(dtype)
            error = max(error, relative(sk.cayley_delta(theta, k), cayley_by_solve(theta.double(), k)))
            G = sk.cayley(theta, k).double()
            orthogonality = max(orthogonality, float((G.mT @ G - torch.eye(k)).abs().max()))
    return error, orthogonality


def merge_error(dtype: torch.dtype) -> float:
    """Merged against unmerged output of one layer, the worse of composed and factored, ||K|| = 0.5."""
    d, k = MERGE
    layer = sk.SSVDLinear.from_linear(nn.Linear(d, d, dtype=dtype), sk.SSVDConfig(rank=k))
    with torch.no_grad():
        layer.theta.copy_(theta_of_norm(k, 0.5))
        layer.delta_sigma.normal_(0, 0.02)
    x, outputs = torch.randn(64, d, dtype=dtype), []
    for mode in ("composed", "factored"):
        layer.mode = mode
        outputs.append(layer(x).detach())
    layer.eval().merge()
    return max(relative(output, layer(x).detach()) for output in outputs)


class Autocast(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x.float())


def ssvd(base: nn.Linear) -> nn.Module:
    return adapt(copy.deepcopy(base), sk.SSVDConfig(rank=GAIN[1]))


def by_peft(config: peft.PeftConfig, *others: str) -> Callable[[nn.Linear], nn.Module]:
    def wrap(base: nn.Linear) -> nn.Module:
        model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
        for name in others:
            model.add_adapter(name, config)
        model.base_model.set_adapter(["default", *others])
        return model

    return wrap


def train(model: nn.Module, kappa: float) -> Tensor:
    """||K||_2 = kappa for SSVD, an update of SSVD's size for LoRA; returns the update (d_out, d_in) in float64."""
    update = torch.zeros(GAIN[0], GAIN[0], dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, SSVDAdapter):
            module.theta.copy_(theta_of_norm(module.k, kappa))
            U, V, core = (factor.double() for factor in module.update_factors())
            update += U @ core @ V.mT
        elif isinstance(module, peft.tuners.lora.Linear):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            B.normal_()
            B.mul_(0.9 * kappa * module.weight.norm() / (B @ A).norm())
            update += B.double() @ A.double()
    return update


def base_layers() -> dict[str, nn.Linear]:
    d = GAIN[0]
    half = nn.Linear(d, d, bias=False, dtype=torch.bfloat16)
    half.weight.copy_(torch.randn(d, d) / d**0.5)
    nf4 = Linear4bit(d, d, bias=False, quant_type="nf4")
    nf4.weight.data = half.weight.data
    return {"bf16": half, "float32": copy.deepcopy(half).float(), "nf4": nf4.to("cpu")}


@torch.no_grad()
def gains() -> dict[str, list[float]]:
    """Projection of what an update adds to the output on the exact addition, for each of KAPPAS."""
    config = SSVDPeftConfig(rank=GAIN[1], target_modules=["0"])
    ways: dict[str, tuple[str, Callable[[nn.Linear], nn.Module]]] = {
        "SSVDLinear": ("bf16", ssvd),
        "SSVDLinear, autocast over float32": ("float32", lambda base: Autocast(ssvd(base))),
        "SSVD over NF4": ("nf4", ssvd),
        "SSVD through PEFT": ("bf16", by_peft(config)),
        "SSVD through PEFT, two adapters active": ("bf16", by_peft(config, "other")),
        "LoRA of PEFT, r = 16": ("bf16", by_peft(peft.LoraConfig(r=16, lora_alpha=16, target_modules=["0"]))),
    }
    bases, found = base_layers(), {}
    x = torch.randn(GAIN[2], GAIN[0], dtype=torch.bfloat16)
    for name, (kind, make) in ways.items():
        model, found[name] = make(bases[kind]), []
        y = (Autocast(bases[kind]) if kind == "float32" else bases[kind])(x).double()
        for kappa in KAPPAS[:-1]:
            true = x.double() @ train(model, kappa).mT
            found[name].append(float(((model(x).double() - y) * true).sum() / true.square().sum()))
    return found


def main() -> None:
    torch.manual_seed(0)
    print(f"Largest over k = {RANKS} and ||K|| = {KAPPAS}; torch {torch.__version__}, CPU.\n")
    print("| dtype | relative error of E | largest entry of G^T G - I | merged against unmerged, d = 1024, k = 409 |")
    print("|---|---:|---:|---:|")
    for dtype in (torch.float32, torch.float64):
        error, orthogonality = rotation_errors(dtype)
        name = str(dtype).removeprefix("torch.")
        print(f"| {name} | {error:.1e} | {orthogonality:.1e} | {merge_error(dtype):.1e} |")
    d, k, tokens = GAIN
    print(f"\nShare of the update that arrives at the output in bf16, d = {d}, k = {k}, {tokens} tokens:\n")
    print("| ‖K‖₂ | " + " | ".join(map(str, KAPPAS[:-1])) + " |\n|---|" + len(KAPPAS[:-1]) * "---:|")
    for name, shares in gains().items():
        print(f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")


if __name__ == "__main__":
    main()
