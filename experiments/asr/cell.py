"""One cell of the experiment: a method at a budget on a domain shift with a seed, trained and measured."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import ssvd_kernels as sk
from experiments.asr.methods import Applied, apply, effective_weight, orthogonality_error
from experiments.asr.recognizer import Recognizer, load_recognizer
from experiments.asr.runfolder import CHECKPOINT, RunFolder, short_hash, write_json
from experiments.asr.shifts import Shift, load_shift
from experiments.asr.speech import AS_RECORDED, Speech
from experiments.asr.train import Diverged, History, Recipe, Watch, batch_indices, cross_entropy, train

VERSION = 1  # of how cells are trained and measured; another one computes all of them again
SPECTRA = ("model.encoder.layers.3.self_attn.q_proj", "model.encoder.layers.3.fc1", "model.decoder.layers.3.fc2")
HEARD = 14.0  # seconds (and silence) that the encoder hears at least in measuring; in windows of 10 s the untrained
# tiny.en repeats itself on some clips, in 7 s on more
TRAINED = 9.0  # the same in training
RECORDED = 24  # English prompts at most that are measured as recorded, to save time
WATCHED = 16  # clips at most of the validation loss
LOOKS = 3  # at the validation loss and at the rotations, in the course of training
MEMORY_STEPS = 2  # of training when its memory is measured
RESULT = "result.json"


@dataclass(frozen=True)
class Cell:
    """What a result depends on.

    measure: error rates on "test" speech (to report) or on "validation" speech (to tune), of clips <= `longest` s; only
    the cross-entropy, "loss", on all validation speech; the "memory" of a few steps, in a process of its own; SSVD's
    "gradient" on as many batches, without training (see `_gradient_sums`); or the error rates on "test" speech at
    several strengths, a "curve" (curves.py). contents: a hash of the weights and the speech, which may change under the
    same names.
    """

    shift: str
    method: str
    budget: float | None  # share of the model's parameters; None: all, or none
    seed: int
    lr: float
    steps: int
    batch: int
    longest: float
    measure: str = "test"
    limit: int | None = None  # clips of each measured set
    language: str = "en"  # of a manifest
    source: bool = True  # whether to measure the source domain
    model: str | None = None
    device: str = "cpu"
    contents: str = ""
    rank: int | None = None  # of SSVD in every layer, instead of a budget
    window: float = TRAINED  # seconds (and silence) that the encoder hears at least in training
    amp: bool = True  # bfloat16 autocast, which takes longer than float32 on a CPU without AVX-512
    by_spectrum: bool = False  # whether each layer's learning rate is inverse to the mean of its singular values

    @property
    def settings(self) -> dict[str, Any]:
        """What is not the default: a field added later leaves earlier cells as they are."""
        changed = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        return {"version": VERSION, **changed}

    @property
    def key(self) -> str:
        return short_hash(self.settings)

    def __str__(self) -> str:
        budget = f" k={self.rank}" if self.rank else "" if self.budget is None else f" {self.budget:.2%}"
        what = "memory" if self.measure == "memory" else f"seed {self.seed} lr {self.lr:.1e}"
        return f"{self.shift} {self.method}{budget} {what}"


@lru_cache(maxsize=8)
def shift_of(name: str, data: Path, longest: float, language: str, source: bool) -> Shift:
    return load_shift(name, data, longest, language, source)


@lru_cache(maxsize=64)
def speech_of(part: str, limit: int | None, *where: Any) -> Speech:
    found = shift_of(*where)
    clips = {"train": found.train, "validation": found.validation, "test": found.test, **found.source}[part]
    return Speech(clips[:limit], part)


def run_cell(cell: Cell, data: Path, root: Path, until: float | None = None) -> dict[str, Any]:
    """Trains and measures; the result is kept in the cell's folder under `root`, where training resumes if interrupted.

    Training that diverged is a result, too: {"diverged": True}.
    until: the time (of time.time()) after which training stops with a checkpoint and raises Interrupted.
    """
    folder = root / cell.key
    device = torch.device(cell.device)
    where = (cell.shift, data, cell.longest, cell.language, cell.source)
    shift = shift_of(*where)
    training = speech_of("train", None, *where)
    validation = speech_of("validation", min(cell.limit or WATCHED, WATCHED), *where)
    memory = _Memory(device)
    recognizer = load_recognizer(cell.model, data, device, shift.language)
    runs = RunFolder(folder, cell.settings, fresh=cell.measure == "memory")
    model = recognizer.model
    base = {name: effective_weight(model.get_submodule(name)) for name in SPECTRA} if _draws_spectra(cell) else {}
    total = sum(parameter.numel() for parameter in model.parameters())
    torch.manual_seed(cell.seed)
    applied = apply(model, cell.method, cell.budget, cell.rank)
    if cell.measure == "gradient":
        recognizer.fit_window(max(cell.window, *training.seconds))
        return _cached(folder, {"cell": asdict(cell), "sums": _gradient_sums(recognizer, training, cell)})
    history = History()
    if cell.method != "zero-shot":
        watch = None if cell.measure in ("memory", "loss") else _Watch(recognizer, validation, cell.steps, cell.amp)
        try:
            groups = _inverse_to_spectrum(model, cell.lr) if cell.by_spectrum else None
            history = fit(cell, recognizer, training, max(validation.seconds), runs, watch, until, groups)
        except Diverged:
            return _cached(folder, {"cell": asdict(cell), "diverged": True})
    if cell.measure == "memory":
        return _cached(folder, {"cell": asdict(cell), "peak_bytes": memory.peak()})
    if cell.measure == "loss":
        loss = validation_loss(recognizer, speech_of("validation", cell.limit, *where), cell.amp)
        spent = {"losses": history.losses, "seconds": history.seconds, "machine": _machine()}
        return _cached(folder, {"cell": asdict(cell), "loss": loss, "trainable": applied.trainable, **spent})
    written = _written(applied) if cell.method != "zero-shot" else 0
    applied.merge()  # as a user would to transcribe: every method at the same speed
    names = ["validation"] if cell.measure == "validation" else ["test", *shift.source]
    scores = {}
    for name in names:
        if name in shift.source:
            recognizer.set_language("en")
        else:
            recognizer.set_language(shift.language, shift.accents)
        limit = min(cell.limit or RECORDED, RECORDED) if name == AS_RECORDED else cell.limit
        scores[name] = error_rates(recognizer, speech_of(name, limit, *where))
    result = {
        "cell": asdict(cell),
        "title": shift.title,
        "trainable": applied.trainable,
        "total": total,
        "ranks": applied.ranks,
        "adapter_bytes": written,
        "seconds": history.seconds,
        "losses": history.losses,
        "watched": history.watched,
        "scores": scores,
        "spectra": {name: _spectrum(model.get_submodule(name), weight) for name, weight in base.items()},
        "machine": _machine(),
        "finished": time.strftime("%Y-%m-%d"),
    }
    return _cached(folder, result)


def fit(
    cell: Cell,
    recognizer: Recognizer,
    training: Speech,
    longest: float,
    folder: RunFolder,
    watch: Watch | None,
    until: float | None,
    groups: list[dict[str, Any]] | None = None,
) -> History:
    """Trains by the cell's recipe, in a window that also fits clips of `longest` seconds."""
    recognizer.fit_window(max(cell.window, longest, *training.seconds))
    recipe = Recipe(cell.steps, cell.batch, cell.lr, seed=cell.seed, amp=cell.amp, checkpoint_every=cell.steps)
    return train(recognizer, training, recipe, folder, watch, until, groups)


