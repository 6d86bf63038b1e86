"""The Triton kernels of the Cayley op against float64; without a GPU in Triton's interpreter, split products too."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from bounds import DRAWS, ORTHOGONAL, assert_right_for_any_k, assert_within, twice, twice_of_draws
from cases import KAPPAS, exact_delta, relative_error, solved_delta, structured_theta, theta_of_norm
from torch import Tensor

import ssvd_kernels as sk
from ssvd_kernels.ops import reference

pytest.importorskip("triton")

from ssvd_kernels.ops.kernels import cayley, unavailable_reason
from ssvd_kernels.ops.kernels import tile_sizes as tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = unavailable_reason(DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

RANKS = [1, 2, 15, 16, 17, 64, 65]


def passes(theta: Tensor, grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    theta = theta.to(DEVICE).requires_grad_()
    with sk.use_backend("triton"):
        E = sk.cayley_delta(theta, k)
        (dtheta,) = torch.autograd.grad(E, theta, grad.to(DEVICE))
    return E.detach().cpu(), dtheta.cpu()


def plain_passes(theta: Tensor, grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same by torch.linalg.solve under autograd."""
    theta = theta.clone().requires_grad_()
    E = solved_delta(theta, k)
    return E.detach(), torch.autograd.grad(E, theta, grad)[0].detach()


