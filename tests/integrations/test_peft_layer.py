"""PEFT: what adapted models compute; merging; several adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from bounds import assert_within, unit_roundoff
from cases import relative_error
from gain import GAIN, output_gain, train
from models import RANK, Stack, assert_all_within, counted, inject, loss_of, redrawn, references, train_randomly
from peft_models import MODELS, adapted, base_model, config, gradients, inputs, layers, loss_gradients, peft, run
from plain import effective
from speech_models import assert_bit_identical, require_input_gradients
from torch import Tensor, nn

import ssvd_kernels as sk

OTHER = {"b": {"rank": 3, "side": "output", "rotation": "free"}, "c": {"rank": 4, "rank_out": 2, "side": "both"}}


def several() -> nn.Module:
    """A Whisper with the trained adapters "default", "b" and "c" of different ranks, sides and rotations."""
    model = adapted()
    for seed, (name, options) in enumerate(OTHER.items()):
        model.add_adapter(name, config(**options))
        model.set_adapter(name)
        train_randomly(model, seed + 2)
    model.set_adapter("default")
    return model.eval()


# -- the forward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_bit_identical_before_training(name, side):
    base = base_model(name)
    assert_bit_identical(peft.get_peft_model(copy.deepcopy(base), config(side=side)), base)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"side": "output"},
        {"side": "both", "rank_out": 3},
        {"rotation": "free"},
        {"form": "activation"},
        {"form": "activation", "side": "both"},
    ],
)
@pytest.mark.parametrize("name", ["whisper", "wavlm", "llama"])
def test_outputs_and_gradients_are_those_of_this_package_s_own_injection(name, options):
    model = adapted(name, **options).train()
    twin, tensors = base_model(name).train(), peft.get_peft_model_state_dict(model)
    inject(twin, targets="all-linear" if name == "llama" else name, **options)
    for path, layer in sk.ssvd_layers(twin).items():
        for key, parameter in layer.adapter().items():
            parameter.data.copy_(tensors[f"base_model.model.{path}.ssvd_adapter.{key}"])
    assert torch.equal(run(model), run(twin))
    ours, expected = (list(loss_gradients(network).values()) for network in (model, twin))
    assert ours and all(map(torch.equal, ours, expected)) and len(ours) == len(expected)
    assert all(grad.abs().max() > 0 for grad in ours)


@pytest.mark.parametrize("names", [["default"], ["default", "b"]], ids=len)
@pytest.mark.parametrize("kappa", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("form", ["weight", "activation"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32 autocast"])
def test_a_bf16_update_arrives_at_the_output(dtype, kappa, form, names):
    base = nn.Linear(64, 96, dtype=dtype)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config(rank=26, form=form, target_modules=["0"]))
    model.add_adapter("b", config(rank=20, form=form, side="output", target_modules=["0"]))
    model.base_model.set_adapter(names)
    layer, update = model.base_model.model[0], torch.zeros(96, 64, dtype=torch.float64)
    for seed, adapter in enumerate(layer.running):
        train(adapter, kappa, seed)
        U, V, core = (factor.detach().double() for factor in adapter.update_factors())
        update += U @ core @ V.mT
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        found = output_gain(model, base, update, kappa)
    assert len(layer.running) == len(names) and abs(found - 1) <= GAIN


def test_wavlm_reads_the_weight_and_its_gradients_reach_theta():
    """Its attention never calls the projections: without a differentiable `weight` they would not train."""
    model = adapted("wavlm").train()
    projections = [m for path, m in layers(model).items() if path.endswith(("q_proj", "k_proj", "v_proj"))]
    called = []
    for module in projections:
        module.register_forward_hook(lambda module, *args: called.append(module))
    loss_of(run(model)).backward()
    assert not called and len(projections) == 9
    for adapter in (module.ssvd_adapter["default"] for module in projections):
        assert adapter.theta.grad.abs().max() > 0 and adapter.delta_sigma.grad.abs().max() > 0


def test_one_batched_rotation_for_the_running_adapters_only(monkeypatch):
    model = several().train()
    with counted(monkeypatch) as calls:
        loss_of(run(model)).backward()
    assert calls == {"cayley_delta": [32], "cayley_delta_backward": [32]}
    with counted(monkeypatch) as calls, model.disable_adapter():
        run(model)
    assert calls["cayley_delta"] == []


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant):
    model = adapted(name).train()
    require_input_gradients(model)
    plain, exact = references(model, loss_gradients)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_all_within(loss_gradients(model), plain, exact, redrawn(model, loss_gradients))


@pytest.mark.slow
def test_compile_fullgraph():
    torch._dynamo.reset()
    model = train_randomly(peft.get_peft_model(Stack(), config()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(64, 8)

    def trained(network: nn.Module) -> dict[str, Tensor]:
        network.train()(x).square().mean().backward()
        return gradients(network)

    plain, exact = references(model, trained)
    compiled.train()(x).square().mean().backward()
    assert_all_within(gradients(model), plain, exact)
    with torch.no_grad():
        assert_within(compiled.eval()(x), *references(model, lambda network: network.eval()(x)))


def test_generation_acts_on_every_step():
    model = adapted()
    kept = {"max_new_tokens": 6, "num_beams": 1, "do_sample": False}
    features = inputs(model)["input_features"]
    found = model.generate(input_features=features, **kept)
    assert torch.equal(found, model.merge_and_unload().generate(input_features=features, **kept))
    assert not torch.equal(found, base_model().generate(input_features=features, **kept))


def test_half_precision_base_keeps_float32_parameters_and_basis():
    model = train_randomly(peft.get_peft_model(base_model().bfloat16(), config())).eval()
    wide = copy.deepcopy(model).float()
    adapter = next(iter(layers(model).values())).ssvd_adapter["default"]
    assert {p.dtype for p in adapter.parameters()} == {torch.float32} and adapter.U.dtype == torch.float32
    with model.disable_adapter(), wide.disable_adapter():
        rounding = relative_error(run(model), run(wide))
    assert 0 < relative_error(run(model), run(wide)) <= 2 * rounding
    loss_of(run(model.train()).float()).backward()
    assert all(grad.dtype == torch.float32 and grad.abs().max() > 0 for grad in gradients(model).values())


def test_parameters_are_as_narrow_as_asked():
    model = peft.get_peft_model(base_model().bfloat16(), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    model = adapted()
    adapter = next(iter(layers(model).values())).ssvd_adapter["default"]
    U = adapter.U.clone()
    model.to(torch.bfloat16)
    assert adapter.theta.dtype == torch.bfloat16 and torch.equal(adapter.U, U)
    assert model.to(torch.float64) and adapter.U.dtype == torch.float64


# -- merging -----------------------------------------------------------------------------------------------------------


def test_the_base_is_not_handed_out_for_writing_while_disabled():
    model = adapted()
    with model.disable_adapter(), torch.no_grad():
        for layer in layers(model).values():
            assert torch.equal(layer.weight, layer.base_weight)
            layer.weight.zero_()
        assert torch.equal(run(model), run(base_model()))


def test_merge_and_unmerge_are_exact():
    model, base = several(), base_model()
    expected, output = run(model), references(model, run)
    assert_within(expected, *output)
    weights = {path: layer.base_layer.weight for path, layer in layers(model).items()}
    values = {path: weight.detach().clone() for path, weight in weights.items()}
    model.merge_adapter()
    assert_within(run(model), *output)
    for path, layer in layers(model).items():
        assert_within(layer.weight, *effective(values[path], layer.ssvd_adapter["default"]), path)
    model.unmerge_adapter()
    for path, layer in layers(model).items():
        assert layer.base_layer.weight is weights[path] and torch.equal(weights[path], values[path])
    assert torch.equal(run(model), expected)
    with model.disable_adapter():
        assert torch.equal(run(model), run(base))


def test_adapters_merged_one_after_the_other_add_up_and_unmerge_exactly():
    model = several()
    layer = next(iter(layers(model).values()))
    W = layer.base_layer.weight.detach().clone()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging c"):
        model.merge_adapter(["c"])
    assert_within(layer.weight, *effective(W, layer.ssvd_adapter["default"], layer.ssvd_adapter["c"]))
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("c")
    with model.disable_adapter():
        run(model)  # unmerges
    assert torch.equal(layer.base_layer.weight, W) and not layer.merged


def test_adapter_added_while_another_is_merged_is_of_the_base_weight():
    model = adapted()
    model.merge_adapter()
    layer = next(iter(layers(model).values()))
    layer.update_layer("late", config(rank=3).ssvd())
    model.unmerge_adapter()
    assert layer.ssvd_adapter["late"].basis.fingerprint == layer.ssvd_adapter["default"].basis.fingerprint
    # both are float64 results, each rounded once
    late, first = (layer.ssvd_adapter[name].V[:, :3].abs() for name in ("late", "default"))
    assert relative_error(late, first) <= 2 * unit_roundoff(torch.float32)


def test_unloading_leaves_a_plain_model():
    model, base = adapted(), base_model()
    assert torch.equal(run(copy.deepcopy(model).unload()), run(base))
    output = references(model, run)
    merged = model.merge_and_unload()
    assert_within(run(merged), *output)
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert list(merged.state_dict()) == list(base.state_dict())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in merged.modules())


@pytest.mark.parametrize("safe", [True, False])
def test_merge_refuses_what_is_not_finite(safe):
    model = adapted()
    path, layer = next(iter(layers(model).items()))
    W = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.ssvd_adapter["default"].theta[0] = float("nan")
    with pytest.raises(ValueError, match=f"merging {path.removeprefix('base_model.model.')} would produce NaN"):
        model.merge_adapter(safe_merge=safe)
    assert torch.equal(layer.base_layer.weight, W) and not layer.merged


# -- several adapters --------------------------------------------------------------------------------------------------


def test_switching_disabling_and_deleting():
    model = several()
    outputs = {}
    for name in ("default", "b", "c"):
        model.set_adapter(name)
        outputs[name] = run(model)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all(f".ssvd_adapter.{name}." in n for n in trained)
    assert len({float(output.sum()) for output in outputs.values()}) == 3
    with model.disable_adapter():
        assert torch.equal(run(model), run(base_model()))
    assert torch.equal(run(model), outputs["c"])
    with pytest.warns(UserWarning, match="c was active which is now deleted"):
        model.delete_adapter("c")
    assert not any(".c." in name for name, _ in model.named_modules())
    for name in ("b", "default"):
        model.set_adapter(name)
        assert torch.equal(run(model), outputs[name])


def test_active_adapters_add_up_and_all_train():
    model = several()
    model.base_model.set_adapter(["default", "c"])
    for path, layer in layers(model).items():
        assert_within(layer.weight.detach(), *effective(layer.base_weight, *layer.running), path)
    output = references(model, run)
    assert_within(run(model).detach(), *output)
    # float64 has nothing more exact to be measured by: 1000 times its roundoff, the sums of some hundred layers
    assert relative_error(run(copy.deepcopy(model).double()).detach(), output[1]) <= 1e-13
    loss_of(run(model.train())).backward()
    assert all(grad.abs().max() > 0 for grad in gradients(model).values())
    model.merge_adapter()
    assert_within(run(model.eval()), *output)


def test_adapters_of_one_rank_share_a_basis_also_after_a_move():
    model = adapted()
    model.add_adapter("b", config(side="output"))
    for network in (model, copy.deepcopy(model), model.to(torch.float64)):
        for layer in layers(network).values():
            first, second = layer.ssvd_adapter["default"], layer.ssvd_adapter["b"]
            assert first.U is second.U and first.V is second.V and first.theta is not second.theta


def test_idle_adapters_keep_no_composed_weight():
    model = several()
    adapter = next(iter(layers(model).values())).ssvd_adapter["default"]
    with torch.no_grad():
        run(model)
        assert adapter.cache.holds(adapter)
        model.set_adapter("b")
        assert not adapter.cache.holds(adapter)


@pytest.mark.parametrize("options", [{}, {"side": "both", "rank_out": 3}])
def test_conversion_to_lora_is_exact_at_full_rank(options, tmp_path):
    model = adapted("llama", target_modules=["q_proj", "down_proj"], **options)
    assert model.supports_lora_conversion()
    peft.save_as_lora(tmp_path, model, rank=RANK)
    lora = peft.PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert peft.PeftModel.get_model_status(lora).peft_types == {"default": "LORA"}
    assert_within(run(lora), *references(model, run))
