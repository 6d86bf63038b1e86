"""Fixtures of the speech experiment's tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def ct2_folder(tmp_path):
    from asr_tiny import write_ct2_folder

    return write_ct2_folder(tmp_path)


@pytest.fixture
def clips(tmp_path):
    from asr_tiny import tone_clips

    return tone_clips(tmp_path)
