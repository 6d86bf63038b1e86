"""bench/gpu.sh, the script for CUDA machines, where there is none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = {
    "check": ("GPU tests", "compute-sanitizer memcheck", "op and kernel tests", "benchmark"),
    "sanitize": ("compute-sanitizer memcheck", "compute-sanitizer racecheck", "compute-sanitizer initcheck"),
    "bench": ("benchmark", "goals"),
    "model": ("benchmark", "goals"),
    "asr": ("learning rates",),
}


def gpu_script(out: Path, python: str, part: str = "check") -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "OUT": str(out), "PYTHON": python, "PART": part}
    return subprocess.run(["bash", "bench/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_the_gpu_script_is_valid_shell():
    subprocess.run(["bash", "-n", str(ROOT / "bench" / "gpu.sh")], check=True, timeout=20)


def fake_python(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_the_gpu_script_says_what_is_missing(tmp_path):
    no_torch = "echo \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1"
    no_cuda = 'case "$2" in *get_device_capability*) exit 1;; *) echo 9.9.9;; esac'
    for name, python, message in (
        ("a", str(tmp_path / "none"), "is not a command"),
        ("b", fake_python(tmp_path / "python-b", no_torch), "cannot import torch: ModuleNotFoundError"),
        ("c", fake_python(tmp_path / "python-c", no_cuda), "torch 9.9.9, imported by"),
    ):
        done = gpu_script(tmp_path / name, python)
        assert done.returncode == 1 and message in done.stderr, done
        assert message in (tmp_path / name / "summary.txt").read_text()
    assert "sees no CUDA device" in done.stderr


@pytest.mark.parametrize("part", STAGES)
def test_the_gpu_script_goes_on_after_a_failed_stage_and_fails_itself(tmp_path, part):
    """A Python whose torch pretends to see a device: every stage fails, each is reported, few files are left."""
    python = fake_python(tmp_path / "python", 'case "$2" in *print*) echo 9.0;; *) echo broken >&2; exit 3;; esac')
    done = gpu_script(tmp_path / "out", python, part)
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    for stage in ("build for sm_9.0", "info", *STAGES[part]):
        assert any(line.startswith(stage) and "FAILED" in line for line in summary.splitlines()), summary
    assert done.stdout.rstrip().endswith(summary.rstrip())
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_the_gpu_script_names_its_parts(tmp_path):
    done = gpu_script(tmp_path / "out", "python3", "everything")
    assert done.returncode == 2 and "PART must be one of check, sanitize, bench, model, asr, got " in done.stderr
