"""OpenAI's own Whisper, whose linear layers cast their weights to the input's dtype, and what ESPnet makes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import adapt, assert_all_within, gradients, loss_of, references, train_randomly
from torch import Tensor, nn

import ssvd_kernels as sk

whisper = pytest.importorskip("whisper", reason="needs OpenAI's package: pip install openai-whisper")

LAYERS = 2 * 6 + 2 * 10  # in two blocks each of an encoder and a decoder


def base_model(vocabulary: int = 51) -> nn.Module:
    torch.manual_seed(3)
    model = whisper.Whisper(whisper.ModelDimensions(80, 1500, 16, 2, 2, vocabulary, 24, 16, 2, 2)).eval()
    nn.init.normal_(model.decoder.positional_embedding)  # which comes uninitialised
    return model


def run(model: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    mel, tokens = torch.randn(1, 80, 3000, generator=generator), torch.randint(3, 50, (1, 6), generator=generator)
    return model(mel.to(dtype or next(model.parameters()).dtype), tokens)


def loss_gradients(model: nn.Module) -> dict[str, Tensor]:
    loss_of(run(model)).backward()
    return gradients(model)


@pytest.mark.parametrize("targets", ["whisper", "all-linear", r".*\.(query|key|value|out|\d)"])
def test_targets_and_what_is_given_back(targets):
    base, model = base_model(), base_model()
    report = sk.inject(model, sk.SSVDConfig(rank=5, targets=targets), progress=False)
    assert len(report.modules) == LAYERS and "linear layers" not in report.left_out
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(run(model, dtype), run(base, dtype))
    sk.merge(model, unload=True)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


def test_training():
    model = adapt(base_model(), targets="whisper").train()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm  # Whisper's own computes in float32 only, the same
    assert_all_within(loss_gradients(model), *references(model, loss_gradients))


@pytest.mark.parametrize("fp16", [True, False])
def test_decoding_with_its_cache_of_keys_and_values(fp16):
    """fp16=True is Whisper's default on GPUs: half-precision x over float32 weights."""
    model, mel = adapt(base_model(51864), targets="whisper"), torch.randn(1, 80, 3000)
    options = whisper.DecodingOptions(fp16=fp16, language="en", without_timestamps=True, sample_len=6, beam_size=2)
    tokens = [result.tokens for result in whisper.decode(model, mel, options)]
    base = [result.tokens for result in whisper.decode(base_model(51864), mel, options)]
    sk.merge(model, unload=True)
    assert tokens == [result.tokens for result in whisper.decode(model, mel, options)] != base


def test_files_and_strength(tmp_path):
    model, again = adapt(base_model(), targets="whisper"), base_model()
    sk.save_adapter(model, tmp_path / "a.safetensors")
    sk.load_adapter(again, tmp_path / "a.safetensors", progress=False)
    whole, base = run(again), run(base_model())
    assert torch.equal(whole, run(model)) and not torch.equal(whole, base)
    for network in (model, again):
        sk.set_strength(network, 0.5)
    assert torch.equal(run(again), run(model)) and not torch.equal(run(again), whole)
    sk.set_strength(again, 0.0)
    assert torch.equal(run(again), base)


def test_through_peft(tmp_path):
    peft = pytest.importorskip("peft")
    from ssvd_kernels.integrations.peft import SSVDPeftConfig

    config, twin = SSVDPeftConfig(rank=5, target_modules="whisper"), adapt(base_model(), targets="whisper")
    model = peft.get_peft_model(base_model(), config)
    for ours, theirs in zip(*([p for p in m.parameters() if p.requires_grad] for m in (model, twin)), strict=True):
        ours.data.copy_(theirs.data)
    model.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(base_model(), str(tmp_path)).eval()
    for dtype in (torch.float32, torch.float16):
        for network in (model, again):
            assert torch.equal(run(network.base_model.model, dtype), run(twin, dtype))
    merged = again.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in base_model().modules()]
    sk.merge(twin, unload=True)
    assert torch.equal(run(merged), run(twin))


