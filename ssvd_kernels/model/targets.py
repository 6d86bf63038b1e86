"""Finds the modules of a model that a configuration targets."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..basis.linears import check_adaptable, check_library, is_adaptable, is_foreign
from ..basis.pointwise import CONVOLUTIONS
from ..config import PRESETS, Config
from ..layers.adapter import Adapter
from ..layers.base import module_paths
from ..layers.inactive import own_tensors


def find_targets(model: nn.Module, config: Config) -> dict[str, nn.Module]:
    """Name -> layer for every module that `config` targets, in the model's order: linear layers, also quantised ones
    and transformers' Conv1D; where a list or a regular expression names them, convolutions of kernel 1.

    Weights that are tied (shared with another module, such as Whisper's proj_out with its token embedding) and the
    model's output embeddings are left alone, unless a list of suffixes names them: a tied one then raises. So does one
    of `modules_to_save`. Raises ValueError if nothing matches, if a listed suffix or `exclude` matches nothing, for an
    unknown preset, and TypeError if a listed suffix matches a module that is not a linear layer, or one that another
    library quantised (HQQ, GPTQ, AWQ) is targeted. Warns of a preset that fits the model's blocks only in part.
    """
    matched, listed = _match(model, config.targets)
    wanted = set(matched.values())
    names = [name for name, module in matched.items() if listed or is_adaptable(module) or is_foreign(module)]
    excluded = {matched[name] for name in _excluded(names, config.exclude)}
    holders = weight_holders(model)
    output_embeddings = _output_embeddings(model)
    whole = set(find_saved(model, config).values())
    targets: dict[str, nn.Module] = {}
    for name, module in module_paths(model):  # each once, under its first path
        if module not in wanted or module in excluded:
            continue
        if listed:
            check_adaptable(module, name, " (named in `targets`)")
        elif not is_adaptable(module):
            check_library(module, name)
            continue
        tied = tied_to(name, module, holders)
        if tied is not None:
            if listed:
                raise ValueError(
                    f"`targets` names {name!r}, whose weight is tied to {tied!r}: adapting it would change both"
                )
            continue
        if not listed and (module is output_embeddings or module in whole):
            continue
        if module in whole:
            raise ValueError(
                f"{name!r} is named in `targets` and in `modules_to_save`: a layer is either adapted or trains whole"
            )
        targets[name] = module
    if not targets:
        linears = [name for name, module in module_paths(model) if is_adaptable(module)]
        raise ValueError(
            f"`targets` must match an untied linear layer of {type(model).__name__}, got {_shown(config.targets)} with "
            f"exclude={_shown(config.exclude)}: the model has {len(linears)} linear layers, e.g. "
            f"{', '.join(linears[:4]) or 'none'}"
        )
    if config.targets in PRESETS:
        _warn_of_misfit(model, config.targets, targets, wanted)
    return targets


def _warn_of_misfit(model: nn.Module, preset: object, targets: Collection[str], wanted: Collection[nn.Module]) -> None:
    """Warns if blocks ("layers.0") that hold some of `targets` have other linear layers of any size, not `wanted`."""
    blocks, total, left = set(map(_block, targets)) - {None}, 0, Counter[str]()
    for name, module in module_paths(model):
        block = _block(name)
        if block in blocks and isinstance(module, nn.Linear):
            size = module.out_features * module.in_features
            total += size
            if module not in wanted:
                left[name.removeprefix(f"{block}.")] += size
    if left.total() > 0.05 * total:  # WavLM's position gates, say, are less
        warnings.warn(
            f"the preset {preset!r} fits {type(model).__name__} only in part: in the blocks that it adapts, it leaves "
            f"out {100 * left.total() / total:.0f} % of the weights of linear layers: {', '.join(left)}. Give another "
            "preset, or a list of names",
            stacklevel=4,
        )


def _block(name: str) -> str | None:
    """From "encoder.layers.0.attention.query", "encoder.layers.0"."""
    found = re.match(r"(.*?\.)??\d+(?=\.)", name)
    return found and found[0]


def find_saved(model: nn.Module, config: Config) -> dict[str, nn.Module]:
    """Name -> module for every module with tensors of its own among `config.modules_to_save` and their submodules.

    Raises ValueError for a name that matches nothing, and as `check_saved`.
    """
    modules = dict(module_paths(model, remove_duplicate=False))
    return check_saved(model, _listed("modules_to_save", model, modules, config.modules_to_save))


def check_saved(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Name -> module for every module with tensors of its own within `modules`.

    Raises ValueError if one of `modules` has no Parameters, or one that cannot train or that is tied.
    """
    for name, module in modules.items():
        if next(module.parameters(), None) is None:
            raise ValueError(f"`modules_to_save` names {name!r}, a {type(module).__name__} without Parameters")
    within = {part for module in modules.values() for part in module.modules()}
    parts = {name: part for name, part in module_paths(model) if part in within and own_tensors(part)}
    holders = weight_holders(model) if parts else {}
    for name, part in parts.items():
        for key, parameter in part.named_parameters(recurse=False):
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                kind = f"{type(parameter).__name__} of {parameter.dtype}"
                raise ValueError(f"`modules_to_save` names {name!r}, whose {key} is a {kind} and cannot train")
            for other in holders[_storage(parameter)]:
                if other != f"{name}.{key}":
                    raise ValueError(f"`modules_to_save` names {name!r}, whose {key} is tied to {other!r}")
    return parts


def _match(model: nn.Module, targets: str | Sequence[str]) -> tuple[dict[str, nn.Module], bool]:
    """(name -> module matched by `targets`, under every path; whether the user listed them by name)."""
    within = {part for module in model.modules() if isinstance(module, Adapter) for part in module.modules()}
    paths = module_paths(model, remove_duplicate=False)
    modules = {name: module for name, module in paths if name and module not in within}
    if targets == "all-linear":
        return {name: module for name, module in modules.items() if not isinstance(module, CONVOLUTIONS)}, False
    if isinstance(targets, str) and targets in PRESETS:
        return {name: modules[name] for name in _match_names(list(modules), PRESETS[targets])}, False
    if isinstance(targets, str):
        if re.fullmatch(r"[\w-]+", targets) and targets not in modules:
            presets = ", ".join(map(repr, ("all-linear", *PRESETS)))
            raise ValueError(
                f"`targets` must be a preset ({presets}), a list of suffixes such as [{targets!r}], or a regular "
                f"expression that matches complete module names, got {targets!r}"
            )
        return {name: modules[name] for name in _match_names(list(modules), targets)}, False
    return _listed("targets", model, modules, targets), True


def _listed(
    argument: str, model: nn.Module, modules: Mapping[str, nn.Module], suffixes: Sequence[str]
) -> dict[str, nn.Module]:
    for suffix in suffixes:
        if not _match_names(list(modules), [suffix]):
            raise ValueError(f"`{argument}` contains {suffix!r}, which matches no module of {type(model).__name__}")
    return {name: modules[name] for name in _match_names(list(modules), suffixes)}


def _excluded(names: Sequence[str], exclude: str | Sequence[str]) -> set[str]:
    """Which of the targeted `names` are to be left alone. Raises ValueError for what leaves none of them."""
    found = set()
    for pattern in [exclude] if isinstance(exclude, str) else [[suffix] for suffix in exclude]:
        now = _match_names(names, pattern) if pattern else []
        if pattern and not now:
            shown = repr(pattern) if isinstance(pattern, str) else f"{pattern[0]!r} in {_shown(exclude)}"
            raise ValueError(
                "`exclude` must be a list of suffixes of layer names, or a regular expression that matches complete "
                f"names, got {shown}, which matches none of the {len(names)} targeted layers, e.g. {names[0]!r}"
            )
        found.update(now)
    return found


def _match_names(names: Sequence[str], pattern: str | Sequence[str]) -> list[str]:
    if isinstance(pattern, str):
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from None
        return [name for name in names if compiled.fullmatch(name)]
    return [name for name in names if any(name == item or name.endswith(f".{item}") for item in pattern)]


def weight_holders(model: nn.Module) -> dict[tuple, list[str]]:
    """Storage of each parameter -> its name in every module that holds it; a module under two paths is one."""
    holders: dict[tuple, list[str]] = {}
    for path, module in module_paths(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(_storage(parameter), []).append(f"{path}.{name}")
    return holders


def tied_to(name: str, linear: nn.Module, holders: dict[tuple, list[str]]) -> str | None:
    """Another name in `holders` under which a parameter is the weight of the module `name`, or None."""
    found = holders.get(_storage(linear.get_parameter("weight")), [])
    return next((other for other in found if other != f"{name}.weight"), None)


def _storage(tensor: Tensor) -> tuple:
    if tensor.is_meta or is_traceable_wrapper_subclass(tensor):  # these have no storage of their own
        return (id(tensor),)
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.device)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    if getter is None:
        return None
    try:
        return getter()
    except NotImplementedError:  # transformers' base class, for models without any
        return None


def _shown(value: str | Sequence[str]) -> str:
    return repr(value) if isinstance(value, str) else repr(list(value))
