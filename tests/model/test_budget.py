"""Numbers of trained parameters: the papers' tables, and what real layers, ours and PEFT's, are made of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ssvd_kernels as sk
from ssvd_kernels.model import budget

SHAPES = [(6, 9), (9, 6), (8, 8)]  # wide, tall, square


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# -- the papers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "d", "published"),
    [
        (128, 384, {153: "1.51", 239: "3.67", 320: "6.57"}),  # OWSM-0.1B
        (380, 1024, {227: "9.83", 256: "12.50", 292: "16.26", 341: "22.16", 409: "31.86"}),  # OWSM-1B
        (258, 2048, {341: "15.04", 409: "21.63", 512: "33.88"}),  # OWLS-2B
    ],
    ids=["OWSM-0.1B", "OWSM-1B", "OWLS-2B"],
)
def test_ssvd_numbers_of_the_paper(layers, d, published):
    """arXiv 2509.02830, table IV, in millions; and the planner finds the paper's k from a budget."""
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(*((d, 4 * d), (4 * d, d), (d, d))[i % 3], bias=False) for i in range(layers))
    for k, millions in published.items():
        each = budget.trainable("ssvd", (d, 4 * d), k)
        assert each == k * (k + 1) // 2 and f"{layers * each / 1e6:.2f}" == millions
        assert each == budget.trainable("ssvd", (d, d), k, rotation="linear")
        assert budget.trainable("ssvd", (d, d), k, rotation="free") == k**2 + k
        assert sk.SSVDConfig(rank=k).resolve_ranks(4 * d, d) == (k, None)
        if k != min(published):
            continue  # planning is slow
        plan = sk.plan(model, budget=layers * each)
        assert {layer.rank for layer in plan.layers} == {k} and plan.trainable == layers * each
        assert {layer.rank for layer in sk.plan(model, budget=layers * each - 1).layers} == {k - 1}
    assert sk.SSVDConfig(ratio=0.4).resolve_ranks(384, 1536) == (153, None)


def test_spectralft_numbers_of_the_paper():
    """arXiv 2501.03829: q_proj and k_proj of WavLM-large's 24 layers, p = 256, rank 16."""
    each = budget.trainable("spectralft", (1024, 1024), 16, top=256)
    assert each == 40_960 and f"{48 * each / 1e6:.2f}" == "1.97"


@pytest.mark.parametrize(("n", "band"), [(1, 0), (5, 0), (5, 1), (6, 3), (6, 5), (1024, 8)])
def test_svft_numbers_are_the_entries_of_a_banded_matrix(n, band):
    """arXiv 2405.19597: n q + (n - q)(q + 1)."""
    expected = int(torch.ones(n, n).triu(-band).tril(band).sum())
    assert budget.trainable("svft", (n, n + 3), band) == expected


# -- the package's own layers ------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(d_in, d_out) for d_out, d_in in SHAPES))


def check_injected(plan: sk.RankPlan) -> None:
    model = net()
    assert sk.inject(model, plan, progress=False).trainable == trained(model) == plan.trainable
    for layer in plan.layers:
        assert trained(model.get_submodule(layer.name)) == layer.trainable


@pytest.mark.parametrize("share", [0.1, 0.4, 0.99])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *(("ssvd", {"side": s, "rotation": r}) for s in ("input", "smaller") for r in ("cayley", "linear", "free")),
        *(("ssvd-o", {"inner_share": s, "rotation": r}) for s in (0, 0.3, 0.5, 1) for r in ("cayley", "free")),
    ],
    ids=str,
)
def test_injected_layers_have_the_numbers_planned(method, options, share):
    most = trained(net())
    plan = sk.plan(net(), budget=int(share * most), method=method, **options)
    check_injected(plan)
    for layer in plan.layers:
        counted = budget.trainable(method, layer.shape, layer.rank, layer.rank_out, rotation=options["rotation"])
        assert counted == layer.trainable


@pytest.mark.parametrize(
    ("share", "options"),
    [(0.2, {}), (0.9, {}), (0.5, {"method": "spectralft", "top": 2}), (0.99, {"method": "spectralft", "top": 256})],
)
def test_injected_layers_of_other_methods_have_the_numbers_planned(share, options):
    check_injected(sk.plan(net(), budget=share, **{"method": "svft", **options}))


