"""PEFT over bases that bitsandbytes and torchao quantised, by transformers: the way that its Trainer allows."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from bounds import DRAWS, assert_within, twice_of_draws
from cases import relative_error
from gain import GAIN, output_gain, train
from models import RANK, assert_all_within, assert_equal_gradients, loss_of, references, train_randomly
from peft_models import base_model, config, gradients, in_new_process, inputs, layers, loss_gradients, peft
from peft_models import run as run_with_gradients
from plain import core, effective
from quantized_models import KINDS, quantized
from refusals import refused
from test_peft_saving import LOADERS
from test_peft_training import losses, trainer
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.basis.linears import base_weight, is_quantized
from ssvd_kernels.integrations.peft_quantized import SSVDPeftQuantizedLinear

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
run = torch.no_grad()(run_with_gradients)
kinds = pytest.mark.parametrize("kind", KINDS)
Load = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("llama", "whisper", "wavlm")}
    for name, folder in made.items():
        base_model(name).save_pretrained(folder)
    return made


@pytest.fixture
def load(folders, kind) -> Load:
    """Loads and quantises a model anew: load(), load("whisper"), load(dtype=...)."""
    return lambda name="llama", **options: quantized(kind, folders[name], **options)


def adapted(base: nn.Module, **options) -> nn.Module:
    return train_randomly(peft.get_peft_model(base, config(**options))).eval()


def to_compare_with(base: nn.Module, kind: str, training: bool = False) -> nn.Module:
    """In training mode, where bitsandbytes would repack 4-bit weights in an eval forward."""
    return base.train(training or kind == "nf4")


def repacking(base: nn.Module) -> nn.Module:
    """As if on a CPU where it does."""
    for module in base.modules():
        module.support_avx512bf16_for_cpu = True
    return base


# -- what is computed --------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_before_training_the_output_is_the_quantised_models(load, kind, name, dtype):
    model = peft.get_peft_model(load(name, dtype=dtype), config())
    assert len(layers(model)) == (14 if name == "llama" else 32)
    assert all(type(layer) is SSVDPeftQuantizedLinear for layer in layers(model).values())
    for training in (True, False):
        base = to_compare_with(load(name, dtype=dtype), kind, training)
        model.train(training)
        assert torch.equal(run_with_gradients(model), run_with_gradients(base))
        assert torch.equal(run(model), run(base))


@kinds
@pytest.mark.parametrize("kappa", [1e-4, 1e-3, 1e-2, 1e-1])
def test_a_bf16_update_of_two_active_adapters_arrives_at_the_output(load, kind, kappa):
    model = peft.get_peft_model(load(dtype=torch.bfloat16), config(target_modules=["up_proj"]))
    model.add_adapter("b", config(rank=3, side="output", target_modules=["up_proj"]))
    model.base_model.set_adapter(["default", "b"])
    layer, update = next(iter(layers(model).values())), 0
    for seed, adapter in enumerate(layer.running):
        train(adapter, kappa, seed)
        U, V, core = (factor.detach().double() for factor in adapter.update_factors())
        update = update + U @ core @ V.mT
    assert abs(output_gain(layer, layer.base_layer, update, kappa) - 1) <= GAIN


def in_plain_pytorch(layer: nn.Module, x: Tensor, dy: Tensor, base: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """y, dx and the adapters' gradients; the (y, dx) of the base layer are taken as its library makes them."""
    x, wide = x.detach().to(dtype).requires_grad_(), torch.promote_types(dtype, torch.float32)
    values = [{k: p.detach().to(wide).requires_grad_() for k, p in a.adapter().items()} for a in layer.running]
    added = torch.zeros((), dtype=dtype)
    for adapter, own in zip(layer.running, values):
        V, M, U = (factor.to(dtype) for factor in (adapter.V, core(adapter, own), adapter.U))
        added = added + x @ V @ M.mT @ U.mT
    dx, *rest = torch.autograd.grad(added, [x, *(p for own in values for p in own.values())], dy.to(dtype))
    return [base[0].to(dtype) + added.detach(), base[1].to(dtype) + dx, *rest]


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_of_two_active_adapters_against_float64(load, dtype):
    model = adapted(load(dtype=dtype), target_modules=["up_proj"])
    model.add_adapter("b", config(rank=3, side="output", target_modules=["up_proj"]))
    model.base_model.set_adapter(["default", "b"])
    layer = next(iter(layers(train_randomly(model).train()).values()))
    names, trained = zip(*((name, p) for name, p in layer.named_parameters() if p.requires_grad))
    assert len(trained) == 4

    def of_one_draw() -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        x, dy = torch.randn(5, 16).to(dtype).requires_grad_(), torch.randn(5, 24).to(dtype)
        y, base_y = layer(x), layer.base_layer(x)
        ours, base = torch.autograd.grad(y, [x, *trained], dy), [base_y, *torch.autograd.grad(base_y, x, dy)]
        # it is the dequantised weight that was factorised; 8-bit products round x by 1/254 of its largest
        assert relative_error(base_y.detach(), x.detach().double() @ base_weight(layer.base_layer).double().mT) <= 0.01
        base = [tensor.detach() for tensor in base]
        plain, exact = (in_plain_pytorch(layer, x, dy, base, of) for of in (dtype, torch.float64))
        return [y.detach(), *ours], list(zip(plain, exact, strict=True))

    found = [of_one_draw() for _ in range(DRAWS)]
    for index, name in enumerate(["y", "dx", *names]):  # of 3 to 10 numbers each but for y and dx
        bound = twice_of_draws(pairs[index] for _, pairs in found)
        for ours, pairs in found:
            assert ours[index].dtype == (dtype if index < 2 else torch.float32)
            assert relative_error(ours[index], pairs[index][1]) <= bound, name


