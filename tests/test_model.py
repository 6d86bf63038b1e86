"""Whole models: presets, identity before training, one batched rotation, gradients, checkpointing, caching, compile."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssvd_kernels as sk
from ssvd_kernels import dispatch, reference
from ssvd_kernels import layers as layers_module
from ssvd_kernels.functional import theta_length

transformers = pytest.importorskip("transformers")

RANK = 5
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors: a second thread only spins."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def whisper(**options) -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=51, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=20,
        max_target_positions=24, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None, **options,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _wav2vec2_like(config_class: str, model_class: str) -> Callable[..., nn.Module]:
    def make(**options) -> nn.Module:
        config = getattr(transformers, config_class)(
            vocab_size=12, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
            conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
            **{"layerdrop": 0.0, **options},
        )  # fmt: skip
        return getattr(transformers, model_class)(config)

    return make


# name -> (constructor, preset, transformer layers x adapted linear layers in each)
MODELS = {
    "whisper": (whisper, "whisper", 2 * 6 + 2 * 10),
    "wav2vec2": (_wav2vec2_like("Wav2Vec2Config", "Wav2Vec2Model"), "wav2vec2", 3 * 6),
    "wav2vec2-ctc": (_wav2vec2_like("Wav2Vec2Config", "Wav2Vec2ForCTC"), "wav2vec2", 3 * 6),
    "hubert": (_wav2vec2_like("HubertConfig", "HubertModel"), "hubert", 3 * 6),
    "wavlm": (_wav2vec2_like("WavLMConfig", "WavLMModel"), "wavlm", 3 * 6),
}


def inputs(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "whisper":
        return {
            "input_features": torch.randn(2, 8, 40, generator=generator),
            "decoder_input_ids": torch.randint(3, 50, (2, 6), generator=generator),
        }
    return {"input_values": torch.randn(2, 200, generator=generator)}


def run(model: nn.Module, seed: int = 0) -> Tensor:
    torch.manual_seed(100 + seed)  # dropout
    return model(**inputs(model, seed))[0]


def loss_of(output: Tensor) -> Tensor:
    """Not a norm: a final layer norm would make that constant."""
    return (output * torch.sin(1.7 * torch.arange(output.numel(), dtype=output.dtype)).view_as(output)).mean()


def inject(model: nn.Module, **options) -> sk.InjectReport:
    return sk.inject(model, sk.SSVDConfig(**{"rank": RANK, **options}), progress=False)


def adapted(name: str, seed: int = 1, **options) -> nn.Module:
    make, preset, _ = MODELS[name]
    model = make()
    inject(model, targets=preset, **options)
    return train_randomly(model, seed)


def train_randomly(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in found.values()), [n for n, g in found.items() if g is None]
    model.zero_grad()
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def loss_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(run(model)).backward()
    return gradients(model)


def assert_close_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert list(ours) == list(expected)
    assert all(grad.abs().max() > 0 for grad in expected.values())
    for name, grad in expected.items():
        assert relative_error(ours[name], grad) <= bound, name


def plain_twin(model: nn.Module) -> nn.Module:
    """The same model with nn.Linear layers that hold W', by float64 arithmetic of this test's own."""
    twin = copy.deepcopy(model)
    weights = {}
    for name, layer in sk.ssvd_layers(twin).items():
        assert layer.side == "input" and layer.rotation == "cayley"
        K = reference.skew(layer.theta.detach().double(), layer.k)
        eye = torch.eye(layer.k, dtype=torch.float64)
        G = torch.linalg.solve(eye + K, eye - K)
        sigma, delta = layer.sigma.double(), layer.delta_sigma.detach().double()
        core = torch.diag(sigma + delta) @ G - torch.diag(sigma)
        weights[name] = layer.base_weight.double() + layer.U.double() @ core @ layer.V.double().T
    sk.remove(twin)
    with torch.no_grad():
        for name, weight in weights.items():
            twin.get_submodule(name).weight.copy_(weight)
    return twin


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[int]]]:
    """Batch sizes of every call of the Cayley op, forward and backward."""
    calls: dict[str, list[int]] = {"cayley_delta": [], "cayley_delta_backward": []}

    def spy(name: str) -> Callable:
        original = getattr(dispatch, name)

        def call(tensor: Tensor, other: object) -> Tensor:
            calls[name].append(tensor.shape[0])
            return original(tensor, other)

        return call

    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(dispatch, name, spy(name))
        yield calls


# -- presets and identity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_preset_matches_every_attention_and_feed_forward_layer_and_nothing_else(name):
    make, preset, count = MODELS[name]
    model = make()
    feed_forward = ("fc1", "fc2", "intermediate_dense", "output_dense")
    expected = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in ATTENTION}
    expected |= {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in feed_forward}
    report = inject(model, targets=preset)
    assert set(report.modules) == expected and len(expected) == count
    assert report.trainable == count * RANK * (RANK + 1) // 2
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{module}.{part}" for module in expected for part in ("theta", "delta_sigma")}
    assert f"{count} layers" in str(report) and f"{report.trainable:,}" in str(report)


def test_report_counts_the_base_and_what_was_added():
    model = whisper()
    before = sum(p.numel() for p in model.parameters())
    report = inject(model, targets="whisper")
    assert report.total == before + report.trainable


@pytest.mark.parametrize("targets", ["all-linear", "whisper", r".*(proj|proj_out|fc\d)"])
def test_tied_weights_are_left_alone(targets):
    model = whisper()
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    inject(model, targets=targets)
    assert type(model.proj_out) is nn.Linear
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert not model.proj_out.weight.requires_grad


def test_listed_tied_weight_is_refused():
    with pytest.raises(ValueError, match=r"'proj_out'.*tied to 'model\.decoder\.embed_tokens\.weight'"):
        inject(whisper(), targets=["q_proj", "proj_out"])


def test_untied_output_embedding_is_adapted_only_by_name():
    model = whisper(tie_word_embeddings=False)
    model.proj_out.weight = nn.Parameter(model.proj_out.weight.detach().clone())
    assert "proj_out" not in inject(copy.deepcopy(model), targets="all-linear").modules
    assert inject(model, targets=["proj_out"]).modules == ["proj_out"]


@pytest.mark.parametrize("side", ["input", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_bit_identical_before_training(name, side):
    """Without gradients the base is frozen too: of a strided 3-D x (WavLM's), the library's own product depends on
    whether the weight requires a gradient, by an ulp."""
    make, preset, _ = MODELS[name]
    base = make()
    model, frozen = copy.deepcopy(base), copy.deepcopy(base).requires_grad_(False)
    inject(model, targets=preset, side=side)
    for training in (True, False):
        for network in (base, model, frozen):
            network.train(training)
        assert torch.equal(run(model), run(base))
        with torch.no_grad():
            assert torch.equal(run(model), run(frozen))
        with torch.inference_mode():
            assert torch.equal(run(model), run(frozen))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(model), run(base))
            with torch.no_grad():
                assert torch.equal(run(model), run(frozen))
    sk.remove(model)
    assert torch.equal(run(model), run(base))


@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "wavlm"])
def test_bf16_model_is_bit_identical_before_training(name):
    make, preset, _ = MODELS[name]
    base = make().to(torch.bfloat16).eval()
    model = copy.deepcopy(base)
    inject(model, targets=preset)
    cast = {key: v.bfloat16() if v.is_floating_point() else v for key, v in inputs(base).items()}
    assert torch.equal(model(**cast)[0], base(**cast)[0])
    with torch.no_grad():
        assert torch.equal(model(**cast)[0], base(**cast)[0])


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_trained_model_computes_with_the_effective_weights(name):
    model = adapted(name)
    twin = plain_twin(model)
    for training in (True, False):
        expected = run(twin.train(training)).detach()
        assert relative_error(run(model.train(training)).detach(), expected) <= 2e-6
        with torch.no_grad():
            assert relative_error(run(model), expected) <= 2e-6
    model.eval()
    unmerged = run(model).detach()
    sk.merge(model)
    assert relative_error(run(model).detach(), unmerged) <= 1e-5
    sk.unmerge(model)
    assert torch.equal(run(model).detach(), unmerged)


@pytest.mark.parametrize("rotation", ["cayley", "linear", "free"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter_and_are_right(name, rotation):
    """Directional derivative in float64 along a random direction through every trained parameter."""
    model = adapted(name, rotation=rotation).double().eval()
    batch = {key: v.double() if v.is_floating_point() else v for key, v in inputs(model).items()}

    def loss() -> Tensor:
        return loss_of(model(**batch)[0])

    loss().backward()
    grads = gradients(model)
    assert all(grad.abs().max() > 0 for grad in grads.values())
    direction = {key: torch.randn_like(grad) for key, grad in grads.items()}
    slope = sum((grads[key] * direction[key]).sum() for key in grads)
    step, values = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key in direction:
                    parameter += sign * step * direction[key]
        values.append(loss().item())
    assert math.isclose((values[0] - values[1]) / (2 * step), float(slope), rel_tol=1e-6, abs_tol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_one_batched_rotation_per_forward(monkeypatch, name):
    model, count = adapted(name), MODELS[name][2]
    with counted(monkeypatch) as calls:
        loss = loss_of(run(model.train()))
        assert calls["cayley_delta"] == [count]
        loss.backward()
        assert calls == {"cayley_delta": [count], "cayley_delta_backward": [count]}
        with torch.no_grad():
            run(model)
        assert calls["cayley_delta"] == [count, count]
        model.eval()
        with torch.no_grad():
            for seed in range(3):
                run(model, seed)  # the first needs them, the others use what is kept
        assert calls["cayley_delta"] == [count, count, count]


def test_two_ranks_and_both_sides_are_two_calls(monkeypatch):
    model = whisper()
    inject(model, targets="whisper", side="both", rank=5, rank_out=3)
    with counted(monkeypatch) as calls:
        run(model.train()).sum().backward()
    assert sorted(calls["cayley_delta"]) == sorted(calls["cayley_delta_backward"]) == [32, 32]


def test_dropped_layers_get_no_gradient_and_the_others_do(monkeypatch):
    make, preset, count = MODELS["wav2vec2"]
    model = make(layerdrop=0.5).train()
    inject(model, targets=preset)
    train_randomly(model)
    layers = sk.ssvd_layers(model)
    ran: set[str] = set()
    for key, layer in layers.items():
        layer.register_forward_hook(lambda *_, key=key: ran.add(key))
    some = False
    for seed in range(6):
        ran.clear()
        model.zero_grad()
        with counted(monkeypatch) as calls:
            loss_of(run(model, seed)).backward()
        assert calls["cayley_delta"] == [count]
        for key, layer in layers.items():
            for parameter in (layer.theta, layer.delta_sigma):
                assert (parameter.grad is not None and bool(parameter.grad.any())) == (key in ran)
        some |= 0 < len(ran) < count
    assert some, "no seed dropped a layer"


def _require_input_gradients(model: nn.Module) -> None:
    """What reentrant checkpointing needs of any model whose first layers are frozen."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Embedding)):
            module.register_forward_hook(lambda module, args, output: output.requires_grad_())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant):
    if name == "wavlm" and use_reentrant:
        pytest.skip("transformers' own WavLM passes position_bias by keyword: its reentrant backward never ends")
    model = adapted(name).train()
    _require_input_gradients(model)
    expected = loss_gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for _ in range(2):
        assert_close_gradients(loss_gradients(model), expected)


