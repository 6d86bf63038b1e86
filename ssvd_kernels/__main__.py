"""Command line: python -m ssvd_kernels info | selftest | plan | inspect | average | merge | convert

Exit status: 0 done; 1 a check failed (a damaged adapter, an adapter for another base model, a failed self-test);
2 the command cannot be run as given (an unknown option, a missing file, an output folder that already exists).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import UsageError
from .config import ALLOCATIONS, METHODS

QUANTIZATIONS = ("float32", "float16", "bfloat16", "int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m ssvd_kernels",
        description="SSVD adapters from the command line. COMMAND --help says more about each.",
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def add(name: str, summary: str, more: str = "") -> argparse.ArgumentParser:
        text = f"{summary[0].upper()}{summary[1:]}. {more}".strip()
        return commands.add_parser(name, help=summary, description=text)

    add("info", "what is built and installed, and why something is not available")

    selftest = add(
        "selftest",
        "checks on this machine that the installed package computes what it should",
        "Takes less than a minute: the Cayley map and the linear op, forward and backward, in every dtype and on every "
        "backend, against float64; then adapting, saving, loading and merging a small model.",
    )
    selftest.add_argument("--device", default="all", help="cpu, cuda, cuda:1, ... (default: every kind available here)")

    plan = add(
        "plan",
        "chooses the ranks that a budget of trainable parameters allows in a model",
        "Prints layers by shape and rank. In Python, plan(...) with these arguments gives a plan for inject or PEFT.",
    )
    plan.add_argument("--base", type=Path, metavar="FOLDER", required=True, help="folder of a transformers model")
    plan.add_argument("--budget", metavar="N", required=True, help="parameters, or a share of them such as 0.02")
    plan.add_argument("--method", default="ssvd", choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    plan.add_argument("--allocation", default="uniform", choices=ALLOCATIONS, help="spectrum: by the singular values")
    words = "suffixes of module names, a preset, or a regular expression"
    plan.add_argument("--targets", nargs="+", default=["all-linear"], metavar="NAME", help=words)
    plan.add_argument(
        "--exclude", nargs="+", default=[], metavar="NAME", help="modules to leave alone: suffixes, or an expression"
    )
    plan.add_argument("--side", help="ssvd: input, output or smaller")
    plan.add_argument("--rotation", help="ssvd, ssvd-o: cayley, linear or free")
    plan.add_argument("--inner-share", type=float, metavar="S", help="ssvd-o: the input side's share of the rotations")
    plan.add_argument("--top", type=int, metavar="P", help="spectralft: singular vectors that change (default: 256)")
    plan.add_argument("--json", action="store_true", help="print JSON, with every layer by name, instead of a table")

    inspect = add(
        "inspect",
        "what an adapter file holds, and whether it fits a base model",
        "Columns: ||K|| is the size of the rotation (free: ||G - I||; banded: M off its diagonal), shift the largest "
        "|delta_sigma|; with --base also the shift relative to sigma, and the update's norm relative to the weight's.",
    )
    inspect.add_argument("adapter", type=Path, metavar="ADAPTER", help="the file that save_adapter wrote")
    inspect.add_argument("--base", type=Path, metavar="FOLDER", help="check that it fits this transformers model")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")

    merge = add(
        "merge",
        "writes a base model and its adapter as one model that does not need this package",
        "Writes a transformers folder; or, as asked, a LoRA adapter for PEFT, or a folder for CTranslate2 and "
        "faster-whisper. OUTPUT must be new or empty.",
    )
    merge.add_argument("base", type=Path, metavar="BASE", help="folder of the transformers model that was adapted")
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help="the file that save_adapter wrote")
    merge.add_argument("output", type=Path, metavar="OUTPUT", help="the folder to write")
    merge.add_argument("--float32", action="store_true", help="load the base model in float32 (default: as stored)")
    kind = merge.add_mutually_exclusive_group()
    kind.add_argument("--lora", action="store_true", help="write a PEFT LoRA adapter of the same update instead")
    kind.add_argument("--ctranslate2", action="store_true", help="write a CTranslate2 model instead")
    merge.add_argument("--rank", type=int, metavar="R", help="with --lora: the largest rank (default: exact)")
    stored = f"with --ctranslate2: type of the stored weights, {', '.join(QUANTIZATIONS)}"
    merge.add_argument("--quantization", choices=QUANTIZATIONS, metavar="TYPE", help=stored)

    average = add(
        "average",
        "writes the mean of several adapters of one base model as an adapter",
        "The mean of their rotations and shifts, so that the rotation stays orthogonal; or, with --of updates and the "
        "base model, exactly that of their updates, as an adapter with rotation free.",
    )
    average.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER", help="files that save_adapter wrote")
    average.add_argument("--out", type=Path, required=True, metavar="FILE", help="the adapter file to write")
    average.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each adapter (default: equal)")
    average.add_argument("--of", choices=("rotations", "updates"), default="rotations", help="default: rotations")
    average.add_argument("--base", type=Path, metavar="FOLDER", help="with --of updates: the transformers model")

    convert = add("convert", "turns checkpoints of ESPnet's own SSVD adapter into adapters, and back")
    directions = convert.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    more = "Nothing is written if the result would not compute the same."
    ours = directions.add_parser("from-espnet", help="an ESPnet checkpoint to an adapter", description=more)
    ours.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the .pth file that ESPnet wrote")
    ours.add_argument("adapter", type=Path, metavar="ADAPTER", help="the adapter file to write")
    ours.add_argument("--rotation-map", choices=("linear", "cayley"), help="that it was trained with (default: linear)")
    ours.add_argument("--base", type=Path, metavar="PTH", help="the model before fine-tuning, if there is one")
    ours.add_argument("--base-out", type=Path, metavar="PTH", help="write the base weights that the adapter belongs to")
    theirs = directions.add_parser("to-espnet", help="an adapter to an ESPnet checkpoint", description=more)
    theirs.add_argument("adapter", type=Path, metavar="ADAPTER", help="the file that save_adapter wrote")
    theirs.add_argument("base", type=Path, metavar="BASE", help="the .pth file of the model before fine-tuning")
    theirs.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the .pth file to write")
    theirs.add_argument(
        "--unmerged", action="store_true", help="store W in `weight` (default: W', as ESPnet writes it)"
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return int(importlib.import_module(f".cli.{args.command}", __package__).run(args))
    except (UsageError, OSError, ImportError) as error:
        return _refused(error, 2)
    except ValueError as error:  # AdapterError among them
        return _refused(error, 1)


def _refused(error: Exception, status: int) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
