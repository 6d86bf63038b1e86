"""What is measured: the operations, their plain PyTorch counterparts, and the shapes.

    linear   forward and backward of the op from a given core: what every micro-batch pays
    layer    the same from theta and delta_sigma, one rotation included: what a layer on its own pays
    cayley   E = G - I of a batch of thetas, and the gradient of theta

d_in = d_out = d, r = min(d_in, d_out), and W = U_r diag(sigma_r) V_r^T exactly, so that every version has its factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssvd_kernels as sk
from bench.harness import Case, Run, Version
from ssvd_kernels import dispatch, reference
from ssvd_kernels.factorize import Factorization, fingerprint, sketch

# A fast path may have twice the error of plain PyTorch in its dtype. The peers are that yardstick themselves: they
# are only checked to compute the same function.
ALLOWED = 2.0
PEER_BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
LINEAR_CPU = [(T, d, d, k) for d, k in ((384, 153), (1024, 409)) for T in (64, 1024, 4096)]
LINEAR_CUDA = [
    *((T, 1024, 1024, 409) for T in (64, 1024, 4096, 16384)),
    *((16384, d_in, d_out, k) for d_in, d_out, k in ((384, 384, 153), (1280, 1280, 512), (2048, 2048, 512))),
    (16384, 1024, 4096, 409),
]
LAYER_CUDA = [(T, 1024, 1024, 409) for T in (64, 1024, 4096)]
CAYLEY_CPU = [(8, 256), (8, 409), (8, 512), (1, 1024)]
CAYLEY_CUDA = [(256, 512), (256, 409), (128, 1024), (64, 256)]


def table(device: torch.device, quick: bool) -> list[Case]:
    """Every case for `device`, the most telling first; quick: one tiny case of each operation."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if quick:
        return [linear_case(dtype, 24, 32, 48, 8), layer_case(dtype, 24, 32, 48, 8), cayley_case(2, 8)]
    linear = [linear_case(dtype, *shape) for shape in (LINEAR_CUDA if cuda else LINEAR_CPU)]
    layer = [layer_case(dtype, *shape) for shape in (LAYER_CUDA if cuda else LINEAR_CPU)]
    cayley = [cayley_case(*shape) for shape in (CAYLEY_CUDA if cuda else CAYLEY_CPU)]
    if not cuda:
        return [*cayley, *layer, *linear]
    return [*cayley, *linear, *layer, linear_case(torch.float32, 4096, 1024, 1024, 409)]


# -- the counterparts, in plain PyTorch under autograd -------------------------------------------------------------


def cayley_by_solve(theta: Tensor, k: int) -> Tensor:
    """E = -2 (I + K)^-1 K by torch.linalg.solve; theta (..., m). On the CPU one matrix at a time: see reference.py."""
    if theta.ndim > 1 and theta.device.type == "cpu":
        return torch.stack([cayley_by_solve(row, k) for row in theta])
    K = reference.skew(theta, k)
    return -2 * torch.linalg.solve(torch.eye(k, dtype=K.dtype, device=K.device) + K, K)


