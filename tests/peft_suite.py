"""PEFT's own tests with SSVD as the method: `python tests/peft_suite.py SOURCE [options of pytest]`.

SOURCE holds PEFT's source at the installed version: a checkout, or what `pip download --no-deps --no-binary :all:`
gets. Its test modules are imported from there. The tables of methods in them are exchanged for SSVD's rows, and in the
tests of GENERIC a configuration of SSVD stands for LoRA's. Whatever is left out has its reason in LEFT_OUT; a test that
is in no table, or an entry that names no test, is an error. Models and texts from the hub are exchanged for small
random ones. Tests of torch.compile need a C++ compiler and take most of the time (leave them out: -k "not compile").
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import accelerate  # noqa: F401  (before the stand-ins below)
import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Trainer  # noqa: F401

from ssvd_kernels.config import PRESETS
from ssvd_kernels.integrations.peft import SSVDPeftConfig
from ssvd_kernels.integrations.peft_layer import SSVDPeftLinear

TESTS = (
    "test_custom_models.py",
    "test_torch_compile.py",
    "test_lora_conversion.py::TestLoraConversion::test_with_torch_compile",
    "test_low_level_api.py::TestInjectAdapterFromStateDict::test_inject_from_state_dict_compiled_model",
)
LIN0, LIN1, BOTH = ({"target_modules": names} for names in (["lin0"], ["lin1"], ["lin0", "lin1"]))
SAVED = {"modules_to_save": ["lin1"]}

# (model, options): lin0 is 10 -> 20 and lin1 20 -> 2
CASES = [
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", LIN0),
    ("MLP", {**LIN1, "rank": 2}),
    ("MLP", {**BOTH, "rank": 2}),
    ("MLP", LIN0 | SAVED),
    ("MLP", {**BOTH, **SAVED, "rank": 2}),
    ("MLP", {**BOTH, "rank_pattern": {"lin1": 2}}),
    ("MLP", {**LIN0, "side": "output"}),
    ("MLP", {**LIN0, "side": "both", "rank_out": 3}),
    ("MLP", {**LIN0, "rotation": "linear"}),
    ("MLP", {**LIN0, "rotation": "free"}),
    ("MLP", {**LIN0, "rotation": "banded", "band": 2}),
    ("MLP", {**LIN0, "form": "activation"}),
    ("MLP", {**LIN0, "form": "activation", "side": "both"}),
    ("EmbConv1D", LIN0 | {"rank": 2}),
    ("EmbConv1D", {"target_modules": ["conv1d"], "rank": 1, "rotation": "free"}),  # "cayley" has no angle at rank 1
    ("Conv2d1x1", {"target_modules": ["conv2d"], "rank": 1, "rotation": "free"}),
    ("Conv2d1x1", {"target_modules": ["conv2d", "lin0"], "rank": 1, "rotation": "free", "side": "output"}),
    ("MHA", {"target_modules": ["out_proj"]}),
    ("MHA", {"target_modules": ["out_proj", "lin0"], "rank": 2}),
]
RANDOM = {**LIN0, "init_weights": False}
PAIRS = [
    (RANDOM, RANDOM),
    (RANDOM, {**RANDOM, "rank": 7}),
    (RANDOM, {**RANDOM, **LIN1, "rank": 2}),
    (RANDOM, {**RANDOM, "side": "output"}),
    (RANDOM, {**RANDOM, "form": "activation"}),
]
ROWS = {
    "test_name, model_id, config_cls, config_kwargs": [
        (f"SSVD {number}", model, SSVDPeftConfig, options) for number, (model, options) in enumerate(CASES)
    ],
    "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2": [
        (f"SSVD {number}", "ssvd", SSVDPeftConfig, *pair) for number, pair in enumerate(PAIRS)
    ],
    "config_cls": [SSVDPeftConfig],
    "config0": [SSVDPeftConfig(**RANDOM)],
}
MIXED = ("test_name, config0, config1", "test_name, config")  # of these the rows that begin with "LoRA"
SETTINGS = {
    "ssvd": SSVDPeftConfig(task_type="CAUSAL_LM"),
    "ssvd-activation": SSVDPeftConfig(task_type="CAUSAL_LM", form="activation"),
    "ssvd-modules-to-save": SSVDPeftConfig(task_type="CAUSAL_LM", modules_to_save=["embed_tokens"]),
}

# tests of what all methods have, written with another one's configuration
GENERIC = {
    "test_add_adapter_rejects_duplicate_name_without_mutation",
    "test_causal_lm_disable_lora_adapter_compile",
    "test_causal_lm_merge_and_unload_lora_adapter_compile",
    "test_causal_lm_merging_lora_adapter_compile",
    "test_causal_lm_merging_multiple_lora_adapters_compile",
    "test_causal_lm_multiple_lora_adapter_compile",
    "test_causal_lm_training_lora_bnb_compile",
    "test_default_target_modules_osf",
    "test_delete_adapter_multiple_adapters_with_modules_to_save",
    "test_delete_adapter_with_multiple_adapters_works",
    "test_existing_model_card",
    "test_ignore_mismatched_sizes_with_scalar_modules_to_save",
    "test_inject_from_state_dict_compiled_model",
    "test_load_does_not_overwrite_similarly_named_sibling",
    "test_loading_adapter_preserves_custom_requires_grad",
    "test_multiple_adapters_automatic_modules_to_save",
    "test_multiple_adapters_no_needless_copy_modules_to_save",
    "test_multirank",
    "test_non_existing_model_card",
    "test_requires_grad_follows_inference_mode_modules_to_save",
    "test_requires_grad_lora_different_targets",
    "test_requires_grad_lora_same_targets",
    "test_requires_grad_modules_to_save_default",
    "test_requires_grad_modules_to_save_disabling",
    "test_requires_grad_modules_to_save_multiple_adapters",
    "test_save_embedding_layers_excludes_similarly_named_sibling",
    "test_weight_bias_attributes",
    "test_with_torch_compile",
}
STOOD_FOR = ("LoraConfig", "LoKrConfig", "OSFConfig")
# not those that adapt a model that ran, which bitsandbytes repacks on a CPU
QUANTIZED = {"test_causal_lm_training_lora_bnb_compile"}
PARTS = {"A": "delta_sigma", "B": "theta"}  # of LoRA's parameters; A has the rank as its first dimension, too

# regular expressions of tests, and why they are left out
LEFT_OUT = {
    r"test_(ia3|glora|gralora|monteclora|pvera)_": "tests of another method's own parameters",
    r"test_requires_grad_(ia3|adalora|loha|lokr|oft|hra|miss|boft|lntuning|p?vera|randlora|vblora|fourierft)_": (
        "the same as test_requires_grad_lora_*, with another method's names"
    ),
    r"_dora": "DoRA is LoRA's",
    r"test_(merge_with_lora_bias|lora_safe_merge)_": "lora_bias is LoRA's",
    r"_(trainable|trainble)_token": "trainable_token_indices is LoRA's",
    r"_add_weighted_adapter_|_modules_to_save_merging_adapters": "add_weighted_adapter is LoRA's",
    r"_to_embedding_layer|test_load_resized_embedding": "SSVD does not adapt embeddings",
    r"_lora_(emb_)?conv": "SSVD does not adapt embeddings and convolutions of kernel 3",
    r"_mha_|_multihead_attention": "of nn.MultiheadAttention SSVD adapts out_proj alone",
    r"test_repr_lora_": "what LoRA's layers print",
    r"TestDynamicDispatch": "the registration of layers is LoRA's",
    r"test_multirank_2": "ranks above the size of the layers",
    r"rejects_duplicate_name_without_mutation\[True\]": "PeftMixedModel is for PEFT's own methods",
    r"test_default_target_modules_(not_set|str)": (
        "without target_modules SSVD adapts all linear layers, or a preset, which is a list"
    ),
    r"test_mixed_adapter_batches_lora_opt_timing": "the time of LoRA's mixed batches on a GPU",
    r"test_causal_lm_mixed_batch_lora": "puts the model on a GPU itself; not tried there",
}
SEED = 0  # logarithms near 0, which some tests compare to 1e-5, must not be all rounding


def like_lora(
    r: int = 8, init_lora_weights: bool = True, lora_alpha: Any = None, alpha_pattern: Any = None, **options: Any
) -> SSVDPeftConfig:
    """LoRA's default rank, 8, is half of the full rank."""
    return SSVDPeftConfig(**{"ratio": r / 16, "init_weights": init_lora_weights, **options})


