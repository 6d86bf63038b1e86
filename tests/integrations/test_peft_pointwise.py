"""PEFT over convolutions of kernel 1 and transformers' Conv1D."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import relative_error
from models import train_randomly
from peft_models import gradients, layers, peft, transformers
from refusals import refused
from torch import Tensor, nn

from ssvd_kernels.integrations.peft import SSVDPeftConfig

NAMES = ["one", "two", "linear"]
X = torch.randn(3, 10, 7, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.wide = nn.Conv1d(10, 16, 1), nn.Conv1d(16, 16, 3, padding=1)
        self.two, self.linear = nn.Conv2d(2, 8, 1, bias=False), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(torch.tanh(self.one(x)))
        return self.linear(self.two(torch.stack([x, x.sin()], 1)))


def config(**options) -> SSVDPeftConfig:
    return SSVDPeftConfig(**{"rank": 2, "target_modules": NAMES, **options})


def run(model: nn.Module) -> Tensor:
    return model(X).detach()


def with_weights(model: nn.Module) -> Net:
    """The plain network that holds the W' of `model`."""
    twin = Net()
    for name, layer in layers(model).items():
        weight = twin.get_submodule(name.removeprefix("base_model.model.")).weight
        weight.data.copy_(layer.weight.detach().view_as(weight))
    return twin


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_training_saving_and_merging(side, tmp_path):
    model = peft.get_peft_model(Net(), config(side=side))
    assert torch.equal(run(model), run(Net()))
    train_randomly(model)(X).square().mean().backward()
    assert len(layers(model)) == 3 and all(grad.abs().max() > 0 for grad in gradients(model).values())
    y = run(model)
    assert relative_error(run(with_weights(model)), y) <= 1e-6
    model.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(Net(), str(tmp_path))
    assert torch.equal(run(again), y)
    model.eval().merge_adapter()
    merged = {name: layer.weight for name, layer in layers(model).items()}
    assert all(
        weight.shape == (layers(model)[name].out_features, layers(model)[name].in_features)
        for name, weight in merged.items()
    )
    assert relative_error(run(model), y) <= 1e-6
    model.unmerge_adapter()
    assert torch.equal(run(model), y)
    with model.disable_adapter():
        assert torch.equal(run(model), run(Net()))
    assert torch.equal(run(copy.deepcopy(again).unload()), run(Net()))
    plain = again.merge_and_unload()
    assert type(plain.one) is nn.Conv1d and type(plain.two) is nn.Conv2d
    assert relative_error(run(plain), y) <= 1e-6


def test_two_active_adapters_add_up():
    model = train_randomly(peft.get_peft_model(Net(), config()))
    model.add_adapter("b", config(rank=1, side="output"))
    model.set_adapter("b")
    train_randomly(model, 2)
    model.base_model.set_adapter(["default", "b"])
    assert relative_error(run(with_weights(model)), run(model)) <= 1e-6


def test_gpt2_by_all_linear():
    options = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).eval()
    tokens = torch.arange(7).view(1, 7)
    model = peft.get_peft_model(copy.deepcopy(base), config(rank=None, ratio=0.4, target_modules=None)).eval()
    assert len(layers(model)) == 4 and torch.equal(model(tokens).logits, base(tokens).logits)
    y = train_randomly(model)(tokens).logits.detach()
    model.merge_adapter()
    assert relative_error(model(tokens).logits.detach(), y) <= 1e-6
    model.unmerge_adapter()
    assert torch.equal(model(tokens).logits, y)
    assert relative_error(model.merge_and_unload()(tokens).logits.detach(), y) <= 1e-6


def test_refusals_change_nothing():
    model = Net()
    with refused(model, TypeError, r"`wide` must be a convolution of kernel size 1, .* with kernel_size \(3,\)"):
        peft.get_peft_model(model, config(target_modules=["one", "wide"]))
    with refused(model, TypeError, r"one is a Conv1d: `form` must be 'activation' or 'auto'"):
        peft.get_peft_model(model, config(form="weight"))
    with torch.no_grad():
        U, S, Vh = torch.linalg.svd(model.linear.weight, full_matrices=False)
        S[1:] = 1e-6 * S[0]
        model.linear.weight.copy_(U * S @ Vh)
    with refused(model, ValueError, r"linear: form='activation' divides by singular values.* got \S+ at k = 2"):
        peft.get_peft_model(model, config(form="activation"))
