"""Places: which of many cores each row of a batch has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Places:
    """Which of N cores each of R rows has: a number, or None, whose product is zero."""

    def __init__(self, numbers: Sequence[int | None], device: torch.device) -> None:
        self.numbers, self.device = list(numbers), device
        self._index: Tensor | None = None
        groups: dict[int, list[int]] = {}
        for row, number in enumerate(self.numbers):
            if number is not None:
                groups.setdefault(number, []).append(row)
        self.groups = [(number, self._rows(rows)) for number, rows in groups.items()]

    def _rows(self, rows: list[int]) -> slice | Tensor:
        start, stop = rows[0], rows[-1] + 1
        return slice(start, stop) if stop - start == len(rows) else torch.tensor(rows, device=self.device)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def index(self) -> Tensor:
        """The numbers (R,), int32, -1 for None."""
        if self._index is None:
            numbers = [-1 if number is None else number for number in self.numbers]
            self._index = torch.tensor(numbers, dtype=torch.int32, device=self.device)
        return self._index

    def by_row(self, cores: Tensor) -> Tensor:
        """The core of each row (R, ...), zero for None; cores (N, ...)."""
        index = self.index
        return cores.index_select(0, index.clamp(min=0)).mul_((index >= 0).view(-1, *[1] * (cores.ndim - 1)))
