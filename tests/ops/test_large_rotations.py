"""Cayley transforms of any size of rotation: elimination in float32 alone loses digits as ||K||^2 and worse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from bounds import assert_right_for_any_k, assert_within, in_float64, twice
from cases import STRUCTURES, exact_delta, relative_error, solved_delta, structured_theta, theta_of_norm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ssvd_kernels as sk
from ssvd_kernels.ops import extension
from ssvd_kernels.ops.kernels import constants

EXT = pytest.param(
    "ext", marks=pytest.mark.skipif(not extension.available(), reason=str(extension.unavailable_reason()))
)
BACKENDS = ["reference", EXT]
SIZES = [1e-4, 1e-2, 1.0, 10.0, 30.0, 100.0, 1000.0]  # ||K||_2
SLOW = [pytest.param(k, marks=pytest.mark.slow) for k in (400, 1024)]


def passes(theta: Tensor, grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    theta = theta.clone().requires_grad_()
    E = sk.cayley_delta(theta, k)
    return E.detach(), torch.autograd.grad(E, theta, grad)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [2, 3, 16, 64, 65, 153, *SLOW])
def test_every_size_and_rank(backend, k):
    for kappa in SIZES:
        theta = theta_of_norm(k, kappa, batch=max(1, 64 // k), dtype=torch.float32)
        grad = torch.randn(len(theta), k, k)
        with sk.use_backend(backend):
            assert_right_for_any_k(theta, grad, k, *passes(theta, grad, k))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [16, 130, *SLOW[:1]])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure(backend, k, structure):
    for kappa in SIZES[2:]:
        theta, grad = structured_theta(structure, k, kappa), torch.randn(1, k, k)
        with sk.use_backend(backend):
            assert_right_for_any_k(theta, grad, k, *passes(theta, grad, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_large_rotation_does_not_harm_the_others_of_its_batch(backend):
    k = 97
    theta = torch.cat([theta_of_norm(k, kappa, dtype=torch.float32) for kappa in (1e-4, 1000.0, 0.1)])
    with sk.use_backend(backend):
        E = sk.cayley_delta(theta, k)
    for one, found in zip(theta[:, None], E[:, None]):
        assert_within(found, solved_delta(one, k), exact_delta(one, k))


@pytest.mark.parametrize(("dtype", "kappa"), [(torch.float32, 1000.0), (torch.float32, 1e-4), (torch.float64, 1e-4)])
def test_under_torch_func(dtype, kappa):
    """There the host cannot look at values, and nothing may be lost of small rotations either."""
    k = 70
    theta, grad = theta_of_norm(k, kappa, batch=2, dtype=dtype), torch.randn(2, k, k, dtype=dtype)
    with sk.use_backend("reference"):
        E, pullback = torch.func.vjp(torch.func.vmap(lambda theta: sk.cayley_delta(theta, k)), theta)
    assert_right_for_any_k(theta, grad, k, E, pullback(grad)[0])
    exact = exact_delta(theta, k)
    assert relative_error(E, exact) <= (twice(solved_delta(theta, k), exact) if dtype.itemsize == 4 else in_float64(k))


def test_compiled_graphs():
    k = 66
    theta = theta_of_norm(k, 1000.0, dtype=torch.float32)
    with sk.use_backend("reference"):
        E = torch.compile(lambda theta: sk.cayley_delta(theta, k), fullgraph=True, backend="eager")(theta)
    assert_within(E, solved_delta(theta, k), exact_delta(theta, k))


def test_backends_decide_alike():
    header = (Path(__file__).parents[2] / "csrc" / "cayley.h").read_text()
    found = [float(re.search(rf"{name} = (\S+);", header)[1]) for name in ("kLarge", "kNotUnit")]
    assert found == [constants.LARGE, constants.NOT_UNIT]


def test_fake_tensors():
    with sk.use_backend("reference"), FakeTensorMode():
        assert sk.cayley_delta(torch.zeros(2, 3), 3).shape == (2, 3, 3)


def test_a_layer():
    """W' = W + U Sigma E V^T, which is all that is left of theta, to twice the error of plain PyTorch."""
    k = 80
    linear = nn.Linear(96, 96)
    layer = sk.SSVDLinear.from_linear(linear, sk.SSVDConfig(rank=k))
    theta = theta_of_norm(k, 1000.0, dtype=torch.float32)
    layer.theta.data.copy_(theta[0])

    def weight(dtype: torch.dtype) -> Tensor:
        U, V, sigma, W = (each.detach().to(dtype) for each in (layer.U, layer.V, layer.sigma, linear.weight))
        return W + U @ (sigma[:, None] * solved_delta(theta.to(dtype), k)[0]) @ V.mT

    assert_within(layer.weight.detach(), weight(torch.float32), weight(torch.float64))
