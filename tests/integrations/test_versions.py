"""Known bad pairs of releases are named."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from ssvd_kernels.utils import versions


def test_only_the_bad_pair_is_a_conflict(monkeypatch):
    installed: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(versions.metadata, "version", version)
    for transformers, peft in ((None, "0.21.2"), ("5.23.0", "0.21.2"), ("5.24.0", "0.22.0"), ("5.24.1", "0.21.2")):
        installed |= {"peft": peft} | ({"transformers": transformers} if transformers else {})
        found = versions.conflicts()
        assert len(found) == ((transformers, peft) == ("5.24.1", "0.21.2"))
    assert found[0].startswith("transformers 5.24.1 and peft 0.21.2 are incompatible: load_adapter()")


PRETEND = """
import warnings
from importlib import metadata
true = metadata.version
metadata.version = lambda name: {"transformers": "5.24.0", "peft": "0.21.2"}.get(name) or true(name)
"""


@pytest.mark.slow
def test_importing_the_integration_and_info_say_so():
    pytest.importorskip("peft")
    program = PRETEND + "import ssvd_kernels.integrations.peft\nfrom ssvd_kernels.cli.info import info\nprint(info())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    sentence = "transformers 5.24.0 and peft 0.21.2 are incompatible: "
    assert f"UserWarning: {sentence}" in done.stderr and sentence in done.stdout
