"""The command line: what it prints, what it writes, its exit status, and one line for a user's mistake."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bounds import assert_within
from cases import relative_error
from models import adapt, references, train_randomly
from plain import effective
from safetensors.torch import load_file, save_file

import ssvd_kernels as sk
from ssvd_kernels import __main__
from ssvd_kernels.ops import dispatch, extension, reference

COMMANDS = ["average", "convert", "info", "inspect", "merge", "plan", "selftest"]


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command in this process."""
    capsys.readouterr()
    try:
        status = __main__.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


# -- help and info -----------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_exit_status(capsys):
    status, out, _ = call(capsys, "--help")
    (action,) = (a for a in __main__.parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert status == 0 and sorted(action.choices) == COMMANDS
    assert all(f"\n    {name}" in out for name in COMMANDS) and "Exit status: 0 done; 1 a check failed" in out
    for command in COMMANDS:
        status, out, _ = call(capsys, command, "--help")
        assert status == 0 and f"python -m ssvd_kernels {command}" in out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"], ["inspect"], ["merge", "a", "b"]])
def test_usage_errors(capsys, arguments):
    status, out, err = call(capsys, *arguments)
    assert status == 2 and not out and err.startswith("usage: python -m ssvd_kernels")


def test_info_and_help_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\nfrom ssvd_kernels.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    )
    for arguments in (["info"], ["--help"], ["merge", "--help"], ["plan", "--help"], ["selftest"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
        if arguments != ["selftest"]:
            assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr
    assert done.returncode == 2 and not done.stdout and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1 and "torch" in done.stderr


def test_info(capsys):
    status, out, _ = call(capsys, "info")
    assert status == 0 and f"torch        {torch.__version__}" in out and "SSVD_BACKEND" in out


# -- selftest ----------------------------------------------------------------------------------------------------------


def test_selftest_passes_here(capsys):
    status, out, _ = call(capsys, "selftest", "--device", "cpu")
    lines = out.splitlines()
    passed = [line for line in lines if line.startswith("ok ")]
    assert status == 0 and f"all {len(passed)} checks passed" in lines[-1]
    backends = ["reference", *(["ext"] if extension.available() else [])]
    names = [f"cayley k=153, {dtype}, {backend}, cpu" for dtype in ("float32", "float64") for backend in backends]
    names += [f"linear {mode}, {dtype}, reference, cpu" for mode in ("composed", "factored")
              for dtype in ("float32", "float64", "float16", "bfloat16")]  # fmt: skip
    names += ["an adapter comes back from disk, cpu", "merged equals unmerged, cpu"]
    for name in names:
        (line,) = (line for line in passed if f"  {name}: error " in line)
        assert ", tolerance " in line


@pytest.mark.parametrize(
    ("module", "name", "replace", "fails"),
    [
        (dispatch, "cayley_delta_backward", lambda was: lambda *a: -was(*a), "cayley k=64, float32, reference, cpu"),
        (reference, "compose_ref", lambda was: lambda weight, *args: weight, "merged equals unmerged, cpu"),
        (reference, "ssvd_linear_fwd", lambda was: lambda *args: 1 / 0, "linear factored, float32, reference, cpu"),
        (reference, "core_ref", lambda was: lambda *args: was(*args) + 1e-3, "an untrained model equals its base, cpu"),
    ],
    ids=["gradient", "compose", "raises", "core"],
)
def test_selftest_finds_what_is_broken(capsys, monkeypatch, module, name, replace, fails):
    monkeypatch.setattr(module, name, replace(getattr(module, name)))
    status, out, _ = call(capsys, "selftest", "--device", "cpu")
    failed = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert status == 1 and any(line.startswith(f"FAIL  {fails}: ") for line in failed), out
    assert out.splitlines()[-1].startswith(f"{len(failed)} of ")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta:"])
def test_selftest_on_a_device_that_is_not_here(capsys, device):
    status, _, err = call(capsys, "selftest", "--device", device)
    assert status == 2 and err.startswith(f"error: --device must be available here, got {device} (")


@pytest.mark.gpu
def test_selftest_passes_on_the_gpu(capsys):
    status, out, _ = call(capsys, "selftest")
    assert status == 0 and "linear factored, bfloat16, triton, cuda" in out


# -- merge and inspect, on a tiny Whisper ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """A base model's folder with tokenizer, another base model, adapters, and the adapted model itself."""
    transformers = pytest.importorskip("transformers")
    import asr_tiny

    folder = tmp_path_factory.mktemp("cli")
    tokenizer = asr_tiny.tiny_tokenizer()
    model = asr_tiny.tiny_model(tokenizer)
    for part in (model, asr_tiny.fast_tokenizer(tokenizer)):
        part.save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "other")
    with torch.no_grad():
        model.model.encoder.layers[0].fc1.weight[0, 0] += 1
    model.save_pretrained(folder / "other")
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder / "base").eval()
    adapt(model, targets="whisper", side="both", rank_out=3)
    sk.save_adapter(model, folder / "adapter.safetensors")
    sk.save_adapter(model, folder / "bases.safetensors", save_bases=True)
    paths = {"folder": folder, "base": folder / "base", "adapter": folder / "adapter.safetensors"}
    return SimpleNamespace(model=model, logits=asr_tiny.logits, **paths)


