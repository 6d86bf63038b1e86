"""What a whole model keeps between forwards follows every change of its parameters, and belongs to it alone."""

from __future__ import annotations

import copy

import pytest
import torch
from bounds import assert_within
from cases import relative_error
from fake_streams import FakeStreams
from models import assert_equal_gradients, counted, plain_copy, references, step
from speech_models import adapted, inputs, loss_gradients, loss_of, run
from torch import nn

import ssvd_kernels as sk
from ssvd_kernels.model import rotations
from ssvd_kernels.model.rotations import _Batch, _batches


def _fused_step(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    model.train()
    loss_of(run(model)).backward()
    optimizer.step()
    model.eval()


def _fused_step_in_eval(model: nn.Module) -> None:
    """Nobody calls train() or eval(): an optimizer step on gradients that are there already."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.05, fused=True).step()


def _data_write(model: nn.Module) -> None:
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.mul_(-0.5)


def _one_data_write(model: nn.Module) -> None:
    layer = list(sk.ssvd_layers(model).values())[1]
    layer.delta_sigma.data[0] += 5


def _data_replaced(model: nn.Module) -> None:
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data * -0.5


def _parameter_replaced(model: nn.Module) -> None:
    for layer in sk.ssvd_layers(model).values():
        layer.theta = nn.Parameter(layer.theta.detach() * -0.5)


def _state_loaded(model: nn.Module) -> None:
    model.load_state_dict({k: -v if "theta" in k else v for k, v in model.state_dict().items()})


def _state_assigned(model: nn.Module) -> None:
    model.load_state_dict({k: -v if "theta" in k else v for k, v in model.state_dict().items()}, assign=True)


def _numpy_write(model: nn.Module) -> None:
    for layer in sk.ssvd_layers(model).values():
        layer.theta.detach().numpy()[:] *= -0.5


CHANGES = [
    _fused_step, _fused_step_in_eval, _data_write, _one_data_write, _data_replaced, _parameter_replaced, _state_loaded,
    _state_assigned, _numpy_write,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["weight kept", "core kept"])
def test_eval_sees_every_change_of_the_parameters(change, dtype):
    model = adapted("wav2vec2").eval()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        before = run(model)
        assert torch.equal(run(model), before)
    change(model)
    fresh = copy.deepcopy(model)  # copies carry no cache
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        after = run(model)
        assert torch.equal(after, run(fresh))
        assert relative_error(after, before) > 1e-3


def test_two_evals_around_fused_training_steps():
    model = adapted("whisper")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, fused=True)
    for _ in range(3):
        with torch.no_grad():
            assert_within(run(model.eval()), *references(model, run))
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(run(model.train())).backward()
            optimizer.step()


def test_generate_is_the_same_after_merging_and_follows_theta():
    model = adapted("whisper", seed=4).eval()
    features = inputs(model)["input_features"]
    options = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        expected = plain_copy(model).generate(features, **options)
        ours = model.generate(features, **options)
        sk.merge(model)
        merged = model.generate(features, **options)
        sk.unmerge(model)
        again = model.generate(features, **options)
    assert ours.shape[1] > 2
    assert torch.equal(ours, expected) and torch.equal(merged, ours) and torch.equal(again, ours)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.mul_(-3)
    with torch.no_grad():
        assert torch.equal(model.generate(features, **options), plain_copy(model).generate(features, **options))


def test_deepcopy_of_an_injected_model_trains_on_its_own(monkeypatch):
    model = adapted("wavlm").train()
    run(model).sum().backward()
    model.zero_grad()
    twin = copy.deepcopy(model)
    expected = loss_gradients(model)
    with counted(monkeypatch) as calls:
        assert_equal_gradients(loss_gradients(twin), expected)
    assert calls["cayley_delta"] == [18]
    step(twin)
    assert_equal_gradients(loss_gradients(model), expected)


def test_functional_call_uses_the_parameters_it_is_given():
    model = adapted("wav2vec2").eval()
    other = {name: -p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        run(model)  # cached
        ours = torch.func.functional_call(model, other, kwargs=inputs(model))[0]
        unchanged = run(model)
        model.load_state_dict({**model.state_dict(), **other})
        assert_within(ours, *references(model, run))
        assert relative_error(unchanged, run(model)) > 1e-3


def padded() -> nn.Module:
    """Two layers of different ranks, which are batched together."""
    model = nn.Sequential(nn.Linear(64, 60), nn.Linear(60, 64))
    sk.inject(model, sk.SSVDConfig(rank=20), progress=False)
    model(torch.ones(3, 64))
    model[1] = sk.SSVDLinear.from_linear(model[1].original(), sk.SSVDConfig(rank=18))
    return model


def test_layers_are_batched_anew_where_a_model_is_changed_moved_cast_or_loaded():
    model = padded()
    model(torch.ones(3, 64)).sum().backward()
    assert [batch.layers for batch in _batches(model)] == [[model[0], model[1]]]  # both in one, padded
    model[1].double()
    model[1](model[0](torch.ones(3, 64)).double()).sum().backward()
    model.float()(torch.ones(3, 64)).sum().backward()
    assert all(index.is_meta for batch in _batches(copy.deepcopy(model).to("meta")) for index in batch.places.tensors)
    trained = {name: parameter.to("meta") for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.load_state_dict(trained, strict=False, assign=True)
    assert all(index.is_meta for batch in _batches(model) for index in batch.places.tensors)


@torch.no_grad()
def test_a_batch_serves_other_streams(monkeypatch):
    model = padded()
    with FakeStreams(monkeypatch) as gpu:
        for number in (1, 2, 2):
            with gpu.on(number) as stream:
                model(torch.ones(3, 64))
    assert not gpu.faults and stream.waits == 1


@torch.no_grad()
def test_a_batch_that_a_graph_reads_stays_and_one_that_it_makes_serves_no_eager_call(monkeypatch):
    model = padded()

    def captured() -> _Batch:
        with monkeypatch.context() as patch:
            patch.setattr(rotations, "capturing", lambda tensor: True)
            model(torch.ones(3, 64))
        return model.__dict__["_ssvd_root"].in_graphs[-1][0]

    (kept,) = _batches(model)
    assert captured() is kept
    padded()  # a change of any model
    made = captured()
    assert made is not kept and _batches(model)[0] is not made
    assert [batch for (batch,) in model.__dict__["_ssvd_root"].in_graphs] == [kept, made]