def row_of_ssvd(row: tuple[Any, ...]) -> tuple[Any, ...]:
    taken = ("r", "init_lora_weights", "target_modules", "modules_to_save")
    return row[0], *(like_lora(**{name: getattr(config, name) for name in taken}) for config in row[1:])


def seeded(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make(*args, **kwargs)

    return made


def of_ssvd(item: pytest.Item) -> bool:
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    return item.originalname in GENERIC or any(name in (*ROWS, *MIXED, "settings") for name in names)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = getattr(metafunc.module, "SETTINGS", {})
    settings.clear()
    settings.update({name: (config, {}) for name, config in SETTINGS.items()})
    for mark in metafunc.definition.iter_markers("parametrize"):
        names, rows = mark.args
        if names in ROWS:
            rows[:] = ROWS[names]
        elif names in MIXED and isinstance(rows[0][1], peft.LoraConfig):
            rows[:] = [row_of_ssvd(row) for row in rows if row[0].startswith("LoRA")]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    unused = GENERIC - {item.originalname for item in items} | set(LEFT_OUT)
    unknown = []
    for item in items:
        found = [pattern for pattern in LEFT_OUT if re.search(pattern, item.nodeid.partition("::")[2])]
        unused.difference_update(found)
        for pattern in found:
            item.add_marker(pytest.mark.skip(reason=LEFT_OUT[pattern]))
        if not found and not of_ssvd(item):
            unknown.append(item.nodeid)
    complaints = [f"no test is named by {name!r}" for name in sorted(unused)]
    complaints += [f"in no table: {name}" for name in unknown]
    if complaints:
        raise pytest.UsageError("\n".join(complaints))


class Texts(torch.utils.data.Dataset):
    """Columns of a data set, as far as the tests use one."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    def map(self, function: Callable[..., Any], batched: bool) -> Texts:
        return Texts(self.columns | dict(function(self.columns)))

    def remove_columns(self, names: list[str]) -> dict[str, Texts]:
        return {"train": Texts({name: column for name, column in self.columns.items() if name not in names})}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: Any) -> dict[str, Any]:
        return {name: column[rows] for name, column in self.columns.items()}


def write_models(folder: Path) -> None:
    """Under the last part of the names that the tests use, each with the tokenizer beside it."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<pad>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=64)
    size = {"vocab_size": len(fast), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    inner = {"intermediate_size": 128, "max_position_embeddings": 64}
    for name, model in {
        "tiny-random-OPTForCausalLM": transformers.OPTForCausalLM(
            transformers.OPTConfig(
                **size, ffn_dim=128, word_embed_proj_dim=64, init_std=0.2, max_position_embeddings=64
            )
        ),
        "tiny-random-LlamaForCausalLM": transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **inner)),
        "bert-base-uncased": transformers.BertModel(transformers.BertConfig(**size, **inner)),
    }.items():
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)