def naive(x: Tensor, core: Tensor, weight: Tensor, bias: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """y = x W^T + ((x V) core^T) U^T + b, as anybody would write it."""
    return F.linear(x, weight, bias) + F.linear(F.linear(F.linear(x, V.mT), core.to(x.dtype)), U)


def naive_layer(
    x: Tensor, theta: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, U: Tensor, V: Tensor, sigma: Tensor
) -> Tensor:
    E = cayley_by_solve(theta, len(sigma))
    return naive(x, torch.diag(delta) + (sigma + delta)[:, None] * E, weight, bias, U, V)


def rebuilt_layer(
    x: Tensor, theta: Tensor, delta: Tensor, bias: Tensor, U_r: Tensor, V_r: Tensor, sigma_r: Tensor
) -> Tensor:
    """y = x W'^T + b with W' = U_r (Sigma + dSigma) G V_r^T rebuilt at full rank within autograd, G padded by I."""
    k, r = len(delta), len(sigma_r)
    G = F.pad(cayley_by_solve(theta, k), (0, r - k, 0, r - k)) + torch.eye(r, dtype=theta.dtype, device=theta.device)
    scale = sigma_r + F.pad(delta, (0, r - k))
    return F.linear(x, (U_r * scale.to(x.dtype)) @ (G.to(x.dtype) @ V_r.mT), bias)


# -- versions ------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Random data of one layer in which U_r diag(sigma_r) V_r^T is W; x and dy (T, .), theta (m,), delta (k,)."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    U_r: Tensor
    V_r: Tensor
    sigma_r: Tensor
    theta: Tensor
    delta: Tensor

    @classmethod
    def draw(cls, dtype: torch.dtype, T: int, d_in: int, d_out: int, k: int, device: torch.device) -> Problem:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.float64)

        r = min(d_in, d_out)
        U_r, V_r = torch.linalg.qr(normal(d_out, r))[0], torch.linalg.qr(normal(d_in, r))[0]
        sigma_r = torch.linspace(2, 0.1, r, device=device, dtype=torch.float64)
        weight, theta = (U_r * sigma_r) @ V_r.mT, normal(k * (k - 1) // 2) * 0.15 / k**0.5  # ||K||_2 about 0.3
        half = [t.to(dtype) for t in (normal(T, d_in), normal(T, d_out), weight, normal(d_out))]
        return cls(*half, *(t.float() for t in (U_r, V_r, sigma_r, theta, 0.02 * normal(k))))


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()


def both_passes(function: Callable[..., Tensor], leaves: Sequence[Tensor], rest: Sequence, dy: Tensor) -> Run:
    """The output of function(*leaves, *rest) and the gradients of the leaves."""

    def run() -> tuple[Tensor, ...]:
        y = function(*leaves, *rest)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return run


def exactly(function: Callable[..., Tensor], leaves: Sequence[Tensor], rest: Sequence, dy: Tensor) -> list[Tensor]:
    """The same in float64."""
    wide = [t.double() if isinstance(t, Tensor) else t for t in rest]
    return list(both_passes(function, [leaf(t, torch.float64) for t in leaves], wide, dy.double())())


def twice(run: Run, exact: Sequence[Tensor], dtype: torch.dtype) -> list[float]:
    """Bounds from the errors of plain PyTorch; where one is exact by luck, rounding to `dtype` is still allowed."""
    errors = [((out.double() - want).norm() / want.norm()).item() for out, want in zip(run(), exact, strict=True)]
    return [max(ALLOWED * error, torch.finfo(dtype).eps / 4) for error in errors]


def served(device: torch.device, dtype: torch.dtype, op: str) -> list[str]:
    """Backends to force for `op`, beside "auto"; not the interpreter's, which is no speed."""
    names = [name for name, why in dispatch.refusals(op, device, dtype).items() if why is None]
    return [name for name in names if name != "triton" or device.type == "cuda"]


def forced(backend: str, run: Run) -> Run:
    def forced_run() -> tuple[Tensor, ...]:
        with sk.use_backend(backend):
            return run()

    return forced_run


def choices(device: torch.device, dtype: torch.dtype, ops: Sequence[str]) -> list[tuple[str, str]]:
    backends = dict.fromkeys(name for op in ops for name in served(device, dtype, op))
    return [*((name, mode) for name in backends for mode in ("composed", "factored")), ("auto", "auto")]


def frozen_versions(p: Problem) -> list[Version]:
    """nn.Linear with a frozen weight (forward and dgrad), and with a trained one."""
    (T, d_in), d_out, size = p.x.shape, len(p.bias), p.x.element_size()
    moved = size * (2 * d_in * d_out + 2 * T * (d_in + d_out))
    product, bound = 2 * T * d_in * d_out, PEER_BOUND[p.x.dtype]

    def version(name: str, leaves: list[Tensor], rest: list[Tensor], flops: float, moved: float) -> Version:
        exact = exactly(F.linear, leaves, rest, p.dy)
        return Version(name, both_passes(F.linear, leaves, rest, p.dy), exact, [bound] * len(exact), flops, moved)

    trained = [leaf(p.x), leaf(p.weight)]
    return [
        version("frozen linear", [leaf(p.x)], [p.weight, p.bias], 2 * product, moved),
        version("full fine-tuning", trained, [p.bias], 3 * product, moved + size * d_in * d_out),
    ]


def linear_flops(mode: str, T: int, d_in: int, d_out: int, k: int) -> float:
    """Forward and backward of y from a core (multiply and add are two)."""
    if mode == "composed":
        compose = 2 * d_out * k * (k + d_in)
        return 4 * T * d_in * d_out + 2 * compose + 2 * T * k * (d_in + d_out) + 2 * d_out * k * k
    return 4 * T * d_in * d_out + 4 * T * k * (d_in + d_out) + 6 * T * k * k


def linear_bytes(p: Problem, k: int) -> float:
    """Each input read once and each result written once, in either pass: x, y, dy, dx, and twice W, U, V, core."""
    (T, d_in), d_out, size = p.x.shape, len(p.bias), p.x.element_size()
    bases = size * d_in * d_out + 4 * k * (d_in + d_out + k)
    return 2 * bases + 2 * size * T * (d_in + d_out) + 2 * size * T * k + 4 * k * k


def linear_case(dtype: torch.dtype, T: int, d_in: int, d_out: int, k: int) -> Case:
    def build(device: torch.device) -> list[Version]:
        p = Problem.draw(dtype, T, d_in, d_out, k, device)
        U, V = p.U_r[:, :k].contiguous(), p.V_r[:, :k].contiguous()
        core = reference.core_ref(cayley_by_solve(p.theta, k), p.sigma_r[:k], p.delta, "input")
        leaves, moved = [leaf(p.x), leaf(core)], linear_bytes(p, k)
        exact = exactly(naive, leaves, [p.weight, p.bias, U, V], p.dy)
        plain = both_passes(naive, leaves, [p.weight, p.bias, U.to(dtype), V.to(dtype)], p.dy)
        peer_bound = [PEER_BOUND[dtype]] * len(exact)
        versions = [
            *frozen_versions(p),
            Version("naive", plain, exact, peer_bound, linear_flops("factored", T, d_in, d_out, k), moved),
        ]
        bound = twice(plain, exact, dtype)
        for backend, mode in choices(device, dtype, ["linear"]):

            def function(x: Tensor, core: Tensor, mode: str = mode) -> Tensor:
                return sk.ssvd_linear(x, p.weight, U, V, core, p.bias, mode)

            chosen = dispatch.linear_mode(p.x, p.weight, k, mode, True)
            label = mode if mode == chosen else f"{mode} ({chosen})"
            flops = linear_flops(chosen, T, d_in, d_out, k)
            run = forced(backend, both_passes(function, leaves, [], p.dy))
            versions.append(Version("ssvd", run, exact, bound, flops, moved, backend, label))
        return versions

    return Case("linear", dtype, build, "frozen linear", T, d_in, d_out, k)


def layer_case(dtype: torch.dtype, T: int, d_in: int, d_out: int, k: int) -> Case:
    def build(device: torch.device) -> list[Version]:
        p = Problem.draw(dtype, T, d_in, d_out, k, device)
        r, rotation = len(p.sigma_r), 6 * k**3
        U, V, sigma = (t[..., :k].contiguous() for t in (p.U_r, p.V_r, p.sigma_r))
        leaves, moved = [leaf(p.x), leaf(p.theta), leaf(p.delta)], linear_bytes(p, k) + cayley_bytes(1, k)
        exact = exactly(naive_layer, leaves, [p.weight, p.bias, U, V, sigma], p.dy)
        plain = both_passes(naive_layer, leaves, [p.weight, p.bias, U.to(dtype), V.to(dtype), sigma], p.dy)
        full = [p.bias, p.U_r.to(dtype), p.V_r.to(dtype), p.sigma_r]
        rebuilt, solve = both_passes(rebuilt_layer, leaves, full, p.dy), 20 / 3 * k**3
        rebuild = 4 * r * d_in * (r + d_out) + 6 * T * d_in * d_out + solve
        peer_bound = [PEER_BOUND[dtype]] * len(exact)
        versions = [
            *frozen_versions(p),
            Version("naive", plain, exact, peer_bound, linear_flops("factored", T, d_in, d_out, k) + solve, moved,
                    capturable=False),
            Version("rebuilt weight", rebuilt, exactly(rebuilt_layer, leaves, full, p.dy), peer_bound, rebuild, moved,
                    capturable=False),
        ]  # fmt: skip
        bound = twice(plain, exact, dtype)
        layer = ssvd_layer(p, k)
        for backend, mode in choices(device, dtype, ["linear", "cayley"]):

            def run(mode: str = mode) -> tuple[Tensor, ...]:
                layer.mode = mode
                y = layer(leaves[0])
                return y.detach(), *torch.autograd.grad(y, (leaves[0], layer.theta, layer.delta_sigma), p.dy)

            chosen = dispatch.linear_mode(p.x, p.weight, k, mode, True)
            label = mode if mode == chosen else f"{mode} ({chosen})"
            flops = linear_flops(chosen, T, d_in, d_out, k) + rotation
            versions.append(Version("ssvd", forced(backend, run), exact, bound, flops, moved, backend, label))
        return versions

    return Case("layer", dtype, build, "frozen linear", T, d_in, d_out, k)


def ssvd_layer(p: Problem, k: int) -> sk.SSVDLinear:
    """The layer of `p`, made from its known factors."""
    linear = nn.Linear(p.x.shape[1], len(p.bias), device="meta")
    linear.weight, linear.bias = nn.Parameter(p.weight), nn.Parameter(p.bias)
    U, V, sigma = (t[..., :k].contiguous() for t in (p.U_r, p.V_r, p.sigma_r))
    known = Factorization(U, sigma, V, fingerprint(p.weight), 0.0, sketch(U, V))
    layer = sk.SSVDLinear(linear, sk.SSVDConfig(rank=k), known)
    with torch.no_grad():
        layer.theta.copy_(p.theta)
        layer.delta_sigma.copy_(p.delta)
    return layer


def cayley_bytes(B: int, k: int) -> float:
    """float32: theta read, E written; dE and E read, dtheta written."""
    return 4 * B * (k * (k - 1) + 3 * k * k)


def cayley_case(B: int, k: int) -> Case:
    def build(device: torch.device) -> list[Version]:
        theta = leaf(torch.randn(B, k * (k - 1) // 2, device=device) * 0.15 / k**0.5)
        dE = torch.randn(B, k, k, device=device)
        rows = [exactly(cayley_by_solve, [row], [k], grad) for row, grad in zip(theta, dE)]
        exact = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        plain, peer_bound = both_passes(cayley_by_solve, [theta], [k], dE), [PEER_BOUND[torch.float32]] * 2
        moved = cayley_bytes(B, k)
        mode = "batched" if device.type == "cuda" else "loop"
        flops = 20 / 3 * k**3 * B
        versions = [Version("linalg.solve", plain, exact, peer_bound, flops, moved, mode=mode, capturable=False)]
        bound, run = twice(plain, exact, torch.float32), both_passes(sk.cayley_delta, [theta], [k], dE)
        for backend in served(device, torch.float32, "cayley"):
            versions.append(Version("ssvd", forced(backend, run), exact, bound, 6 * k**3 * B, moved, backend))
        return versions

    return Case("cayley", torch.float32, build, "linalg.solve", k=k, batch=B)
