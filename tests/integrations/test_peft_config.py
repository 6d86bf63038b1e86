"""PEFT: the configuration, what it targets, what is refused, and what is written beside the weights."""

from __future__ import annotations

import json

import pytest
import torch
from models import RANK, adapt, inject
from peft_models import MODELS, SSVDPeftConfig, adapted, base_model, config, in_new_process, layers, peft
from refusals import refused
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import ssvd_kernels as sk
from ssvd_kernels.config import PRESETS

IMPORT = "import ssvd_kernels.integrations.peft"


# -- the configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 3, "ratio": 0.5}, "exactly one of `rank` and `ratio`"),
        ({"rank": 0}, "`rank` must be an integer >= 1, got 0"),
        ({"ratio": 1.5}, r"`ratio` must be a number in \(0, 1\], got 1\.5"),
        ({"rank": 3, "side": "left"}, "`side` must be one of 'input', 'output', 'smaller', 'both', got 'left'"),
        ({"rank": 3, "rotation": "givens"}, "`rotation` must be one of 'cayley', .*got 'givens'"),
        ({"rank": 3, "rank_out": 2}, "require side='both', got side='input'"),
        ({"bias": "lora_only"}, "`bias` must be one of 'none', 'all', 'ssvd_only', got 'lora_only'"),
        ({"rank_pattern": {"fc1": 0}}, r"`rank_pattern\['fc1'\]` must be an integer >= 1, got 0"),
        ({"rank_pattern": {"fc(": 2}}, r"`rank_pattern` must have regular expressions, got 'fc\('"),
        ({"layers_to_transform": [1, -1]}, "`layers_to_transform` must be an integer >= 0, got -1"),
        ({"rank": 3, "band": 2}, "`band` requires rotation='banded', got 2"),
        (
            {"rank": 3, "layers_to_transform": [0], "target_modules": "all-linear"},
            "`layers_to_transform` requires .*got layers_to_transform=.0.",
        ),
        ({"rank": 3, "layers_pattern": "layers"}, "`layers_pattern` requires `layers_to_transform`, got 'layers'"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        SSVDPeftConfig(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_modules": [7]}, r"`target_modules` must be a string or a list of .*got \[7\]"),
        ({"exclude_modules": [7]}, r"`exclude_modules` must be a string or a list of .*got \[7\]"),
        ({"modules_to_save": "head"}, "`modules_to_save` must be a list of .*got 'head'"),
        ({"layers_to_transform": "1"}, "`layers_to_transform` must be an integer >= 0, got '1'"),
        ({"layers_to_transform": 1, "layers_pattern": 7}, "`layers_pattern` must be a string or a list of .*got 7"),
        ({"rank_pattern": ["fc1"]}, r"`rank_pattern` must be a dict of patterns and ranks, got \['fc1'\]"),
        ({"rank_pattern": {"fc1": 2.0}}, r"`rank_pattern\['fc1'\]` must be an integer >= 1, got 2\.0"),
        ({"init_weights": "gaussian"}, "`init_weights` must be True or False, got 'gaussian'"),
    ],
)
def test_values_of_another_kind_are_refused(options, match):
    with pytest.raises(TypeError, match=match):
        SSVDPeftConfig(**options)


@pytest.mark.parametrize(
    "options", [{"side": "both", "rank_out": 3, "rotation": "linear"}, {"rotation": "banded", "band": 2}]
)
def test_configuration_survives_its_file(tmp_path, options):
    named = {"target_modules": ["q_proj"], "exclude_modules": ["fc2"], "modules_to_save": ["head"]}
    start = {"rank_pattern": {"fc.": 4}, "bias": "ssvd_only", "init_weights": False}
    saved = SSVDPeftConfig(ratio=0.5, **options, **named, **start, layers_to_transform=[1], layers_pattern="layers")
    saved.save_pretrained(str(tmp_path))
    loaded = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is SSVDPeftConfig and loaded.to_dict() == saved.to_dict()


# -- what is adapted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_default_targets(name):
    model = peft.get_peft_model(base_model(name), config())
    suffixes = {path.split(".")[-1] for path in layers(model)}
    assert len(layers(model)) == MODELS[name][1]
    assert name == "llama" or suffixes <= set(PRESETS[name.removesuffix("-ctc")])
    assert not any("lm_head" in path or "proj_out" in path for path in layers(model))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "whisper"}, 32),
        ({"target_modules": "all-linear"}, 32),
        ({"target_modules": r".*decoder.*fc1"}, 2),
        ({"target_modules": ["q_proj"], "exclude_modules": ["encoder_attn.q_proj"]}, 4),
        ({"target_modules": ["fc1", "fc2"], "layers_to_transform": 1}, 4),
        ({"target_modules": ["fc1"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}, 4),
    ],
)
def test_targets(options, expected):
    assert len(layers(peft.get_peft_model(base_model(), config(**options)))) == expected