def _gradient_sums(recognizer: Recognizer, training: Speech, cell: Cell) -> list[float]:
    """At k = 1 to cell.rank: the sum of |dL / d theta| over entries and layers, before training, L over all batches.

    The gradient at a lower rank is a part of that at a higher one: theta is zero.
    """
    recognizer.model.train()
    for step in range(cell.steps):
        chosen = batch_indices(len(training), cell.batch, step, cell.seed)
        cross_entropy(recognizer, training, chosen, cell.amp).backward()
    sizes = sum(layer.theta.grad.abs().double() for layer in sk.ssvd_layers(recognizer.model).values())
    column = torch.triu_indices(cell.rank, cell.rank, 1, device=sizes.device)[1]
    return torch.bincount(column, sizes, cell.rank).cumsum(0).tolist()


def _inverse_to_spectrum(model: torch.nn.Module, lr: float) -> list[dict[str, Any]]:
    """A group for each layer, at a rate inverse to the mean of its top k singular values, of geometric mean `lr`."""
    layers = list(sk.ssvd_layers(model).values())
    logs = torch.stack([layer.sigma.mean() for layer in layers]).log()
    rates = lr * (logs.mean() - logs).exp()
    return [{"params": list(a.adapter().values()), "lr": rate} for a, rate in zip(layers, rates.tolist(), strict=True)]


