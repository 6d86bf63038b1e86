"""The layer and the op on the Triton backend: padded operands, composition in bfloat16, torch.compile."""

from __future__ import annotations

from functools import partial

import pytest

pytest.importorskip("triton")

import torch
from cases import activation_inputs, linear_inputs, naive_activation, naive_linear
from models import activation_passes, assert_all_within, assert_right, trained_layer
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.layers import running
from ssvd_kernels.ops import dispatch, reference, triton_linear
from ssvd_kernels.ops.functional import activation
from ssvd_kernels.ops.kernels import custom_ops
from ssvd_kernels.ops.kernels.compose import compose
from ssvd_kernels.ops.triton_linear import core_operand, operand

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
D, K = 96, 19  # K is no multiple of 16


@pytest.fixture(autouse=True)
def _forced():
    with sk.use_backend("triton"):
        yield


# -- stochastic rounding ------------------------------------------------------------------------------------------


def test_rounding_is_unbiased_bounded_and_exact_where_nothing_is_to_round():
    x = torch.randn(512, 512)
    rounded = reference.round_stochastically(x)
    assert rounded.dtype == BF16
    unit = 2.0 ** (torch.frexp(x)[1] - 8)  # of bfloat16, at x
    error = (rounded.double() - x.double()) / unit
    assert error.abs().max() < 1  # a neighbour, above or below
    assert error.mean().abs() < 5 * error.std() / x.numel() ** 0.5
    assert 0.35 < error.std() < 0.45  # sqrt(1/6), of a uniform place between two neighbours
    assert torch.equal(reference.round_stochastically(rounded.float()), rounded)
    special = torch.tensor([[0.0, -0.0, float("inf"), -float("inf"), 1.0, -2.0]])
    assert torch.equal(reference.round_stochastically(special).float(), special)


@pytest.mark.parametrize("params", [F32, BF16])
@pytest.mark.parametrize("shape", [(37, 41, 17), (70, 130, 65)])
def test_the_kernel_rounds_as_its_twin_does(shape, params):
    """Bit for bit, but where the float32 sums differ in their last place across a rounding threshold."""
    d_out, d_in, k = shape
    case = linear_inputs((1, d_in, d_out, k), BF16, params)
    weight, U, V, core = (case[name].to(DEVICE) for name in ("weight", "U", "V", "core"))
    args = [weight, U.to(BF16), V.to(BF16), core]
    ours, twin = compose(*args), reference.compose_operand_ref(*args, BF16)
    assert (ours != twin).float().mean() < 0.01
    still = [*args[:3], torch.zeros_like(args[3])]
    assert torch.equal(compose(*still), args[0].to(BF16))  # nothing trained: the base weight itself


