"""Any memory layout, number of dimensions and batch size works: strided, expanded, reversed, empty."""

from __future__ import annotations

import copy

import pytest
import torch
from bounds import DRAWS, assert_within
from cases import together
from models import assert_all_within, passes, references, train_randomly, trained_layer
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
    layer = trained_layer(6, 4, mode, rank=3)

    def one_draw(network: nn.Module, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        x, dy = _layouts(2, 3, 6)[layout], _layouts(2, 3, 4)[layout]
        assert not x.is_contiguous() or layout == "reversed"
        found = passes(network.train(), x, dy)
        with torch.no_grad():
            return {**found, "evaluated": network.eval()(x)}

    def draws(network: nn.Module) -> dict[str, Tensor]:
        return together(one_draw(network, seed) for seed in range(DRAWS))

    net = nn.Sequential(layer)
    assert_all_within(draws(net), *references(net, draws))


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
    net, x = copy.deepcopy(base), torch.randn(16, 6)

    def output(network: nn.Module) -> Tensor:
        return network(x).detach()

    inject(net, rank=1)
    assert_within(output(net), *references(base, output))
    train_randomly(net)
    plain, exact = references(net, output)
    sk.save_adapter(net, tmp_path / "a.safetensors")
    sk.load_adapter(base, tmp_path / "a.safetensors", progress=False)
    sk.merge(net.eval())
    for network in (base, net):
        assert_within(output(network), plain, exact)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (1, 6), (2, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("mode", ["auto", "composed", "factored"])
def test_any_number_of_dimensions_and_empty_batches_work(shape, mode):
    layer = trained_layer(6, 4, mode, rank=3)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 4)
    y.sum().backward()
    assert x.grad.shape == shape and torch.isfinite(x.grad).all()
    assert torch.isfinite(layer.theta.grad).all() and (x.numel() == 0) == (not layer.theta.grad.any())
    xs = torch.randn(DRAWS, *shape)

    def outputs(network: nn.Module) -> Tensor:
        return torch.stack([network(x).detach() for x in xs])

    assert_within(outputs(layer), *references(nn.Sequential(layer), outputs))
