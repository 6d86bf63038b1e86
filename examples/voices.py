"""Eight voices at once: one run trains an adapter for each of them, over one Whisper, in batches of all voices.

    python -m examples.voices            # the real Whisper tiny.en
    python -m examples.voices --smoke    # two steps, two clips of each voice to measure

The voices are one reader's, with pitch and formants shifted by eight factors. All adapters share U and V, and each row
of a batch trains the one of its own voice. Then every adapter hears every voice: a table and a picture of error rates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch.nn.utils import clip_grad_norm_

import ssvd_kernels as sk
from experiments.asr import figures, progress
from experiments.asr.cell import HEARD
from experiments.asr.commands import exit_status
from experiments.asr.fetch import ASTERISK, MODEL, default_data, ensure
from experiments.asr.recognizer import Recognizer, load_recognizer
from experiments.asr.runfolder import RunFolder, short_hash, write_atomically, write_json
from experiments.asr.shifts import CACHE
from experiments.asr.speech import Clip, Speech, english_prompts, split
from experiments.asr.train import Recipe, batch_indices, cross_entropy

FACTORS = (0.6, 0.65, 0.7, 1.45, 1.55, 1.65, 1.75, 1.85)  # of pitch and formants
NAMES = [f"x{100 * factor:.0f}" for factor in FACTORS]
LONGEST = 5.0  # seconds
TRAINED = "trained.json"  # written last

Rates = list[list[float]]  # WER in per cent: of each adapter, and last of the base model, on each voice


def gather(data: Path, steps: int, count: int) -> tuple[Speech, Speech]:
    """(to train on: of each step a clip of each voice, to measure: `count` texts by each voice); no text is in both."""

    def spoken(clip: Clip, factor: float) -> Clip:
        return replace(clip, voice=factor, cache=data / CACHE)

    rest, test = split(clip for clip in english_prompts(data) if clip.duration() <= LONGEST)
    batches = (batch_indices(len(rest), len(FACTORS), step, seed=0) for step in range(steps))
    trained = [spoken(rest[i], factor) for batch in batches for i, factor in zip(batch, FACTORS, strict=True)]
    held_out = [spoken(clip, factor) for factor in FACTORS for clip in test[:count]]
    return Speech(trained, "reading batches"), Speech(held_out, "reading test")


def fit(recognizer: Recognizer, bank: sk.AdapterBank, speech: Speech, recipe: Recipe, folder: Path) -> None:
    """Trains the adapters of all voices and writes them."""
    recognizer.fit_window(LONGEST)
    recognizer.model.train()
    own = {name: bank.trainable([name]) for name in NAMES}
    optimizer = torch.optim.AdamW(bank.trainable(NAMES), lr=recipe.lr, weight_decay=0.0)
    losses, began = [], time.process_time()
    bar = progress(range(recipe.steps), desc="fine-tuning", unit="step")
    for step in bar:
        first = step * len(NAMES)
        with bank.rows(NAMES):
            loss = cross_entropy(recognizer, speech, list(range(first, first + len(NAMES))))
        (len(NAMES) * loss).backward()  # the mean over rows, of which each adapter has one
        for parameters in own.values():  # one by one, as in runs of their own
            clip_grad_norm_(parameters, recipe.clip, error_if_nonfinite=True)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    for name in NAMES:
        bank.save(name, folder / f"{name}.safetensors")
        bank.remove(name)
    write_json(folder / TRAINED, {"seconds": time.process_time() - began, "losses": losses})


def measure(recognizer: Recognizer, bank: sk.AdapterBank, speech: Speech, folder: RunFolder) -> Rates:
    """Every adapter, and the base model, on every voice."""
    recognizer.fit_window(HEARD)
    count = len(speech) // len(FACTORS)
    key, rates = {"speech": speech.fingerprint}, []
    for adapter in (*NAMES, None):
        what = adapter or "base"
        with bank.rows([adapter]):
            heard = folder.transcripts(what, key, lambda what=what: recognizer.transcribe(speech, what, batch=8))
        voices = [slice(i, i + count) for i in range(0, len(speech), count)]
        rates.append([100 * recognizer.score(speech.texts[voice], heard[voice]).wer for voice in voices])
    return rates


def table(rates: Rates) -> str:
    """Markdown."""
    base = rates[-1]
    lines = ["| held-out speech, WER % | base | own adapter | mean of the others' adapters |", "|---|---:|---:|---:|"]
    columns = list(zip(*rates[:-1], strict=True))  # of each voice
    own = [column[i] for i, column in enumerate(columns)]
    others = [statistics.fmean(column[:i] + column[i + 1 :]) for i, column in enumerate(columns)]
    voices = [f"voice x {factor}" for factor in FACTORS]
    for title, *cells in (*zip(voices, base, own, others), ("mean", *map(statistics.fmean, (base, own, others)))):
        lines.append(f"| {title} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def picture(rates: Rates) -> Figure:
    figure, panel = plt.subplots(figsize=(7.2, 6.6), layout="constrained")
    image = panel.imshow(rates, cmap="cividis_r", norm=PowerNorm(0.5, vmin=0))  # most differ at the low end
    for row, of_adapter in enumerate(rates):
        for column, rate in enumerate(of_adapter):
            dark = image.norm(rate) > 0.5
            panel.text(column, row, f"{rate:.0f}", ha="center", va="center", color="white" if dark else "black")
    voices = [f"x {factor}" for factor in FACTORS]
    panel.set_xticks(range(len(FACTORS)), voices)
    panel.set_yticks(range(len(rates)), [*voices, "base"])
    panel.axhline(len(FACTORS) - 0.5, color="white", linewidth=4)
    panel.set(xlabel="voice", ylabel="adapter trained on")
    panel.set_title("Word error rate, %: every adapter on every voice", fontsize=13, fontweight="bold")
    return figure


def run(options: argparse.Namespace) -> int:
    steps, count = (2, 2) if options.smoke else (options.steps, options.clips)
    ensure(options.data, (MODEL, ASTERISK))
    recipe = Recipe(steps, len(FACTORS))
    trained, held_out = gather(options.data, steps, count)
    recognizer = load_recognizer(None, options.data, torch.device("cpu"))
    settings = {**vars(recipe), "speech": trained.fingerprint, "model": recognizer.fingerprint}
    folder = RunFolder(options.out / short_hash(settings), settings)

    print(sk.inject(recognizer.model, sk.SSVDConfig(ratio=0.4)))
    bank = sk.AdapterBank(recognizer.model)
    if not (folder.path / TRAINED).is_file():
        fit(recognizer, bank, trained, recipe, folder.path)
    recognizer.model.eval()
    for name in NAMES:
        bank.add(name, folder.path / f"{name}.safetensors")
    rates = measure(recognizer, bank, held_out, folder)
    fitting = json.loads((folder.path / TRAINED).read_text())["seconds"]
    texts = held_out.texts[: len(held_out) // len(FACTORS)]
    said = sum(len(recognizer.normalise(text).split()) for text in texts)
    text = table(rates) + (
        f"\n{steps} steps of {len(FACTORS)} clips, one of each voice, in {fitting:.0f} s of CPU time; measured on "
        f"{len(texts)} clips ({said} words) of each voice.\n"
    )
    write_atomically(options.out / "table.md", lambda path: path.write_text(text, encoding="utf-8"))
    figures.save(options.out / "voices.png", picture(rates))
    print(f"{text}\n{time.process_time():.0f} s of CPU time, this time")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.voices", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two steps, two clips of each voice to measure")
    parser.add_argument("--steps", type=int, default=40, help="of a clip of each voice (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=10, help="of each voice to measure (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=default_data(), help="data folder (default: $SSVD_DATA or ./data)")
    parser.add_argument("--out", type=Path, default=Path("runs/voices"), help="default: %(default)s")
    options = parser.parse_args(argv)
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
