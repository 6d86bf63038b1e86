"""What layers keep: W' is composed no more often than it must be, and of x no more is saved than needed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from bounds import assert_within
from cases import relative_error
from models import assert_all_within, assert_equal_gradients, gradients, inject, references, step, train_randomly
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssvd_kernels as sk
import ssvd_kernels.layers.caching as adapted_module
from ssvd_kernels.ops import reference, weight_cache

pytestmark = pytest.mark.usefixtures("one_thread")
D, T = 32, 64


class Block(nn.Module):
    """Three projections read one x, the other layers one of their own each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.checkpointed = False

    def attend(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.out(torch.tanh(self.q(h) * self.k(h)) + self.v(h))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.attend, x, use_reentrant=False) if self.checkpointed else self.attend(x)
        return self.down(torch.tanh(self.up(x)))


def block_of_rank(k: int, **options) -> Block:
    torch.manual_seed(k)
    model = Block()
    inject(model, rank=k, **options)
    train_randomly(model)
    return model


def x_of_block(seed: int = 0) -> Tensor:
    return torch.randn(2, T // 2, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def functions(y: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """The SSVDLinear nodes of y's graph."""
    found, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [parent for parent, _ in node.next_functions]
    return (node for node in found if node.name() == "SSVDLinearFunctionBackward")


def saved_numbers(model: nn.Module, y: Tensor) -> int:
    """Numbers a token that the SSVD layers save in y's graph, beside parameters and cores; shared ones count once."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}
    for node in functions(y):
        for tensor in node.saved_tensors:
            if tensor is not None and tensor.shape[0] != tensor.shape[-1]:
                saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
    return sum(numbers for where, numbers in saved.items() if where not in known) // T


def square_loss(y: Tensor) -> Tensor:
    return y.square().mean()


@pytest.fixture
def compositions(monkeypatch) -> list[int]:
    made: list[int] = []
    original = reference.compose_ref
    monkeypatch.setattr(reference, "compose_ref", lambda *args: made.append(1) or original(*args))
    return made


# -- the saved part of x ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 10, 11, 12, 20, 32])
@pytest.mark.parametrize("mode", ["composed", "factored"])
def test_layers_save_no_more_than_the_smaller_of_their_ranks_and_the_input(mode, k):
    model = block_of_rank(k)
    for layer in sk.ssvd_layers(model).values():
        layer.mode = mode
    bound = min(3 * k, D) + 2 * min(k, D) + min(k, 2 * D)
    found = []
    for number in range(3):
        y = model(x_of_block())
        saved = saved_numbers(model, y)
        assert saved <= bound if number else saved == 6 * k  # who shares x is known after the first forward
        square_loss(y).backward()
        found.append(gradients(model))
    for later in found[1:]:
        assert_equal_gradients(later, found[0])


def test_keys_and_values_of_all_decoder_blocks_save_the_encoder_output_once():
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(8))

        def forward(self, memory: Tensor) -> Tensor:
            return torch.stack([torch.tanh(block(memory)) for block in self.blocks]).sum(0)

    model = Decoder()
    inject(model, rank=12)
    train_randomly(model)
    for expected in (8 * 12, D):
        y = model(x_of_block())
        assert saved_numbers(model, y) == expected
        square_loss(y).backward()


def test_bytes_not_numbers_decide_under_autocast():
    """The float32 input is twice as large as bf16 z: three z of rank 20 are smaller, of rank 22 are not."""
    for k, expected in ((20, 6 * 20), (22, D + 3 * 22)):
        model = block_of_rank(k)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                y = model(x_of_block())
            saved = saved_numbers(model, y)
            square_loss(y).backward()
        assert saved == expected


def test_the_choice_waits_for_every_graph_of_an_earlier_forward():
    """Non-reentrant checkpointing recomputes with the choices of its forward, also if another forward ran between."""
    model, direct = block_of_rank(20), block_of_rank(20)
    model.checkpointed = True

    def compute(net: nn.Module) -> dict[str, Tensor]:
        first = net(x_of_block(1))
        second = net(x_of_block(2))
        with torch.no_grad():
            net(x_of_block(3))
        third = net(x_of_block(4))
        (square_loss(first) + square_loss(second) + square_loss(third)).backward()
        return gradients(net)

    plain, exact = references(direct, compute)
    for net in (direct, model):
        assert_all_within(compute(net), plain, exact)


def test_second_derivatives_pass_through_a_saved_input():
    model = block_of_rank(20, targets=["q", "k", "v"])

    def compute(net: nn.Module) -> dict[str, Tensor]:
        x = x_of_block()
        y = net(x)
        (dx,) = torch.autograd.grad(square_loss(y), x, create_graph=True)
        dx.square().sum().backward()
        return {**gradients(net), "x": x.grad}

    plain, exact = references(model, compute)
    for _ in range(2):
        assert_all_within(compute(model), plain, exact)
    assert sk.ssvd_layers(model)["q"].kept.weights.save_input


# -- the composed weight ------------------------------------------------------------------------------------------


def composed_layer() -> sk.SSVDLinear:
    torch.manual_seed(0)
    layer = train_randomly(sk.SSVDLinear.from_linear(nn.Linear(D, D), sk.SSVDConfig(rank=12)))
    layer.mode = "composed"
    return layer.train()


def test_one_composition_serves_forward_backward_and_all_micro_batches(compositions):
    layer = composed_layer()
    for seed in range(4):
        square_loss(layer(x_of_block(seed))).backward()
    assert len(compositions) == 1
    optimizer = torch.optim.AdamW([layer.theta, layer.delta_sigma], fused=True)
    optimizer.step()
    square_loss(layer(x_of_block())).backward()
    assert len(compositions) == 2


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


@pytest.mark.parametrize("name", changes())
def test_a_changed_parameter_is_seen_between_two_training_forwards(name):
    layer = composed_layer()
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
        layer = composed_layer()
        layer(x_of_block())
        assert layer.kept.weights._cached is not None
        free(layer)
        assert layer.kept.weights._cached is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_carry_nothing_kept(copied):
    model = block_of_rank(20)
    for _ in range(2):
        square_loss(model(x_of_block())).backward()
    expected = gradients(model)
    twin = copied(model)
    kept = [layer.kept.weights for layer in sk.ssvd_layers(twin).values()]
    assert not any(weight_cache.save_input or weight_cache._cached for weight_cache in kept)
    square_loss(twin(x_of_block())).backward()
    square_loss(model(x_of_block())).backward()
    ours, theirs = gradients(twin), gradients(model)
    assert_equal_gradients(theirs, ours)
    assert list(expected) == list(ours)


def test_inference_mode_keeps_nothing_and_transforms_are_right():
    layer = composed_layer()
    net = nn.Sequential(layer)  # whose twin is to be made
    with torch.inference_mode():
        y = layer(x_of_block().detach())
    assert layer.kept.weights._cached is None

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


# -- CUDA graphs --------------------------------------------------------------------------------------------------


@pytest.fixture
def graph(monkeypatch):
    """Calls as if a CUDA graph were being captured: what they allocate has no values before the first replay."""

    def capture(call):
        with monkeypatch.context() as patch:
            for module in (weight_cache, adapted_module):
                patch.setattr(module, "capturing", lambda tensor: True)
            return call()

    return capture


def test_what_a_graph_reads_outlives_forgetting_and_what_it_makes_serves_no_eager_call(graph):
    layer = composed_layer().eval()
    x = x_of_block().detach()
    with torch.no_grad():
        graph(lambda: layer(x))  # nothing was kept before
        assert layer.kept._factors is None and layer.kept.weights._cached is None and not layer.kept.weights._in_graphs
        layer(x)
        kept = [layer.kept._factors[1][-1], layer.kept.weights._cached.weight]
        graph(lambda: layer(x))
    layer.train()
    assert layer.kept._factors is None and layer.kept.weights._cached is None
    assert {id(tensor) for tensor in kept} == set(layer.kept.weights._in_graphs)
    operand = graph(lambda: layer.kept.weights.operand("U", layer.U, torch.bfloat16))
    assert layer.kept.weights._operands == {} and operand.dtype == torch.bfloat16


def test_a_training_step_in_a_graph_composes_once(graph, compositions):
    layer = composed_layer()
    x = x_of_block()

    def step_once() -> None:
        square_loss(layer(x)).backward()

    step_once()
    graph(step_once)
    assert len(compositions) == 1  # on the CPU by value; on a GPU each has a composition of its own
    compositions.clear()
    with torch.no_grad():
        layer.theta.mul_(-1)
    graph(step_once)
    assert len(compositions) == 1
