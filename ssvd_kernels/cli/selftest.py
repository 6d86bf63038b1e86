"""selftest: checks that the installed package computes correct results on this machine, against float64."""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.save_load import load_adapter, save_adapter
from ..config import SSVDConfig
from ..model.inject import inject
from ..model.lookup import ssvd_layers
from ..model.merge import merge, remove, unmerge
from ..ops import reference
from ..ops.dispatch import refusals, use_backend
from ..ops.functional import cayley_delta, ssvd_linear
from . import UsageError

# of a result in this dtype relative to float64's on the same inputs: about ten times what a sound machine gives
BOUNDS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
RANKS = (64, 153)
TOKENS, D_IN, D_OUT, K = 96, 130, 192, 48


class Check(NamedTuple):
    """`error` computes a relative error, which may be at most `bound`."""

    name: str
    bound: float
    error: Callable[[], float]


def run(args: argparse.Namespace) -> int:
    start, failed, count = time.perf_counter(), 0, 0
    for device in _devices(args.device):
        for check in checks(device):
            count += 1
            failed += not _passes(check)
        for op, dtype in (("cayley", torch.float32), ("linear", torch.bfloat16)):
            for name, reason in _backends(op, device, dtype).items():
                if reason is not None:
                    print(f"-     {op}, backend {name}, {device}: not checked ({reason})")
    seconds = time.perf_counter() - start
    if failed:
        print(f"{failed} of {count} checks FAILED ({seconds:.1f} s); SSVD_BACKEND=reference avoids the kernels")
        return 1
    print(f"all {count} checks passed ({seconds:.1f} s)")
    return 0


def checks(device: torch.device) -> Iterator[Check]:
    """Every check that `device` can run."""
    for dtype in (torch.float32, torch.float64):
        for backend, reason in _backends("cayley", device, dtype).items():
            for k in RANKS if reason is None else ():
                name = f"cayley k={k}, {_short(dtype)}, {backend}, {device}"
                yield Check(name, BOUNDS[dtype], partial(_cayley_error, device, dtype, backend, k))
    for dtype in BOUNDS:
        for backend, reason in _backends("linear", device, dtype).items():
            for mode in ("composed", "factored") if reason is None else ():
                name = f"linear {mode}, {_short(dtype)}, {backend}, {device}"
                yield Check(name, BOUNDS[dtype], partial(_linear_error, device, dtype, backend, mode))
    bound = BOUNDS[torch.float32]
    yield Check(f"an untrained model equals its base, {device}", 0.0, partial(_untrained_error, device))
    yield Check(f"an adapter comes back from disk, {device}", bound, partial(_reload_error, device))
    yield Check(f"merged equals unmerged, {device}", bound, partial(_merge_error, device))
    yield Check(f"unmerged and removed is the base again, {device}", 0.0, partial(_remove_error, device))


