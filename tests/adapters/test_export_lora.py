"""to_lora: what plain PEFT makes of the folder, on models small and real, and how exact it is."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import roundtrip
import torch
from bounds import assert_within, unit_roundoff
from cases import relative_error
from models import adapt, inject, references
from plain import update
from refusals import refused
from roundtrip import ROTATIONS, SIDES
from safetensors.torch import load_file
from several import with_adapters
from torch import Tensor, nn

import ssvd_kernels as sk

# base folder, adapter folder, inputs, output: the output of plain PEFT, where this package cannot be imported
PLAIN_PEFT = """
import sys, warnings
sys.modules["ssvd_kernels"] = None
import torch, transformers
from peft import PeftModel
base, adapter, inputs, output = sys.argv[1:]
warnings.filterwarnings("error", message=".*adapter keys")
name = transformers.AutoConfig.from_pretrained(base).architectures[0]
model = getattr(transformers, name).from_pretrained(base)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    torch.save(model(**torch.load(inputs))[0], output)
"""
FILES = ("adapter_config.json", "adapter_model.safetensors")


def plain_peft(base: Path, adapter: Path, inputs: dict[str, Tensor], folder: Path) -> Tensor:
    torch.save(inputs, folder / "inputs.pt")
    names = [str(name) for name in (base, adapter, folder / "inputs.pt", folder / "output.pt")]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, *names], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return torch.load(names[-1])


def weights(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (A, B) in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") for key in tensors)
    names = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    assert len(tensors) == 2 * len(names)
    keys = {name: [f"base_model.model.{name}.lora_{part}.weight" for part in "AB"] for name in names}
    return {name: (tensors[a].double(), tensors[b].double()) for name, (a, b) in keys.items()}


def updates(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> U core V^T in plain PyTorch: (in float32, as the factors are written, in float64)."""
    dtypes = (torch.float32, torch.float64)

    def of(layer: sk.SSVDLinear, dtype: torch.dtype) -> Tensor:
        return update(layer, {key: p.detach().to(dtype) for key, p in layer.adapter().items()})

    return {name: tuple(of(layer, dtype) for dtype in dtypes) for name, layer in sk.ssvd_layers(model).items()}


def adapted(rank: int = 4) -> roundtrip.Net:
    return roundtrip.injected(roundtrip.Case((12, 17, 9), torch.float32, sk.SSVDConfig(rank=rank), 3))


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("side", SIDES)
def test_full_rank_is_exact(tmp_path, side, rotation, dtype):
    case = roundtrip.Case((12, 17, 9), dtype, sk.SSVDConfig(rank=6, side=side, rotation=rotation), 3)
    net = roundtrip.injected(case)
    report = sk.to_lora(net, tmp_path / "lora")
    written, expected = weights(tmp_path / "lora"), updates(net)
    # what the report compares with: the update of the core as float32 computes it
    own = {n: (m.U.double() @ m.core().double() @ m.V.double().mT).detach() for n, m in sk.ssvd_layers(net).items()}
    assert list(report.ranks.values()) == [6, 6, 6] and written.keys() == expected.keys() == report.errors.keys()
    for name, (A, B) in written.items():
        assert_within(B @ A, *expected[name], name)
        # balanced: a runtime that casts to half precision loses as little as it can; float32 has rounded the norms
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=2 * unit_roundoff(torch.float32), atol=0)
        # an error of about 1e-7, itself computed in float64: known to its first digits
        assert report.errors[name] == pytest.approx(relative_error(B @ A, own[name]), rel=1e-6)
    both = [(B @ A).flatten() for A, B in written.values()], [own[name].flatten() for name in written]
    assert report.error == pytest.approx(relative_error(*map(torch.cat, both)), rel=1e-6)


def test_truncation_is_the_best_of_its_rank(tmp_path):
    net = adapted(rank=8)
    report = sk.to_lora(net, tmp_path / "lora", rank=3)
    for name, (_, exact) in updates(net).items():
        A, B = weights(tmp_path / "lora")[name]
        S = torch.linalg.svdvals(exact)
        best = float(S[3:].norm() / S.norm())
        assert A.shape[0] == report.ranks[name] == 3
        rounding = 4 * unit_roundoff(torch.float32)  # of U, V, A and B, relative to the update
        assert relative_error(B @ A, exact) == pytest.approx(best, abs=rounding)
        assert report.errors[name] == pytest.approx(best, abs=rounding) and best > 0.05
    assert f"relative error {report.error:.2g}" in str(report) and "3 x rank 3" in str(report)


