"""Every method through one set of tests: the formula, its derivatives, and that what was trained comes back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_within
from cases import relative_error
from gain import GAIN, output_gain, train
from models import Encoder, assert_all_within, assert_right, passes, references
from plain import effective
from roundtrip import Net, assert_computes, assert_equal_state, assert_same_outputs, example, flipped, loaded, outputs
from safetensors.torch import load_file
from several import train_randomly
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

import ssvd_kernels as sk
from ssvd_kernels.adapters.file_format import read_adapter
from ssvd_kernels.basis import batch
from ssvd_kernels.basis.factorize import SKETCH_ROWS, Factorization
from ssvd_kernels.layers.adapt import adapt
from ssvd_kernels.layers.base import AdaptedLinear
from ssvd_kernels.ops import kernels as triton_backend

F64 = torch.float64
SHAPES = {"tall": (16, 10), "wide": (10, 15), "square": (11, 11)}  # d_out, d_in


# -- the methods; their formulas are in plain.py -----------------------------------------------------------------------


class Method(NamedTuple):
    config: sk.SSVDConfig | sk.SpectralFTConfig
    count: Callable[[int, int], int]  # trained numbers, of d_out and d_in


def _ssvd(rotation: str, side: str) -> Method:
    extra = {"rank_out": 3} if side == "both" else {}

    def numbers(k: int) -> int:
        return k * k if rotation == "free" else k * (k - 1) // 2

    count = 5 + numbers(5) + (numbers(3) if extra else 0)
    return Method(sk.SSVDConfig(rank=5, rotation=rotation, side=side, **extra), lambda *_: count)


def _svft(q: int) -> Method:
    def count(*shape: int) -> int:
        n = min(shape)
        return n * q + (n - q) * (q + 1)

    return Method(sk.SSVDConfig(ratio=1.0, rotation="banded", band=q), count)


ROTATIONS, SIDES = ("cayley", "linear", "free"), ("input", "output", "smaller", "both")
METHODS = {f"{rotation}, {side}": _ssvd(rotation, side) for rotation in ROTATIONS for side in SIDES}
METHODS |= {f"SVFT, band {q}": _svft(q) for q in (0, 2, 8)}
METHODS["SpectralFT"] = Method(sk.SpectralFTConfig(top=6, rank=2), lambda d_out, d_in: 2 * (d_out + d_in + 2 * 6))
WITH_CORE = [name for name, method in METHODS.items() if isinstance(method.config, sk.SSVDConfig)]
WITH_MODE = [*((name, "factored") for name in METHODS), *((name, "composed") for name in WITH_CORE)]


def layer_of(name: str, shape: str = "tall", dtype: torch.dtype = F64, trained: bool = True) -> AdaptedLinear:
    d_out, d_in = SHAPES[shape]
    layer = adapt(nn.Linear(d_in, d_out, dtype=dtype), METHODS[name].config)
    if trained:
        train_randomly(nn.Sequential(layer))
    return layer


# -- one layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_identity_at_first_then_the_formula_and_as_many_numbers_as_the_paper_says(name, shape):
    layer = layer_of(name, shape, torch.float32, trained=False)
    x = torch.randn(3, layer.in_features)
    base = F.linear(x, layer.base_weight, layer.bias)
    for mode in ("auto", "factored", "composed") if name in WITH_CORE else ("auto", "factored"):
        layer.mode = mode
        assert torch.equal(layer(x), base)
    assert torch.equal(layer.weight, layer.base_weight)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == METHODS[name].count(*SHAPES[shape])
    trained_layer = layer_of(name, shape, torch.float32)
    assert_within(trained_layer.weight.detach(), *effective(trained_layer.base_weight, trained_layer))
    exact = layer_of(name, shape)
    # in float64, where nothing tells the error: three products of at most 16 terms
    formula = effective(exact.base_weight, exact)[1]
    assert relative_error(exact.weight.detach(), formula) <= 3 * 16 * torch.finfo(F64).eps
    assert relative_error(exact.weight.detach(), exact.base_weight) > 1e-3


@pytest.mark.parametrize(("name", "mode"), WITH_MODE)
def test_gradcheck(name, mode):
    layer = layer_of(name)
    layer.mode = mode
    names = list(layer.adapter())
    x = torch.randn(2, layer.in_features, dtype=F64, requires_grad=True)
    leaves = [p.detach().clone().requires_grad_() for p in layer.adapter().values()]
    assert gradcheck(lambda x, *values: functional_call(layer, dict(zip(names, values)), (x,)), (x, *leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "mode"), WITH_MODE)
def test_output_and_gradients_against_float64(name, mode, shape, dtype):
    layer = layer_of(name, shape, dtype)
    layer.mode = mode
    assert_right(layer)


@pytest.mark.parametrize("kappa", [1e-4, 1e-2])
@pytest.mark.parametrize("name", METHODS)
def test_a_bf16_update_arrives_at_the_output(name, kappa):
    linear = nn.Linear(64, 96, dtype=torch.bfloat16)
    layer = adapt(copy.deepcopy(linear), METHODS[name].config)
    before = [factor.detach().double() for factor in layer.update_factors()]
    train(layer, kappa)
    U, V, core = (factor.detach().double() for factor in layer.update_factors())
    assert abs(output_gain(layer, linear, U @ core @ V.mT - before[0] @ before[2] @ before[1].mT, kappa) - 1) <= GAIN


@pytest.mark.skipif(
    (why := triton_backend.unavailable_reason(torch.device("cpu"), torch.float32)) is not None, reason=str(why)
)
@pytest.mark.parametrize("name", WITH_CORE)
def test_the_fused_kernels(name):
    layer = layer_of(name, "wide", torch.float32)
    layer.mode = "factored"
    with sk.use_backend("triton"):
        assert_right(layer)


# -- a model -----------------------------------------------------------------------------------------------------------


def adapted(name: str, base: nn.Module, seed: int = 1) -> nn.Module:
    net = copy.deepcopy(base)
    sk.inject(net, METHODS[name].config, progress=False)
    train_randomly(net, seed)
    return net


@pytest.mark.parametrize("name", METHODS)
def test_merging_removing_and_checking(name):
    base = Net(12, 16, 10)
    net = adapted(name, base)
    trained, inferred = outputs(net)
    assert_computes((trained, inferred), net)
    assert relative_error(trained, outputs(base)[0]) > 1e-3
    layers = list(sk.adapted_layers(net))
    assert sk.check_training(net, net(torch.randn(4, 12)).square().sum()).ok == layers
    sk.merge(net.eval())
    merged = net(example(net))
    sk.unmerge(net)
    assert_computes([merged], net)
    assert all(map(torch.equal, outputs(net), (trained, inferred)))
    sk.remove(net)
    assert_equal_state(net, base.state_dict())


@pytest.mark.parametrize("by", [pytest.param("base", marks=pytest.mark.slow), "added"])
@pytest.mark.parametrize("name", METHODS)
def test_adapters_come_back_where_singular_vectors_have_other_signs(tmp_path, monkeypatch, name, by):
    base = Net(12, 16, 10)
    net = adapted(name, base)
    sk.save_adapter(net, tmp_path / "a")
    monkeypatch.setattr(batch, "factorize", flipped)
    fresh = copy.deepcopy(base)
    if by != "base":
        sk.inject(fresh, METHODS[name].config, progress=False)
    if by == "added":
        before = outputs(fresh)
        sk.add_adapter(fresh, "b", tmp_path / "a")
        assert all(map(torch.equal, outputs(fresh), before))
        sk.set_adapter(fresh, "b")
    else:
        sk.load_adapter(fresh, tmp_path / "a", progress=False)
    pairs = zip(sk.adapted_layers(fresh).values(), sk.adapted_layers(net).values(), strict=True)
    if by == "added":
        assert all(bool(((a.V * b.V).sum(0) < 0).any()) for a, b in pairs)
    assert_computes(outputs(fresh), net)
    monkeypatch.undo()
    sk.save_adapter(fresh, tmp_path / "again", save_bases=True)
    assert_same_outputs(loaded(base, tmp_path / "again"), fresh)


@pytest.mark.parametrize("name", METHODS)
def test_several_adapters(name):
    base = Net(12, 16, 10)
    net = adapted(name, base)
    first = outputs(net)
    sk.add_adapter(net, "b")
    sk.set_adapter(net, "b")
    assert_same_outputs(net, base)
    assert sk.check_training(net, net(torch.randn(4, 12)).square().sum()).ok == list(sk.adapted_layers(net))
    train_randomly(net, 5)
    with sk.disable_adapter(net):
        assert_same_outputs(net, base)
    state, second = copy.deepcopy(net.state_dict()), outputs(net)
    sk.set_adapter(net, "default")
    assert all(map(torch.equal, outputs(net), first))
    sk.set_adapter(net, "b")
    net.load_state_dict(state)
    assert all(map(torch.equal, outputs(net), second))


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("name", METHODS)
def test_to_lora(tmp_path, name, rank):
    net = adapted(name, Net(12, 16, 10))
    report = sk.to_lora(net, tmp_path / "lora", rank, progress=False)
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for layer_name, layer in sk.adapted_layers(net).items():
        update = effective(layer.base_weight, layer)[1] - layer.base_weight.to(F64)
        A, B = (weights[f"base_model.model.{layer_name}.lora_{part}.weight"].to(F64) for part in "AB")
        S = torch.linalg.svdvals(update)
        best = 0.0 if rank is None else float(S[rank:].norm() / S.norm())
        for error in (relative_error(B @ A, update), report.errors[layer_name]):
            assert abs(error - best) <= torch.finfo(torch.float32).eps  # of two factors, each rounded to float32
        # SpectralFT's update has twice the rank of its factors
        exact = 2 * layer.rank if isinstance(layer, sk.SpectralFTLinear) else layer.k
        assert report.ranks[layer_name] == (rank or exact)


# -- what the files say ------------------------------------------------------------------------------------------------


def test_files_of_ssvd_are_as_they_always_were_and_others_cannot_be_taken_for_them(tmp_path):
    known = {"k", "k_out", "side", "rotation", "shape", "fingerprint"}  # what readers of format 1 ask for
    for name, method in METHODS.items():
        net = adapted(name, Net(12, 16, 10))
        sk.save_adapter(net, tmp_path / "a")
        for layer in read_adapter(tmp_path / "a").layers.values():
            if name == "SpectralFT":
                assert not known <= set(layer) and layer["method"] == name
            elif "SVFT" in name:
                assert layer["rotation"] == "banded" and layer["band"] == method.config.band
            else:
                assert set(layer) == known and layer["rotation"] in ROTATIONS


@pytest.mark.parametrize(
    ("saved", "present"),
    [("cayley, input", "SpectralFT"), ("SpectralFT", "cayley, input"), ("SVFT, band 2", "SVFT, band 8")],
)
def test_adapters_of_another_method_are_refused(tmp_path, saved, present):
    base = Net(12, 16, 10)
    sk.save_adapter(adapted(saved, base), tmp_path / "a")
    net = adapted(present, base)
    before = outputs(net)
    for load in (sk.load_adapter, lambda net, path: sk.add_adapter(net, "b", path)):
        with pytest.raises(sk.AdapterError, match=r"was saved for first as .* but the model has"):
            load(net, tmp_path / "a")
    assert all(map(torch.equal, outputs(net), before)) and sk.adapter_names(net) == ["default"]


# -- SpectralFT alone --------------------------------------------------------------------------------------------------


def test_the_papers_count():
    """q_proj and k_proj of WavLM-large: 1.97 M in its 24 layers."""
    basis = map(torch.zeros, ((1024, 256), 256, (1024, 256)))
    zeros = Factorization(*basis, "", 0.0, torch.zeros(2 * SKETCH_ROWS, 256))
    layer = sk.SpectralFTLinear(nn.Linear(1024, 1024), sk.SpectralFTConfig(), zeros)
    assert sum(p.numel() for p in layer.adapter().values()) == 40_960 == 1_966_080 // (2 * 24)


def test_a_new_adapter_is_random_in_a_and_zero_in_b_and_a_loaded_one_is_the_files(tmp_path):
    base = Net(12, 16, 10)
    net = copy.deepcopy(base)
    sk.inject(net, sk.SpectralFTConfig(top=6, rank=4), progress=False)
    sk.add_adapter(net, "b")
    for layer in sk.adapted_layers(net).values():
        for name in ("default", "b"):
            values = layer.adapter(name)
            assert not values["B_out"].any() and not values["B_in"].any()
            for A in (values["A_out"], values["A_in"]):
                assert 0.25 < A.abs().max() <= 0.5  # 1/sqrt(rank)
        assert not torch.equal(layer.adapter("b")["A_in"], layer.adapter("default")["A_in"])
    sk.save_adapter(net, tmp_path / "a")
    for seed in (3, 4):
        fresh = copy.deepcopy(base)
        torch.manual_seed(seed)
        sk.load_adapter(fresh, tmp_path / "a", progress=False)
        for name, layer in sk.adapted_layers(fresh).items():
            mine = sk.adapted_layers(net)[name].adapter()
            assert all(torch.equal(value, mine[key]) for key, value in layer.adapter().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_eval_keeps_follows_the_parameters(dtype):
    """P and Q get memory that others had: their addresses alone do not tell them apart."""
    layer = layer_of("SpectralFT", dtype=dtype).eval()
    x = torch.randn(5, layer.in_features).to(dtype)
    for seed in range(6):
        train_randomly(nn.Sequential(layer), seed)
        plain, exact = references(nn.Sequential(layer), lambda network: network(x).detach())
        with torch.no_grad():
            assert_within(layer(x), plain, exact)
            assert torch.equal(layer(x), layer(x)) and layer.cache.holds(layer)


def test_compiled_checkpointed_and_under_autocast():
    layer = layer_of("SpectralFT", dtype=torch.float32)
    assert_right(layer, lambda net: torch.compile(net, fullgraph=True, backend="aot_eager"))
    assert_right(layer, lambda net: Encoder({"use_reentrant": False}, lambda: net, 1))
    net, x, dy = nn.Sequential(layer), torch.randn(7, layer.in_features), torch.randn(7, layer.out_features)
    _, exact = references(net, lambda network: passes(network, x, dy))
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = passes(net, x, dy), references(net, lambda network: passes(network, x, dy))[0]
    assert ours["y"].dtype == torch.bfloat16
    assert_all_within(ours, plain, exact)


def test_what_spectralft_has_not_is_refused():
    net = adapted("SpectralFT", Net(12, 16, 10))
    sk.add_adapter(net, "b")
    with pytest.raises(ValueError, match=r"first is adapted by SpectralFT, whose update is a product"):
        sk.average_adapters(net, {"default": 1, "b": 1}, into="c")
    assert sk.adapter_names(net) == ["default", "b"]
    layer = layer_of("SpectralFT")
    layer.mode = "composed"
    with pytest.raises(ValueError, match=r"`mode` must be 'auto' or 'factored' for a SpectralFT layer, got 'composed'"):
        layer(torch.randn(2, layer.in_features, dtype=F64))
    with pytest.raises(TypeError, match=r"`config` of SSVDLinear must be of type SSVDConfig, got SpectralFTConfig"):
        sk.SSVDLinear.from_linear(nn.Linear(8, 8), METHODS["SpectralFT"].config)
    match = "`config` of SpectralFTLinear must be of type SpectralFTConfig, got SSVDConfig"
    with pytest.raises(TypeError, match=match):
        sk.SpectralFTLinear.from_linear(nn.Linear(8, 8), METHODS["cayley, input"].config)


def test_a_method_that_lacks_a_part_cannot_be_used():
    class Half(AdaptedLinear):
        config_type = sk.SSVDConfig
        trained_names = ("theta",)

    with pytest.raises(TypeError, match=r"abstract method.*update_factors"):
        Half(nn.Linear(4, 4), sk.SSVDConfig(rank=2))
