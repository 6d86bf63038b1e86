"""SSVD as an ESPnet adapter: `adapter: ssvd_kernels` in an ESPnet configuration.

    use_adapter: true
    adapter: ssvd_kernels
    adapter_conf: {rotation_ratio: 0.4, rotation_map: cayley, target_modules: [attn.linear_q, attn.linear_v]}

    python -m ssvd_kernels.integrations.espnet espnet2.bin.s2t_train --config conf.yaml ...

The launcher is `register()` followed by the named ESPnet program; scripts of your own call `register()` first.

ESPnet builds a model with random weights, calls `create_adapter`, builds the optimizer, and only then loads
`init_param` or a model file, with strict=False. So every parameter exists from the start; a layer factorises its weight
when a state dict brings it, and until then raises when it is used. Whatever would leave an adapter without effect, or
give it another one than was trained, is refused as the state dict is loaded (torch raises a RuntimeError).

save_strategy "all" stores the base weights and their singular vectors too and loads into a new model as it is;
"required_grad_only" stores what trains and a sketch of the singular vectors, and loads over the base weights;
"adapter_only" is refused: by the launcher at once, by ESPnet's trainer only after an epoch.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..basis.batch import factorize_all
from ..basis.factorize import (
    BASIS,
    MATCH_TOLERANCE,
    SKETCH_ROWS,
    BasisIdentity,
    Factorization,
    basis_error,
    factorize,
    match_rounded,
    match_signs,
    sketch,
)
from ..basis.linears import check_linear, features
from ..config import Form, SSVDConfig, check_choice
from ..layers.activation import KEPT, ActivationForm, check_sigma
from ..layers.base import adapted_layers
from ..layers.base_layer import BASES
from ..layers.ssvd import SSVDLinear
from ..model.inject import InjectReport, install
from ..model.lookup import ssvd_layers
from ..model.targets import find_targets
from ..ops.functional import flip_theta

logger = logging.getLogger(__name__)

_TRAINED = ("theta", "delta_sigma")
_MAPS = ("linear", "cayley")  # numbered in state dicts: append only
_IDENTITY = "_extra_state"  # torch's key for what get_extra_state returns


def register(name: str = "ssvd_kernels") -> None:
    """Makes `adapter: name` known to ESPnet. Raises ValueError if ESPnet has another adapter of that name."""
    from espnet2.layers.create_adapter import create_adapter_fn_table

    if create_adapter_fn_table.setdefault(name, create_adapter) is not create_adapter:
        raise ValueError(f"`name` must differ from those of ESPnet's adapters, got {name!r}")


def create_adapter(
    model: nn.Module,
    rotation_ratio: float | None = None,
    rank: int | None = None,
    rotation_map: Literal["linear", "cayley"] = "linear",
    target_modules: str | Sequence[str] = "espnet",
    weights: Literal["later", "now"] = "later",
    form: Form = "auto",
) -> InjectReport:
    """Adapts `model` in place, as ESPnet calls it: `create_adapter(model=model, **adapter_conf)`.

    rotation_ratio, rank   k = int(min(d_in, d_out) * rotation_ratio), or k itself; exactly one of them
    rotation_map           "linear" (I - 2K, as in the paper and in ESPnet) or "cayley" (orthogonal)
    target_modules         list of endings of module names, by ESPnet's rule ("attn.linear_q" is also the end of
                           "self_attn.linear_q"); or a string as in `SSVDConfig.targets`
    weights                "later": a state dict will bring the pretrained weights (init_param, a model file);
                           "now": the model holds them already (Whisper and s3prl models load their own)
    form                   as in `SSVDConfig`: "activation" keeps one basis instead of two and no second weight

    The smaller side rotates (side="smaller"), as in ESPnet. Weights and biases of the adapted layers are frozen; what
    else trains is left to freeze_param, as with ESPnet's LoRA, and is reported. Raises ValueError or TypeError naming
    the argument, its value and what is allowed, with nothing changed.
    """
    check_choice("rotation_map", rotation_map, _MAPS)
    check_choice("weights", weights, ("later", "now"))
    if adapted_layers(model):
        raise ValueError("model has SSVD layers already: create_adapter is called once")
    if not isinstance(target_modules, str):
        target_modules = _names_that_end(model, target_modules)
    config = SSVDConfig(rank, rotation_ratio, "smaller", rotation_map, target_modules, form=form)
    plan = {name: (linear, config) for name, linear in find_targets(model, config).items()}
    for name, (linear, _) in plan.items():
        check_linear(linear, name)
    if weights == "now":
        found = factorize_all(plan, progress=True)
    else:
        found = {name: _placeholder(linear, config) for name, (linear, _) in plan.items()}
    others = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapted = {id(p) for linear, _ in plan.values() for p in linear.parameters()}
    kind = ESPnetSSVDActivationLinear if form == "activation" else ESPnetSSVDLinear
    report = install(model, plan, found, kind)
    trained_too = [parameter.requires_grad_(True) for parameter in others if id(parameter) not in adapted]
    model.register_load_state_dict_pre_hook(_refuse_strays)
    logger.info("%s", report)
    if trained_too:
        count = sum(parameter.numel() for parameter in trained_too)
        logger.warning("%s other parameters of the model also train: freeze_param freezes them", f"{count:,}")
    return report


class ESPnetSSVDLinear(SSVDLinear):
    """An SSVDLinear that may be built before its weight is there and is factorised when a state dict brings it."""

    def __init__(self, linear: nn.Linear, config: SSVDConfig, factorization: Factorization | None = None) -> None:
        super().__init__(linear, config, factorization)
        self.factorized = bool(self.basis.sketch.any())

    def own_core(self) -> Tensor:
        if not self.factorized:
            raise RuntimeError(
                "no pretrained weight was loaded into this SSVD layer, so it has no singular vectors: load one "
                "(init_param) first, or give adapter_conf weights='now' for a model that brings its own"
            )
        return super().own_core()

    def get_extra_state(self) -> Tensor:
        """(7, k): sketch of the basis, and the index of the rotation: floats, as ESPnet averages what it saved."""
        rotation = torch.full((1, self.k), float(_MAPS.index(self.rotation)))
        return torch.cat([self.basis.sketch, rotation])

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to do: `_load_from_state_dict` has compared it with the basis."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        known = self.basis
        if not self.merged:
            try:
                state_dict.update(self._with_basis(state_dict, prefix))  # in place: parked adapters load from it next
            except ValueError as error:
                self.basis = known
                args[-1].append(f"{prefix[:-1]}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.factorized = bool(self.basis.sketch.any())
        if not self.factorized:
            self.basis = known

    def _with_basis(self, state_dict: Any, prefix: str) -> Any:
        """`state_dict` with the basis that belongs to its weight and theta; ValueError if there is none."""
        given = self._given(state_dict, prefix)
        own = dict(self.named_parameters())
        if any(tensor.shape != own[name].shape for name, tensor in given.items()):
            return state_dict  # torch says so
        present = [name for name in _TRAINED if prefix + name in state_dict]
        if present and len(present) < len(_TRAINED):
            raise ValueError(f"the state dict has {present[0]}, but not all of {', '.join(_TRAINED)}")
        identity = state_dict.get(prefix + _IDENTITY)
        if identity is not None:
            identity = identity.to("cpu", torch.float32) if identity[:-1].any() else None  # of a layer without a weight
        basis = self._resolve_basis(given, identity, prefix[:-1])
        if basis is None:
            return state_dict  # the model's own, or without this layer
        values = {**basis, **self._aligned_thetas(given, identity)}
        return {**state_dict, **{prefix + name: tensor for name, tensor in values.items()}}

    def _resolve_basis(self, given: dict[str, Tensor], identity: Tensor | None, name: str) -> dict[str, Tensor] | None:
        """The basis, as it is kept, of the weight that is loaded: the state dict's, this layer's, or a new one; None
        without weight. Its sketch is then `self.basis`'s."""
        weight, kept = given.get("weight"), [key for key in ("sigma", *BASES) if key in self._parameters]
        base = self.base_weight if weight is None else weight.to(self.base_weight.device, self.base_weight.dtype)
        if all(key in given and bool(given[key].any()) for key in kept):
            stored = {key: given[key] for key in kept}
            own = self._identified(base, stored, identity)
            gap = 0.0 if match_signs(self.basis.sketch, own) is None else self.basis.gap
            self.basis = self.basis._replace(gap=gap, sketch=own)
            return stored
        if self.factorized:
            if not torch.equal(base, self.base_weight):
                raise ValueError(
                    "the base weight differs from the one that was factorised: load base weights once, before training"
                )
            return {key: self.get_parameter(key) for key in kept}
        if weight is None:
            if any(key in given for key in _TRAINED):
                raise ValueError("the state dict has a trained theta, but no base weight was loaded: load that first")
            return None
        found = factorize(base, self.k)
        logger.info("SSVD: factorised %s (%d x %d, k = %d)", name, *base.shape, self.k)
        self.basis = BasisIdentity(found.fingerprint, found.gap, found.sketch)
        return self.as_kept({key: getattr(found, key) for key in BASIS})

    def _identified(self, weight: Tensor, stored: dict[str, Tensor], identity: Tensor | None) -> Tensor:
        """The sketch of the basis `stored`. Raises ValueError if it is not of `weight`."""
        _check_error("U^T W V", "sigma", basis_error(weight, **stored), weight)
        return sketch(stored["U"], stored["V"])

    def _aligned_thetas(self, given: dict[str, Tensor], identity: Tensor | None) -> dict[str, Tensor]:
        """The thetas of the state dict, inactive adapters' too, with the signs that they need in `self.basis`."""
        if identity is None:
            if any(key in given for key in _TRAINED):
                raise ValueError("the state dict has theta, but no sketch of the singular vectors that it rotates")
            return {}
        signs = self._match(identity, self.basis.sketch)
        thetas = [key for key in given if key.rpartition(".")[2] == "theta"]
        return {key: flip_theta(given[key], signs, self.rotation) for key in thetas}

    def _given(self, state_dict: Any, prefix: str) -> dict[str, Tensor]:
        """What comes from outside: ESPnet updates the model's own state dict with a file's and loads the result."""
        given = {}
        for name, own in self.named_parameters():
            tensor = state_dict.get(prefix + name)
            if tensor is not None and tensor.data_ptr() != own.data_ptr():
                given[name] = tensor
        return given

    def _match(self, identity: Tensor, found: Tensor) -> Tensor:
        rotation = _MAPS[round(float(identity[-1, 0]))]
        if rotation != self.rotation:
            raise ValueError(f"theta was trained with rotation_map={rotation!r}, but the layer has {self.rotation!r}")
        signs = match_signs(identity[:-1], found)
        if signs is None:
            raise ValueError("theta was trained with the singular vectors of another base weight")
        return signs


