"""Federated fine-tuning: four clients train adapters on speech of their own, and a server averages the adapters only.

    python -m examples.federated            # the real Whisper tiny.en
    python -m examples.federated --smoke    # two steps each

Each client has other prompts and a child-like voice of its own. SSVD's adapters are averaged in two ways: the mean of
K, whose rotations stay orthogonal, and exactly the mean of the updates W' - W. LoRA's server averages A and B as usual,
and the product of the means is not the mean of the products.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import ssvd_kernels as sk
from experiments.asr.cell import error_rates
from experiments.asr.commands import exit_status
from experiments.asr.fetch import ASTERISK, MODEL, default_data, ensure
from experiments.asr.methods import apply
from experiments.asr.recognizer import Recognizer, load_recognizer
from experiments.asr.runfolder import RunFolder, short_hash
from experiments.asr.speech import Speech, english_prompts, split
from experiments.asr.train import Recipe, train

VOICES = (1.45, 1.55, 1.65, 1.75)  # factors by which the clients' voices are raised
LONGEST = 9.0  # seconds
SSVD_LR, LORA_LR = 2.7e-4, 1e-3
LORA_BUDGET = 0.02  # r = 11, as many parameters as SSVD's k = 40 % of the width


def gather(data: Path, count: int | None) -> tuple[list[Speech], Speech]:
    """(the clients' training speech, held-out speech in all their voices); no text is in two of them."""
    ensure(data, (MODEL, ASTERISK))
    rest, test = split(clip for clip in english_prompts(data) if clip.duration() <= LONGEST)
    clients = [[replace(clip, voice=voice) for clip in rest[i :: len(VOICES)]] for i, voice in enumerate(VOICES)]
    held_out = [replace(clip, voice=VOICES[i % len(VOICES)]) for i, clip in enumerate(test[:count])]
    return [Speech(clips, f"reading client {i}") for i, clips in enumerate(clients)], Speech(held_out, "reading test")


def fit(recognizer: Recognizer, speech: Speech, recipe: Recipe, out: Path) -> None:
    """One client's training; stopped, it goes on where it was."""
    recognizer.fit_window(LONGEST)
    settings = {**vars(recipe), "speech": speech.fingerprint}
    train(recognizer, speech, recipe, RunFolder(out / short_hash(settings), settings))


def updates(model: nn.Module) -> list[Tensor]:
    """W' - W of every layer in float64, from what is trained."""
    found = []
    for layer in sk.ssvd_layers(model).values():
        U, V, core = copy.deepcopy(layer).double().update_factors()
        found.append(U @ core @ V.T)
    return found


def mean(shares: Sequence[float], lists: Iterable[list[Tensor]]) -> list[Tensor]:
    none = torch.zeros((), dtype=torch.float64)
    return [sum((share * one for share, one in zip(shares, each)), none) for each in zip(*lists, strict=True)]


def distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """||found - exact|| / ||exact|| over all layers."""
    squares = [((a - b).square().sum(), b.square().sum()) for a, b in zip(found, exact, strict=True)]
    return float(sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5


def show(
    name: str, recognizer: Recognizer, speech: Speech, found: Sequence[Tensor] = (), exact: Sequence[Tensor] = ()
) -> None:
    """Prints the WER and, of a server's average, how far it is from the mean of the clients' updates in float64."""
    wer = 100 * error_rates(recognizer, speech)["wer"]
    print(f"{name:<28} WER {wer:5.1f} %" + (f"   {distance(found, exact):.1e} off the mean update" if exact else ""))


@torch.no_grad()
def federate_ssvd(shares: list[float], held_out: Speech, recognizer: Recognizer, options: argparse.Namespace) -> None:
    """The clients' adapters are the model's, one for each."""
    model, names = recognizer.model, [f"client-{i}" for i in range(len(shares))]
    weights = dict(zip(names, shares, strict=True))
    per_client, trained = [], []
    for name in names:
        sk.set_adapter(model, name)
        per_client.append(updates(model))
        trained.append([layer.theta.double() for layer in sk.ssvd_layers(model).values()])
        show(f"SSVD, {name}", recognizer, held_out)
    exact = mean(shares, per_client)
    sk.average_adapters(model, weights, into="mean")
    sk.set_adapter(model, "mean")
    show("SSVD, mean of rotations", recognizer, held_out, updates(model), exact)
    error = distance([layer.theta.double() for layer in sk.ssvd_layers(model).values()], mean(shares, trained))
    print(f"{'':<28} its K: {error:.1e} off the mean of K in float64")
    file = options.out / "mean-of-updates.safetensors"
    sk.average_adapters(model, weights, into=file, of="updates")
    fresh = load_recognizer(None, options.data, recognizer.device)
    sk.load_adapter(fresh.model, file)
    show("SSVD, mean of updates", fresh, held_out, updates(fresh.model), exact)


@torch.no_grad()
def federate_lora(shares: list[float], held_out: Speech, clients: list[dict[str, Tensor]], last: Recognizer) -> None:
    """clients: name -> A or B in float64; `last` is the model of one of them."""
    down = [name for name in clients[0] if "lora_A" in name]
    pairs = [(name, name.replace("lora_A", "lora_B")) for name in down]
    exact = mean(shares, [[client[b] @ client[a] for a, b in pairs] for client in clients])
    averaged = dict(zip(clients[0], mean(shares, [list(client.values()) for client in clients]), strict=True))
    for name, value in averaged.items():
        last.model.get_parameter(name).copy_(value)
    show("LoRA, means of A and of B", last, held_out, [averaged[b] @ averaged[a] for a, b in pairs], exact)


def run(options: argparse.Namespace) -> int:
    steps, batch, count = (2, 1, 2) if options.smoke else (options.steps, 4, 32)
    clients, held_out = gather(options.data, count)
    shares = [len(client) / sum(map(len, clients)) for client in clients]
    device = torch.device("cpu")
    recognizer = load_recognizer(None, options.data, device)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{', '.join(str(len(client)) for client in clients)} clips to train on, {len(held_out)} to measure")
    show("untrained", recognizer, held_out)

    print(sk.inject(recognizer.model, sk.SSVDConfig(ratio=0.4)))
    for i, client in enumerate(clients):
        sk.add_adapter(recognizer.model, f"client-{i}")
        sk.set_adapter(recognizer.model, f"client-{i}")
        fit(recognizer, client, Recipe(steps, batch, SSVD_LR), options.out / "ssvd")
    federate_ssvd(shares, held_out, recognizer, options)

    trained = []
    for i, client in enumerate(clients):
        last = load_recognizer(None, options.data, device)
        torch.manual_seed(0)  # the server sends every client the same A
        apply(last.model, "lora", LORA_BUDGET)
        fit(last, client, Recipe(steps, batch, LORA_LR), options.out / "lora")
        parameters = last.model.named_parameters()
        trained.append({name: p.detach().double() for name, p in parameters if p.requires_grad})
        show(f"LoRA, client-{i}", last, held_out)
    federate_lora(shares, held_out, trained, last)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.federated", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two steps of a clip each, two clips to measure")
    parser.add_argument("--steps", type=int, default=12, help="of each client, four clips each (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=default_data(), help="data folder (default: $SSVD_DATA or ./data)")
    parser.add_argument("--out", type=Path, default=Path("runs/federated"), help="default: %(default)s")
    options = parser.parse_args(argv)
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
