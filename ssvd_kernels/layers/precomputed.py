"""Rotations precomputed by the root module at the start of a forward, and checkpointing that is independent of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .input_sharing import SharedInputs


class PrecomputedRotation:
    """Rotations that the root module computed for one layer in its batched call, and the weight composed from them."""

    def __init__(self, E: Tensor, E_out: Tensor | None, inputs: SharedInputs | None) -> None:
        self.E, self.E_out, self.inputs = E, E_out, inputs
        self.weight: Tensor | None = None


@contextmanager
def unseen_by_checkpoints() -> Iterator[None]:
    """Saves tensors for backward as if no checkpoint were there.

    Non-reentrant checkpointing wants its recomputation to save as many tensors as its forward did. A layer that was
    handed its rotation in the forward computes it itself in the recomputation: neither may count.
    """
    if torch.compiler.is_compiling() or not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield
