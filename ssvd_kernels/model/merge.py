"""Merges and unmerges a model, and removes its adapted layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..layers.base import AdaptedLinear
from ..layers.inactive import BASE
from ..layers.quantized import SSVDQuantizedLinear, forget_quantization
from .lookup import replace_modules, require_layers, saved_modules, unsharded_layers
from .rotations import unwatch_forwards, watched_roots
from .saving import unguard_saving


def merge(model: nn.Module, unload: bool = False, *, rounding: str = "nearest") -> None:
    """Fixes W' = W + U core V^T in every SSVD layer. W is kept, so that `unmerge` is exact. `modules_to_save` stay as
    they were trained.

    unload=True leaves plain nn.Linear layers that hold W' instead (their base weights are gone); in place of quantised
    ones in the dtype of the rest of the model, which transformers then saves as a plain one.
    rounding="stochastic" rounds a bfloat16 W' as the composed mode of the Triton kernels does, up or down by fixed
    noise: no small update is lost (its projection on the true one is 1.00 +- 0.02 from ||K|| = 1e-4 on), but rounding
    costs up to 2.3e-3 of ||W|| instead of 1.7e-3. It affects no other dtype, and no layer that is merged already.
    (Autocast rounds a merged float32 W' to nearest in every call, like any weight: unmerged, small updates survive.)
    Raises ValueError, with nothing changed, if there is no SSVD layer, FSDP2 has sharded one, a W' would not be finite,
    or `rounding` is unknown, and for a quantised base unless unload=True. Warns if a half-precision W' loses the update
    to rounding.
    """
    layers = unsharded_layers(model)
    quantized = [layer for layer in layers.values() if isinstance(layer, SSVDQuantizedLinear)]
    for layer in quantized:
        layer.unloaded_dtype = getattr(model, "dtype", None)  # transformers' models have one; quantised layers took any
    composed = {name: layer.composed_for_merge(name, rounding, unload) for name, layer in layers.items()}
    if unload:
        _take_out(model, {layers[name]: layers[name].unloaded(weight) for name, weight in composed.items()})
        if quantized:
            forget_quantization(model)
        return
    for name, weight in composed.items():
        layers[name].merge(weight)


def unmerge(model: nn.Module) -> None:
    """Undoes `merge` exactly: the untouched base weights were kept. Raises ValueError if there is no SSVD layer."""
    for layer in require_layers(model).values():
        layer.unmerge()


def remove(model: nn.Module) -> None:
    """Puts back the original nn.Linear modules, weights bit for bit, and what `modules_to_save` held, and makes
    trainable what was so before inject."""
    layers = unsharded_layers(model).values()
    for module in saved_modules(model).values():
        module.use(BASE)
    _take_out(model, {layer: layer.original() for layer in layers})


def _take_out(model: nn.Module, replacements: Mapping[AdaptedLinear, nn.Linear]) -> None:
    replace_modules(model, replacements)
    unguard_saving(model)
    for saved in saved_modules(model).values():
        saved.end()
    for module in list(watched_roots(model)):
        parameters = dict(module.named_parameters())
        for name in unwatch_forwards(module):
            if name in parameters:
                parameters[name].requires_grad_(True)
