"""Trains a speaker encoder on crops of training speakers, and embeds whole recordings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from experiments.asr import DemoError, progress
from experiments.asr.audio import RATE, Samples
from experiments.asr.recognizer import POSITIONS_PER_SECOND, Recognizer
from experiments.speaker.model import HEAD_LR, AAMSoftmax, SpeakerEncoder

SPEEDS = (0.9, 1.0, 1.1)  # each makes other speakers of all of them (Yamamoto et al., Interspeech 2019)
HEARD = 3  # seconds of a recording that count in a comparison


@dataclass(frozen=True)
class Recipe:
    """AdamW without weight decay, linear warm-up over a tenth of the steps, then linear decay to 0."""

    steps: int = 20
    batch: int = 8
    crop: int = 2  # seconds
    head_lr: float = HEAD_LR
    clip: float = 1.0

    def factor_at(self, step: int) -> float:
        warm_up = max(1, self.steps // 10)
        return min((step + 1) / warm_up, (self.steps - step) / max(1, self.steps - warm_up))


def at_speed(samples: Samples, factor: float) -> Samples:
    """Samples played `factor` times as fast, pitch and formants along with it; made for speech well below RATE / 2."""
    if factor == 1.0:
        return samples
    places = np.arange(0, len(samples) - 1, factor)
    return np.interp(places, np.arange(len(samples)), samples).astype(np.float32)


def at_speeds(voices: Sequence[Sequence[Samples]]) -> list[list[Samples]]:
    """The recordings of each class: every voice at the first speed, then at the next."""
    return [[at_speed(samples, factor) for samples in recordings] for factor in SPEEDS for recordings in voices]


def draw(voices: Sequence[Sequence[Samples]], recipe: Recipe, step: int, seed: int) -> tuple[list[Samples], list[int]]:
    """One step's crops and their classes, by (seed, step) alone; no class comes twice while others are left."""
    random = np.random.default_rng([seed, step])
    classes = len(voices) * len(SPEEDS)
    order = [int(c) for c in random.permutation(classes)]
    chosen = [order[i % classes] for i in range(recipe.batch)]
    crops = []
    for label in chosen:
        speed, voice = divmod(label, len(voices))
        samples = at_speed(voices[voice][int(random.integers(len(voices[voice])))], SPEEDS[speed])
        start = int(random.integers(max(1, len(samples) - recipe.crop * RATE + 1)))
        crops.append(samples[start : start + recipe.crop * RATE])
    return crops, chosen


def encode(recognizer: Recognizer, pieces: Sequence[Samples], function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`function` of the features and of the numbers of encoder frames that the pieces fill."""
    most = int(recognizer.window * POSITIONS_PER_SECOND)
    filled = [min(most, max(1, len(piece) * POSITIONS_PER_SECOND // RATE)) for piece in pieces]
    return function(recognizer.features(pieces), torch.tensor(filled, device=recognizer.device))


@torch.no_grad()
def embed(
    recognizer: Recognizer,
    recordings: dict[str, Samples],
    function: Callable[[Tensor, Tensor], Tensor],
    desc: str,
    batch: int = 16,
) -> dict[str, Tensor]:
    """Recording -> `function` of its first HEARD seconds, a vector on the CPU."""
    recognizer.set_window(HEARD)
    names = sorted(recordings)
    found: dict[str, Tensor] = {}
    with progress(total=len(names), desc=desc, unit="clip") as bar:
        for start in range(0, len(names), batch):
            chosen = names[start : start + batch]
            pieces = [recordings[name][: HEARD * RATE] for name in chosen]
            found.update(zip(chosen, encode(recognizer, pieces, function).cpu()))
            bar.update(len(chosen))
    return found


def train(
    recognizer: Recognizer,
    model: SpeakerEncoder,
    voices: Sequence[Sequence[Samples]],
    centroids: Tensor,
    recipe: Recipe,
    lr: float,
    seed: int,
    desc: str,
) -> tuple[list[float], list[float]]:
    """Trains what requires gradients: the encoder's adapter at `lr`, the rest at the recipe's.

    centroids: the mean embedding (classes, 2 d) of each class of `at_speeds`. Returns (loss, seconds) of each step.
    Raises DemoError if the loss is no longer finite.
    """
    loss_of = AAMSoftmax(centroids).to(recognizer.device)
    adapter = [p for p in model.encoder.parameters() if p.requires_grad]
    head = [model.layer_weights, *model.projection.parameters(), *loss_of.parameters()]
    groups = [{"params": head, "lr": recipe.head_lr}] + [{"params": adapter, "lr": lr}] * bool(adapter)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.factor_at)
    recognizer.set_window(recipe.crop)
    losses, seconds = [], []
    model.train()
    with progress(range(recipe.steps), desc=desc, unit="step") as bar:
        for step in bar:
            began = time.perf_counter()
            crops, classes = draw(voices, recipe, step, seed)
            embeddings = encode(recognizer, crops, model)
            loss = loss_of(embeddings, torch.tensor(classes, device=recognizer.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(adapter + head, recipe.clip)
            losses.append(loss.item())
            if not np.isfinite(losses[-1]):
                raise DemoError(f"{desc}, step {step + 1}: the loss is {losses[-1]}; try a smaller learning rate")
            optimizer.step()
            schedule.step()
            seconds.append(time.perf_counter() - began)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses, seconds
