"""Quantised bases together with the other features: named adapters, LoRA, DDP, PEFT, and saving what was merged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import relative_error
from models import adapt, gradients
from quantized_nets import BITSANDBYTES, KINDS, adapted, net_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ssvd_kernels as sk


def x() -> Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_named_adapters(kind, tmp_path):
    net, base = adapted(kind), net_of(kind)
    expected = net(x())
    sk.save_adapter(net, tmp_path / "a.safetensors")
    sk.add_adapter(net, "b", tmp_path / "a.safetensors")
    sk.add_adapter(net, "zero")
    sk.average_adapters(net, {"b": 1, "zero": 1}, into="mean")
    found = {}
    for name in ("b", "zero", "mean"):
        sk.set_adapter(net, name)
        found[name] = net(x())
    assert torch.equal(found["b"], expected) and torch.equal(found["zero"], base(x()))
    assert min(relative_error(found["mean"], found[name]) for name in ("b", "zero")) > 1e-3
    sk.set_adapter(net, "b")
    with sk.disable_adapter(net):
        assert torch.equal(net(x()), base(x()))
        assert all(torch.equal(layer.weight, layer.base_weight) for layer in sk.ssvd_layers(net).values())
        with pytest.raises(ValueError, match="while its adapter is disabled"):
            sk.merge(net, unload=True)
    sk.delete_adapter(net, "mean")
    assert torch.equal(net(x()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_plans_count_what_is_packed(kind):
    plain = sum(parameter.numel() for parameter in net_of(lambda net: None).parameters())
    for allocation in ("uniform", "spectrum"):
        net = net_of(kind)
        plan = sk.plan(net, budget=0.05, allocation=allocation, progress=False)
        report = sk.inject(net, plan, progress=False)
        assert plan.total == report.total - report.trainable == plain
        assert report.trainable == plan.trainable <= 0.05 * plain


@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_the_same_update(kind, tmp_path):
    net = adapted(kind)
    report = sk.to_lora(net, tmp_path / "lora", progress=False)
    assert 0 < report.error <= torch.finfo(torch.float32).eps  # of two factors, each rounded to float32
    assert list(report.ranks) == list(sk.ssvd_layers(net))


def _gradients(rank: int, kind: Callable[[nn.Module], None]) -> dict[str, Tensor]:
    net = adapted(kind)
    wrapped = DistributedDataParallel(net)
    wrapped(x()[rank::2]).square().mean().backward()
    return gradients(net)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_ddp_averages_the_gradients(group, kind):
    first, second = group.run(_gradients, kind)
    assert all(grad.abs().max() > 0 for grad in first.values())
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_merged_model_is_saved_as_a_plain_one(bits, tmp_path):
    from speech_models import inputs, transformers, whisper

    for library in ("accelerate", "bitsandbytes"):
        pytest.importorskip(library)
    whisper().save_pretrained(tmp_path / "base")
    load = transformers.WhisperForConditionalGeneration.from_pretrained
    options = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = load(tmp_path / "base", quantization_config=options, device_map="cpu", dtype=torch.float32).eval()
    adapt(model, targets="whisper")
    with pytest.raises(ValueError, match=r"is quantised.*merge\(model, unload=True\)"):
        sk.export_merged(model, tmp_path / "refused")
    sk.merge(model, unload=True)
    model.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "merged").eval()(**inputs(model))[0], model(**inputs(model))[0])