@pytest.fixture(autouse=True, scope="session")
def _no_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("models")
    seeded(write_models)(folder)

    def local(load: Callable[..., Any], name: str, **options: Any) -> Any:
        return load(folder / Path(name).name, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"):
            kind = getattr(transformers, name)
            patch.setattr(kind, "from_pretrained", partial(local, kind.from_pretrained))
        yield


def named_by(parameter: str) -> property:
    """What LoRA's layers have under lora_A and lora_B."""
    return property(
        lambda layer: {
            name: SimpleNamespace(weight=getattr(adapter, parameter)) for name, adapter in layer.ssvd_adapter.items()
        }
    )


@pytest.fixture(autouse=True)
def _for_ssvd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(SEED)
    # models made anew are the same: adapters of another one are refused
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", seeded(torch.nn.Linear.reset_parameters))
    mapping = "peft.tuners.lora.model.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    monkeypatch.setattr(mapping, PRESETS)
    if request.node.originalname not in GENERIC:
        return
    for name in STOOD_FOR:
        monkeypatch.setattr(request.module, name, like_lora, raising=False)
    if request.node.originalname not in QUANTIZED:
        monkeypatch.setattr(request.module, "BitsAndBytesConfig", lambda **_: None, raising=False)
    for letter, parameter in PARTS.items():
        monkeypatch.setattr(SSVDPeftLinear, f"lora_{letter}", named_by(parameter), raising=False)
    if hasattr(request.cls, "check_requires_grad"):
        check = request.cls.check_requires_grad

        def check_renamed(self: Any, model: Any, *names: str) -> None:
            renamed = (
                re.sub(r"lora_([AB])\.(\w+)\.weight", lambda found: f"ssvd_adapter.{found[2]}.{PARTS[found[1]]}", name)
                for name in names
            )
            check(self, model, *renamed)

        monkeypatch.setattr(request.cls, "check_requires_grad", check_renamed)


def main(source: str, *options: str) -> int | str:
    found = re.search(r'__version__ = "(.*)"', Path(source, "src/peft/__init__.py").read_text(encoding="utf-8"))
    if found is None or found[1] != peft.__version__:
        return f"{source} must hold PEFT {peft.__version__}, which is installed, got {found and found[1]}"
    quotes = {"quote": [f"Quotation number {number}." for number in range(24)], "author": [""] * 24, "tags": [""] * 24}
    for name, stand_in in {
        "datasets": MagicMock(load_dataset=lambda _: Texts(quotes)),
        "diffusers": MagicMock(),
    }.items():
        stand_in.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = stand_in
    os.environ["PEFT_DEBUG_WITH_TORCH_COMPILE"] = "1"
    os.chdir(source)
    arguments = [
        "-o",
        "addopts=",
        "-o",
        "filterwarnings=",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        *(f"tests/{t}" for t in TESTS),
    ]
    return pytest.main([*arguments, *options], plugins=[sys.modules[__name__]])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
