"""What layers keep between calls follows what it was made from, and is never state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from bounds import assert_within
from cases import relative_error
from fake_streams import FakeStreams
from models import gradients, references, step, trained_layer
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.layers import caching
from ssvd_kernels.ops import reference

D, T = 32, 64


def x_of_block(seed: int = 0) -> Tensor:
    return torch.randn(2, T // 2, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def square_loss(y: Tensor) -> Tensor:
    return y.square().mean()


@pytest.fixture
def compositions(monkeypatch) -> list[int]:
    made: list[int] = []
    original = reference.compose_ref
    monkeypatch.setattr(reference, "compose_ref", lambda *args: made.append(1) or original(*args))
    return made


# -- the composed weight ------------------------------------------------------------------------------------------


def composed_layer() -> sk.SSVDLinear:
    torch.manual_seed(0)
    return trained_layer(D, D, "composed", rank=12).train()


def test_one_composition_serves_forward_and_backward_in_eval_all_calls(compositions):
    layer = composed_layer()
    for seed in range(2):
        square_loss(layer(x_of_block(seed))).backward()
    assert len(compositions) == 2
    with torch.no_grad():
        for seed in range(3):
            layer.eval()(x_of_block(seed)) if seed == 0 else layer(x_of_block(seed))
    assert len(compositions) == 3


def changes() -> dict[str, object]:
    def by_data(layer: sk.SSVDLinear) -> None:
        layer.theta.data.mul_(-0.5)

    def by_numpy(layer: sk.SSVDLinear) -> None:
        layer.delta_sigma.detach().numpy()[0] += 1

    def of_the_base(layer: sk.SSVDLinear) -> None:
        with torch.no_grad():
            layer.base_weight.mul_(2)

    def of_the_basis(layer: sk.SSVDLinear) -> None:
        layer.flip_basis(torch.tensor([-1.0] + [1.0] * (layer.k - 1)))

    def by_loading(layer: sk.SSVDLinear) -> None:
        layer.load_state_dict({name: 2 * t if "sigma" in name else t for name, t in layer.state_dict().items()})

    return {f.__name__: f for f in (by_data, by_numpy, of_the_base, of_the_basis, by_loading)}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", changes())
def test_a_changed_parameter_is_seen_by_the_next_forward(name, training):
    layer = composed_layer().train(training)
    with torch.set_grad_enabled(training):
        before = layer(x_of_block()).detach()
        changes()[name](layer)
        fresh = copy.deepcopy(layer)
        after = layer(x_of_block())
        assert torch.equal(after, fresh(x_of_block())) and relative_error(after, before) > 1e-3


def test_a_change_between_forward_and_backward_does_not_reach_the_backward():
    """dx belongs to the W' of the forward, as autograd's own dx belongs to the core that it saved."""
    layer, twin = composed_layer(), composed_layer()
    x, twin_x = x_of_block(), x_of_block()
    y, twin_y = layer(x), twin(twin_x)
    step(layer)
    layer(x_of_block(5))  # composes anew
    square_loss(y).backward()
    square_loss(twin_y).backward()
    assert torch.equal(x.grad, twin_x.grad)


def test_train_eval_and_merging_free_the_kept_weight():
    for free in (lambda layer: layer.train(), lambda layer: layer.eval(), lambda layer: layer.merge()):
        layer = composed_layer().eval()
        with torch.no_grad():
            layer(x_of_block())
        assert layer.cache.made.weight is not None
        free(layer)
        assert layer.cache.made is None


@torch.no_grad()
def test_a_kept_weight_that_was_written_into_is_composed_again():
    layer = composed_layer().eval()
    expected = layer(x_of_block())
    layer.weight.mul_(2)
    assert torch.equal(layer(x_of_block()), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@torch.no_grad()
def test_copies_carry_nothing_kept(copied):
    layer = composed_layer().eval()
    expected = layer(x_of_block())
    twin = copied(layer)
    assert layer.cache.made is not None and twin.cache.made is None
    assert torch.equal(twin(x_of_block()), expected)


def test_inference_mode_keeps_nothing_and_transforms_are_right():
    layer = composed_layer()
    net = nn.Sequential(layer)  # whose twin is to be made
    with torch.inference_mode():
        y = layer(x_of_block().detach())
    assert layer.cache.made is None

    def compute(net: nn.Module) -> tuple[Tensor, Tensor]:
        out = net(x_of_block())
        square_loss(out).backward()
        return out.detach(), gradients(net)["0.theta"]

    (plain_y, plain_dtheta), (exact_y, exact_dtheta) = references(net, compute)
    parameters, x = {name: p.detach() for name, p in layer.named_parameters()}, x_of_block().detach()
    dtheta = torch.func.grad(
        lambda theta: square_loss(torch.func.functional_call(layer, {**parameters, "theta": theta}, (x,)))
    )(layer.theta.detach())
    again, gradient = compute(net)
    for value in (y, again):
        assert_within(value, plain_y, exact_y)
    for value in (dtheta, gradient):
        assert_within(value, plain_dtheta, exact_dtheta)


# -- streams ------------------------------------------------------------------------------------------------------


def by_factors(layer: sk.SSVDLinear) -> Tensor:
    return layer.adapted(x_of_block())  # as a GPU does in half precision


def by_weight(layer: sk.SSVDLinear) -> Tensor:
    return layer.weight * 1


def by_operands(layer: sk.SSVDLinear) -> list[Tensor]:
    return [tensor * 1 for tensor in layer.operands(layer.core_for_call(), torch.bfloat16)]


@pytest.mark.parametrize(
    ("fill", "read"),
    [(by_factors, by_factors), (by_factors, by_weight), (by_weight, by_weight), (by_operands, by_operands)],
)
@torch.no_grad()
def test_a_stream_waits_once_for_what_another_one_fills(monkeypatch, fill, read):
    layer = composed_layer().eval()
    with FakeStreams(monkeypatch) as gpu:
        with gpu.on(1) as first:
            fill(layer)
        with gpu.on(2) as second:
            read(layer)
            read(layer)
    assert not gpu.faults and (first.waits, second.waits) == (0, 4 if read is by_operands else 1)


# -- CUDA graphs --------------------------------------------------------------------------------------------------


@pytest.fixture
def graph(monkeypatch):
    """Calls as if a CUDA graph were being captured: what they allocate has no values before the first replay."""

    def capture(call):
        with monkeypatch.context() as patch:
            patch.setattr(caching, "capturing", lambda tensor: True)
            return call()

    return capture


@torch.no_grad()
def test_what_a_graph_reads_outlives_forgetting_and_what_it_makes_serves_no_eager_call(graph):
    layer = composed_layer().eval()
    x = x_of_block()
    graph(lambda: layer(x))  # nothing was kept before
    assert layer.cache.made is None and not layer.cache._in_graphs
    layer(x)
    made = layer.cache.made
    made.dtype = None  # as on a GPU
    graph(lambda: layer(x))
    layer.train()
    assert layer.cache.made is None and made in layer.cache._in_graphs
    U, V = graph(lambda: layer.operands(None, torch.bfloat16)[:2])
    assert layer.cache._operands == {} and U.dtype == V.dtype == torch.bfloat16
