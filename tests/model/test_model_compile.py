"""torch.compile of whole speech models: one graph, in training and in inference."""

from __future__ import annotations

import copy

import pytest
import torch
from bounds import assert_within, twice
from cases import relative_error
from models import assert_all_within, gradients, loss_of, plain_copy, references, step
from speech_models import adapted, inputs
from torch import Tensor, nn

import ssvd_kernels as sk

pytestmark = pytest.mark.usefixtures("one_thread")


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    """(a model, the same once more), fit for one graph in training."""
    torch._dynamo.reset()
    model = _without_dropout(adapted(name))
    if hasattr(model, "freeze_feature_encoder"):  # else transformers' own front end sets requires_grad in its forward
        model.freeze_feature_encoder()
    elif hasattr(model, "feature_extractor"):
        model.feature_extractor._freeze_parameters()
    return model, copy.deepcopy(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "wavlm"])
def test_training_and_evaluating_compile_to_one_graph(name):
    model, twin = _pair(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = inputs(model)

    def trained(network: nn.Module) -> dict[str, Tensor]:
        loss_of(network.train()(**batch)[0]).backward()
        return gradients(network)

    def evaluated(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return network.eval()(**batch)[0]

    for _ in range(2):  # the second with other parameters: nothing of the first is baked in
        loss_of(compiled.train()(**batch)[0]).backward()
        assert_all_within(gradients(model), *references(twin, trained))
        step(model)
        step(twin)
        assert_within(evaluated(compiled), *references(twin, evaluated))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_compiles_to_one_graph(dtype):
    model, twin = _pair("wav2vec2")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = inputs(model)

    def trained(network: nn.Module) -> tuple[Tensor, Tensor]:
        """(output, all gradients), scaled for float16."""
        output = network.train()(**batch)[0]
        (2.0**10 * loss_of(output.to(torch.promote_types(output.dtype, torch.float32)))).backward()
        return output.detach(), torch.cat([grad.flatten() for grad in gradients(network).values()])

    exact, exact_grads = references(twin, trained)[1]
    with torch.autocast("cpu", dtype):
        output, grads = trained(compiled)
        plain, plain_grads = plain_copy(twin).train()(**batch)[0].detach(), references(twin, trained)[0][1]
    assert_within(output, plain, exact)
    assert relative_error(grads, exact_grads) <= twice(plain_grads, exact_grads, dtype)


@pytest.mark.slow
def test_merged_model_compiles_to_one_graph():
    model, twin = _pair("wav2vec2")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = inputs(model)
    with torch.no_grad():
        plain, exact = references(twin.eval(), lambda network: network(**batch)[0])
        compiled.eval()(**batch)
        sk.merge(model)
        assert_within(compiled(**batch)[0], plain, exact, "merged")
        sk.unmerge(model)
        assert_within(compiled(**batch)[0], plain, exact)
