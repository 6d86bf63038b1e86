"""torch.compile of whole speech models: one graph, in training and in inference."""

from __future__ import annotations

import copy

import pytest
import torch
from bounds import assert_within, twice
from cases import relative_error
from models import (
    Encoder,
    FeedForward,
    adapt,
    assert_all_within,
    gradients,
    loss_of,
    plain_copy,
    references,
    step,
    train_randomly,
)
from speech_models import adapted, loss_gradients, run, scaled_passes
from torch import Tensor, nn

import ssvd_kernels as sk


def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    """(a model, the same once more), fit for one graph in training."""
    torch._dynamo.reset()
    model = adapted(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
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

    def evaluated(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return run(network.eval())

    for _ in range(2):  # the second with other parameters: nothing of the first is baked in
        loss_of(run(compiled.train())).backward()
        assert_all_within(gradients(model), *references(twin.train(), loss_gradients))
        step(model)
        step(twin)
        assert_within(evaluated(compiled), *references(twin, evaluated))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_compiles_to_one_graph(dtype):
    model, twin = _pair("wav2vec2")
    compiled = torch.compile(model, fullgraph=True, backend="eager").train()
    exact, exact_grads = references(twin.train(), scaled_passes)[1]
    with torch.autocast("cpu", dtype):
        output, grads = scaled_passes(compiled)
        plain, plain_grads = run(plain_copy(twin)).detach(), references(twin, scaled_passes)[0][1]
    assert_within(output, plain, exact)
    assert relative_error(grads, exact_grads) <= twice(plain_grads, exact_grads, dtype)


@pytest.mark.slow
def test_merged_model_compiles_to_one_graph():
    model, twin = _pair("wav2vec2")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain, exact = references(twin.eval(), run)
        run(compiled.eval())
        sk.merge(model)
        assert_within(run(compiled), plain, exact, "merged")
        sk.unmerge(model)
        assert_within(run(compiled), plain, exact)


class Block(FeedForward):
    def forward(self, x: Tensor) -> Tensor:  # Sequential's own is torch's code, which compiles layer by layer
        return x + super().forward(x)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["weight", "activation"])
@pytest.mark.parametrize("through", ["inject", "peft"])
def test_blocks_compiled_one_by_one_share_their_graphs(through, form):
    """As LoRA's: one graph for the first block, whose input needs no gradient, one for the others, one in eval."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if through == "inject":
        model = adapt(Encoder(None, Block, 4), form=form)
        blocks = model.blocks
    else:
        peft = pytest.importorskip("peft")
        from ssvd_kernels.integrations.peft import SSVDPeftConfig

        config = SSVDPeftConfig(rank=5, form=form, target_modules=r".*\d\.[02]")
        model = peft.get_peft_model(Encoder(None, Block, 4), config)
        blocks = train_randomly(model).base_model.model.blocks
    x, twin = torch.randn(6, 8), copy.deepcopy(model)
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for new in (True, False, False):
        with torch._dynamo.config.patch(error_on_recompile=not new):
            for network in (model.train(), twin.train()):
                network(x).square().mean().backward()
            for ours, theirs in zip(model.parameters(), twin.parameters()):
                assert ours.grad is theirs.grad is None or torch.equal(ours.grad, theirs.grad)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 + (not new)
        step(model)
        step(twin)
        with torch.no_grad():
            assert_within(model.eval()(x), *references(twin.eval(), lambda network: network(x)))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
