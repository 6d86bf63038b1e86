"""Stacks of blocks with the layer shapes of real models and random weights: what a training step of a model costs.

    whisper-large   encoder block: attention d x d (query, key, value, out), FFN d -> 4d -> d, d = 1280
                    decoder block: the same with cross-attention, whose key and value read the encoder's output
    owsm-1b         encoder block (E-Branchformer): two macaron FFNs d -> 4d -> d, attention beside cgMLP (d -> 4d,
                    gate, 2d -> d), merge 2d -> d, d = 1024; the depthwise convolutions, which hold no linear layer,
                    are left out
                    decoder block: self-attention, cross-attention, FFN d -> 4d -> d

The floors count the linear layers alone: attention itself and the norms come on top in every version.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssvd_kernels as sk
from bench import layers, peers, work
from bench.harness import Case, Run, Version
from bench.layers import Factors
from bench.memory import saved_bytes
from bench.versions import PEER_BOUND, chosen, held, leaf, trained, twice
from ssvd_kernels.basis.factorize import Factorization
from ssvd_kernels.model.inject import install
from ssvd_kernels.ops import dispatch

RATIO = 0.4
HEAD = 64  # channels a head
SEQUENCE = 512  # tokens
CHECKED = 64  # tokens of the sequence that the gate looks at
LR = 1e-7  # a real step that changes nothing worth mentioning over the repeats


class Attention(nn.Module):
    """Multi-head attention of x (B, T, d) to `memory` (B, S, d) or to itself."""

    def __init__(self, d: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = max(1, d // HEAD), causal
        self.query, self.key, self.value, self.out = (_linear(d, d) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        parts = (self.query(x), self.key(memory), self.value(memory))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class FFN(nn.Sequential):
    """d -> 4d -> d."""

    def __init__(self, d: int) -> None:
        super().__init__(_linear(d, 4 * d), nn.GELU(), _linear(4 * d, d))


class EncoderBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.attention, self.ffn, self.norms = Attention(d), FFN(d), _norms(d, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.ffn(self.norms[1](x))


class DecoderBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.attention, self.cross, self.ffn, self.norms = Attention(d, causal=True), Attention(d), FFN(d), _norms(d, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        x = x + self.cross(self.norms[1](x), memory)
        return x + self.ffn(self.norms[2](x))


class GatedMLP(nn.Module):
    """d -> 4d, the one half times the normed other, 2d -> d."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.wide, self.norm, self.out = _linear(d, 4 * d), nn.LayerNorm(2 * d), _linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        one, other = F.gelu(self.wide(x)).chunk(2, dim=-1)
        return self.out(one * self.norm(other))


class BranchformerBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.before, self.after, self.attention, self.gated = FFN(d), FFN(d), Attention(d), GatedMLP(d)
        self.merge, self.norms = _linear(2 * d, d), _norms(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.before(self.norms[0](x))
        branches = self.attention(self.norms[1](x)), self.gated(self.norms[2](x))
        x = x + self.merge(torch.cat(branches, dim=-1))
        x = x + 0.5 * self.after(self.norms[3](x))
        return self.norms[4](x)


class Stack(nn.Module):
    """Encoder and decoder blocks, both over the embeddings x (B, T, d)."""

    def __init__(self, encoder: Sequence[nn.Module], decoder: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)

    def forward(self, x: Tensor) -> Tensor:
        memory = y = x
        for block in self.encoder:
            memory = block(memory)
        for block in self.decoder:
            y = block(y, memory)
        return y


class Architecture(NamedTuple):
    name: str
    block: Callable[[int], nn.Module]  # of the encoder
    d: int
    depth: int  # blocks of the encoder, and as many of the decoder: about 256 linear layers
    targets: tuple[str, ...] = ()  # last names of the adapted layers; none: all
    rank: int = 0  # 0: RATIO of d

    def stack(self) -> Stack:
        """Its linear layers on the meta device: `fill` gives them their weights."""
        return Stack([self.block(self.d) for _ in range(self.depth)], [DecoderBlock(self.d) for _ in range(self.depth)])

    @property
    def k(self) -> int:
        return self.rank or int(RATIO * self.d)

    def linears(self, stack: nn.Module) -> list[str]:
        """Names of the adapted layers."""
        return [name for name in _linears(stack) if not self.targets or name.rpartition(".")[2] in self.targets]


WHISPER = Architecture("whisper-large", EncoderBlock, 1280, 16)
OWSM = Architecture("owsm-1b", BranchformerBlock, 1024, 12)


def cases(dtype: torch.dtype, quick: bool = False) -> list[Case]:
    """A model case of each architecture: one block of each kind on the CPU (float32), 256 layers on CUDA."""
    if quick:
        tiny = [architecture._replace(d=32, depth=1) for architecture in (WHISPER, OWSM)]
        tiny.append(tiny[0]._replace(targets=("query", "value"), rank=8))
        return [model_case(dtype, architecture, 1, 16) for architecture in tiny]
    if dtype == torch.float32:
        return [model_case(dtype, architecture._replace(depth=1), 1, SEQUENCE) for architecture in (WHISPER, OWSM)]
    some = WHISPER._replace(targets=("query", "value"), rank=256)
    return [model_case(dtype, architecture, 32, SEQUENCE) for architecture in (WHISPER, OWSM, some)]


def model_case(dtype: torch.dtype, architecture: Architecture, sequences: int, T: int) -> Case:
    """Forward, backward and AdamW step. The gate looks at y, dx and all gradients together, before any step."""
    depth, k = architecture.depth, architecture.k

    def build(device: torch.device) -> list[Version]:
        known = _factors(architecture, dtype, device)
        x, dy = (torch.randn(sequences, T, architecture.d, device=device, dtype=dtype) for _ in range(2))
        small = [tensor[:1, :CHECKED] for tensor in (x, dy)]
        plan = architecture.stack()
        adapted = architecture.linears(plan)
        sizes = {name: (sequences * T, linear.in_features, linear.out_features, k)
                 for name, linear in _linears(plan).items()}  # fmt: skip
        loose = [min(0.5, PEER_BOUND[dtype] * 2 * depth)] * 3  # the blocks' roundings add up; a mistake is of order one

        def version(
            name: str,
            stack: nn.Module,
            exact: Sequence[Tensor],
            bound: Sequence[float] = loose,
            begin: Callable[[], None] = lambda: None,
            modes: Mapping[str, str] | None = None,
            **more: Any,
        ) -> Version:
            flops = moved = 0.0
            for place, size in sizes.items():
                of = name if place in adapted else "frozen linear"
                flops += work.layer_flops(of, (modes or {}).get(place, ""), *size)
                moved += work.layer_bytes(of, dtype.itemsize, *size)
            run, check = _after(begin, _step(stack, x, dy)), _after(begin, _gradients(stack, *small))
            saves = _after(begin, partial(saved_bytes, stack, leaf(x), held(stack)))
            rest = {"held": held(stack), "check": check, "saves": saves, "capturable": False, **more}
            return Version(name, run, exact, bound, flops, moved, **rest)

        def itself(stack: nn.Module) -> list[Tensor]:
            return list(_gradients(copy.deepcopy(stack).double(), *(tensor.double() for tensor in small))())

        found = []
        for name, make in layers.COUNTERPARTS.items():
            stack = fill(architecture, known, make)
            found.append(version(name, stack, itself(stack)))
            if name == "naive":
                exact, bound = found[-1].exact, twice(_gradients(stack, *small), found[-1].exact, dtype)
        stack = ssvd_stack(architecture, known)
        for mode in dispatch.MODES:
            modes = {place: chosen(device, dtype, *sizes[place], mode)[0] for place in adapted}
            label = mode if mode != "auto" else f"auto ({' and '.join(sorted(set(modes.values())))})"
            begin = partial(_set_mode, stack, mode)
            found.append(version("ssvd", stack, exact, bound, begin, modes, backend="auto", mode=label))
        for name in peers.PEERS:
            if why := peers.absent(name):
                found.append(Version(name, tuple, (), (), absent=why))
                continue
            stack = peers.inject(name, fill(architecture, known, layers.linear), adapted, known)
            found.append(version(name, stack, itself(stack), backend="peft"))
        return found

    name = f"{architecture.name} {depth}+{depth}"
    if architecture.targets:
        name += f", {' and '.join(architecture.targets)}"
    return Case("model", dtype, build, "frozen linear", sequences * T, k=k, model=name, passes=("step",))


def fill(
    architecture: Architecture, known: dict[tuple[int, ...], Factors], make: Callable[[Factors], nn.Module]
) -> Stack:
    """A stack whose adapted layers are make(their factors), each with storages of its own; the others are frozen."""
    stack = architecture.stack()
    adapted = architecture.linears(stack)
    for name, linear in _linears(stack).items():
        parent, _, child = name.rpartition(".")
        factors = known[tuple(linear.weight.shape)].clone()
        setattr(stack.get_submodule(parent), child, (make if name in adapted else layers.linear)(factors))
    weight = next(iter(known.values())).weight
    for module in stack.modules():
        if isinstance(module, nn.LayerNorm):
            module.to(weight.device, weight.dtype).requires_grad_(False)
    return stack


def ssvd_stack(architecture: Architecture, known: dict[tuple[int, ...], Factors]) -> Stack:
    """The stack as `sk.inject` would adapt it, with the known factors instead of its factorisations."""
    stack = fill(architecture, known, layers.linear)
    linears = {name: stack.get_submodule(name) for name in architecture.linears(stack)}
    shapes = {name: tuple(linear.weight.shape) for name, linear in linears.items()}
    made = {shape: factors.factorization() for shape, factors in known.items()}
    found = {name: _own(made[shape]) for name, shape in shapes.items()}
    config = sk.SSVDConfig(rank=architecture.k)
    install(stack, {name: (linear, config) for name, linear in linears.items()}, found)
    for name, layer in sk.ssvd_layers(stack).items():
        layers.adapted(layer, known[shapes[name]])
    return stack


def _own(found: Factorization) -> Factorization:
    return found._replace(U=found.U.clone(), sigma=found.sigma.clone(), V=found.V.clone())


def _factors(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> dict[tuple[int, ...], Factors]:
    """One weight of each shape (d_out, d_in)."""
    found: dict[tuple[int, ...], Factors] = {}
    for linear in _linears(architecture.stack()).values():
        d_out, d_in = linear.weight.shape
        if (d_out, d_in) not in found:
            found[d_out, d_in] = Factors.draw(dtype, d_in, d_out, architecture.k, device)
    return found


def _gradients(stack: nn.Module, x: Tensor, dy: Tensor) -> Run:
    """y, dx, and the gradients of all parameters in one vector (empty: none train)."""
    parameters, x = trained(stack), leaf(x)

    def run() -> tuple[Tensor, ...]:
        y = stack(x)
        dx, *rest = torch.autograd.grad(y, [x, *parameters], dy)
        return y.detach(), dx, torch.cat([dx.new_zeros(0), *(grad.flatten() for grad in rest)])

    return run


def _step(stack: nn.Module, x: Tensor, dy: Tensor) -> Run:
    """Forward, backward to x and to all parameters, and AdamW."""
    parameters, x = trained(stack), leaf(x)
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0) if parameters else None

    def run() -> tuple[Tensor, ...]:
        x.grad = None
        y = stack(x)
        y.backward(dy)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return (y.detach(),)

    return run


def _set_mode(stack: nn.Module, mode: str) -> None:
    for layer in sk.ssvd_layers(stack).values():
        layer.mode = mode


def _after(begin: Callable[[], None], function: Callable) -> Callable:
    def run() -> tuple:
        begin()
        return function()

    return run


def _linears(stack: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in stack.named_modules() if isinstance(module, nn.Linear)}


def _linear(d_in: int, d_out: int) -> nn.Linear:
    return nn.Linear(d_in, d_out, device="meta")


def _norms(d: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.LayerNorm(d) for _ in range(count))
