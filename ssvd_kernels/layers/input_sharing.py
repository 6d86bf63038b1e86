"""Tracks which layers read the same input, so that the backward saves that input once instead of every z = x V."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..ops.weight_cache import WeightCache


class _Reading:
    """One x: the bytes a token of it takes, and of all the z = x V made from it."""

    def __init__(self, x: Tensor) -> None:
        self.x = weakref.ref(x)
        self.of_x, self.of_z = x.shape[-1] * x.element_size(), 0
        self.readers: list[WeightCache] = []


class SharedInputs:
    """Which layers read one and the same x during a forward of the root. Its graph holds it until its backward ran."""

    def __init__(self) -> None:
        self._latest: dict[int, _Reading] = {}  # by id, which is used again once an x is gone
        self._readings: list[_Reading] = []

    def note(self, x: Tensor, weight_cache: WeightCache, k: int, dtype: torch.dtype) -> None:
        """A layer of rank k that computes in `dtype` reads x."""
        reading = self._latest.get(id(x))
        if reading is None or reading.x() is not x:
            reading = self._latest[id(x)] = _Reading(x)
            self._readings.append(reading)
        reading.readers.append(weight_cache)
        reading.of_z += k * dtype.itemsize
        weight_cache.inputs = self

    def choices(self) -> dict[WeightCache, bool]:
        """Whether each layer should keep x: where it is no larger than the z of all who read it."""
        found: dict[WeightCache, bool] = {}
        for reading in self._readings:
            for weight_cache in reading.readers:
                found[weight_cache] = found.get(weight_cache, True) and reading.of_x <= reading.of_z
        return found


class InputSharing:
    """Of a root module: lets the layers of the next forward keep min(sum of k, d_in) numbers a token of each x.

    The choice changes only while no earlier forward waits for its backward: non-reentrant checkpointing wants its
    recomputation to save the shapes that its forward saved.
    """

    def __init__(self) -> None:
        self._running: SharedInputs | None = None
        self._choices: dict[WeightCache, bool] = {}
        self._graphs: list[weakref.ref[SharedInputs]] = []

    def begin(self) -> SharedInputs:
        """At the start of a forward."""
        self._graphs = [graph for graph in self._graphs if graph() is not None]
        if not self._graphs:
            for weight_cache, save_input in self._choices.items():
                weight_cache.save_input = save_input
        self._running = SharedInputs()
        return self._running

    def end(self) -> None:
        """At its end."""
        inputs, self._running = self._running, None
        choices = {} if inputs is None else inputs.choices()
        if inputs is not None and choices:
            self._choices = choices
            self._graphs.append(weakref.ref(inputs))
            for weight_cache in choices:
                weight_cache.inputs = None

    def __getstate__(self) -> dict[str, Any]:
        return InputSharing().__dict__  # a copy has layers of its own