class WeightReader(nn.Module):
    """Reads `.weight` of its projections, as WavLM does, twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.linear(torch.tanh(F.linear(x, self.up.weight, self.up.bias)), self.down.weight, self.down.bias)
        return x


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_modules_that_read_the_weight(use_reentrant):
    checkpointed, plain = _stacks(use_reentrant, WeightReader)
    x = torch.randn(4, 8, requires_grad=True)
    for _ in range(2):
        found = []
        for model in (plain, checkpointed):
            model(x).square().mean().backward()
            found.append(gradients(model))
            _step(model)
        assert_close_gradients(found[1], found[0])


def test_weight_is_composed_once_a_forward(monkeypatch):
    model = Stack(None, WeightReader)
    inject(model)
    train_randomly(model)
    composed = []
    original = reference.compose_ref
    monkeypatch.setattr(reference, "compose_ref", lambda *args: composed.append(1) or original(*args))
    model(torch.randn(4, 8)).sum().backward()
    assert len(composed) == 4  # each is read twice; the head, of few tokens, is factored


class Stack(nn.Module):
    """An encoder and a head; each block can be checkpointed. The smallest model with a part that is called alone."""

    def __init__(self, use_reentrant: bool | None, block: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.encoder = Encoder(use_reentrant, block or FeedForward)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class FeedForward(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))


class Encoder(nn.Module):
    def __init__(self, use_reentrant: bool | None, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def _stacks(use_reentrant: bool, block: Callable[[], nn.Module] | None = None) -> tuple[Stack, Stack]:
    """(with checkpointing, without), with the same parameters."""
    plain = Stack(None, block)
    inject(plain)
    train_randomly(plain)
    checkpointed = copy.deepcopy(plain)
    checkpointed.encoder.use_reentrant = use_reentrant
    return checkpointed, plain


def _step(model: nn.Module) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.3 * torch.sin(torch.arange(parameter.numel()) + index)
    model.zero_grad()


def _train_then_use_the_encoder_alone(model: Stack, x: Tensor) -> None:
    model(x).square().mean().backward()
    _step(model)
    model.encoder(x).square().mean().backward()


def _two_forwards_then_backward(model: Stack, x: Tensor) -> None:
    (model(x).square().mean() + model(x.flip(0)).sin().mean()).backward()


def _evaluate_between_forward_and_backward(model: Stack, x: Tensor) -> None:
    loss = model(x).square().mean()
    with torch.no_grad():
        model(x.flip(0))
    loss.backward()


def _encoder_alone_between_forward_and_backward(model: Stack, x: Tensor) -> None:
    loss = model(x).square().mean()
    (loss + model.encoder(x.flip(0)).sin().mean()).backward()


def _checkpoint_the_whole_model(model: Stack, x: Tensor) -> None:
    if model.encoder.use_reentrant is None:
        model(x).square().mean().backward()
    else:
        use_reentrant, model.encoder.use_reentrant = model.encoder.use_reentrant, None
        checkpoint(model, x, use_reentrant=use_reentrant).square().mean().backward()


def _backward_after_the_model_went_to_eval(model: Stack, x: Tensor) -> None:
    loss = model(x).square().mean()
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "use",
    [
        _train_then_use_the_encoder_alone,
        _two_forwards_then_backward,
        _evaluate_between_forward_and_backward,
        _encoder_alone_between_forward_and_backward,
        _backward_after_the_model_went_to_eval,
        _checkpoint_the_whole_model,
    ],
)
def test_checkpointing_with_other_forwards_in_between(use, use_reentrant):
    checkpointed, plain = _stacks(use_reentrant)
    found = []
    for model in (plain, checkpointed):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
        use(model, x)
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None})
        found[-1]["x"] = x.grad
    assert_close_gradients(found[1], found[0])


def test_encoder_alone_uses_the_present_theta():
    model = adapted("whisper").train()
    loss_of(run(model)).backward()
    _step(model)
    features = inputs(model)["input_features"]
    for training in (True, False):
        model.train(training)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.manual_seed(1)
                ours = model.model.encoder(features)[0].detach()
                torch.manual_seed(1)
                expected = plain_twin(model).model.encoder(features)[0].detach()
                assert relative_error(ours, expected) <= 2e-6
                _step(model)
    model.train()
    loss_of(model.model.encoder(features)[0]).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all((grad is not None and bool(grad.any())) == (".encoder." in name) for name, grad in grads.items())


def test_forward_that_raises_leaves_nothing_behind():
    model = adapted("whisper").eval()
    with torch.no_grad():
        expected = plain_twin(model).model.encoder(inputs(model)["input_features"])[0]
    _step(model)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        model.train()(input_features=torch.randn(2, 8, 40), decoder_input_ids=torch.full((2, 6), 999))
    _step(model)
    features = inputs(model)["input_features"]
    ours, now = model.model.encoder(features)[0], plain_twin(model).model.encoder(features)[0]
    assert relative_error(ours.detach(), now.detach()) <= 2e-6
    assert relative_error(now.detach(), expected) > 1e-3


def test_generate_is_the_same_after_merging_and_follows_theta():
    model = adapted("whisper", seed=4).eval()
    features = inputs(model)["input_features"]
    options = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        expected = plain_twin(model).generate(features, **options)
        ours = model.generate(features, **options)
        sk.merge(model)
        merged = model.generate(features, **options)
        sk.unmerge(model)
        again = model.generate(features, **options)
    assert ours.shape[1] > 2
    assert torch.equal(ours, expected) and torch.equal(merged, ours) and torch.equal(again, ours)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.mul_(-3)
    with torch.no_grad():
        assert torch.equal(model.generate(features, **options), plain_twin(model).generate(features, **options))


# -- precision, caching, copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "wavlm"])
def test_autocast_bf16_trains_and_evaluates(name):
    model = adapted(name).train()
    twin = plain_twin(model)
    full = loss_gradients(model.eval())
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model)
        loss = loss_of(output.float())
        plain = run(twin.eval())
    loss.backward()
    grads = gradients(model)
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    exact = run(model).detach()
    bound = 2 * relative_error(plain.detach(), exact)
    assert relative_error(output.detach(), exact) <= bound
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert relative_error(run(model), exact) <= bound
    ours, expected = (torch.cat([grad.flatten() for grad in g.values()]) for g in (grads, full))
    assert torch.cosine_similarity(ours, expected, dim=0) > 0.99


def _fused_step(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    model.train()
    loss_of(run(model)).backward()
    optimizer.step()
    model.eval()


def _fused_step_in_eval(model: nn.Module) -> None:
    """Nobody calls train() or eval(): an optimizer step on gradients that are there already."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.05, fused=True).step()


