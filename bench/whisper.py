"""A training step of the real Whisper tiny.en on the demo's speech: what its user waits for.

The demo's settings: a batch of 8 recordings of at most 10 s, every attention and FFN projection adapted, k = 40 %,
AdamW. The data are those that `make demo` fetches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssvd_kernels as sk
from bench import peers
from bench.harness import Case, Run, Version
from bench.versions import held, trained, twice
from ssvd_kernels.config import PRESETS

RATIO, RANK = 0.4, 153
WINDOW = 10  # seconds
BATCH = 8
CHECKED = 1  # recordings that the gate looks at
LR = 1e-7  # a real step that changes nothing worth mentioning over the repeats


class Step:
    """The loss and its backward pass of `model` on the demo's first batch of training speech."""

    def __init__(self, features: Tensor, inputs: Tensor, labels: Tensor) -> None:
        self.features, self.inputs, self.labels = features, inputs, labels

    def loss(self, model: nn.Module, count: int = BATCH) -> Tensor:
        features = self.features[:count].to(next(model.parameters()).dtype)
        out = model(input_features=features, decoder_input_ids=self.inputs[:count], use_cache=False)
        return F.cross_entropy(out.logits.flatten(0, 1), self.labels[:count].flatten(), ignore_index=-100)

    def run(self, model: nn.Module) -> Run:
        """Forward, backward, AdamW."""
        parameters = trained(model)
        optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0)

        def run() -> tuple[Tensor, ...]:
            loss = self.loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return (loss.detach(),)

        return run

    def check(self, model: nn.Module) -> Run:
        """The loss, and the gradients of all that trains in one vector."""
        parameters = trained(model)

        def run() -> tuple[Tensor, ...]:
            loss = self.loss(model, CHECKED)
            grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            return loss.detach(), torch.cat([grad.flatten() for grad in grads])

        return run


def whisper_case() -> Case:
    """Full fine-tuning, this package, and PEFT's LoRA and PSOFT on the same modules.

    The gate compares the loss and all gradients with the same model in float64, for one recording.
    """

    def build(device: torch.device) -> list[Version]:
        try:
            base, step = _load(device)
        except Exception as error:  # no network, no codec, no transformers: the other cases still run
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return [Version("LoRA r16", tuple, (), (), absent=why)]
        found: list[Version] = []
        bound: list[float] = []
        for name, adapt in METHODS.items():
            if name in peers.PEERS and (why := peers.absent(name)):
                found.append(Version(name, tuple, (), (), absent=why))
                continue
            model = adapt(copy.deepcopy(base)).train()
            exact = step.check(copy.deepcopy(model).double())()
            bound = bound or twice(step.check(model), exact, torch.float32)  # of the first, plain PyTorch throughout
            found.append(Version(name, step.run(model), exact, bound, held=held(model), check=step.check(model),
                                 capturable=False, backend="peft" if name in peers.PEERS else "torch"))  # fmt: skip
        return found

    return Case("whisper", torch.float32, build, "LoRA r16", k=RANK, batch=BATCH, model="tiny.en", passes=("step",))


def _load(device: torch.device) -> tuple[Any, Step]:
    from experiments.asr import speech
    from experiments.asr.fetch import ASTERISK, MODEL, SPHINX, default_data, ensure
    from experiments.asr.recognizer import load_recognizer
    from experiments.asr.speech import MAX_PROMPT_SECONDS, Speech
    from experiments.asr.train import batch_indices

    data = default_data()
    ensure(data, (MODEL, ASTERISK, SPHINX))
    training = Speech(speech.built_in(data).train, "reading training speech", MAX_PROMPT_SECONDS)
    recognizer = load_recognizer(None, data, device)
    recognizer.set_window(WINDOW)
    chosen = batch_indices(len(training), BATCH, 0, 0)
    features = recognizer.features([training.samples(i) for i in chosen])
    return recognizer.model, Step(features, *recognizer.labels([training.clips[i].text for i in chosen]))


def _full(model: Any) -> nn.Module:
    return model.requires_grad_(True)


def _ssvd(model: Any) -> nn.Module:
    sk.inject(model, sk.SSVDConfig(ratio=RATIO, targets="whisper"), progress=False)
    return _spread(model)


def _peer(name: str) -> Callable[[Any], nn.Module]:
    def adapt(model: Any) -> nn.Module:
        import peft

        options: dict[str, Any] = {"target_modules": list(PRESETS["whisper"])}
        if name == "PSOFT":
            return _spread(peft.get_peft_model(model, peft.PsoftConfig(r=RANK, psoft_alpha=RANK, **options)))
        return _spread(peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, **options)))

    return adapt


@torch.no_grad()
def _spread(model: nn.Module) -> nn.Module:
    """After some training: no adapter is zero."""
    for parameter in trained(model):
        parameter.add_(1e-3 * torch.randn_like(parameter))
    return model


METHODS: dict[str, Callable[[Any], nn.Module]] = {
    "full fine-tuning": _full,
    "ssvd": _ssvd,
    "LoRA r16": _peer("LoRA r16"),
    "PSOFT": _peer("PSOFT"),
}
