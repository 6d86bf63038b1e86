"""Runs the tests with other versions of what the package builds on, and writes docs/backends.md's table of them.

make matrix [ARGS="--only lowest"]: a virtual environment a row below .matrix/, resolved and installed by uv; rows whose
Python is not on this machine are listed as not run. Takes hours and tens of gigabytes: a CUDA build of torch a row.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".matrix"
PAGE = ROOT / "docs" / "backends.md"
UV = [sys.executable, "-m", "uv"]
EVERYTHING = ("--all-extras", "--group", "build", "--group", "no-deps")
CORE = ("--extra", "triton", "--extra", "test", "--group", "build")
SHOWN = ("torch", "triton", "transformers", "peft", "bitsandbytes", "torchao", "ctranslate2")
# ops, layers, models, adapters and their export, and PEFT: what depends on these versions
PEFT = [f"tests/integrations/test_peft_{part}.py" for part in ("config", "layer", "quantized", "saving", "training")]
TESTS = ("tests/ops", "tests/layers", "tests/model", "tests/adapters", *PEFT)


@dataclass(frozen=True)
class Row:
    name: str
    python: str
    pins: str  # what pip would be told
    extras: tuple[str, ...] = EVERYTHING
    lowest: bool = False  # every direct requirement at its lower bound


ROWS = (
    Row("lowest", "3.10", "torch==2.11.0", lowest=True),
    Row("lowest-core", "3.10", "torch==2.11.0", CORE, lowest=True),
    Row("torch-2.11", "3.12", "torch==2.11.* numpy<2.4"),  # the interpreter of its Triton 3.6 takes no newer NumPy
    Row("torch-2.13", "3.11", "torch==2.13.*"),
    Row("torch-2.14", "3.11", "torch==2.14.*"),
    Row("newest", "3.13", "torch"),
)


def run(command: list, log: Path, **env: str) -> int:
    with log.open("a") as out:
        command = [*map(str, command)]
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        return subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=os.environ | env).returncode


def make(row: Row, folder: Path, log: Path) -> str | None:
    """The row's environment with a checkout's sources of its own; why there is none."""
    python = subprocess.run(
        [*UV, "python", "find", "--no-python-downloads", row.python], capture_output=True, text=True
    )
    if python.returncode:
        return f"Python {row.python} is not on this machine"
    lock, here, checkout = folder / "constraints.txt", folder / "bin" / "python", folder / "checkout"
    resolution = ["--resolution", "lowest-direct"] if row.lowest else []
    (folder / "pins.txt").write_text("\n".join(row.pins.split()) + "\n")
    chosen = [*resolution, *row.extras, "--python", here, "-c", folder / "pins.txt"]
    steps: tuple[list, ...] = (
        [*UV, "venv", "-q", "--allow-existing", "--python", python.stdout.strip(), folder],
        [*UV, "pip", "compile", "-q", *chosen, "--no-annotate", "-o", lock, "pyproject.toml"],
        [*UV, "pip", "sync", "-q", "--python", here, lock],
        ["git", "clone", "-q", ROOT, checkout],
        [*UV, "pip", "install", "-q", "--python", here, "--no-deps", "--no-build-isolation", "-e", checkout],
    )
    for step in steps:
        if run(step, log, SSVD_BUILD="cpu"):
            return f"set-up failed, see {log.relative_to(ROOT)}"
    return None


def test(row: Row, folder: Path, log: Path) -> str:
    """Pytest's own closing counts."""
    command = [folder / "bin" / "python", "-m", "pytest", "-n", "2", "--dist", "worksteal", "-q", "-rfE"]
    command += ["-m", "not slow and not gpu and not timing and not data", *TESTS]
    with log.open("a") as out:
        done = subprocess.run(map(str, command), cwd=folder / "checkout", stdout=out, stderr=subprocess.STDOUT)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", log.read_text().splitlines()[-1])
    return ", ".join(counts) if counts else f"exit code {done.returncode}"


def versions(folder: Path) -> dict[str, str]:
    lines = (folder / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    return {name: pins.get(name, "none").split(" ")[0] for name in SHOWN}


def table(results: list[dict]) -> str:
    """Markdown, one line a row that was tried."""
    lines = ["| Python | " + " | ".join(SHOWN) + " | tests |", "|---" * (len(SHOWN) + 2) + "|"]
    for result in results:
        found = [result["versions"].get(name, "") for name in SHOWN]
        lines.append(f"| {result['python']} | " + " | ".join(found) + f" | {result['tests']} |")
    return "\n".join(lines)


def write(results: list[dict]) -> None:
    """Puts the table between its two markers."""
    text = PAGE.read_text()
    begin, end = "<!-- tested combinations: make matrix -->", "<!-- end -->"
    if begin in text:
        before, rest = text.split(begin, 1)
        PAGE.write_text(f"{before}{begin}\n{table(results)}\n{end}{rest.split(end, 1)[1]}")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], help="rows to run (default: all)")
    args = options.parse_args()
    HOME.mkdir(exist_ok=True)
    kept = HOME / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for row in ROWS:
        if args.only and row.name not in args.only:
            continue
        folder, log = HOME / row.name, HOME / f"{row.name}.log"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        log.write_text(f"{datetime.date.today()} {platform.platform()}\n")
        print(f"{row.name}: set-up ...", flush=True)
        why = make(row, folder, log)
        print(f"{row.name}: " + (why or "tests ..."), flush=True)
        counts = f"not run: {why}" if why else test(row, folder, log)
        found = versions(folder) if why is None else {}
        results[row.name] = {"python": row.python, "versions": found, "tests": counts}
        kept.write_text(json.dumps(results, indent=1))
        print(f"{row.name}: {counts}", flush=True)
    done = [results[row.name] for row in ROWS if row.name in results]
    write(done)
    print(table(done))
    return int(any("failed" in result["tests"] or "exit code" in result["tests"] for result in done))


if __name__ == "__main__":
    sys.exit(main())
