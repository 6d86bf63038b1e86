"""Error rates between a model and what training made of it, for SSVD, LoRA and full fine-tuning.

python -m experiments.asr.curves                      child-like and Spanish speech, three seeds
python -m experiments.asr.curves --shifts child --seeds 1

Each training is measured at several strengths alpha, from 0 (the base model) over 1 (as trained) to beyond it:

strength   G = cayley(alpha K) and alpha dSigma, by `set_strength` (SSVD)
weights    W + alpha (W' - W), the plain mean of weights; of LoRA, that is its scaling (all methods)
average    an exponential moving average of what trains, over the steps (all methods, alpha = 1)

Every evaluation is kept under what it depends on (--runs): the same command goes on where it was stopped. Exit status
as of experiments.asr.experiment.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ssvd_kernels as sk
from experiments.asr import DemoError
from experiments.asr.cell import RESULT, Cell, error_rates, fit, shift_of, speech_of
from experiments.asr.commands import exit_status
from experiments.asr.curve_tables import write
from experiments.asr.experiment import UNFINISHED, Runner, where_of
from experiments.asr.fetch import MODEL, default_data, ensure
from experiments.asr.grid import GRIDS, MIDDLE, TUNED, Choice, Grid, Trained, Where, read_rates
from experiments.asr.methods import METHODS, apply, effective_weight
from experiments.asr.recognizer import Recognizer, load_recognizer
from experiments.asr.runfolder import CHECKPOINT, RunFolder, write_atomically, write_json
from experiments.asr.shifts import SHIFTS, parts_of
from experiments.asr.speech import AS_RECORDED
from experiments.asr.train import Diverged

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25)
PLAIN = 0.5  # at which the plain mean of SSVD's weights is measured, too; it differs little from alpha K
DECAY = 0.9  # of the moving average: it reaches back about 10 of 36 steps, and keeps 2 % of the start
RATE = 2.7e-4  # 6.3 / k^2 of SSVD with k = 153
ENGLISH = ("child", "telephone")
AVERAGE = "average.pt"
CHOICES: list[Choice] = [("zero-shot", None), ("ssvd", MIDDLE), ("lora", MIDDLE), ("full", None)]
GRID = replace(GRIDS["reduced"], name="strength", choices=dict.fromkeys(("child", "spanish"), CHOICES))

Weights = dict[str, Tensor]  # of the plain model, by name


class State(NamedTuple):
    """Weights to be measured: how they were found, and at which strength."""

    how: str
    alpha: float
    weights: Weights


class MovingAverage:
    """average <- DECAY average + (1 - DECAY) parameters after each step, from the parameters before the first one."""

    def __init__(self, model: nn.Module) -> None:
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        for name, parameter in self.trained.items():
            self.average[name].lerp_(parameter, 1 - DECAY)


@torch.no_grad()
def plain_weights(model: nn.Module, linears: Sequence[str]) -> Weights:
    """The effective weights of the adapted linear layers, or, without any, every parameter that trains."""
    if linears:
        return {f"{name}.weight": effective_weight(model.get_submodule(name)).clone() for name in linears}
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put(model: nn.Module, weights: Weights) -> None:
    for name, value in weights.items():
        model.get_parameter(name).copy_(value)


def states(cell: Cell, model: nn.Module, linears: Sequence[str], base: Weights, average: Weights) -> Iterator[State]:
    """What is measured of a trained model; it ends with the averaged parameters."""
    trained = plain_weights(model, linears)
    for alpha in ALPHAS:
        if cell.method == "ssvd":
            sk.set_strength(model, alpha)
            yield State("strength", alpha, plain_weights(model, linears))
            sk.set_strength(model, 1.0)
            if alpha != PLAIN:
                continue
        yield State("weights", alpha, {name: base[name].lerp(new, alpha) for name, new in trained.items()})
    put(model, average)
    yield State("average", 1.0, plain_weights(model, linears))


def run_curve(cell: Cell, data: Path, root: Path, until: float | None = None) -> dict[str, Any]:
    """Trains and measures as `run_cell`, but at every strength: {"points": [{"how", "alpha", "scores"}]}."""
    folder = root / cell.key
    where = (cell.shift, data, cell.longest, cell.language, cell.source)
    shift = shift_of(*where)
    device = torch.device(cell.device)
    recognizer, plain = (load_recognizer(cell.model, data, device, shift.language) for _ in range(2))
    model = recognizer.model
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = folder / AVERAGE
    zero_shot = cell.method == "zero-shot"
    # without the average that belongs to it, a checkpoint is of no use
    runs = RunFolder(folder, cell.settings, fresh=not (zero_shot or kept.is_file()))
    if zero_shot:
        found = iter([State("base", 0.0, {})])
    else:
        adapts = METHODS[cell.method].budgeted
        linears = [name for name, m in model.named_modules() if adapts and isinstance(m, nn.Linear)]
        linears = [name for name in linears if f"{name}.weight" in base]  # not the output layer, which is tied
        torch.manual_seed(cell.seed)
        apply(model, cell.method, cell.budget)
        average = MovingAverage(model)
        validation = speech_of("validation", None, *where)
        try:
            fit(cell, recognizer, speech_of("train", None, *where), max(validation.seconds), runs, average, until)
        except Diverged:
            return _finished(folder, {"cell": asdict(cell), "diverged": True})
        if kept.is_file():
            average.average = torch.load(kept, weights_only=True)
        else:
            write_atomically(kept, lambda path: torch.save(average.average, path))
        found = states(cell, model, linears, base, average.average)
    points = []
    for state in found:
        path = folder / f"{state.how}-{state.alpha:g}.json"
        if not path.is_file():
            put(plain.model, state.weights)
            sets = ["test", *(name for name in shift.source if name != AS_RECORDED)]
            scores = {name: _scores(plain, name, cell, where) for name in sets}
            write_json(path, {"how": state.how, "alpha": state.alpha, "scores": scores})
        points.append(json.loads(path.read_text(encoding="utf-8")))
    return _finished(folder, {"cell": asdict(cell), "title": shift.title, "points": points})


def _scores(plain: Recognizer, name: str, cell: Cell, where: tuple[Any, ...]) -> dict[str, Any]:
    shift = shift_of(*where)
    if name == "test":
        plain.set_language(shift.language, shift.accents)
    else:
        plain.set_language("en")
    return error_rates(plain, speech_of(name, cell.limit, *where))


def _finished(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    write_json(folder / RESULT, result)
    for name in (CHECKPOINT, AVERAGE):
        (folder / name).unlink(missing_ok=True)
    return result


def cells(grid: Grid, rates: Mapping[Trained, float], where: Where) -> list[Cell]:
    """LoRA and full fine-tuning at tuned rates, SSVD at RATE, too: first on English shifts, elsewhere at the end."""
    first, last = [], []
    for seed in range(grid.seeds):
        for shift, choices in grid.choices.items():
            for method, budget in choices:
                if method == "zero-shot" and seed:
                    continue
                lrs = [rates.get((shift, method, budget), 0.0)]
                if method == "ssvd":
                    lrs = [RATE, *lrs] if shift in ENGLISH else [*lrs, RATE]
                made = [grid.cell((shift, method, budget), seed, lr, where) for lr in lrs]
                first.append(made[0])
                last += made[1:]
    return [replace(cell, measure="curve", amp=False) for cell in first + last]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.asr.curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shifts", nargs="+", choices=SHIFTS, default=list(GRID.choices), help="default: child spanish")
    add("--seeds", type=int, default=GRID.seeds, help="number of seeds (default: %(default)s)")
    add("--limit", type=int, help="measure only the first N recordings of each set")
    add("--data", type=Path, default=default_data(), help="data folder (default: $SSVD_DATA or ./data)")
    add("--runs", type=Path, default=Path("runs/asr-curves"), help="folder of the cells (default: %(default)s)")
    add(
        "--out", type=Path, default=Path("runs/asr-strength"), help="folder of tables and figure (default: %(default)s)"
    )
    add("--minutes", type=float, help="begin nothing new, and stop training, after this time; the same command goes on")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    grid = replace(GRID, choices=dict.fromkeys(args.shifts, CHOICES), seeds=args.seeds, limit=args.limit)
    ensure(args.data, tuple(dict.fromkeys([*(part for shift in args.shifts for part in parts_of(shift)), MODEL])))
    runner = Runner(args.data, args.runs, 1, args.minutes, run_curve)
    wanted = cells(grid, read_rates(grid, TUNED), where_of(grid, args.data, "cpu"))
    found = runner(wanted, "curves")
    if found:
        print(write(list(found.values()), args.out))
    print(f"{len(found)} of {len(wanted)} cells; tables and figure: {args.out}")
    if runner.failed:
        raise DemoError("; ".join(f"{cell}: {error}" for cell, error in runner.failed.items()))
    return 0 if len(found) == len(wanted) else UNFINISHED


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
