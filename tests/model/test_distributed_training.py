"""Training by DDP and FSDP2: what one process computes, nothing frozen is sent, adapters are the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bounds import DRAWS, assert_within, twice_of_draws
from cases import relative_error
from models import Stack, adapt, assert_all_within, gradients, inject, references, train_randomly
from processes import SIZE
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import ssvd_kernels as sk
from ssvd_kernels.utils.fsdp import gathered

pytestmark = pytest.mark.xdist_group("processes")

STEPS, MICRO, BATCH = 4, 2, 8  # BATCH examples a micro-batch, all processes together
Wrap = Callable[[nn.Module], nn.Module]


def _model(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return adapt(Stack().to(dtype), **options)


def _ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=False)


def _fsdp(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.encoder.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def _fsdp_each_layer(model: nn.Module) -> nn.Module:
    for layer in sk.ssvd_layers(model).values():
        fully_shard(layer)
    return fully_shard(model)


def _fsdp_bf16(model: nn.Module) -> nn.Module:
    return _fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


SHARDED = [_fsdp, fully_shard, _fsdp_each_layer]


def _loss(model: nn.Module, step: int, micro: int, rank: int, world: int, dtype: torch.dtype | None = None) -> Tensor:
    x = _batch(10 * step + micro, BATCH).chunk(world)[rank].to(dtype or next(model.parameters()).dtype)
    output = model(x)
    return (output.to(torch.promote_types(x.dtype, torch.float32)) - x.flip(-1)).square().mean()


def _batch(seed: int, size: int = 2) -> Tensor:
    return torch.randn(size, 3, 8, generator=torch.Generator().manual_seed(seed))


def _without_sync(model: nn.Module, last: bool):
    """No gradients are exchanged before the last micro-batch."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return nullcontext()


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.0)


