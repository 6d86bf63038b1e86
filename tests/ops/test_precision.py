"""Mixed precision, one table: dtypes of base, input and theta, with and without autocast, against float64."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_within, twice
from cases import relative_error
from models import Stack, adapt, inject, train_randomly
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.ops.reference import skew

pytestmark = pytest.mark.usefixtures("one_thread")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
T, D_IN, D_OUT, K = 96, 64, 80, 16


class Row(NamedTuple):
    """One way of running a layer."""

    base: torch.dtype
    autocast: torch.dtype | None
    x: torch.dtype
    theta: torch.dtype = F32

    @property
    def compute(self) -> torch.dtype:
        return self.autocast or self.x

    def context(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cpu", self.autocast) if self.autocast else contextlib.nullcontext()

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.base, self.autocast, self.x, self.theta)]
        return "base {}, autocast {}, x {}, theta {}".format(*names)


ROWS = [
    Row(F32, None, F32),
    Row(BF16, None, BF16),  # a float32 adapter inside a half-precision model, without autocast
    Row(F16, None, F16),
    Row(F32, BF16, F32),
    Row(F32, BF16, BF16),  # behind another layer under autocast
    Row(F32, F16, F32),
    Row(F32, F16, F16),
    Row(BF16, BF16, BF16),
    Row(BF16, BF16, F32),
    Row(BF16, F16, BF16),
    Row(F16, F16, F32),
    Row(F32, None, F32, theta=BF16),  # as FSDP2 wants one dtype a group
    Row(BF16, None, BF16, theta=BF16),
    Row(F32, BF16, F32, theta=BF16),
    Row(BF16, BF16, BF16, theta=BF16),
    Row(F16, None, F16, theta=F16),
]


class Case:
    """A trained layer run as a row says, its input, and the gradient of its output."""

    def __init__(self, row: Row, mode: str = "auto") -> None:
        torch.manual_seed(3)
        linear = nn.Linear(D_IN, D_OUT).to(row.base)
        self.row, self.layer = row, sk.SSVDLinear.from_linear(linear, sk.SSVDConfig(rank=K))
        self.layer.mode = mode
        self.trained = [self.layer.theta, self.layer.delta_sigma]
        for parameter in self.trained:
            parameter.data = (0.05 * torch.randn(parameter.shape)).to(row.theta)
        self.x, self.dy = torch.randn(T, D_IN).to(row.x), torch.randn(T, D_OUT).to(row.compute)

    def ours(self) -> dict[str, Tensor]:
        x = self.x.clone().requires_grad_()
        with self.row.context():
            y = self.layer(x)
        return _with_gradients(y, [x, *self.trained], self.dy)

    def plain(self, compute: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
        """The formula by PyTorch's autograd, the core in `wide`, the products in `compute`."""
        leaves = [t.detach().to(compute if t is self.x else wide).requires_grad_() for t in (self.x, *self.trained)]
        x, core = leaves[0], self._core(*leaves[1:])
        layer = self.layer
        W, U, V, bias = (t.to(compute) for t in (layer.base_weight, layer.U, layer.V, layer.bias))
        y = F.linear(x, W, bias) + ((x @ V) @ core.to(compute).mT) @ U.mT
        return _with_gradients(y, leaves, self.dy.to(compute))

    def plain_merged(self) -> Tensor:
        """What PyTorch gives of the exact W', rounded once to the base's dtype."""
        theta, delta = (t.detach().double() for t in self.trained)
        layer = self.layer
        W = layer.base_weight.double() + layer.U.double() @ self._core(theta, delta) @ layer.V.double().mT
        with self.row.context():
            return F.linear(self.x, W.to(self.row.base), layer.bias).detach()

    def _core(self, theta: Tensor, delta: Tensor) -> Tensor:
        N, eye = skew(theta, K), torch.eye(K, dtype=theta.dtype)
        E = -2 * torch.linalg.solve(eye + N, N)
        return torch.diag(delta) + (self.layer.sigma.to(theta) + delta).unsqueeze(1) * E