@pytest.mark.parametrize("round_weight", [compose, partial(reference.compose_operand_ref, dtype=BF16)])
def test_infinities_and_every_nan_stay_what_they_are(round_weight):
    case = {name: tensor.to(DEVICE) for name, tensor in linear_inputs((1, 41, 37, 17), F32).items()}
    case["weight"][0, :2] = torch.tensor([float("inf"), -float("inf")])
    case["U"][1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(F32)  # what GPUs make of inf - inf
    case["U"][2] = -case["U"][1]
    composed = round_weight(case["weight"], case["U"].to(BF16), case["V"].to(BF16), case["core"])
    assert composed[0, :2].tolist() == [float("inf"), -float("inf")]
    assert composed[1:3].isnan().all() and composed[3:].isfinite().all()


@pytest.mark.parametrize("shape", [(7,), (0, 5), (3, 1000), (2, 3, 41)])
def test_an_update_is_added_as_by_its_twin(shape):
    y, update = torch.randn(*shape).to(BF16), 0.01 * torch.randn(*shape)
    for given in (y, y.mT.contiguous().mT) if y.ndim > 1 else (y,):
        ours = triton_linear.add_update(given.to(DEVICE), update.to(DEVICE, BF16)).cpu()
        assert torch.equal(ours, reference.add_update(given, update.to(BF16)))
    assert not y.numel() or not torch.equal(ours, y)


@pytest.mark.parametrize("base", [BF16, F32], ids=["bf16 base", "float32 base of bf16 values"])
@pytest.mark.parametrize("kappa", [1e-4, 1e-3, 1e-2, 1e-1])
def test_the_update_survives_composition_in_bf16(kappa, base):
    """Projection of what was added on the true update, d = 1024, k = 409; to nearest, 5 % would survive 1e-4."""
    d, k = 1024, 409
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    weight = (draw(d, d) / d**0.5).to(BF16)
    U, V = torch.linalg.qr(draw(d, k))[0], torch.linalg.qr(draw(d, k))[0]
    core = kappa * draw(k, k) / k**0.5
    true = U.double() @ core.double() @ V.double().T
    added = reference.compose_operand_ref(weight.to(base), U, V, core, BF16).double() - weight.double()
    gain = ((added * true).sum() / true.square().sum()).item()
    assert abs(gain - 1) <= 0.02
    nearest = reference.compose_ref(weight.to(base), U, V, core, BF16).double() - weight.double()
    lost = ((nearest * true).sum() / true.square().sum()).item()
    assert lost < 0.2 if kappa == 1e-4 else lost <= 1.02


# -- the layer ----------------------------------------------------------------------------------------------------


class Autocast(nn.Sequential):
    """To the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, x.dtype):
            return super().forward(x)


@pytest.mark.parametrize(("mode", "T"), [("composed", 48), ("factored", 3), ("factored", 70)])
@pytest.mark.parametrize(("dtype", "base"), [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32)])
def test_a_layer_of_an_odd_rank(dtype, base, mode, T):
    """Its operands are padded."""
    layer = trained_layer(D, 64, mode, base, DEVICE, rank=K)
    assert_right(layer, Autocast if dtype != base else lambda net: net, T, dtype)


def test_the_padded_operands_are_made_once_and_dropped_with_the_rest():
    layer = trained_layer(D, 64, "factored", device=DEVICE, rank=K)
    x = torch.randn(5, D, device=DEVICE)
    layer(x)
    first = layer.operands(None, F32)[:2]
    assert [tensor.shape[1] for tensor in first] == [32, 32]
    layer(x)
    assert all(a is b for a, b in zip(layer.operands(None, F32), first))
    layer.flip_basis(torch.full((K,), -1.0))
    assert layer.cache._operands == {}
    _, V, _ = layer.operands(None, F32)
    assert torch.equal(V[:, :K], layer.V) and not V[:, K:].any()


def test_the_cores_of_a_model_are_cast_and_padded_at_once(monkeypatch):
    """Two ranks share a batch; a layer that is called outside of the model's forward casts its own core."""
    sizes = [(D, 96), (96, 80), (80, 64)]
    net = nn.Sequential(*(nn.Linear(*size) for size in sizes)).to(DEVICE, BF16)
    sk.inject(net, sk.SSVDConfig(ratio=0.25))
    for layer in net:
        layer.mode = "factored"
    net[0].theta.data.normal_(std=0.1)
    net[1].delta_sigma.data.normal_(std=0.1)
    calls: list[tuple[int, ...]] = []
    make = running.core_operand
    monkeypatch.setattr(running, "core_operand", lambda core, dtype: calls.append(core.shape) or make(core, dtype))
    x = torch.randn(5, D, device=DEVICE, dtype=BF16, requires_grad=True)

    def results(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y, [x, *(p for p in net.parameters() if p.requires_grad)], torch.ones_like(y))]

    of_model = results(net(x))
    assert calls == [(2, 24, 24), (1, 16, 16)] and [layer.k for layer in net] == [24, 20, 16]
    alone = results(net[2](net[1](net[0](x))))
    assert len(calls) == 2 and all(torch.equal(a, b) for a, b in zip(of_model, alone, strict=True))
    with torch.no_grad():
        first = net.eval()(x)
        assert torch.equal(first, net(x)) and torch.equal(first, of_model[0]) and len(calls) == 2


def test_a_core_of_an_outer_root_is_found_within_an_inner_one():
    outer, inner = (nn.Sequential(nn.Linear(D, D, dtype=BF16)).to(DEVICE) for _ in range(2))
    for net in (outer, inner):
        sk.inject(net, sk.SSVDConfig(rank=K))
        net[0].mode = "factored"
    outer[0].theta.data.normal_(std=0.1)
    x = torch.randn(5, D, device=DEVICE, dtype=BF16)
    expected, layer = outer(x), outer[0].forward
    inner.forward = layer
    outer.forward = lambda x: inner(x)
    assert torch.equal(outer(x), expected)


def test_padding_changes_no_shape_that_a_user_sees():
    inputs = {name: t.to(DEVICE) for name, t in linear_inputs((13, 48, 40, K), F32).items()}
    names = ("dx", "dcore", "dbias")
    plain, exact = (naive_linear({name: t.cpu() for name, t in inputs.items()}, of) for of in (F32, torch.float64))
    plain, exact = ({name: results[name] for name in names} for results in (plain, exact))
    dy = inputs.pop("dy")
    leaves = [inputs[name].requires_grad_() for name in ("x", "core", "bias")]
    for mode in ("composed", "factored"):
        got = torch.autograd.grad(sk.ssvd_linear(**inputs, mode=mode), leaves, dy)
        assert [value.shape for value in got] == [value.shape for value in exact.values()]
        assert_all_within({name: value.cpu() for name, value in zip(names, got, strict=True)}, plain, exact)


