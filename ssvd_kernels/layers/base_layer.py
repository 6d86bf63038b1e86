"""The frozen layer below an adapted one: where its weight is, and how it is given back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..basis.forwards import cast_linear, casts
from ..basis.linears import base_weight, check_linear, share_hooks
from ..basis.pointwise import convolve, is_pointwise, is_transposed, like, matrix_of

if TYPE_CHECKING:
    from .base import AdaptedLinear

OTHER_WEIGHT = "differs from the base weight whose singular vectors this layer holds"
REMEDY = "load base weights before inject"
BASES = ("U", "V", "Uh", "Vh")


class BaseLayer:
    """An nn.Linear, whose Parameters are the adapted layer's, too, under the same keys "weight" and "bias".

    It has no state: the base layer's tensors are parameters or submodules of `layer`.
    """

    def read(self, linear: nn.Linear) -> Tensor:
        """W (d_out, d_in) of a layer that is to be adapted. Raises TypeError for one of another kind."""
        check_linear(linear, "linear")
        return linear.weight

    def attach(self, layer: AdaptedLinear, linear: nn.Linear) -> None:
        """Puts the frozen `linear` below `layer`."""
        layer.__dict__["_original"] = linear.requires_grad_(False)  # not a submodule: `original()` gives it back
        layer.casts = casts(linear)
        share_hooks(linear, layer)
        others = dict(layer._parameters)
        layer._parameters.clear()  # for the weight must come first: its dtype is taken for the model's
        layer._parameters.update({"weight": linear._parameters["weight"], "bias": linear.bias, **others})

    def weight(self, layer: AdaptedLinear) -> Tensor:
        """W, as it is now."""
        weight = layer._parameters["weight"]
        assert weight is not None
        return weight

    def bias(self, layer: AdaptedLinear) -> nn.Parameter | None:
        return layer._parameters["bias"]

    def product(self, layer: AdaptedLinear, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer computes with `weight` (d_out, d_in) for W."""
        return (cast_linear if layer.casts else F.linear)(x, weight, layer._parameters["bias"])

    def original(self, layer: AdaptedLinear) -> nn.Linear:
        """The layer that was adapted, with the present weight and bias."""
        linear: nn.Linear = layer.__dict__["_original"]
        linear._parameters.update(weight=layer._parameters["weight"], bias=layer._parameters["bias"])
        return linear.train(layer.training)

    def unloaded(self, layer: AdaptedLinear, weight: Tensor) -> nn.Linear:
        """A plain layer with W' for a weight."""
        linear = self.original(layer)
        # a new Parameter: the old one may be in use elsewhere, e.g. in a copy of the base model
        linear.weight = nn.Parameter(self.shaped(layer, weight), requires_grad=False)
        return linear

    def shaped(self, layer: AdaptedLinear, weight: Tensor) -> Tensor:
        """`weight` (d_out, d_in) as the adapted layer's own Parameter has it."""
        return weight

    def merge_refusal(self, name: str) -> str | None:
        """Why W' cannot take W's place in the layer `name`; None if it can."""
        return None

    def load_refusal(self, layer: AdaptedLinear, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Why `layer` cannot load a state dict: another base weight than the one that its basis belongs to."""
        loaded, W = state_dict.get(f"{prefix}weight"), layer._parameters["weight"]
        bases = {f"{prefix}{name}" for name in layer._parameters if name in BASES}
        if loaded is None or W is None or loaded.shape != W.shape or bases <= state_dict.keys():
            return None  # load_state_dict itself refuses another shape
        if torch.equal(loaded.to(W.device, W.dtype), W):
            return None
        return f"{prefix}weight {OTHER_WEIGHT}, and the state dict has no basis of it: {REMEDY}"


class PointwiseBase(BaseLayer):
    """A convolution of kernel 1 or transformers' Conv1D: Parameters under the same keys, in their own shapes."""

    def read(self, linear: nn.Module) -> Tensor:
        if not (is_pointwise(linear) or is_transposed(linear)):
            raise TypeError(f"`linear` must be a convolution of kernel 1 or transformers' Conv1D, got {linear}")
        return base_weight(linear)

    def weight(self, layer: AdaptedLinear) -> Tensor:
        return matrix_of(super().weight(layer), layer.__dict__["_original"])

    def product(self, layer: AdaptedLinear, x: Tensor, weight: Tensor) -> Tensor:
        bias = layer._parameters["bias"]
        if is_transposed(layer.__dict__["_original"]):
            return F.linear(x, weight, bias)
        return convolve(x, self.shaped(layer, weight), bias)

    def shaped(self, layer: AdaptedLinear, weight: Tensor) -> Tensor:
        return like(super().weight(layer), weight, layer.__dict__["_original"])
