"""`python -m ssvd_kernels plan`: what `sk.plan` gives, as a table and as JSON, and mistakes."""

from __future__ import annotations

import json

import pytest
from test_cli import call

import ssvd_kernels as sk

speech_models = pytest.importorskip("speech_models")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "base"
    speech_models.whisper().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--budget", "0.05"], {"budget": 0.05}),
        (["--budget", "900", "--targets", "whisper", "--allocation", "spectrum", "--side", "smaller"],
         {"budget": 900, "targets": "whisper", "allocation": "spectrum", "side": "smaller"}),
        (["--budget", "2e-1", "--method", "ssvd-o", "--inner-share", "0.8", "--rotation", "linear"],
         {"budget": 0.2, "method": "ssvd-o", "inner_share": 0.8, "rotation": "linear"}),
        (["--budget", "0.3", "--method", "spectralft", "--top", "4", "--targets", "q_proj", "k_proj"],
         {"budget": 0.3, "method": "spectralft", "top": 4, "targets": ["q_proj", "k_proj"]}),
        (["--budget", "0.1", "--method", "lora", "--exclude", r".*\.fc\d"],
         {"budget": 0.1, "method": "lora", "exclude": r".*\.fc\d"}),
        (["--budget", "1e3", "--targets", "q_proj", "--exclude", "encoder_attn.q_proj"],
         {"budget": 1000, "targets": ["q_proj"], "exclude": ["encoder_attn.q_proj"]}),
        (["--budget", "0.1", "--exclude", "fc1"], {"budget": 0.1, "exclude": ["fc1"]}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_plan(capsys, base, arguments, options):
    model = speech_models.transformers.WhisperForConditionalGeneration.from_pretrained(base)
    expected = sk.plan(model, progress=False, **options)
    status, out, err = call(capsys, "plan", "--base", base, *arguments)
    assert (status, out, err) == (0, f"{expected}\n", "")
    status, out, err = call(capsys, "plan", "--base", base, *arguments, "--json")
    found = json.loads(out)
    assert (status, err) == (0, "") and found["trainable"] == expected.trainable <= found["budget"]
    assert found["method"] == expected.method and found["options"] == expected.options
    layers = [(entry["name"], tuple(entry["shape"]), *list(entry.values())[2:]) for entry in found["layers"]]
    assert layers == [tuple(layer) for layer in expected.layers]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "much"], "--budget must be an integer, or a share such as 0.02, got much"),
        (["--budget", "1.5"], "an integer > 1, or a share of the model's parameters in (0, 1), got 1.5"),
        (["--budget", "2"], "at least 32 trainable parameters for method='ssvd' and these 32 layers, got 2"),
        (["--budget", "0.1", "--side", "both"], "`side` must be one of 'input', 'output', 'smaller', got 'both'"),
        (["--budget", "0.1", "--top", "3"], "method='ssvd' has no option `top` (options: side, rotation, form), got 3"),
        (["--budget", "0.1", "--targets", "conv9"], "`targets` contains 'conv9', which matches no module"),
        (["--budget", "0.1", "--exclude", "decoder"], "in ['decoder'], which matches none of the 33 targeted layers"),
        (["--budget", "0.1", "--method", "adalora"], "invalid choice: 'adalora'"),
        ([], "required: --budget"),
    ],
)
def test_mistakes(capsys, base, arguments, message):
    status, out, err = call(capsys, "plan", "--base", base, *arguments)
    assert (status, out) == (2, "") and message in err.splitlines()[-1]
    assert sum("error: " in line for line in err.splitlines()) == 1


def test_no_base_model(capsys, tmp_path):
    status, out, err = call(capsys, "plan", "--base", tmp_path, "--budget", "0.1")
    assert (status, out) == (2, "") and "is not the folder of a transformers model" in err
