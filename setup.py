"""Only the optional extension ssvd_kernels._C; everything else is in pyproject.toml.

SSVD_BUILD = auto (CUDA, else C++, else pure Python) | none | cpu | cuda (these two fail loudly). Install with
--no-build-isolation: the torch it will run with must be visible. _build_info.json keeps what was built, or why not.
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from packaging.version import Version
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MODE = os.environ.get("SSVD_BUILD") or "auto"
if MODE not in ("auto", "none", "cpu", "cuda"):
    raise SystemExit(f"SSVD_BUILD={MODE!r}; allowed are auto, none, cpu and cuda")
DEPENDS = sorted(glob.glob("csrc/*"))
try:
    import torch
    from torch.utils import cpp_extension as torch_build
except ImportError as error:
    torch, torch_build, NO_TORCH = None, None, f"torch cannot be imported ({error})"  # type: ignore[assignment]


def refusal(kind: str) -> str | None:
    """Why `kind` (cpu or cuda) cannot be built here, None if it can be tried."""
    if torch is None:
        return NO_TORCH
    if not shutil.which(torch_build.get_cxx_compiler()):
        return f"the C++ compiler {torch_build.get_cxx_compiler()!r} was not found"
    if kind == "cuda":
        nvcc = shutil.which("nvcc", path=os.path.join(torch_build.CUDA_HOME or "", "bin"))
        if torch.version.cuda is None or nvcc is None:
            return f"torch is built for CUDA {torch.version.cuda}, CUDA_HOME is {torch_build.CUDA_HOME}, nvcc {nvcc}"
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release ([\d.]+)", text)
        if release is None or Version(release[1]).major != Version(torch.version.cuda).major:
            return f"nvcc is {release and release[1]}, torch is built for CUDA {torch.version.cuda}"
    return None


def extension(kind: str) -> Extension:
    # Compiled for OpenMP but not linked with it: the only OpenMP runtime must be torch's.
    cxx = ["-O3", "-g0", "-ffp-contract=fast", *(["-fopenmp"] if sys.platform == "linux" else [])]
    options: dict[str, Any] = {"depends": DEPENDS, "extra_compile_args": {"cxx": cxx, "nvcc": ["-O3"]}}
    sources = ["csrc/ssvd_ops.cpp", "csrc/cayley_cpu.cpp"]
    if kind == "cpu":
        return torch_build.CppExtension("ssvd_kernels._C", sources, **options)
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    options["define_macros"] = [("SSVD_WITH_CUDA", None)]
    return torch_build.CUDAExtension("ssvd_kernels._C", [*sources, "csrc/cayley_cuda.cu"], **options)


def record(folder: str, kind: str, reason: str | None) -> None:
    info = {"built": kind, "reason": reason, "archs": os.environ.get("TORCH_CUDA_ARCH_LIST")}
    if torch is not None:
        info |= {"torch": torch.__version__, "cuda": torch.version.cuda if kind == "cuda" else None}
    Path(folder, "ssvd_kernels", "_build_info.json").write_text(json.dumps(info) + "\n")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        record("" if self.editable_mode else self.build_lib, "none", "SSVD_BUILD=none")  # BuildExt overwrites it


class BuildExt(torch_build.BuildExtension if torch_build else build_ext):  # type: ignore[misc]
    def run(self) -> None:
        reasons, built = [], "none"
        for kind in ["cuda", "cpu"] if MODE == "auto" else [MODE]:
            reason = refusal(kind)
            if reason is None:
                self.distribution.ext_modules = [extension(kind)]
                self.swig_opts = None  # so that it can be finalised a second time
                self.finalize_options()
                try:
                    super().run()
                    built = kind
                    break
                except Exception as error:
                    reason = f"the build failed ({error})"
            if MODE != "auto":
                raise SystemExit(f"SSVD_BUILD={MODE}: {reason}")
            reasons.append(f"no {kind} extension: {reason}")
            print(f"ssvd_kernels: {reasons[-1]}", file=sys.stderr)
        if built == "none":
            self.extensions = []
        record("" if self.inplace else self.build_lib, built, "; ".join(reasons) or None)


modules = [] if MODE == "none" else [Extension("ssvd_kernels._C", [], depends=DEPENDS)]  # the real one: BuildExt.run
setup(ext_modules=modules, cmdclass={"build_py": BuildPy, "build_ext": BuildExt})
