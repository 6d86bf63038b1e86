"""Any memory layout, number of dimensions and batch size works: strided, expanded, reversed, empty."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import train_randomly
from refusals import inject
from torch import Tensor, nn

import ssvd_kernels as sk


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
    layer = train_randomly(sk.SSVDLinear.from_linear(nn.Linear(6, 4), sk.SSVDConfig(rank=3)))
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
    ulp = 4e-6  # W' is dense, so the library may add up in another order
    torch.testing.assert_close(net(x), F.linear(x, base[0].weight, base[0].bias), rtol=ulp, atol=ulp)
    train_randomly(net)
    sk.save_adapter(net, tmp_path / "a.safetensors")
    sk.load_adapter(base, tmp_path / "a.safetensors", progress=False)
    torch.testing.assert_close(base(x), net(x), rtol=ulp, atol=ulp)
    sk.merge(net)
    torch.testing.assert_close(net.eval()(x), base(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (1, 6), (2, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("mode", ["auto", "composed", "factored"])
def test_any_number_of_dimensions_and_empty_batches_work(shape, mode):
    layer = train_randomly(sk.SSVDLinear.from_linear(nn.Linear(6, 4), sk.SSVDConfig(rank=3)))
    layer.mode = mode
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 4)
    y.sum().backward()
    assert x.grad.shape == shape and torch.isfinite(x.grad).all()
    assert torch.isfinite(layer.theta.grad).all() and (x.numel() == 0) == (not layer.theta.grad.any())
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), rtol=1e-6, atol=1e-6)
