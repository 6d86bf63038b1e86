"""Factorises many layers: reads from the cache, shares the work over processes, shows a progress bar."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from ..config import Config
from .cache import cache_folder, load, store
from .distributed import Task, Tasks, several_processes, share_out
from .factorize import Factorization, factorize
from .linears import base_weight, features
from .truncated_svd import cost

_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"  # tqdm's own, without the cost's digits


Plan = Mapping[str, tuple[nn.Module, Config]]  # module name -> the layer and how to adapt it


def factorize_all(
    plan: Plan, progress: bool, cache_dir: str | os.PathLike[str] | None = None, share: bool = True
) -> dict[str, Factorization]:
    """The factorisation of each planned layer, from the cache or made one by one; shared out over ranks (`inject`)."""
    folder = cache_folder(cache_dir)
    tasks = {}
    for name, (linear, config) in plan.items():
        d_in, d_out = features(linear)
        k = config.triplets(d_in, d_out)
        tasks[name] = Task(partial(base_weight, linear, name), k, cost(d_out, d_in, k))
    if share and several_processes():
        return share_out(tasks, partial(_factorize_each, folder=folder, progress=progress and dist.get_rank() == 0))
    return _factorize_each(tasks, folder, progress)


def _factorize_each(tasks: Tasks, folder: Path | None, progress: bool) -> dict[str, Factorization]:
    cached = {} if folder is None else {name: load(folder, task.weight(), task.k) for name, task in tasks.items()}
    found = {name: entry for name, entry in cached.items() if entry is not None}
    missing = {name: task for name, task in tasks.items() if name not in found}
    total = sum(task.cost for task in missing.values())
    # by cost, not by layer, so that the time left is estimated well
    with tqdm(total=total, desc="factorising", bar_format=_BAR, smoothing=0, disable=not (progress and missing)) as bar:
        for number, (name, task) in enumerate(missing.items(), 1):
            found[name] = factorize(task.weight(), task.k, f"{name}.weight")
            if folder is not None:
                store(folder, task.weight(), found[name])
            bar.set_postfix_str(f"{number} of {len(missing)} layers", refresh=False)
            bar.update(task.cost)
    return found
