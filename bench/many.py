"""Many adapters in one batch: `python -m bench.many --out NAME.csv`.

The linear layers of an encoder and a decoder block of Whisper tiny.en (16 of its 64; random weights) on a batch of N
rows with N different adapters: by `AdapterBank` in one call, by PEFT's mixed batches of LoRA with as many parameters,
and one row after another. Beside them one adapter for all rows, composed and factored. T = 1 token a row is a decode
step, T = 64 an encoder's pass over 1.3 s. `generate` is a whole model of tiny.en's shapes, 1 s of audio and 16 tokens.

Versions take turns; the time is the least of the repeats, in milliseconds. Added: the time to add one adapter to a bank
of all 64 layers, from its file and from memory. float32 on the CPU, bfloat16 on a GPU (`--device cuda`).
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import ssvd_kernels as sk
from bench.factorize import _markdown
from bench.records import machine

D = 384  # of tiny.en
RANKS = {32: 1, 83: 5, 153: 15}  # k -> r of a LoRA with as many parameters
COUNTS = (1, 4, 16, 24, 64, 256, 1000)
TOKENS = (1, 64)
TOKENS_OUT = 16
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}  # of the devices
MOST = 4096  # rows times tokens of a batch
AFTER, MIXED, LORA, ONE, COMPOSED = (
    "one after another", "bank", "PEFT, mixed LoRA", "one adapter, factored", "one adapter, composed",
)  # fmt: skip
COLUMNS = ("what", "k", "N", "T", "version", "ms", "bytes", "run", "device", "threads", "torch", "commit")
Row = dict[str, Any]


class Layers(nn.Module):
    """Of blocks of Whisper, each applied to an input of its width: x (N, T, d) and h (N, T, 4 d)."""

    def __init__(self, blocks: int = 1) -> None:
        super().__init__()
        shapes: list[tuple[int, int]] = [*12 * [(D, D)], *2 * [(D, 4 * D)], *2 * [(4 * D, D)]]
        self.layers = nn.ModuleList(nn.Linear(d_in, d_out) for d_in, d_out in blocks * shapes)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x if layer.in_features == D else h)
        return y


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(d_model=D, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
                           decoder_attention_heads=6, encoder_ffn_dim=4 * D, decoder_ffn_dim=4 * D,
                           max_source_positions=50, suppress_tokens=None, begin_suppress_tokens=None)  # fmt: skip
    return WhisperForConditionalGeneration(config)


def adapted_by(model: nn.Module, k: int) -> Any:
    """With an adapter of random numbers."""
    sk.inject(model, sk.SSVDConfig(rank=k), progress=False)
    with torch.no_grad():
        for layer in sk.ssvd_layers(model).values():
            for parameter in layer.adapter().values():
                parameter.normal_(0, 0.02)
    return model.eval()


def with_lora(model: nn.Module, r: int, names: Sequence[str]) -> Any:
    """Adapters put into PEFT's layers by hand: `add_adapter` takes minutes for the last of a thousand."""
    import peft

    targets = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module.bias is not None
    ]
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=targets, init_lora_weights=False)
    found: Any = peft.get_peft_model(model, config, adapter_name=names[0])
    for layer in found.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            linear: Any = layer.get_base_layer()
            for name in names[1:]:
                layer.lora_A[name] = nn.Linear(linear.in_features, r, bias=False)
                layer.lora_B[name] = nn.Linear(r, linear.out_features, bias=False)
                layer.lora_dropout[name] = nn.Identity()
                layer.scaling[name] = 1.0
    return found.eval()


def placed(model: nn.Module, device: str) -> Any:
    """On the device, in the dtype that is measured there."""
    return model.to(device, DTYPES[device])


def noise(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=DTYPES[device])


