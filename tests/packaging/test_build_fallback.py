"""A build that fails half way ends with C++ where CUDA fails, with pure Python where that fails, and says why.

nvcc, the C++ compiler and the linker are stand-ins that fail as asked; torch says that it is built for CUDA.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_packaging import USE, install, run, setup_info, state
from torch.utils import cpp_extension

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheels")]

CUDA_TORCH = """
import os, torch, torch.utils.cpp_extension as e
torch.version.cuda, e.CUDA_HOME = "13.0", os.environ["CUDA_HOME"]
"""
NO_NINJA = "e.is_ninja_available = lambda: False\n"
OP = """
import torch
from ssvd_kernels.ops import extension, reference
assert extension.available() and "site" in extension.__file__
theta = torch.randn(2, 10, dtype=torch.float64)
assert torch.allclose(torch.ops.ssvd_kernels.cayley_delta(theta, 5), reference.cayley_delta_ref(theta, 5))
"""

NVCC_SAYS = "nvcc fatal : Unsupported gpu architecture 'compute_80'"
COMPILER_SAYS = "ssvd_ops.cpp:12:10: fatal error: torch/library.h: No such file or directory"
CUDA_LINKER_SAYS = "/usr/bin/ld: cannot find -lcudart: No such file or directory"
LINKER_SAYS = "ssvd_ops.cpp:(.text+0x5): undefined reference to `g'"
LINKER_OUTPUT = f"""\
/usr/bin/ld: warning: libx.so, needed by liby.so, not found (try using -rpath)
   12 |   throw "fatal error: this is the source of a warning";
