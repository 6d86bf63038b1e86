"""Models adapted in the activation form: files, merging, several adapters, state dicts, checkpointing, compiling."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_within
from cases import relative_error
from models import (
    Encoder,
    Stack,
    assert_all_within,
    assert_equal_gradients,
    gradients,
    inject,
    references,
    square_gradients,
    train_randomly,
)
from refusals import refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssvd_kernels as sk

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
sides = pytest.mark.parametrize("side", ["input", "output", "both"])


def stack(**more) -> Stack:
    model = base_of()
    inject(model, **{"rank": 5, "form": "activation", **more})
    return train_randomly(model)


def base_of(seed: int = 0) -> Stack:
    torch.manual_seed(seed)
    return Stack()


def run(model: nn.Module) -> Tensor:
    return model(X).detach()


@sides
def test_gradients_of_a_model_and_its_ranks_side_by_side(side):
    """Layers of ranks 4 to 5 share a batch that is padded."""
    model = base_of()
    inject(model, rank=5, side=side, form="activation")
    for block in model.encoder.blocks:
        block[0] = sk.SSVDLinear.from_linear(block[0].original(), sk.SSVDConfig(rank=4, side=side, form="activation"))
    train_randomly(model)
    assert_all_within(square_gradients(model, X), *references(model, partial(square_gradients, x=X)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    model = stack(side="both")
    x = X.clone().requires_grad_()
    plain, exact = references(model, partial(square_gradients, x=x))
    model.encoder.checkpointing = {"use_reentrant": use_reentrant}
    assert_all_within(square_gradients(model, x), plain, exact)
    model.encoder.checkpointing = None
    checkpoint(model, x, use_reentrant=use_reentrant).square().mean().backward()
    assert_all_within(gradients(model), plain, exact)


@sides
@pytest.mark.parametrize("saved", ["weight", "activation"])
def test_an_adapter_file_serves_both_forms(side, saved, tmp_path):
    other = {"weight": "activation", "activation": "weight"}[saved]
    model, path = stack(side=side, form=saved), tmp_path / "a.safetensors"
    plain, exact = references(model, run)
    for bases in (False, True):
        sk.save_adapter(model, path, save_bases=bases)
        again = base_of()
        inject(again, rank=5, side=side, form=other)
        sk.load_adapter(again, path, progress=False)
        assert_within(run(again), plain, exact)


def test_a_basis_with_other_signs_is_repaired(tmp_path):
    model = stack(side="both")
    sk.save_adapter(model, tmp_path / "a.safetensors")
    other = stack(side="both")
    for layer in sk.ssvd_layers(other).values():
        layer.flip_basis(-torch.ones(layer.k))
    sk.load_adapter(other, tmp_path / "a.safetensors", progress=False)
    assert torch.equal(run(other), run(model))


@sides
def test_a_state_dict_brings_the_signs_of_its_basis(side, tmp_path):
    """Of bases in bfloat16 as well, whose rounding is not taken for another basis."""
    source, target, third = (stack(side=side, basis_dtype="bfloat16") for _ in range(3))
    for layer in sk.ssvd_layers(source).values():
        layer.flip_basis(torch.where(torch.arange(layer.k) % 2 == 0, -1.0, 1.0))
    target.load_state_dict(source.state_dict())
    sk.save_adapter(target, tmp_path / "a.safetensors")
    sk.load_adapter(third, tmp_path / "a.safetensors", progress=False)
    assert torch.equal(run(third), run(source))
    for name, layer in sk.ssvd_layers(target).items():
        assert layer.basis.gap > 0 and torch.equal(layer.basis.sketch, sk.ssvd_layers(source)[name].basis.sketch)


@sides
def test_merging_unmerging_and_removing(side):
    base, model = base_of(), stack(side=side)
    y, (plain, exact) = run(model), references(model, run)
    sk.merge(model.eval())
    assert_within(run(model), plain, exact)
    sk.unmerge(model.train())
    assert torch.equal(run(model), y)
    unloaded = copy.deepcopy(model)
    sk.merge(unloaded, unload=True)
    assert type(unloaded.head) is nn.Linear
    assert_within(run(unloaded), plain, exact)
    sk.remove(model)
    assert torch.equal(run(model), run(base)) and list(model.state_dict()) == list(base.state_dict())


def test_several_adapters_and_strengths():
    model = stack()
    outputs = {"default": run(model)}
    sk.add_adapter(model, "b")
    sk.set_adapter(model, "b")
    assert torch.equal(run(model), run(base_of()))
    outputs["b"] = run(train_randomly(model, 2))
    for name, y in outputs.items():
        sk.set_adapter(model, name)
        assert torch.equal(run(model), y)
    with sk.disable_adapter(model):
        assert torch.equal(run(model), run(base_of()))
    sk.set_strength(model, 0.5)
    twin = stack(form="weight")
    sk.set_strength(twin, 0.5)
    for layer, other in zip(sk.ssvd_layers(model).values(), sk.ssvd_layers(twin).values()):
        for name, parameter in layer.adapter().items():
            other.adapter()[name].data.copy_(parameter.data)
    assert relative_error(run(model), run(twin)) <= 1e-6


@sides
def test_state_dicts(side):
    model = stack(side=side)
    state = model.state_dict()
    kept = {"input": {"Vh"}, "output": {"Uh"}, "both": {"Uh", "Vh"}}[side]
    assert {name.rpartition(".")[2] for name in state if name.startswith("head")} >= kept
    fresh = base_of(1)
    inject(fresh, rank=5, side=side, form="activation")
    fresh.load_state_dict(state)
    assert torch.equal(run(fresh), run(model))
    base = base_of()
    with torch.no_grad():
        model.load_state_dict(base.state_dict(), strict=False)
    with refused(model, RuntimeError, r"weight differs from the base weight whose singular vectors"):
        model.load_state_dict(base_of(1).state_dict(), strict=False)


def test_copies_and_pickles():
    model = stack(side="both")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin), run(model))
        assert_equal_gradients(square_gradients(twin, X), square_gradients(model, X))


def test_moving_to_a_dtype_and_modules_to_save(tmp_path):
    model = base_of()
    inject(model, rank=5, form="activation", targets=r"encoder\..*", modules_to_save=["head"])
    train_randomly(model)
    sk.save_adapter(model, tmp_path / "a.safetensors")
    again = base_of()
    inject(again, rank=5, form="activation", targets=r"encoder\..*", modules_to_save=["head"])
    sk.load_adapter(again, tmp_path / "a.safetensors", progress=False)
    assert torch.equal(run(again), run(model))
    wide = copy.deepcopy(model).double()
    assert wide(X.double()).dtype == torch.float64 and relative_error(wide(X.double()).detach(), run(model)) <= 1e-5


def test_evaluating_caches_the_core_until_training_changes_it():
    model = stack().eval()
    with torch.no_grad():
        before = model(X)
        assert torch.equal(model(X), before)
        for layer in sk.ssvd_layers(model).values():
            layer.theta.mul_(-1)
        assert relative_error(model(X), before) > 1e-3
        assert torch.equal(model(X), run(model.train()))


class Reader(nn.Module):
    """Reads its projection's weight instead of calling it, as WavLM's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.up.weight, self.up.bias)


def test_modules_that_read_the_weight_train():
    model = Encoder(None, Reader)
    inject(model, rank=5, form="activation")
    train_randomly(model)
    assert_all_within(square_gradients(model, X), *references(model, partial(square_gradients, x=X)))


@pytest.mark.slow
def test_training_and_evaluating_compile_to_one_graph():
    torch._dynamo.reset()
    model = stack(side="both")
    twin, compiled = copy.deepcopy(model), torch.compile(model, fullgraph=True, backend="aot_eager")
    for again in (False, True):
        with torch._dynamo.config.patch(error_on_recompile=again):
            compiled.train()(X).square().mean().backward()
            assert_all_within(gradients(model), *references(twin.train(), partial(square_gradients, x=X)))
            with torch.no_grad():
                assert_within(compiled.eval()(X), *references(twin.eval(), run))
        for network in (model, twin):
            train_randomly(network, 7)
