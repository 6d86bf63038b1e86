"""PEFT: ranks by layer, biases that train, adapters that start at random, and the layers' weight while disabled."""

from __future__ import annotations

import warnings

import pytest
import torch
from bounds import assert_bounded
from cases import relative_error
from models import RANK, train_randomly
from peft_models import SSVDPeftConfig, adapted, base_model, config, layers, peft, run
from refusals import refused
from speech_models import assert_bit_identical
from torch import nn

# -- ranks -------------------------------------------------------------------------------------------------------------


def test_the_rank_of_a_layer_is_of_the_first_pattern_that_fits_the_end_of_its_name():
    patterns = {"encoder.layers.0.fc1": 1, "fc1": 2, r"encoder\.layers\.\d\.fc2": 3, "^model.decoder.layers.1.fc2": 4}
    model = peft.get_peft_model(base_model(), config(target_modules=["fc1", "fc2"], rank_pattern=patterns))
    ranks = [layer.ssvd_adapter["default"].k for layer in layers(model).values()]
    assert ranks == [1, 3, 2, 3, 2, RANK, 2, 4]


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"side": "both", "rank": 4}])
def test_a_pattern_replaces_rank_and_ratio_and_its_adapter_comes_back(options, tmp_path):
    model = adapted(**options, rank_pattern={"fc1": 2})
    found = {name.split(".")[-1]: layer.ssvd_adapter["default"] for name, layer in layers(model).items()}
    assert found["fc1"].k == 2 and found["fc1"].k_out in (None, 2) and found["fc2"].k > 2
    model.save_pretrained(str(tmp_path))
    assert torch.equal(run(peft.PeftModel.from_pretrained(base_model(), str(tmp_path))), run(model))


@pytest.mark.parametrize(
    ("patterns", "match"),
    [
        ({"fc": 2}, "`rank_pattern` must match modules of the model, got 'fc', which matches none"),
        ({"fc1": 1000}, "fc1: `rank` must be between 1 and .* got 1000"),
    ],
)
def test_patterns_that_do_not_fit_the_model_change_nothing(patterns, match):
    model = base_model()
    with refused(model, ValueError, match):
        peft.get_peft_model(model, config(rank_pattern=patterns))


def test_without_rank_and_ratio():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(20, 30)), SSVDPeftConfig(target_modules=["0"]))
    assert model.peft_config["default"].ratio == 0.4 and model.base_model.model[0].ssvd_adapter["default"].k == 8


# -- the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rank": 1}, {"rotation": "banded", "band": 2}, {"form": "activation"}])
def test_an_adapter_that_starts_at_random_acts_and_comes_back(options, tmp_path):
    base = base_model()
    assert_bit_identical(peft.get_peft_model(base_model(), config(**options)).eval(), base)
    model = peft.get_peft_model(base_model(), config(**options, init_weights=False)).eval()
    assert all(bool(p.any()) or not p.numel() for p in model.parameters() if p.requires_grad)
    assert 1e-4 < relative_error(run(model), run(base)) < 1
    model.save_pretrained(str(tmp_path))
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(base_model(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(run(loaded), run(model))


# -- biases ------------------------------------------------------------------------------------------------------------


def training_biases(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]


@pytest.mark.parametrize("bias", ["none", "ssvd_only", "all"])
def test_which_biases_train_and_that_they_come_back(bias, tmp_path):
    model = peft.get_peft_model(base_model(), config(target_modules=["q_proj", "k_proj"], bias=bias))
    every = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    adapted = [name for name in every if ".base_layer." in name]  # k_proj has none
    assert training_biases(model) == {"none": [], "ssvd_only": adapted, "all": every}[bias] and len(adapted) == 6
    train_randomly(model).eval().save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(base_model(), str(tmp_path))
    assert torch.equal(run(loaded), run(model))


@pytest.mark.parametrize("bias", ["none", "ssvd_only", "all"])
def test_disabling_warns_of_biases_that_stay_changed(bias):
    model = peft.get_peft_model(base_model(), config(bias=bias))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with model.disable_adapter():
            pass
    sentences = [str(warning.message) for warning in caught]
    assert any(f"bias configured to be '{bias}'" in sentence for sentence in sentences) == (bias != "none")


FORMS = [
    {},
    {"side": "output"},
    {"form": "activation"},
    {"form": "activation", "side": "output"},
    {"form": "activation", "side": "both"},
]


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d"])
def test_the_gradient_of_a_bias_is_the_sum_of_the_output_s(kind, options):
    layer = nn.Linear(12, 9) if kind == "Linear" else getattr(nn, kind)(12, 9, 1)
    shape, dims = {"Linear": ((40, 9), (0,)), "Conv1d": ((4, 9, 10), (0, 2)), "Conv2d": ((4, 9, 2, 5), (0, 2, 3))}[kind]
    model = peft.get_peft_model(nn.Sequential(layer), config(target_modules=["0"], bias="ssvd_only", **options))
    train_randomly(model)
    draws = [torch.randn(shape) for _ in range(16)]
    x = torch.randn(shape[0], 12, *shape[2:])
    model(x).backward(draws[0])
    (name,) = training_biases(model)
    found, dtypes = {"bias": model.get_parameter(name).grad}, (torch.float32, torch.float64)
    assert_bounded(found, lambda draw: tuple({"bias": draws[draw].to(dtype).sum(dims)} for dtype in dtypes))


def test_a_training_bias_changes_no_output():
    x, layer = torch.randn(3, 8), nn.Linear(8, 8)
    model = peft.get_peft_model(nn.Sequential(layer), config(target_modules=["0"], side="output", form="activation"))
    y = train_randomly(model)(x)
    layer.bias.requires_grad_(True)
    assert torch.equal(model(x), y)


# -- the weight while disabled -----------------------------------------------------------------------------------------


def test_the_weight_of_a_disabled_layer_is_the_base_s_though_it_is_merged():
    """Attention reads it without a call of the layer."""
    model = adapted("wavlm")
    with model.disable_adapter():
        base = run(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model), base)
