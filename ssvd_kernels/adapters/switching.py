"""Several named adapters on one injected model: add, set, delete, disable; and the strength of each.

The adapter that `inject` creates is called "default". All adapters of a model share its layers, ranks, side and
rotation: the bases U, sigma and V belong to the base model, and an adapter is only theta and delta_sigma (for
SpectralFT, A and B), with tensors of its own for `modules_to_save`. The active adapter is `layer.theta` and so on;
inactive adapters are frozen and stored under "parked.NAME." in the state dict.

    sk.add_adapter(model, "child", "child.safetensors")
    sk.set_adapter(model, "child")
    with sk.disable_adapter(model): ...  # the base model
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ..config import check_strength
from ..layers.base import AdaptedLinear
from ..layers.inactive import BASE, InactiveAdapter, park
from ..model.lookup import check_not_ddp, require_layers, saved_modules
from .file_format import read_adapter
from .save_load import adapter_values


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the model's adapters, the one in use first. Raises ValueError if its layers differ in them."""
    layers = require_layers(model)
    first, names = next((name, layer.adapter_names()) for name, layer in layers.items())
    for name, layer in layers.items():
        if layer.adapter_names() != names:
            raise ValueError(
                f"all layers must have the same adapters, the active one first, got {names} for {first} and "
                f"{layer.adapter_names()} for {name}: set, add or delete adapters of the whole model"
            )
    return names


def add_adapter(model: nn.Module, name: str, path: str | os.PathLike[str] | None = None) -> None:
    """Adds an adapter, new (the base model) or from a file of `save_adapter`; `set_adapter` then puts it to use.

    Raises ValueError for a name that is taken or no name (letters, digits, "_" and "-"), or for a merged model, and as
    `load_adapter` does for a file, AdapterError if it was trained with other layers, ranks, side or rotation. Where
    the file means other signs of singular vectors than the model has, its theta is changed to mean the same.
    """
    check_not_ddp(model)
    layers, saved = ready_layers(model), saved_modules(model)
    taken = sorted({present for layer in layers.values() for present in layer.adapter_names()})
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name):
        raise ValueError(
            "`name` must consist of letters, digits, '_' and '-', and not be an attribute of torch.nn.ModuleDict, "
            f"got {name!r}"
        )
    if name in taken:
        raise ValueError(
            f"`name` must not be taken, got {name!r}: the model has the adapters {', '.join(map(repr, taken))}"
        )
    file = None if path is None else read_adapter(Path(path))
    values = {} if file is None else adapter_values(layers, saved, file)
    strength = 1.0 if file is None else file.strength
    for layer_name, layer in layers.items():
        present = layer.adapter()
        new = {key: nn.Parameter(made.detach().to(present[key])) for key, made in layer.new_adapter().items()}
        for key, value in values.get(layer_name, {}).items():
            new[key].data.copy_(value)
        _park(layer, {**layer.inactive, name: InactiveAdapter(new, strength)})
    for module_name, module in saved.items():
        module.add(name, values.get(module_name, {}))


def set_adapter(model: nn.Module, name: str) -> None:
    """Puts the adapter `name` to use. Its Parameters are the ones it had before, so optimizers stay valid.

    Those of the adapter that is parked stop requiring gradients, and require them again (as they did) once they are
    back: run the backward of a loss before switching, and wrap a model in DistributedDataParallel after it. An
    optimizer over several adapters changes only those that have a gradient, which `zero_grad()` removes from the others
    (with its default set_to_none=True). Raises ValueError for an unknown name, and for a model that is
    merged, sharded, or in DistributedDataParallel already (to evaluate another adapter there, give it `ddp.module`).
    """
    check_not_ddp(model)
    layers = ready_layers(model, name)
    for layer in layers.values():
        if name != layer.active_adapter:
            parked = layer.inactive
            entering = parked.pop(name)
            parked[layer.active_adapter] = InactiveAdapter(layer.adapter(), layer.strength)
            layer._parameters.update(entering.released())
            layer.strength = entering.strength
            layer.active_adapter = name
            _park(layer, parked)
    _use_saved(model, layers)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Deletes an adapter that is not in use. Raises ValueError for an unknown name or the one in use."""
    layers = ready_layers(model, name)
    if any(layer.active_adapter == name for layer in layers.values()):
        raise ValueError(f"`name` must not be the active adapter, got {name!r}: first call set_adapter with another")
    for layer in layers.values():
        _park(layer, {other: adapter for other, adapter in layer.inactive.items() if other != name})
    for module in saved_modules(model).values():
        module.delete(name)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what its base model did, bit for bit. Raises ValueError if it is merged."""
    layers = ready_layers(model)
    before = [layer.disabled for layer in layers.values()]
    for layer in layers.values():
        layer.disabled = True
    _use_saved(model, layers)
    try:
        yield
    finally:
        for layer, disabled in zip(layers.values(), before):
            layer.disabled = disabled
        _use_saved(model, layers)


def set_strength(model: nn.Module, strength: float, adapter: str | None = None) -> None:
    """Scales an adapter, by default the one in use: 0 is the base model bit for bit, 1 what was trained.

    theta and delta_sigma count `strength` times: G = cayley(strength K) stays orthogonal, on the way from I to the
    trained rotation. Of SpectralFT the update W' - W counts. It acts in training, eval, merging, saving and export; not
    on `modules_to_save`. Between 0 and 1 it averages an adapted model with its base, which forgets less (weight
    averaging: arXiv 2210.15282 for speech recognition, WiSE-FT, arXiv 2109.01903).
    strength: 0 to 1.5. Raises ValueError for others, unknown adapters and merged models. PEFT's layers have
    `set_scale`, `scale_layer` and `unscale_layer`.
    """
    strength = check_strength(strength)
    layers = ready_layers(model, *([] if adapter is None else [adapter]))
    for layer in layers.values():
        layer.set_strength(strength, adapter)


def ready_layers(model: nn.Module, *names: str) -> dict[str, AdaptedLinear]:
    """The adapted layers, if each has the named adapters and can change what it uses."""
    layers = require_layers(model)
    for layer_name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{layer_name} is merged: unmerge it before changing or disabling its adapters")
        if layer.sharded or type(layer.first_trained) is not nn.Parameter:
            kind = "one of FSDP2" if layer.sharded else type(layer.first_trained).__name__
            raise ValueError(f"{layer_name}.{layer.trained_names[0]} must be an unsharded Parameter, got {kind}")
        for name in names:
            layer.adapter(name)
    return layers


def _use_saved(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> None:
    """Puts in place, in modules that train whole, the tensors of what the layers use."""
    layer = next(iter(layers.values()))
    for module in saved_modules(model).values():
        module.use(BASE if layer.disabled else layer.active_adapter)


def _park(layer: AdaptedLinear, adapters: Mapping[str, InactiveAdapter]) -> None:
    park(layer, layer.active_adapter, adapters)
    layer.forget()
