"""What is measured: the operations, and the shapes of each.

    linear      the op from a given core: what every micro-batch pays
    layer       the same from theta and delta_sigma, one rotation included: what a layer on its own pays for a step
    accumulate  four forward and backward passes of a layer between two changes of its parameters
    cayley      E = G - I of a batch of thetas, and the gradient of theta
    model       forward, backward and AdamW of a stack of blocks with the layers of a real model (stacks.py)
    whisper     the same of the real Whisper tiny.en on the demo's speech, which is fetched if need be (whisper.py)
    extras      what the rotations, compositions and projections of a whole model add to its linears (parts.py)
    decode      one token in eval, merged and unmerged (parts.py)
    inject      the factorisation of one weight

Every version of an operation computes forward and backward, except where it says otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssvd_kernels as sk
from bench import layers, peers, stacks, work
from bench.harness import BACKWARD, FORWARD, WHOLE, Case, Passes, Run, Version
from bench.injection import inject_case
from bench.layers import Factors, Problem, cayley_by_solve, naive
from bench.parts import decode_case, extras_case
from bench.versions import (
    PEER_BOUND,
    chosen,
    exactly,
    layer_versions,
    leaf,
    served,
    trained,
    twice,
    within,
)
from bench.whisper import whisper_case
from ssvd_kernels.ops import dispatch, reference

OPERATIONS = ("layer", "linear", "cayley", "accumulate", "model", "whisper", "extras", "decode", "inject")
LAYERS = [  # d_in, d_out, k
    *((1024, 1024, 409), (384, 384, 153), (1024, 1024, 256), (1280, 1280, 512)),
    *((2048, 2048, 512), (1024, 4096, 409)),
]
CROSSOVER = (256, 512)  # besides, where composed and factored change places on the CPU, for the first two layers
TOKENS = {"cpu": (1, 64, 1024, 4096), "cuda": (1, 64, 1024, 4096, 16384, 65536)}
APART_CPU = 1280 * 1280  # entries of a weight; of larger ones the passes are timed together alone
COMPILED = [(4096, 1024, 1024, 409)]
LINEAR = {
    "cpu": [(T, d, d, k) for d, k in ((384, 153), (1024, 409)) for T in (64, 1024, 4096)],
    "cuda": [
        *((T, 1024, 1024, 409) for T in (64, 1024, 4096, 16384)),
        *((16384, d_in, d_out, k) for d_in, d_out, k in ((384, 384, 153), (1280, 1280, 512), (2048, 2048, 512))),
        (16384, 1024, 4096, 409),
    ],
}
CAYLEY = {
    "cpu": [(64, 153), (8, 256), (8, 409), (8, 512), (1, 1024)],
    "cuda": [(256, 512), (256, 409), (128, 1024), (64, 256)],
}
ACCUMULATE = [(T, 1024, 1024, 409) for T in (256, 1024)]
MICRO_BATCHES = 4
EXTRAS = {"cpu": (4, 16, 1024, 409), "cuda": (256, 16, 1024, 409)}  # layers, T, d, k
DECODE = [(384, 384, 153), (1024, 1024, 409), (1280, 1280, 512), (4096, 4096, 409)]
INJECT = [(384, 384, 153), (1024, 1024, 409)]


def table(device: torch.device, quick: bool) -> list[Case]:
    """Every case for `device`, the most telling first; quick: one tiny case of each operation."""
    kind, cuda = device.type, device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if quick:
        tiny = (24, 32, 48, 8)
        return [
            *(layer_case(dtype, *tiny), linear_case(dtype, *tiny), cayley_case(2, 8)),
            *(accumulate_case(dtype, *tiny), *stacks.cases(dtype, quick=True), inject_case(32, 48, 8)),
            *(extras_case(dtype, 2, 4, 32, 8), decode_case(dtype, *tiny[1:])),
        ]
    layer = [layer_case(dtype, T, *shape, compile=(T, *shape) in COMPILED) for shape in LAYERS for T in TOKENS[kind]]
    if not cuda:
        layer += [layer_case(dtype, T, *shape) for shape in LAYERS[:2] for T in CROSSOVER]
    linear = [linear_case(dtype, *shape) for shape in LINEAR[kind]]
    if cuda:
        layer += [layer_case(dtype, T, *LAYERS[0], base=torch.float32) for T in TOKENS[kind]]
        linear.append(linear_case(torch.float32, 4096, *LAYERS[0]))
    return [
        *(cayley_case(*shape) for shape in CAYLEY[kind]),
        *layer,
        *(accumulate_case(dtype, *shape) for shape in ACCUMULATE),
        *stacks.cases(dtype),
        whisper_case(),
        extras_case(dtype, *EXTRAS[kind]),
        *(decode_case(dtype, *shape) for shape in DECODE),
        *linear,
        *(inject_case(*shape) for shape in INJECT),
    ]


def layer_case(
    dtype: torch.dtype,
    T: int,
    d_in: int,
    d_out: int,
    k: int,
    base: torch.dtype | None = None,
    compile: bool = False,
) -> Case:
    def build(device: torch.device) -> list[Version]:
        return list(layer_versions(Problem.draw(dtype, T, d_in, d_out, k, device, base), compile))

    apart = dtype != torch.float32 or d_in * d_out <= APART_CPU
    passes = (WHOLE, FORWARD, BACKWARD) if apart else (WHOLE,)
    return Case("layer", dtype, build, "frozen linear", T, d_in, d_out, k, base=base, passes=passes)


def linear_case(dtype: torch.dtype, T: int, d_in: int, d_out: int, k: int) -> Case:
    shape, size = (T, d_in, d_out, k), dtype.itemsize

    def build(device: torch.device) -> list[Version]:
        x, dy, f = Problem.draw(dtype, *shape, device)
        U, sigma, V = f.top()
        core = reference.core_ref(cayley_by_solve(f.theta, k), sigma, f.delta, "input")

        def version(name: str, function: Callable[..., Tensor], leaves: Sequence[Tensor], rest: list) -> Version:
            exact, run = exactly(function, leaves, rest, dy), Passes(lambda *t: function(*t, *rest), leaves, dy)
            flops, moved = work.layer_flops(name, "", *shape), work.layer_bytes(name, size, *shape)
            if name == "naive":
                flops, moved = work.linear_flops("factored", *shape), work.linear_bytes(size, *shape)
            return Version(name, run, exact, [PEER_BOUND[dtype]] * len(exact), flops, moved, held=[*leaves[1:], *rest])

        plain = version("naive", naive, [leaf(x), leaf(core)], [f.weight, f.bias, U.to(dtype), V.to(dtype)])
        versions = [
            version("frozen linear", F.linear, [leaf(x)], [f.weight, f.bias]),
            version("full fine-tuning", F.linear, [leaf(x), leaf(f.weight)], [f.bias]),
            plain,
        ]
        leaves, bound = [leaf(x), leaf(core)], twice(plain.run, plain.exact, dtype)
        forced = [(name, mode) for name in served(device, dtype, "linear") for mode in ("composed", "factored")]
        for backend, mode in (*forced, ("auto", "auto")):
            found, label = chosen(device, dtype, *shape, mode, backend)
            call = partial(_ssvd_linear, f, U, V, mode)
            run, flops = Passes(call, leaves, dy, within=within(backend)), work.linear_flops(found, *shape)
            frozen = [leaves[1], f.weight, f.bias, U, V]
            versions.append(Version("ssvd", run, plain.exact, bound, flops, plain.bytes, backend, label, held=frozen))
        return versions

    return Case("linear", dtype, build, "frozen linear", *shape)


def _ssvd_linear(f: Factors, U: Tensor, V: Tensor, mode: str, x: Tensor, core: Tensor) -> Tensor:
    return sk.ssvd_linear(x, f.weight, U, V, core, f.bias, mode)


def cayley_case(B: int, k: int) -> Case:
    def build(device: torch.device) -> list[Version]:
        theta = leaf(torch.randn(B, k * (k - 1) // 2, device=device) * 0.15 / k**0.5)
        dE = torch.randn(B, k, k, device=device)
        rows = [exactly(cayley_by_solve, [row], [k], grad) for row, grad in zip(theta, dE)]
        exact = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        flops, moved = work.solve_flops(k) * B, work.rotation_bytes(B, k)

        def peer(name: str, run: Passes, results: Sequence[Tensor]) -> Version:
            mode = "batched" if device.type == "cuda" else "loop"
            loose = [PEER_BOUND[torch.float32]] * len(results)
            return Version(name, run, results, loose, flops, moved, mode=mode, capturable=False)

        def called(module: nn.Module, grad: Tensor) -> Passes:
            return Passes(lambda *_: module(), trained(module), grad)

        plain = Passes(lambda t: cayley_by_solve(t, k), [theta], dE)
        rotation = peers.Orthogonal(reference.skew(theta.detach(), k))
        own = called(copy.deepcopy(rotation).double(), dE.double())()
        versions = [
            peer("linalg.solve", plain, exact),
            peer("parametrizations.orthogonal", called(rotation, dE), own),
        ]
        bound = twice(plain, exact, torch.float32)
        for backend in served(device, torch.float32, "cayley"):
            run = Passes(lambda t: sk.cayley_delta(t, k), [theta], dE, within=within(backend))
            versions.append(Version("ssvd", run, exact, bound, work.rotation_flops(k) * B, moved, backend))
        return versions

    return Case("cayley", torch.float32, build, "linalg.solve", k=k, batch=B)


def accumulate_case(dtype: torch.dtype, T: int, d_in: int, d_out: int, k: int) -> Case:
    shape = (T, d_in, d_out, k)

    def build(device: torch.device) -> list[Version]:
        f = Factors.draw(dtype, d_in, d_out, k, device)
        xs = [torch.randn(T, d_in, device=device, dtype=dtype) for _ in range(MICRO_BATCHES)]
        dys = [torch.randn(T, d_out, device=device, dtype=dtype) for _ in range(MICRO_BATCHES)]
        wide = [[tensor.double() for tensor in tensors] for tensors in (xs, dys)]
        versions = []

        def costs(name: str, mode: str) -> tuple[float, float]:
            """FLOPs and bytes."""
            return (
                MICRO_BATCHES * work.layer_flops(name, mode, *shape),
                MICRO_BATCHES * work.layer_bytes(name, dtype.itemsize, *shape),
            )

        for name, make in layers.COUNTERPARTS.items():
            module = make(f)
            results = list(_accumulated(copy.deepcopy(module).double(), *wide)())
            run, loose = _accumulated(module, xs, dys), [PEER_BOUND[dtype]] * len(results)
            versions.append(Version(name, run, results, loose, *costs(name, ""), capturable=False))
            if name == "naive":
                exact, bound = results, twice(run, results, dtype)
        for mode in dispatch.MODES:
            layer = layers.ssvd_layer(f)
            layer.mode = mode
            found, label = chosen(device, dtype, *shape, mode)
            run = _accumulated(layer, xs, dys)
            versions.append(Version("ssvd", run, exact, bound, *costs("ssvd", found), "auto", label, capturable=False))
        return versions

    return Case("accumulate", dtype, build, "frozen linear", *shape, batch=MICRO_BATCHES)


def _accumulated(module: nn.Module, xs: Sequence[Tensor], dys: Sequence[Tensor]) -> Run:
    """The last y and dx, and the summed gradients of what `module` trains, of all micro-batches after one step."""
    leaves, parameters = [leaf(x) for x in xs], trained(module)

    def run() -> tuple[Tensor, ...]:
        for tensor in (*leaves, *parameters):
            tensor.grad = None
        for x, dy in zip(leaves, dys):
            y = module(x)
            y.backward(dy)
        return y.detach(), *(tensor.grad for tensor in (leaves[-1], *parameters))

    return run