@pytest.mark.parametrize("change", ["a rank beyond k", "merged", "wrapped"])
def test_what_changes_no_byte(tmp_path, change):
    net = adapted()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    expected = sk.to_lora(net, tmp_path / "a").ranks
    roundtrip.assert_equal_state(net, state)
    if change == "merged":
        sk.merge(net)
    other = torch.compile(net) if change == "wrapped" else net
    report = sk.to_lora(other, tmp_path / "b", rank=100 if change == "a rank beyond k" else None)
    assert report.ranks == expected and list(expected) == list(sk.ssvd_layers(net))
    assert all(layer.merged == (change == "merged") for layer in sk.ssvd_layers(net).values())
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_adapter_in_use_is_written_also_while_disabled(tmp_path):
    net = with_adapters(roundtrip.Net(6, 8, 5), "b", rank=4)
    sk.set_adapter(net, "b")
    with sk.disable_adapter(net):
        sk.to_lora(net, tmp_path / "a")
    found = weights(tmp_path / "a")
    for name, expected in updates(net).items():
        A, B = found[name]
        assert_within(B @ A, *expected, name)


# -- plain PEFT --------------------------------------------------------------------------------------------------------


def tiny(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    import speech_models

    if kind == "whisper":
        model = speech_models.whisper()
        return model, speech_models.inputs(model)
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24,
                       max_position_embeddings=32, word_embed_proj_dim=16, pad_token_id=1)  # fmt: skip
    return OPTForCausalLM(config), {"input_ids": torch.randint(3, 40, (2, 7))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whisper", "opt"])
def test_plain_peft_in_a_new_process(tmp_path, kind):
    pytest.importorskip("peft")
    model, inputs = tiny(kind)
    model.eval().save_pretrained(tmp_path / "base")
    with torch.no_grad():
        before = model(**inputs)[0]
        adapt(model, rank=None, ratio=0.4)
        plain, exact = references(model, lambda network: network(**inputs)[0])
    assert relative_error(before, exact) > 0.1
    sk.to_lora(model, tmp_path / "lora")
    assert_within(plain_peft(tmp_path / "base", tmp_path / "lora", inputs, tmp_path), plain, exact)


class Names(nn.Module):
    """Names that are endings of each other and that mean something in a regular expression; one is not adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"fc": nn.Linear(6, 6), "f+c": nn.Linear(6, 5)})
        self.innerxfc = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.innerxfc(self.inner["f+c"](torch.tanh(self.inner["fc"](self.fc(x)))))


@pytest.mark.parametrize("targets", [["fc"], r"fc", r"inner\.fc", r"fc|inner.f\+c", "all-linear"])
def test_exactly_the_adapted_layers_with_their_ranks(tmp_path, targets):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    net = adapt(Names(), rank=None, ratio=0.9, targets=targets)
    report = sk.to_lora(net, tmp_path / "lora")
    torch.manual_seed(1)
    loaded = peft.PeftModel.from_pretrained(Names(), str(tmp_path / "lora"))
    found = {n: m for n, m in loaded.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {name: layer.r["default"] for name, layer in found.items()} == report.ranks
    assert len({*report.ranks.values()}) == (2 if "all-linear" in targets or "c|i" in targets else 1)
    assert all(layer.scaling["default"] == 1 for layer in found.values())
    with torch.no_grad():
        x = torch.randn(16, 6)
        assert_within(loaded(x), *references(net, lambda network: network(x)))


def test_an_untrained_adapter_changes_no_bit(tmp_path):
    peft = pytest.importorskip("peft")
    net, x = Names(), torch.randn(4, 6)
    expected = net(x)
    inject(net)
    report = sk.to_lora(net, tmp_path / "lora")
    assert report.error == 0 and set(report.errors.values()) == {0}
    sk.remove(net)
    assert torch.equal(peft.PeftModel.from_pretrained(net, str(tmp_path / "lora"))(x), expected)


def test_a_bfloat16_base(tmp_path):
    """PEFT keeps the factors in float32 beside a bfloat16 base, as we do."""
    peft = pytest.importorskip("peft")
    net = adapt(Names().bfloat16())
    expected = updates(net)
    sk.to_lora(net, tmp_path / "lora")
    sk.remove(net)
    loaded = peft.PeftModel.from_pretrained(net, str(tmp_path / "lora")).base_model.model
    for name, both in expected.items():
        layer = loaded.get_submodule(name)
        product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        assert_within(product, *both, name)


def test_wavlm_needs_merging_and_says_so(tmp_path, caplog):
    peft = pytest.importorskip("peft")
    import speech_models

    torch.manual_seed(1)
    model = speech_models.MODELS["wavlm"][0]().eval()
    base = copy.deepcopy(model)
    inject(model, targets=["intermediate_dense"])
    sk.to_lora(model, tmp_path / "without attention")
    assert not caplog.text
    sk.remove(model)
    adapt(model, targets="wavlm")
    with torch.no_grad():
        plain, exact = references(model, speech_models.run)
        sk.to_lora(model, tmp_path / "lora")
        assert "call merge_and_unload() after loading" in caplog.text
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
        assert relative_error(speech_models.run(loaded.base_model.model), exact) > 1e-3
        assert_within(speech_models.run(loaded.merge_and_unload()), plain, exact)


def test_transformers_loads_it_too(tmp_path):
    pytest.importorskip("peft")
    model, inputs = tiny("whisper")
    model.eval().save_pretrained(tmp_path / "base")
    adapt(model, targets="whisper")
    sk.to_lora(model, tmp_path / "lora")
    fresh = type(model).from_pretrained(tmp_path / "base").eval()
    fresh.load_adapter(str(tmp_path / "lora"))
    with torch.no_grad():
        assert_within(fresh(**inputs)[0], *references(model, lambda network: network(**inputs)[0]))


def test_the_base_model_is_named(tmp_path):
    model, _ = tiny("opt")
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    inject(model)
    sk.to_lora(model, tmp_path / "a")
    sk.to_lora(model, tmp_path / "b", base_model_name_or_path="somebody/opt")
    for name, expected in (("a", str(tmp_path / "base")), ("b", "somebody/opt")):
        found = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert found["base_model_name_or_path"] == expected


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "error", "match"),
    [
        (0, ValueError, "`rank` must be an integer >= 1, .*got 0"),
        (-2, ValueError, "`rank` must be an integer >= 1, .*got -2"),
        (True, TypeError, "`rank` must be an integer >= 1, .*got True"),
        (2.0, TypeError, r"`rank` must be an integer >= 1, .*got 2\.0"),
        ("no layers", ValueError, "has no SSVD layer"),
        ("not finite", ValueError, "the update of inner.fc contains NaN or infinity"),
        ("no space", OSError, "no space left"),
    ],
)
def test_refusals_leave_nothing(tmp_path, monkeypatch, what, error, match):
    def no_space(*args, **options):
        raise OSError("no space left on device")

    net = Names()
    if what != "no layers":
        inject(net)
    if what == "not finite":
        sk.ssvd_layers(net)["inner.fc"].delta_sigma.data[1] = float("nan")
    if what == "no space":
        monkeypatch.setattr("ssvd_kernels.adapters.export.save_file", no_space)
    with refused(net, error, match):
        sk.to_lora(net, tmp_path / "lora", rank=None if isinstance(what, str) else what)
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written(tmp_path):
    net = Names()
    inject(net)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for folder in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with refused(net, FileExistsError, "`folder` must be new or empty, got "):
            sk.to_lora(net, folder)
    with refused(net, FileNotFoundError, "`folder` must be in an existing folder, got "):
        sk.to_lora(net, tmp_path / "no" / "lora")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine" and len(list(tmp_path.rglob("*"))) == 2


def test_an_empty_folder_is_filled_and_readable(tmp_path):
    net = Names()
    inject(net)
    (tmp_path / "lora").mkdir()
    sk.to_lora(net, tmp_path / "lora")
    assert {path.name for path in (tmp_path / "lora").iterdir()} == set(FILES)
    fresh = tmp_path / "fresh"
    fresh.touch()
    assert {path.stat().st_mode for path in (tmp_path / "lora").iterdir()} == {fresh.stat().st_mode}
