"""Bad input raises an error that names argument, value and what is allowed, and changes nothing."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import linear_inputs
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels import _ext, checkpoint, dispatch
from ssvd_kernels import model as model_module
from ssvd_kernels.factorize import Factorization, factorize, sketch


class Net(nn.Module):
    """Two linear layers, one of them tied to an embedding, a convolution, and a linear-like module of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 1)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.down.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.fixture
def net() -> Net:
    return Net()


@contextmanager
def refused(model: nn.Module, error: type[Exception], match: str) -> Iterator[None]:
    """The block raises `error` with a message that fits, and `model` is as before in every respect."""

    def parts() -> tuple:
        modules = [(name, id(module), module.training) for name, module in model.named_modules()]
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), sorted(m.__dict__)) for m in model.modules()]
        parameters = [(name, id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()]
        return modules, hooks, parameters, [name for name, _ in model.named_buffers()]

    values = {name: value.clone() for name, value in model.state_dict().items()}
    before = parts()
    with pytest.raises(error, match=match):
        yield
    assert parts() == before
    now = model.state_dict()
    assert list(now) == list(values)
    for name, value in values.items():
        assert value.is_meta or torch.equal(now[name].nan_to_num(9e9), value.nan_to_num(9e9)), name


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def inject(model: nn.Module, **options) -> sk.InjectReport:
    return sk.inject(model, sk.SSVDConfig(**{"rank": 3, **options}), progress=False)


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


# -- inject ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank": 7}, ValueError, r"up: rank=7.*\(9, 6\).*allowed is 1 to 6"),
        ({"side": "both", "rank_out": 7}, ValueError, r"up: rank_out=7.*\(9, 6\).*allowed is 1 to 6"),
        ({"rank": None, "ratio": 0.1}, ValueError, r"up: ratio=0\.1 gives rank 0.*\(9, 6\).*allowed is at least 0\.16"),
        ({"targets": "wisper"}, ValueError, r"targets='wisper'.*'all-linear'.*'whisper'.*'wavlm'"),
        ({"targets": ["q_proj"]}, ValueError, r"targets.*'q_proj'.*matches no module of Net"),
        ({"targets": ["up", "q_proj"]}, ValueError, r"'q_proj'.*matches no module of Net"),
        ({"targets": "whisper"}, ValueError, r"targets='whisper'.*no untied linear layer of Net.*up, down"),
        ({"targets": r".*\.q_proj"}, ValueError, r"targets=.*q_proj.*no untied linear layer of Net.*up, down"),
        ({"targets": "("}, ValueError, r"'\('.*not a regular expression"),
        ({"exclude": "["}, ValueError, r"'\['.*not a regular expression"),
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
        with refused(net, TypeError, "config=.*allowed is an SSVDConfig"):
            sk.inject(net, config)


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


# -- functions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [sk.cayley, sk.cayley_delta])
@pytest.mark.parametrize(
    ("theta", "k", "error", "match"),
    [
        (torch.zeros(5), 4, ValueError, r"theta.*\(5,\).*\(\.\.\., 6\).*k=4"),
        (torch.zeros(6, 1), 4, ValueError, r"theta.*\(6, 1\).*\(\.\.\., 6\).*k=4"),
        (torch.zeros(1), 1, ValueError, r"theta.*\(1,\).*\(\.\.\., 0\).*k=1"),
        (torch.zeros(()), 2, ValueError, r"theta.*\(\).*\(\.\.\., 1\).*k=2"),
        (torch.zeros(6, dtype=torch.int64), 4, TypeError, r"theta.*int64.*floating"),
        (torch.zeros(6, dtype=torch.bool), 4, TypeError, r"theta.*bool.*floating"),
        (torch.zeros(0), 0, ValueError, r"k=0.*whole number >= 1"),
        (torch.zeros(6), -3, ValueError, r"k=-3.*whole number >= 1"),
        (torch.zeros(6), 4.0, ValueError, r"k=4\.0.*whole number >= 1"),
    ],
    ids=str,
)
def test_cayley_refuses(function, theta, k, error, match):
    with pytest.raises(error, match=match):
        function(theta, k)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(3, 5)}, ValueError, r"x has shape \(3, 5\).*\(\.\.\., 6\)"),
        ({"x": torch.zeros(())}, ValueError, r"x has shape \(\).*\(\.\.\., 6\)"),
        ({"x": torch.zeros(3, 6, dtype=torch.int64)}, TypeError, r"x has dtype torch\.int64.*floating"),
        ({"x": torch.zeros(3, 6).double()}, ValueError, r"x has dtype torch\.float64 and weight torch\.float32"),
        ({"x": torch.zeros(3, 6, device="meta")}, ValueError, r"on cpu and x on meta.*one device"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight has shape \(5,\).*\(d_out, d_in\)"),
        ({"weight": torch.zeros(5, 6, dtype=torch.int8)}, (TypeError, ValueError), r"weight.*torch\.int8"),
        ({"U": torch.zeros(4, 3)}, ValueError, r"U has shape \(4, 3\).*\(5, 3\)"),
        ({"V": torch.zeros(6, 2)}, ValueError, r"V has shape \(6, 2\).*\(6, 3\)"),
        ({"core": torch.zeros(3, 2)}, ValueError, r"core has shape \(3, 2\).*\(3, 3\)"),
        ({"core": torch.zeros(3, 3, dtype=torch.int64)}, (TypeError, ValueError), r"core.*torch\.int64"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias has shape \(1,\).*\(5,\)"),
        ({"weight": torch.zeros(5, 6, requires_grad=True)}, ValueError, r"weight requires a gradient.*frozen"),
        ({"U": torch.zeros(5, 3, requires_grad=True)}, ValueError, r"U requires a gradient.*frozen"),
        ({"mode": "fast"}, ValueError, r"mode='fast'.*'auto', 'composed', 'factored'"),
        ({"mode": "merged"}, ValueError, r"mode='merged'.*'auto', 'composed', 'factored'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ssvd_linear_refuses(change, error, match):
    arguments = {key: value for key, value in linear_inputs((4, 6, 5, 3), torch.float32).items() if key != "dy"}
    with pytest.raises(error, match=match):
        sk.ssvd_linear(**{**arguments, **change})


def test_layer_refuses_inputs_that_do_not_fit():
    layer = sk.SSVDLinear.from_linear(nn.Linear(6, 5), sk.SSVDConfig(rank=3))
    for training in (True, False):
        layer.train(training)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                with pytest.raises((ValueError, RuntimeError), match=r"\(3, 5\)|3x5"):
                    layer(torch.zeros(3, 5))
                with pytest.raises((ValueError, RuntimeError), match=r"float64|Double|dtype"):
                    layer(torch.zeros(3, 6, dtype=torch.float64))


@pytest.mark.parametrize("grad", [True, False], ids=["training", "eval"])
def test_forced_mode_that_does_not_exist_raises(grad):
    layer = sk.SSVDLinear.from_linear(nn.Linear(6, 5), sk.SSVDConfig(rank=3)).train(grad)
    layer.mode = "compsoed"
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(ValueError, match=r"mode='compsoed'.*'auto', 'composed', 'factored'"),
    ):
        layer(torch.zeros(3, 6))


@pytest.mark.parametrize("grad", [True, False], ids=["training", "eval"])
def test_forced_backend_that_cannot_serve_raises(grad):
    layer = sk.SSVDLinear.from_linear(nn.Linear(6, 5, dtype=torch.float64), sk.SSVDConfig(rank=3)).train(grad)
    x = torch.zeros(3, 6, dtype=torch.float64)
    expected = layer(x).detach()
    layer.eval().train(grad)  # drops what was cached
    with (
        torch.set_grad_enabled(grad),
        sk.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"'triton' cannot serve linear on cpu in torch\.float64: \w+"),
    ):
        layer(x)
    assert torch.equal(layer(x).detach(), expected)  # and the choice is free again


def test_forced_extension_that_is_not_there_raises(monkeypatch):
    monkeypatch.setattr(_ext, "supports", lambda device: "_C was not built: no compiler")
    theta = torch.zeros(3)
    assert torch.equal(sk.cayley_delta(theta, 3), torch.zeros(3, 3))  # auto falls back
    with (
        sk.use_backend("ext"),
        pytest.raises(RuntimeError, match=r"'ext' cannot serve cayley on cpu in torch\.float32: .*no compiler"),
    ):
        sk.cayley_delta(theta, 3)
    with pytest.raises(ValueError, match=r"name='cuda' is unknown.*'auto', 'reference', 'ext', 'triton'"):
        with sk.use_backend("cuda"):
            pass
    assert dispatch._forced == "auto"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SSVD_BACKEND": "gpu"}, r"SSVD_BACKEND='gpu' is unknown: allowed are 'auto', 'reference', 'ext', 'triton'"),
        ({"SSVD_BACKEND": "ext", "SSVD_DISABLE_EXT": "1"}, "'ext' cannot serve cayley on cpu in torch.float32: SSVD_D"),
    ],
    ids=["unknown", "disabled"],
)
def test_backend_forced_by_the_environment_that_cannot_serve_raises(variables, expected):
    program = "import torch, ssvd_kernels as sk; sk.cayley(torch.zeros(3), 3)"
    environment = {**os.environ, **variables, "PYTHONPATH": str(Path(sk.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and expected in run.stderr


# -- layouts that must simply work -------------------------------------------------------------------------------------


def _layouts(*shape: int) -> dict[str, Tensor]:
    wide = torch.randn(*shape[:-1], 2 * shape[-1])
    return {
        "transposed": torch.randn(*shape[:-2], shape[-1], shape[-2]).mT,
        "every second column": wide[..., ::2],
        "expanded": torch.randn(shape[-1]).expand(shape),
        "expanded row": torch.randn(*shape[:-1], 1).expand(shape),
        "reversed": torch.randn(shape).flip(0)[torch.arange(shape[0] - 1, -1, -1)],
        "permuted": torch.randn(*reversed(shape)).permute(*reversed(range(len(shape)))),
    }


@pytest.mark.parametrize("mode", ["auto", "composed", "factored"])
@pytest.mark.parametrize("layout", _layouts(2, 3, 6))
def test_any_layout_of_x_and_of_the_output_gradient_works(mode, layout):
    layer = trained(sk.SSVDLinear.from_linear(nn.Linear(6, 4), sk.SSVDConfig(rank=3)))
    layer.mode = mode
    results = []
    for dense in (False, True):
        torch.manual_seed(3)
        x, dy = _layouts(2, 3, 6)[layout], _layouts(2, 3, 4)[layout]
        x, dy = (x.contiguous(), dy.contiguous()) if dense else (x, dy)
        assert dense or not x.is_contiguous() or layout == "reversed"
        x = x.detach().requires_grad_()
        y = layer(x)
        grads = torch.autograd.grad(y, [x, layer.theta, layer.delta_sigma], dy)
        with torch.no_grad():
            results.append([y.detach(), layer.eval()(x), *grads])
        layer.train()
    for strided, dense in zip(*results, strict=True):
        torch.testing.assert_close(strided, dense, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(results[0][0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", _layouts(4, 6))
def test_any_layout_of_theta_works(layout):
    theta = _layouts(4, 6)[layout].detach()
    for function in (sk.cayley, sk.cayley_delta):
        strided, dense = theta.requires_grad_(), theta.detach().contiguous().requires_grad_()
        ours, expected = function(strided, 4), function(dense, 4)
        assert torch.equal(ours, expected)
        grads = [
            torch.autograd.grad(value[..., 0, 1].sum(), leaf)[0] for value, leaf in ((ours, strided), (expected, dense))
        ]
        assert torch.equal(*grads)


@pytest.mark.parametrize("layout", _layouts(9, 6))
def test_any_layout_of_the_weight_works(layout, tmp_path):
    base = nn.Sequential(nn.Linear(6, 9))
    base[0].weight = nn.Parameter(_layouts(9, 6)[layout])
    net, x = copy.deepcopy(base), torch.randn(5, 6)
    inject(net, rank=1)
    ulp = 0 if layout == "transposed" else 4e-6  # W' is dense, so the library may add up in another order
    torch.testing.assert_close(net(x), F.linear(x, base[0].weight, base[0].bias), rtol=ulp, atol=ulp)
    trained(net)
    sk.save_adapter(net, tmp_path / "a.safetensors")
    sk.load_adapter(base, tmp_path / "a.safetensors", progress=False)
    torch.testing.assert_close(base(x), net(x), rtol=ulp, atol=ulp)
    sk.merge(net)
    torch.testing.assert_close(net.eval()(x), base(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (1, 6), (2, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("mode", ["auto", "composed", "factored"])
def test_any_number_of_dimensions_and_empty_batches_work(shape, mode):
    layer = trained(sk.SSVDLinear.from_linear(nn.Linear(6, 4), sk.SSVDConfig(rank=3)))
    layer.mode = mode
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 4)
    y.sum().backward()
    assert x.grad.shape == shape and torch.isfinite(x.grad).all()
    assert torch.isfinite(layer.theta.grad).all() and (x.numel() == 0) == (not layer.theta.grad.any())
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), rtol=1e-6, atol=1e-6)


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("unload", [False, True])
def test_merge_that_would_produce_nan_raises(net, value, unload):
    inject(net)
    trained(net)
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


# -- adapters on disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(net, tmp_path) -> tuple[Net, Path]:
    """(base model, adapter that was trained on it)"""
    base, path = copy.deepcopy(net), tmp_path / "a.safetensors"
    inject(net)
    trained(net)
    sk.save_adapter(net, path)
    return base, path


def bases(base: Net) -> list[Net]:
    """The base model, and one that is injected and trained otherwise."""
    present = copy.deepcopy(base)
    inject(present)
    return [base, trained(present, seed=5)]


def rewrite(path: Path, change, digest: bool = True) -> None:
    """Changes tensors and header of an adapter; with a right digest, so that only the changed thing can be refused."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        metadata = file.metadata()
    header = json.loads(metadata["ssvd_kernels"])
    stored = header.pop("digest")
    change(header, tensors)
    header["digest"] = checkpoint._digest(header, tensors) if digest else stored
    save_file(tensors, path, metadata={**metadata, "ssvd_kernels": json.dumps(header)})


def test_save_refuses_what_cannot_be_saved(net, tmp_path):
    inject(net)
    with refused(net, FileNotFoundError, r"path=.*nowhere.*does not exist"):
        sk.save_adapter(net, tmp_path / "nowhere" / "a.safetensors")
    path = tmp_path / "a.safetensors"
    sk.save_adapter(net, path)
    before = path.read_bytes()
    with torch.no_grad():
        net.up.theta[1] = float("nan")
    with refused(net, ValueError, r"up\.theta.*NaN or infinity.*nothing was saved"):
        sk.save_adapter(net, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_missing_adapter_file(adapter):
    for model in bases(adapter[0]):
        with refused(model, FileNotFoundError, r"path=.*none\.safetensors.*no such adapter"):
            sk.load_adapter(model, adapter[1].with_name("none.safetensors"))
        with refused(model, FileNotFoundError, r"path=.*no such adapter"):
            sk.load_adapter(model, adapter[1].parent)


@pytest.mark.parametrize("save_bases", [False, True])
@pytest.mark.parametrize("kind", ["other weights", "slightly other weights", "other shape", "other names"])
def test_adapter_for_another_base_model(net, tmp_path, kind, save_bases):
    base, path = copy.deepcopy(net), tmp_path / "a.safetensors"
    inject(net)
    trained(net)
    sk.save_adapter(net, path, save_bases=save_bases)
    match = r"a\.safetensors.*another base model"
    if kind == "other weights":
        base = Net()
    elif kind == "slightly other weights":  # such as the same model after a little more training
        with torch.no_grad():
            base.down.weight.mul_(1 + 0.003 * torch.randn(6, 9))
    elif kind == "other shape":
        base.down = nn.Linear(9, 8)
        match = r"a\.safetensors.*down.*\[6, 9\].*\[8, 9\]"
    else:
        base.below = base.down
        del base.down
        match = r"a\.safetensors.*('down'.*Net.*another base model|differ.*'(down|below)')"
    with refused(base, sk.AdapterError, match):
        sk.load_adapter(base, path, progress=False)
    inject(base)
    trained(base, seed=4)
    with refused(base, sk.AdapterError, match):
        sk.load_adapter(base, path, progress=False)


def test_adapter_for_a_module_of_another_kind(adapter):
    base, path = adapter
    base.down = nn.Conv1d(9, 6, 1)
    with refused(base, sk.AdapterError, r"down.*Conv1d.*torch\.nn\.Linear"):
        sk.load_adapter(base, path, progress=False)


@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"rotation": "linear"}, {"side": "output"}, {"side": "both"}, {"targets": ["up"]}], ids=str
)
def test_adapter_for_another_configuration(adapter, options):
    base, path = adapter
    inject(base, **options)
    with refused(base, sk.AdapterError, r"a\.safetensors.*(down|up)"):
        sk.load_adapter(base, path, progress=False)


def test_adapter_into_a_merged_model(adapter):
    model = bases(adapter[0])[1]
    sk.merge(model)
    with refused(model, sk.AdapterError, r"merged.*unmerge"):
        sk.load_adapter(model, adapter[1])


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_adapter_of_another_version(adapter, version):
    rewrite(adapter[1], lambda header, tensors: header.update(version=version))
    for model in bases(adapter[0]):
        with refused(model, sk.AdapterError, rf"a\.safetensors.*version {version!r}.*reads version 1"):
            sk.load_adapter(model, adapter[1], progress=False)


def test_truncated_adapter(adapter):
    base, path = adapter
    whole = path.read_bytes()
    models = bases(base)
    for size in [*range(0, 64, 7), *range(64, len(whole), 211), len(whole) - 1]:
        path.write_bytes(whole[:size])
        for model in models:
            with refused(model, sk.AdapterError, r"a\.safetensors.*damaged"):
                sk.load_adapter(model, path, progress=False)


def test_tampered_adapter(adapter):
    """No single changed byte is taken for the adapter that was saved."""
    base, path = adapter
    whole = path.read_bytes()
    model = bases(base)[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sk.load_adapter(model, path)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(before)
    refusals = 0
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x04]) + whole[position + 1 :])
        try:
            sk.load_adapter(model, path, progress=False)
        except sk.AdapterError as error:
            assert "a.safetensors" in str(error)
            refusals += 1
            expected = before
        else:
            expected = saved
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items()), position
        model.load_state_dict(before)
    assert refusals > len(whole) // 3 * 0.95


def _rename(header: dict, tensors: dict) -> None:
    tensors["up.other"] = tensors["up.theta"].clone()


@pytest.mark.parametrize(
    ("change", "digest", "match"),
    [
        (lambda h, t: t["up.theta"].mul_(1.5), False, r"altered or damaged"),
        (lambda h, t: t["up.sketch"].neg_(), False, r"altered or damaged"),
        (lambda h, t: h["layers"]["up"].update(rotation="linear"), False, r"altered or damaged"),
        (lambda h, t: t.pop("up.theta"), True, r"up\.theta is missing.*\(3,\)"),
        (lambda h, t: t.update({"up.theta": torch.zeros(4)}), True, r"up\.theta is \(4,\).*\(3,\)"),
        (lambda h, t: t.update({"up.theta": torch.zeros(3).long()}), True, r"up\.theta.*int64.*floating"),
        (lambda h, t: t["down.delta_sigma"].fill_(float("nan")), True, r"down\.delta_sigma.*NaN or infinity"),
        (lambda h, t: t["down.sketch"].fill_(float("inf")), True, r"down\.sketch.*NaN or infinity"),
        (_rename, True, r"'up\.other'.*none of its layers"),
    ],
    ids=range(9),
)
def test_altered_adapter(adapter, change, digest, match):
    rewrite(adapter[1], change, digest)
    for model in bases(adapter[0]):
        with refused(model, sk.AdapterError, rf"a\.safetensors.*{match}"):
            sk.load_adapter(model, adapter[1], progress=False)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h, t: h["layers"]["up"].update(rotation="expm"), r"up.*rotation='expm'|rotation='expm'"),
        (lambda h, t: h["layers"]["up"].update(side="left"), r"side='left'"),
        (lambda h, t: h["layers"]["up"].pop("shape"), r"shape"),
        (lambda h, t: h["layers"].update(up=3), r"up"),
        (lambda h, t: h.update(layers=[]), r"layers|holds"),
        (lambda h, t: h["layers"]["up"].update(k="3"), r"up|k="),
    ],
    ids=range(6),
)
def test_adapter_whose_description_makes_no_sense(adapter, change, match):
    """Written by another program, with a right digest: still an AdapterError and no traceback from within."""
    rewrite(adapter[1], change)
    for model in bases(adapter[0]):
        with refused(model, sk.AdapterError, rf"a\.safetensors.*({match})"):
            sk.load_adapter(model, adapter[1], progress=False)


def test_file_that_is_no_adapter(adapter):
    base, path = adapter
    save_file({"up.theta": torch.zeros(3)}, path)
    with refused(base, sk.AdapterError, r"a\.safetensors is not an adapter of ssvd_kernels"):
        sk.load_adapter(base, path)
    path.write_text("weights")
    with refused(base, sk.AdapterError, r"a\.safetensors is damaged or no safetensors file"):
        sk.load_adapter(base, path)


def test_adapter_of_a_wider_dtype(net, tmp_path):
    base, path = copy.deepcopy(net), tmp_path / "a.safetensors"
    inject(net.double())
    trained(net)
    sk.save_adapter(net, path, save_bases=True)
    for model in bases(base):
        with refused(model, sk.AdapterError, r"theta is torch\.float64.*torch\.float32.*lose precision"):
            sk.load_adapter(model, path, progress=False)


def test_adapter_into_a_model_cast_after_inject(adapter):
    model = bases(adapter[0])[1].to(torch.bfloat16)
    with refused(model, sk.AdapterError, r"theta is torch\.float32.*torch\.bfloat16.*lose precision"):
        sk.load_adapter(model, adapter[1])


def test_adapter_on_a_rounded_base_names_the_remedy(adapter):
    base, path = adapter
    base.to(torch.bfloat16)
    with refused(base, sk.AdapterError, r"another base model.*up.*save_bases=True"):
        sk.load_adapter(base, path, progress=False)


@pytest.mark.parametrize("angle", [1e-3, 1e-1, 1.5])
def test_adapter_whose_basis_cannot_be_matched(adapter, monkeypatch, angle):
    """Two neighbouring pairs mixed by 1e-3, as a float32 factorisation would, already changes the update."""

    def mixed(weight: Tensor, k: int, name: str = "weight") -> Factorization:
        found = factorize(weight, k, name)
        turn = torch.eye(k)
        c, s = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
        turn[:2, :2] = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
        U, V = found.U @ turn, found.V @ turn
        return found._replace(U=U, V=V, sketch=sketch(U, V))

    monkeypatch.setattr(model_module, "factorize", mixed)
    for model in bases(adapter[0]):
        with refused(model, sk.AdapterError, r"singular vectors of up cannot be matched.*save_bases=True"):
            sk.load_adapter(model, adapter[1], progress=False)


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
