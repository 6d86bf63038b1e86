"""The examples run as their first lines say, on two processes, and what they save loads in one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ssvd_kernels as sk

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [("several_processes", "--steps 6"), ("several_processes", "--steps 6 --fsdp"), ("with_accelerate", "")],
    ids=["ddp", "fsdp", "accelerate"],
)
def test_example(tmp_path, script, options):
    if script == "with_accelerate":
        pytest.importorskip("accelerate")
    launcher = "-m torch.distributed.run --rdzv-backend c10d --rdzv-endpoint localhost:0 --nproc-per-node 2".split()
    command = [sys.executable, *launcher, f"examples/{script}.py", *f"--out {tmp_path}/a.safetensors {options}".split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 layers" in done.stderr  # each rank factorised half of the four
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == (5 if script == "with_accelerate" else 6)  # printed by one rank
    assert losses[-1] < losses[0]
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert len(sk.load_adapter(base, tmp_path / "a.safetensors", progress=False)) == 4
    assert all(layer.theta.abs().max() > 0 for layer in sk.ssvd_layers(base).values())