@pytest.mark.parametrize("kind", KINDS[:2])  # transformers cannot quantise a WavLM by torchao
def test_modules_that_read_the_weight_train(load):
    """WavLM's attention reads its projections' weights; quantised, they are no weights until they are adapted."""
    model = adapted(load("wavlm")).train()
    loss_of(run_with_gradients(model)).backward()
    assert all(grad.abs().max() > 0 for grad in gradients(model).values())
    layer = next(iter(layers(model).values()))
    W = base_weight(layer.base_layer)
    for weight in (layer.weight, W + layer.get_delta_weight("default")):
        assert_within(weight.detach(), *effective(W, *layer.running))
    with model.disable_adapter():
        assert torch.equal(layer.weight, W)


def assert_equal_within_rounding(ours: dict[str, Tensor], theirs: dict[str, Tensor], model: nn.Module) -> None:
    """Of two ways to the gradients of a `model`, whose base products no plain layer makes: bitsandbytes rounds x."""
    plain, exact = references(model, loss_gradients)
    assert_all_within({name: exact[name] + (grad - theirs[name]) for name, grad in ours.items()}, plain, exact)


@kinds
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(load, use_reentrant):
    model = adapted(load()).train()
    twin, expected = copy.deepcopy(model), loss_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found = loss_gradients(model)
    if use_reentrant:  # its backward is one of each block, and sums in another order
        assert_equal_within_rounding(found, expected, twin)
    else:
        assert_equal_gradients(found, expected)


@pytest.mark.slow
@kinds
def test_training_compiles_to_one_graph(load):
    torch._dynamo.reset()
    model = adapted(load()).train()
    twin, expected = copy.deepcopy(model), loss_gradients(model)
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    loss_of(compiled(**inputs(model), use_cache=False)[0]).backward()
    assert_equal_within_rounding(gradients(model), expected, twin)


@kinds
def test_evaluating_cuts_no_gradient_off_that_passes_layers_without_an_adapter(load):
    model = adapted(repacking(load()), target_modules=["q_proj"]).train()
    found = []
    for _ in range(2):
        found.append(loss_gradients(model.train()))
        run(model.eval())
    assert_equal_gradients(*found)


