"""Every Triton configuration that can be launched, compiled for sm_80, sm_90 and sm_120: no GPU needed.

Gate: no spills, shared memory within the architecture's limit, tensor-core instructions for half precision.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from kernel_cases import cases

from ssvd_kernels.ops.kernels.tile_sizes import (
    CAYLEY,
    CAYLEY_LEAF,
    CAYLEY_PACK,
    COMPOSE,
    CORE_GRAD,
    LINEAR,
    ONE_PASS,
)

HELPER = Path(__file__).parents[2] / "support" / "triton_compile.py"
# Bytes that a block may use: sm_80 has 163 KB, but its kernels are those of sm_86 and sm_89, too (see test_launches).
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}


def compiled(arch: int, workers: int = 2) -> list[dict]:
    """What every case uses, one dictionary a case, by `workers` processes."""
    root = str(HELPER.parents[2])
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))

    def part(first: int) -> str:
        command = [sys.executable, str(HELPER), str(arch), str(first), str(workers)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3000)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    with ThreadPoolExecutor(workers) as pool:
        return [json.loads(line) for text in pool.map(part, range(workers)) for line in text.splitlines()]


def faults(row: dict) -> list[str]:
    """Why the gate refuses this machine code."""
    found = [f"{row[name]} {name}" for name in ("stack", "local", "STL", "LDL") if row[name]]
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        found.append(f"{row['shared']} bytes of shared memory")
    if row["tensor_cores"] and not row["HMMA"] + row["HGMMA"]:
        found.append("no tensor-core instruction")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_configuration_compiles_within_limits(arch):
    rows = compiled(arch)
    assert len(rows) == len(cases())
    bad = [
        f"sm_{arch} {row['label']}: {', '.join(faults(row))} ({row['reg']} registers)" for row in rows if faults(row)
    ]
    assert not bad, "\n".join(bad)


def test_gate_refuses():
    """The gate fails on each of the things it looks for."""
    good = {"arch": 80, "stack": 0, "local": 0, "STL": 0, "LDL": 0, "shared": 1024, "HMMA": 1, "HGMMA": 0}
    good["tensor_cores"] = True
    assert faults(good) == []
    assert all(faults(good | bad) for bad in ({"STL": 1}, {"stack": 8}, {"shared": 170 * 1024}, {"HMMA": 0}))


def test_cases_cover_every_configuration():
    covered = {(case.kernel, case.config) for case in cases()}
    one_pass = {(key, k): tiles for key, by_rank in ONE_PASS.items() for k, tiles in by_rank.items()}
    kernels: dict[str, Any] = {"_ssvd_linear_fwd_kernel": LINEAR, "_ssvd_linear_one_pass_kernel": one_pass}
    kernels["_ssvd_linear_concat_kernel"] = {key: LINEAR[key] for key in ("half", "half_odd")}
    kernels |= {"_compose_kernel": COMPOSE, "_core_grad_kernel": CORE_GRAD, "_cayley_product_kernel": CAYLEY}
    kernels["_cayley_leaf_kernel"] = {"": (CAYLEY_LEAF,)}
    kernels |= {name: {"": (CAYLEY_PACK,)} for name in ("_skew_kernel", "_unskew_kernel")}
    by_name = {(kernel.split(":")[1], config) for kernel, config in covered}
    assert by_name == {(name, c) for name, tables in kernels.items() for table in tables.values() for c in table}
