"""Fine-tunes the injected model; can be interrupted at any time and goes on as if it had not been."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.asr import DemoError, progress
from experiments.asr.recognizer import IGNORED, Recognizer
from experiments.asr.runfolder import RunFolder
from experiments.asr.speech import Speech


class Interrupted(Exception):
    """Training stopped on a signal, after writing a checkpoint."""


class Diverged(DemoError):
    """The loss or its gradient is no longer finite."""


@dataclass(frozen=True)
class Recipe:
    """AdamW without weight decay; linear warm-up over a tenth of the steps, then linear decay to 0."""

    steps: int = 120
    batch: int = 8
    lr: float = 2.7e-4  # at k = 153, see `sk.parameter_groups`
    clip: float = 1.0
    seed: int = 0
    amp: bool = False
    checkpoint_every: int = 10

    def lr_at(self, step: int) -> float:
        warm_up = max(1, self.steps // 10)
        return self.lr * min((step + 1) / warm_up, (self.steps - step) / max(1, self.steps - warm_up))


@dataclass
class History:
    """One entry a step, over all sittings; `watched` has those steps only at which something was looked at."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    watched: list[dict[str, float]] = field(default_factory=list)


def batch_indices(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Which clips step `step` sees: each epoch is a permutation that depends on (seed, epoch) only."""
    chosen = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        chosen.append(int(torch.randperm(count, generator=generator)[place]))
    return chosen


class _StopFlag:
    """Turns the first SIGINT or SIGTERM into a flag, so that no step is cut in two; the second acts as usual."""

    def __init__(self) -> None:
        self.raised: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopFlag:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.raised = signal.Signals(number).name
        signal.signal(number, self._before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def cross_entropy(recognizer: Recognizer, speech: Speech, chosen: list[int], amp: bool = False) -> Tensor:
    """Mean cross-entropy of the chosen clips' tokens, in nats."""
    features = recognizer.features([speech.samples(i) for i in chosen])
    inputs, labels = recognizer.labels([speech.clips[i].text for i in chosen])
    with torch.autocast(recognizer.device.type, torch.bfloat16, enabled=amp):
        logits = recognizer.model(input_features=features, decoder_input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


Watch = Callable[[int], dict[str, float] | None]  # number of steps done -> what was seen, None where nothing is due


def train(
    recognizer: Recognizer,
    speech: Speech,
    recipe: Recipe,
    folder: RunFolder,
    watch: Watch | None = None,
    until: float | None = None,
    groups: list[dict[str, Any]] | None = None,
) -> History:
    """Trains what `requires_grad` in the model, from the folder's checkpoint if there is one.

    watch: called after each step, outside of its time. until: a time of time.time().
    groups: the optimizer's parameter groups; a group's own "lr" takes the place of the recipe's.
    Raises Interrupted on SIGINT or SIGTERM, or after `until`, with a checkpoint; Diverged if the loss is not finite.
    """
    model = recognizer.model
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(groups or trainable.values(), lr=recipe.lr, weight_decay=0.0)
    shares = [group["lr"] / recipe.lr for group in optimizer.param_groups]
    history, start = History(), 0
    torch.manual_seed(recipe.seed)
    if (state := folder.load_checkpoint()) is not None:
        start, history = state["step"], History(state["losses"], state["seconds"], state.get("watched", []))
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(state["trainable"][name])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])

    def save(step: int) -> None:
        weights = {name: p.detach().cpu() for name, p in trainable.items()}
        folder.save_checkpoint(
            {
                "step": step,
                "losses": history.losses,
                "seconds": history.seconds,
                "watched": history.watched,
                "trainable": weights,
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
            }
        )

    model.train()
    bar = progress(total=recipe.steps, initial=start, desc="fine-tuning", unit="step")
    with bar, _StopFlag() as stop:
        for step in range(start, recipe.steps):
            began = time.perf_counter()
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = share * recipe.lr_at(step)
            loss = cross_entropy(
                recognizer, speech, batch_indices(len(speech), recipe.batch, step, recipe.seed), recipe.amp
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trainable.values(), recipe.clip)
            value = loss.item()
            if not (torch.isfinite(norm) and value < float("inf")):
                raise Diverged(
                    f"step {step + 1}: the loss is {value} and its gradient's norm {norm.item()}; "
                    f"try a smaller --lr than {recipe.lr}, and --fresh"
                )
            optimizer.step()
            history.losses.append(value)
            history.seconds.append(time.perf_counter() - began)
            if watch is not None and (seen := watch(step + 1)) is not None:
                history.watched.append({"step": step + 1, **seen})
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            bar.update()
            why = stop.raised or ("time is up" if until is not None and time.time() > until else None)
            if why or (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
                save(step + 1)
            if why and step + 1 < recipe.steps:
                raise Interrupted(f"{why}: stopped after step {step + 1} of {recipe.steps}, which is saved")
    model.eval()
    return history
