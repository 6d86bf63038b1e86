"""The federated example on the real model: what the server's averages are, and how far from the mean update."""

from __future__ import annotations

import re

import pytest
from asr_tiny import real_data

from examples import federated
from experiments.asr import fetch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.data
def test_clients_have_voices_and_texts_of_their_own():
    clients, held_out = federated.gather(real_data(fetch.MODEL, fetch.ASTERISK), 8)
    assert [{clip.voice for clip in client.clips} for client in clients] == [{voice} for voice in federated.VOICES]
    assert {clip.voice for clip in held_out.clips} == set(federated.VOICES) and len(held_out) == 8
    names = [{clip.name for clip in speech.clips} for speech in (*clients, held_out)]
    assert sum(map(len, names)) == len(set.union(*names)) and min(map(len, names[:4])) > 40


@pytest.mark.slow
@pytest.mark.data
def test_averages_of_four_clients(tmp_path, capsys):
    data = real_data(fetch.MODEL, fetch.ASTERISK)
    assert federated.main(["--smoke", "--data", str(data), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"(?:SSVD|LoRA), client-\d +WER", out)) == 8
    rotations, updates, lora = (float(off) for off in re.findall(r"WER .* (\S+) off the mean update", out))
    mean = float(re.findall(r"its K: (\S+) off", out)[0])
    assert updates < 1e-6 and mean < 1e-6  # float32's rounding of what is stored
    assert 1e-4 < min(rotations, lora) and max(rotations, lora) < 1  # other means
