"""Models that accelerate offloads after they were adapted: each layer has its values within its own forward only."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from bounds import assert_within
from models import Stack, references, train_randomly
from torch import nn

import ssvd_kernels as sk

accelerate = pytest.importorskip("accelerate")

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))
CONFIGS = {
    "SSVD": sk.SSVDConfig(rank=5),
    "activation form": sk.SSVDConfig(rank=5, side="both", form="activation"),
    "SpectralFT": sk.SpectralFTConfig(top=5, rank=2),
}
PLACES = {"encoder.blocks.0": "disk", "encoder.blocks.1": "cpu", "head": "cpu"}
OFFLOADS: dict[str, Callable[[nn.Module, str], object]] = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, "cpu"),
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model, PLACES, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_inference_is_right_and_training_refused(tmp_path, offload, method):
    model = Stack()
    sk.inject(model, CONFIGS[method], progress=False)
    train_randomly(model)
    plain, exact = references(model, lambda network: network(X.to(next(network.parameters()).dtype)).detach())
    OFFLOADS[offload](model, str(tmp_path))
    first = model.encoder.blocks[0][0]
    assert first.first_trained.is_meta
    for training in (False, True, False):
        with torch.no_grad():
            assert_within(model.train(training)(X), plain, exact)
    assert first.cache.made is None
    with pytest.raises(RuntimeError, match=r"encoder\.blocks\.0\.0 is offloaded and would not train: train before"):
        model.train()(X)
    assert_within(model.eval()(X), plain, exact)


def test_peft_s_layers_are_refused_unless_merged(tmp_path):
    peft = pytest.importorskip("peft")
    from ssvd_kernels.integrations.peft import SSVDPeftConfig

    config = SSVDPeftConfig(rank=5, target_modules=r".*blocks\.\d\.[02]")
    model = train_randomly(peft.get_peft_model(Stack(), config)).eval()
    merged = copy.deepcopy(model).merge_and_unload()
    expected = merged(X)
    accelerate.cpu_offload(model, "cpu")
    with pytest.raises(RuntimeError, match=r"blocks\.0\.0\.\S+ is offloaded.*merge_and_unload\(\) before offloading"):
        model(X)
    accelerate.cpu_offload(merged, "cpu")
    assert torch.equal(merged(X), expected)