@pytest.mark.parametrize("options", [{}, {"side": "both", "rank_out": 2}, {"rotation": "free"}])
def test_numbers_of_parameters_are_those_of_this_package(options, capsys):
    base = base_model()
    model = peft.get_peft_model(base_model(), config(**options))
    report = inject(base, targets="whisper", **options)
    assert model.get_nb_trainable_parameters() == (report.trainable, report.total)
    model.print_trainable_parameters()
    assert f"trainable params: {report.trainable:,} || all params: {report.total:,}" in capsys.readouterr().out
    assert peft.PeftModel.get_model_status(model).peft_types == {"default": "SSVD"}
    assert [name for name, _ in model.base_model.model.named_buffers()] == [name for name, _ in base.named_buffers()]


# -- refusals ----------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A linear layer, one tied to an embedding, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.narrow = nn.Linear(6, 7), nn.Linear(7, 2)
        self.embed, self.tied = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.tied.weight = self.embed.weight
        self.conv = nn.Conv1d(6, 6, 3)
        self.broken = nn.Linear(7, 7)
        nn.init.constant_(self.broken.weight, float("nan"))


@pytest.mark.parametrize(
    ("target", "error", "match"),
    [
        ("conv", TypeError, r"`conv` must be a convolution of kernel size 1.*got Conv1d with kernel_size \(3,\)"),
        ("tied", ValueError, r"'tied' is targeted, but its weight is tied to 'embed\.weight'"),
        ("narrow", ValueError, r"narrow: `rank` must be between 1 and 2 .*\(2, 7\), got 5"),
        ("broken", ValueError, r"`broken\.weight` must be finite, got NaN"),
        ("nothing", ValueError, "nothing"),
    ],
)
def test_a_refused_injection_changes_nothing(target, error, match):
    model = Odd()
    with refused(model, error, match):
        peft.get_peft_model(model, config(target_modules=["first", target] if target != "nothing" else [target]))
    peft.get_peft_model(model, config(target_modules=["first"]))  # as if nothing had happened


def test_gpt2_s_layers_of_another_kind_are_adapted():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)).eval()
    tokens = torch.arange(5).view(1, 5)
    before = model(tokens).logits
    assert torch.equal(peft.get_peft_model(model, config())(tokens).logits, before)
    assert all(isinstance(layer.base_layer, Conv1D) for layer in layers(model).values()) and len(layers(model)) == 4


def test_a_refused_second_adapter_leaves_the_first_one_alone():
    model = peft.get_peft_model(Odd(), config(target_modules=["first"]))
    with refused(model, ValueError, "narrow: `rank` must be .*got 5"):
        model.add_adapter("b", config(target_modules=["first", "narrow"]))
    model.add_adapter("b", config(target_modules=["first"], rank=3))
    assert {layer.name for layer in layers(model).values()} == {"first"}


def test_this_package_s_own_injection_and_peft_s_exclude_each_other():
    model = base_model()
    inject(model, targets="whisper")
    with pytest.raises(TypeError, match=r"k_proj` must be an nn\.Linear .*got SSVDLinear"):
        peft.get_peft_model(model, config())
    with pytest.raises(ValueError, match="adapted through PEFT"):
        inject(adapted(), targets="whisper")


@pytest.mark.parametrize("inner", [False, True], ids=["PeftModel", "transformers"])
def test_this_package_s_own_functions_refuse_peft_s_layers(tmp_path, inner):
    path, model = tmp_path / "a.safetensors", adapted()
    sk.save_adapter(adapt(base_model(), targets="whisper"), path)
    model = model.get_base_model() if inner else model
    calls = [
        lambda: sk.merge(model),
        lambda: sk.merge(model, unload=True),
        lambda: sk.unmerge(model),
        lambda: sk.remove(model),
        lambda: sk.save_adapter(model, tmp_path / "b.safetensors"),
        lambda: sk.load_adapter(model, path, progress=False),
        lambda: sk.adapter_names(model),
        lambda: sk.add_adapter(model, "b"),
        lambda: sk.add_adapter(model, "b", path),
        lambda: sk.set_adapter(model, "default"),
        lambda: sk.disable_adapter(model).__enter__(),
        lambda: sk.average_adapters(model, {"default": 1}, into="b"),
        lambda: sk.to_lora(model, tmp_path / "lora", progress=False),
        # PEFT's own wrapper is none of transformers' models
        *([lambda: sk.export_merged(model, tmp_path / "merged")] if inner else []),
    ]
    for call in calls:
        with refused(model, ValueError, "adapted through PEFT"):
            call()
    assert list(tmp_path.iterdir()) == [path]


def test_folder_names_the_import_once(tmp_path):
    model = adapted()
    model.add_adapter("child", config())
    for _ in range(2):
        model.save_pretrained(str(tmp_path))
    for folder in (tmp_path, tmp_path / "child"):
        assert (folder / "README.md").read_text().count(IMPORT) == 1
        assert json.loads((folder / "adapter_config.json").read_text())["requires_import"] == IMPORT
    assert "library_name: peft" in (tmp_path / "README.md").read_text()  # the card that PEFT wrote


@pytest.mark.slow
def test_without_the_import_peft_names_what_it_does_not_know(tmp_path):
    adapted().save_pretrained(str(tmp_path))
    in_new_process(f"""
import peft, pytest
with pytest.raises(KeyError, match="SSVD"):
    peft.PeftConfig.from_pretrained({str(tmp_path)!r})
{IMPORT}
assert peft.PeftConfig.from_pretrained({str(tmp_path)!r}).rank == {RANK}
""")
