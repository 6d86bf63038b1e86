"""Modules under several paths, hooks on what is adapted, and models that PEFT has adapted."""

from __future__ import annotations

import copy

import pytest
import torch
from models import inject, train_randomly
from torch import Tensor, nn

import ssvd_kernels as sk


class Shared(nn.Module):
    """Its first layer is registered under two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.first = self.layers[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.first(x)


@pytest.mark.parametrize("targets", ["all-linear", ["layers.0", "layers.2"], ["first", "layers.2"]])
def test_a_module_under_two_paths_is_one_layer(targets):
    model, x = Shared(), torch.randn(3, 8)
    base = copy.deepcopy(model)
    assert inject(model, targets=targets).modules == ["layers.0", "layers.2"]
    assert isinstance(model.first, sk.SSVDLinear) and model.first is model.layers[0]
    train_randomly(model)
    trained = model(x)
    assert not torch.equal(trained, base(x))
    sk.merge(copy.deepcopy(model), unload=True)
    unloaded = copy.deepcopy(model)
    sk.merge(unloaded, unload=True)
    assert type(unloaded.first) is nn.Linear and unloaded.first is unloaded.layers[0]
    sk.remove(model)
    assert model.first is model.layers[0] and torch.equal(model(x), base(x))


def test_an_excluded_path_excludes_the_module():
    model = Shared()
    assert inject(model, targets="all-linear", exclude=["first"]).modules == ["layers.2"]


def test_parameters_that_different_modules_share_are_tied():
    model = Shared()
    model.layers[2].weight = model.first.weight
    with pytest.raises(ValueError, match=r"tied to 'layers\.2\.weight'"):
        inject(model, targets=["first"])


def test_hooks_stay_and_their_handles_remove_them():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    without = model(x)
    handle = model[0].register_forward_hook(lambda module, args, output: output + 1)
    seen: list[Tensor] = []
    model[1].register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
    hooked = model(x)
    inject(model)
    found = model(x)
    assert torch.equal(found, hooked)
    found.sum().backward()
    assert torch.equal(seen[0], torch.ones(3, 8))
    handle.remove()
    assert torch.equal(model(x), without)
    sk.remove(model)
    model(x).sum().backward()
    assert len(seen) == 2 and torch.equal(model(x), without)


def test_a_forward_that_is_set_on_the_instance_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    forward = model[0].forward
    model[0].forward = lambda x: forward(x) + 1
    with pytest.raises(TypeError, match="`0` has a `forward` of its own"):
        inject(model)
    assert type(model[0]) is nn.Linear


def test_a_model_that_peft_has_adapted_is_refused():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), lora)
    with pytest.raises(ValueError, match=r"model\.0 was adapted through PEFT"):
        inject(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad and "lora" in name]


@pytest.mark.parametrize("merge", [True, False])
def test_peft_keeps_hooks_and_modules_under_two_paths(merge):
    peft = pytest.importorskip("peft")
    from ssvd_kernels.integrations.peft import SSVDPeftConfig

    model, x = Shared(), torch.randn(3, 8)
    handle = model.first.register_forward_hook(lambda module, args, output: output + 1)
    hooked = model(x)
    adapted = peft.get_peft_model(model, SSVDPeftConfig(rank=2, target_modules=["layers.0", "layers.2"]))
    assert model.first is model.layers[0] and torch.equal(adapted(x), hooked)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), hooked)
    plain = adapted.merge_and_unload() if merge else adapted.unload()
    assert type(plain.first) is nn.Linear and plain.first is plain.layers[0] and torch.equal(plain(x), hooked)
    handle.remove()
    assert not torch.equal(plain(x), hooked)


def test_peft_warns_of_an_active_adapter_that_is_not_merged():
    peft = pytest.importorskip("peft")
    from ssvd_kernels.integrations.peft import SSVDPeftConfig

    config = SSVDPeftConfig(rank=2, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config, adapter_name="a")
    model.add_adapter("b", config)
    model.base_model.set_adapter(["a", "b"])
    with pytest.warns(UserWarning, match="'b', active until now, is left out"):
        model.merge_adapter(["a"])


def _compiled_blocks(model: nn.Module) -> nn.Module:
    model.layers = nn.Sequential(*(torch.compile(layer, backend="eager") for layer in model.layers))
    return model


def test_names_are_those_without_compiled_blocks(tmp_path):
    """An adapter of a model with compiled blocks serves one without, and the other way round."""

    def blocks() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Module()
        model.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)))
        return model

    plain, compiled, x = blocks(), _compiled_blocks(blocks()), torch.randn(3, 8)
    assert inject(compiled, targets=["layers.0.0", "layers.1.0"]).modules == ["layers.0.0", "layers.1.0"]
    train_randomly(compiled)
    sk.save_adapter(compiled, tmp_path / "compiled.safetensors")
    sk.load_adapter(plain, tmp_path / "compiled.safetensors", progress=False)
    assert torch.equal(plain.layers(x), compiled.layers(x))
    again = _compiled_blocks(blocks())
    sk.load_adapter(again, tmp_path / "compiled.safetensors", progress=False)
    assert torch.equal(again.layers(x), compiled.layers(x))


def test_a_linear_layer_that_is_compiled_by_itself_is_refused():
    model = nn.Sequential(torch.compile(nn.Linear(8, 8), backend="eager"))
    with pytest.raises(ValueError, match="adapt it before compiling"):
        inject(model)


def test_peft_leaves_hooks_where_they_were_if_it_refuses():
    peft = pytest.importorskip("peft")
    from ssvd_kernels.integrations.peft import SSVDPeftConfig

    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), torch.randn(3, 8)
    for layer in model:
        layer.register_forward_hook(lambda module, args, output: output + 1)
    hooked = model(x)
    with pytest.raises(ValueError, match="rank"):
        peft.get_peft_model(model, SSVDPeftConfig(rank=4, target_modules=["0", "1"]))
    assert all(type(layer) is nn.Linear for layer in model) and torch.equal(model(x), hooked)