class ESPnetSSVDActivationLinear(ActivationForm, ESPnetSSVDLinear):
    """`ESPnetSSVDLinear` in the activation form."""

    def _resolve_basis(self, *args: Any) -> dict[str, Tensor] | None:
        basis = super()._resolve_basis(*args)
        if basis is not None:
            check_sigma(basis["sigma"], self.get_parameter(f"{KEPT[self.side][0]}h").dtype, "its weight")
        return basis

    def _identified(self, weight: Tensor, stored: dict[str, Tensor], identity: Tensor | None) -> Tensor:
        """By the side that is kept, say V: W V = U Sigma. To its rounding it is that of `identity`, if there is one."""
        (name,), device = KEPT[self.side], weight.device
        sigma, kept = stored["sigma"].to(device), stored[f"{name}h"].to(device).mT
        image = (weight if name == "V" else weight.mT).to(sigma.dtype) @ kept.to(sigma.dtype)
        squares = torch.diag(sigma**2)
        error = float((image.mT @ image - squares).norm() / squares.norm())
        _check_error("V^T W^T W V" if name == "V" else "U^T W W^T U", "sigma^2", error, weight, kept)
        signs = None if identity is None else match_rounded(identity[:-1], {name: kept})
        if identity is not None and signs is not None:
            return identity[:-1] * signs
        return sketch(**{name: kept, "U" if name == "V" else "V": image / sigma})