def _train(model: nn.Module, rank: int, world: int, steps: range = range(STEPS), optimizer=None) -> list[float]:
    """The loss of each step, over all processes and micro-batches."""
    optimizer, losses = optimizer or _optimizer(model), []
    for step in steps:
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(MICRO):
            with _without_sync(model, micro == MICRO - 1):
                loss = _loss(model, step, micro, rank, world) / MICRO
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def _adapter(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of every SSVD layer, whole."""
    return {
        f"{name.removeprefix('module.')}.{key}": gathered(parameter.detach()).clone()
        for name, layer in sk.ssvd_layers(model).items()
        for key, parameter in layer.named_parameters()
    }


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def _trained(rank: int, wrap: Wrap, options: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    model = wrap(_model(**options))
    return _train(model, rank, SIZE), _adapter(model)


def _trained_alone(model: nn.Module, first: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """(the losses of `_train` from step `first` on, by how much each parameter has moved)."""
    trained = {name.replace(".values.0.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    losses = _train(model, 0, 1, range(first, first + STEPS))
    moves = {name: p.detach() - start[name] for name, p in trained.items()}
    return torch.tensor(losses, dtype=torch.float64), moves


WRAPPED = [
    *zip([_ddp, *SHARDED], [{"side": "both", "rotation": "linear"}, {}] * 2),
    *zip([_ddp, _fsdp, _fsdp_each_layer], [{"form": "activation"}, {"form": "activation", "side": "both"}] * 2),
]


@pytest.mark.parametrize(("wrap", "options"), WRAPPED)
def test_losses_and_parameters_are_those_of_one_process(group, wrap, options):
    """Two micro-batches a step, gradients exchanged once."""
    start = _adapter(_model(**options))
    drawn = [references(_model(**options), partial(_trained_alone, first=first)) for first in range(DRAWS)]
    _, (losses, moves) = drawn[0]
    assert losses[-1] < 0.95 * losses[0]
    bound = twice_of_draws((plain[0], exact[0]) for plain, exact in drawn)
    for ours, adapter in group.run(_trained, wrap, options):
        assert relative_error(torch.tensor(ours, dtype=torch.float64), losses) <= bound
        _same({name: start[name] if name in moves else value for name, value in adapter.items()}, start)  # frozen
        ours = {name: adapter[name] - start[name] for name in moves}
        assert_all_within(ours, drawn[0][0][1], moves)


def _gradients(rank: int, wrap: Wrap, mode: str, form: str = "weight") -> dict[str, Tensor]:
    model = _model(form=form)
    for layer in sk.ssvd_layers(model).values():
        layer.mode = mode
    model = wrap(model)
    _loss(model, 0, 0, rank, SIZE).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name.removeprefix("module."): gathered(gradient) for name, gradient in found.items()}


def _gradients_alone(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    _loss(model, 0, 0, 0, 1, dtype).backward()
    return gradients(model)


@pytest.mark.parametrize("mode", ["composed", "factored"])
@pytest.mark.parametrize("wrap", [_ddp, *SHARDED])
def test_gradients_are_those_of_one_process(group, wrap, mode):
    plain, exact = references(_model(), _gradients_alone)
    for found in group.run(_gradients, wrap, mode):
        assert_all_within(found, plain, exact)


@pytest.mark.parametrize(("mode", "form"), [("composed", "weight"), ("factored", "weight"), ("auto", "activation")])
def test_mixed_precision_policy(group, mode, form):
    """bfloat16 parameters and activations, float32 theta and gradients outside: as exact as one process in bfloat16."""
    _, exact = references(_model(), _gradients_alone)
    plain, _ = references(_model().bfloat16(), partial(_gradients_alone, dtype=torch.bfloat16))
    allowed = 2 * relative_error(_flat(plain), _flat(exact))
    for found in group.run(_gradients, _fsdp_bf16, mode, form):
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        assert relative_error(_flat(found), _flat(exact)) <= allowed


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


def _sent_by_ddp(rank: int) -> tuple[list[int], int, dict[str, int]]:
    model = _model()
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    ddp = _ddp(model)
    sent = []

    def hook(state, bucket):
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0] / SIZE)

    ddp.register_comm_hook(None, hook)
    for step in range(3):
        sent.clear()
        with torch.profiler.profile() as profile:  # of the last step: the first one also settles DDP's buckets
            _loss(ddp, step, 0, rank, SIZE).backward()
    collectives = {event.key: event.count for event in profile.key_averages() if event.key.startswith("gloo:")}
    return sent, trainable, collectives


def test_ddp_sends_what_trains_and_nothing_else(group):
    for sent, trainable, collectives in group.run(_sent_by_ddp):
        assert sum(sent) == trainable
        assert collectives == {"gloo:all_reduce": len(sent)}


def _eval_between(rank: int, world: int, model: nn.Module) -> Tensor:
    """Outputs before, between and after two steps of training in eval mode: nobody calls train()."""
    optimizer, outputs = _optimizer(model.eval()), []
    for step in range(3):
        with torch.no_grad():
            outputs.append(model(_batch(1)))
        _train(model, rank, world, range(step, step + 1), optimizer)
    return torch.stack(outputs)


def _sharded_eval_between(rank: int, wrap: Wrap) -> tuple[Tensor, list[bool]]:
    model = wrap(_model())
    outputs, layers = _eval_between(rank, SIZE, model), sk.ssvd_layers(model).values()
    return outputs, [layer.cache.made is None for layer in layers]


@pytest.mark.parametrize("wrap", SHARDED)
def test_sharded_layers_keep_nothing_between_calls(group, wrap):
    plain, exact = references(_model(), partial(_eval_between, 0, 1))
    for found, kept_nothing in group.run(_sharded_eval_between, wrap):
        assert_within(found, plain, exact)
        assert all(kept_nothing)


def _memory(rank: int) -> list[int]:
    model = _fsdp(_model())
    model(_batch(1)).sum().backward()
    return [layer._original.weight.to_local().shape[0] for layer in sk.ssvd_layers(model).values()]


def test_no_whole_weight_is_kept_alive(group):
    whole = [layer.out_features for layer in sk.ssvd_layers(_model()).values()]
    assert [a + b for a, b in zip(*group.run(_memory))] == whole


# -- adapters ----------------------------------------------------------------------------------------------------------


def _save(
    rank: int, wrap: Wrap, folder: str, who: str, options: dict[str, Any], form: str = "weight"
) -> dict[str, Tensor]:
    model = wrap(_model(form=form))
    _train(model, rank, SIZE, range(1))
    name = f"{rank}.safetensors" if who == "each its own" else "a.safetensors"
    if who != "rank 0" or rank == 0:
        sk.save_adapter(model, Path(folder) / name, **options)
        assert (Path(folder) / name).exists() or (rank == 1 and who == "each its own")
    return _adapter(model)


def _base() -> nn.Module:
    model = _model()
    sk.remove(model)
    return model


WRITERS = [(_ddp, "rank 0"), (_ddp, "all"), *((wrap, "all") for wrap in SHARDED)]


@pytest.mark.parametrize("options", [{}, {"save_bases": True}], ids=["trained", "bases"])
@pytest.mark.parametrize(
    ("wrap", "who", "form"),
    [*((*each, "weight") for each in WRITERS), *((*each, "activation") for each in WRITERS[2:])],
)
def test_saved_by_several_processes_loads_in_one_process(group, tmp_path, wrap, who, form, options):
    expected, _ = group.run(_save, wrap, str(tmp_path), who, options, form)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    model = _base() if form == "weight" else _model(form=form)
    sk.load_adapter(model, tmp_path / "a.safetensors", progress=False)
    _same(_adapter(model), expected)


def test_only_rank_0_writes_a_sharded_model(group, tmp_path):
    group.run(_save, _fsdp, str(tmp_path), "each its own", {})
    assert [file.name for file in tmp_path.iterdir()] == ["0.safetensors"]


def _load(rank: int, path: str, wrap: Wrap, when: str, form: str = "weight") -> dict[str, Tensor]:
    if when == "before wrapping":
        model = _base()
        sk.load_adapter(model, path, progress=False)
        return _adapter(wrap(model))
    model = _model(form=form)
    if when == "beside others":
        sk.add_adapter(model, "b")
    else:
        for layer in sk.ssvd_layers(model).values():  # another sign of every pair, to be repaired
            layer.flip_basis(-torch.ones(layer.k))
    model = wrap(model)
    sk.load_adapter(model, path, progress=False)
    return _adapter(model)


WAYS = [
    *product([_ddp, *SHARDED], ["before wrapping", "after wrapping"], [False, True], ["weight"]),
    (_fsdp, "beside others", True, "weight"),
    *product([_ddp, _fsdp], ["after wrapping"], [False, True], ["activation"]),
]


@pytest.mark.parametrize(("wrap", "when", "bases", "form"), WAYS)
def test_saved_by_one_process_loads_in_several(group, tmp_path, wrap, when, bases, form):
    model = _model(form=form)
    _train(model, 0, 1)
    sk.save_adapter(model, tmp_path / "a.safetensors", save_bases=bases)
    for found in group.run(_load, str(tmp_path / "a.safetensors"), wrap, when, form):
        _same({name: value for name, value in found.items() if ".parked." not in name}, _adapter(model))


def _load_after_eval(rank: int, path: str) -> tuple[str, dict[str, Tensor]]:
    model = _fsdp(_model())
    with torch.no_grad():
        model(_batch(1))
    with pytest.raises(sk.AdapterError) as caught:
        sk.load_adapter(model, path, progress=False)
    model.reshard()
    sk.load_adapter(model, path, progress=False)
    return str(caught.value), _adapter(model)


def test_loading_where_fsdp2_would_lose_it_is_refused(group, tmp_path):
    model = train_randomly(_model(), seed=4)
    sk.save_adapter(model, tmp_path / "a.safetensors")
    for message, found in group.run(_load_after_eval, str(tmp_path / "a.safetensors")):
        assert "head" in message and "call reshard() before loading" in message
        _same(found, _adapter(model))


def _state_dict(rank: int, wrap: Wrap, form: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, other = wrap(_model(form=form)), wrap(_model(form=form))
    _train(model, rank, SIZE)
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    set_model_state_dict(other, copy.deepcopy(state), options=options)
    return _adapter(model), _adapter(other)


@pytest.mark.parametrize(("wrap", "form"), [*((wrap, "weight") for wrap in (_ddp, *SHARDED)), (_fsdp, "activation")])
def test_distributed_state_dicts_restore_training(group, wrap, form):
    for expected, found in group.run(_state_dict, wrap, form):
        _same(found, expected)


# -- refusals ----------------------------------------------------------------------------------------------------------


def _refusals(rank: int, path: str) -> list[str]:
    sharded, several, messages = _fsdp(_model()), _model(), []
    sk.add_adapter(several, "b")
    several = _ddp(several)
    for action in (
        lambda: sk.merge(sharded),
        lambda: sk.remove(sharded),
        lambda: inject(fully_shard(_base())),
        lambda: inject(_ddp(_base())),
        lambda: sk.load_adapter(_ddp(_base()), path, progress=False),
        lambda: sk.set_adapter(several, "b"),
        lambda: sk.add_adapter(several, "c"),
    ):
        with pytest.raises(ValueError) as caught:
            action()
        messages.append(str(caught.value))
    return messages


def test_what_cannot_be_done_to_a_wrapped_model_is_refused(group, tmp_path):
    sk.save_adapter(_model(), tmp_path / "a.safetensors")
    for merge, remove, sharded, injected, *others in group.run(_refusals, str(tmp_path / "a.safetensors")):
        assert "sharded by FSDP2" in merge and "save_adapter" in merge and merge == remove
        assert "is sharded" in sharded and "call inject before fully_shard" in sharded
        assert "is wrapped in DistributedDataParallel" in injected and set(others) == {injected}