def _data_write(model: nn.Module) -> None:
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.mul_(-0.5)


def _one_data_write(model: nn.Module) -> None:
    layer = list(sk.ssvd_layers(model).values())[1]
    layer.delta_sigma.data[0] += 5


def _data_replaced(model: nn.Module) -> None:
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data * -0.5


def _parameter_replaced(model: nn.Module) -> None:
    for layer in sk.ssvd_layers(model).values():
        layer.theta = nn.Parameter(layer.theta.detach() * -0.5)


def _state_loaded(model: nn.Module) -> None:
    model.load_state_dict({k: -v if "theta" in k else v for k, v in model.state_dict().items()})


def _state_assigned(model: nn.Module) -> None:
    model.load_state_dict({k: -v if "theta" in k else v for k, v in model.state_dict().items()}, assign=True)


def _numpy_write(model: nn.Module) -> None:
    for layer in sk.ssvd_layers(model).values():
        layer.theta.detach().numpy()[:] *= -0.5


CHANGES = [
    _fused_step, _fused_step_in_eval, _data_write, _one_data_write, _data_replaced, _parameter_replaced, _state_loaded,
    _state_assigned, _numpy_write,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["weight kept", "core kept"])
def test_eval_sees_every_change_of_the_parameters(change, dtype):
    model = adapted("wav2vec2").eval()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        before = run(model)
        assert torch.equal(run(model), before)
    change(model)
    fresh = copy.deepcopy(model)  # copies carry no cache
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        after = run(model)
        assert torch.equal(after, run(fresh))
        assert relative_error(after, before) > 1e-3


