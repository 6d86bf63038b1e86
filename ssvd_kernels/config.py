"""Configurations: which layers to adapt, at what rank, on which side and with which rotation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

Side = Literal["input", "output", "smaller", "both"]
Rotation = Literal["cayley", "linear", "free", "banded"]
Form = Literal["weight", "activation", "auto"]
BasisDtype = Literal["auto", "float32", "bfloat16", "float16"]
SIDES, ROTATIONS, FORMS, BASIS_DTYPES = map(get_args, (Side, Rotation, Form, BasisDtype))
Method = Literal["ssvd", "ssvd-o", "svft", "spectralft", "lora", "dora", "pissa", "vera", "oft", "psoft"]
Allocation = Literal["uniform", "spectrum"]
METHODS, ALLOCATIONS = get_args(Method), get_args(Allocation)

_FC = ["fc1", "fc2"]
_DENSE = ["intermediate_dense", "output_dense"]
_BART = ["q_proj", "k_proj", "v_proj", "out_proj"]
_O_PROJ = ["q_proj", "k_proj", "v_proj", "o_proj"]
_LLAMA = [*_O_PROJ, "gate_proj", "up_proj", "down_proj"]
_CONFORMER = ["linear_q", "linear_k", "linear_v", "linear_out", "linear_pos"]
PRESETS: dict[str, list[str]] = {  # by transformers' model types, which PEFT looks up, where it has the model
    "whisper": [*_BART, *_FC, "query", "key", "value", "out", "mlp.0", "mlp.2"],  # then OpenAI's names
    "wav2vec2": [*_BART, *_DENSE],
    "hubert": [*_BART, *_DENSE],
    "wavlm": [*_BART, *_DENSE],
    "speecht5": [*_BART, *_DENSE],
    "wav2vec2-conformer": [*_CONFORMER, *_DENSE],
    "wav2vec2-bert": [*_CONFORMER, *_DENSE],
    "seamless_m4t": [*_CONFORMER, *_DENSE, *_BART, *_FC],
    "seamless_m4t_v2": [*_CONFORMER, *_DENSE, *_BART, *_FC],
    "parakeet": [*_O_PROJ, "relative_k_proj", "linear1", "linear2"],
    "moonshine": [*_O_PROJ, *_FC],
    "qwen2_audio": [*_BART, *_FC, *_LLAMA],
    "voxtral": [*_BART, *_FC, *_LLAMA],
    "granite_speech": ["to_q", "to_kv", "to_out", "query", "key", "value", "dense", *_LLAMA],
    "espnet": [*_CONFORMER, "w_1", "w_2", "channel_proj1.0", "channel_proj2", "merge_proj"],
    "speechbrain": ["out_proj", "linear_pos", "ffn.0", "ffn.3", "after_conv.2"],
    "ecapa": [  # convolutions of kernel 1
        *("tdnn1.conv.conv", "tdnn2.conv.conv", "se_block.conv1.conv", "se_block.conv2.conv", "shortcut.conv"),
        *("mfa.conv.conv", "asp.tdnn.conv.conv", "asp.conv.conv", "fc.conv"),
    ],
}


def check_choice(argument: str, value: object, allowed: Collection[str]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_rank(argument: str, rank: int, d_in: int, d_out: int) -> int:
    """Returns `rank`. Raises ValueError unless 1 <= rank <= min(d_in, d_out)."""
    if not 1 <= rank <= min(d_in, d_out):
        raise ValueError(
            f"`{argument}` must be between 1 and {min(d_in, d_out)} for a weight of shape ({d_out}, {d_in}), got {rank}"
        )
    return rank


def check_strength(strength: float) -> float:
    """Returns `strength`. Raises ValueError unless it is a number between 0 and 1.5."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1.5:
        raise ValueError(f"`strength` must be a number between 0 and 1.5, got {strength!r}")
    return float(strength)


