"""Which quantised bases take the activation form, and what a base does to its changed input."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import relative_error
from gain import GAIN, output_gain, train
from models import inject
from quantized_nets import BITSANDBYTES, KINDS, K, X, adapted, net_of
from refusals import refused
from torch import Tensor, nn

import ssvd_kernels as sk


@pytest.mark.parametrize("kind", KINDS)
def test_bases_that_round_their_weight_alone_take_the_activation_form(kind, tmp_path):
    """One basis in bfloat16 in place of two in float32; the same file serves both forms."""
    net, weight = adapted(kind).train(), adapted(kind, form="weight").train()
    own = kind.__name__ != "int8"  # bitsandbytes rounds x to 8 bits, too
    for layer in sk.ssvd_layers(net).values():
        names = {name for name, _ in layer.named_parameters(recurse=False)}
        assert names == {"sigma", "theta", "delta_sigma"} | ({"Vh"} if own else {"U", "V"})
        assert layer.get_parameter("Vh" if own else "V").dtype == (torch.bfloat16 if own else torch.float32)
    exact = weight(X).detach()
    assert relative_error(net(X).detach(), exact) <= 2**-8
    for source, target in ((net, weight), (weight, net)):
        sk.save_adapter(source, tmp_path / "a.safetensors")
        for layer in sk.ssvd_layers(target).values():
            layer.theta.data.zero_()
        sk.load_adapter(target, tmp_path / "a.safetensors", progress=False)
        assert relative_error(target(X).detach(), exact) <= 2**-8
    if not own:
        with pytest.raises(TypeError, match="rounds its input as well"):
            inject(net_of(kind), rank=K, form="activation")


@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="needs torchao")
def test_a_base_that_quantises_its_input_keeps_the_weight_form():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def dynamic(net: nn.Module) -> None:
        quantize_(net, Int8DynamicActivationInt8WeightConfig())

    assert type(adapted(dynamic).up) is sk.SSVDQuantizedLinear
    net = net_of(dynamic)
    with refused(net, TypeError, r"up is a quantised Linear that rounds its input as well.*`form` must be 'weight' or"):
        inject(net, rank=K, form="activation")


@pytest.mark.parametrize("kind", BITSANDBYTES[:1])
def test_what_a_base_would_round_to_nearest_is_rounded_before(kind):
    """bitsandbytes casts x to its compute dtype; here x is float32 and has bfloat16's values."""
    layer = adapted(kind).up
    layer.base.compute_dtype, layer.base.compute_type_is_set = torch.bfloat16, True
    train(layer, 1e-3)
    U, V, core = (factor.detach().double() for factor in layer.update_factors())

    def wide(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = call(x.float())
        assert y.dtype == torch.float32
        return y.bfloat16()

    found = output_gain(partial(wide, layer), partial(wide, layer.base), U @ core @ V.mT, 1e-3)
    assert abs(found - 1) <= GAIN


@pytest.mark.parametrize("kind", [KINDS[2]])
def test_a_base_that_passes_no_gradient_to_its_input(kind):
    net = adapted(kind)
    net.up.base.forward = lambda x: nn.Linear.forward(net.up.base, x.detach())
    with pytest.raises(RuntimeError, match=r"the base layer, a Linear, passes no gradient to its input.*form='weight'"):
        net(X)
    with torch.no_grad():
        net(X)


@pytest.mark.parametrize("kind", [KINDS[2]])
def test_singular_values_too_small_to_divide_by_leave_the_weight_form(kind):
    def singular(net: nn.Module) -> None:
        net.up.weight.data[:, 32:] = 0
        kind(net)

    assert type(adapted(singular, rotation="banded", band=1).up).form == "activation"
    net = net_of(singular)
    up = net.up
    inject(net, rank=40, targets=["up"])
    config = sk.SSVDConfig(rank=40, form="auto")
    for layer in (net.up, sk.SSVDQuantizedLinear.from_linear(up, config)):
        assert layer.form == "weight"
    net = net_of(singular)
    with refused(net, ValueError, r"up: form='activation' divides by singular values"):
        inject(net, rank=40, targets=["up"], form="activation")
