"""PEFT: transformers' Trainer, and the real Whisper tiny.en."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from bounds import assert_within
from cases import relative_error
from models import references
from peft_models import base_model, config, in_new_process, peft, run, transformers
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.model.parameter_groups import EXPONENT


def text_data() -> list[dict[str, Tensor]]:
    """Sequences that count upwards by a fixed step: quick to learn."""
    rows = [(torch.arange(12) * step + start) % 29 + 3 for step in (1, 2) for start in range(8)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder: Path, model: nn.Module, steps: int = 12, **options) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=2e-2, weight_decay=0.0,
        lr_scheduler_type="constant", save_steps=steps // 2, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, **options,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=text_data(), eval_dataset=text_data())


def losses(run_: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in run_.state.log_history if "loss" in entry]


def test_trainer_trains_the_adapter_in_use_at_the_rate_of_its_rank(tmp_path):
    model = peft.get_peft_model(base_model("llama"), config(rank=4))
    model.add_adapter("b", config(rank=6))
    run_ = trainer(tmp_path, model, steps=2)
    for name, rates in (("default", {1e-3}), ("b", {1e-3 * (4 / 6) ** EXPONENT})):
        model.set_adapter(name)
        groups = sk.parameter_groups(model, 1e-3, k_ref=4)
        given = [parameter for group in groups for parameter in group["params"]]
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert {id(p) for p in given} == {id(p) for p in wanted} and len(given) == len(wanted)
        assert {group["lr"] for group in groups} == rates
    run_.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    run_.train()
    assert {group["lr"] for group in run_.optimizer.param_groups} == rates and losses(run_)[1] < losses(run_)[0]


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), {"gradient_checkpointing": True}])
def test_trainer_trains_saves_and_resumes(tmp_path, options):
    def make() -> nn.Module:
        return peft.get_peft_model(base_model("llama"), config(side="both"))

    whole = trainer(tmp_path / "whole", make(), **options)
    whole.train()
    assert losses(whole)[-1] < 0.8 * losses(whole)[0]
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()

    resumed = trainer(tmp_path / "resumed", make(), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[6:] == losses(whole)[6:]
    ours, theirs = (peft.get_peft_model_state_dict(t.model) for t in (resumed, whole))
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key

    final = peft.PeftModel.from_pretrained(base_model("llama"), str(tmp_path / "whole" / "checkpoint-12"))
    with torch.no_grad():
        assert torch.equal(run(final), run(whole.model.eval()))


def test_trainer_loads_the_best_adapter_at_the_end(tmp_path):
    model = peft.get_peft_model(base_model("llama"), config())
    best = trainer(tmp_path, model, eval_strategy="steps", eval_steps=6, load_best_model_at_end=True)
    best.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in best.state.log_history if "eval_loss" in entry}
    assert best.evaluate()["eval_loss"] == min(evaluated.values())


RELOAD = """
import torch
from cases import relative_error
from peft_models import peft
from test_peft_training import hear, tiny_en
torch.set_num_threads(2)
folder = {folder!r}
model = peft.PeftModel.from_pretrained(tiny_en(), folder)
error = relative_error(hear(model.double()), torch.load(folder + "/expected.pt"))
assert 0 <= error <= 1e-6, error  # what float32 keeps of a basis: 6e-8 in each of 64 layers, one after the other
"""


def tiny_en() -> nn.Module:
    """Whisper tiny.en, or a skip where `make demo` has not fetched it."""
    real_data = pytest.importorskip("asr_tiny").real_data
    from experiments.asr import fetch
    from experiments.asr.whisper_ct2 import load_whisper_ct2

    return load_whisper_ct2(real_data(fetch.MODEL) / fetch.MODEL)[0]


def hear(model: nn.Module) -> Tensor:
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))
    features = features.to(next(model.parameters()).dtype)
    with torch.no_grad():
        return model(input_features=features, decoder_input_ids=torch.tensor([[50257, 50362, 11, 13]])).logits


@pytest.mark.data
@pytest.mark.slow
def test_real_whisper_trains_saves_reloads_and_merges(tmp_path):
    model = tiny_en()
    before = hear(model)
    model = peft.get_peft_model(model, config(ratio=0.4))
    layer_count, theta_and_delta = 4 * 6 + 4 * 10, 153 * 154 // 2
    assert model.get_nb_trainable_parameters()[0] == layer_count * theta_and_delta == 753_984
    assert torch.equal(hear(model), before)

    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-4, weight_decay=0.0)
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([[50362, 1770, 318, 262, 640, 13, 50256]])
    found = []
    for _ in range(3):
        loss = model(input_features=features, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[2] < found[1] < found[0]

    after, output = hear(model.eval()), references(model, hear)
    assert relative_error(after, before) > 1e-3
    model.save_pretrained(str(tmp_path))
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size <= 1.1 * 4 * 753_984
    # in float64, where the forward's own rounding, 1e-6 in float32 whatever moves a bit, does not hide the adapter's
    torch.save(hear(copy.deepcopy(model).double()), tmp_path / "expected.pt")
    in_new_process(RELOAD.format(folder=str(tmp_path)))
    with model.disable_adapter():
        assert torch.equal(hear(model), before)
    assert_within(after, *output)
    assert_within(hear(model.merge_and_unload()), *output)
