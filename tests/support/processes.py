"""Two processes that wait for work: functions of the test modules, run on both at once with gloo between them."""

from __future__ import annotations

import io
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZE = 2
SECONDS = 180  # for any one function, on a loaded machine


class Processes:
    """`run(function, *args)` returns [function(rank, *args) for each rank], or raises with a rank's traceback."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for connection in self._connections:
            connection.send((function, args))
        answers = []
        for rank, connection in enumerate(self._connections):
            assert connection.poll(SECONDS), f"rank {rank} did not answer within {SECONDS} s"
            answers.append(torch.load(io.BytesIO(connection.recv()), weights_only=False))
        failures = [f"rank {rank}:\n{value}" for rank, (good, value) in enumerate(answers) if not good]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]


@contextmanager
def started(store: Path) -> Iterator[Processes]:
    """The processes; `store` is a file that they make, by which they find each other (no port is agreed upon)."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(SIZE)]
    arguments = [(rank, str(store), pipe[1]) for rank, pipe in enumerate(pipes)]
    processes = [context.Process(target=_serve, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    try:
        yield Processes([pipe[0] for pipe in pipes])
    finally:
        for pipe in pipes:
            pipe[0].send(None)
        for process in processes:
            process.join(5)
            process.kill()


def _serve(rank: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    timeout = timedelta(seconds=SECONDS / 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=timeout)
    while (job := connection.recv()) is not None:
        function, args = job
        torch.manual_seed(0)
        try:
            answer = (True, function(rank, *args))
        except Exception:
            answer = (False, traceback.format_exc())
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        connection.send(buffer.getvalue())
    dist.destroy_process_group()


def update_environment(values: dict[str, str]) -> None:
    """For a new process, before it imports what reads them."""
    os.environ.update(values)
