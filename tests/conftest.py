"""Shared set-up: Triton's interpreter where there is no GPU, fixed seeds, NaN in uninitialised memory, one thread."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from processes import started

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

pytest.register_assert_rewrite("bounds", "gain", "models", "peft_models", "refusals", "roundtrip", "speech_models")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned():
    """torch.empty gives NaN, so that an element that nobody writes cannot pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def as_trained():
    """Without the suite's poison, which brings deterministic (and synchronising) kernels of torch's own."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_sync():
    """Makes any wait of the host for the device an error, from the call on."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch):
    """For models so small that threads only wait for each other; in processes that the tests start, too."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _small_models(request: pytest.FixtureRequest):
    if request.path.parent.name in ("adapters", "basis", "integrations", "layers", "model"):
        request.getfixturevalue("one_thread")


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory):
    """Two processes with gloo between them, see processes.py."""
    with started(tmp_path_factory.mktemp("group") / "store") as processes:
        yield processes


@pytest.fixture
def many_switches():
    """Threads take turns every few operations."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
