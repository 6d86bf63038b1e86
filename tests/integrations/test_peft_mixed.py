"""PEFT's mixed batches: `adapter_names=` gives each input the adapter that is named for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import relative_error
from peft import get_peft_model
from peft_models import base_model, config, layers
from speech_models import inputs, llama
from torch import Tensor, nn

OPTIONS = {"a": {"rank": 5}, "b": {"rank": 3, "side": "output"}, "c": {"rank": 5, "form": "activation"}}
NAMES = ["b", "__base__", "a", "c"]


def adapted(base: nn.Module, **more) -> nn.Module:
    """With adapters of several ranks, sides and forms."""
    model = get_peft_model(base, config(**OPTIONS["a"], **more), adapter_name="a")
    for name in ("b", "c"):
        model.add_adapter(name, config(**OPTIONS[name], **more))
    generator = torch.Generator().manual_seed(1)
    for layer in layers(model).values():
        for adapter in layer.ssvd_adapter.values():
            nn.init.normal_(adapter.theta, std=0.3, generator=generator)
    return model.eval()


def doubled(model: nn.Module) -> dict[str, Tensor]:
    """Four inputs."""
    return {name: torch.cat([tensor, tensor.flip(0)]) for name, tensor in inputs(model).items()}


def alone(model: nn.Module, name: str, compute: Callable[[], Tensor]) -> Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return compute()
    model.set_adapter(name)
    return compute()


@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "llama"])
@torch.no_grad()
def test_each_input_has_its_own_adapter(name):
    model = adapted(llama() if name == "llama" else base_model(name))
    given = doubled(model.base_model.model)
    found = model(**given, adapter_names=NAMES)[0]
    for row, own in enumerate(NAMES):
        single = alone(model, own, lambda: model(**given)[0])[row]
        assert relative_error(found[row], single.double()) <= 2e-6
    assert relative_error(found[2], found[1].double()) > 1e-3
    assert all(layer.mixed is None for layer in layers(model).values())


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("make", [base_model, llama])
def test_generate(make, options):
    torch.manual_seed(0)
    model = adapted(make())
    given = doubled(model.base_model.model)
    if make is base_model:
        given = {"input_features": given["input_features"]}
    options = {**options, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = model.generate(**given, **options, adapter_names=NAMES).view(4, options.get("num_return_sequences", 1), -1)
    for row, own in enumerate(NAMES):
        single = alone(model, own, lambda: model.generate(**given, **options))
        assert torch.equal(found[row], single.view_as(found)[row])


@torch.no_grad()
def test_modules_to_save_belong_to_their_adapter():
    model = adapted(llama(), modules_to_save=["lm_head"], target_modules=["q_proj"])
    for number, name in enumerate("abc"):
        nn.init.constant_(model.base_model.model.lm_head.modules_to_save[name].weight, float(number + 1))
    given = doubled(model.base_model.model)
    found = model(**given, adapter_names=NAMES)[0]
    for row, own in enumerate(NAMES):
        single = alone(model, own, lambda: model(**given)[0])[row]
        assert relative_error(found[row], single.double()) <= 2e-6


@torch.no_grad()
def test_refusals():
    model = adapted(base_model())
    given = doubled(model.base_model.model)

    def refused(match: str, names: object = NAMES) -> None:
        with pytest.raises(ValueError, match=match):
            model(**given, adapter_names=names)

    refused("Length of `adapter_names` should be the same as the number of inputs", ["a", "b"])
    refused("Length of `adapter_names`", NAMES[:3])
    refused(r"non-existing adapter\(s\): d", ["a", "b", "d", "a"])
    refused("`adapter_names` must be a list", "a")
    refused("`adapter_names` must be a list", [])
    model.train()
    refused("in training mode")
    model.eval()
    model.merge_adapter(["a"])
    refused("when there are merged adapters")
    model.unmerge_adapter()
    assert model(**given, adapter_names=NAMES)[0].isfinite().all()
