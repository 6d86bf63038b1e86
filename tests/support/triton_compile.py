"""Compiles kernels for GPUs that need not be here and prints what the machine code uses, one JSON line a case.

python triton_compile.py ARCH FIRST STEP [FILTER]: every STEP-th of the cases from FIRST on. A process of its
own, because the tests run the kernels in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from kernel_cases import Case, cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


def source(case: Case) -> ASTSource:
    """What the launcher's arguments look like to the compiler."""
    module, name = case.kernel.split(":")
    kernel = getattr(importlib.import_module(f"ssvd_kernels.ops.kernels.{module}"), name)
    signature, constants, attributes = {}, {}, {}
    for position, arg in enumerate(kernel.arg_names):
        if arg in case.constants or arg in case.unit:
            signature[arg] = "constexpr"
            constants[(position,)] = case.constants.get(arg, 1)
            continue
        number = "fp32" if arg in ("alpha", "beta") else "i32"
        signature[arg] = "*" + case.pointers.get(arg, case.dtype) if arg.endswith("_ptr") else number
        odd = case.odd or number == "fp32" or arg in ("T", "chunk")
        if arg.endswith("_ptr") or not odd:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def inspect(case: Case, arch: int) -> dict[str, object]:
    """Registers, stack, shared memory and the instructions that matter, from the cubin."""
    options = {"num_warps": case.config.warps, "num_stages": case.config.stages}
    compiled = triton.compile(source(case), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        commands = [[CUOBJDUMP, flag, cubin.name] for flag in ("--dump-resource-usage", "-sass")]
        usage, sass = (subprocess.check_output(command, text=True, timeout=60) for command in commands)
    used = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    count = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("HGMMA", "HMMA", "STL", "LDL")}
    return {"label": case.label, "arch": arch, **used, "shared": compiled.metadata.shared, **count}


def main(arch: int, first: int, step: int, pattern: str = "") -> None:
    chosen = [case for case in cases() if pattern in case.label]
    for case in chosen[first::step]:
        print(json.dumps(inspect(case, arch) | {"tensor_cores": case.tensor_cores}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *sys.argv[4:])