def now(device: str) -> float:
    """Seconds, when all that was queued is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def least(versions: Mapping[str, Callable[[], object]], seconds: float, device: str) -> dict[str, float]:
    """Milliseconds of each, or what it returns: the least of at least three turns, as many as fit into `seconds`."""
    found = {name: float("inf") for name in versions}
    start = time.perf_counter()
    for turn in range(200):
        for name, run in versions.items():
            begin = now(device)
            own = run()
            found[name] = min(found[name], own if isinstance(own, float) else 1e3 * (now(device) - begin))
        if turn >= 2 and time.perf_counter() - start > seconds:
            break
    return found


def batches(k: int, counts: Iterable[int], seconds: float, device: str) -> Iterator[Row]:
    """Of the layers."""
    torch.manual_seed(0)
    base = placed(Layers(), device)
    names = [f"a{number}" for number in range(max(counts))]
    model = adapted_by(base, k)
    adapted = list(sk.ssvd_layers(model).values())
    bank = sk.AdapterBank(model)
    for name in names:
        bank.add(name)
    for N in counts:
        lora = placed(with_lora(Layers(), RANKS[k], names[:N]), device)
        lora_bytes = 4 * sum(p.numel() for n, p in lora.named_parameters() if ".a0." in n)
        bytes_of = {MIXED: bank.bytes_per_adapter, LORA: lora_bytes}
        for T in TOKENS:
            if N * T > MOST:
                continue
            inputs, own = (noise(device, N, T, D), noise(device, N, T, 4 * D)), names[:N]
            run = partial(model, *inputs)
            turns: dict[str, Callable[[], object]] = {
                ONE: partial(_single, adapted, "factored", run, device),
                MIXED: partial(_mixed, bank, own, run, device),
                COMPOSED: partial(_single, adapted, "auto", run, device),
                LORA: partial(lora, *inputs, adapter_names=own),
                AFTER: partial(_after, bank, model, own, inputs),
            }
            times = least(turns, seconds, device)
            yield from (
                {"what": "layers", "k": k, "N": N, "T": T, "version": version, "ms": f"{ms:.3f}",
                 "bytes": bytes_of.get(version, "")} for version, ms in times.items()
            )  # fmt: skip


def _second(run: Callable[[], object], device: str) -> float:
    """Milliseconds of a call after one that fills what is kept between calls."""
    run()
    begin = now(device)
    run()
    return 1e3 * (now(device) - begin)


def _single(adapted: Sequence[Any], mode: str, run: Callable[[], object], device: str) -> float:
    for layer in adapted:
        layer.mode = mode
    return _second(run, device)


def _mixed(bank: sk.AdapterBank, names: Sequence[str], run: Callable[[], object], device: str) -> float:
    with bank.rows(names):
        return _second(run, device)


def _after(bank: sk.AdapterBank, model: nn.Module, names: Sequence[str], inputs: Sequence[Tensor]) -> None:
    for row, name in enumerate(names):
        with bank.rows([name]):
            model(*(each[row : row + 1] for each in inputs))


def generation(k: int, N: int, seconds: float, device: str) -> Iterator[Row]:
    """Of the whole model."""
    torch.manual_seed(0)
    names = [f"a{number}" for number in range(N)]
    frames = noise(device, N, 80, 100)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it says at each call that max_new_tokens counts
    options = {"max_new_tokens": TOKENS_OUT, "min_new_tokens": TOKENS_OUT, "do_sample": False}
    lora = placed(with_lora(whisper(), RANKS[k], names), device)
    model = adapted_by(placed(whisper(), device), k)
    bank = sk.AdapterBank(model)
    for name in names:
        bank.add(name)

    def mixed() -> None:
        with bank.rows(names):
            model.generate(frames, **options)

    def after() -> None:
        for row, name in enumerate(names):
            with bank.rows([name]):
                model.generate(frames[row : row + 1], **options)

    versions = {
        COMPOSED: lambda: model.generate(frames, **options),
        LORA: lambda: lora.generate(input_features=frames, adapter_names=names, **options),
        AFTER: after,
        MIXED: mixed,
    }
    for version, ms in least(versions, seconds, device).items():
        yield {"what": "generate", "k": k, "N": N, "T": TOKENS_OUT, "version": version, "ms": f"{ms:.1f}"}


def additions(k: int, seconds: float, device: str) -> Iterator[Row]:
    """One adapter more, of tiny.en's 64 layers."""
    torch.manual_seed(0)
    model = adapted_by(placed(Layers(blocks=4), device), k)
    bank, number = sk.AdapterBank(model), 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        sk.save_adapter(model, path)

        def add(source: Any) -> Callable[[], None]:
            def run() -> None:
                nonlocal number
                number += 1
                bank.add(f"a{number}", source)

            return run

        times = least({"add, from a file": add(path), "add, from memory": add(None)}, seconds, device)
    for version, ms in times.items():
        yield {"what": "add", "k": k, "N": 1, "T": "", "version": version, "ms": f"{ms:.2f}",
               "bytes": bank.bytes_per_adapter}  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown of all that the file holds."""
    lines = ["Made by `python -m bench.many` from the CSV file of the same name: least of the repeats, in ms."]
    layers = [row for row in rows if row["what"] in ("layers", "generate")]
    groups: dict[tuple[str, ...], dict[str, float]] = {}
    for row in layers:
        key = tuple(str(row[name]) for name in ("what", "k", "N", "T"))
        groups.setdefault(key, {})[row["version"]] = float(row["ms"])
    head = ("what", "k", "N", "T", MIXED, ONE, COMPOSED, LORA, AFTER, f"bank / {ONE}", "LoRA / bank", "after / bank")
    cells = []
    for key, times in groups.items():
        values = [f"{times[name]:.2f}" if name in times else "" for name in head[4:9]]
        ratios = [(MIXED, ONE), (LORA, MIXED), (AFTER, MIXED)]
        cells.append(
            (*key, *values, *(f"{times[a] / times[b]:.2f}" if a in times and b in times else "" for a, b in ratios))
        )
    lines += ["", *_markdown(head, cells)]
    added = [(row["k"], row["version"], row["ms"], row["bytes"]) for row in rows if row["what"] == "add"]
    lines += ["", *_markdown(("k", "64 layers", "ms", "bytes an adapter"), added)]
    about = rows[-1]
    lines += ["", f"{about['device']}, {about['threads']} threads, torch {about['torch']}, commit {about['commit']}."]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.many", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="CSV file, replaced; a .md file is written beside it")
    parser.add_argument("--device", choices=DTYPES, default="cpu")
    parser.add_argument("--ranks", nargs="+", type=int, choices=RANKS, default=list(RANKS))
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), help="1,000 only for the lowest rank")
    parser.add_argument("--generate", type=int, default=24, help="rows of the whole model (%(default)s; 0: not at all)")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case (%(default)s)")
    options = parser.parse_args(argv)
    device, rows = options.device, []
    about = machine(torch.device(device))
    bar = tqdm(desc="cases", unit="version", disable=None)
    for k in options.ranks:
        counts = [N for N in options.counts if N <= 256 or k == min(options.ranks)]
        parts = [additions(k, options.seconds, device), batches(k, counts, options.seconds, device)]
        if options.generate:
            parts.append(generation(k, options.generate, options.seconds, device))
        for part in parts:
            for row in part:
                rows.append({**{name: about[name] for name in COLUMNS if name in about}, **row})
                bar.update()
    bar.close()
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    text = table(rows)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
