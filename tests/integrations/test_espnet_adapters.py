"""Several named adapters, and adapter files, of models that ESPnet's table adapted."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_within
from cases import relative_error
from espnet_models import asr_model, create_adapter, outputs
from models import references
from refusals import refused
from roundtrip import train_randomly
from torch import nn

import ssvd_kernels as sk

CONF = {"rank": 4, "rotation_map": "cayley", "target_modules": ["attn.linear_q"]}


def adapted(weights: str = "now") -> nn.Module:
    torch.manual_seed(3)
    model = asr_model("transformer")
    create_adapter(model, "ssvd_kernels", {**CONF, "weights": weights})
    return model


def with_two(seed: int) -> nn.Module:
    """A model with "default", in use, and "b", both trained."""
    model = adapted()
    sk.add_adapter(model, "b")
    for number, name in enumerate(("b", "default")):
        sk.set_adapter(model, name)
        train_randomly(model, seed + number)
    return model


@pytest.mark.parametrize("bases", [True, False], ids=["bases", "sketches"])
def test_a_state_dict_brings_all_adapters_and_repairs_their_signs(bases):
    model, other = with_two(seed=1), with_two(seed=5)
    for layer in sk.ssvd_layers(other).values():
        layer.flip_basis(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if not bases:
        state = {key: value for key, value in state.items() if key.rpartition(".")[2] not in ("U", "sigma", "V")}
    other.load_state_dict(state, strict=bases)
    found = []
    for name in ("default", "b"):
        for each in (model, other):
            sk.set_adapter(each, name)
        found.append(outputs(model))
        for each in (model, other):
            assert_within(outputs(each), *references(model, outputs))
    assert relative_error(found[1], found[0]) > 1e-3


def test_files_wait_for_the_pretrained_weights(tmp_path):
    model, early = adapted(), adapted("later")
    sk.save_adapter(model, tmp_path / "a.safetensors", save_bases=True)
    with refused(early, ValueError, "has no singular vectors yet: load the pretrained weights"):
        sk.save_adapter(early, tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    for call in (sk.load_adapter, lambda model, path: sk.add_adapter(model, "b", path)):
        with refused(early, sk.AdapterError, "has no singular vectors yet: load the pretrained weights"):
            call(early, tmp_path / "a.safetensors")
    torch.manual_seed(3)
    early.load_state_dict({**early.state_dict(), **asr_model("transformer").state_dict()})  # as ESPnet does
    assert sk.load_adapter(early, tmp_path / "a.safetensors") == list(sk.ssvd_layers(early))
