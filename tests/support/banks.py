"""For tests of AdapterBank: a small net with three adapters, their files, and what each computes alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from bounds import assert_within
from models import references
from roundtrip import Net
from several import with_adapters
from torch import Tensor, nn

import ssvd_kernels as sk

NAMES = ["a", "b", "c"]
X = torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(3))


def base_net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(24, 32, 20).to(dtype)


def adapted(base: nn.Module, **options) -> nn.Module:
    """With the adapters "a", "b" and "c" beside "default"."""
    return with_adapters(base, *NAMES, **options).eval()


def files_of(net: nn.Module, folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{name}.safetensors" for name in NAMES}
    for name, path in files.items():
        sk.set_adapter(net, name)
        sk.save_adapter(net, path)
    sk.set_adapter(net, "default")
    return files


def filled(net: nn.Module, files: dict[str, Path], **options) -> sk.AdapterBank:
    bank = sk.AdapterBank(net, **options)
    for name, path in files.items():
        bank.add(name, path)
    return bank


def resident(bank: sk.AdapterBank) -> list[str]:
    return [name for name in bank.names() if bank._entries[name].slot is not None]


def mixed(net: nn.Module, bank: sk.AdapterBank, names: list[str | None], x: Tensor = X) -> Tensor:
    with torch.no_grad(), bank.rows(names):
        return net(x)


def alone(net: nn.Module, name: str | None, x: Tensor, compute: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """What the adapter `name` computes outside of the bank."""
    if name is None:
        with sk.disable_adapter(net):
            return compute(net, x)
    sk.set_adapter(net, name)
    found = compute(net, x)
    sk.set_adapter(net, "default")
    return found


def assert_rows(net: nn.Module, y: Tensor, names: list[str | None], x: Tensor = X) -> None:
    for row, name in enumerate(names):
        own = x[row : row + 1]
        if name is None:
            assert torch.equal(y[row : row + 1], alone(net, None, x, lambda net, x: net(x).detach())[row : row + 1])
            continue
        sk.set_adapter(net, name)
        plain, exact = references(net, lambda net, own=own: net(own).detach())
        sk.set_adapter(net, "default")
        assert_within(y[row : row + 1], plain, exact, f"row {row}, {name}")
