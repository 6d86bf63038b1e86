"""The Cayley map: convention, accuracy against float64, derivatives, every backend."""

from __future__ import annotations

import math

import pytest
import torch
from bounds import DRAWS, ORTHOGONAL, assert_within, in_float64, twice_of_draws
from cases import CAYLEY_RANKS, KAPPAS, exact_delta, relative_error, solved_delta, theta_of_norm
from torch.autograd import gradcheck, gradgradcheck

import ssvd_kernels as sk
from ssvd_kernels.ops import extension, reference
from ssvd_kernels.ops.functional import rotation_delta

EXT = pytest.param(
    "ext", marks=pytest.mark.skipif(not extension.available(), reason=str(extension.unavailable_reason()))
)
BACKENDS = ["reference", EXT]


def test_convention_by_hand():
    """K = [[0, t], [-t, 0]]: (I - K)(I + K)^-1 = [[1 - t^2, -2t], [2t, 1 - t^2]] / (1 + t^2)."""

    def by_hand(t: torch.Tensor) -> torch.Tensor:
        return torch.stack([1 - t * t, -2 * t, 2 * t, 1 - t * t], -1).view(-1, 2, 2) / (1 + t * t).view(-1, 1, 1)

    t = torch.randn(DRAWS)
    assert_within(sk.cayley(t.view(-1, 1), 2), by_hand(t), by_hand(t.double()))
    assert torch.equal(rotation_delta(torch.tensor([0.25]), 2, "linear"), torch.tensor([[0, -0.5], [0.5, 0]]))


def test_theta_is_packed_row_by_row():
    K = reference.skew(torch.arange(1.0, 7.0), 4)
    expected = torch.tensor([[0.0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]])
    assert torch.equal(K, expected)
    dK, theta = torch.randint(-9, 9, (4, 4)), torch.randint(-9, 9, (6,))
    assert torch.equal((reference.skew(theta, 4) * dK).sum(), (theta * reference.unskew(dK)).sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", CAYLEY_RANKS)
def test_float32_error_is_at_most_twice_that_of_plain_pytorch(backend, k):
    for kappa in KAPPAS:
        theta = theta_of_norm(k, kappa, batch=3 if k > 8 else 3 * DRAWS, dtype=torch.float32)
        with sk.use_backend(backend):
            assert_within(sk.cayley_delta(theta, k), solved_delta(theta, k), exact_delta(theta, k), f"kappa = {kappa}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [153, 409, pytest.param(1024, marks=pytest.mark.slow)])
def test_orthogonality_and_relative_error_for_every_size_of_rotation(backend, k):
    for kappa in KAPPAS:
        theta = theta_of_norm(k, kappa, dtype=torch.float32)
        exact = exact_delta(theta, k)
        with sk.use_backend(backend):
            G, E = sk.cayley(theta, k)[0].double(), sk.cayley_delta(theta, k)
            wide = sk.cayley_delta(theta.double(), k)
        assert (G.mT @ G - torch.eye(k)).abs().max() <= ORTHOGONAL
        assert_within(E, solved_delta(theta, k), exact, f"kappa = {kappa}")
        assert relative_error(wide, exact) <= in_float64(k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_any_leading_shape(backend, shape, k):
    m, count = k * (k - 1) // 2, math.prod(shape)
    theta = (torch.randn(*shape, m) / (2 * k)).requires_grad_()
    with sk.use_backend(backend):
        E = sk.cayley_delta(theta, k)
        E.sum().backward()
        assert torch.equal(sk.cayley(theta, k), torch.eye(k) + E)
    assert E.shape == (*shape, k, k)
    assert theta.grad is not None and theta.grad.shape == theta.shape
    rows = torch.cat([theta.detach().view(count, m), torch.randn(DRAWS, m) / (2 * k)])  # the others are for the bound
    plain, exact = solved_delta(rows, k), exact_delta(rows, k)
    bound = twice_of_draws(zip(plain, exact))
    for value, truth in zip(E.view(count, k, k), exact):
        assert relative_error(value, truth) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_gradcheck_and_gradgradcheck(backend, k):
    theta = (0.5 * torch.randn(2, k * (k - 1) // 2, dtype=torch.float64)).requires_grad_()
    with sk.use_backend(backend):
        assert gradcheck(lambda t: sk.cayley_delta(t, k), theta)
        assert gradgradcheck(lambda t: sk.cayley_delta(t, k), theta)


@pytest.mark.parametrize("rotation", ["linear", "free"])
def test_gradcheck_of_the_other_rotations(rotation):
    k = 4
    theta = torch.randn(2, k * k if rotation == "free" else 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: rotation_delta(t, k, rotation), theta)
    assert gradgradcheck(lambda t: rotation_delta(t, k, rotation), theta)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_at_the_papers_rank(backend):
    """float32 gradient against the float64 one of autograd through a single solve, at most twice PyTorch's error."""
    k = 153
    theta, grad = theta_of_norm(k, 0.5)[0], torch.randn(k, k, dtype=torch.float64)

    def through_solve(dtype: torch.dtype) -> torch.Tensor:
        leaf = theta.to(dtype).requires_grad_()
        K = reference.skew(leaf, k)
        E = -2 * torch.linalg.solve(torch.eye(k, dtype=dtype) + K, K)
        return torch.autograd.grad(E, leaf, grad.to(dtype))[0]

    leaf = theta.float().requires_grad_()
    with sk.use_backend(backend):
        (ours,) = torch.autograd.grad(sk.cayley_delta(leaf, k), leaf, grad.float())
    assert_within(ours, through_solve(torch.float32), through_solve(torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_theta_is_upcast(dtype):
    theta = theta_of_norm(31, 0.3, dtype=dtype).requires_grad_()
    E = sk.cayley_delta(theta, 31)
    assert E.dtype == torch.float32
    assert torch.equal(E, sk.cayley_delta(theta.float(), 31))
    E.sum().backward()
    assert theta.grad is not None and theta.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sk.cayley_delta(theta, 31), E)


def test_reference_is_right_with_two_threads_where_a_batched_lu_is_not():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        theta = theta_of_norm(384, 0.5, batch=8, dtype=torch.float32)
        with sk.use_backend("reference"):
            G = sk.cayley(theta, 384).double()
    finally:
        torch.set_num_threads(before)
    assert max((g.mT @ g - torch.eye(384)).abs().max() for g in G) <= ORTHOGONAL


@pytest.mark.parametrize("backend", BACKENDS)
def test_reduced_precision_products_are_not_used(backend):
    theta = theta_of_norm(97, 0.5, dtype=torch.float32)
    with sk.use_backend(backend):
        expected = sk.cayley_delta(theta, 97)
        torch.set_float32_matmul_precision("medium")
        try:
            found = sk.cayley_delta(theta, 97)
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, expected)
