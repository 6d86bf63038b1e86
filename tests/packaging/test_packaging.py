"""The built wheel, imported outside the checkout, with and without _C, torch and triton."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheels")]  # which are built once a worker

ROOT = Path(__file__).parents[2]
SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"]
SUITE_ONLY = ("TRITON_INTERPRET", "PYTHONPATH", "SSVD_BUILD", "SSVD_DISABLE_EXT")

# Put before a program: the named package cannot be imported, as if it were not installed.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Hide())
"""
STATE = """
import json
import torch
from ssvd_kernels.ops import extension
print(json.dumps([extension.available(), extension.unavailable_reason(), extension.__file__]))
"""
USE = """
import sys
import torch
import ssvd_kernels as sk
torch.manual_seed(0)
layer = torch.nn.Linear(24, 16)
adapted = sk.SSVDLinear.from_linear(layer, sk.SSVDConfig(rank=8))
x = torch.randn(5, 24)
assert torch.equal(adapted(x), layer(x))
adapted(x).square().sum().backward()
assert adapted.theta.grad.abs().sum() > 0 and adapted.delta_sigma.grad.abs().sum() > 0
assert "site" in sk.__file__, sk.__file__
"""


def environment(**extra: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in SUITE_ONLY} | extra


def build(folder: Path, mode: str, before: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
    """pip wheel of a copy of the sources, with `before` above setup.py: the checkout's build files stay out of it."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    (source / "setup.py").write_text(before + (ROOT / "setup.py").read_text())
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    for name in ("csrc", "ssvd_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--no-index"]
    env = environment(SSVD_BUILD=mode, MAX_JOBS="2", **extra)
    command += ["--wheel-dir", str(folder / "wheels"), str(source)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def install(folder: Path, mode: str, before: str = "", **extra: str) -> Path:
    done = build(folder, mode, before, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "log").write_text(done.stdout + done.stderr)
    (wheel,) = (folder / "wheels").glob("*.whl")
    target = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return target


@pytest.fixture(scope="session")
def cpu_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("cpu"), "cpu")


@pytest.fixture(scope="session")
def pure_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("pure"), "none")


def run(site: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Python outside the checkout, with the installed wheel before everything else."""
    command, env = [sys.executable, *arguments], environment(PYTHONPATH=str(site))
    done = subprocess.run(command, env=env, cwd=site.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def state(site: Path) -> tuple[bool, str | None]:
    available, reason, file = json.loads(run(site, "-c", STATE).stdout)
    assert Path(file).is_relative_to(site)
    return available, reason


def edited(site: Path, folder: Path, **changes: object) -> Path:
    """A copy of the installed wheel whose build record is changed."""
    copy = shutil.copytree(site, folder / "site")
    path = copy / "ssvd_kernels" / "_build_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


def test_wheel_holds_what_it_should(cpu_site, pure_site):
    for site, compiled in ((cpu_site, True), (pure_site, False)):
        (wheel,) = (site.parent / "wheels").glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        assert any(name.startswith("ssvd_kernels/_C.") for name in names) == compiled
        assert wheel.name.endswith("-none-any.whl") != compiled
        modules = ("ops/kernels/__init__", "cli/info", "cli/merge", "cli/convert")
        wanted = {"py.typed", "_build_info.json", *(f"{module}.py" for module in modules)}
        assert {f"ssvd_kernels/{name}" for name in wanted} <= {*names}
        assert all(name.startswith(("ssvd_kernels/", "ssvd_kernels-")) for name in names)


def test_with_and_without_the_extension(cpu_site, pure_site):
    assert state(cpu_site) == (True, None)
    assert state(pure_site) == (False, "_C was not built: SSVD_BUILD=none")
    assert "SSVD_BUILD=none" in run(pure_site, "-m", "ssvd_kernels", "info").stdout


@pytest.mark.parametrize("hidden", ["nothing", "triton"])
@pytest.mark.parametrize("site", ["cpu_site", "pure_site"])
def test_works_outside_the_checkout(site, hidden, request):
    run(request.getfixturevalue(site), "-c", HIDE.format(name=hidden) + USE)


def test_import_loads_neither_triton_nor_the_extension(cpu_site):
    code = "import sys, ssvd_kernels; print([n for n in ('triton', 'ssvd_kernels._C') if n in sys.modules])"
    assert run(cpu_site, "-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize("hidden", ["nothing", "torch", "triton"])
def test_info_says_what_is_missing(cpu_site, hidden):
    code = HIDE.format(name=hidden) + "import runpy; sys.argv = ['ssvd_kernels', 'info']\n"
    done = run(cpu_site, "-c", code + "runpy.run_module('ssvd_kernels', run_name='__main__')")
    assert done.stdout.strip() and not done.stderr.strip()
    assert hidden == "nothing" or f"No module named '{hidden}'" in done.stdout


def test_selftest_checks_what_is_installed(cpu_site, pure_site):
    compiled, pure = (run(site, "-m", "ssvd_kernels", "selftest").stdout for site in (cpu_site, pure_site))
    assert "ok    cayley k=153, float32, ext, cpu" in compiled
    assert "ext, cpu: error" not in pure and "cayley, backend ext, cpu: not checked (_C was not built" in pure
    assert all("checks passed" in text and "FAIL" not in text for text in (compiled, pure))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"torch": "1.0.0"}, "_C was built for torch 1.0.0, but torch "),
        ({"built": "cuda", "cuda": "1.0"}, "_C was built for CUDA 1.0, "),
        ({}, "_C could not be loaded: "),
    ],
    ids=["another torch", "another cuda", "broken"],
)
def test_an_extension_that_does_not_fit_is_bypassed(cpu_site, tmp_path, record, reason):
    """What importing it says is not the reason where the build record tells one."""
    site = edited(cpu_site, tmp_path, **record)
    for library in (site / "ssvd_kernels").glob("_C*"):
        library.write_text("not a library")
    available, why = state(site)
    assert not available and str(why).startswith(reason)
    run(site, "-c", USE)


