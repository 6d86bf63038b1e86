"""Layers that cast W and b to x's dtype, as those of OpenAI's Whisper: x of any dtype in every state of the layer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_within
from models import Encoder, Formula, adapt, assert_right, inject, train_randomly
from plain import plain
from torch import Tensor, nn

import ssvd_kernels as sk

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALF]
CONFIGS = {"SSVD": sk.SSVDConfig(rank=5), "SpectralFT": sk.SpectralFTConfig(top=5, rank=2)}


class Casting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def net(dtype: torch.dtype = torch.float32) -> Encoder:
    return Encoder(None, lambda: nn.Sequential(Casting(8, 12, dtype=dtype), nn.Tanh(), Casting(12, 8, False))).eval()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_output_and_gradients_in_the_dtype_of_x(dtype, method):
    for base in (torch.float32, torch.bfloat16):
        model = nn.Sequential(Casting(40, 48, dtype=base))
        sk.inject(model, CONFIGS[method], progress=False)
        assert_right(train_randomly(model)[0], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluating_merged_unloaded_disabled_and_removed(dtype):
    x, base = torch.randn(5, 8).to(dtype), net()
    model = adapt(copy.deepcopy(base))
    training, exact, merged = model.train()(x), plain(model, torch.float64)(x.double()), copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in sk.ssvd_layers(model.eval()).items():
            merged.get_submodule(name).weight.copy_(layer.weight)
        for _ in range(2):  # the second time of what the first has kept
            assert_within(model(x), training, exact)
            assert model(x.float()).dtype == torch.float32
        with sk.disable_adapter(model):
            assert torch.equal(model(x), base(x))
        sk.merge(model)
        assert torch.equal(model(x), merged(x))
        sk.unmerge(model)
        unloaded = copy.deepcopy(model)
        sk.merge(unloaded, unload=True)
        assert torch.equal(unloaded(x), merged(x))
        sk.remove(model)
        assert torch.equal(model(x), base(x))
    for plain_model in (unloaded, model):
        assert {type(m) for m in plain_model.modules()} == {type(m) for m in base.modules()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_identical_before_training(dtype, config):
    x, base = torch.randn(5, 8).to(dtype), net().requires_grad_(False)
    model = copy.deepcopy(base)
    sk.inject(model, config, progress=False)
    for training in (True, False):
        for autocast in (False, True):
            for network in (base, model):
                network.train(training)
            with torch.autocast("cpu", dtype if dtype in HALF else torch.bfloat16, enabled=autocast):
                assert model(x).dtype == base(x).dtype and torch.equal(model(x), base(x))
                with torch.no_grad():
                    assert torch.equal(model(x), base(x))


def test_subclasses_that_do_not_cast_refuse_another_dtype_as_before():
    model = nn.Sequential(type("Renamed", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x)})(8, 8))
    inject(model)
    for training in (True, False):
        with pytest.raises(ValueError, match="must have the dtype of `x`"):
            model.train(training)(torch.randn(3, 8, dtype=torch.float64))
    sk.remove(model)
    assert type(model[0]).__name__ == "Renamed"


@pytest.mark.parametrize("dtype", HALF)
def test_through_peft(dtype):
    peft = pytest.importorskip("peft")
    from ssvd_kernels.integrations.peft import SSVDPeftConfig

    base = nn.Sequential(Casting(40, 48)).eval()
    model = peft.get_peft_model(copy.deepcopy(base), SSVDPeftConfig(rank=5, target_modules=["0"]))
    model.add_adapter("b", SSVDPeftConfig(rank=3, side="output", target_modules=["0"]))
    layer = model.base_model.model[0]
    x, adapters = torch.randn(64, 40).to(dtype), list(layer.ssvd_adapter.values())
    train_randomly(nn.ModuleList(adapters).requires_grad_(True))
    for names in (["default"], ["default", "b"]):
        layer.set_adapter(names)
        formulas = [
            [Formula(layer.base_weight, layer.base_layer.bias, [a], of) for a in adapters[: len(names)]]
            for of in (dtype, torch.float64)
        ]
        narrow, exact = (
            sum(each(x.to(each.dtype)) for each in of) - (len(of) - 1) * base(x.to(of[0].dtype)) for of in formulas
        )
        assert_within(model.train()(x), narrow, exact)
        with torch.no_grad():
            assert_within(model.eval()(x), narrow, exact)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    base[0].weight = nn.Parameter(layer.weight.detach())
    merged = model.merge_and_unload()
    assert torch.equal(merged(x), base(x)) and type(merged[0]) is Casting