class _Configuration:
    """What the configurations of all methods share: which modules they concern, and conversion to plain values."""

    targets: str | Sequence[str]
    exclude: str | Sequence[str]
    modules_to_save: Sequence[str]

    def _check_targets(self) -> None:
        for argument in ("targets", "exclude", "modules_to_save"):
            object.__setattr__(self, argument, check_names(argument, getattr(self, argument)))
        if not self.targets:
            raise ValueError(
                "`targets` must not be empty: pass 'all-linear', a preset, module-name suffixes or a regular "
                f"expression, got {self.targets!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values; the class called with `**d` restores it."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


@dataclass(frozen=True)
class SSVDConfig(_Configuration):
    """Configuration of SSVD (arXiv 2509.02830) for `inject` and `SSVDLinear.from_linear`.

    rank, ratio      adapted rank k, or k = int(min(d_in, d_out) * ratio); exactly one of them.
    side             "input" rotates the right singular vectors (the paper), "output" the left ones, "smaller" the
                     input side if d_out >= d_in, else the output side (ESPnet's rule), "both" each with its own
                     rotation (our reading of the abstract of SSVD-O, arXiv 2601.12600).
    rotation         "cayley" G = (I-K)(I+K)^-1, orthogonal; "linear" I - 2K, its first-order map (not orthogonal);
                     "free" any k x k matrix (k^2 parameters); "banded" no rotation but SVFT (arXiv 2405.19597),
                     W' = U (Sigma + M) V^T with M zero beyond `band` off-diagonals on each side.
    rank_out, ratio_out   rank of the output rotation, only for side="both" (default: as rank or ratio).
    targets          "all-linear" | a preset, the name of a family of models (`PRESETS`)
                     | list of module-name suffixes | regular expression matched against the full module name.
    exclude          modules to leave alone: list of suffixes or a regular expression.
    band             0 <= band < k, for rotation="banded" alone, which requires it; ratio=1.0 is the paper's SVFT.
    modules_to_save  suffixes of modules that train whole beside the adapted layers, such as a new head or norms: part
                     of the adapter wherever it is saved, loaded, switched or disabled. Targets leave them out.
    form             how the same W' is computed: "weight" W + U M V^T, "activation" W (I + V C V^T), which keeps one
                     basis instead of two and no second weight and serves any base (see `ActivationForm`), "auto" the
                     activation form where only it can serve, and over bases whose weight alone is quantised.
    basis_dtype      of the basis that the activation form keeps: "float32", "bfloat16", "float16", or "auto", bfloat16
                     over half-precision and quantised bases and float32 (float64) over others.

    Raises ValueError or TypeError naming the argument, its value and what is allowed.
    """

    method: ClassVar[str] = "SSVD"

    rank: int | None = None
    ratio: float | None = None
    side: Side = "input"
    rotation: Rotation = "cayley"
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    rank_out: int | None = None
    ratio_out: float | None = None
    band: int | None = None
    modules_to_save: Sequence[str] = ()
    form: Form = "auto"
    basis_dtype: BasisDtype = "auto"

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.ratio is None):
            raise ValueError(f"give exactly one of `rank` and `ratio`, got rank={self.rank}, ratio={self.ratio}")
        _check_amount("rank", self.rank, "ratio", self.ratio)
        check_choice("side", self.side, SIDES)
        check_choice("rotation", self.rotation, ROTATIONS)
        self._check_band()
        if self.rank_out is not None or self.ratio_out is not None:
            if self.side != "both":
                raise ValueError(f"`rank_out` and `ratio_out` require side='both', got side={self.side!r}")
            if self.rank_out is not None and self.ratio_out is not None:
                raise ValueError(
                    "give at most one of `rank_out` and `ratio_out`, "
                    f"got rank_out={self.rank_out}, ratio_out={self.ratio_out}"
                )
            _check_amount("rank_out", self.rank_out, "ratio_out", self.ratio_out)
        check_choice("form", self.form, FORMS)
        check_choice("basis_dtype", self.basis_dtype, BASIS_DTYPES)
        if self.form == "weight" and self.basis_dtype != "auto":
            raise ValueError(
                "`basis_dtype` must be left at 'auto' for form='weight', whose bases are in float32 at least, "
                f"got {self.basis_dtype!r}"
            )
        self._check_targets()

    def _check_band(self) -> None:
        if self.rotation != "banded":
            if self.band is not None:
                raise ValueError(f"`band` requires rotation='banded', got {self.band!r} for {self.rotation!r}")
            return
        check_integer("band", self.band, 0, " for rotation='banded'")
        if self.side != "input":
            raise ValueError(
                f"`side` must be left at its default 'input' for rotation='banded', got {self.side!r}: "
                "M lies between the singular vectors and belongs to neither side"
            )

    def resolve_side(self, d_in: int, d_out: int) -> Side:
        """The side used for a weight of shape (d_out, d_in): "smaller" becomes "input" or "output"."""
        if self.side == "smaller":
            return "input" if d_out >= d_in else "output"
        return self.side

    def resolve_ranks(self, d_in: int, d_out: int) -> tuple[int, int | None]:
        """(k of the input rotation, k of the output rotation or None) for a weight of shape (d_out, d_in)."""
        k = _resolve("rank", self.rank, "ratio", self.ratio, d_in, d_out)
        if self.band is not None and self.band >= k:
            raise ValueError(
                f"`band` must be between 0 and {k - 1} for k={k} and a weight of shape ({d_out}, {d_in}), "
                f"got {self.band}"
            )
        if self.side != "both":
            return k, None
        if self.rank_out is None and self.ratio_out is None:
            return k, k
        return k, _resolve("rank_out", self.rank_out, "ratio_out", self.ratio_out, d_in, d_out)

    def triplets(self, d_in: int, d_out: int) -> int:
        """How many singular triplets of a weight of shape (d_out, d_in) are adapted. Raises as `resolve_ranks`."""
        k_in, k_out = self.resolve_ranks(d_in, d_out)
        return max(k_in, k_out or 0)