def _machine() -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def _cached(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    write_json(folder / RESULT, result)
    (folder / CHECKPOINT).unlink(missing_ok=True)  # of full fine-tuning: hundreds of megabytes
    return result


def _draws_spectra(cell: Cell) -> bool:
    return cell.seed == 0 and cell.measure == "test" and cell.model is None and cell.method != "zero-shot"


class _Watch:
    """Looks at the validation loss and at the rotations' distance from orthogonality, LOOKS times in a training."""

    def __init__(self, recognizer: Recognizer, validation: Speech, steps: int, amp: bool) -> None:
        self.recognizer, self.validation, self.amp = recognizer, validation, amp
        self.every = max(1, steps // LOOKS)

    def __call__(self, step: int) -> dict[str, float] | None:
        if step % self.every:
            return None
        seen = {"validation loss": validation_loss(self.recognizer, self.validation, self.amp)}
        error = orthogonality_error(self.recognizer.model)
        return seen if error is None else {**seen, "orthogonality error": error}


@torch.no_grad()
def validation_loss(recognizer: Recognizer, speech: Speech, amp: bool = True) -> float:
    """Cross-entropy in nats per token, of all clips in one batch."""
    recognizer.model.eval()
    loss = cross_entropy(recognizer, speech, list(range(len(speech))), amp)
    recognizer.model.train()
    return float(loss)


def error_rates(recognizer: Recognizer, speech: Speech) -> dict[str, Any]:
    """Transcripts, and what they get wrong, of each utterance and together."""
    recognizer.fit_window(max(HEARD, *speech.seconds))
    transcripts = recognizer.transcribe(speech, "transcribing", batch=8)  # of 32 takes a quarter longer on a CPU
    score = recognizer.score(speech.texts, transcripts)
    rates = {name: getattr(score, name) for name in ("errors", "words", "wer", "cer")}
    return {**rates, **asdict(score), "transcripts": transcripts}


def _written(applied: Applied) -> int:
    with tempfile.TemporaryDirectory() as name:
        return applied.save(Path(name))


def _spectrum(linear: torch.nn.Module, base: torch.Tensor) -> dict[str, list[float]]:
    adapted = effective_weight(linear)
    return {
        "before": torch.linalg.svdvals(base.double()).tolist(),
        "after": torch.linalg.svdvals(adapted.double()).tolist(),
    }


class _Memory:
    """The most memory held: by this process since it began (Linux), or on the GPU since this was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            gc.collect()
            torch.cuda.reset_peak_memory_stats(device)

    def peak(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")  # getrusage would count the memory of the process that started this one
        lines = status.read_text().splitlines() if status.is_file() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