# -- PEFT's layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.17, 0.45])
@pytest.mark.parametrize("method", budget.PEFT_METHODS)
def test_peft_layers_have_the_numbers_planned(method, share):
    peft = pytest.importorskip("peft")
    import speech_models

    model = speech_models.whisper()
    plan = sk.plan(model, budget=share, method=method, targets="whisper", exclude=r".*encoder\.layers\.0\.fc1")
    adapted = peft.get_peft_model(copy.deepcopy(model), plan.peft_config(model))
    assert trained(adapted) == plan.trainable <= plan.budget
    tuned = [name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "base_layer")]
    assert tuned == [layer.name for layer in plan.layers] and "model.encoder.layers.0.fc1" not in tuned
    call = r"peft\.get_peft_model\(model, plan\.peft_config\(model\)\)"
    with pytest.raises(ValueError, match=rf"method='{method}'.*{call}"):
        sk.inject(model, plan)


def test_a_peft_config_means_the_planned_layers_alone():
    """The name "0" is also how that of "1.0" ends; further arguments are precomputed on, planned ones are refused."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    plan = sk.plan(model, budget=16, method="lora", exclude=r"1\.0")
    config = plan.peft_config(model, lora_alpha=4)
    assert config.lora_alpha == 4 and config.r == 2
    for planned in ({"r": 3}, {"target_modules": ["0"]}):
        with pytest.raises(TypeError, match=next(iter(planned))):
            plan.peft_config(model, **planned)
    assert trained(peft.get_peft_model(model, config)) == plan.trainable == 16


@pytest.mark.parametrize(("method", "largest"), [("lora", 8), ("dora", 8), ("vera", 16), ("pissa", 4), ("psoft", 4)])
def test_highest_ranks_of_peft_methods(method, largest):
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    plan = sk.plan(model, budget=10**6, method=method)
    assert plan.largest and {layer.rank for layer in plan.layers} == {largest}


def test_oft_blocks_divide_every_layer():
    model = nn.Sequential(nn.Linear(18, 12), nn.Linear(12, 4))
    assert [sk.plan(model, budget=b, method="oft").layers[0].rank for b in (15, 30, 74, 75)] == [2, 3, 3, 6]
    with pytest.raises(ValueError, match=r"method='oft'.*divides every d_in"):
        sk.plan(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4)), budget=100, method="oft")


def test_ssvd_o_without_an_outer_rank_is_counted_as_it_is_configured():
    layer = sk.SSVDLinear.from_linear(nn.Linear(9, 7), sk.SSVDConfig(rank=4, side="both"))
    assert budget.trainable("ssvd-o", (7, 9), 4) == trained(layer) == 6 + 6 + 4


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (("ssvd", (4, 6), 5), {}, r"`rank` must be between 1 and 4 for method='ssvd' and shape \(4, 6\), got 5"),
        (("ssvd", (4, 6), 0), {}, r"`rank` must be between 1 and 4 .*got 0"),
        (("ssvd", (4, 6), 2, 2), {}, r"`rank_out` must be None for method='ssvd', got 2"),
        (("ssvd-o", (4, 6), 2, 5), {}, r"`rank_out` must be between 1 and 4 .*got 5"),
        (("svft", (4, 6), 4), {}, r"`rank` must be between 0 and 3 .*got 4"),
        (("spectralft", (4, 6), 3), {"top": 2}, r"`rank` must be between 1 and 2 .*got 3"),
        (("lora", (4, 6), -1), {}, r"`rank` must be >= 1 .*got -1"),
        (("ssvd", (4, 6), 2), {"rotation": "banded"}, r"`rotation` must be one of .*got 'banded'"),
    ],
)  # fmt: skip
def test_counts_of_what_there_is_not_are_refused(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        budget.trainable(*arguments, **options)


@pytest.mark.parametrize("function", [lambda: budget.trainable("nonsense", (4, 4), 1), lambda: budget.ranks("x", [])])
def test_unknown_methods(function):
    with pytest.raises(ValueError, match=r"`method` must be one of 'ssvd', 'ssvd-o'.*'psoft', got "):
        function()
