"""A tiny model with an encoder and a head, and what the tests do to whole models: adapt, train, compare, count."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from bounds import DRAWS, twice, twice_of_draws
from cases import relative_error
from plain import PlainLinear, core, plain
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import ssvd_kernels as sk
from ssvd_kernels.layers.base import AdaptedLinear
from ssvd_kernels.ops import dispatch
from ssvd_kernels.ops.functional import activation

RANK = 5
Result = TypeVar("Result")


class Stack(nn.Module):
    """An encoder and a head; each block can be checkpointed. The smallest model with a part that is called alone."""

    def __init__(self, checkpointing: dict | None = None, block: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.encoder = Encoder(checkpointing, block or FeedForward)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class FeedForward(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))


class Encoder(nn.Module):
    def __init__(self, checkpointing: dict | None, block: Callable[[], nn.Module], count: int = 2) -> None:
        super().__init__()
        self.checkpointing = checkpointing  # options of torch's `checkpoint`, or none of it
        self.blocks = nn.ModuleList(block() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.checkpointing is None else checkpoint(block, x, **self.checkpointing)
        return x


def inject(model: nn.Module, **options) -> sk.InjectReport:
    return sk.inject(model, sk.SSVDConfig(**{"rank": RANK, **options}), progress=False)


def train_randomly(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def adapt(model: nn.Module, seed: int = 1, **options) -> nn.Module:
    """`model` itself, injected and trained."""
    inject(model, **options)
    return train_randomly(model, seed)


def trained_layer(
    d_in: int, d_out: int, mode: str = "auto", dtype: torch.dtype | None = None, device: object = None, **options
) -> sk.SSVDLinear:
    """Of a random linear layer, with random values in place of training."""
    linear = nn.Linear(d_in, d_out, dtype=dtype, device=device)
    layer = train_randomly(sk.SSVDLinear.from_linear(linear, sk.SSVDConfig(**options)))
    layer.mode = mode
    return layer


def small_layers(count: int = 64, d: int = 64) -> nn.Sequential:
    """Whose products take next to no time."""
    return nn.Sequential(*(nn.Linear(d, d) for _ in range(count)))


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward and a backward, which leaves no gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        model(x).sum().backward()
        for parameter in trained:
            parameter.grad = None

    return step


def step(model: nn.Module) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.3 * torch.sin(torch.arange(parameter.numel()) + index)
    model.zero_grad()


def gradients(model: nn.Module, whole: bool = True) -> dict[str, Tensor]:
    """Of what trains; with `whole` every parameter must have one."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not whole or all(grad is not None for grad in found.values()), [n for n, g in found.items() if g is None]
    model.zero_grad()
    return {name.replace(".values.0.", "."): grad.clone() for name, grad in found.items() if grad is not None}


def square_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """`gradients` of the mean square of the output."""
    model(x).square().mean().backward()
    return gradients(model)


def loss_of(output: Tensor) -> Tensor:
    """The same function in every dtype, and not a norm: a final layer norm would make that constant."""
    weights = torch.sin(1.7 * torch.arange(output.numel(), dtype=torch.float64)).float()
    return (output * weights.to(output.dtype).view_as(output)).mean()


def assert_equal_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(ours) == list(expected)
    for name, grad in expected.items():
        assert grad.abs().max() > 0 and torch.equal(ours[name], grad), name


def assert_all_within(
    ours: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    more: Iterable[tuple[dict[str, Tensor], dict[str, Tensor]]] = (),
) -> None:
    """`assert_within` of each; those of few numbers are draws of one computation and share the largest bound.

    more: (plain, exact) of further draws, made only if a result of few numbers exceeds the bound of this one.
    """
    assert list(ours) == list(plain) == list(exact)
    assert all(bool(value.any()) or not value.numel() for value in exact.values())
    few = [name for name, value in exact.items() if value.numel() < 64]
    shared = twice_of_draws((plain[name], exact[name]) for name in few) if few else 0.0
    if any(relative_error(ours[name], exact[name]) > shared for name in few):
        shared = max([shared, *(twice_of_draws((p[name], e[name]) for name in few) for p, e in more)])
    for name, value in exact.items():
        bound = shared if name in few else twice(plain[name], value)
        assert (error := relative_error(ours[name], value)) <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


def redrawn(
    model: nn.Module, compute: Callable[[nn.Module], Result], count: int = DRAWS
) -> Iterator[tuple[Result, Result]]:
    """`references` of `model` with other values in place of its training, for draws 2 to `count`."""
    for seed in range(2, count + 1):
        yield references(train_randomly(copy.deepcopy(model), seed), compute)