@dataclass(frozen=True)
class SpectralFTConfig(_Configuration):
    """Configuration of SpectralFT (arXiv 2501.03829) for `inject` and `SpectralFTLinear.from_linear`.

    top                how many of the largest singular triplets change, p <= min(d_in, d_out).
    rank               rank r <= p of the change of their left and of their right vectors.
    targets, exclude, modules_to_save   as in `SSVDConfig`.

    Raises ValueError or TypeError naming the argument, its value and what is allowed.
    """

    method: ClassVar[str] = "SpectralFT"

    top: int = 256
    rank: int = 16
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        for argument in ("top", "rank"):
            check_integer(argument, getattr(self, argument))
        if self.rank > self.top:
            raise ValueError(f"`rank` must be an integer between 1 and `top`, got rank={self.rank}, top={self.top}")
        self._check_targets()

    def triplets(self, d_in: int, d_out: int) -> int:
        """How many singular triplets of a weight of shape (d_out, d_in) change. Raises ValueError if it has fewer."""
        return check_rank("top", self.top, d_in, d_out)


Config = SSVDConfig | SpectralFTConfig


def check_names(argument: str, value: str | Sequence[str]) -> str | tuple[str, ...]:
    """A string as it is, but for `modules_to_save`, and a list of module-name suffixes as a tuple. Raises TypeError for
    anything else."""
    listed = argument == "modules_to_save"
    if isinstance(value, str) and not listed:
        return value
    names = isinstance(value, Sequence) and not isinstance(value, str)
    if not names or not all(isinstance(item, str) and item for item in value):
        kinds = "a list" if listed else "a string or a list"
        raise TypeError(f"`{argument}` must be {kinds} of module-name suffixes, got {value!r}")
    return tuple(value)


def check_integer(argument: str, value: object, least: int = 1, condition: str = "") -> None:
    """Raises TypeError or ValueError unless `value` is an integer >= `least`; the message ends in `condition`."""
    message = f"`{argument}` must be an integer >= {least}{condition}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message)
    if value < least:
        raise ValueError(message)


def _check_amount(rank_name: str, rank: int | None, ratio_name: str, ratio: float | None) -> None:
    if rank is not None:
        check_integer(rank_name, rank)
    if ratio is not None:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
            raise TypeError(f"`{ratio_name}` must be a number in (0, 1], got {ratio!r}")
        if not (math.isfinite(ratio) and 0 < ratio <= 1):
            raise ValueError(f"`{ratio_name}` must be a number in (0, 1], got {ratio}")


def _resolve(rank_name: str, rank: int | None, ratio_name: str, ratio: float | None, d_in: int, d_out: int) -> int:
    if rank is not None:
        return check_rank(rank_name, rank, d_in, d_out)
    assert ratio is not None
    k = int(min(d_in, d_out) * ratio)
    if k < 1:
        raise ValueError(
            f"`{ratio_name}` must be at least {1 / min(d_in, d_out):.4g} for a weight of shape ({d_out}, {d_in}), "
            f"got {ratio}, which gives rank 0"
        )
    return k
