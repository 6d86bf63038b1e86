"""A root's forward and its cores: interrupted, with gradients switched within it, and in several threads at once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import Stack, adapt, assert_all_within, gradients, references, square_gradients, step
from torch import Tensor, nn

import ssvd_kernels as sk

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))


class GradientsWithin(Stack):
    """Switches gradients on by itself, under whatever its caller chose."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return super().forward(x)


def test_gradients_that_are_switched_on_within_a_forward_reach_all_parameters():
    model = adapt(GradientsWithin())

    def compute(network: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            y = network(X.to(next(network.parameters()).dtype))
        y.square().mean().backward()
        return gradients(network)

    plain, exact = references(model, compute)
    found = compute(model)
    assert len(found) == 2 * 5 and all(bool(gradient.any()) for gradient in found.values())
    assert_all_within(found, plain, exact)


@pytest.mark.parametrize("called", ["model", "layer"])
def test_a_forward_without_a_backward_leaves_no_graph(called):
    """A graph that saved its own output would never be freed: it would grow with every such call."""
    model = adapt(Stack())
    layer = next(iter(sk.ssvd_layers(model).values()))

    def leaf() -> dict[str, object]:
        """What is noted at the graph's end at theta, as long as a graph lives."""
        return layer.theta.view_as(layer.theta).grad_fn.next_functions[0][0].metadata

    y = model(X) if called == "model" else layer(torch.randn(3, layer.in_features))
    leaf()["seen"] = True
    assert leaf() and y.requires_grad
    del y
    assert not leaf()


@pytest.mark.parametrize("training", [True, False])
def test_keyboard_interrupt_leaves_nothing_behind(training):
    model = adapt(Stack()).train(training)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    handle = model.head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    step(model)

    def encode(network: nn.Module) -> dict[str, Tensor]:
        with torch.set_grad_enabled(training):
            return {"y": network.encoder(X.to(next(network.parameters()).dtype)).detach()}

    plain, exact = references(model, encode)
    assert_all_within(encode(model), plain, exact)
    assert_all_within(encode(model), plain, exact)


def _at_once(*works: Callable[[], object]) -> list[object]:
    """What they return, each in a thread of its own; the threads take turns as often as Python lets them."""
    start = threading.Barrier(len(works))
    with ThreadPoolExecutor(len(works)) as pool:
        return [done.result() for done in [pool.submit(lambda work=work: (start.wait(), work())[1]) for work in works]]


@pytest.mark.usefixtures("many_switches")
def test_inference_in_several_threads():
    model = adapt(Stack()).eval()
    with torch.no_grad():
        right = model(X)

    def serve() -> int:
        wrong = 0
        for _ in range(300):
            model.eval()
            with torch.no_grad():
                wrong += not torch.equal(model(X), right)
        return wrong

    assert _at_once(*[serve] * 4) == [0] * 4


@pytest.mark.usefixtures("many_switches")
def test_training_beside_inference_in_another_thread():
    model = adapt(Stack())
    alone = copy.deepcopy(model)
    right = square_gradients(alone, X)

    def train() -> int:
        wrong = 0
        for _ in range(1500):
            model.zero_grad()
            found = square_gradients(model, X)
            wrong += any(not torch.equal(gradient, right[name]) for name, gradient in found.items())
        return wrong

    def serve() -> int:
        with torch.no_grad():
            return sum(not torch.equal(model(X), alone(X)) for _ in range(300))

    assert _at_once(train, serve) == [0, 0]
