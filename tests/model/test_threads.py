"""A thread that evaluates a model while another one trains it."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import Stack, adapt, assert_equal_gradients, square_gradients, step


@pytest.fixture
def often():
    """Threads take turns every few operations."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often")
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
