"""PEFT's own tests with SSVD as the method: `python tests/peft_suite.py CHECKOUT [options of pytest]`.

CHECKOUT holds PEFT's source at the installed version. Its test modules are imported from there, and the tables of
methods in them are exchanged for SSVD's rows; tests that name another method are left out. The last ones, of
torch.compile, run with PEFT_DEBUG_WITH_TORCH_COMPILE=1, on a small OPT and sentences that are made here. Those in HUB
download models, and may fail where they cannot.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import MagicMock

import accelerate  # noqa: F401  (before the stand-ins below)
import peft  # noqa: F401
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import Dataset

from ssvd_kernels.integrations.peft import SSVDPeftConfig

FILES = ("tests/test_custom_models.py", "tests/test_torch_compile.py")
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
    "test_name, config0, config1": [
        ("SSVD", SSVDPeftConfig(**RANDOM, **options), SSVDPeftConfig(**RANDOM, **options, rank=7))
        for options in ({}, {"modules_to_save": ["lin1"]})
    ],
    "config_cls": [SSVDPeftConfig],
    "config0": [SSVDPeftConfig(**RANDOM)],
}
# tests of what all methods have, written with a LoraConfig
GENERIC = {
    "test_add_adapter_rejects_duplicate_name_without_mutation",
    "test_delete_adapter_with_multiple_adapters_works",
    "test_delete_adapter_multiple_adapters_with_modules_to_save",
    "test_existing_model_card",
    "test_multiple_adapters_automatic_modules_to_save",
    "test_multiple_adapters_no_needless_copy_modules_to_save",
    "test_non_existing_model_card",
    "test_weight_bias_attributes",
}
LEFT_OUT = {
    "test_add_adapter_rejects_duplicate_name_without_mutation[True]": "PeftMixedModel is for PEFT's own methods",
    "test_add_weighted_adapter_cat_with_rank_pattern": "add_weighted_adapter is LoRA's",
    "test_mixed_adapter_batches_lora": "a row of LoRA's convolutions and embeddings",
    "test_mixed_adapter_batches_mha_raises": "a row of LoRA's nn.MultiheadAttention",
    "test_mixed_adapter_batches_unsupported_layer_raises": "a row with LoRA's modules_to_save",
    "test_default_target_modules": "without target_modules SSVD adapts all linear layers, or a preset",
}
SEED = 0  # logarithms near 0, which some tests compare to 1e-5, must not be all rounding
HUB = {
    "test_multiple_adapters_automatic_modules_to_save": "bert-base-uncased",
    "test_multiple_adapters_no_needless_copy_modules_to_save": "peft-internal-testing/tiny-random-OPTForCausalLM",
}


def like_lora(r: int | None = None, init_lora_weights: bool = True, **options: Any) -> SSVDPeftConfig:
    return SSVDPeftConfig(rank=r, init_weights=init_lora_weights, **options)


def seeded(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        return make(*args, **kwargs)

    return made


def of_ssvd(item: pytest.Item) -> bool:
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    return any(name in ROWS or name == "settings" for name in names) or item.originalname in GENERIC


WORDS = "the quick brown fox jumps over a lazy dog and then sleeps all day in the sun near an old river".split()


class Sentences(Dataset):
    """What the tests of torch.compile do with a set of sentences of a data set, which is tokenized already."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self.rows = [dict(tokenizer(" ".join(WORDS[i % 7 : i % 7 + 8]))) for i in range(32)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int | slice) -> dict[str, Any]:
        if isinstance(place, int):
            return self.rows[place]
        return {key: [row[key] for row in self.rows[place]] for key in self.rows[0]}


class Unused:
    """In place of classes of `datasets`, of which transformers asks whether data are of them."""


class DataSet(dict[str, Sentences]):
    def map(self, *_: object, **__: object) -> DataSet:
        return self

    remove_columns = map


def without_hub(module: Any) -> None:
    """Gives the tests of torch.compile a model, a tokenizer and data that are made here."""
    if hasattr(module, "made_here"):
        return
    module.made_here = folder = tempfile.TemporaryDirectory()
    special = ("<unk>", "<pad>", "</s>")
    model = WordLevel({word: i for i, word in enumerate(dict.fromkeys([*special, *WORDS]))}, unk_token="<unk>")
    plain = Tokenizer(model)
    plain.pre_tokenizer = Whitespace()
    names = dict(zip(("unk_token", "pad_token", "eos_token"), special))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=64, **names)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    tokens = {"vocab_size": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    config = transformers.OPTConfig(num_attention_heads=2, max_position_embeddings=128, **sizes, **tokens)
    for saved in (transformers.OPTForCausalLM(config), tokenizer):
        saved.save_pretrained(folder.name)
    module.TestTorchCompileCausalLM.model_id = folder.name
    module.load_dataset_english_quotes = lambda: DataSet(train=Sentences(tokenizer))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if hasattr(metafunc.module, "TestTorchCompileCausalLM"):
        without_hub(metafunc.module)
    settings = getattr(metafunc.module, "SETTINGS", {})
    settings.clear()
    settings["ssvd"] = SSVDPeftConfig(task_type="CAUSAL_LM"), {}
    for mark in metafunc.definition.iter_markers("parametrize"):
        if mark.args[0] in ROWS:
            mark.args[1][:] = ROWS[mark.args[0]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    entries = {*GENERIC, *LEFT_OUT, *HUB}
    if gone := sorted(entry for entry in entries if not any(item.name.startswith(entry) for item in items)):
        raise pytest.UsageError(f"no test of PEFT begins with {', '.join(gone)}: take that out of {__file__}")
    ours = [item for item in items if of_ssvd(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
    for item in items:
        for start, why in LEFT_OUT.items():
            if item.name.startswith(start):
                item.add_marker(pytest.mark.skip(reason=why))
        for start, what in HUB.items():
            if item.name.startswith(start):
                item.add_marker(pytest.mark.xfail(raises=OSError, reason=f"downloads {what}"))


@pytest.fixture(autouse=True)
def _for_ssvd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    module = request.module
    torch.manual_seed(SEED)
    if request.node.originalname in GENERIC:
        monkeypatch.setattr(module, "LoraConfig", like_lora)
    if hasattr(module, "DeepMLP"):  # as a model made anew; adapters of another one are refused
        monkeypatch.setattr(module, "DeepMLP", seeded(module.DeepMLP))


def main(checkout: str, *options: str) -> int:
    for name in ("datasets", "diffusers"):  # that the helpers of PEFT's tests import, but not these tests
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = module = MagicMock(Dataset=Unused, IterableDataset=Unused)
            module.__spec__ = ModuleSpec(name, None)
    os.chdir(checkout)
    arguments = ["-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", *FILES, *options]
    return pytest.main(arguments, plugins=[sys.modules[__name__]])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
