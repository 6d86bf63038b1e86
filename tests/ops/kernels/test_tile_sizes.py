"""Every Triton configuration that can be launched, compiled for sm_80, sm_90 and sm_120: no GPU needed.

Gate: no spills, shared memory within the architecture's limit, tensor-core instructions for half precision.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import pytest

pytest.importorskip("triton")

from kernel_cases import cases
from triton_driver import compiling, inspect

from ssvd_kernels.ops.kernels import tile_sizes as tiles

# Bytes that a block may use: sm_80 has 163 KB, but its kernels are those of sm_86 and sm_89, too (see test_launches).
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}


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
    with compiling(2) as processes:
        rows = list(processes.map(inspect, cases(), repeat(arch), chunksize=8))
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
    one_pass = {(key, k): configs for key, by_rank in tiles.ONE_PASS.items() for k, configs in by_rank.items()}
    kernels: dict[str, Any] = {"_ssvd_linear_fwd_kernel": tiles.LINEAR, "_ssvd_linear_one_pass_kernel": one_pass}
    kernels["_ssvd_linear_concat_kernel"] = {key: tiles.LINEAR[key] for key in ("half", "half_odd")}
    kernels |= {"_compose_kernel": tiles.COMPOSE, "_core_grad_kernel": tiles.CORE_GRAD}
    kernels["_cayley_product_kernel"] = tiles.CAYLEY
    kernels["_cayley_leaf_kernel"] = {"": (tiles.CAYLEY_LEAF,)}
    kernels |= {name: {"": (tiles.CAYLEY_PACK,)} for name in ("_skew_kernel", "_unskew_kernel")}
    by_name = {(kernel.split(":")[1], config) for kernel, config in covered}
    assert by_name == {(name, c) for name, tables in kernels.items() for table in tables.values() for c in table}