def plain_copy(model: nn.Module) -> nn.Module:
    """The same model with nn.Linear layers that hold W', by float64 arithmetic of the tests' own."""
    twin, exact = copy.deepcopy(model), plain(model, torch.float64)
    names = list(sk.ssvd_layers(twin))
    sk.remove(twin)
    with torch.no_grad():
        for name in names:
            twin.get_submodule(name).weight.copy_(exact.get_submodule(name).weight)
    return twin


def references(model: nn.Module, compute: Callable[[nn.Module], Result]) -> tuple[Result, Result]:
    """compute(network) of plain PyTorch in the model's dtype and in float64, with the inputs that the model takes."""

    def widen(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))

    narrow, exact = (
        plain(copy.deepcopy(model), dtype) for dtype in (next(model.parameters()).dtype, torch.float64)
    )  # copies: `compute` may train
    for module in exact.modules():  # a part may be called alone
        module.register_forward_pre_hook(widen, with_kwargs=True)
    return compute(narrow), compute(exact)


def op_passes(inputs: dict, mode: str) -> dict[str, Tensor]:
    """y and gradients by the op."""
    x, core, bias = (inputs[name].detach().clone().requires_grad_() for name in ("x", "core", "bias"))
    y = sk.ssvd_linear(x, inputs["weight"], inputs["U"], inputs["V"], core, bias, mode=mode)
    dx, dcore, dbias = torch.autograd.grad(y, [x, core, bias], inputs["dy"])
    return {"y": y.detach(), "dx": dx, "dcore": dcore, "dbias": dbias}


def activation_passes(inputs: dict, op: Callable[..., Tensor] = activation) -> dict[str, Tensor]:
    """Output and gradients by the activation op."""
    x, core = (inputs[name].detach().clone().requires_grad_() for name in ("x", "core"))
    out = op(x, inputs["basis"], core, inputs["shift"])
    dx, dcore = torch.autograd.grad(out, [x, core], inputs["dy"])
    return {"out": out.detach(), "dx": dx, "dcore": dcore}


def passes(network: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, and the gradients of x and of the trained values of a network of one layer."""
    names, trained = zip(*((n.rpartition(".")[2], p) for n, p in network.named_parameters() if p.requires_grad))
    x = x.detach().to(torch.float64 if trained[0].dtype == torch.float64 else x.dtype).requires_grad_()
    y = network(x)
    grads = torch.autograd.grad(y, [x, *trained], dy.to(y.dtype), materialize_grads=True)
    return {"y": y.detach(), **dict(zip(("x", *names), grads, strict=True))}


class Formula(PlainLinear):
    """y = x W^T + ((x V) core^T) U^T + b where there is a core: in half precision it rounds otherwise than x W'^T."""

    def forward(self, x: Tensor) -> Tensor:
        (layer,), (values,) = self.adapters, self.values
        if isinstance(layer, sk.SpectralFTLinear):
            return super().forward(x)
        V, M, U = (factor.to(self.dtype) for factor in (layer.V.detach(), core(layer, dict(values)), layer.U.detach()))
        return F.linear(x, self.base_weight.to(self.dtype), self.bias) + x @ V @ M.mT @ U.mT


def assert_right(
    layer: AdaptedLinear,
    wrapped: Callable[[nn.Module], nn.Module] = lambda net: net,
    tokens: int = 40,
    dtype: torch.dtype | None = None,
) -> None:
    """Output and gradients of a layer that computes in `dtype`, for one draw by the bounds of several."""
    net, W, dtype = nn.Sequential(layer), layer.base_weight, dtype or layer.base_weight.dtype
    sizes = [(tokens, layer.in_features), (tokens, layer.out_features)]
    draws = [[torch.randn(size, device=W.device).to(dtype) for size in sizes] for _ in range(DRAWS)]
    formulas = [nn.Sequential(Formula(W, layer.bias, [layer], of)) for of in (dtype, torch.float64)]
    pairs = [[passes(formula, *draw) for formula in formulas] for draw in draws]
    for name, value in passes(wrapped(net), *draws[0]).items():
        bound = twice_of_draws((plain[name], exact[name]) for plain, exact in pairs)
        assert relative_error(value, pairs[0][1][name]) <= bound, name


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[int]]]:
    """Batch sizes of every call of the Cayley op, forward and backward."""
    calls: dict[str, list[int]] = {"cayley_delta": [], "cayley_delta_backward": []}

    def spy(name: str) -> Callable:
        original = getattr(dispatch, name)

        def call(tensor: Tensor, *rest: object) -> Tensor:
            calls[name].append(tensor.shape[0])
            return original(tensor, *rest)

        return call

    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(dispatch, name, spy(name))
        yield calls


@contextmanager
def saved_for_backward(known: set[int]) -> Iterator[dict[int, int]]:
    """Storage -> bytes of what autograd keeps in the block, but for the storages that are known."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
