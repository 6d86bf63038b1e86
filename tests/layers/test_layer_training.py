"""What training can reach, and how much of a small update survives half precision."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_within, unit_roundoff
from cases import relative_error, rotation_by_hand, solved_delta, theta_of_norm
from gain import GAIN, gain, output_gain
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.ops.functional import theta_length

# -- recovering a known rotation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ["cayley", "linear", "free"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("shape", [(14, 10), (10, 14), (11, 11)], ids=str)
def test_training_recovers_a_known_rotation_and_shift(shape, side, rotation):
    (d_out, d_in), k = shape, 6
    linear = nn.Linear(d_in, d_out, dtype=torch.float64)
    W, bias = linear.weight.detach().clone(), linear.bias.detach()
    layer = sk.SSVDLinear.from_linear(linear, sk.SSVDConfig(rank=k, side=side, rotation=rotation))
    S = torch.linalg.svdvals(W)
    two_sums = 2 * max(shape) * unit_roundoff(torch.float64)
    assert relative_error(layer.sigma, S[:k]) <= two_sums
    theta = 0.15 * torch.randn(theta_length(k, rotation), dtype=torch.float64)
    shift = 0.1 * torch.randn(k, dtype=torch.float64) * S[:k]
    U, S, V, G = layer.U, layer.sigma, layer.V, rotation_by_hand(theta, k, rotation)
    D = torch.diag(S + shift)
    target = W - U @ torch.diag(S) @ V.T + (U @ D @ G @ V.T if side == "input" else U @ G.T @ D @ V.T)

    x = torch.randn(64, d_in, dtype=torch.float64)
    y = F.linear(x, target, bias)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, max_iter=400, tolerance_grad=0, tolerance_change=0, history_size=50,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        return loss

    start = closure().item()
    optimizer.step(closure)
    end = closure().item()
    assert start > 1e-3
    assert end <= 1e-16 * start  # squares: 1e-8 of the error is left, and what it makes of the parameters
    if rotation != "free":  # there, shift and diagonal of G say the same
        assert relative_error(layer.theta.detach(), theta) <= 1e-6
        assert relative_error(layer.delta_sigma.detach(), shift) <= 1e-6
    assert relative_error(layer.weight.detach(), target) <= 1e-7
    assert torch.equal(layer.base_weight, W)


@pytest.mark.parametrize("side", ["smaller", "both"])
@pytest.mark.parametrize("rotation", ["cayley", "linear", "free"])
def test_adamw_fits_a_small_network_to_a_rotated_one(side, rotation):
    """In float32, as users do it: two layers, minibatches, the loss goes to nearly nothing, the base stays."""
    config = sk.SSVDConfig(rank=6, side=side, rotation=rotation)
    base = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 8))
    target, student = copy.deepcopy(base), copy.deepcopy(base)
    for net in (target, student):
        sk.inject(net, config, progress=False)
    with torch.no_grad():
        for parameter in (p for p in target.parameters() if p.requires_grad):
            parameter.copy_(0.15 * torch.randn(parameter.shape))
    x = torch.randn(128, 10)
    with torch.no_grad():
        y = target.eval()(x)

    def error() -> float:
        with torch.no_grad():
            return F.mse_loss(student.eval()(x), y).item()

    start, steps = error(), 300
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    student.train()
    for step in range(steps):
        rows = torch.arange(64) + 64 * (step % 2)
        optimizer.zero_grad()
        F.mse_loss(student(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    assert error() <= 1e-3 * start
    sk.merge(student)
    assert error() <= 1e-3 * start
    sk.remove(student)
    for (name, ours), (_, theirs) in zip(student.named_parameters(), base.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


# -- small updates in half precision -----------------------------------------------------------------------------------

D, K, KAPPAS = 64, 26, [1e-4, 1e-3, 1e-2, 1e-1]


@pytest.fixture(scope="module")
def large() -> sk.SSVDLinear:
    """d = 64, k = 26 over a base whose values are bf16 ones: the hardest base, also in float32."""
    torch.manual_seed(5)
    linear = nn.Linear(D, D, bias=True)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(D, D) / D**0.5)
        linear.weight.copy_(linear.weight.bfloat16())
    return sk.SSVDLinear.from_linear(linear, sk.SSVDConfig(rank=K))


@pytest.fixture(scope="module")
def rotations() -> Tensor:
    """theta of ||K||_2 = 1; the others are multiples of it."""
    torch.manual_seed(6)
    return theta_of_norm(K, 1.0)[0]


class Case:
    """A layer with ||K||_2 = kappa in one way of running it, and the exact update of its output for one x."""

    def __init__(self, layer: sk.SSVDLinear, theta: Tensor, base: torch.dtype) -> None:
        self.layer = copy.deepcopy(layer).to(base)
        for name in ("U", "V", "sigma", "theta", "delta_sigma"):  # as inject makes them over a bf16 base
            setattr(self.layer, name, nn.Parameter(getattr(layer, name).detach().clone(), name == "theta"))
        self.adapted, self.zero = theta.to(torch.float32), torch.zeros_like(theta, dtype=torch.float32)
        eye = torch.eye(K, dtype=torch.float64)
        E = (
            rotation_by_hand(self.adapted.double(), K, "cayley") - eye
        )  # 1e-4 and more of eye: float64 has 12 digits of it
        sigma, U, V = layer.sigma.double(), layer.U.double(), layer.V.double()
        self.update = (U * sigma) @ E @ V.T  # W' - W, exactly
        self.autocast = base == torch.float32

    def run(self, theta: Tensor, x: Tensor, training: bool) -> Tensor:
        with torch.no_grad():
            self.layer.theta.copy_(theta)
        self.layer.train(training)
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.layer(x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32], ids=["bf16", "float32 autocast"])
@pytest.mark.parametrize("kappa", KAPPAS)
def test_bf16_update_arrives_at_the_output(large, rotations, kappa, base, training):
    case = Case(large, kappa * rotations, base)

    def adapted(x: Tensor) -> Tensor:
        return case.run(case.adapted, x.to(base), training)

    def zero(x: Tensor) -> Tensor:
        y = case.run(case.zero, x.to(base), training)
        assert torch.equal(y, F.linear(x, case.layer.base_weight.bfloat16(), case.layer.bias.bfloat16()))
        return y

    assert abs(output_gain(adapted, zero, case.update, kappa) - 1) <= GAIN


@pytest.mark.parametrize("kappa", KAPPAS)
def test_bf16_gradients_see_the_update(large, rotations, kappa):
    """dx of the update alone (zero base), and dtheta against float64."""
    case = Case(large, kappa * rotations, torch.bfloat16)
    with torch.no_grad():
        case.layer.theta.copy_(case.adapted)
    core = case.layer.core()
    x = torch.randn(64, D).bfloat16().requires_grad_()
    dy = torch.randn(64, D).bfloat16()
    zero = torch.zeros(D, D, dtype=torch.bfloat16)
    y = sk.ssvd_linear(x, zero, case.layer.U, case.layer.V, core)
    dx, dtheta = torch.autograd.grad(y, [x, case.layer.theta], dy)
    assert abs(gain(dx.double(), dy.double() @ case.update) - 1) <= GAIN

    def through_plain_pytorch(compute: torch.dtype) -> Tensor:
        theta = case.adapted.to(torch.promote_types(compute, torch.float32)).requires_grad_()
        core = large.sigma.to(theta).unsqueeze(1) * solved_delta(theta.unsqueeze(0), K)[0]
        V, U = large.V.to(compute), large.U.to(compute)
        y = ((x.detach().to(compute) @ V) @ core.to(compute).T) @ U.T
        return torch.autograd.grad(y, theta, dy.to(compute))[0]

    plain, exact = map(through_plain_pytorch, (torch.bfloat16, torch.float64))
    assert abs(gain(dtheta.double(), exact) - 1) <= GAIN
    assert_within(dtheta, plain, exact)


@pytest.mark.parametrize(("kappa", "lossy"), [(1e-4, True), (1e-1, False)])
def test_merging_into_bf16_says_when_it_loses_the_update(large, rotations, caplog, kappa, lossy):
    case = Case(large, kappa * rotations, torch.bfloat16)
    with torch.no_grad():
        case.layer.theta.copy_(case.adapted)
    with caplog.at_level(logging.WARNING, logger="ssvd_kernels"):
        case.layer.merge()
    kept = gain(case.layer.weight.double() - case.layer.base_weight.double(), case.update)
    assert (abs(kept - 1) > GAIN) == lossy
    assert ("of the update" in caplog.text) == lossy
