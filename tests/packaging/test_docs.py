"""The documentation names files, tests and functions that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import ssvd_kernels as sk
from ssvd_kernels.config import PRESETS

ROOT = Path(__file__).parents[2]
PLACES = ("*.md", "docs/*.md", "bench/results/README.md", "experiments/*/results/README.md")
PAGES = [str(path.relative_to(ROOT)) for place in PLACES for path in sorted(ROOT.glob(place))]
TABLE = re.findall(r"\]\((tests/[\w/]+\.py)#(\w+)\)", (ROOT / "README.md").read_text())


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_cell_of_the_feature_table_is_a_test():
    assert len(TABLE) >= 30 and len(PAGES) >= 9
    missing = [f"{path}::{name}" for path, name in TABLE if name not in functions(ROOT / path)]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text())
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]


def test_the_guide_lists_every_preset():
    section = (ROOT / "docs/guide.md").read_text().partition("### Presets")[2].partition("\n## ")[0]
    listed = [name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(.*?)`", row)]
    assert listed[1:] == list(PRESETS)  # after the heading


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_python_blocks_parse_and_use_public_names(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    for block in blocks:
        ast.parse(block)
        used = set(re.findall(r"\bsk\.(\w+)", block))
        assert used <= set(sk.__all__), used - set(sk.__all__)
