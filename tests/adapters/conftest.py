"""A model, the files of its adapters, and a bank that holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
from banks import adapted, base_net, files_of, filled
from torch import nn

import ssvd_kernels as sk


@pytest.fixture
def net() -> nn.Module:
    return adapted(base_net())


@pytest.fixture
def files(net, tmp_path) -> dict[str, Path]:
    return files_of(net, tmp_path)


@pytest.fixture
def bank(net, files) -> sk.AdapterBank:
    return filled(net, files)
