"""Bad configurations, models that cannot be adapted or merged: an error that names argument, value and what is
allowed, and changes nothing."""

from __future__ import annotations

import json

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


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank": 0}, ValueError, r"rank=0.*allowed.*>= 1"),
        ({"rank": -3}, ValueError, r"rank=-3.*allowed.*>= 1"),
        ({"rank": 2.0}, TypeError, r"rank=2\.0.*whole number"),
        ({"rank": True}, TypeError, r"rank=True.*whole number"),
        ({"rank": "8"}, TypeError, r"rank='8'.*whole number"),
        ({"ratio": 0.0}, ValueError, r"ratio=0\.0.*\(0, 1\]"),
        ({"ratio": 0}, ValueError, r"ratio=0.*\(0, 1\]"),
        ({"ratio": -0.4}, ValueError, r"ratio=-0\.4.*\(0, 1\]"),
        ({"ratio": 1.01}, ValueError, r"ratio=1\.01.*\(0, 1\]"),
        ({"ratio": float("nan")}, ValueError, r"ratio=nan.*\(0, 1\]"),
        ({"ratio": float("inf")}, ValueError, r"ratio=inf.*\(0, 1\]"),
        ({"ratio": "0.4"}, TypeError, r"ratio='0\.4'.*\(0, 1\]"),
        ({}, ValueError, r"exactly one of rank and ratio.*rank=None.*ratio=None"),
        ({"rank": 4, "ratio": 0.4}, ValueError, r"exactly one of rank and ratio.*rank=4.*ratio=0\.4"),
        ({"rank": 4, "side": "left"}, ValueError, r"side='left'.*'input', 'output', 'smaller', 'both'"),
        ({"rank": 4, "side": None}, ValueError, r"side=None.*'input', 'output', 'smaller', 'both'"),
        ({"rank": 4, "rotation": "expm"}, ValueError, r"rotation='expm'.*'cayley', 'linear', 'free'"),
        ({"rank": 4, "rotation": ["cayley"]}, ValueError, r"rotation=\['cayley'\].*'cayley', 'linear', 'free'"),
        ({"rank": 4, "rank_out": 2}, ValueError, r"rank_out.*side='both'.*side='input'"),
        ({"rank": 4, "ratio_out": 0.5, "side": "output"}, ValueError, r"ratio_out.*side='both'.*side='output'"),
        ({"rank": 4, "side": "both", "rank_out": 0}, ValueError, r"rank_out=0.*>= 1"),
        ({"rank": 4, "side": "both", "ratio_out": 2.0}, ValueError, r"ratio_out=2\.0.*\(0, 1\]"),
        ({"rank": 4, "side": "both", "rank_out": 2, "ratio_out": 0.5}, ValueError, r"rank_out=2.*ratio_out=0\.5"),
        ({"rank": 4, "band": 2}, ValueError, r"band=2 needs rotation='banded'.*rotation='cayley'"),
        ({"rank": 4, "rotation": "banded"}, TypeError, r"band=None.*'banded' needs a whole number >= 0"),
        ({"rank": 4, "rotation": "banded", "band": 1.0}, TypeError, r"band=1\.0.*whole number >= 0"),
        ({"rank": 4, "rotation": "banded", "band": -1}, ValueError, r"band=-1: allowed is a whole number >= 0"),
        ({"rank": 4, "rotation": "banded", "band": 2, "side": "smaller"}, ValueError, r"side='smaller'.*neither side"),
        ({"rank": 4, "targets": []}, ValueError, r"targets=.*empty"),
        ({"rank": 4, "targets": ""}, ValueError, r"targets=''.*empty"),
        ({"rank": 4, "targets": None}, TypeError, r"targets=None.*allowed"),
        ({"rank": 4, "targets": ["up", 3]}, TypeError, r"targets=\['up', 3\].*allowed"),
        ({"rank": 4, "exclude": 7}, TypeError, r"exclude=7.*allowed"),
    ],
    ids=str,
)
def test_config_refuses(options, error, match):
    with pytest.raises(error, match=match):
        sk.SSVDConfig(**options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"top": 0}, ValueError, r"top=0: allowed is a whole number >= 1"),
        ({"top": 2.0}, TypeError, r"top=2\.0: allowed is a whole number >= 1"),
        ({"rank": None}, TypeError, r"rank=None: allowed is a whole number >= 1"),
        ({"top": 4, "rank": 5}, ValueError, r"rank=5 exceeds top=4.*from 1 to top"),
        ({"targets": []}, ValueError, r"targets=.*empty"),
        ({"exclude": 7}, TypeError, r"exclude=7.*allowed"),
    ],
    ids=str,
)
def test_spectralft_config_refuses(options, error, match):
    with pytest.raises(error, match=match):
        sk.SpectralFTConfig(**options)


@pytest.mark.parametrize(
    "config", [sk.SSVDConfig(ratio=1.0, rotation="banded", band=2, targets=["up"]), sk.SpectralFTConfig(exclude=["up"])]
)
def test_configurations_survive_json(config):
    assert type(config)(**json.loads(json.dumps(config.to_dict()))) == config


