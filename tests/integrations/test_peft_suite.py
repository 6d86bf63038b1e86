"""The script that runs PEFT's own tests: a test or an entry that it does not know is an error."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

for _needed in ("accelerate", "peft", "tokenizers", "transformers"):
    pytest.importorskip(_needed)


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peft_suite", Path(__file__).parents[1] / "peft_suite.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def collected(name: str) -> Any:
    marks: list[pytest.MarkDecorator] = []
    return SimpleNamespace(
        nodeid=f"tests/test_repr_lora_layers.py::{name}",
        originalname=name.split("::")[-1].split("[")[0],
        iter_markers=lambda _: [],
        add_marker=marks.append,
        marks=marks,
    )


LEFT_OUT = {r"test_repr_lora_": "of LoRA", r"TestDispatch": "of LoRA", r"test_add_.*\[True\]": "mixed"}


def test_tests_and_entries_that_match_pass(suite, monkeypatch):
    monkeypatch.setattr(suite, "GENERIC", {"test_card", "test_add_name"})
    monkeypatch.setattr(suite, "LEFT_OUT", LEFT_OUT)
    names = ("test_card", "test_add_name[False]", "test_add_name[True]", "test_repr_lora_x", "TestDispatch::test_any")
    items = [collected(name) for name in names]
    suite.pytest_collection_modifyitems(items)
    reasons = [[mark.kwargs["reason"] for mark in item.marks] for item in items]
    assert reasons == [[], [], ["mixed"], ["of LoRA"], ["of LoRA"]]


def test_unknown_tests_and_entries_without_a_test_are_errors(suite, monkeypatch):
    monkeypatch.setattr(suite, "GENERIC", {"test_card", "test_gone"})
    monkeypatch.setattr(suite, "LEFT_OUT", LEFT_OUT)
    with pytest.raises(pytest.UsageError) as raised:
        suite.pytest_collection_modifyitems([collected(name) for name in ("test_card", "test_new", "test_repr_lora_x")])
    assert str(raised.value).splitlines() == [
        "no test is named by 'TestDispatch'",
        r"no test is named by 'test_add_.*\\[True\\]'",
        "no test is named by 'test_gone'",
        "in no table: tests/test_repr_lora_layers.py::test_new",
    ]


def test_sources_of_another_version_are_refused(suite, tmp_path):
    (tmp_path / "src/peft").mkdir(parents=True)
    (tmp_path / "src/peft/__init__.py").write_text('__version__ = "0.1.dev0"\n')
    assert str(suite.main(str(tmp_path))).endswith("which is installed, got 0.1.dev0")
