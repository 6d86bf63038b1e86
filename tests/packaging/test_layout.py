"""The folders show the architecture: imports point downwards only, and no file has to be searched."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ssvd_kernels"
FLOORS = [  # from the top; folders on one floor do not import each other
    {"__main__"},
    {"cli"},
    {"integrations"},
    {"adapters"},
    {"model"},
    {"layers"},
    {"ops", "basis"},
    {"config", "utils"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imported(path: Path) -> set[str]:
    """First names below `ssvd_kernels` that the module imports, anywhere in it."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = inside[: len(inside) - node.level] if node.level else ()
        target = (*base, *(node.module.split(".") if node.module else ()))
        if target[:1] == ("ssvd_kernels",):
            found |= {target[1]} if len(target) > 1 else {alias.name for alias in node.names}
    return found & FLOOR_OF.keys()


@pytest.mark.parametrize("folder", sorted(FLOOR_OF))
def test_imports_point_downwards(folder):
    place = PACKAGE / folder
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    for file in files:
        wrong = {name for name in imported(file) if name != folder and FLOOR_OF[name] <= FLOOR_OF[folder]}
        assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_kernels_import_nothing_of_the_ops_above_them():
    for file in (PACKAGE / "ops" / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                absolute = (node.module or "").startswith("ssvd_kernels.ops.kernels") or node.level == 1
                assert absolute or (node.level == 0 and "ssvd_kernels" not in (node.module or "")), file.name


def test_every_folder_has_a_floor_and_few_modules_lie_flat():
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert entries - {"__init__"} == FLOOR_OF.keys()
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_no_file_is_longer_than_400_lines():
    folders = ("ssvd_kernels", "csrc", "bench", "experiments", "tests", "examples")
    found = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    files = [path for path in found if path.suffix in (".py", ".cpp", ".cu", ".h")]
    assert len(files) > 100
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text().splitlines())) > 400}
    assert not long
