"""Bad configurations, models that cannot be adapted or merged: errors name argument and value, and nothing changes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from models import train_randomly
from refusals import Net, inject, refused
from torch import Tensor, nn

import ssvd_kernels as sk


@pytest.fixture
def net() -> Net:
    return Net()


# -- configuration -----------------------------------------------------------------------------------------------------


def rows(error: type[Exception], name: str, what: str, *values: object, **options: object) -> list[tuple]:
    """(options, error, match) for each value of the argument `name`: what it must be, and the value that it got."""
    return [({**options, name: v}, error, rf"`{name}` must be {what}, got {re.escape(repr(v))}") for v in values]


BANDED = {"rotation": "banded", "band": 2}
COUNT, SHARE, MODULES = "an integer >= 1", r"a number in \(0, 1\]", "a string or a list of module-name suffixes"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        *rows(ValueError, "rank", COUNT, 0, -3),
        *rows(TypeError, "rank", COUNT, 2.0, True, "8"),
        *rows(ValueError, "ratio", SHARE, 0.0, 0, -0.4, 1.01, float("nan"), float("inf")),
        *rows(TypeError, "ratio", SHARE, "0.4"),
        ({}, ValueError, r"exactly one of `rank` and `ratio`.*rank=None.*ratio=None"),
        ({"rank": 4, "ratio": 0.4}, ValueError, r"exactly one of `rank` and `ratio`.*rank=4.*ratio=0\.4"),
        *rows(ValueError, "side", "one of 'input', 'output', 'smaller', 'both'", "left", None, rank=4),
        *rows(ValueError, "rotation", "one of 'cayley', 'linear', 'free', 'banded'", "expm", ["cayley"], rank=4),
        ({"rank": 4, "rank_out": 2}, ValueError, r"rank_out.*side='both'.*side='input'"),
        ({"rank": 4, "ratio_out": 0.5, "side": "output"}, ValueError, r"ratio_out.*side='both'.*side='output'"),
        *rows(ValueError, "rank_out", COUNT, 0, rank=4, side="both"),
        *rows(ValueError, "ratio_out", SHARE, 2.0, rank=4, side="both"),
        ({"rank": 4, "side": "both", "rank_out": 2, "ratio_out": 0.5}, ValueError, r"rank_out=2.*ratio_out=0\.5"),
        ({"rank": 4, "band": 2}, ValueError, r"`band` requires rotation='banded', got 2 for 'cayley'"),
        *rows(TypeError, "band", "an integer >= 0 for rotation='banded'", None, 1.0, rank=4, rotation="banded"),
        *rows(ValueError, "band", "an integer >= 0 for rotation='banded'", -1, rank=4, rotation="banded"),
        ({"rank": 4, **BANDED, "side": "smaller"}, ValueError, r"`side` must.*got 'smaller'.*neither side"),
        ({"rank": 4, "targets": []}, ValueError, r"`targets` must not be empty.*got \(\)"),
        ({"rank": 4, "targets": ""}, ValueError, r"`targets` must not be empty.*got ''"),
        *rows(TypeError, "targets", MODULES, None, ["up", 3], rank=4),
        *rows(TypeError, "exclude", MODULES, 7, rank=4),
    ],
    ids=str,
)
def test_config_refuses(options, error, match):
    with pytest.raises(error, match=match):
        sk.SSVDConfig(**options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        *rows(ValueError, "top", COUNT, 0),
        *rows(TypeError, "top", COUNT, 2.0),
        *rows(TypeError, "rank", COUNT, None),
        ({"top": 4, "rank": 5}, ValueError, r"`rank` must be an integer between 1 and `top`, got rank=5, top=4"),
        ({"targets": []}, ValueError, r"`targets` must not be empty.*got \(\)"),
        *rows(TypeError, "exclude", MODULES, 7),
    ],
    ids=str,
)
def test_spectralft_config_refuses(options, error, match):
    with pytest.raises(error, match=match):
        sk.SpectralFTConfig(**options)


@pytest.mark.parametrize(
    "config", [sk.SSVDConfig(ratio=1.0, **BANDED, targets=["up"]), sk.SpectralFTConfig(exclude=["up"])]
)
def test_configurations_survive_json(config):
    assert type(config)(**json.loads(json.dumps(config.to_dict()))) == config


# -- inject ------------------------------------------------------------------------------------------------------------

UNTIED = "`targets` must match an untied linear layer of Net, got "
NONE = r"which matches none of the \d targeted layers"
NO_LINEAR = r"\(named in `targets`\) must be an nn\.Linear .*got"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank": 7}, ValueError, r"up: `rank` must be between 1 and 6 .*\(9, 6\), got 7"),
        ({"side": "both", "rank_out": 7}, ValueError, r"up: `rank_out` must be between 1 and 6 .*\(9, 6\), got 7"),
        ({"rank": None, "ratio": 0.1}, ValueError, r"up: `ratio` must be at least 0\.16.*\(9, 6\), got 0\.1.*rank 0"),
        ({"rotation": "banded", "band": 3}, ValueError, r"up: `band` must be between 0 and 2 for k=3.*\(9, 6\), got 3"),
        ({"targets": "wisper"}, ValueError, r"`targets` must.*'all-linear'.*'whisper'.*'wavlm'.*got 'wisper'"),
        ({"targets": ["q_proj"]}, ValueError, r"`targets` contains 'q_proj', which matches no module of Net"),
        ({"targets": ["up", "q_proj"]}, ValueError, r"'q_proj'.*matches no module of Net"),
        ({"targets": "whisper"}, ValueError, rf"{UNTIED}'whisper'.*up, down"),
        ({"targets": r".*\.q_proj"}, ValueError, rf"{UNTIED}.*q_proj.*up, down"),
        ({"targets": "("}, ValueError, r"'\(' is not a valid regular expression"),
        ({"exclude": "["}, ValueError, r"'\[' is not a valid regular expression"),
        ({"exclude": ["upper"]}, ValueError, rf"`exclude` must be a list.*got 'upper' in \['upper'\], {NONE}"),
        ({"exclude": "u"}, ValueError, rf"`exclude` must be .*got 'u', {NONE}, e\.g\. 'up'"),
        ({"exclude": ["up", "down"]}, ValueError, rf"{UNTIED}.*exclude=\['up', 'down'\]"),
        ({"targets": ["conv"], "form": "weight"}, TypeError, r"conv is a Conv1d: `form` must be 'activation' or"),
        ({"targets": ["up", "embed"]}, TypeError, rf"`embed` {NO_LINEAR} Embedding"),
        ({"targets": ["head"]}, ValueError, r"'head'.*tied.*'embed\.weight'"),
    ],
    ids=str,
)
def test_inject_refuses(net, options, error, match):
    with refused(net, error, match):
        inject(net, **options)


def test_inject_refuses_other_configurations(net):
    for config in (None, 0.4, {"rank": 3}):
        with refused(net, TypeError, "`config` must be an SSVDConfig.* or a RankPlan, got "):
            sk.inject(net, config)
    with refused(net, ValueError, r"up: `top` must be between 1 and 6 for a weight of shape \(9, 6\), got 256"):
        sk.inject(net, sk.SpectralFTConfig())


def test_inject_refuses_a_second_time(net):
    inject(net)
    with refused(net, ValueError, r"model has 2 SSVD layers already.*'up'.*remove\(\)"):
        inject(net)
    with refused(net, ValueError, r"model has 2 SSVD layers already"):
        inject(net, targets=["down"], rank=1, side="output")
    outer = nn.Sequential(net, nn.Linear(6, 6))
    with refused(outer, ValueError, r"model has 2 SSVD layers already.*'0\.up'"):
        inject(outer)


@pytest.mark.parametrize(("library", "name"), [("hqq.core.quantize", "HQQ"), ("awq.modules.linear.gemm", "AutoAWQ")])
def test_layers_of_other_quantisation_libraries_are_refused_by_name(net, library, name):
    kind = type("QuantLinear", (nn.Module,), {"__module__": library})
    net.up = kind()
    for options in ({}, {"targets": ["up"]}):
        with refused(net, TypeError, rf"`up` is a QuantLinear of {name}, whose weights .* leave it out \(`exclude`\)"):
            inject(net, **options)
    assert inject(net, exclude=["up"]).modules == ["down"]


def test_inject_refuses_a_lone_linear_layer():
    linear = nn.Linear(4, 4)
    with refused(linear, ValueError, r"itself a linear layer.*from_linear"):
        inject(linear)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inject_refuses_weights_that_are_not_finite(net, value):
    with torch.no_grad():
        net.down.weight[2, 3] = value
    with refused(net, ValueError, r"`down\.weight` must be finite, got NaN or infinity"):
        inject(net)
    with refused(net.down, ValueError, r"`weight` must be finite, got NaN or infinity"):
        sk.SSVDLinear.from_linear(net.down, sk.SSVDConfig(rank=2))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.complex64])
def test_inject_refuses_weights_that_are_not_floating(net, dtype):
    net.down.weight = nn.Parameter(torch.ones(6, 9, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError, match=rf"`down\.weight` must have a floating-point dtype, got {dtype}"):
        inject(net)
    assert type(net.up) is nn.Linear and type(net.down) is nn.Linear and net.up.weight.requires_grad


def test_inject_refuses_meta_weights():
    with torch.device("meta"):
        net = Net()
    with refused(net, ValueError, r"up\.weight.*meta.*load the weights"):
        inject(net)
    with refused(net.up, ValueError, r"weight.*meta.*load the weights"):
        sk.SSVDLinear.from_linear(net.up, sk.SSVDConfig(rank=2))


class _Custom(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("module", [nn.Conv1d(3, 3, 3), nn.Identity(), nn.Bilinear(2, 2, 2), _Custom(3, 3), None, 3])
def test_from_linear_refuses_other_modules(module):
    with pytest.raises(TypeError, match=rf"`linear` must be an nn\.Linear .*got {type(module).__name__}"):
        sk.SSVDLinear.from_linear(module, sk.SSVDConfig(rank=2))


def test_from_linear_refuses_a_rank_that_does_not_fit():
    linear = nn.Linear(6, 9)
    with refused(linear, ValueError, r"`rank` must be between 1 and 6 .*\(9, 6\), got 7"):
        sk.SSVDLinear.from_linear(linear, sk.SSVDConfig(rank=7))
    layer = sk.SSVDLinear.from_linear(linear, sk.SSVDConfig(rank=2))
    with pytest.raises(TypeError, match=r"`linear` must be an nn\.Linear .*got SSVDLinear"):
        sk.SSVDLinear.from_linear(layer, sk.SSVDConfig(rank=2))


def test_nothing_to_merge_save_or_remove(net, tmp_path):
    for action in (sk.merge, sk.unmerge, sk.remove, lambda model: sk.save_adapter(model, tmp_path / "a")):
        with refused(net, ValueError, r"`model` \(Net\) has no SSVD layer.*inject"):
            action(net)
    assert not list(tmp_path.iterdir())


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value"), [*(("float32", value) for value in (float("nan"), float("inf"), 1e38)), ("float16", 1e6)]
)
@pytest.mark.parametrize("unload", [False, True])
def test_merge_that_would_produce_nan_raises(net, dtype, value, unload):
    inject(net.to(getattr(torch, dtype)))
    train_randomly(net)
    with torch.no_grad():
        net.down.delta_sigma[:] = value
        net.down.U.mul_(1e3) if value == 1e38 else None
    with refused(net, ValueError, rf"merging down.*NaN or infinity.*{dtype}.*nothing was changed"):
        sk.merge(net, unload=unload)
    assert not net.up.merged and not net.down.merged


def test_training_a_merged_layer_raises(net):
    inject(net)
    sk.merge(net)
    with refused(net, RuntimeError, r"merged.*unmerge\(\)"):
        net.train()(torch.zeros(2, 6))


# -- state dicts -------------------------------------------------------------------------------------------------------


def test_state_dict_that_would_be_silently_wrong(net):
    """Base weights loaded after inject would leave the old singular vectors in place."""
    base = Net()
    inject(net)
    state = base.state_dict()
    with refused(net, RuntimeError, r"up.*weight differs.*load base weights before inject"):
        net.load_state_dict({key: value for key, value in state.items() if key.startswith("up")}, strict=False)
    sk.merge(net)
    with refused(net, RuntimeError, r"up is merged: unmerge"):
        net.load_state_dict(net.state_dict())