@kinds
def test_parameters_are_as_narrow_as_asked(load):
    for narrow in (True, False):
        model = peft.get_peft_model(load(dtype=torch.bfloat16), config(), autocast_adapter_dtype=not narrow)
        # bitsandbytes dequantises 8-bit weights to float32
        layer = next(iter(layers(model).values()))
        expected = base_weight(layer.base_layer).dtype if narrow else torch.float32
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("through", ["peft", "transformers"])
def test_trainer_trains_and_saves(load, tmp_path, through):
    base = peft.prepare_model_for_kbit_training(load(dtype=torch.bfloat16))
    model = peft.get_peft_model(base, config(side="both")) if through == "peft" else base
    if through == "transformers":
        model.add_adapter(config(side="both"))
    before = {name: base_weight(layer.base_layer).clone() for name, layer in layers(model).items()}
    training = trainer(tmp_path, model, bf16=False)
    training.train()
    assert losses(training)[-1] < 0.8 * losses(training)[0]
    for name, layer in layers(model).items():
        assert torch.equal(base_weight(layer.base_layer), before[name])
    assert not (tmp_path / "checkpoint-12" / "model.safetensors").exists()
    again = peft.prepare_model_for_kbit_training(load(dtype=torch.bfloat16))
    final = peft.PeftModel.from_pretrained(again, str(tmp_path / "checkpoint-12"))
    assert torch.equal(run(final), run(training.model.eval()))


# -- adapters on disk --------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("load_adapter", LOADERS)
def test_an_adapter_comes_back(load, tmp_path, load_adapter):
    model = adapted(load("whisper"), side="both")
    model.save_pretrained(str(tmp_path))
    assert torch.equal(run(load_adapter(load("whisper"), tmp_path)), run(model))


CHECK = """
import torch
from pathlib import Path
from bounds import assert_within
from peft_models import peft, run
from quantized_models import quantized
torch.set_num_threads(2)
folder = {folder!r}
model = peft.PeftModel.from_pretrained(quantized({kind!r}, Path({base!r})), folder)
expected, plain, exact = torch.load(folder + "/expected.pt")
# of a difference, for bitsandbytes' 8-bit products round x
assert_within(exact + (run(model).detach() - expected), plain, exact)
"""


@pytest.mark.slow
@kinds
def test_an_adapter_comes_back_in_a_new_process_with_more_threads(load, kind, folders, tmp_path):
    model = adapted(load())
    model.save_pretrained(str(tmp_path))
    torch.save((run(model), *references(model, run)), tmp_path / "expected.pt")
    in_new_process(CHECK.format(folder=str(tmp_path), kind=kind, base=str(folders["llama"])))


@kinds
@pytest.mark.parametrize("load_adapter", LOADERS)
def test_adapters_of_the_full_precision_base_and_of_the_quantised_one_are_not_mixed_up(load, tmp_path, load_adapter):
    for trained, other in ((load, partial(base_model, "llama")), (partial(base_model, "llama"), load)):
        adapted(trained()).save_pretrained(str(tmp_path))
        with pytest.raises(sk.AdapterError, match=r"another base model.*quantised, both must be quantised in the same"):
            load_adapter(other(), tmp_path)


@kinds
def test_switching_disabling_and_deleting(load, kind, tmp_path):
    inner, base = repacking(load()), run(to_compare_with(load(), kind))
    model = adapted(inner)
    model.save_pretrained(str(tmp_path))
    model.add_adapter("b", config(rank=3, side="output"))
    assert not any(module.training for module in model.modules() if isinstance(module, sk.SSVDLinear))
    model.set_adapter("b")
    outputs = {"b": run(train_randomly(model, 2).eval())}
    model.set_adapter("default")
    outputs["default"] = run(model)
    assert relative_error(outputs["b"], outputs["default"]) > 1e-3
    with model.disable_adapter():
        assert torch.equal(run(model), base)
    for name in outputs:
        model.set_adapter(name)
        assert torch.equal(run(model), outputs[name])
    assert torch.equal(run(copy.deepcopy(model)), outputs["default"])
    for name in ("default", "b"):
        model.delete_adapter(name)
    assert torch.equal(run(inner.eval()), base)  # PEFT's own forward wants an adapter
    model.load_adapter(str(tmp_path), "again")
    model.set_adapter("again")
    assert torch.equal(run(model.eval()), outputs["default"])


