"""Convolutions of kernel 1 and transformers' Conv1D: adapted in the activation form, merged into themselves."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from bounds import DRAWS, twice_of_draws
from cases import relative_error
from gain import GAIN, output_gain, train
from models import gradients, inject, square_gradients, train_randomly
from refusals import refused
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.layers.activation import SSVDPointwise


class Net(nn.Module):
    """Of the layers named 1d, 2d and wide the last is wider than one position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide = nn.Conv1d(10, 16, 1), nn.Conv1d(16, 16, 3, padding=1)
        self.second, self.plane = nn.Conv1d(16, 12, 1, bias=False), nn.Conv2d(2, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.wide(self.first(x))))
        return self.norm(self.plane(torch.stack([x, x.sin()], 1)))


NAMES = ["first", "second", "plane"]
X = torch.randn(3, 10, 7, generator=torch.Generator().manual_seed(3))
sides = pytest.mark.parametrize("side", ["input", "output", "both"])


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(side: str = "input", dtype: torch.dtype | None = None) -> Net:
    model = net().to(dtype)
    assert inject(model, rank=None, ratio=0.5, targets=NAMES, side=side).modules == NAMES
    return train_randomly(model)


def with_weights(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The plain network whose convolutions hold the W' of `model`."""
    twin = net().to(dtype)
    with torch.no_grad():
        for name, layer in sk.ssvd_layers(model).items():
            U, V, core = (factor.double() for factor in layer.update_factors())
            weight = twin.get_submodule(name).weight
            weight.copy_((layer.base_weight.double() + U @ core @ V.mT).reshape(weight.shape))
    return twin


@sides
def test_before_training_it_is_the_base(side):
    for dtype in (torch.float32, torch.bfloat16):
        model, base = net().to(dtype), net().to(dtype)
        inject(model, rank=2, targets=NAMES, side=side)
        layers = sk.ssvd_layers(model)
        assert all(type(layer) is SSVDPointwise for layer in layers.values())
        for training in (True, False):
            assert torch.equal(model.train(training)(X.to(dtype)), base.train(training)(X.to(dtype)))


@sides
def test_outputs_merging_and_files(side, tmp_path):
    model = adapted(side)
    y = model(X).detach()
    pairs = []
    for seed in range(DRAWS):
        train_randomly(drawn := adapted(side), seed)
        pairs.append([with_weights(drawn, of)(X.to(of)).detach() for of in (torch.float32, torch.float64)])
    bound, exact = twice_of_draws(pairs), with_weights(model, torch.float64)(X.double()).detach()
    assert relative_error(y, exact) <= bound
    assert sk.check_training(model, model(X).square().sum()).ok == NAMES
    sk.save_adapter(model, tmp_path / "a.safetensors")
    again = net()
    sk.load_adapter(again, tmp_path / "a.safetensors", progress=False)
    assert torch.equal(again(X), y)
    sk.merge(model)
    with torch.no_grad():
        assert relative_error(model(X), exact) <= bound
    sk.unmerge(model)
    assert torch.equal(model(X), y)
    state = {name: value.shape for name, value in net().state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items() if name in state} == state
    sk.merge(again, unload=True)
    assert type(again.first) is nn.Conv1d and type(again.plane) is nn.Conv2d
    assert relative_error(again(X).detach(), exact) <= bound
    sk.remove(model)
    assert torch.equal(model(X), net()(X)) and [*model.state_dict()] == [*state]


def test_gradients_are_those_of_a_convolution_with_the_weight():
    model = adapted("both", torch.float64)
    twin, x = with_weights(model, torch.float64), X.double()
    names = sk.ssvd_layers(model)

    def through_weights(model: nn.Module) -> Tensor:
        weights = {f"{name}.weight": layer.weight for name, layer in names.items()}
        plain = {name: value.view_as(twin.get_parameter(name)) for name, value in weights.items()}
        return torch.func.functional_call(twin, plain, x)

    through_weights(model).square().mean().backward()
    expected = gradients(model)
    for name, found in square_gradients(model, x).items():
        assert relative_error(found, expected[name]) <= 1e-11, name


@pytest.mark.parametrize("kappa", [1e-3, 1e-1])
@sides
def test_a_bf16_update_arrives_at_the_output(kappa, side):
    convolution = nn.Conv1d(64, 64, 1)
    layer = sk.SSVDLinear.from_linear(convolution.bfloat16(), sk.SSVDConfig(rank=26, side=side))
    train(layer, kappa)
    U, V, core = (factor.detach().double() for factor in layer.update_factors())

    def rows(call, x: Tensor) -> Tensor:
        return call(x.view(-1, 64, 64).mT).mT.reshape(-1, 64)

    found = output_gain(partial(rows, layer), partial(rows, convolution), U @ core @ V.mT, kappa)
    assert abs(found - 1) <= GAIN


@pytest.mark.parametrize("count", [1, 2])
def test_copies_evaluation_and_half_precision(count):
    model = adapted().eval()
    with torch.no_grad():
        y = model(X)
        for _ in range(count):
            assert torch.equal(copy.deepcopy(model)(X), y) and torch.equal(model(X), y)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(model(X), y) <= 0.05


@pytest.mark.slow
def test_training_compiles_to_one_graph():
    torch._dynamo.reset()
    model = adapted("both")
    twin = copy.deepcopy(model)
    torch.compile(model, fullgraph=True, backend="aot_eager")(X).square().mean().backward()
    for name, grad in square_gradients(twin, X).items():
        assert relative_error(gradients(model, whole=False).get(name, grad), grad) <= 1e-5


def test_conv1d_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    model, x = transformers.GPT2Model(config).eval(), torch.arange(7).view(1, 7)
    base = copy.deepcopy(model)
    report = inject(model, rank=None, ratio=0.4)
    assert [name.rpartition(".")[2] for name in report.modules] == ["c_attn", "c_proj", "c_fc", "c_proj"]
    assert torch.equal(model(x)[0], base(x)[0])
    train_randomly(model)
    y = model(x)[0].detach()
    assert relative_error(y, base(x)[0].detach()) > 1e-2
    weights = {name: layer.weight.detach() for name, layer in sk.ssvd_layers(model).items()}
    sk.merge(model, unload=True)
    for name, weight in weights.items():
        assert type(model.get_submodule(name)) is type(base.get_submodule(name))
        assert torch.equal(model.get_submodule(name).weight, weight.mT)
    assert relative_error(model(x)[0].detach(), y) <= 1e-6


@pytest.mark.parametrize(
    ("convolution", "reason"),
    [
        (nn.Conv1d(8, 8, 3), r"kernel_size \(3,\)"),
        (nn.Conv2d(8, 8, 1, stride=2), r"stride \(2, 2\)"),
        (nn.Conv1d(8, 8, 1, padding=1), r"padding \(1,\)"),
        (nn.Conv1d(8, 8, 1, groups=4), "4 groups"),
    ],
)
def test_other_convolutions_are_refused_by_name(convolution, reason):
    model = nn.ModuleDict({"conv": convolution})
    match = (
        rf"`conv` \(named in `targets`\) must be a convolution of kernel size 1, stride 1, .*got Conv\dd with {reason}"
    )
    with refused(model, TypeError, match):
        inject(model, rank=2, targets=["conv"])


def test_what_serves_linear_layers_alone():
    model = net()
    with refused(model, TypeError, r"first is a Conv1d: `form` must be 'activation' or 'auto' for it, got 'weight'"):
        inject(model, rank=2, targets=NAMES, form="weight")
    with refused(model, TypeError, "first is a Conv1d: SpectralFT supports nn.Linear layers only"):
        sk.inject(model, sk.SpectralFTConfig(top=2, rank=1, targets=NAMES), progress=False)
    with refused(model, ValueError, "`targets` must match an untied linear layer of Net"):  # unless named
        inject(model, rank=2)