def test_two_evals_around_fused_training_steps():
    model = adapted("whisper")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, fused=True)
    for _ in range(3):
        with torch.no_grad():
            ours, expected = run(model.eval()), run(plain_twin(model))
        assert relative_error(ours, expected) <= 2e-6
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(run(model.train())).backward()
            optimizer.step()


def test_deepcopy_of_an_injected_model_trains_on_its_own(monkeypatch):
    model = adapted("wavlm").train()
    run(model).sum().backward()
    model.zero_grad()
    twin = copy.deepcopy(model)
    expected = loss_gradients(model)
    with counted(monkeypatch) as calls:
        assert_close_gradients(loss_gradients(twin), expected, 0.0)
    assert calls["cayley_delta"] == [18]
    _step(twin)
    assert_close_gradients(loss_gradients(model), expected, 0.0)


def test_functional_call_uses_the_parameters_it_is_given():
    model = adapted("wav2vec2").eval()
    other = {name: -p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        run(model)  # cached
        ours = torch.func.functional_call(model, other, kwargs=inputs(model))[0]
        unchanged = run(model)
        model.load_state_dict({**model.state_dict(), **other})
        expected = run(model)
    assert relative_error(ours, expected) <= 1e-6
    assert relative_error(unchanged, expected) > 1e-3


# -- frameworks --------------------------------------------------------------------------------------------------------


def test_nothing_is_a_buffer_and_ddp_sends_only_what_trains():
    model = whisper()
    buffers = {name for name, _ in model.named_buffers()}
    report = inject(model, targets="whisper")
    assert {name for name, _ in model.named_buffers()} == buffers
    sent = [p for p in model.parameters() if p.requires_grad]  # what DDP's reducer takes; it broadcasts all buffers
    assert sum(p.numel() for p in sent) == report.trainable
    model(**inputs(model))
    train_randomly(model)
    with torch.no_grad():
        run(model.eval())  # caches
    assert {name for name, _ in model.named_buffers()} == buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["auto", "composed", "factored"])
