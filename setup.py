"""Only the optional extension ssvd_kernels._C; everything else is in pyproject.toml.

SSVD_BUILD = auto (CUDA, else C++, else pure Python) | none | cpu | cuda (these two fail loudly). Install with
--no-build-isolation: the torch it will run with must be visible. _build_info.json keeps what was built, or why not.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MODE = os.environ.get("SSVD_BUILD") or "auto"
if MODE not in ("auto", "none", "cpu", "cuda"):
    raise SystemExit(f"SSVD_BUILD must be one of auto, none, cpu, cuda, got {MODE!r}")
try:
    import torch
    from torch.utils import cpp_extension as torch_build
except ImportError:
    torch = torch_build = None  # type: ignore[assignment]
# The line of an error of a compiler or linker, not of a warning or (indented) of quoted source.
ERROR = re.compile(
    r"(?i)(?!\s|.*\bwarning\b).*"
    r"(\b(error|fatal)\s*(#\S+|[a-z]+\d+)?\s*:|undefined (reference|symbol)|cannot (find|open)|not found|no such file)"
)


def extension(kind: str) -> Extension:
    """The extension for `kind` (cpu or cuda); RuntimeError says why it cannot be built here."""
    if torch is None:
        raise RuntimeError("torch cannot be imported")
    if not shutil.which(torch_build.get_cxx_compiler()):
        raise RuntimeError(f"the C++ compiler {torch_build.get_cxx_compiler()!r} was not found")
    # Compiled for OpenMP but not linked with it: the only OpenMP runtime must be torch's.
    cxx = ["-O3", "-g0", "-ffp-contract=fast"] + ["-fopenmp"] * (sys.platform == "linux")
    options: dict[str, Any] = {"extra_compile_args": {"cxx": cxx, "nvcc": ["-O3"]}}
    if sys.platform == "linux":  # a C++ library that the compiler links statically must not mix with torch's
        options["extra_link_args"] = ["-Wl,--exclude-libs,ALL"]
    sources = ["csrc/ssvd_ops.cpp", "csrc/cayley_cpu.cpp"]
    if kind == "cpu":
        return torch_build.CppExtension("ssvd_kernels._C", sources, **options)
    nvcc = shutil.which("nvcc", path=os.path.join(torch_build.CUDA_HOME or "", "bin"))
    if torch.version.cuda is None or nvcc is None:  # that their major versions agree, BuildExtension checks
        raise RuntimeError(f"torch is built for CUDA {torch.version.cuda}, CUDA_HOME is {torch_build.CUDA_HOME}")
    if not (torch.cuda.is_available() or os.environ.get("TORCH_CUDA_ARCH_LIST")):
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0+PTX"
    options["define_macros"] = [("SSVD_WITH_CUDA", None)]
    return torch_build.CUDAExtension("ssvd_kernels._C", [*sources, "csrc/cayley_cuda.cu"], **options)


@contextlib.contextmanager
def first_error() -> Iterator[None]:
    """Exceptions become RuntimeErrors that say what the compiler or linker wrote first; all is shown afterwards."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        failure = None
        saved = swap_streams([file.fileno()] * 2)
        try:
            yield
        except Exception as error:
            failure = error
        finally:
            for descriptor in (*swap_streams(saved), *saved):
                os.close(descriptor)
            file.seek(0)
            written = file.read()
            sys.stderr.write(written)
    if failure is not None:
        said = next(filter(ERROR.match, written.splitlines()), None)
        if said is None and isinstance(called := failure.__context__, subprocess.CalledProcessError):
            said = f"{called.cmd[0]} failed with exit code {called.returncode}"  # not the whole command
        raise RuntimeError(" ".join((said or str(failure)).split())[:200]) from failure


def swap_streams(descriptors: list[int]) -> list[int]:
    """Turns stdout and stderr, those of compilers too, to these descriptors and returns copies of the former ones."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    for number, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, number)
    return saved


def record(folder: str, kind: str, failed: dict[str, str]) -> None:
    info = {"built": kind, "failed": failed, "torch": torch and torch.__version__, "cuda": None}
    if kind == "cuda":
        flags = " ".join(torch_build._get_cuda_arch_flags())  # those that BuildExtension gave nvcc
        info |= {"cuda": torch.version.cuda, "archs": " ".join(re.findall(r",code=(\w+)", flags))}
    Path(folder, "ssvd_kernels", "_build_info.json").write_text(json.dumps(info) + "\n")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        record("" if self.editable_mode else self.build_lib, "none", {})  # SSVD_BUILD=none; else BuildExt overwrites it


class BuildExt(torch_build.BuildExtension if torch_build else build_ext):  # type: ignore[misc]
    command_name = "build_ext"  # by which reinitialize_command finds the options of the command line

    def run(self) -> None:
        os.environ["LANGUAGE"] = "en"  # of the compilers' messages, as ERROR knows them
        given = {"inplace": self.inplace, "editable_mode": self.editable_mode, "force": True}
        temp, lib = self.build_temp, self.build_lib
        failed: dict[str, str] = {}
        for kind in ["cuda", "cpu", "none"] if MODE == "auto" else [MODE]:
            # As new: an attempt leaves finalised options and a compiler behind, and objects that no other may use.
            self.distribution.reinitialize_command(self)
            self.__dict__.update(given, build_temp=os.path.join(temp, kind))
            try:
                with first_error():
                    self.distribution.ext_modules = [] if kind == "none" else [extension(kind)]
                    self.ensure_finalized()
                    super().run()
                return record("" if self.inplace else lib, kind, failed)
            except RuntimeError as error:
                shutil.rmtree(os.path.join(temp, kind), ignore_errors=True)
                for library in Path(lib, "ssvd_kernels").glob("_C.*"):
                    library.unlink()
                if MODE != "auto":
                    raise SystemExit(f"SSVD_BUILD={MODE}: {error}") from error
                failed[kind] = str(error)
                print(f"ssvd_kernels: no {kind} extension: {error}", file=sys.stderr)


modules = [Extension("ssvd_kernels._C", [], depends=[*map(str, Path("csrc").iterdir())])]  # made real by BuildExt.run
setup(ext_modules=[] if MODE == "none" else modules, cmdclass={"build_py": BuildPy, "build_ext": BuildExt})
