"""Exports a trained model to other formats: a LoRA adapter for plain PEFT, or a plain transformers model.

Both write a folder atomically, leave the model unchanged, and can be used without this package.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import check_integer
from ..layers.adapter import Adapter
from ..layers.base import AdaptedLinear, module_paths
from ..model.lookup import saved_modules, unsharded_layers, unwrapped

logger = logging.getLogger(__name__)

ROWS = 1024  # of an update that are held in float64 at a time
COMPANIONS = {".json", ".txt", ".model", ".bpe", ".spm", ".tiktoken", ".jinja"}  # tokenizers, feature extractors


@dataclass
class LoraReport:
    """What `to_lora` wrote. Errors are ||B A - U core V^T|| / ||U core V^T|| (Frobenius norms; 0 for no update)."""

    ranks: dict[str, int]
    errors: dict[str, float]
    error: float  # of all layers together
    size: int  # bytes of the weights

    def __str__(self) -> str:
        worst = max(self.errors, key=self.errors.__getitem__)
        counts = sorted(Counter(self.ranks.values()).items())
        return (
            f"LoRA: {len(self.ranks)} layers, {self.size / 1e6:.1f} MB, relative error {self.error:.2g} "
            f"(largest {self.errors[worst]:.2g} in {worst})\n"
            + "\n".join(f"  {count:4d} x rank {rank}" for rank, count in counts)
        )


def to_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    rank: int | None = None,
    base_model_name_or_path: str | None = None,
    *,
    progress: bool = True,
) -> LoraReport:
    """Writes the SSVD layers of `model` as a LoRA adapter that plain PEFT loads on the base model.

        W' = W + B A,   B = U P sqrt(S) (d_out, r),   A = sqrt(S) Q^T V^T (r, d_in),   core = P S Q^T

    rank=None writes the exact update (r = k in each layer, of SpectralFT twice its rank; error about 1e-7: float32
    rounding); rank=r its best approximation of rank min(r, k), optimal because U and V are orthonormal. The scaling is
    1; ranks that differ go into rank_pattern and alpha_pattern; `modules_to_save` are PEFT's. base_model_name_or_path
    defaults to the name that the model was loaded by.
    Of several adapters the one in use is written, even while it is disabled. Merged and
    unmerged models give the same adapter, which belongs to the base model as it was before `inject`.
    WavLM's attention bypasses PEFT's layers: call merge_and_unload() there, or the adapter has no effect.

    Raises ValueError (no SSVD layer of this package's own, FSDP2, an update that is not finite, a rank below 1),
    TypeError (a rank that is not an integer), FileNotFoundError and FileExistsError (folder); then nothing is written.
    """
    if rank is not None:
        check_integer("rank", rank, 1, ", or None for the exact update")
    check_new(folder)
    model = unwrapped(model)
    layers = unsharded_layers(model)
    bar = tqdm(layers.items(), desc="LoRA factors", unit="layer", disable=not progress)
    pairs = {name: _lora_pair(name, layer, rank) for name, layer in bar}
    tensors = {}
    for name, pair in pairs.items():
        ones = (1,) * (-1 - layers[name].channels)  # of a convolution's kernel
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.A.view(*pair.A.shape, *ones)
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.B.view(*pair.B.shape, *ones)
    saved, in_use = saved_modules(model), next(iter(layers.values())).active_adapter
    for name, module in saved.items():
        for key, tensor in module.adapter(in_use).items():
            tensors[f"base_model.model.{name}.{key}"] = tensor.detach().cpu().contiguous()
    ranks = {name: pair.A.shape[0] for name, pair in pairs.items()}
    base = base_model_name_or_path or getattr(model, "name_or_path", None) or None
    outermost = [name for name in saved if not name.startswith(tuple(f"{other}." for other in saved))]
    config = _lora_config(ranks, [name for name, _ in module_paths(model)], base, outermost)
    with new_folder(folder) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    attentions = [module for module in model.modules() if type(module).__name__ == "WavLMAttention"]
    if any(isinstance(part, Adapter) for attention in attentions for part in attention.modules()):
        logger.warning("WavLM's attention bypasses LoRA layers: call merge_and_unload() after loading the adapter")
    total = sum(pair.norm**2 for pair in pairs.values()) ** 0.5
    return LoraReport(
        ranks,
        {name: _ratio(pair.error, pair.norm) for name, pair in pairs.items()},
        _ratio(sum(pair.error**2 for pair in pairs.values()) ** 0.5, total),
        sum(tensor.nbytes for tensor in tensors.values()),
    )


def export_merged(
    model: nn.Module, folder: str | os.PathLike[str], files_from: str | os.PathLike[str] | None = None
) -> None:
    """Writes an injected transformers model with W' = W + U core V^T in place of W, for `from_pretrained`.

    files_from: the folder of the base model, whose other files (tokenizer, feature extractor) are copied beside it;
    without it, save those there yourself: `tokenizer.save_pretrained(folder)`. W' has the base weight's dtype, with a
    warning where that loses the update to rounding; a merged model is written as it was merged. Only the
    composed weights take additional memory.

    Raises TypeError if the model is none of transformers', ValueError if it has no SSVD layer of this package's own, if
    its adapter is disabled, its base quantised, or a W' would not be finite, FileNotFoundError and FileExistsError
    (folder, files_from); then nothing is written.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers model (PreTrainedModel), got {type(model).__name__}")
    if files_from is not None and not Path(files_from).is_dir():
        raise FileNotFoundError(f"`files_from` must be an existing folder, got {str(files_from)!r}")
    with new_folder(folder) as temporary:
        type(model).save_pretrained(model, temporary, state_dict=_merged_state(model))
        if files_from is not None:
            _copy_companions(Path(files_from), temporary)


def check_new(folder: str | os.PathLike[str]) -> Path:
    """`folder`, which may be empty. Raises FileExistsError if it holds anything or is a file, FileNotFoundError if its
    parent does not exist."""
    path = Path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"`folder` must be new or empty, got {str(path)!r}, which already exists")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"`folder` must be in an existing folder, got {str(path)!r}")
    return path


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends, and disappears if it raises. See `check_new`."""
    folder = check_new(folder)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        plain = temporary.stat().st_mode & 0o666  # as umask has it; some writers leave files to their owner alone
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(plain)
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary)
        raise


class _Pair(NamedTuple):
    """One layer's LoRA factors, and the Frobenius norms of their error and of the update."""

    A: Tensor
    B: Tensor
    error: float
    norm: float


