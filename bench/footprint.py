"""Memory of a layer, a block and a model of Whisper-large-v3's shapes: `python -m bench.footprint --out NAME.csv`.

What is resident once a bfloat16 model is adapted, and the peak of a training step with AdamW, by part: the base, the
bases of singular vectors, what trains, its gradients, the optimizer's state, the cores (every k x k matrix, and the
stacked parameters that they are made from) and the rest: activations, and what operations need for a moment.

Bytes are those of the tensors' storages, which depend on shapes alone. So all but the quantised layer runs on the meta
device: nothing is computed, and no weight is factorised. --device cpu computes, with random weights and random bases,
and gives the growth of the process's resident memory in the step beside the count.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssvd_kernels as sk
from bench.factorize import _markdown, _memory, _reset_peak
from bench.memory import Ledger
from bench.records import machine
from bench.stacks import WHISPER
from bench.versions import trained
from ssvd_kernels.basis.factorize import SKETCH_ROWS, Factorization
from ssvd_kernels.model import rotations
from ssvd_kernels.model.inject import install
from ssvd_kernels.model.targets import find_targets
from ssvd_kernels.ops import extension

RESIDENT = ("base", "basis", "trained")
PARTS = (*RESIDENT, "gradients", "optimizer", "cores", "activations")
COLUMNS = ("what", "method", "T", *(f"resident_{part}" for part in RESIDENT), *(f"peak_{part}" for part in PARTS),
           "left_bytes", "rss_bytes", "on", "run", "device", "threads", "torch", "commit")  # fmt: skip
Row = dict[str, Any]


class Subject(NamedTuple):
    """A module of random weights, and a loss of it whose graph holds T tokens."""

    module: nn.Module
    loss: Callable[[nn.Module], Tensor]


def layer(d: int, T: int, device: str) -> Subject:
    return _of_embeddings(nn.Sequential(nn.Linear(d, d, device="meta")), d, T, device)


def block(d: int, T: int, device: str) -> Subject:
    """One encoder and one decoder block."""
    return _of_embeddings(WHISPER._replace(d=d, depth=1).stack(), d, T, device)


def model(d: int, T: int, device: str) -> Subject:
    """Whisper-large-v3 (at d = 1280) for a window of 2 T frames, and T / 8 tokens of text."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    depth, heads = 32 * d // 1280, d // 64
    config = WhisperConfig(vocab_size=51866, num_mel_bins=128, d_model=d, encoder_layers=depth, decoder_layers=depth,
                           encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * d,
                           decoder_ffn_dim=4 * d, max_source_positions=T, use_cache=False)  # fmt: skip

    def loss(adapted: nn.Module) -> Tensor:
        frames = torch.zeros(1, 128, 2 * T, dtype=torch.bfloat16, device=device)
        tokens = torch.zeros(1, max(1, T // 8), dtype=torch.long, device=device)
        mask = tokens.new_ones(1, 1, *2 * tokens.shape[1:], dtype=torch.bool)  # or its values would be looked at
        logits = adapted(frames, decoder_input_ids=tokens, decoder_attention_mask=mask).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    with torch.device("meta"):
        module = WhisperForConditionalGeneration(config)
    module = _filled(module, device)
    module.tie_weights()
    return Subject(module, loss)


def _of_embeddings(module: nn.Module, d: int, T: int, device: str) -> Subject:
    def loss(adapted: nn.Module) -> Tensor:
        return adapted(torch.zeros(1, T, d, dtype=torch.bfloat16, device=device).requires_grad_()).sum()

    return Subject(_filled(module, device), loss)


@torch.no_grad()
def _filled(module: nn.Module, device: str) -> nn.Module:
    module.bfloat16().to_empty(device=device)
    for parameter in module.parameters():
        parameter.normal_(0, 0.02)
    return module.train()


def nf4(d: int, T: int, device: str) -> Subject:
    """A layer whose weight bitsandbytes holds in NF4, its scales quantised, too."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    subject = layer(d, T, device)
    linear = Linear4bit(d, d, compute_dtype=torch.bfloat16, quant_type="nf4")
    linear.weight = Params4bit(subject.module[0].weight.data, requires_grad=False, quant_type="nf4")  # type: ignore[index]
    return subject._replace(module=nn.Sequential(linear.to(device)).train())


SUBJECTS = {"layer": layer, "layer over NF4": nf4, "block": block, "model": model}
TOKENS = 16  # few: activations are the same in both forms


def ssvd(module: nn.Module, device: str, ratio: float, form: str, mode: str = "auto") -> nn.Module:
    config = sk.SSVDConfig(ratio=ratio, form=form)  # type: ignore[arg-type]
    plan = {name: (linear, config) for name, linear in find_targets(module, config).items()}
    install(module, plan, {name: _basis(linear, config) for name, (linear, _) in plan.items()})
    for each in sk.ssvd_layers(module).values():
        each.mode = mode
    return module.to(device)


def _basis(linear: Any, config: sk.SSVDConfig) -> Factorization:
    d_in, d_out = linear.in_features, linear.out_features
    k, device = config.triplets(d_in, d_out), linear.weight.device
    U, V = (_orthonormal(d, k).to(device, copy=True) for d in (d_out, d_in))
    sigma = torch.linspace(2, 1, k)  # on the CPU: the activation form looks at it
    return Factorization(U, sigma, V, "", 0.0, torch.zeros(2 * SKETCH_ROWS, k))


@cache
def _orthonormal(d: int, k: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k))[0]


def lora(module: nn.Module, device: str, r: int) -> nn.Module:
    import peft

    names = list(find_targets(module, sk.SSVDConfig(rank=1)))
    return peft.get_peft_model(module, peft.LoraConfig(r=r, lora_alpha=r, target_modules=names))


def _ssvd(*options: Any) -> Callable[[nn.Module, str], nn.Module]:
    return lambda module, device: ssvd(module, device, *options)


FULL, COMPOSED = "full fine-tuning", "weight form composed, ratio 0.4"
METHODS: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    FULL: lambda module, device: module,
    "LoRA r32": lambda module, device: lora(module, device, 32),
    COMPOSED: _ssvd(0.4, "weight", "composed"),
    "weight form factored, ratio 0.4": _ssvd(0.4, "weight", "factored"),
    "activation form, ratio 0.4": _ssvd(0.4, "activation"),
    "weight form factored, ratio 0.2": _ssvd(0.2, "weight", "factored"),
    "activation form, ratio 0.2": _ssvd(0.2, "activation"),
}


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Takes layers on the meta device for ones that compute there, by the op that is built for the CPU."""
    ours = mock.patch.object(extension, "supports", lambda device: extension.unavailable_reason())
    with ours, mock.patch.object(rotations, "_active", lambda layers: [each for each in layers if not each.idle]):
        yield


def measure(what: str, method: str, d: int, T: int, device: str) -> Row:
    subject = SUBJECTS[what](d, T, device)
    base = {id(tensor) for tensor in _tensors(subject.module)}
    adapted = METHODS[method](subject.module, device)
    parameters = trained(adapted)
    squares = {(each.k, each.k) for each in sk.ssvd_layers(adapted).values()}
    shapes = {parameter.shape for parameter in parameters}
    stacked = {each.theta.shape for each in sk.ssvd_layers(adapted).values()}
    phase = "forward"

    def kind_of(tensor: Tensor) -> str:
        if phase == "optimizer":
            return phase
        if tensor.shape[-2:] in squares:
            return "cores"
        if tensor.shape in shapes or tensor.shape[1:] in stacked:
            return "gradients" if phase == "backward" else "cores"
        return "activations"

    ledger = Ledger(kind_of)
    own = {id(parameter) for parameter in parameters} - base
    for tensor in _tensors(adapted):
        ledger.note(tensor, "base" if id(tensor) in base else "trained" if id(tensor) in own else "basis")
    row = {f"resident_{part}": ledger.live[part] for part in RESIDENT}
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for parameter in parameters:  # which gives the optimizer its state
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        for tensor in state.values():
            ledger.note(tensor, "optimizer")
    held, before = ledger.live.total(), 0 if device == "meta" else _reset_peak()
    with ledger:
        loss = subject.loss(adapted)
        phase = "backward"
        loss.backward()
        phase = "optimizer"
        optimizer.step()
        optimizer.zero_grad()
        del loss
    if before:
        row["rss_bytes"] = _memory("VmHWM") - before
    row |= {f"peak_{part}": ledger.peak[part] for part in PARTS} | {"left_bytes": ledger.live.total() - held}
    return {"what": what, "method": method, "T": T, **row, "on": device}


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and what bitsandbytes keeps beside a weight."""
    yield from module.buffers()
    for parameter in module.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (value for value in vars(state).values() if isinstance(value, Tensor))
            state = state.state2


def table(rows: Iterable[Row]) -> str:
    """Markdown of all that the file holds."""
    head = ("method", "after inject", "peak without activations", *PARTS[1:], "base, MB")
    lines = ["Made by `python -m bench.footprint` from the CSV file of the same name: multiples of the base's bytes.",
             "After the peak its parts."]  # fmt: skip
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[name]) for name in ("what", "T", "on", "torch", "commit")), []).append(row)
    for (what, T, on, version, commit), group in groups.items():
        cells = []
        for row in group:
            base = int(row["resident_base"])
            resident = sum(int(row[f"resident_{part}"]) for part in RESIDENT) / base
            peak = [int(row[f"peak_{part}"]) / base for part in PARTS]
            values = (resident, sum(peak[:-1]), *peak[1:])
            cells.append((row["method"], *(f"{value:.2f}" for value in values), f"{base / 1e6:.1f}"))
        title = f"**{what}**, {T} tokens, {on} device, torch {version}, commit {commit}"
        lines += ["", title, "", *_markdown(head, cells)]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.footprint", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, help="CSV file, appended to; a .md file is written beside it"
    )
    parser.add_argument("--parts", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", choices=("meta", "cpu"), default="meta")
    parser.add_argument("--width", type=int, default=1280, help="d (%(default)s), of which the model's depth follows")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    about, new = machine(torch.device("cpu")), not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        for what in options.parts:
            device = "cpu" if what == "layer over NF4" else options.device
            for method in options.methods:
                if what == "layer over NF4" and method in (FULL, COMPOSED):
                    continue
                with shapes_alone() if device == "meta" else nullcontext():
                    row = measure(what, method, options.width, TOKENS, device)
                writer.writerow({**{name: about[name] for name in COLUMNS if name in about}, **row})
                file.flush()
    with options.out.open(newline="") as file:
        text = table(csv.DictReader(file))
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
