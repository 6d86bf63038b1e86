"""The CUDA sources compile for the GPUs they are written for, on machines without one, and spill no register."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[2] / "csrc" / "cayley_cuda.cu"
INCLUDE = Path(torch.__file__).parent / "include"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
NAMES = ("leaf", "skew", "unskew", "check", "wide")
KERNELS = {f"{name}_kernel<{dtype}>" for name in NAMES for dtype in ("float", "double")}


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiles_without_spills(arch, tmp_path):
    # Only c10's headers are needed. The macro stands for a header that a torch without CUDA does not have.
    flags = ["-std=c++20", "-O3", "-Xptxas", "-v", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", f"-I{INCLUDE}"]
    command = [str(NVCC), *flags, f"-arch={arch}", "-cubin", "-o", str(tmp_path / "out.cubin"), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pattern = r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(pattern + r".*?Used (\d+) registers", done.stderr, re.DOTALL)
    assert len(found) == len(KERNELS)
    for symbol, compiled_for, stores, loads, registers in found:
        name, dtype = re.search(rf"\d({'|'.join(NAMES)})_kernelI([fd])E", symbol).groups()
        assert (compiled_for, stores, loads) == (arch, "0", "0"), (name, dtype)
        assert int(registers) <= 128, (name, dtype)  # two blocks of 256 threads fit on a multiprocessor
