"""Speech models made of convolutions of kernel 1: SpeechBrain's ECAPA-TDNN and transformers' Conformer."""

from __future__ import annotations

import pytest
import torch
from cases import relative_error
from models import gradients, train_randomly
from peft_models import peft, transformers
from test_speechbrain import _speechbrain
from torch import Tensor, nn

import ssvd_kernels as sk

(ecapa_tdnn,) = _speechbrain("lobes.models.ECAPA_TDNN")


def ecapa() -> nn.Module:
    torch.manual_seed(0)
    return ecapa_tdnn.ECAPA_TDNN(
        8, lin_neurons=12, channels=[16, 16, 16, 16, 48], attention_channels=8, res2net_scale=4, se_channels=8
    ).eval()


def conformer() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2ConformerConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0, conv_depthwise_kernel_size=3,
        position_embeddings_type="relative",
    )  # fmt: skip
    return transformers.Wav2Vec2ConformerModel(config).eval()


MODELS = {
    "ecapa": (ecapa, r".*conv", 16, torch.randn(2, 30, 8)),
    "conformer": (conformer, r"encoder.*(pointwise_conv\d|linear_\w+|_dense)", 22, torch.randn(2, 200)),
}


def run(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y[0]


@pytest.fixture(params=MODELS)
def case(request):
    """(constructor, adapted and trained model, its input)."""
    make, targets, count, x = MODELS[request.param]
    model = make()
    if request.param == "ecapa":  # those that are wider than a position stay
        targets = [n for n, m in model.named_modules() if type(m) is nn.Conv1d and m.kernel_size == (1,)]
    before = run(model, x)
    assert len(sk.inject(model, sk.SSVDConfig(ratio=0.4, targets=targets), progress=False).modules) == count
    assert torch.equal(run(model, x), before)
    return make, train_randomly(model), x


def test_it_trains_saves_and_merges_into_its_convolutions(case, tmp_path):
    make, model, x = case
    run(model, x).square().mean().backward()
    assert all(bool(grad.any()) for grad in gradients(model).values())
    y = run(model, x).detach()
    sk.save_adapter(model, tmp_path / "a.safetensors")
    again, plain = make(), make()
    sk.load_adapter(again, tmp_path / "a.safetensors", progress=False)
    assert torch.equal(run(again, x), y)
    sk.merge(again, unload=True)
    assert all(type(again.get_submodule(name)) is type(plain.get_submodule(name)) for name in sk.ssvd_layers(model))
    plain.load_state_dict(again.state_dict())
    assert relative_error(run(plain, x).detach(), y) <= 1e-6


@pytest.mark.parametrize("case", ["conformer"], indirect=True)
def test_export_as_a_plain_model_and_as_lora(case, tmp_path):
    make, model, x = case
    y = run(model, x).detach()
    sk.export_merged(model, tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    assert relative_error(run(merged, x).detach(), y) <= 1e-6
    sk.to_lora(model, tmp_path / "lora", progress=False)
    lora = peft.PeftModel.from_pretrained(make(), str(tmp_path / "lora")).eval()
    assert relative_error(run(lora, x).detach(), y) <= 1e-6
