"""Accuracy of the Cayley op, of merging, of bf16 layers and of the activation form, as Markdown: `python -m
bench.accuracy > bench/results/NAME.md`.

The largest errors against float64 (one torch.linalg.solve a matrix) over RANKS and KAPPAS, the share of an update that
arrives at a layer's output in bf16, the outputs of both forms on the weights of Whisper tiny.en (which `make demo`
fetches), and what the activation form loses where sigma_k is small; see docs/results.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import peft
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

import ssvd_kernels as sk
from bench.cases import cayley_by_solve
from experiments.asr.fetch import default_data
from experiments.asr.whisper_ct2 import load_whisper_ct2
from ssvd_kernels.basis.factorize import factorize
from ssvd_kernels.config import Form
from ssvd_kernels.integrations.peft import SSVDPeftConfig
from ssvd_kernels.layers.adapt import adapt
from ssvd_kernels.layers.ssvd import SSVDAdapter
from ssvd_kernels.model.targets import find_targets
from ssvd_kernels.ops.reference import activation_core_ref, core_ref, skew

RANKS = (16, 153, 409, 1024)
KAPPAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # ||K||_2
MERGE = (1024, 409)  # d, k
NORMS = (1e-4, 1e-2, 1.0)  # the same, of the forms' outputs
GAIN = (256, 102, 32768)  # d, k, tokens
RATIOS = (1e-1, 1e-2, 3e-3, 1e-3, 1e-4, 1e-6)  # sigma_k / sigma_1


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


def ssvd(base: nn.Linear, form: Form = "weight") -> nn.Module:
    return adapt(copy.deepcopy(base), sk.SSVDConfig(rank=GAIN[1], form=form))


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
        "activation form": ("bf16", partial(ssvd, form="activation")),
        "activation form, autocast over float32": ("float32", lambda base: Autocast(ssvd(base, "activation"))),
        "activation form over NF4": ("nf4", partial(ssvd, form="activation")),
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


@torch.no_grad()
def form_errors() -> dict[str, list[float]]:
    """Largest relative error of y in float32 over the layers of Whisper tiny.en at k = 40 %, for each of NORMS."""
    model = load_whisper_ct2(default_data() / "whisper-tiny.en")[0]
    errors: dict[str, list[float]] = {
        "weight form, factored": [0.0] * len(NORMS),
        "activation form": [0.0] * len(NORMS),
    }
    for linear in find_targets(model, sk.SSVDConfig(ratio=0.4, targets="whisper")).values():
        k = int(0.4 * min(linear.weight.shape))
        found, x = factorize(linear.weight, k), torch.randn(256, linear.weight.shape[1])
        layers = [
            adapt(copy.deepcopy(linear), sk.SSVDConfig(rank=k, form=form), found) for form in ("weight", "activation")
        ]
        for place, kappa in enumerate(NORMS):
            theta, delta = theta_of_norm(k, kappa), 0.01 * kappa * found.sigma[0] * torch.randn(k)
            core = core_ref(cayley_by_solve(theta, k), found.sigma.double(), delta.double(), "input")
            exact = copy.deepcopy(linear).double()
            exact.weight += found.U.double() @ core @ found.V.double().mT
            y = exact(x.double())
            for layer, worst in zip(layers, errors.values(), strict=True):
                layer.mode = "factored"
                layer.theta.copy_(theta)
                layer.delta_sigma.copy_(delta)
                worst[place] = max(worst[place], relative(layer(x), y))
    return errors


def small_sigma_errors(dtype: torch.dtype) -> list[float]:
    """Relative error of the update W V C V^T by V rounded to `dtype`, for geometric spectra that fall by RATIOS, shifts
    of a tenth of sigma_1 ||K|| and ||K|| = 0.1 and 1e-2, the worse."""
    (d, k, _), errors = GAIN, []
    for ratio in RATIOS:
        U, V = (torch.linalg.qr(torch.randn(d, k, dtype=torch.float64))[0] for _ in range(2))
        sigma, worst = ratio ** torch.linspace(0, 1, k, dtype=torch.float64), 0.0
        rest = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
        W = (U * sigma) @ V.mT + ratio * (rest - U @ (U.mT @ rest)) @ (torch.eye(d) - V @ V.mT)
        for kappa in (0.1, 1e-2):
            E, delta = cayley_by_solve(theta_of_norm(k, kappa), k), 0.1 * kappa * torch.randn(k, dtype=torch.float64)
            rounded, C = V.to(dtype).double(), activation_core_ref(E, sigma, delta, "input", None)
            worst = max(worst, relative(W @ (rounded @ C @ rounded.mT), U @ core_ref(E, sigma, delta, "input") @ V.mT))
        errors.append(worst)
    return errors


def _table(title: str, columns: Sequence[object], rows: Mapping[str, Sequence[float]], form: str) -> None:
    print(f"\n| {title} | " + " | ".join(map(str, columns)) + " |\n|---|" + len(columns) * "---:|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:{form}}" for value in values) + " |")


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
    print(f"\nShare of the update that arrives at the output in bf16, d = {d}, k = {k}, {tokens} tokens:")
    _table("‖K‖₂", KAPPAS[:-1], gains(), ".2f")
    print(
        "\nLargest relative error of y in float32 over the layers of Whisper tiny.en, k = 40 %, 256 tokens, delta_sigma"
    )
    print("a hundredth of sigma_1 ‖K‖₂:")
    _table("‖K‖₂", NORMS, form_errors(), ".2g")
    print(
        f"\nRelative error of the activation form's update by the rounding of its basis, d = {d}, k = {k}, delta_sigma"
    )
    print("a tenth of sigma_1 ‖K‖₂:")
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    errors = {str(dtype).removeprefix("torch."): small_sigma_errors(dtype) for dtype in dtypes}
    _table("sigma_k / sigma_1", RATIOS, errors, ".1e")


if __name__ == "__main__":
    main()