def test_merge_writes_a_transformers_folder(capsys, files, tmp_path):
    from transformers import AutoTokenizer

    status, out, _ = call(capsys, "merge", files.base, files.adapter, tmp_path / "merged")
    assert status == 0 and out.strip() == f"wrote {tmp_path / 'merged'}"
    fresh, found = type(files.model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(found.values())
    assert_within(files.logits(fresh), *references(files.model, files.logits))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()["<|en|>"] > 0


@pytest.mark.parametrize("rank", [None, 2])
def test_merge_writes_a_lora_adapter(capsys, files, tmp_path, rank):
    peft = pytest.importorskip("peft")
    options = [] if rank is None else ["--rank", rank]
    status, out, _ = call(capsys, "merge", files.base, files.adapter, tmp_path / "lora", "--lora", *options)
    assert status == 0 and f"22 x rank {rank or 5}" in out and out.endswith(f"wrote {tmp_path / 'lora'}\n")
    base = type(files.model).from_pretrained(files.base)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    assert loaded.peft_config["default"].base_model_name_or_path == str(files.base)
    found, (plain, exact) = files.logits(loaded), references(files.model, files.logits)
    if rank is None:
        assert_within(found, plain, exact)
    else:
        assert 1e-3 < relative_error(found, exact) < 1


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_merge_writes_a_ctranslate2_folder(capsys, files, tmp_path, quantization):
    ctranslate2 = pytest.importorskip("ctranslate2")
    options = [] if quantization is None else ["--quantization", quantization]
    assert call(capsys, "merge", files.base, files.adapter, tmp_path / "ct2", "--ctranslate2", *options)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ct2"}
    assert (tmp_path / "ct2" / "tokenizer.json").is_file()
    model = ctranslate2.models.Whisper(str(tmp_path / "ct2"), device="cpu")
    assert model.compute_type.startswith(quantization or "float32")


def test_what_faster_whisper_wants_is_written_or_asked_for(capsys, files, tmp_path):
    """transformers 5 keeps the feature extractor's settings in processor_config.json; 80 mels would be its default."""
    pytest.importorskip("ctranslate2")
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    base = shutil.copytree(files.base, tmp_path / "base")
    settings = {"feature_extractor": {"feature_size": 128, "feature_extractor_type": "WhisperFeatureExtractor"}}
    (base / "processor_config.json").write_text(json.dumps(settings))
    for mels in (128, files.model.config.num_mel_bins):
        out = tmp_path / f"ct2-{mels}"
        assert call(capsys, "merge", base, files.adapter, out, "--ctranslate2")[0] == 0
        assert WhisperFeatureExtractor.from_pretrained(out).feature_size == mels
        assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
        (base / "processor_config.json").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    status, _, err = call(capsys, "merge", base, files.adapter, tmp_path / "none", "--ctranslate2")
    assert status == 2 and "--ctranslate2 requires Whisper's tokenizer" in err and not (tmp_path / "none").exists()


def test_the_tokenizer_of_an_older_folder_is_written_as_faster_whisper_reads_it(capsys, files, tmp_path):
    """Such folders have the vocabulary, the merges and the special tokens in files of their own."""
    pytest.importorskip("ctranslate2")
    from tokenizers import Tokenizer

    base = shutil.copytree(files.base, tmp_path / "base")
    known = Tokenizer.from_file(str(base / "tokenizer.json"))
    (base / "tokenizer.json").unlink()
    words = known.get_vocab(with_added_tokens=False)
    added = {token: number for token, number in known.get_vocab().items() if token not in words}
    for name, content in {
        "vocab.json": words,
        "added_tokens.json": added,
        "tokenizer_config.json": {"tokenizer_class": "WhisperTokenizer"},
    }.items():
        (base / name).write_text(json.dumps(content))
    (base / "merges.txt").write_text("#version: 0.2\n")
    before = sorted(base.iterdir())
    assert call(capsys, "merge", base, files.adapter, tmp_path / "out", "--ctranslate2")[0] == 0
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert written.get_vocab() == known.get_vocab() and sorted(base.iterdir()) == before
    text = "<|en|>Grüße, tone 1"
    assert written.encode(text, add_special_tokens=False).ids == known.encode(text).ids


def test_inspect_tells_what_the_file_holds(capsys, files):
    status, out, _ = call(capsys, "inspect", files.adapter, "--json")
    found = json.loads(out)
    layers = sk.ssvd_layers(files.model)
    assert status == 0 and found["bytes"] == files.adapter.stat().st_size and found["fits"] is None
    assert [entry["name"] for entry in found["layers"]] == list(layers)
    for entry in found["layers"]:
        layer = layers[entry["name"]]
        assert (entry["k"], entry["k_out"], entry["side"], entry["rotation"]) == (5, 3, "both", "cayley")
        assert entry["shape"] == [layer.out_features, layer.in_features] and entry["dtype"] == "float32"
        assert entry["trained"] == 10 + 3 + 5 and entry["fingerprint"] == layer.basis.fingerprint
        Ks = [reference.skew(theta.detach().double(), k) for theta, k in ((layer.theta, 5), (layer.theta_out, 3))]
        assert entry["turn"] == max(float(torch.linalg.matrix_norm(K, 2)) for K in Ks)
        assert entry["shift"] == layer.delta_sigma.abs().max().item()
        assert not entry["basis_stored"] and entry["relative_shift"] is entry["relative_update"] is None
    status, out, _ = call(capsys, "inspect", files.adapter)
    assert status == 0 and f"{len(layers)} layers, {18 * len(layers)} trained parameters in float32, bases of 0" in out
    assert len(out.splitlines()) == len(layers) + 4 and all(name in out for name in layers)
    assert "5+3" in out and "update" not in out


def test_inspect_with_the_base_or_the_bases_tells_more(capsys, files):
    for arguments in ([files.folder / "bases.safetensors"], [files.adapter, "--base", files.base]):
        status, out, _ = call(capsys, "inspect", *arguments, "--json")
        assert status == 0
        changes = []
        for entry in json.loads(out)["layers"]:
            layer = sk.ssvd_layers(files.model)[entry["name"]]
            expected = (layer.delta_sigma.double().abs() / layer.sigma.double()).max().item()
            assert entry["relative_shift"] == expected
            assert entry["basis_stored"] == (len(arguments) == 1)
            if len(arguments) > 1:
                W = layer.base_weight
                plain, exact = ((Wp - W.to(Wp)).norm() / W.to(Wp).norm() for Wp in effective(W, layer))
                changes.append((torch.tensor(entry["relative_update"], dtype=torch.float64), plain, exact))
        if changes:
            assert_within(*map(torch.stack, zip(*changes)))
    status, out, _ = call(capsys, "inspect", *arguments)
    assert status == 0 and f"fits the base model {files.base}" in out and "update" in out


def test_inspect_svft_free_rotations_and_spectralft(capsys, tmp_path):
    nets, entries, texts = [], [], []
    banded, free = sk.SSVDConfig(rank=3, rotation="banded", band=1), sk.SSVDConfig(rank=3, rotation="free")
    for config in (banded, free, sk.SpectralFTConfig(top=3, rank=2)):
        net = torch.nn.Sequential(torch.nn.Linear(6, 4))
        sk.inject(net, config, progress=False)
        sk.save_adapter(train_randomly(net), tmp_path / "a")
        status, out, _ = call(capsys, "inspect", tmp_path / "a", "--json")
        assert status == 0
        nets.append(net)
        entries += json.loads(out)["layers"]
        texts.append(call(capsys, "inspect", tmp_path / "a")[1])
    band, free, spectralft = entries
    assert band["k"] == spectralft["k"] == 3 and band["band"] == 1
    thetas = [net[0].theta.detach().double() for net in nets[:2]]
    Ks = reference.banded(thetas[0], 3, 1), thetas[1].view(3, 3)
    assert [entry["turn"] for entry in (band, free)] == [torch.linalg.matrix_norm(K, 2).item() for K in Ks]
    assert [entry["trained"] for entry in entries] == [3 + 4, 3 + 9, 2 * (6 + 4 + 2 * 3)]
    assert "band" in texts[0] and "banded" in texts[0] and "SpectralFT" not in texts[0]
    assert (spectralft["method"], spectralft["low_rank"]) == ("SpectralFT", 2)
    assert spectralft["turn"] is spectralft["shift"] is spectralft["rotation"] is None
    assert "SpectralFT" in texts[2] and "||K||" not in texts[2]


# -- mistakes ----------------------------------------------------------------------------------------------------------


def damaged(files: SimpleNamespace, folder: Path) -> Path:
    path = folder / "damaged.safetensors"
    path.write_bytes(files.adapter.read_bytes()[:-100])
    return path


def foreign(files: SimpleNamespace, folder: Path) -> Path:
    save_file({"a": torch.zeros(2)}, folder / "foreign.safetensors")
    return folder / "foreign.safetensors"


def base_with(change: Callable[[Path], object]) -> Callable[[SimpleNamespace, Path], Path]:
    """A copy of the base model, with its weights' file changed."""

    def make(files: SimpleNamespace, folder: Path) -> Path:
        base = Path(shutil.copytree(files.base, folder / "copy"))
        change(base / "model.safetensors")
        return base

    return make


def leave_norms(path: Path) -> None:
    norms = {name: value for name, value in load_file(path).items() if name.endswith("layer_norm.bias")}
    save_file(norms, path, metadata={"format": "pt"})


def full_folder(files: SimpleNamespace, folder: Path) -> Path:
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    return folder / "full"


@pytest.mark.parametrize(
    ("changed", "options", "status", "message"),
    [
        ({"adapter": "nowhere.safetensors"}, [], 2, "`path` must be an existing adapter file, got "),
        ({"adapter": damaged}, [], 1, "is damaged or not a safetensors file"),
        ({"adapter": foreign}, [], 1, "is not an adapter of ssvd_kernels"),
        ({"base": "nowhere"}, [], 2, "is not the folder of a transformers model"),
        ({"base": lambda files, folder: files.folder / "other"}, [], 1, "was trained on another base model"),
        ({"base": base_with(Path.unlink)}, [], 2, "model.safetensors"),
        ({"base": base_with(lambda path: path.write_bytes(path.read_bytes()[:1000]))}, [], 1, "are damaged"),
        ({"base": base_with(leave_norms)}, [], 1, "has no weights for"),
        ({"output": full_folder}, [], 2, "`folder` must be new or empty, got "),
        ({"output": lambda files, folder: folder / "no" / "out"}, [], 2, "`folder` must be in an existing folder"),
        ({}, ["--rank", "4"], 2, "--rank must be an integer >= 1, together with --lora, got 4"),
        ({}, ["--lora", "--rank", "0"], 2, "--rank must be an integer >= 1, together with --lora, got 0"),
        ({}, ["--quantization", "int8"], 2, "--quantization requires --ctranslate2, got --quantization int8"),
        ({}, ["--lora", "--ctranslate2"], 2, "not allowed with argument --lora"),
    ],
)  # fmt: skip
def test_mistakes_in_merge(capsys, files, tmp_path, changed, options, status, message):
    arguments = {"base": files.base, "adapter": files.adapter, "output": tmp_path / "out"}
    for name, value in changed.items():
        arguments[name] = value(files, tmp_path) if callable(value) else tmp_path / value
    before = sorted(tmp_path.rglob("*"))
    found, out, err = call(capsys, "merge", *arguments.values(), *options)
    assert (found, out) == (status, "") and message in err.splitlines()[-1]
    assert sum("error: " in line for line in err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("adapter", "base", "status", "message"),
    [
        ("nowhere.safetensors", None, 2, "`path` must be an existing adapter file, got "),
        (damaged, None, 1, "is damaged or not a safetensors file"),
        (lambda files, folder: files.adapter, "other", 1, "was trained on another base model"),
        (lambda files, folder: files.adapter, "nowhere", 2, "is not the folder of a transformers model"),
    ],
)
def test_mistakes_in_inspect(capsys, files, tmp_path, adapter, base, status, message):
    path = adapter(files, tmp_path) if callable(adapter) else tmp_path / adapter
    options = [] if base is None else ["--base", files.folder / base]
    found, out, err = call(capsys, "inspect", path, *options)
    assert (found, out) == (status, "") and err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_mistake_in_a_new_process(files, tmp_path):
    """As a user meets it: `python -m`, no traceback, one line, the exit status."""
    command = [sys.executable, "-m", "ssvd_kernels", "merge", files.base, files.adapter, files.base]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: `folder` must")