def _names_that_end(model: nn.Module, endings: Sequence[str]) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    for ending in endings:
        if not any(name.endswith(ending) for name in names):
            kind = type(model).__name__
            raise ValueError(f"`target_modules` contains {ending!r}, with which no module name of {kind} ends")
    return [name for name in names if name.endswith(tuple(endings))]


def _placeholder(linear: nn.Module, config: SSVDConfig) -> Factorization:
    """No singular vectors, in the shapes that a factorisation will have; each sigma is 1, as it may be divided by."""
    d_in, d_out = features(linear)
    k = config.triplets(d_in, d_out)
    weight = linear.get_parameter("weight")
    zeros, dtype = weight.new_zeros, torch.promote_types(weight.dtype, torch.float32)
    U, V = (zeros(d, k, dtype=dtype) for d in (d_out, d_in))
    return Factorization(U, weight.new_ones(k, dtype=dtype), V, "", 0.0, torch.zeros(2 * SKETCH_ROWS, k))


def _check_error(product: str, values: str, error: float, *rounded: Tensor) -> None:
    """Raises ValueError for a basis of another weight; `rounded` may have been rounded to half precision."""
    allowed = max(MATCH_TOLERANCE, *(torch.finfo(tensor.dtype).eps for tensor in rounded))
    if not error <= allowed:
        raise ValueError(
            f"the singular vectors of the state dict belong to another weight: {product} differs from {values} by a "
            f"relative error of {error:.2g} (tolerance {allowed:.2g})"
        )