/usr/bin/ld: ssvd_ops.o: in function `f':
{LINKER_SAYS}
collect2: error: ld returned 1 exit status"""

COMPILER = shutil.which(cpp_extension.get_cxx_compiler()) or "c++"
# The empty object of a stand-in compiler: a library that is linked from it cannot be imported.
COMPILE = f'while [ "$1" != -o ]; do shift; done; echo | {COMPILER} -x c++ -c - -o "$2"; exit'


def fail(says: str) -> str:
    return f"cat >&2 <<'END'\n{says}\nEND\nexit 1"


VERSION = "case $* in *--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88'; exit;; esac\n"
NVCC = {"works": VERSION + COMPILE, "fails": VERSION + fail(NVCC_SAYS.replace("fatal", "fatal  "))}
CXX = {
    # What is compiled for CUDA must not go into the C++ extension.
    "lacks CUDA libraries": f"case $* in *-lcudart*) {fail(CUDA_LINKER_SAYS)};; *-DSSVD_WITH_CUDA*) {COMPILE};; esac\n"
    f'exec {COMPILER} "$@"',
    "works": COMPILE,
    "cannot compile": fail(COMPILER_SAYS),
    "cannot link": f'case " $* " in *" -c "*) {COMPILE};; esac\n'
    f'while [ "$1" != -o ]; do shift; done; echo half-linked >"$2"\n{fail(LINKER_OUTPUT)}',
}


def tools(folder: Path, nvcc: str, cxx: str) -> dict[str, str]:
    """The environment in which these stand-ins are the compilers."""
    paths = {folder / "cuda" / "bin" / "nvcc": NVCC[nvcc], folder / "g++": CXX[cxx]}
    for path, script in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    names = {"CUDA_HOME": str(folder / "cuda"), "CXX": str(folder / "g++"), "LDCXXSHARED": f"{folder}/g++ -shared"}
    return names | {"TORCH_DONT_CHECK_COMPILER_ABI": "1"}


def extension_line(site: Path) -> str:
    lines = run(site, "-m", "ssvd_kernels", "info").stdout.splitlines()
    (line,) = (line for line in lines if line.startswith("extension "))
    return line


@pytest.mark.parametrize(
    ("nvcc", "says"),
    [pytest.param("fails", NVCC_SAYS, marks=pytest.mark.slow), ("works", CUDA_LINKER_SAYS)],
    ids=["no compile", "no link"],
)
def test_without_cuda_it_is_cpp(tmp_path, nvcc, says):
    site = install(tmp_path, "auto", CUDA_TORCH, **tools(tmp_path / "tools", nvcc, "lacks CUDA libraries"))
    record = json.loads((site / "ssvd_kernels" / "_build_info.json").read_text())
    assert record["built"] == "cpu" and record["failed"] == {"cuda": says} and record["cuda"] is None
    assert state(site) == (True, None)
    run(site, "-c", OP)
    run(site, "-c", USE)
    assert extension_line(site) == f"extension    built for torch {record['torch']}, cuda none (cuda: {says})"
    assert not list((tmp_path / "source" / "build").glob("temp*/cuda"))  # objects of the failed attempt
    assert f"no cuda extension: {says}" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("cxx", "says", "ninja"),
    [
        ("cannot compile", COMPILER_SAYS, True),
        pytest.param("cannot compile", COMPILER_SAYS, False, marks=pytest.mark.slow),
        ("cannot link", LINKER_SAYS, True),
        pytest.param("cannot link", LINKER_SAYS, False, marks=pytest.mark.slow),
    ],
    ids=["no compile", "no compile, no ninja", "no link", "no link, no ninja"],
)
def test_without_compiler_it_is_python(tmp_path, cxx, says, ninja):
    before = CUDA_TORCH + NO_NINJA * (not ninja)
    done = setup_info(tmp_path / "site", before, SSVD_BUILD="auto", **tools(tmp_path / "tools", "works", cxx))
    assert done.returncode == 0, done.stderr
    (site,) = (tmp_path / "site").glob("lib*")
    record = json.loads((site / "ssvd_kernels" / "_build_info.json").read_text())
    assert record["built"] == "none" and record["failed"] == {"cuda": says, "cpu": says}
    why = f"_C was not built: cuda: {says}; cpu: {says}"
    assert state(site) == (False, why)
    run(site, "-c", USE)
    assert extension_line(site) == f"extension    not available ({why}): using the PyTorch reference"
    assert run(site, "-m", "ssvd_kernels", "info").stdout.count("_C was not built") == 1
    assert not list((tmp_path / "site").rglob("_C*"))  # half-linked
    assert (LINKER_OUTPUT if cxx == "cannot link" else COMPILER_SAYS) in done.stderr


@pytest.mark.parametrize(
    ("asked", "archs"), [("", "sm_80 compute_90 sm_90"), ("7.5 9.0a;12.0+PTX", "compute_120 sm_120 sm_75 sm_90a")]
)
def test_the_architectures_that_were_built_are_recorded(tmp_path, asked, archs):
    env = tools(tmp_path / "tools", "works", "works") | {"TORCH_CUDA_ARCH_LIST": asked}
    done = setup_info(tmp_path / "build", CUDA_TORCH, SSVD_BUILD="cuda", **env)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("build/lib*/ssvd_kernels/_build_info.json")
    assert json.loads(path.read_text())["archs"] == archs


@pytest.mark.parametrize(
    ("mode", "nvcc", "cxx", "says"),
    [
        ("cuda", "fails", "lacks CUDA libraries", NVCC_SAYS),
        ("cuda", "works", "lacks CUDA libraries", CUDA_LINKER_SAYS),
        ("cpu", "works", "cannot compile", COMPILER_SAYS),
        ("cpu", "works", "cannot link", LINKER_SAYS),
    ],
    ids=["cuda, no compile", "cuda, no link", "cpu, no compile", "cpu, no link"],
)
def test_an_explicit_build_fails_with_the_same_line(tmp_path, mode, nvcc, cxx, says):
    done = setup_info(tmp_path / "build", CUDA_TORCH, SSVD_BUILD=mode, **tools(tmp_path / "tools", nvcc, cxx))
    assert done.returncode != 0 and done.stderr.splitlines()[-1] == f"SSVD_BUILD={mode}: {says}"
    assert not list((tmp_path / "build").rglob("_C*"))
