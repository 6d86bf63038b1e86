"""Only the optional extension ssvd_kernels._C; everything else is in pyproject.toml.

SSVD_BUILD = auto (CUDA, else C++, else pure Python) | none | cpu | cuda (these two fail loudly). Install with
--no-build-isolation: the torch it will run with must be visible. _build_info.json keeps what was built, or why not.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MODE = os.environ.get("SSVD_BUILD") or "auto"
if MODE not in ("auto", "none", "cpu", "cuda"):
    raise SystemExit(f"SSVD_BUILD={MODE!r}; allowed are auto, none, cpu and cuda")
try:
    import torch
    from torch.utils import cpp_extension as torch_build
except ImportError:
    torch = torch_build = None  # type: ignore[assignment]


def extension(kind: str) -> Extension:
    """The extension for `kind` (cpu or cuda); RuntimeError says why it cannot be built here."""
    if torch is None:
        raise RuntimeError("torch cannot be imported")
    if not shutil.which(torch_build.get_cxx_compiler()):
        raise RuntimeError(f"the C++ compiler {torch_build.get_cxx_compiler()!r} was not found")
    # Compiled for OpenMP but not linked with it: the only OpenMP runtime must be torch's.
    cxx = ["-O3", "-g0", "-ffp-contract=fast"] + ["-fopenmp"] * (sys.platform == "linux")
    options: dict[str, Any] = {"extra_compile_args": {"cxx": cxx, "nvcc": ["-O3"]}}
    sources = ["csrc/ssvd_ops.cpp", "csrc/cayley_cpu.cpp"]
    if kind == "cpu":
        return torch_build.CppExtension("ssvd_kernels._C", sources, **options)
    nvcc = shutil.which("nvcc", path=os.path.join(torch_build.CUDA_HOME or "", "bin"))
    if torch.version.cuda is None or nvcc is None:  # that their major versions agree, BuildExtension checks
        raise RuntimeError(f"torch is built for CUDA {torch.version.cuda}, CUDA_HOME is {torch_build.CUDA_HOME}")
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    options["define_macros"] = [("SSVD_WITH_CUDA", None)]
    return torch_build.CUDAExtension("ssvd_kernels._C", [*sources, "csrc/cayley_cuda.cu"], **options)


def record(folder: str, kind: str, reason: str | None) -> None:
    info = {"built": kind, "reason": reason, "torch": torch and torch.__version__, "cuda": None}
    if kind == "cuda":
        info |= {"cuda": torch.version.cuda, "archs": os.environ.get("TORCH_CUDA_ARCH_LIST")}
    Path(folder, "ssvd_kernels", "_build_info.json").write_text(json.dumps(info) + "\n")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        record("" if self.editable_mode else self.build_lib, "none", "SSVD_BUILD=none")  # BuildExt overwrites it


class BuildExt(torch_build.BuildExtension if torch_build else build_ext):  # type: ignore[misc]
    def run(self) -> None:
        reasons: list[str] = []
        for kind in ["cuda", "cpu", "none"] if MODE == "auto" else [MODE]:
            try:
                self.extensions = self.distribution.ext_modules = [] if kind == "none" else [extension(kind)]
                self.swig_opts = None  # so that the options can be finalised a second time
                self.finalize_options()
                super().run()
                return record("" if self.inplace else self.build_lib, kind, "; ".join(reasons) or None)
            except Exception as error:
                if MODE != "auto":
                    raise SystemExit(f"SSVD_BUILD={MODE}: {error}") from error
                reasons.append(f"no {kind} extension: {error}")
                print(f"ssvd_kernels: {reasons[-1]}", file=sys.stderr)


modules = [Extension("ssvd_kernels._C", [], depends=[*map(str, Path("csrc").iterdir())])]  # made real by BuildExt.run
setup(ext_modules=[] if MODE == "none" else modules, cmdclass={"build_py": BuildPy, "build_ext": BuildExt})
