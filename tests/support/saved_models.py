"""What an earlier version of the package wrote, in tests/adapters/saved, and how it was made.

`python tests/support/saved_models.py write` writes the folder anew: only when the formats change on purpose, since the
tests show that today's code reads what the version named in its README.md left on users' disks.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ssvd_kernels as sk

SAVED = Path(__file__).parents[1] / "adapters" / "saved"
CONFIGS: dict[str, sk.SSVDConfig | sk.SpectralFTConfig] = {
    "input": sk.SSVDConfig(rank=4),
    "output": sk.SSVDConfig(ratio=0.5, side="output", rotation="linear"),
    "smaller": sk.SSVDConfig(rank=3, side="smaller", exclude=["1"]),
    "both": sk.SSVDConfig(rank=4, rank_out=2, side="both"),
    "free": sk.SSVDConfig(rank=3, rotation="free", targets=["0", "2"]),
    "banded": sk.SSVDConfig(rank=5, rotation="banded", band=2),
    "spectralft": sk.SpectralFTConfig(top=4, rank=2),
}


def numbers(*shape: int, scale: float = 1.0, start: int = 0) -> Tensor:
    """Fixed numbers that no random generator and no version of torch changes, in float32 from float64's sine."""
    count = torch.arange(start + 1, start + 1 + torch.Size(shape).numel(), dtype=torch.float64)
    return (scale * torch.sin(count * count * 0.7361)).float().view(shape)


def base() -> nn.Sequential:
    """Three linear layers, wide, tall and square."""
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 10), nn.Linear(10, 10, bias=False)).eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(numbers(*parameter.shape, scale=0.5, start=1000 * index))
    return model


def train(model: nn.Module, start: int = 0) -> nn.Module:
    """Fixed values in place of training."""
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(numbers(*parameter.shape, scale=0.3, start=start + 77 * index))
    return model


def x() -> Tensor:
    return numbers(5, 12, start=9000)


def exactly(model: nn.Module) -> Tensor:
    """What the model computes, in float64 with the stored factors."""
    return copy.deepcopy(model).double()(x().double()).detach()


def write() -> None:
    """Adapter files, a state dict of two adapters with what it computes, and a PEFT folder of two adapters."""
    import peft

    from ssvd_kernels.integrations.peft import SSVDPeftConfig

    outputs = {}
    for name, config in CONFIGS.items():
        model = base()
        sk.inject(model, config, progress=False)
        outputs[name] = exactly(train(model))
        sk.save_adapter(model, SAVED / f"{name}.safetensors", save_bases=name == "both")
    model = base()
    sk.inject(model, CONFIGS["input"], progress=False)
    train(model)
    sk.add_adapter(model, "second")
    sk.set_adapter(model, "second")
    train(model, start=500)
    outputs["state"] = exactly(model)
    sk.set_adapter(model, "default")
    outputs["state, default"] = exactly(model)
    sk.set_adapter(model, "second")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, SAVED / "state.safetensors")
    config = SSVDPeftConfig(rank=4, target_modules=["0", "1"])
    wrapped = peft.get_peft_model(base(), config)
    outputs["peft"] = exactly(train(wrapped))
    wrapped.add_adapter("other", SSVDPeftConfig(rank=2, side="output", target_modules=["1", "2"]))
    wrapped.set_adapter("other")
    outputs["peft, other"] = exactly(train(wrapped, start=300))
    wrapped.save_pretrained(SAVED / "peft")
    for card in (SAVED / "peft").rglob("README.md"):
        card.unlink()
    save_file(outputs, SAVED / "outputs.safetensors")


def outputs() -> dict[str, Tensor]:
    return load_file(SAVED / "outputs.safetensors")


if __name__ == "__main__" and sys.argv[1:] == ["write"]:
    write()