# -- inject ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank": 7}, ValueError, r"up: rank=7.*\(9, 6\).*allowed is 1 to 6"),
        ({"side": "both", "rank_out": 7}, ValueError, r"up: rank_out=7.*\(9, 6\).*allowed is 1 to 6"),
        ({"rank": None, "ratio": 0.1}, ValueError, r"up: ratio=0\.1 gives rank 0.*\(9, 6\).*allowed is at least 0\.16"),
        ({"rotation": "banded", "band": 3}, ValueError, r"up: band=3 does not fit k=3.*\(9, 6\).*allowed is 0 to 2"),
        ({"targets": "wisper"}, ValueError, r"targets='wisper'.*'all-linear'.*'whisper'.*'wavlm'"),
        ({"targets": ["q_proj"]}, ValueError, r"targets.*'q_proj'.*matches no module of Net"),
        ({"targets": ["up", "q_proj"]}, ValueError, r"'q_proj'.*matches no module of Net"),
        ({"targets": "whisper"}, ValueError, r"targets='whisper'.*no untied linear layer of Net.*up, down"),
        ({"targets": r".*\.q_proj"}, ValueError, r"targets=.*q_proj.*no untied linear layer of Net.*up, down"),
        ({"targets": "("}, ValueError, r"'\('.*not a regular expression"),
        ({"exclude": "["}, ValueError, r"'\['.*not a regular expression"),
        (
            {"exclude": ["upper"]},
            ValueError,
            r"exclude=\['upper'\] holds 'upper', which matches none of the \d targeted",
        ),
        ({"exclude": "u"}, ValueError, r"exclude='u' matches none of the \d targeted layers, e\.g\. 'up': allowed is"),
        ({"exclude": ["up", "down"]}, ValueError, r"exclude=\['up', 'down'\].*no untied linear layer of Net"),
        ({"targets": ["conv"]}, TypeError, r"'conv'.*Conv1d.*allowed is torch\.nn\.Linear"),
        ({"targets": ["up", "embed"]}, TypeError, r"'embed'.*Embedding.*allowed is torch\.nn\.Linear"),
        ({"targets": ["head"]}, ValueError, r"'head'.*tied.*'embed\.weight'"),
    ],
    ids=str,
)
def test_inject_refuses(net, options, error, match):
    with refused(net, error, match):
        inject(net, **options)


def test_inject_refuses_what_is_no_config(net):
    for config in (None, 0.4, {"rank": 3}):
        with refused(net, TypeError, "config=.*allowed is an SSVDConfig.* or a RankPlan"):
            sk.inject(net, config)


def test_inject_refuses_more_singular_vectors_than_there_are(net):
    with refused(net, ValueError, r"up: top=256 does not fit a weight of shape \(9, 6\): allowed is 1 to 6"):
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


def test_inject_refuses_a_lone_linear_layer():
    linear = nn.Linear(4, 4)
    with refused(linear, ValueError, r"itself a linear layer.*from_linear"):
        inject(linear)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inject_refuses_weights_that_are_not_finite(net, value):
    with torch.no_grad():
        net.down.weight[2, 3] = value
    with refused(net, ValueError, r"down\.weight.*NaN or infinity.*finite"):
        inject(net)
    with refused(net.down, ValueError, r"weight.*NaN or infinity.*finite"):
        sk.SSVDLinear.from_linear(net.down, sk.SSVDConfig(rank=2))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.complex64])
def test_inject_refuses_weights_that_are_not_floating(net, dtype):
    net.down.weight = nn.Parameter(torch.ones(6, 9, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError, match=rf"down\.weight.*{dtype}.*floating"):
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


@pytest.mark.parametrize("module", [nn.Conv1d(3, 3, 1), nn.Identity(), nn.Bilinear(2, 2, 2), _Custom(3, 3), None, 3])
def test_from_linear_refuses_other_modules(module):
    with pytest.raises(TypeError, match=rf"{type(module).__name__}.*allowed is torch\.nn\.Linear"):
        sk.SSVDLinear.from_linear(module, sk.SSVDConfig(rank=2))


def test_from_linear_refuses_a_rank_that_does_not_fit():
    linear = nn.Linear(6, 9)
    with refused(linear, ValueError, r"rank=7.*\(9, 6\).*allowed is 1 to 6"):
        sk.SSVDLinear.from_linear(linear, sk.SSVDConfig(rank=7))
    layer = sk.SSVDLinear.from_linear(linear, sk.SSVDConfig(rank=2))
    with pytest.raises(TypeError, match=r"SSVDLinear.*allowed is torch\.nn\.Linear"):
        sk.SSVDLinear.from_linear(layer, sk.SSVDConfig(rank=2))


def test_nothing_to_merge_save_or_remove(net, tmp_path):
    for action in (sk.merge, sk.unmerge, sk.remove, lambda model: sk.save_adapter(model, tmp_path / "a")):
        with refused(net, ValueError, r"model \(Net\) has no SSVD layer.*inject"):
            action(net)
    assert not list(tmp_path.iterdir())


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("unload", [False, True])
def test_merge_that_would_produce_nan_raises(net, value, unload):
    inject(net)
    train_randomly(net)
    with torch.no_grad():
        net.down.delta_sigma[:] = value
        net.down.U.mul_(1e3) if value == 1e38 else None
    with refused(net, ValueError, r"merging down.*NaN or infinity.*float32.*nothing was changed"):
        sk.merge(net, unload=unload)
    assert not net.up.merged and not net.down.merged


def test_merge_that_overflows_half_precision_raises(net):
    net.half()
    inject(net)
    with torch.no_grad():
        net.down.delta_sigma[0] = 1e6
    with refused(net, ValueError, r"merging down.*NaN or infinity.*float16"):
        sk.merge(net)


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