@torch.no_grad()
def _lora_pair(name: str, layer: AdaptedLinear, rank: int | None) -> _Pair:
    U, V, M = (tensor.detach().to("cpu", torch.float64) for tensor in layer.orthonormal_factors())
    if not bool(torch.isfinite(M).all()):
        raise ValueError(f"the update of {name} contains NaN or infinity: nothing was written")
    dtype = torch.promote_types(layer.first_trained.dtype, torch.float32)
    P, S, Qh = torch.linalg.svd(M)
    root = S[:rank].sqrt()
    B = (U @ (P[:, :rank] * root)).to(dtype)
    A = (root.unsqueeze(1) * (Qh[:rank] @ V.mT)).to(dtype)
    error = norm = 0.0
    for left, b in zip((U @ M).split(ROWS), B.double().split(ROWS), strict=True):
        exact = left @ V.mT
        error += float((b @ A.double() - exact).square().sum())
        norm += float(exact.square().sum())
    return _Pair(A, B, error**0.5, norm**0.5)


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm > 0 else error


def _lora_config(
    ranks: dict[str, int], modules: Iterable[str], base: str | None, saved: list[str]
) -> dict[str, object]:
    """PEFT's adapter_config.json. Its patterns are regular expressions that match the end of a name unless anchored."""
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": _target_modules(list(ranks), modules),
        "modules_to_save": saved or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def _target_modules(names: list[str], modules: Iterable[str]) -> list[str] | str:
    """The names, if no other module's name ends like one of them (PEFT matches suffixes), else an expression."""
    suffixes = tuple(f".{name}" for name in names)
    if any(module.endswith(suffixes) and module not in names for module in modules):
        return "|".join(map(re.escape, names))
    return names


def _merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the base model with W' in place of each adapted W."""
    layers = unsharded_layers(model)
    prefixes = (*(f"{name}." for name in layers), *(f"{name}.parked." for name in saved_modules(model)))
    base = {f"{name}.{key}" for name in layers for key in ("weight", "bias")}
    state = {key: value for key, value in model.state_dict().items() if key in base or not key.startswith(prefixes)}
    for name, layer in layers.items():
        state[f"{name}.weight"] = layer.base_layer.shaped(layer, layer.composed_for_merge(name)).cpu()
    return state


def _copy_companions(source: Path, target: Path) -> None:
    for path in source.iterdir():
        copied = path.is_file() and path.suffix in COMPANIONS and not path.name.endswith(".index.json")
        if copied and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