# -- merging -----------------------------------------------------------------------------------------------------------


@kinds
def test_merging_is_refused_with_nothing_changed(load):
    """Also in plain layers that come before, which could be merged."""
    base = load()
    base.model.layers[0].self_attn.q_proj = nn.Linear(16, 16)
    model = adapted(base)
    assert {type(layer).__name__ for layer in layers(model).values()} == {"SSVDPeftLinear", "SSVDPeftQuantizedLinear"}
    y = run(model)
    with pytest.raises(ValueError, match=r"cannot merge .*k_proj in place: its base .* quantised.*merge_and_unload"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers(model).values()) and torch.equal(run(model), y)
    model.unmerge_adapter()
    assert torch.equal(run(model), y)


@kinds
@pytest.mark.parametrize("prepared", [False, True])
def test_merge_and_unload_leaves_a_plain_model(load, tmp_path, prepared):
    """In the dtype of the rest of the model, which can be saved and loaded."""
    base = load(dtype=torch.bfloat16)
    model = adapted(peft.prepare_model_for_kbit_training(base) if prepared else base).eval()
    dtype = model.get_base_model().dtype
    expected = {n: effective(m.base_weight, *m.running, dtype=dtype) for n, m in layers(model).items()}
    output = references(model, run)
    merged = model.merge_and_unload()
    assert not any(map(is_quantized, merged.modules())) and not layers(merged)
    for name, weight in expected.items():
        linear = merged.get_submodule(name.removeprefix("base_model.model."))
        assert type(linear) is nn.Linear and linear.weight.dtype == dtype and not linear.training
        assert_within(linear.weight, *weight, name)
    z = run(merged)
    assert_within(z, *output)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(run(loaded), z)


@kinds
def test_merge_and_unload_in_float32_is_exact(load):
    model = adapted(load("whisper"), side="both")
    y, output = run(model), references(model, run)
    merged = run(model.merge_and_unload())
    assert_within(merged, *output)
    assert relative_error(merged, y) <= 0.02  # 8-bit products, as above


@kinds
def test_merge_and_unload_warns_where_quantised_layers_are_left(load, caplog):
    with caplog.at_level(logging.WARNING):
        merged = adapted(load(), target_modules=["q_proj"]).merge_and_unload()
    assert "12 layers are still quantised, e.g. model.layers.0.self_attn.k_proj" in caplog.text
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear and merged.is_quantized


@pytest.mark.parametrize("kind", KINDS[:1])
def test_conversion_to_lora_is_exact_at_full_rank(load, tmp_path):
    model = adapted(load(), target_modules=["q_proj", "down_proj"])
    peft.save_as_lora(tmp_path, model, rank=RANK)
    lora = peft.PeftModel.from_pretrained(load().train(), tmp_path)
    assert_within(run(lora.train()), *references(model, run))


@kinds
def test_unload_gives_the_quantised_model_back(load):
    base = load()
    modules, y = list(base.named_modules()), run(load().train())
    unloaded = adapted(base).unload()
    assert list(unloaded.named_modules()) == modules and not any(module.training for _, module in modules)
    assert torch.equal(run(unloaded.train()), y)


@kinds
def test_a_refused_injection_changes_nothing(load):
    model = load()
    nn.init.constant_(model.lm_head.weight, float("nan"))
    with refused(model, ValueError, r"`lm_head\.weight` must be finite, got NaN"):
        peft.get_peft_model(model, config(target_modules=["q_proj", "lm_head"]))


@kinds
def test_this_package_s_own_calls_and_peft_s_exclude_each_other(load):
    model = adapted(load())
    for call in (sk.merge, partial(sk.merge, unload=True), sk.remove):
        with pytest.raises(ValueError, match="adapted through PEFT"):
            call(model)
    model = load()
    sk.inject(model, sk.SSVDConfig(rank=3), progress=False)
    with pytest.raises(TypeError, match=r"q_proj\.base' belongs to an SSVD layer created by inject"):
        peft.get_peft_model(model, config(target_modules="all-linear"))