def test_operands():
    assert operand(torch.ones(5, 32), BF16).shape == (5, 32)
    assert operand(torch.ones(33, 33), BF16).shape == (33, 48) and operand(torch.ones(5, 33), BF16).sum() == 5 * 33
    assert core_operand(torch.ones(2, 33, 33), BF16).shape == (2, 48, 48)
    assert core_operand(torch.ones(33, 33), BF16).sum() == 33 * 33


def test_bfloat16_is_composed_where_kernels_do_it_and_many_tokens_pay_for_it():
    def choose(dtype: torch.dtype, T: int, fused: bool) -> str:
        backend = "triton" if fused else "reference"
        threshold = dispatch.composed_from(dtype, (1024, 1024), 409, "auto", True, backend)
        return "composed" if T >= threshold else "factored"

    assert choose(BF16, 4096, True) == "composed"
    assert choose(BF16, 64, True) == "factored"
    assert choose(BF16, 4096, False) == choose(F16, 4096, True) == "factored"


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "dtype"), [("composed", BF16), ("composed", F32), ("factored", BF16)])
def test_compiled_graphs_call_the_kernels(mode, dtype):
    torch._dynamo.reset()
    layer = trained_layer(D, 64, mode, dtype, DEVICE, rank=K)
    assert_right(layer, lambda net: net, tokens=7)
    with torch.profiler.profile() as profile:
        assert_right(layer, lambda net: torch.compile(net, fullgraph=True, backend="aot_eager"), tokens=7)
    called = {event.name.rpartition("::triton_")[2] for event in profile.events() if "::triton_" in event.name}
    expected = {"cayley_delta", "cayley_delta_backward"}
    if mode == "factored":
        assert called == expected | {"linear_fwd", "linear_bwd"}
    else:
        assert called == expected | {"compose", "core_grad"}


def test_the_activation_op():
    """Its operands padded here, or as a layer keeps them."""
    case = {name: tensor.to(DEVICE) for name, tensor in activation_inputs((7, D, K), BF16).items()}

    def keeping(x: Tensor, basis: Tensor, core: Tensor, shift: Tensor) -> Tensor:
        return activation(x, basis, core, shift, lambda dtype: core_operand(core.detach(), dtype))

    found, kept = activation_passes(case), activation_passes(case, keeping)
    plain, exact = (naive_activation(case, dtype) for dtype in (BF16, torch.float64))
    assert_all_within(found, {name: plain[name] for name in found}, {name: exact[name] for name in found})
    assert found["dcore"].dtype == F32 and all(torch.equal(kept[name], found[name]) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_compiled_graph_calls_the_kernels_of_the_activation_op(dtype):
    torch._dynamo.reset()
    case = {name: tensor.to(DEVICE) for name, tensor in activation_inputs((7, D, K), dtype).items()}
    with torch.profiler.profile() as profile:
        compiled = activation_passes(case, torch.compile(activation, fullgraph=True, backend="aot_eager"))
    called = {event.name.rpartition("::triton_")[2] for event in profile.events() if "::triton_" in event.name}
    assert called == {"activation_fwd", "activation_bwd"}
    assert all(torch.equal(value, compiled[name]) for name, value in activation_passes(case).items())


def test_the_operators_are_well_formed():
    case = {name: t.to(DEVICE) for name, t in linear_inputs((5, 32, 48, 16), F32).items()}
    params = [case[name] for name in ("weight", "U", "V", "core")]
    z = case["x"] @ case["V"]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(custom_ops._linear_fwd, (case["x"], *params, case["bias"], True), test_utils=checks)
    torch.library.opcheck(custom_ops._linear_fwd, (case["x"], *params, None, False), test_utils=checks)
    torch.library.opcheck(custom_ops._linear_bwd, (case["dy"], z, *params, True), test_utils=checks)
    torch.library.opcheck(custom_ops._linear_bwd, (case["dy"], None, *params, True), test_utils=checks)
    activations = case["x"], case["V"], case["core"]
    for shift in (None, case["x"][0]):
        torch.library.opcheck(custom_ops.ssvd_activation_fwd, (*activations, shift), test_utils=checks)
    for given, need_dx in ((z, True), (z, False), (None, True)):
        arguments = (case["x"], given, *activations[1:], need_dx)
        torch.library.opcheck(custom_ops._activation_bwd, arguments, test_utils=checks)
    torch.library.opcheck(custom_ops.compose, params, test_utils=checks)
    torch.library.opcheck(custom_ops.add_update, (case["x"].bfloat16(), case["x"].bfloat16()), test_utils=checks)
    torch.library.opcheck(custom_ops.core_grad, (z, z), test_utils=checks)