def _backends(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Backend -> why it is not checked, None if it is."""
    found = refusals(op, device, dtype)
    return {**found, "triton": "its kernels are for GPUs"} if device.type == "cpu" else found


def _passes(check: Check) -> bool:
    try:
        error = check.error()
    except Exception as problem:  # reported, and the self-test goes on
        print(f"FAIL  {check.name}: {type(problem).__name__}: {' '.join(str(problem).split())}")
        return False
    passed = error <= check.bound
    print(f"{'ok  ' if passed else 'FAIL'}  {check.name}: error {error:.1e}, tolerance {check.bound:.0e}")
    return passed


def _devices(name: str) -> list[torch.device]:
    if name == "all":
        return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device must be available here, got {name} ({str(error).splitlines()[0]})") from None
    return [device]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _relative(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||; infinity if `value` is not finite."""
    value, exact = value.detach().double().cpu(), exact.detach().double().cpu()
    return float((value - exact).norm() / exact.norm()) if bool(torch.isfinite(value).all()) else float("inf")


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _cayley_error(device: torch.device, dtype: torch.dtype, backend: str, k: int) -> float:
    """Larger error of E and of its gradient, for a batch of two; the oracle solves (I + K) E = -2 K."""
    theta = (_random(2, k * (k - 1) // 2, seed=k) * 0.5 / k**0.5).to(dtype)
    dE = _random(2, k, k, seed=k + 1).to(dtype)
    exact_theta = theta.detach().double().requires_grad_()
    eye = torch.eye(k, dtype=torch.float64)
    # one matrix at a time: a batched LU is wrong on the CPU (PyTorch issue 142815)
    exact = torch.stack([-2 * torch.linalg.solve(eye + K, K) for K in reference.skew(exact_theta, k)])
    exact.backward(dE.double())
    found_theta = theta.to(device).requires_grad_()
    with use_backend(backend):
        found = cayley_delta(found_theta, k)
        found.backward(dE.to(device))
    assert found_theta.grad is not None and exact_theta.grad is not None
    return max(_relative(found, exact), _relative(found_theta.grad, exact_theta.grad))


def _linear_error(device: torch.device, dtype: torch.dtype, backend: str, mode: str) -> float:
    """Largest error of y and of the gradients of x, core and bias; the oracle is the formula in float64."""
    wide = torch.promote_types(dtype, torch.float32)
    x, dy = _random(TOKENS, D_IN, seed=1).to(dtype), _random(TOKENS, D_OUT, seed=2).to(dtype)
    weight, bias = (_random(D_OUT, D_IN, seed=3) / D_IN**0.5).to(dtype), _random(D_OUT, seed=4).to(dtype)
    U, V = (torch.linalg.qr(_random(d, K, seed=d))[0].to(dtype) for d in (D_OUT, D_IN))
    core = (_random(K, K, seed=5) / (4 * K**0.5)).to(wide)

    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (x, core, bias)]
    composed = weight.double() + U.double() @ exact_inputs[1] @ V.double().mT
    exact = nn.functional.linear(exact_inputs[0], composed, exact_inputs[2])
    exact.backward(dy.double())
    inputs = [tensor.to(device).requires_grad_() for tensor in (x, core, bias)]
    weight, U, V = (tensor.to(device) for tensor in (weight, U, V))
    with use_backend(backend):
        found = ssvd_linear(inputs[0], weight, U, V, inputs[1], inputs[2], mode)
        found.backward(dy.to(device))
    pairs = [(found, exact), *((mine.grad, theirs.grad) for mine, theirs in zip(inputs, exact_inputs, strict=True))]
    return max(_relative(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None)


class _Model(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 40))
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(_random(*parameter.shape, seed=seed) / parameter.shape[-1] ** 0.5)


def _adapted(device: torch.device) -> tuple[_Model, _Model, Tensor]:
    """(base model, the same model adapted and trained, x)."""
    base = _Model().to(device)
    model = copy.deepcopy(base)
    inject(model, SSVDConfig(rank=12), progress=False)
    with torch.no_grad():
        for layer in ssvd_layers(model).values():
            layer.theta.copy_(0.1 * _random(*layer.theta.shape, seed=7))
            layer.delta_sigma.copy_(0.1 * layer.sigma.cpu() * _random(*layer.delta_sigma.shape, seed=8))
    return base, model, _random(33, 40, seed=9).float().to(device)


def _untrained_error(device: torch.device) -> float:
    base, x = _Model().to(device), _random(33, 40, seed=9).float().to(device)
    expected = base(x)
    inject(base, SSVDConfig(rank=12), progress=False)
    return _relative(base(x), expected)


def _reload_error(device: torch.device) -> float:
    base, model, x = _adapted(device)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder, "adapter.safetensors"))
        load_adapter(base, Path(folder, "adapter.safetensors"), progress=False)
    return _relative(base(x), model(x))


def _merge_error(device: torch.device) -> float:
    base, model, x = _adapted(device)
    expected = model(x)
    changed = _relative(expected, base(x))
    merge(model)
    error = _relative(model.eval()(x), expected)
    return error if changed > 0.01 else float("inf")


def _remove_error(device: torch.device) -> float:
    base, model, x = _adapted(device)
    merge(model)
    unmerge(model)
    remove(model)
    return _relative(model(x), base(x))