def _with_gradients(y: Tensor, leaves: list[Tensor], dy: Tensor) -> dict[str, Tensor]:
    return {"y": y.detach(), **dict(zip(("dx", "dtheta", "ddelta_sigma"), torch.autograd.grad(y, leaves, dy)))}


@pytest.mark.parametrize("mode", ["auto", "factored", "composed"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_training_has_at_most_twice_plain_pytorchs_error(row, mode):
    case = Case(row, mode)
    exact, plain, ours = case.plain(torch.float64, torch.float64), case.plain(row.compute, F32), case.ours()
    dtypes = {"y": row.compute, "dx": row.x, "dtheta": row.theta, "ddelta_sigma": row.theta}
    for name, dtype in dtypes.items():
        assert ours[name].dtype == dtype, name
        assert relative_error(ours[name], exact[name]) <= twice(plain[name], exact[name], dtype), name


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_merged_equals_unmerged(row, rounding):
    """Each within twice the error of PyTorch's own product with W', and so is what is kept between calls in eval."""
    case = Case(row)
    layer, plain, exact = case.layer.eval(), case.plain_merged(), case.plain(torch.float64, torch.float64)["y"]
    with torch.no_grad(), row.context():
        unmerged = [layer(case.x), layer(case.x)]
        layer.merge(rounding=rounding)
        merged = layer(case.x)
        layer.unmerge()
        assert torch.equal(layer(case.x), unmerged[0])
    for y in (*unmerged, merged):
        assert y.dtype == row.compute
        assert_within(y, plain, exact)


@pytest.mark.parametrize("row", [row for row in ROWS if row.base == BF16], ids=str)
def test_before_training_every_row_gives_the_base_layers_output(row):
    case = Case(row)
    for parameter in case.trained:
        parameter.data.zero_()
    with row.context():
        expected = F.linear(case.x, case.layer.base_weight, case.layer.bias)
        assert torch.equal(case.layer(case.x), expected)
        for rounding in ("nearest", "stochastic"):
            case.layer.eval().merge(rounding=rounding)
            assert torch.equal(case.layer(case.x), expected)
            case.layer.unmerge()


# -- merging by stochastic rounding -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> sk.SSVDLinear:
    torch.manual_seed(5)
    linear = nn.Linear(1024, 1024, dtype=BF16)
    linear.weight.data = (torch.randn(1024, 1024) / 32).to(BF16)
    return sk.SSVDLinear.from_linear(linear, sk.SSVDConfig(rank=409))


@pytest.mark.parametrize("kappa", [1e-4, 1e-3, 1e-2, 1e-1])
def test_stochastic_rounding_keeps_small_updates_in_a_merged_bf16_weight(large, caplog, kappa):
    theta = torch.randn(large.theta.shape)
    with torch.no_grad():
        large.theta.copy_(kappa * theta / torch.linalg.matrix_norm(skew(theta, large.k), 2))
        update = large.U.double() @ large.core().double() @ large.V.double().mT
        W, x = large.base_weight.double(), torch.randn(64, 1024).to(BF16)
        exact = F.linear(x.double(), W + update, large.bias.double())
        error = {}
        for rounding in ("nearest", "stochastic"):
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="ssvd_kernels"):
                large.merge(rounding=rounding)
            change = large.weight.double() - W
            gain = float((change * update).sum() / update.square().sum())
            assert (abs(gain - 1) <= 0.02) == (rounding == "stochastic" or kappa >= 1e-2)
            assert bool(caplog.text) == (abs(gain - 1) > 0.02)
            error[rounding] = relative_error(F.linear(x, large.weight, large.bias), exact)
            large.unmerge()
    assert error["stochastic"] <= 1.4 * error["nearest"]  # the price: 2**0.5 of W', less as y is rounded, too


def test_merging_a_model_passes_the_rounding_on():
    models = {}
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(0)
        model = models[rounding] = adapt(Stack().to(BF16))
        sk.merge(model, unload=True, rounding=rounding)
    assert not torch.equal(models["nearest"].head.weight, models["stochastic"].head.weight)
    inject(model)
    with pytest.raises(ValueError, match="`rounding` must be one of 'nearest', 'stochastic', got 'up'"):
        sk.merge(model, rounding="up")
    assert not any(layer.merged for layer in sk.ssvd_layers(model).values())


# -- loss scaling -----------------------------------------------------------------------------------------------------


def test_grad_scaler_skips_the_step_that_overflows_and_trains_on():
    model = Stack()
    inject(model)
    x = torch.randn(32, 8)
    target = torch.sin(x)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    losses, skipped = [], 0
    for _ in range(60):
        before, scale = model.head.theta.detach().clone(), scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cpu", F16):
            loss = F.mse_loss(model(x), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        overflowed = scaler.get_scale() < scale
        assert torch.equal(model.head.theta, before) == overflowed
        skipped += overflowed
        losses.append(loss.item())
    assert 1 <= skipped <= 20
    assert losses[-1] < 0.8 * losses[0]


# -- casting an adapted model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_casting_an_adapted_model_rounds_theta_and_says_so(dtype):
    model = adapt(Stack())
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match=r"theta.*rounded from torch.float32 to torch.*16.*before adapting") as caught:
        model.to(dtype)
    assert all(p.dtype == dtype for p in model.parameters())
    assert len({str(warning.message) for warning in caught}) == 1
    x = torch.randn(4, 8).to(dtype)
    y = model(x)
    y.float().square().sum().backward()
    layer = model.head
    assert y.dtype == layer.theta.grad.dtype == dtype and layer.core().dtype == F32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.float().double().float()  # widening loses nothing; what was rounded stays so
    for name, parameter in model.named_parameters():
        assert parameter.dtype == F32 and torch.equal(parameter, exact[name].to(dtype).float())


def test_adapting_after_casting_keeps_theta_in_float32():
    model = Stack().to(BF16)
    inject(model)
    assert all(p.dtype == F32 for name, p in model.named_parameters() if not name.endswith(("weight", "bias")))
    small = 2.0**-12  # lost next to 1 in bfloat16
    layer = model.head
    with torch.no_grad():
        layer.delta_sigma.fill_(1).add_(small)
    assert torch.all(layer.delta_sigma == 1 + small) and torch.all(layer.core().diagonal() == 1 + small)
    model(torch.randn(4, 8).to(BF16)).float().square().sum().backward()
    assert layer.theta.grad.dtype == F32


@pytest.mark.parametrize("base", [BF16, F16])
def test_input_of_another_dtype_is_refused_without_autocast(base):
    layer = sk.SSVDLinear.from_linear(nn.Linear(8, 8, dtype=base), sk.SSVDConfig(rank=2))
    with pytest.raises(
        ValueError, match=r"without autocast `weight` must have the dtype of `x` \(torch\.float32\), got torch\.\w+16"
    ):
        layer(torch.randn(3, 8))


def test_float64_input_of_a_float32_layer_is_refused_with_autocast_too():
    """Autocast leaves float64 as it is, so nn.Linear refuses as well."""
    linear = nn.Linear(8, 8)
    layer = sk.SSVDLinear.from_linear(linear, sk.SSVDConfig(rank=2))
    with torch.autocast("cpu", BF16), pytest.raises(ValueError, match="must have the dtype of `x`"):
        layer(torch.randn(3, 8, dtype=torch.float64))


SIDES = [sk.SSVDConfig(rank=6, side=side) for side in ("input", "output", "both")]


@pytest.mark.parametrize(
    ("config", "reads_weight"),
    [
        *((config, False) for config in (*SIDES, sk.SSVDConfig(rank=6, form="activation"))),
        *((config, True) for config in (*SIDES, sk.SpectralFTConfig(top=6, rank=2))),
    ],
    ids=str,
)
def test_a_backward_within_autocast_gives_the_same_gradients(config, reads_weight):
    """What autocast computes in half precision is the forward's; the gradients of theta stay in float32."""
    model = nn.Sequential(nn.Linear(16, 16))
    sk.inject(model, config, progress=False)
    train_randomly(model)
    x = torch.randn(32, 16)

    def gradients(within: bool) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", BF16):
            y = F.linear(x, model[0].weight) if reads_weight else model(x)
            loss = y.float().square().mean()
            if within:
                loss.backward()
        if not within:
            loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        assert inside.any() and torch.equal(inside, outside)
