"""Layers that compute W x + b and are no nn.Linear: convolutions of kernel 1, and transformers' Conv1D."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def is_pointwise(module: object) -> bool:
    """Whether `module` is a Conv1d or Conv2d that maps the channels of each position by one plain matrix."""
    return type(module) in CONVOLUTIONS and _plain(module) and why_not_pointwise(module) is None


def why_not_pointwise(convolution: Any) -> str | None:
    """What keeps a convolution from being pointwise, in a few words."""
    for name, value in (("kernel_size", 1), ("stride", 1), ("padding", 0)):
        found = getattr(convolution, name)
        if not isinstance(found, str) and any(each != value for each in found):
            return f"{name} {tuple(found)}"
    return None if convolution.groups == 1 else f"{convolution.groups} groups"


def is_transposed(module: object) -> bool:
    """Whether `module` is transformers' Conv1D (GPT-2): y = x A + b with A (d_in, d_out)."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module) is library.Conv1D and _plain(module)


def _plain(module: Any) -> bool:
    return type(module._parameters.get("weight")) in (Tensor, nn.Parameter)


def matrix_of(weight: Tensor, module: object) -> Tensor:
    """W (d_out, d_in), a view of the Parameter `weight` of `module`."""
    return weight.mT if is_transposed(module) else weight.flatten(1)


def like(weight: Tensor, matrix: Tensor, module: object) -> Tensor:
    """W (d_out, d_in) in the shape of the Parameter `weight` of `module`."""
    return matrix.mT.contiguous() if is_transposed(module) else matrix.reshape(weight.shape)


def channels_of(weight: Tensor) -> int:
    """The dimension of x and y that the Parameter `weight` maps: -1, -2 of a Conv1d, -3 of a Conv2d."""
    return 1 - max(weight.ndim, 2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the convolution with the Parameter `weight` (d_out, d_in, 1) or (d_out, d_in, 1, 1) computes."""
    return (torch.conv1d if weight.ndim == 3 else torch.conv2d)(x, weight, bias)
