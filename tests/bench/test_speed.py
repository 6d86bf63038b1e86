"""Ratios that a regression of two would break and noise does not: the least time of interleaved runs on each side.

Processor time of one thread, so that other programs on the machine hardly count; `make test-speed` runs them alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from bounds import assert_within
from cases import solved_delta
from models import references, small_layers, step_of
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.ops import dispatch

pytestmark = [pytest.mark.timing, pytest.mark.usefixtures("one_thread", "as_trained")]

D, K = 768, 306


def times_faster(ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 12) -> float:
    """Least time of `theirs` over least time of `ours`, taking turns."""
    runs, best = (ours, theirs), [float("inf")] * 2
    for repeat in range(repeats + 1):
        for index, run in enumerate(runs):
            start = time.process_time()
            run()
            if repeat:
                best[index] = min(best[index], time.process_time() - start)
    return best[1] / best[0]


@pytest.mark.parametrize(("batch", "k", "least"), [(4, 153, 2.0), (4, 256, 1.9), (2, 409, 1.5), (1, 512, 1.3)])
def test_the_compiled_cayley_beats_a_loop_of_solves(batch, k, least):
    if reason := dispatch.refusals("cayley", torch.device("cpu"), torch.float32)["ext"]:
        pytest.skip(reason)
    theta = (torch.randn(batch, k * (k - 1) // 2) * 0.15 / k**0.5).requires_grad_()
    dE = torch.randn(batch, k, k)

    def ours() -> object:
        return torch.autograd.grad(sk.cayley_delta(theta, k), theta, dE)

    def theirs() -> object:
        return torch.autograd.grad(solved_delta(theta, k), theta, dE)

    assert times_faster(ours, theirs) >= least


class Rebuilt(nn.Module):
    """The layer that composes its whole weight from full-rank factors inside autograd."""

    def __init__(self, layer: sk.SSVDLinear) -> None:
        super().__init__()
        U, sigma, Vt = torch.linalg.svd(layer.base_weight.detach().double())
        signs = torch.cat([(U[:, :K] * layer.U).sum(0).sign(), torch.ones(len(sigma) - K)])  # the layer's own
        self.factors = ((U * signs).float(), sigma.float(), (signs[:, None] * Vt).float())
        self.bias = layer.bias
        self.theta = nn.Parameter(layer.theta.detach().clone())
        self.delta_sigma = nn.Parameter(layer.delta_sigma.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        U, sigma, Vt = self.factors
        rest = len(sigma) - K
        G = nn.functional.pad(solved_delta(self.theta[None], K)[0], (0, rest, 0, rest)) + torch.eye(len(sigma))
        scale = sigma + nn.functional.pad(self.delta_sigma, (0, rest))
        return nn.functional.linear(x, (U * scale) @ (G @ Vt), self.bias)


@pytest.fixture(scope="module")
def layers() -> tuple[sk.SSVDLinear, Rebuilt]:
    torch.manual_seed(0)
    layer = sk.SSVDLinear.from_linear(nn.Linear(D, D), sk.SSVDConfig(rank=K))
    with torch.no_grad():
        layer.theta.normal_(0, 0.15 / K**0.5)
    return layer, Rebuilt(layer)


def both_passes(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        layer.train()  # as after an optimizer step: nothing kept
        y = layer(x)
        return torch.autograd.grad(y, [x, layer.theta, layer.delta_sigma], torch.ones_like(y))

    return run


@pytest.mark.parametrize(("T", "least"), [(64, 3.2), (1024, 1.3), (3072, 1.0)])
def test_the_layer_beats_one_that_rebuilds_its_weight(layers, T, least):
    layer, rebuilt = layers
    x = torch.randn(T, D, requires_grad=True)
    plain, exact = references(nn.Sequential(layer), lambda network: network(x).detach())
    for timed in (layer, rebuilt):
        assert_within(timed(x).detach(), plain, exact)
    assert times_faster(both_passes(layer, x), both_passes(rebuilt, x)) >= least


def test_the_layer_costs_little_more_than_full_fine_tuning_at_many_tokens(layers):
    layer, x = layers[0], torch.randn(3072, D, requires_grad=True)
    full = nn.Linear(D, D)

    def theirs() -> object:
        y = full(x)
        return torch.autograd.grad(y, [x, *full.parameters()], torch.ones_like(y))

    assert times_faster(both_passes(layer, x), theirs) >= 1 / 1.6


@pytest.mark.parametrize("T", [64, 1024])
def test_the_chosen_mode_is_not_much_slower_than_the_other(layers, monkeypatch, T):
    layer, x = layers[0], torch.randn(T, D, requires_grad=True)
    run = both_passes(layer, x)
    monkeypatch.setattr(layer, "mode", "auto")  # as it is again afterwards

    def forced(mode: str) -> None:
        layer.mode = mode
        run()

    for mode in ("composed", "factored"):
        assert times_faster(lambda: forced("auto"), lambda mode=mode: forced(mode)) >= 0.75


def test_the_host_spends_less_on_a_layer_than_on_peft_lora():
    """Small layers, whose products take no time: what is left is Python and dispatch."""
    peft = pytest.importorskip("peft")

    x, ours = torch.randn(1, 64), small_layers()
    sk.inject(ours, sk.SSVDConfig(rank=24), progress=False)
    lora = peft.get_peft_model(small_layers(), peft.LoraConfig(r=16, target_modules=r"\d+"))
    assert times_faster(step_of(ours, x), step_of(lora, x), repeats=40) >= 1.1
