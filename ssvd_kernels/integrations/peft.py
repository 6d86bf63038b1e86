"""SSVD as a PEFT method. Importing this module registers it:

    import ssvd_kernels.integrations.peft as ssvd_peft
    model = peft.get_peft_model(model, ssvd_peft.SSVDPeftConfig(ratio=0.4))

A process that loads a saved adapter needs the import, too; otherwise PEFT raises KeyError: 'SSVD'. The model card and
adapter_config.json say so.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from tqdm.auto import tqdm

from ..basis.linears import is_quantized, move_hooks
from ..config import (
    PRESETS,
    BasisDtype,
    Form,
    Rotation,
    Side,
    SSVDConfig,
    check_choice,
    check_integer,
    check_names,
    check_strength,
)
from ..layers.base import AdaptedLinear
from ..layers.quantized import forget_quantization
from ..model.lookup import replace_modules
from ..model.rotations import is_watched, unwatch_forwards, watch_forwards
from ..model.targets import tied_to, weight_holders
from ..utils.versions import conflicts
from .peft_layer import BASE, MixedBatch, SSVDPeftLinear
from .peft_quantized import SSVDPeftQuantizedLinear

Bias = Literal["none", "all", "ssvd_only"]
_DEFAULT_RATIO = 0.4
_IMPORT = "import ssvd_kernels.integrations.peft"
_CARD = f"""
## Loading

This is an SSVD adapter. PEFT knows the method once the package `ssvd_kernels` has registered it, so before loading:

```python
{_IMPORT}
```
"""


class _Method(str):
    """The key of a method: PEFT's own are members of an enum that is closed to others."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    name = value

    def __str__(self) -> str:
        return f"PeftType.{self.value}"  # as the enum's members print; PEFT's status functions cut it at the dot


SSVD: Any = _Method("SSVD")


@dataclass
class SSVDPeftConfig(PeftConfig):
    """SSVD (arXiv 2509.02830) for `peft.get_peft_model`, `model.add_adapter` and the like.

    rank, ratio, side, rotation, rank_out, ratio_out, band, form, basis_dtype   as in `ssvd_kernels.SSVDConfig`, but
                         without rank and ratio ratio=0.4
    rank_pattern         {regular expression of the end of a module's name: rank}, instead of rank or ratio there
    bias                 which biases train, too: "none", "all", or "ssvd_only", those of the adapted layers
    init_weights         False, for tests: theta and delta_sigma are drawn at random, so that the output changes at once
    strength             see `ssvd_kernels.set_strength`; layers have set_scale, scale_layer and unscale_layer as LoRA's
    target_modules       a list of module-name suffixes, a regular expression, "all-linear", a preset ("whisper",
                         "wav2vec2", "hubert", "wavlm"), or None: the preset of the model's type, else "all-linear"
    exclude_modules, modules_to_save, layers_to_transform, layers_pattern   as in PEFT's other methods
    requires_import      for readers of adapter_config.json: what to import before loading

    theta and delta_sigma are float32 at least unless PEFT's autocast_adapter_dtype=False or a cast of the model asks
    for less. Raises ValueError or TypeError naming the argument, its value and what is allowed.
    """

    rank: int | None = None
    ratio: float | None = None
    side: Side = "input"
    rotation: Rotation = "cayley"
    rank_out: int | None = None
    ratio_out: float | None = None
    band: int | None = None
    form: Form = "auto"
    basis_dtype: BasisDtype = "auto"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    bias: Bias = "none"
    init_weights: bool = True
    strength: float = 1.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    requires_import: str = _IMPORT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SSVD
        if self.rank is None and self.ratio is None:
            self.ratio = _DEFAULT_RATIO
        self._check_rank_pattern()
        self.ssvd()  # validates
        self.strength = check_strength(self.strength)
        check_choice("bias", self.bias, get_args(Bias))
        if not isinstance(self.init_weights, bool):
            raise TypeError(f"`init_weights` must be True or False, got {self.init_weights!r}")
        self._check_modules()

    def _check_rank_pattern(self) -> None:
        if not isinstance(self.rank_pattern, dict) or not all(isinstance(key, str) for key in self.rank_pattern):
            raise TypeError(f"`rank_pattern` must be a dict of patterns and ranks, got {self.rank_pattern!r}")
        for pattern, rank in self.rank_pattern.items():
            check_integer(f"rank_pattern[{pattern!r}]", rank)
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"`rank_pattern` must have regular expressions, got {pattern!r}: {error}") from None

    def _check_modules(self) -> None:
        for argument, kind in (("target_modules", set), ("exclude_modules", set), ("modules_to_save", list)):
            value = getattr(self, argument)
            if value is not None:
                names = check_names(argument, sorted(value) if isinstance(value, set) else value)
                setattr(self, argument, names if isinstance(names, str) else kind(names))
        if self.layers_pattern is not None:
            check_names("layers_pattern", self.layers_pattern)
        layers, by_layer = self.layers_to_transform, self.layers_to_transform is not None
        if by_layer:
            for index in layers if isinstance(layers, list) else [layers]:
                check_integer("layers_to_transform", index, 0)
        if by_layer and isinstance(self.target_modules, str):
            raise ValueError(
                "`layers_to_transform` requires `target_modules` to be a list of suffixes, got "
                f"layers_to_transform={self.layers_to_transform!r}, target_modules={self.target_modules!r}"
            )
        if self.layers_pattern and not by_layer:
            raise ValueError(f"`layers_pattern` requires `layers_to_transform`, got {self.layers_pattern!r}")

    def ssvd(self, name: str = "") -> SSVDConfig:
        """What this asks of the layer `name`."""
        rank = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name))
        return SSVDConfig(
            rank=rank or self.rank,
            ratio=None if rank else self.ratio,
            side=self.side,
            rotation=self.rotation,
            rank_out=self.rank_out,
            ratio_out=self.ratio_out,
            band=self.band,
            form=self.form,
            basis_dtype=self.basis_dtype,
        )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Also names the import in the folder's model card."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if _IMPORT not in text:
            card.write_text(text + _CARD, encoding="utf-8")


