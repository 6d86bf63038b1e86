"""torch.export, and torch.func over the parameters of several adapters."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from bounds import assert_within
from cases import relative_error
from models import Stack, adapt, assert_all_within, gradients, inject, references
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import ssvd_kernels as sk

SCALES = (1.0, -1.0, 0.5)


@pytest.fixture
def model() -> nn.Module:
    return adapt(Stack()).eval()


def set_mode(model: nn.Module, mode: str) -> None:
    for layer in sk.ssvd_layers(model).values():
        layer.mode = mode


def exported(model: nn.Module, x: Tensor, **options) -> torch.export.ExportedProgram:
    """Exported, written to a file and read again."""
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), **options), buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


ANY_BATCH = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}


@pytest.mark.parametrize("unload", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_export_of_a_merged_model_holds_plain_linear_layers(model, strict, unload):
    both = torch.randn(9, 8), torch.randn(17, 8)
    expected = [references(model, lambda network, x=x: network(x).detach()) for x in both]
    sk.merge(model, unload=unload)
    program = exported(model, both[0], strict=strict, **ANY_BATCH)
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert calls == {"aten.linear.default", "aten.tanh.default"}
    for x, (plain, exact) in zip(both, expected):
        assert_within(program.module()(x), plain, exact)


@pytest.mark.parametrize("mode", ["composed", "factored", "auto"])
def test_export_of_an_unmerged_model_computes_with_its_theta(model, mode):
    set_mode(model, mode)
    with torch.no_grad():
        program = exported(model, torch.randn(9, 8), **ANY_BATCH).module()
        x = torch.randn(17, 8)
        before, _ = pair = references(model, lambda network: network(x))
        assert_within(program(x), *pair)
        for net in (program, model):
            for name, parameter in net.named_parameters():
                if name.endswith(("theta", "delta_sigma")):
                    parameter.mul_(-1)
        assert_within(program(x), *references(model, lambda network: network(x)))
        assert relative_error(program(x), before) > 1e-2
    model.train()(x).sum().backward()  # the export left nothing behind
    assert model.head.theta.grad.abs().max() > 0


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_trace(model, with_gradients):
    x = torch.randn(5, 8)

    def passes(network: nn.Module) -> dict[str, Tensor]:
        network.zero_grad()
        with torch.set_grad_enabled(with_gradients):
            y = network(x.to(next(network.parameters()).dtype))
        if with_gradients:
            y.square().sum().backward()
        return {"y": y.detach(), **gradients(network, whole=with_gradients)}

    with torch.set_grad_enabled(with_gradients):
        traced = torch.jit.trace(model.eval(), (torch.randn(4, 8),), check_trace=False)
    plain, exact = references(model, passes)
    found = passes(traced)
    assert len(found) == (11 if with_gradients else 1)
    assert_all_within(found, plain, exact)


def test_forward_derivatives(model):
    """Of the input and of the parameters, by torch.func."""
    trained = {name: torch.randn(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    x, dx = torch.randn(5, 8), torch.randn(5, 8)

    def derivatives(network: nn.Module) -> dict[str, Tensor]:
        dtype = next(network.parameters()).dtype
        values = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
        along = {name: trained[name.replace(".values.0.", ".")].to(dtype) for name in values}
        both = jvp(lambda p, x: functional_call(network, p, (x,)), (values, x.to(dtype)), (along, dx.to(dtype)))
        return dict(zip(("y", "dy"), both))

    plain, exact = references(model, derivatives)
    found = derivatives(model)
    assert found["dy"].abs().max() > 0
    assert_all_within(found, plain, exact)


def test_a_state_dict_is_assigned_to_a_model_without_values(model):
    x = torch.randn(5, 8)
    empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(x), model(x))


def stacked(model: nn.Module) -> dict[str, Tensor]:
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.stack([scale * p for scale in SCALES]) for name, p in trained.items()}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("mode", ["auto", "composed", "factored"])
@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.filterwarnings("error:There is a performance drop")  # no op may fall back to a loop
def test_vmap_over_adapters(model, mode, backend, shared_input):
    set_mode(model, mode)
    parameters = stacked(model)
    x = torch.randn(9, 8) if shared_input else torch.randn(len(SCALES), 9, 8)
    dims = (0, None if shared_input else 0)

    def output(adapter: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, adapter, (x,))

    def loss(adapter: dict[str, Tensor], x: Tensor) -> Tensor:
        return output(adapter, x).square().mean()

    with sk.use_backend(backend):
        found, grads = vmap(output, dims)(parameters, x), vmap(grad(loss), dims)(parameters, x)
        for index in range(len(SCALES)):
            mine = x if shared_input else x[index]
            one = {name: value[index] for name, value in parameters.items()}
            twin = Stack()  # with these parameters by other means
            inject(twin)
            twin.load_state_dict(model.state_dict() | one)
            set_mode(twin, mode)

            def passes(network: nn.Module, mine: Tensor = mine) -> dict[str, Tensor]:
                y = network(mine)
                y.square().mean().backward()
                return {"y": y.detach(), **gradients(network)}

            plain, exact = references(twin.eval(), passes)
            mapped = {name: value[index] for name, value in grads.items()}
            assert_all_within({"y": found[index], **mapped}, plain, exact)
            assert_all_within({"y": output(one, mine), **grad(loss)(one, mine)}, plain, exact)
        with torch.no_grad():
            before = model(x)
            vmap(output, dims)(parameters, x)
            assert torch.equal(model(x), before)  # it leaves nothing behind


def test_transforms_of_the_triton_kernels_are_refused_with_the_alternative(model):
    pytest.importorskip("triton")
    model.bfloat16()
    x, parameters = torch.randn(4, 8, dtype=torch.bfloat16), stacked(model)

    def output(adapter: dict[str, Tensor]) -> Tensor:
        return functional_call(model, adapter, (x,))

    with sk.use_backend("triton"):
        output({name: value[0] for name, value in parameters.items()})  # these do serve it
        for function in (output, grad(lambda adapter: output(adapter).sum())):
            with pytest.raises(RuntimeError, match=r"'triton' does not support.*vmap.*use_backend\('reference'\)"):
                vmap(function)(parameters)
        with sk.use_backend("reference"):
            assert vmap(output)(parameters).shape == (len(SCALES), 4, 8)
