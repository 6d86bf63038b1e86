"""For tests of what comes back: a small nested model, every kind of adapter for it, and comparisons."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from bounds import draws, unit_roundoff
from cases import relative_error
from hypothesis import settings
from hypothesis import strategies as st
from models import references
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.basis import batch
from ssvd_kernels.basis.factorize import Factorization, factorize, sketch

SIDES = ["input", "output", "smaller", "both"]
ROTATIONS = ["cayley", "linear", "free"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True, database=None)


class Net(nn.Module):
    """Linear layers of given shapes, one nested and without bias, beside parameters that are not linear layers."""

    def __init__(self, d0: int, d1: int, d2: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d0)
        self.first = nn.Linear(d0, d1)
        self.block = nn.ModuleDict({"inner": nn.Linear(d1, d2, bias=False)})
        self.last = nn.Sequential(nn.Tanh(), nn.Linear(d2, d0))
        self.block["inner"].weight.requires_grad_(False)  # frozen by its owner before anybody injects
        self.norm.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block["inner"](torch.tanh(self.first(self.norm(x)))))


class Case(NamedTuple):
    dims: tuple[int, int, int]
    dtype: torch.dtype
    config: sk.SSVDConfig | sk.SpectralFTConfig
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dims = draw(st.tuples(*[st.integers(1, 20)] * 3))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    if draw(st.integers(0, 4)) == 0:
        top = draw(st.integers(1, min(dims)))
        return Case(dims, dtype, sk.SpectralFTConfig(top=top, rank=draw(st.integers(1, top))), seed)
    side, rotation = draw(st.sampled_from(SIDES)), draw(st.sampled_from([*ROTATIONS, "banded"]))
    if rotation == "banded":
        side = "input"
    ranks = st.one_of(st.just(1), st.just(min(dims)), st.integers(1, min(dims)))
    options = {"rank_out": draw(ranks)} if side == "both" and draw(st.booleans()) else {}
    amount = {"ratio": 1.0} if not options and draw(st.integers(0, 3)) == 0 else {"rank": draw(ranks)}
    if rotation == "banded":
        options["band"] = draw(st.integers(0, amount.get("rank", min(dims)) - 1))
    config = sk.SSVDConfig(**amount, **options, side=side, rotation=rotation)
    return Case(dims, dtype, config, seed)


def base_net(case: Case) -> Net:
    torch.manual_seed(case.seed)
    return Net(*case.dims).to(case.dtype)


def example(net: nn.Module) -> Tensor:
    weight = next(net.parameters())
    return torch.randn(2, 3, weight.shape[0], generator=torch.Generator().manual_seed(7)).to(weight.dtype)


def train_randomly(net: nn.Module, seed: int = 1, scale: float = 0.3) -> None:
    """Stands for training: random theta and delta_sigma (or A and B), as large as one would ever see."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sk.adapted_layers(net).values():
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad:
                    size = 0.1 if name == "delta_sigma" else scale / layer.k**0.5
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(size * noise)


def injected(case: Case, base: Net | None = None) -> Net:
    net = copy.deepcopy(base) if base is not None else base_net(case)
    sk.inject(net, case.config, progress=False)
    train_randomly(net, case.seed)
    return net


def loaded(base: nn.Module, path: Path) -> nn.Module:
    """A copy of `base` with the adapter of the file."""
    net = copy.deepcopy(base)
    sk.load_adapter(net, path, progress=False)
    return net


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, numbers: range, width: int = 12) -> list[float]:
    """The losses of one training step for each number, which is the seed of its batch."""
    losses = []
    for number in numbers:
        x = torch.randn(8, width, generator=torch.Generator().manual_seed(number))
        y = net.train()(x)
        loss = (y - x.flip(-1)[:, : y.shape[-1]]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def outputs(net: nn.Module) -> tuple[Tensor, Tensor]:
    """(as in training, as in inference)."""
    x = example(net)
    with torch.enable_grad():
        trained = net.train()(x).detach()
    with torch.no_grad():
        return trained, net.eval()(x)


def assert_computes(found: Iterable[Tensor], net: nn.Module) -> None:
    """Each of `found` is what the plain twin of `net` gives for `example`, within the rule of bounds.py.

    The largest bound over models beside `net`, for an output may have few elements. In float64, where nothing tells
    the error, float32's to scale.
    """
    dtype = example(net).dtype
    narrow = torch.float32 if dtype == torch.float64 else dtype
    generator = torch.Generator().manual_seed(0)

    def beside() -> nn.Module:
        twin = copy.deepcopy(net).to(dtype=None if narrow == dtype else narrow)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter *= 1 + 0.01 * torch.randn(parameter.shape, generator=generator)
        return twin

    def run(network: nn.Module) -> Tensor:
        return network(example(network)).detach()

    bound = draws(lambda: references(beside(), run)) * unit_roundoff(dtype) / unit_roundoff(narrow)
    exact = references(net, run)[1]
    for value in found:
        error = relative_error(value.detach(), exact)
        assert error <= bound, f"error {error:.2e}, plain PyTorch in {dtype} allows {bound:.2e}"


def assert_same_outputs(a: nn.Module, b: nn.Module) -> None:
    for ours, theirs in zip(outputs(a), outputs(b), strict=True):
        assert torch.isfinite(ours).all()
        assert torch.equal(ours, theirs)


def assert_equal_state(net: nn.Module, state: dict[str, Tensor]) -> None:
    now = net.state_dict()
    assert list(now) == list(state)
    for name, value in state.items():
        assert now[name].dtype == value.dtype and torch.equal(now[name], value), name


@contextmanager
def factorised(act: Callable[..., Factorization] = factorize) -> Iterator[list[str]]:
    """Names of the weights that `act` factorises within the block."""
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "factorize", lambda weight, k, name: names.append(name) or act(weight, k, name))
        yield names


def turned(found: Factorization, turn: Tensor) -> Factorization:
    """In another basis: U and V times `turn`."""
    U, V = found.U @ turn, found.V @ turn
    return found._replace(U=U, V=V, sketch=sketch(U, V))


def flipped(weight: Tensor, k: int, name: str = "weight") -> Factorization:
    """In place of `factorize`: every other singular pair with its other sign."""
    found = factorize(weight, k, name)
    signs = torch.where(torch.arange(k) % 2 == 0, -1.0, 1.0).to(found.U.dtype)
    return turned(found, signs.diag())
