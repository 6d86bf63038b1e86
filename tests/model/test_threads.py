"""A thread that evaluates a model while another one trains it."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import Stack, adapt, assert_equal_gradients, gradients, square_gradients, step
from torch import Tensor

from ssvd_kernels.model.rotations import _Batch


@pytest.mark.usefixtures("many_switches")
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}], ids=["plain", "checkpointed"])
def test_gradients_are_those_of_training_alone(checkpointing):
    model, x = adapt(Stack(checkpointing)).train(), torch.randn(4, 8)
    alone, done = copy.deepcopy(model), threading.Event()

    @torch.no_grad()
    def evaluate() -> None:
        while not done.is_set():
            model(x)
            model.encoder(x)

    with ThreadPoolExecutor() as threads:
        evaluating = threads.submit(evaluate)
        try:
            for _ in range(12):
                assert_equal_gradients(square_gradients(model, x), square_gradients(alone, x))
                step(model)
                step(alone)
        finally:
            done.set()
        evaluating.result()


def test_a_forward_that_another_one_overtakes_does_not_serve_its_checkpoints(monkeypatch):
    """As by two threads: parameters are read, then changed, used by a forward that ends first, and its backward."""
    model, x = adapt(Stack({"use_reentrant": False})).train(), torch.randn(4, 8)
    read, overtaking = _Batch.cores, list[Tensor]()

    def cores(batch: _Batch) -> Tensor:
        made = read(batch)
        monkeypatch.setattr(_Batch, "cores", read)
        if not overtaking:
            step(model)
            overtaking.append(model(x).square().mean())
        return made

    monkeypatch.setattr(_Batch, "cores", cores)
    overtaken = model(x)
    overtaking[0].backward()
    assert overtaken.requires_grad
    assert_equal_gradients(gradients(model), square_gradients(copy.deepcopy(model), x))
