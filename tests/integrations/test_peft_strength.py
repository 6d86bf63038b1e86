"""PEFT: the strength of an adapter, in its configuration and as LoRA's scaling is used."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import inject, train_randomly
from peft_models import adapted, base_model, config, layers, peft, run
from torch import nn

import ssvd_kernels as sk


def at_half() -> nn.Module:
    """`adapted()` at strength 0.5, by this package's own injection."""
    model, twin = adapted(), base_model()
    inject(twin, targets="whisper")
    for path, layer in sk.ssvd_layers(twin).items():
        for key, parameter in layer.adapter().items():
            found = model.base_model.model.get_submodule(path).ssvd_adapter["default"].adapter()[key]
            parameter.data.copy_(found.data)
    sk.set_strength(twin, 0.5)
    return twin.eval()


def each(model: nn.Module, method: str, *args: object) -> nn.Module:
    for layer in layers(model).values():
        getattr(layer, method)(*args)
    return model


def in_the_configuration(tmp_path) -> nn.Module:
    return train_randomly(peft.get_peft_model(base_model(), config(strength=0.5))).eval()


def reloaded(tmp_path) -> nn.Module:
    in_the_configuration(tmp_path).save_pretrained(str(tmp_path))
    return peft.PeftModel.from_pretrained(base_model(), str(tmp_path)).eval()


def set_scale(tmp_path) -> nn.Module:
    return each(adapted(), "set_scale", "default", 0.5)


def scale_layer(tmp_path) -> nn.Module:
    return each(each(adapted(), "scale_layer", 0.25), "unscale_layer", 0.5)


def copied(tmp_path) -> nn.Module:
    return copy.deepcopy(set_scale(tmp_path))


@pytest.mark.parametrize("way", [in_the_configuration, reloaded, set_scale, scale_layer, copied])
@torch.no_grad()
def test_every_way_to_half_strength(way: Callable, tmp_path):
    model, expected = way(tmp_path), run(at_half())
    assert torch.equal(run(model), expected)
    assert torch.equal(run(each(model, "set_scale", "default", 0)), run(base_model()))


@torch.no_grad()
def test_back_to_the_configured_strength_and_merging():
    model = adapted()
    trained = run(model)
    each(each(model, "scale_layer", 0.5), "unscale_layer")
    assert torch.equal(run(model), trained)
    each(model, "set_scale", "default", 0.5)
    weights = {name: layer.weight.clone() for name, layer in layers(model).items()}
    model.merge_adapter()
    assert all(torch.equal(layer.base_layer.weight, weights[name]) for name, layer in layers(model).items())


def test_other_strengths_are_refused():
    with pytest.raises(ValueError, match=r"`strength` must be a number between 0 and 1\.5, got 2"):
        config(strength=2)
    layer = next(iter(layers(adapted()).values()))
    with pytest.raises(ValueError, match=r"`strength` must be a number between 0 and 1\.5, got 3"):
        layer.scale_layer(3)
    assert layer.ssvd_adapter["default"].strength == 1
