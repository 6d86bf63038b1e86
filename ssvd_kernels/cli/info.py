"""info: what is built and installed, and why something is unavailable. Requires neither torch nor Triton."""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

from .. import __version__
from ..utils.versions import conflicts

ENVIRONMENT = {
    "SSVD_BACKEND": "auto | reference | ext | triton: forces a backend (an op that it does not support raises)",
    "SSVD_DISABLE_EXT": "1: do not load the compiled extension",
    "SSVD_CACHE": "a folder: cache factorisations there (else only where cache_dir= is given)",
    "SSVD_BUILD": "auto | none | cpu | cuda: what `pip install` compiles",
    "TRITON_INTERPRET": "1: run the Triton kernels on the CPU, for tests",
}


def info() -> str:
    """One line per part: version or reason why it is missing."""
    lines = [f"ssvd_kernels {__version__}, Python {platform.python_version()}, {platform.machine()}"]
    try:
        import torch
    except ImportError as error:
        lines.append(f"torch        missing ({error}): nothing but this command works; pip install torch")
        return "\n".join(lines)
    lines.append(f"torch        {torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        lines.append(f"cuda         {torch.version.cuda}, {torch.cuda.get_device_name()}, sm_{major}{minor}")
    else:
        reason = "torch is built without CUDA" if torch.version.cuda is None else "no device visible"
        lines.append(f"cuda         not available ({reason})")
    lines += [
        _extension_line(),
        _triton_line(torch),
        *(f"conflict     {sentence}" for sentence in conflicts()),
        "",
        "backend of each op (auto), and why others are not available:",
    ]
    lines += _backend_lines(torch)
    lines += ["", "environment:"]
    lines += [f"  {name}={os.environ.get(name, '')}  {text}" for name, text in ENVIRONMENT.items()]
    return "\n".join(lines)


def _extension_line() -> str:
    from ..ops import extension

    if not extension.available():
        return f"extension    not available ({extension.unavailable_reason()}): using the PyTorch reference"
    build, failures = extension.build_info(), extension.build_failures()
    line = f"extension    built for torch {build.get('torch')}, cuda {build.get('cuda') or 'none'}"
    return line + (f" ({failures})" if failures else "")


def _triton_line(torch: Any) -> str:
    from ..ops.kernels import unavailable_reason

    reason = unavailable_reason(torch.device("cuda"), torch.bfloat16)
    try:
        import triton
    except ImportError:
        return f"triton       not available ({reason})"
    return f"triton       {triton.__version__}" + (f", not usable on cuda ({reason})" if reason else "")


def _backend_lines(torch: Any) -> list[str]:
    from ..ops import extension
    from ..ops.dispatch import backend_for, refusals

    def shown(why: str) -> str:
        return "not available" if why == extension.unavailable_reason() else why  # the line of the extension says why

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = []
    for device in map(torch.device, devices):
        for op, dtype in (("cayley", torch.float32), ("linear", torch.float32), ("linear", torch.bfloat16)):
            chosen = backend_for(op, device, dtype)
            refused = "; ".join(f"{name}: {shown(why)}" for name, why in refusals(op, device, dtype).items() if why)
            name = str(dtype).removeprefix("torch.")
            lines.append(f"  {op:7s} {device.type:5s} {name:9s} {chosen:10s}" + (f" ({refused})" if refused else ""))
    return lines


def run(args: argparse.Namespace) -> int:
    print(info())
    return 0