@pytest.fixture
def espnet(monkeypatch) -> Callable[..., object]:
    """ESPnet's create_adapter, for models that take theirs of `base_model`."""
    create_adapter = pytest.importorskip("espnet_models").create_adapter
    monkeypatch.setattr(whisper.audio, "N_MELS", 80, raising=False)  # older releases had it, and ESPnet asks for it
    monkeypatch.setattr(whisper, "load_model", lambda *args, **kwargs: base_model())
    return create_adapter


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_espnet_s(espnet, part):
    tokens, lengths, memory = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([3, 2]), torch.randn(2, 9, 16)
    if part == "encoder":
        from espnet2.asr.encoder.whisper_encoder import OpenAIWhisperEncoder

        model, args, count = OpenAIWhisperEncoder(whisper_model="tiny"), (torch.randn(2, 8000), 8000 - lengths), 2 * 2
    else:
        from espnet2.asr.decoder.whisper_decoder import OpenAIWhisperDecoder

        model = OpenAIWhisperDecoder(vocab_size=20, encoder_output_size=16, whisper_model="tiny")
        args, count = (memory, torch.tensor([9, 9]), tokens, lengths), 2 * 3
    model, twin = model.eval(), copy.deepcopy(model).eval()
    conf = {"rank": 5, "rotation_map": "cayley", "weights": "now", "target_modules": ["attn.query", "mlp.0"]}
    espnet(model, "ssvd_kernels", conf)
    assert torch.equal(model(*args)[0], twin(*args)[0])
    assert len(sk.check_training(model, loss_of(model(*args)[0])).ok) == count
    state = train_randomly(model).state_dict()
    espnet(twin, "ssvd_kernels", conf)
    twin.load_state_dict(state)
    assert torch.equal(model(*args)[0], twin(*args)[0])


@pytest.mark.data
@pytest.mark.slow
def test_the_real_tiny_en_transcribes(tmp_path):
    real_data = pytest.importorskip("asr_tiny").real_data
    from experiments.asr import fetch, speech
    from experiments.asr.whisper_ct2 import load_whisper_ct2

    data = real_data(fetch.MODEL, fetch.ASTERISK, fetch.SPHINX)
    weights = load_whisper_ct2(data / fetch.MODEL)[0].state_dict()
    models = [whisper.Whisper(whisper.ModelDimensions(80, 1500, 384, 6, 4, 51864, 448, 384, 6, 4)).eval() for _ in "ab"]
    for model in models:
        model.load_state_dict(
            {openai_name(name): weight for name, weight in weights.items() if name != "proj_out.weight"}
        )
    clip = speech.source_speech(data)["prompts as recorded"][0]

    def heard(model: nn.Module) -> str:
        options = {"fp16": False, "language": "en", "temperature": 0.0, "sample_len": 30}
        return whisper.transcribe(model, clip.read(), **options)["text"].strip()

    model, again = models
    base = heard(model)
    report = sk.inject(model, sk.SSVDConfig(ratio=0.1, targets="whisper"), progress=False)
    assert len(report.modules) == 64 and heard(model) == base
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in sk.ssvd_layers(model).values():
            layer.theta.copy_(0.03 * torch.randn(layer.theta.shape, generator=generator))
    sk.save_adapter(model, tmp_path / "a.safetensors")
    sk.load_adapter(again, tmp_path / "a.safetensors", progress=False)
    otherwise = heard(model)
    assert heard(again) == otherwise != base
    sk.merge(again, unload=True)
    assert heard(again) == otherwise
    sk.set_strength(model, 0.1)
    assert heard(model) == base


def openai_name(name: str) -> str:
    """Of a weight of transformers' Whisper, in OpenAI's."""
    for theirs, own in {
        "model.": "", "layers": "blocks", "encoder_attn": "cross_attn", "self_attn": "attn",
        "attn_layer_norm": "attn_ln", "final_layer_norm": "mlp_ln", "encoder.layer_norm": "encoder.ln_post",
        "decoder.layer_norm": "decoder.ln", "embed_tokens": "token_embedding",
        "embed_positions.weight": "positional_embedding", "q_proj": "query", "k_proj": "key", "v_proj": "value",
        "out_proj": "out", "fc1": "mlp.0", "fc2": "mlp.2",
    }.items():  # fmt: skip
        name = name.replace(theirs, own)
    return name
