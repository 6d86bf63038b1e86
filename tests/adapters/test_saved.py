"""Files and state dicts that an earlier version wrote mean the same today; see saved/README.md."""

from __future__ import annotations

import copy

import pytest
import torch
from bounds import assert_within
from plain import plain
from safetensors.torch import load_file
from saved_models import CONFIGS, SAVED, base, outputs, x
from torch import nn

import ssvd_kernels as sk


def check(model: nn.Module, what: str) -> None:
    exact = outputs()[what]
    with torch.no_grad():
        assert_within(model(x()), plain(model, torch.float32)(x()), exact, what)
        assert not torch.allclose(base()(x()).double(), exact, atol=1e-2)  # the adapter does something


@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_files_of_format_1(name):
    model = base()
    sk.load_adapter(model, SAVED / f"{name}.safetensors", progress=False)
    check(model, name)


def test_state_dict_with_two_adapters():
    state = load_file(SAVED / "state.safetensors")
    model = base()
    sk.inject(model, CONFIGS["input"], progress=False)
    sk.add_adapter(model, "second")
    sk.set_adapter(model, "second")
    model.load_state_dict(state)
    assert model.state_dict().keys() == state.keys()
    check(model, "state")
    sk.set_adapter(model, "default")
    check(model, "state, default")


def test_peft_folder_with_two_adapters():
    peft = pytest.importorskip("peft")
    import ssvd_kernels.integrations.peft  # noqa: F401  (registers the method)

    model = peft.PeftModel.from_pretrained(base(), SAVED / "peft")
    model.load_adapter(SAVED / "peft" / "other", "other")
    for name, what in (("default", "peft"), ("other", "peft, other")):
        model.set_adapter(name)
        check(copy.deepcopy(model), what)