class SSVDPeftModel(BaseTuner):
    """Replaces the targeted layers by `SSVDPeftLinear`, and computes all running rotations in one call per forward.

    Over layers that bitsandbytes or torchao quantised, merge_adapter refuses, and merge_and_unload leaves plain layers.
    """

    prefix = "ssvd_"
    tuner_layer_cls = SSVDPeftLinear
    target_module_mapping = PRESETS

    _holders: dict[tuple, list[str]]  # these two only while layers are being replaced
    _progress: tqdm

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own, with a progress bar, and with nothing changed if anything is refused."""
        self._holders = weight_holders(model)
        self._progress = tqdm(desc="SSVD: factorising", unit="layer", disable=None)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self._take_back(adapter_name)
            raise
        finally:
            self._progress.close()
            del self._holders, self._progress

    def _take_back(self, adapter_name: str) -> None:
        for layer in list(self.model.modules()):
            if isinstance(layer, SSVDPeftLinear):
                if adapter_name in layer.ssvd_adapter:
                    del layer.ssvd_adapter[adapter_name]
                if not layer.ssvd_adapter:
                    self._replace({layer: layer.base_layer})

    def _replace(self, replacements: Mapping[Any, nn.Module]) -> None:
        """With their hooks, except at quantised layers, which call their base with its hooks."""
        replace_modules(self.model, replacements)
        for old, new in replacements.items():
            if not any(isinstance(module, SSVDPeftQuantizedLinear) for module in (old, new)):
                move_hooks(old, new)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        names = [name for name, _ in self.model.named_modules()]
        for pattern in config.rank_pattern:
            if not any(get_pattern_key([pattern], name) == pattern for name in names):
                raise ValueError(f"`rank_pattern` must match modules of the model, got {pattern!r}, which matches none")

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        targets = peft_config.target_modules
        preset = model_config.get("model_type") if targets is None else targets
        if isinstance(preset, str) and preset in PRESETS:
            peft_config.target_modules = set(PRESETS[preset])
        elif targets is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, AdaptedLinear):
            raise TypeError(f"{current_key!r} belongs to an SSVD layer created by inject: call remove(model) first")
        layer = target if isinstance(target, SSVDPeftLinear) else self._new_layer(target, current_key)
        config = peft_config.ssvd(current_key)
        layer.update_layer(adapter_name, config, peft_config.strength, peft_config.inference_mode)
        if not peft_config.init_weights:
            layer.draw(adapter_name)
        if layer is not target:
            self._replace({target: layer})  # on its device already, or on "meta" until the adapter is loaded
        self._progress.update()

    def _new_layer(self, target: nn.Module, name: str) -> SSVDPeftLinear:
        layer = (SSVDPeftQuantizedLinear if is_quantized(target) else SSVDPeftLinear)(target, name)
        tied = tied_to(name, layer.base_layer, self._holders)
        if tied is not None:
            raise ValueError(
                f"{name!r} is targeted, but its weight is tied to {tied!r}: adapting it would change both. Use "
                "exclude_modules to leave it out"
            )
        return layer

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if not is_watched(model):
            watch_forwards(model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's own, with nothing changed if a quantised layer refuses. Warns of active adapters left out."""
        for layer in self.model.modules():
            if isinstance(layer, SSVDPeftQuantizedLinear):
                layer.merge(safe_merge, adapter_names)
        left_out = [name for name in self.active_adapters if adapter_names and name not in adapter_names]
        if left_out:
            warnings.warn(
                f"merged layers apply no other adapter: {', '.join(map(repr, left_out))}, active until now, is left "
                "out until unmerge_adapter()",
                stacklevel=2,
            )
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        quantized = [layer for layer in self.model.modules() if isinstance(layer, SSVDPeftQuantizedLinear)]
        for layer in quantized:
            layer.unloaded_dtype = getattr(self.model, "dtype", None)  # quantised layers took inputs of any dtype
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, SSVDPeftLinear)}
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self._replace({layer: self.model.get_submodule(name) for name, layer in layers.items()})
        if merge and quantized:
            forget_quantization(self.model)
        if is_watched(self.model):
            unwatch_forwards(self.model)
        return self.model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """float32 at least; without autocast_adapter_dtype the dtype of each layer's base weight."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self.model.modules():
                if isinstance(layer, SSVDPeftLinear) and adapter_name in layer.ssvd_adapter:
                    layer.ssvd_adapter[adapter_name].to(layer.base_weight.dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Within it, adapter_names=[...] of a call says which adapter each input has, "__base__" none."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        layers = [layer for layer in self.model.modules() if isinstance(layer, SSVDPeftLinear)]
        self._check_adapter_names(names, {name for layer in layers for name in layer.ssvd_adapter})
        options = kwargs.get("generation_config")
        beams, sequences = (
            kwargs.get(key) or getattr(options, key, None) or 1 for key in ("num_beams", "num_return_sequences")
        )
        for layer in layers:
            layer.mixed = MixedBatch(names, {1, beams, sequences, beams * sequences})  # Whisper's repeats by both
        whole = [module for module in self.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        named = partial(_with_names, names=names)
        hooks = [module.register_forward_pre_hook(named, with_kwargs=True) for module in whole]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer in layers:
                layer.mixed = None

    def _check_adapter_names(self, names: Any, present: set[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")  # PEFT's own words
        if isinstance(names, str) or not names:
            raise ValueError(f"`adapter_names` must be a list with a name for each input, got {names!r}")
        unknown = set(names) - present - {BASE}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(map(str, unknown)))}")


def _with_names(module: nn.Module, args: Any, kwargs: Any, names: Any) -> tuple[Any, Any]:
    """For a module that trains whole, of a batch whose inputs generate() may have repeated."""
    repeated = len(args[0]) // len(names) if args else 1
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(max(repeated, 1))]}


PEFT_TYPE_TO_CONFIG_MAPPING[SSVD] = SSVDPeftConfig
PEFT_TYPE_TO_TUNER_MAPPING[SSVD] = SSVDPeftModel
PEFT_TYPE_TO_PREFIX_MAPPING[SSVD] = SSVDPeftModel.prefix

for _sentence in conflicts():
    warnings.warn(_sentence, stacklevel=2)