def _refuse_strays(model: nn.Module, state_dict: Any, prefix: str, *args: Any) -> None:
    """Hook before loading: trained layers of the state dict and of the model are the same, or it brings none."""
    error_msgs: list[str] = args[-1]
    layers = {prefix + name for name in ssvd_layers(model)}
    trained = [key for key in state_dict if key.endswith(".delta_sigma") and ".parked." not in key]
    carried = {key.removesuffix(".delta_sigma") for key in trained}
    if carried and carried != layers:
        error_msgs.append(
            f"the state dict has {len(carried)} SSVD layers and {type(model).__name__} has {len(layers)}; they differ, "
            f"e.g. in {min(carried ^ layers)!r}: create the adapter with the target_modules that it was trained with"
        )
    if any(key.endswith(".K_vec") for key in state_dict):
        error_msgs.append(
            "the state dict is of ESPnet's own SSVD adapter: convert it (python -m ssvd_kernels convert --help)"
        )


def main() -> None:
    """Registers the adapter and runs the ESPnet program named first on the command line."""
    parser = argparse.ArgumentParser(prog="python -m ssvd_kernels.integrations.espnet", description=main.__doc__)
    parser.add_argument("program", help="a module with a main(), e.g. espnet2.bin.s2t_train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    parser.parse_args()
    register()
    del sys.argv[0]
    program = importlib.import_module(sys.argv[0])
    if hasattr(program, "get_parser"):
        options = vars(program.get_parser().parse_known_args()[0])
        if options.get("save_strategy") == "adapter_only" and options.get("adapter") == "ssvd_kernels":
            parser.error("save_strategy must be all or required_grad_only: ESPnet refuses adapter_only after an epoch")
    program.main()


if __name__ == "__main__":
    importlib.import_module("ssvd_kernels.integrations.espnet").main()
elif __name__ == "__mp_main__":  # in processes that ESPnet spawns, one a GPU
    importlib.import_module("ssvd_kernels.integrations.espnet").register()