def test_build_mode_must_be_known(tmp_path):
    done = build(tmp_path, "nonsense")
    assert done.returncode != 0
    assert "SSVD_BUILD must be one of auto, none, cpu, cuda, got 'nonsense'" in done.stdout + done.stderr


def setup_info(folder: Path, before: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """setup.py's build of everything into `folder`, after the statements `before`."""
    code = f"{before}\nimport runpy, sys\nsys.argv = ['setup.py', '-q', 'build', '-b', {str(folder)!r}]\n"
    command = [sys.executable, "-c", code + "runpy.run_path('setup.py', run_name='__main__')"]
    return subprocess.run(command, cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("before", "env", "reason"),
    [
        (HIDE.format(name="torch"), {}, "torch cannot be imported"),
        ("", {"CXX": "no-such-compiler"}, "the C++ compiler 'no-such-compiler' was not found"),
        ("", {"CXX": "false"}, " failed with exit code 1"),
    ],
)
def test_without_torch_or_compiler(tmp_path, before, env, reason):
    """auto installs pure Python and says why; an explicit cpu fails and says why."""
    done = setup_info(tmp_path, before, SSVD_BUILD="auto", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("lib*/ssvd_kernels/_build_info.json")
    info = json.loads(path.read_text())
    assert info["built"] == "none" and list(info["failed"]) == ["cuda", "cpu"] and reason in info["failed"]["cpu"]
    assert f"ssvd_kernels: no cpu extension: {info['failed']['cpu']}" in done.stderr
    assert not list(tmp_path.rglob("_C*"))
    explicit = setup_info(tmp_path, before, SSVD_BUILD="cpu", **env)
    assert explicit.returncode != 0 and "SSVD_BUILD=cpu: " in explicit.stderr


def test_cuda_is_refused_without_its_torch(tmp_path):
    if torch.version.cuda is not None:
        pytest.skip("this torch is built with CUDA")
    done = setup_info(tmp_path, SSVD_BUILD="cuda")
    assert done.returncode != 0 and "SSVD_BUILD=cuda: torch is built for CUDA None" in done.stderr
