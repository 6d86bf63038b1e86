"""From a module or a function to a `Version`: its passes, its float64 results, its bounds and its backends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ssvd_kernels as sk
from bench import layers, peers, work
from bench.harness import Passes, Run, Version, relative_error
from bench.layers import Problem
from ssvd_kernels.ops import dispatch

# A fast path may have twice the error of plain PyTorch in its dtype. The others are that yardstick themselves, or
# other methods: they are only checked to compute their own function, whose mistakes would be of order one. In eps
# theirs are 84 of float32, for sums of thousands of terms; 10 of float16 and 4 of bfloat16, rounded a few times.
ALLOWED = 2.0
PEER_BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def passes_of(module: nn.Module, x: Tensor, dy: Tensor, call: Callable[..., Tensor]) -> Passes:
    """y = call(x), and the gradients of x and of what `module` trains; `call` is the module or a wrapping of it."""
    return Passes(lambda x, *_: call(x), [x, *trained(module)], dy)


def in_float64(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The results of `passes_of` in float64: the same module, copied."""
    wide = copy.deepcopy(module).double()
    return list(passes_of(wide, leaf(x, torch.float64), dy.double(), wide)())


def exactly(function: Callable[..., Tensor], leaves: Sequence[Tensor], rest: Sequence, dy: Tensor) -> list[Tensor]:
    """The results of function(*leaves, *rest) and the gradients of the leaves in float64."""
    wide = [t.double() if isinstance(t, Tensor) else t for t in rest]
    return list(Passes(lambda *some: function(*some, *wide), [leaf(t, torch.float64) for t in leaves], dy.double())())


def twice(run: Run, exact: Sequence[Tensor], dtype: torch.dtype) -> list[float]:
    """Bounds from the errors of plain PyTorch; where one is exact by luck, rounding to `dtype` is allowed: eps / 2."""
    errors = [relative_error(result, want) for result, want in zip(run(), exact, strict=True)]
    return [max(ALLOWED * error, torch.finfo(dtype).eps / 2) for error in errors]


def served(device: torch.device, dtype: torch.dtype, op: str) -> list[str]:
    """Backends to force for `op`, beside "auto"; not the interpreter's, which is no speed."""
    names = [name for name, why in dispatch.refusals(op, device, dtype).items() if why is None]
    return [name for name in names if name != "triton" or device.type == "cuda"]


def within(backend: str) -> Callable[[], AbstractContextManager[Any]]:
    """Context with `backend` forced."""
    return partial(sk.use_backend, backend)


def chosen(
    device: torch.device,
    dtype: torch.dtype,
    T: int,
    d_in: int,
    d_out: int,
    k: int,
    mode: str,
    backend: str = "auto",
) -> tuple[str, str]:
    """(the mode that a call with `mode` and `backend` computes in, what to call it in the table)."""
    with sk.use_backend(backend):
        serving = dispatch.backend_for("linear", device, dtype)
    found = "composed" if T >= dispatch.composed_from(dtype, (d_out, d_in), k, mode, True, serving) else "factored"
    return found, mode if mode == found else f"{mode} ({found})"


def autocast(call: Callable[..., Tensor], x: Tensor) -> Callable[..., Tensor]:
    """`call` as under mixed precision: frozen weights in float32, arithmetic in x's dtype."""

    def mixed(*inputs: Tensor) -> Tensor:
        with torch.autocast(x.device.type, x.dtype):
            return call(*inputs)

    return mixed


def layer_versions(p: Problem, compile: bool) -> Iterator[Version]:
    """Every version of one layer: its counterparts, plain and (`compile`) compiled, this package, and its peers."""
    (T, d_in), f, dtype = p.x.shape, p.factors, p.x.dtype
    d_out, k, x = len(f.bias), f.k, leaf(p.x)
    shape, size, mixed = (T, d_in, d_out, k), f.weight.element_size(), f.weight.dtype != dtype

    def version(
        name: str, run: Passes, exact: Sequence[Tensor], bound: Sequence[float], module: nn.Module, **more: Any
    ) -> Version:
        flops = work.layer_flops(name, more.pop("computes", ""), *shape)
        moved = work.layer_bytes(name, size, *shape)
        return Version(name, run, exact, bound, flops, moved, held=held(module), **more)

    def passes(module: nn.Module, call: Callable[..., Tensor]) -> Passes:
        return passes_of(module, x, p.dy, autocast(call, x) if mixed else call)

    exact: list[Tensor] = []
    bound: list[float] = []
    for name, make in layers.COUNTERPARTS.items():
        module = make(f)
        own, run = in_float64(module, p.x, p.dy), passes(module, module)
        loose, capturable = [PEER_BOUND[dtype]] * len(own), name in layers.CAPTURABLE
        yield version(name, run, own, loose, module, capturable=capturable)
        if name == "naive":
            exact, bound = own, twice(run, own, dtype)
        if compile and not capturable:
            torch._dynamo.reset()
            call = torch.compile(module, dynamic=False, fullgraph=True)
            yield version(f"{name} compiled", passes(module, call), own, loose, module, capturable=False, compiled=True)
    unfused = ("auto", "composed") if x.device.type == "cuda" else ("auto",)
    for backend, mode in (*(("auto", mode) for mode in dispatch.MODES), *(("reference", mode) for mode in unfused)):
        layer = layers.ssvd_layer(f)
        layer.mode = mode
        run = passes(layer, layer)
        run = Passes(run.forward, run.leaves, p.dy, within=within(backend))
        found, label = chosen(x.device, dtype, *shape, mode, backend)
        yield version("ssvd", run, exact, bound, layer, computes=found, backend=backend, mode=label)
    layer = layers.ssvd_layer(f, "activation")
    run = passes(layer, layer)
    yield version("ssvd", run, exact, bound, layer, computes="factored", backend="auto", mode="activation form")
    for name in peers.PEERS:
        if why := peers.absent(name):
            yield Version(name, tuple, (), (), absent=why)
            continue
        peer = peers.layer(name, f)
        own = in_float64(peer, p.x, p.dy)
        loose, capturable = [PEER_BOUND[dtype]] * len(own), name.startswith("LoRA")
        yield version(name, passes(peer, peer), own, loose, peer, backend="peft", capturable=capturable)
