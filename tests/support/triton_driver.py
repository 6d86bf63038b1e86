"""GPUs that need not be here: Triton compiles and loads its kernels for them, and what would be launched is noted.

Triton's own checks of a kernel against the device run, and everything up to the C call of a launch. Tensors are on the
CPU, as nothing reads them. Only for processes of `compiling()`: in the tests' own, Triton interprets.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from processes import update_environment
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB that a block may use, by compute capability
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
UNLAUNCHED = ("empty", "new_empty", "_unsafe_view")  # operations of PyTorch without work for a GPU, besides views


class Launch(NamedTuple):
    """Of a kernel of ours, or of an operation of PyTorch, of which only the name is known."""

    name: str
    grid: tuple[int, ...] = ()
    shared: int = 0  # bytes
    spilled: int = 0  # bytes a thread
    tensor_cores: bool = False
    fused: bool = True  # products and sums


def disassembled(cubin: bytes, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.check_output([CUOBJDUMP, *flags, file.name], text=True, timeout=60)


def resources(text: str) -> dict[str, int]:
    """Of a thread, in cuobjdump's words."""
    return {what: int(number) for what, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


class Driver:
    """What Triton asks of CUDA. Devices are numbered by their compute capability: caches keep them apart."""

    def __init__(self) -> None:
        self.capability, self.launches = 90, list[Launch]()
        self.utils = self

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[device] * 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spilled words, most threads); the function stands for the spilled bytes."""
        used = resources(disassembled(binary, "--dump-resource-usage"))
        spilled = used["STACK"] + used["LOCAL"]
        return 1, spilled, used["REG"], spilled // 4, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        ptx = Path(get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")).read_text()
        tensor_cores = any(instruction in ptx for instruction in ("mma.sync", "wgmma", "tcgen05.mma"))

        def launch(x: int, y: int, z: int, stream: int, spilled: int, *rest: Any) -> None:
            fused = metadata.enable_fp_fusion
            self.launches.append(Launch(metadata.name, (x, y, z), metadata.shared, spilled, tensor_cores, fused))

        return launch


DRIVER = Driver()


class Operations(TorchDispatchMode):
    """Notes those that launch something on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(result, torch.Tensor) and not func.is_view and not name.startswith(UNLAUNCHED):
            # padding fills, then copies
            DRIVER.launches.extend([Launch(name)] * (2 if name == "constant_pad_nd" else 1))
        return result


@contextmanager
def gpu(capability: int) -> Iterator[list[Launch]]:
    """A GPU of this compute capability is the current one; gives what is launched there."""
    triton.runtime.driver.set_active(DRIVER)
    DRIVER.capability, DRIVER.launches = capability, []
    with Operations():
        yield DRIVER.launches


def compiling(processes: int = 1) -> ProcessPoolExecutor:
    """Processes whose Triton compiles, and fuses products and sums only where it is told to."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "0"}
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), update_environment, (environment,))