@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_nothing_weight_sized_is_kept_for_the_backward(mode, dtype, side):
    """At most T min(k, d_in) numbers of activations a layer, and k x k matrices; never d_out x d_in."""
    tokens, d_in, d_out, k = 96, 160, 128, 12
    layer = sk.SSVDLinear.from_linear(nn.Linear(d_in, d_out, dtype=dtype), sk.SSVDConfig(rank=k, side=side))
    train_randomly(layer)
    layer.mode = mode
    x = torch.randn(tokens, d_in, dtype=dtype, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in [*layer.parameters(), x]}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert saved, "the hook saw nothing"
    activations = tokens * k * dtype.itemsize
    cores = 4 * k * k
    assert max(saved.values()) <= max(activations, cores)
    assert sum(saved.values()) <= activations + 12 * cores
    y.sum().backward()
    assert layer.theta.grad.abs().max() > 0


def test_whole_model_keeps_little_more_than_the_frozen_one():
    model = adapted("wav2vec2").eval()
    base = copy.deepcopy(model)
    sk.remove(base)

    def kept(network: nn.Module, leaf: bool) -> int:
        known = {p.untyped_storage().data_ptr() for p in network.parameters() if p.numel()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        values = torch.randn(2, 2000, requires_grad=leaf)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = network(values)[0]
        assert output.requires_grad
        return sum(saved.values())

    base.requires_grad_(False)
    tokens, layers = 2 * 199, len(sk.ssvd_layers(model))
    allowed = layers * (tokens * RANK * 4 + 12 * 4 * RANK * RANK)
    assert kept(model, leaf=True) <= kept(base, leaf=True) + allowed


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph(backend):
    torch._dynamo.reset()
    model = Stack(None)
    inject(model)
    train_randomly(model)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(4, 8)
    for _ in range(2):
        for network in (compiled, twin):
            network.train()(x).square().mean().backward()
        ours, expected = gradients(model), gradients(twin)
        assert_close_gradients(ours, expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(x), twin.eval()(x), rtol=1e-5, atol=1e-6)
        _step(model)
        _step(twin)
        with torch.no_grad():  # the parameters changed under a compiled eval
            torch.testing.assert_close(compiled(x), twin(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["auto", "composed", "factored"])
def test_compile_one_layer_with_changing_batch(mode):
    torch._dynamo.reset()
    layer = train_randomly(sk.SSVDLinear.from_linear(nn.Linear(12, 10), sk.SSVDConfig(rank=4, side="both")))
    layer.mode = mode
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (3, 7, 11):
        x = torch.randn(tokens, 12)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)


def test_weight_never_falls_back_to_the_base_weight_in_silence(monkeypatch):
    """`weight` is a property of an nn.Module, whose __getattr__ finds the base weight if the property fails."""
    layer = train_randomly(sk.SSVDLinear.from_linear(nn.Linear(6, 5), sk.SSVDConfig(rank=3)))

    def broken(*args, **kwargs):
        raise AttributeError("a name that this version of torch does not have")

    monkeypatch.setattr(layers_module.reference, "compose_ref", broken)
    with pytest.raises((AttributeError, RuntimeError)):
        _ = layer.weight


# -- published sizes ---------------------------------------------------------------------------------------------------

PUBLISHED = [  # (layers, k) -> millions of trainable parameters, as printed in arXiv 2509.02830, Table IV
    (128, 384, 153, 1.51), (128, 384, 239, 3.67), (128, 384, 320, 6.57),
    (380, 1024, 227, 9.83), (380, 1024, 256, 12.50), (380, 1024, 292, 16.26), (380, 1024, 341, 22.16),
    (380, 1024, 409, 31.86), (258, 2048, 341, 15.04), (258, 2048, 409, 21.63), (258, 2048, 512, 33.88),
]  # fmt: skip


@pytest.mark.parametrize(("count", "d", "k", "millions"), PUBLISHED)
def test_trainable_parameters_equal_the_published_ones(count, d, k, millions):
    config = sk.SSVDConfig(rank=k)
    assert config.resolve_ranks(4 * d, d) == config.resolve_ranks(d, d) == (k, None)
    per_layer = theta_length(k, "cayley") + k
    assert theta_length(k, "linear") == theta_length(k, "cayley")
    assert theta_length(k, "free") + k == k * k + k
    assert abs(count * per_layer / 1e6 - millions) <= 0.00501


def test_trainable_parameters_of_real_layers_equal_the_published_ones():
    net = nn.Sequential(nn.Linear(384, 384), nn.Linear(384, 1536), nn.Linear(1536, 384))
    report = inject(net, rank=153)
    assert report.trainable == 3 * 153 * 154 // 2 == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert round(128 * report.trainable / 3 / 1e6, 2) == 1.51
    assert sk.SSVDConfig(ratio=0.4).resolve_ranks(384, 1536)[0] == 153
