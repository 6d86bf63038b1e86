"""Quantised bases, each by its own library: bitsandbytes in 4 and 8 bits, torchao in 4 and 8."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from bounds import assert_within, twice
from cases import relative_error, solved_delta
from gain import GAIN, output_gain, train
from models import adapt, assert_all_within, assert_equal_gradients, gradients, inject, references, train_randomly
from plain import effective
from quantized_nets import BITSANDBYTES, KINDS, K, X, adapted, net_of, nf4, numbers
from refusals import refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssvd_kernels as sk
from ssvd_kernels.basis.linears import base_weight, is_adaptable, is_quantized

FORMS = ["weight", "auto"]

# -- the product -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bf16_update_arrives_at_the_output(kind, form, kappa):
    layer = adapted(kind, torch.bfloat16, form=form).up
    train(layer, kappa)
    U, V, core = (factor.detach().double() for factor in layer.update_factors())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert abs(output_gain(layer, layer.base, U @ core @ V.mT, kappa) - 1) <= GAIN


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_against_float64(kind, form, dtype, device):
    """The base product is taken as its library makes it; what SSVD adds has at most twice plain PyTorch's error."""
    net = adapted(kind, dtype, device, form=form).train()
    layer = net.up
    U, V, sigma, W, k = layer.U, layer.V, layer.sigma, layer.base_weight, layer.k
    P, S, Qt = (factor.to(U.dtype) for factor in torch.linalg.svd(W.double(), full_matrices=False))
    plain_basis = relative_error(W.double() @ Qt[:k].mT.double(), P[:, :k] * S[:k])
    assert relative_error(W.double() @ V.double(), U * sigma) <= 2 * plain_basis  # it is the dequantised weight's
    dy = torch.randn(5, 96).to(device, dtype)

    def update(x: Tensor, theta: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
        E = solved_delta(theta.unsqueeze(0), k)[0]
        core = torch.diag(delta) + (sigma.to(E) + delta).unsqueeze(1) * E
        return ((x @ V.to(x)) @ core.to(dtype).mT) @ U.to(x).mT

    def run(call: Callable, *inputs: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        y = call(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    trained = (layer.theta, layer.delta_sigma)
    x = X.to(device, dtype)
    base_y, base_dx = run(layer.base, x)
    exact = run(lambda *args: update(*args, torch.float64), x.double(), *(t.double() for t in trained))
    plain = run(lambda *args: update(*args, dtype), x, *trained)
    if not layer.composes:  # the activation form

        def changed(x: Tensor, theta: Tensor, delta: Tensor) -> Tensor:
            E = solved_delta(theta.unsqueeze(0), k)[0]
            C = E + (delta / sigma).unsqueeze(1) * (E + torch.eye(k, device=E.device))
            return layer.base(x + ((x @ V.to(x)) @ C.to(x).mT) @ V.mT.to(x))

        plain = run(changed, x, *trained)
    added = (exact, plain) if layer.composes else (exact,)
    for found in added:
        found[0], found[1] = base_y.to(found[0]) + found[0], base_dx.to(found[1]) + found[1]
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    ours = [y.detach(), *torch.autograd.grad(y, [leaf, *trained], dy)]
    assert y.dtype == dtype and leaf.dtype == dtype and all(t.dtype == torch.float32 for t in ours[2:])
    assert_all_within(*(dict(zip(("y", "dx", "dtheta", "ddelta_sigma"), each)) for each in (ours, plain, exact)))
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    assert relative_error(base_y, x.double() @ W.double().mT + bias) <= 0.01  # W is what the library multiplies by


@pytest.mark.parametrize("kind", KINDS)
def test_before_training_the_output_is_the_quantised_models(kind):
    for training in (True, False):
        # bitsandbytes repacks 4-bit weights in an eval forward: the model to compare with stays in training mode
        base = net_of(kind).train(training or kind is nf4)
        net = net_of(kind).train(training)
        inject(net, rank=K)
        assert torch.equal(net(X), base(X))
        with torch.no_grad():
            assert torch.equal(net(X), base(X))


@pytest.mark.parametrize("kind", KINDS)
def test_training_evaluating_and_training_again_leaves_the_quantised_numbers_alone(kind):
    net = net_of(kind)
    if kind is nf4:
        net.up.support_avx512bf16_for_cpu = True  # where bitsandbytes repacks 4-bit weights in an eval forward
    before = numbers(net)
    report = inject(net, rank=K)
    assert report.total == 64 * 96 * 2 + 96 + 2 * 64 + report.trainable
    target = torch.tanh(X)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        net.train()
        loss = (net(X) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            net.eval()(X)
    assert losses[-1] < 0.8 * losses[0]
    after = numbers(net)
    assert [name.removesuffix(".base") for name in after] == list(before)
    for old, new in zip(before.values(), after.values()):
        assert torch.equal(old, new)


@pytest.mark.parametrize("kind", KINDS[:1])
def test_evaluating_cuts_no_gradient_off_that_passes_a_layer_without_an_adapter(kind):
    net = net_of(kind)
    net.down.support_avx512bf16_for_cpu = True
    inject(net, rank=K, targets=["up"])
    with torch.no_grad():
        train_randomly(net).eval()(X)
    net.train()(X).sin().sum().backward()
    assert all(grad.abs().max() > 0 for grad in gradients(net).values())


@pytest.mark.parametrize("kind", KINDS)
def test_cached_eval_copies_and_the_effective_weight(kind):
    net = adapted(kind).eval()
    y = net(X)
    with torch.no_grad():
        assert torch.equal(net(X), y) and torch.equal(net(X), y)
        assert torch.equal(copy.deepcopy(net)(X), y)
        layer = net.down
        assert_within(layer.weight, *effective(layer.base_weight, layer))
        net.train()
        layer.theta.mul_(-1)
        assert relative_error(net.eval()(X), y) > 1e-3
    layer.weight.square().sum().backward()  # a module that reads the weight trains as well
    assert layer.theta.grad.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_checkpointing(kind):
    """Autocast trains in the dtype in which the library answers; checkpointing, of both kinds, changes no gradient."""
    net = adapted(kind).train()

    def found(
        call: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None, of: nn.Module = net
    ) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            y = call(X.clone().requires_grad_())
        assert y.dtype in (torch.float32, torch.float64, dtype)
        y.to(torch.promote_types(y.dtype, torch.float32)).sin().sum().backward()
        return gradients(of)

    expected = found(net)
    for use_reentrant in (True, False):
        for _ in range(2):
            again = found(partial(checkpoint, net, use_reentrant=use_reentrant))
            assert_equal_gradients(again, expected)
    for dtype in (torch.bfloat16, torch.float16):
        plain = references(net, lambda network, dtype=dtype: found(network, dtype, of=network))[0]
        exact = references(net, lambda network: found(network, of=network))[1]
        ours, plain, exact = (
            torch.cat([g.flatten() for g in grads.values()]) for grads in (found(net, dtype), plain, exact)
        )
        assert relative_error(ours, exact) <= twice(plain, exact, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_compiles_to_one_graph(kind):
    torch._dynamo.reset()
    net = adapted(kind).train()

    def passes(network: nn.Module) -> dict[str, Tensor]:
        network(X).sin().sum().backward()
        return gradients(network)

    plain, exact = references(net, passes)
    eager = passes(net)
    torch.compile(net, fullgraph=True, backend="aot_eager")(X).sin().sum().backward()
    # the difference, as the base's products are as exact as its library makes them
    assert_all_within({name: exact[name] + (grad - eager[name]) for name, grad in gradients(net).items()}, plain, exact)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_bases", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_comes_back(kind, save_bases, tmp_path):
    net, path = adapted(kind).train(), tmp_path / "a.safetensors"
    sk.save_adapter(net, path, save_bases=save_bases)
    fresh, present = net_of(kind).train(), net_of(kind).train()
    inject(present, rank=K)
    for model in (fresh, present):
        assert sk.load_adapter(model, path, progress=False) == ["up", "down"]
        assert torch.equal(model(X), net(X))


@pytest.mark.parametrize("save_bases", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_the_unquantised_base_and_of_a_quantised_one_are_not_mixed_up(kind, save_bases, tmp_path):
    path = tmp_path / "a.safetensors"
    full = net_of(lambda net: None)
    inject(full, rank=K)
    sk.save_adapter(full, path, save_bases=save_bases)
    with pytest.raises(sk.AdapterError, match="trained on another base model"):
        sk.load_adapter(net_of(kind), path, progress=False)
    sk.save_adapter(adapted(kind), path, save_bases=save_bases)
    with refused(net_of(lambda net: None), sk.AdapterError, "trained on another base model"):
        sk.load_adapter(net_of(lambda net: None), path, progress=False)


# -- merging and taking out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_svft_trains_and_spectralft_is_refused(kind):
    net = net_of(kind)
    before, numbers_before = net(X).detach(), numbers(net)
    with pytest.raises(TypeError, match=r"is a quantised \w+: SpectralFT supports unquantised nn\.Linear layers only"):
        sk.inject(net, sk.SpectralFTConfig(top=3, rank=1), progress=False)
    assert torch.equal(net(X), before)
    inject(net, rank=K, rotation="banded", band=2)
    assert torch.equal(net(X), before)
    assert sk.check_training(net, net(X).square().sum()).ok == list(sk.ssvd_layers(net))
    train_randomly(net)
    assert relative_error(net(X).detach(), before) > 1e-3
    assert all(torch.equal(value, numbers_before[name.replace(".base", "")]) for name, value in numbers(net).items())


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_and_unloading_gives_plain_layers(kind):
    net = adapted(kind).train()
    y, (plain, exact) = net(X).detach(), references(net, lambda network: network(X).detach())
    with pytest.raises(ValueError, match=r"cannot merge up in place: its base weight is quantised.*unload=True"):
        sk.merge(net)
    with pytest.raises(ValueError, match="quantised"):
        net.down.merge()
    assert torch.equal(net(X), y)
    weights = {name: layer.weight.detach() for name, layer in sk.ssvd_layers(net).items()}
    sk.merge(net, unload=True)
    assert not sk.ssvd_layers(net) and not any(map(is_quantized, net.modules()))
    for name, weight in weights.items():
        assert type(net.get_submodule(name)) is nn.Linear and torch.equal(net.get_submodule(name).weight, weight)
    assert_within(net(X).detach(), plain, exact)
    assert relative_error(y, exact) <= 0.01  # its library may round x to 8 bits


@pytest.mark.parametrize("kind", KINDS)
def test_remove_gives_the_quantised_layers_back(kind):
    net = net_of(kind).train()
    y, modules = net(X), (net.up, net.down)
    adapt(net, rank=K)
    sk.remove(net)
    assert (net.up, net.down) == modules and torch.equal(net(X), y)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_quantised_layer_cannot_do(kind):
    net = adapted(kind)
    net.up.mode = "composed"
    with pytest.raises(ValueError, match=r"`mode` must be 'auto' or 'factored' for .*, got 'composed'"):
        net(X)
    with pytest.raises(TypeError, match="SSVDQuantizedLinear"):
        sk.SSVDLinear.from_linear(net.down.base, sk.SSVDConfig(rank=K))
    with pytest.raises(TypeError, match="`linear` must be a layer quantised by bitsandbytes or torchao, got "):
        sk.SSVDQuantizedLinear.from_linear(nn.Linear(4, 4), sk.SSVDConfig(rank=2))
    assert not is_adaptable(nn.Conv1d(4, 4, 3)) and is_adaptable(net.down.base)


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_layers_that_are_not_quantised_yet(kind, monkeypatch):
    monkeypatch.setattr(nn.Module, "to", lambda self, *args: self)
    net = net_of(kind)
    with refused(net, ValueError, r"`up` must be quantised, got a Linear.* with a torch.float32 weight: .*device"):
        inject(net, rank=K)


@pytest.mark.parametrize("kind", BITSANDBYTES[:1])
def test_weight_that_was_repacked_for_inference(kind):
    net, repack = net_of(kind), importlib.import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu
    net.up.weight.data, _ = repack(net.up.weight.data, net.up.weight.quant_state)  # as an eval forward does
    with pytest.raises(ValueError, match=r"`up` is a Linear4bit.*repacked for CPU inference.*reload the model"):
        inject(net, rank=K)


@pytest.mark.parametrize("kind", [KINDS[2]])
def test_state_dict_of_another_base_is_refused(kind):
    net, other = adapted(kind), net_of(kind, seed=1)
    inject(other, rank=K)
    net.load_state_dict(net.state_dict())
    with pytest.raises(RuntimeError, match=r"up\.base\.weight differs.*load base weights before inject"):
        net.load_state_dict({name: value for name, value in other.state_dict().items() if ".base." in name}, False)


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:3])
def test_whisper_as_transformers_quantises_it(kind, tmp_path):
    from quantized_models import quantized
    from speech_models import inputs, whisper

    whisper().save_pretrained(tmp_path)
    models = [quantized(kind.__name__, tmp_path, torch.bfloat16) for _ in range(2)]
    model = models[0]
    assert inject(model, targets="whisper").modules
    assert all(isinstance(layer, sk.SSVDQuantizedLinear) for layer in sk.ssvd_layers(model).values())
    batch = {key: v.bfloat16() if v.is_floating_point() else v for key, v in inputs(model).items()}
    model.train()(**batch)[0].float().square().mean().backward()
    assert all(grad.abs().max() > 0 for grad in gradients(model).values())
    train_randomly(model)
    sk.save_adapter(model, tmp_path / "a.safetensors")
    sk.load_adapter(models[1], tmp_path / "a.safetensors", progress=False)
    with torch.no_grad():
        model.eval()
        assert torch.equal(models[1].eval()(**batch)[0], model(**batch)[0])


def test_a_plain_layer_is_not_taken_for_a_quantised_one():
    linear = nn.Linear(4, 3)
    assert not is_quantized(linear) and is_adaptable(linear) and base_weight(linear) is linear.weight
