"""The methods that the experiment compares, each brought to a budget of trainable parameters by `sk.plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.ops.functional import rotation_delta

PEFT = ("lora", "dora", "pissa", "vera", "oft", "psoft")


@dataclass(frozen=True)
class Method:
    """`arguments` are those of `sk.plan`, None where nothing is planned; `lr` is where tuning starts (SSVD: at 2 %)."""

    title: str
    lr: float
    arguments: dict[str, Any] | None = field(default_factory=dict)

    @property
    def budgeted(self) -> bool:
        return self.arguments is not None


def _ssvd(title: str, **arguments: Any) -> Method:
    return Method(title, 3e-4, {"method": "ssvd", **arguments})


def _ssvd_o(share: float) -> Method:
    return Method(f"SSVD-O, {share:.0%} inner", 3e-4, {"method": "ssvd-o", "inner_share": share})


METHODS: dict[str, Method] = {
    "zero-shot": Method("zero-shot", 0.0, None),
    "full": Method("full fine-tuning", 3e-5, None),
    "lora": Method("LoRA", 1e-3, {"method": "lora"}),
    "dora": Method("DoRA", 1e-3, {"method": "dora"}),
    "pissa": Method("PiSSA", 3e-4, {"method": "pissa"}),
    "vera": Method("VeRA", 1e-2, {"method": "vera"}),
    "oft": Method("OFT", 1e-3, {"method": "oft"}),
    "psoft": Method("PSOFT", 3e-4, {"method": "psoft"}),
    "svft": Method("SVFT", 1e-3, {"method": "svft"}),
    "spectralft": Method("SpectralFT", 1e-3, {"method": "spectralft"}),
    "ssvd": _ssvd("SSVD, strict"),
    "ssvd-linear": _ssvd("SSVD, linear", rotation="linear"),
    "ssvd-free": _ssvd("SSVD, free", rotation="free"),
    "ssvd-output": _ssvd("SSVD, output side", side="output"),
    "ssvd-spectrum": _ssvd("SSVD, ranks by spectrum", allocation="spectrum"),
    "ssvd-o": _ssvd_o(0.5),
    "ssvd-o-25": _ssvd_o(0.25),
    "ssvd-o-75": _ssvd_o(0.75),
}


@dataclass(frozen=True)
class Applied:
    """A model made ready for training: its trainable parameters, the ranks in words, how to write what was trained
    and how to merge it into the weights."""

    trainable: int
    ranks: str
    save: Callable[[Path], int]  # -> bytes written
    merge: Callable[[], None]


def apply(model: nn.Module, name: str, budget: float | None, rank: int | None = None) -> Applied:
    """Adapts `model` in place by METHODS[name] within `budget`, a share of its parameters, and freezes the rest.

    rank: of every layer, in place of a budget; for SSVD on one side.
    """
    arguments = METHODS[name].arguments
    if arguments is None:
        if name == "zero-shot":
            model.requires_grad_(False)
        else:
            _train_everything(model)
        return Applied(_trainable(model), "", lambda path: _save_trained(model, path), lambda: None)
    if rank is not None:
        if arguments["method"] != "ssvd":
            raise ValueError(f"`rank` requires SSVD on one side, got {name!r}")
        options = {key: value for key, value in arguments.items() if key != "method"}
        sk.inject(model, sk.SSVDConfig(rank=rank, **options), progress=False)
        return Applied(_trainable(model), str(rank), lambda path: _save_own(model, path), lambda: sk.merge(model))
    assert budget is not None
    plan = sk.plan(model, budget=budget, **arguments, progress=False)
    if arguments["method"] in PEFT:
        import peft

        options = _peft_options(arguments["method"], plan.layers[0].rank)
        adapted = peft.get_peft_model(model, plan.peft_config(model, **options))  # type: ignore[arg-type]  # in place
        return Applied(_trainable(model), _ranks(plan), lambda path: _save_peft(adapted, path), adapted.merge_adapter)
    sk.inject(model, plan, progress=False)
    return Applied(_trainable(model), _ranks(plan), lambda path: _save_own(model, path), lambda: sk.merge(model))


def _peft_options(method: str, rank: int) -> dict[str, Any]:
    """alpha / r as in the recipe of SSVD's code, 2 for LoRA and 1 for PiSSA; OFT's exact rotation, not its series."""
    if method == "oft":
        return {"use_cayley_neumann": False}
    alpha = {"lora": 2, "dora": 2, "pissa": 1}.get(method)
    return {} if alpha is None else {"lora_alpha": alpha * rank}


def _ranks(plan: Any) -> str:
    """The plan's ranks in a few characters, e.g. "151", "118+67" or "31 to 200"."""
    found = sorted({(layer.rank, layer.rank_out) for layer in plan.layers})
    shown = [str(rank) if rank_out is None else f"{rank}+{rank_out}" for rank, rank_out in found]
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def _train_everything(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("encoder.embed_positions" not in name)  # fixed sinusoids


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _save_own(model: nn.Module, folder: Path) -> int:
    sk.save_adapter(model, folder / "adapter.safetensors")
    return _size(folder)


def _save_peft(model: Any, folder: Path) -> int:
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _save_trained(model: nn.Module, folder: Path) -> int:
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    if trained:
        save_file(trained, folder / "model.safetensors")
    return _size(folder)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@torch.no_grad()
def orthogonality_error(model: nn.Module) -> float | None:
    """Mean over layers of ||G^T G - I||_F / sqrt(k), the rotations' distance from orthogonality; None without any."""
    errors = []
    for layer in sk.ssvd_layers(model).values():
        if getattr(layer, "rotation", "banded") == "banded":
            continue
        for theta, k in ((layer.theta, layer.k_in), (layer.theta_out, layer.k_out)):
            if theta is not None and k is not None:
                E = rotation_delta(theta, k, layer.rotation).double()
                errors.append(float((E + E.mT + E.mT @ E).norm()) / k**0.5)
    return sum(errors) / len(errors) if errors else None


@torch.no_grad()
def effective_weight(linear: nn.Module) -> Tensor:
    """W' (d_out, d_in) of a linear layer that any method has adapted: what it makes of the unit vectors."""
    parameter = next(linear.parameters())
    width: Any = linear.in_features
    out: Tensor = linear(torch.eye(width, dtype=parameter.dtype, device=parameter.device))
    bias: Any = linear.bias
    return (out if bias is None else out - bias).mT
