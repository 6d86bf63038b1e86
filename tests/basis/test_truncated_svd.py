"""The fast factorisation against the SVD: as accurate where it serves, refused where it would not be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bounds import twice
from cases import relative_error
from roundtrip import SIDES, Net, assert_computes, outputs
from several import injected, train_randomly
from torch import Tensor

import ssvd_kernels as sk
from ssvd_kernels.basis import factorize as factorize_module
from ssvd_kernels.basis.factorize import SAFE_GAP, factorize
from ssvd_kernels.basis.truncated_svd import MIN_SQUARED_GAP, Triplets, by_gram, by_svd, top_triplets

SHAPES = [(160, 160), (300, 160), (160, 300), (1100, 40), (40, 1100), (7, 1), (1, 7), (1, 1)]
EPS = torch.finfo(torch.float64).eps


def _walk(*shape: int) -> float:
    """Relative to the largest: so many roundings add up like a random walk; four of its standard deviations at most."""
    return 4 * max(shape) ** 0.5 * EPS


def _weight(d_out: int, d_in: int, sigma: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(W with the singular values sigma (r,), its U (d_out, r), its V (d_in, r))."""
    r = len(sigma)
    U = torch.linalg.qr(torch.randn(d_out, r, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(d_in, r, dtype=torch.float64))[0]
    return ((U * sigma) @ V.mT).to(dtype), U, V


def _noise_like(r: int) -> Tensor:
    return torch.linspace(2, 0.02, r, dtype=torch.float64)


def _one_outlier(r: int) -> Tensor:
    return torch.cat([torch.tensor([40.0], dtype=torch.float64), _noise_like(r)])[:r]


def _decaying(r: int) -> Tensor:
    return torch.logspace(1, -2, r, dtype=torch.float64)


def _close_pairs(r: int, outlier: float = 40.0) -> Tensor:
    """An outlier, and pairs a relative 1e-6 apart: as close as reloading ever relies on, give or take ten."""
    sigma = _one_outlier(r)
    sigma[0] = outlier
    sigma[2::2] = sigma[1:-1:2] - 1e-6 * sigma[0]
    return sigma


SPECTRA = [_noise_like, _one_outlier, _decaying, _close_pairs]


def _vector_errors(found: Triplets, U: Tensor, V: Tensor) -> Tensor:
    """Distance of each pair (u_i, v_i) from the exact one."""
    k = found[0].shape[1]
    signs = torch.where((found[2] * V[:, :k]).sum(0) < 0, -1.0, 1.0)
    return ((found[0] * signs - U[:, :k]).square().sum(0) + (found[2] * signs - V[:, :k]).square().sum(0)).sqrt()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_the_svd(shape, spectrum):
    sigma = spectrum(min(shape))
    W, U, V = _weight(*shape, sigma)
    for k in {1, 1 + 2 * int(0.2 * len(sigma)), 1 + 2 * int(0.4 * len(sigma))}:  # odd: between two pairs
        fast, slow = by_gram(W, k), by_svd(W, k)
        assert fast is not None
        following = sigma[k] if k < len(sigma) else 0.0
        with_the_rest = EPS * sigma[0] ** 2 / (sigma[k - 1] ** 2 - following**2)
        assert with_the_rest <= EPS / MIN_SQUARED_GAP
        assert _vector_errors(fast, U, V).max() <= 2 * _vector_errors(slow, U, V).max() + with_the_rest + _walk(*shape)
        assert (fast[1] - sigma[:k]).abs().max() <= _walk(*shape) * sigma[0]
        assert abs(fast[3] ** 2 - following**2) <= _walk(*shape) * sigma[0] ** 2  # the Gram matrix has the squares
        for basis in (fast[0], fast[2]):
            assert (basis.mT @ basis - torch.eye(k)).abs().max() <= _walk(*shape)


def test_jacobi_step_makes_up_for_the_squares():
    """Without it, eigenvectors of the Gram matrix alone are far less accurate on such a spectrum."""
    W, U, V = _weight(300, 160, _close_pairs(160, outlier=200.0))
    k, (_, vectors) = 65, torch.linalg.eigh(W.mT @ W)
    plain = vectors.flip(1)[:, :k]
    signs = torch.where((plain * V[:, :k]).sum(0) < 0, -1.0, 1.0)
    fast = by_gram(W, k)
    assert fast is not None
    assert (plain * signs - V[:, :k]).norm(dim=0).max() > 10 * _vector_errors(fast, U, V).max()


REFUSED = {
    "zero": torch.zeros(40, dtype=torch.float64),
    "repeated": torch.ones(40, dtype=torch.float64),
    "two equal": torch.cat([torch.tensor([2.0, 1.0, 1.0]), torch.linspace(0.9, 0.1, 37)]).double(),
    "rank deficient": torch.cat([torch.linspace(2, 1, 10), torch.zeros(30)]).double(),
    "close at the boundary": torch.cat([torch.linspace(2, 1, 16), 1 - 1e-9 - torch.linspace(0, 0.9, 24)]).double(),
    "small": torch.logspace(0, -8, 40, dtype=torch.float64)[[0, 1, 2, *range(23, 40), *range(3, 23)]].sort(0, True)[0],
}


@pytest.mark.parametrize("spectrum", REFUSED)
def test_the_svd_serves_where_squares_would_lose(spectrum):
    k = 16 if spectrum != "small" else 30
    W, _, _ = _weight(60, 40, REFUSED[spectrum])
    assert by_gram(W, k) is None and by_gram(W.mT, k) is None
    U, S, V, following = top_triplets(W, k)
    expected = torch.linalg.svdvals(W)
    bound, scale = _walk(60, 40), float(expected[0])
    assert (S - expected[:k]).abs().max() <= bound * scale and abs(float(following - expected[k])) <= bound * scale
    assert (U.mT @ U - torch.eye(k)).abs().max() <= bound and (V.mT @ V - torch.eye(k)).abs().max() <= bound
    assert (W @ V - U * S).abs().max() <= bound * scale


def test_full_rank_falls_back_only_where_the_last_singular_value_is_small():
    kept, small = torch.linspace(2, 0.1, 40).double(), torch.linspace(2, 1e-5, 40).double()
    found = by_gram(_weight(60, 40, kept)[0], 40)
    assert found is not None and float(found[3]) == 0
    assert by_gram(_weight(60, 40, small)[0], 40) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_weights_are_factorised_in_float64(dtype):
    W = _weight(96, 64, _noise_like(64), dtype)[0]
    found, exact = factorize(W, 24), by_svd(W, 24)
    assert found.U.dtype == found.sigma.dtype == found.V.dtype == torch.float32

    def product(U: Tensor, sigma: Tensor, V: Tensor) -> Tensor:
        return (U.double() * sigma.double()) @ V.double().mT

    plain = [factor.float() for factor in exact[:3]]
    bound = twice(product(*plain), product(*exact[:3]), torch.float32)
    assert relative_error(product(found.U, found.sigma, found.V), product(*exact[:3])) <= bound


def test_gap_is_that_of_the_svd():
    for sigma in (_noise_like(40), _close_pairs(40), REFUSED["repeated"], REFUSED["zero"]):
        W = _weight(60, 40, sigma)[0]
        for k in (5, 40):
            S = torch.cat([torch.linalg.svdvals(W), torch.zeros(1, dtype=torch.float64)])[: k + 1]
            gap = float(((S[:-1] - S[1:]) / S[0].clamp(min=1e-300)).min())
            assert abs(factorize(W, k).gap - gap) <= 1e-3 * SAFE_GAP  # of what is decided by it


def _numpy(W: Tensor, k: int) -> Triplets:
    """Another LAPACK: numpy brings OpenBLAS."""
    U, S, Vh = map(torch.from_numpy, np.linalg.svd(W.double().numpy(), full_matrices=False))
    return U[:, :k], S[:k], Vh[:k].mT, torch.cat([S, S.new_zeros(1)])[k]


@pytest.mark.parametrize(("driver", "side"), list(zip([top_triplets, by_svd, _numpy, _numpy], SIDES)))
def test_adapter_reloads_with_another_driver_and_thread_count(tmp_path, monkeypatch, driver, side):
    base = Net(96, 160, 72)
    with torch.no_grad():
        base.first.weight.copy_(_weight(160, 96, _one_outlier(96))[0])
    net = injected(base, rank=None, ratio=0.4, side=side)
    train_randomly(net, scale=0.5)
    sk.save_adapter(net, tmp_path / "a.safetensors")
    monkeypatch.setattr(factorize_module, "top_triplets", driver)
    torch.set_num_threads(2)
    sk.load_adapter(base, tmp_path / "a.safetensors", progress=False)
    torch.set_num_threads(1)
    assert_computes(outputs(base), net)
