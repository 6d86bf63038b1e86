"""Shares the factorisations among the processes of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .factorize import SKETCH_ROWS, Factorization, fingerprint


class Task(NamedTuple):
    """One layer to factorise: its weight, when asked for, the rank k and the relative cost."""

    weight: Callable[[], Tensor]
    k: int
    cost: float


Tasks = Mapping[str, Task]
Work = Callable[[Tasks], dict[str, Factorization]]


def several_processes() -> bool:
    """Whether this process is one of several in torch.distributed's default group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def share_out(tasks: Tasks, work: Work) -> dict[str, Factorization]:
    """`work(tasks)` with each task done by one process and its result sent to all, so that all hold the same bits.

    Every process of the default group must call it. Raises ValueError in every process if their weights or ranks k
    differ, and RuntimeError in the others if the work of one raises.
    """
    plans = _gather({name: _identity(task.weight(), task.k) for name, task in tasks.items()})
    for other, plan in enumerate(plans):
        if list(plan.items()) != list(plans[0].items()):
            names = [name for name in {**plans[0], **plan} if plans[0].get(name) != plan.get(name)] or ["their order"]
            raise ValueError(
                f"all processes must factorise the same layers and weights, but processes 0 and {other} differ, e.g. "
                f"in {names[0]!r}; with share=False each process factorises its own"
            )
    owners = _owners(tasks, len(plans))
    mine = {name: task for name, task in tasks.items() if owners[name] == dist.get_rank()}
    found, failure = {}, None
    try:
        found = work(mine)
    except Exception as error:
        failure = error
    reports = _gather(({name: result.gap for name, result in found.items()}, failure and repr(failure)))
    if failure is not None:
        raise failure
    for other, (_, failed) in enumerate(reports):
        if failed:
            raise RuntimeError(f"process {other} could not factorise its layers: {failed}")
    gaps = {name: gap for part, _ in reports for name, gap in part.items()}
    return {
        name: _broadcast(task, owners[name], found.get(name), plans[0][name][0], gaps[name])
        for name, task in tasks.items()
    }


def _identity(weight: Tensor, k: int) -> tuple[str, str, tuple[int, ...], int]:
    return fingerprint(weight), str(weight.dtype), tuple(weight.shape), k


def _gather(value: Any) -> list[Any]:
    """`value` of every process, in their order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _owners(tasks: Tasks, processes: int) -> dict[str, int]:
    """The process of each task: the costliest first, always to the one with the least to do."""
    load, owners = [0.0] * processes, {}
    for name in sorted(tasks, key=lambda name: -tasks[name].cost):
        owners[name] = load.index(min(load))
        load[owners[name]] += tasks[name].cost
    return owners


def _broadcast(task: Task, owner: int, found: Factorization | None, weight_hash: str, gap: float) -> Factorization:
    weight, k = task.weight(), task.k
    (d_out, d_in), channel = weight.shape, _channel()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    shapes = {"U": (d_out, k), "sigma": (k,), "V": (d_in, k), "sketch": (2 * SKETCH_ROWS, k)}
    received = {}
    for name, shape in shapes.items():
        kind = torch.float32 if name == "sketch" else dtype
        sent = torch.empty(shape, dtype=kind, device=channel) if found is None else getattr(found, name).to(channel)
        dist.broadcast(sent, owner)
        received[name] = sent.to("cpu" if name == "sketch" else weight.device)
    if found is not None:
        return found
    return Factorization(received["U"], received["sigma"], received["V"], weight_hash, gap, received["sketch"])


def _channel() -> torch.device:
    """The device from which the default group sends: NCCL and its like send from an accelerator's memory only."""
    if dist.get_backend() in ("gloo", "mpi", "undefined"):  # "undefined": one for each device, gloo for the CPU
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