def exact_passes(theta: Tensor, grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    exact = exact_delta(theta, k)
    return exact, reference.cayley_delta_backward_ref(grad.double(), exact)


@pytest.mark.parametrize("k", RANKS)
def test_error_of_both_passes(k):
    """At most twice that of float32 PyTorch."""
    B = 2 if k < 64 else 1
    count = DRAWS if k < 8 else 1
    draws = [(theta_of_norm(k, 0.7, batch=B, dtype=torch.float32), torch.randn(B, k, k), k) for _ in range(count)]
    plain, exact = (list(zip(*(make(*draw) for draw in draws))) for make in (plain_passes, exact_passes))
    for value, twins, truths in zip(passes(*draws[0]), plain, exact, strict=True):
        assert value.shape == truths[0].shape
        assert relative_error(value, truths[0]) <= twice_of_draws(zip(twins, truths))


@pytest.mark.parametrize("kappa", KAPPAS)
def test_small_rotations_lose_nothing(kappa):
    k = 80
    theta = theta_of_norm(k, kappa, dtype=torch.float32)
    exact = exact_delta(theta, k)
    with sk.use_backend("triton"):
        E = sk.cayley_delta(theta.to(DEVICE), k).cpu()
    assert relative_error(E, exact) <= twice(solved_delta(theta, k), exact)
    G = E.double()[0] + torch.eye(k)
    assert (G.mT @ G - torch.eye(k)).abs().max() <= ORTHOGONAL


@pytest.mark.slow
@pytest.mark.parametrize("config", tables.CAYLEY, ids=str)
def test_every_configuration(config, monkeypatch):
    """Each tile on a matrix that it does not divide."""
    monkeypatch.setattr(cayley, "cayley_config", lambda *_: config)
    k = 69
    theta, grad = theta_of_norm(k, 0.5, dtype=torch.float32), torch.randn(1, k, k)
    for value, twin, truth in zip(*(make(theta, grad, k) for make in (passes, plain_passes, exact_passes))):
        assert relative_error(value, truth) <= twice(twin, truth)


@pytest.mark.parametrize("structure", ["random", "graded"])
@pytest.mark.parametrize("share", [0.1, 0.99, 1.01])
def test_leaves_by_iteration_and_in_float64(structure, share):
    """Below and above the size from which they are eliminated in float64."""
    k = 48
    theta = structured_theta(structure, k, 1.0)
    K = reference.skew(theta, k)
    theta *= (share * cayley.CONVERGENT.value / (K @ K).square().sum()) ** 0.25
    with sk.use_backend("triton"):
        E = sk.cayley_delta(theta.to(DEVICE), k).cpu()
    assert_within(E, solved_delta(theta, k), exact_delta(theta, k))


SLOW = [pytest.param(69, structure, marks=pytest.mark.slow) for structure in ("halves", "all ones", "graded")]


@pytest.mark.parametrize(("k", "structure"), [(21, "random"), (69, "random"), *SLOW])
def test_large_rotations(k, structure):
    """Also beside a small one, which float32 serves."""
    theta = torch.cat([structured_theta(structure, k, 1000.0), structured_theta(structure, k, 0.1)])
    grad = torch.randn(2, k, k)
    E, dtheta = passes(theta, grad, k)
    assert_right_for_any_k(theta, grad, k, E, dtheta)
    assert_within(E[1:], solved_delta(theta[1:], k), exact_delta(theta[1:], k))


def test_padding_is_zero_and_empty_batches_are_served():
    theta = theta_of_norm(21, 0.5, batch=3, dtype=torch.float32).to(DEVICE)
    E = cayley.cayley_delta(theta, 21)
    assert E.shape == (3, 32, 32)
    assert not E[:, 21:].any() and not E[:, :, 21:].any()
    assert cayley.cayley_delta(theta[:0], 21).shape == (0, 32, 32)
    assert cayley.cayley_delta_backward(E[:0], E[:0], 21).shape == theta[:0].shape
    assert not cayley.cayley_delta(theta.new_zeros(2, 0), 1).any()


def test_zero_gives_exactly_zero():
    assert not cayley.cayley_delta(torch.zeros(2, 80 * 79 // 2, device=DEVICE), 80).any()


def test_matrices_and_gradients_of_any_scale():
    """Each matrix has a scale of its own."""
    k, scales = 69, (1e-30, 1e-6, 1.0, 1e15)
    theta = torch.cat([theta_of_norm(k, min(scale, 0.5), dtype=torch.float32) for scale in scales])
    grad = torch.randn(4, k, k) * torch.tensor(scales[::-1])[:, None, None]
    draws = zip(*(make(theta, grad, k) for make in (passes, plain_passes, exact_passes)))
    for values, twins, truths in draws:
        for value, twin, truth in zip(values, twins, truths, strict=True):
            assert relative_error(value, truth) <= twice(twin, truth)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_arrives(bad):
    """As a gradient scaler expects, and in its own matrix alone."""
    k = 69
    theta, grad = theta_of_norm(k, 0.5, batch=3, dtype=torch.float32), torch.randn(3, k, k)
    theta[1, 7] = grad[2, 3, 4] = bad
    E, dtheta = passes(theta, grad, k)
    assert not E[1].isfinite().all() and not dtheta[2].isfinite().all()
    assert E[[0, 2]].isfinite().all() and dtheta[0].isfinite().all()


def test_another_backend_may_have_made_the_forward():
    """E comes unpadded from the twin."""
    k = 21
    theta, grad = theta_of_norm(k, 0.5, batch=2, dtype=torch.float32).to(DEVICE).requires_grad_(), torch.randn(2, k, k)
    with sk.use_backend("reference"):
        E = sk.cayley_delta(theta, k)
    with sk.use_backend("triton"):
        (dtheta,) = torch.autograd.grad(E, theta, grad.to(DEVICE))
    assert_within(dtheta.cpu(), *(make(theta.detach().cpu(), grad, k)[1] for make in (plain_passes, exact_passes)))


def test_float64_is_refused_by_name():
    with sk.use_backend("triton"), pytest.raises(RuntimeError, match=r"cayley.*float64.*only float32"):
        sk.cayley_delta(torch.zeros(1, 3, dtype=torch.float64, device=DEVICE), 3)


def test_second_derivatives_go_through_the_twin():
    theta = theta_of_norm(18, 0.5, dtype=torch.float32)

    def second(theta: Tensor, delta: Callable[[Tensor, int], Tensor]) -> Tensor:
        theta = theta.clone().requires_grad_()
        (first,) = torch.autograd.grad(delta(theta, 18).square().sum(), theta, create_graph=True)
        return torch.autograd.grad(first.square().sum(), theta)[0].cpu()

    with sk.use_backend("triton"):
        found = second(theta.to(DEVICE), sk.cayley_delta)
    assert_within(found, *(second(each, solved_delta) for each in (theta, theta.double())))


def test_compiled_graphs_call_the_kernels():
    theta = theta_of_norm(20, 0.5, batch=2, dtype=torch.float32)

    def gradient(theta: Tensor, squares: Callable[[Tensor], Tensor]) -> Tensor:
        theta = theta.clone().requires_grad_()
        return torch.autograd.grad(squares(theta), theta)[0].cpu()

    def squares(theta: Tensor) -> Tensor:
        return sk.cayley_delta(theta, 20).square().sum()

    with sk.use_backend("triton"):
        found = gradient(theta.to(DEVICE), torch.compile(squares, fullgraph=True, backend="aot_eager"))
    pair = (gradient(each, lambda theta: solved_delta(theta, 20).square().sum()) for each in (theta, theta.double()))
    assert_within(found, *pair)
