"""A small network, quantised by each library: bitsandbytes in 4 and 8 bits, torchao in 4 and 8."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from models import adapt
from torch import Tensor, nn

from ssvd_kernels.basis.linears import is_quantized

K = 8


class Net(nn.Module):
    """Dimensions that every quantiser takes; the frozen norm makes the first layer's input need no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


def _bitsandbytes(net: nn.Module, make: Callable) -> None:
    for name, linear in list(net.named_children()):
        if isinstance(linear, nn.Linear):
            quantized = make(linear.in_features, linear.out_features, linear.bias is not None)
            quantized.weight.data = linear.weight.data
            quantized.bias = linear.bias
            setattr(net, name, quantized.to(linear.weight.device))  # which quantises


def nf4(net: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit

    _bitsandbytes(net, lambda *shape: Linear4bit(*shape, quant_type="nf4"))


def int8(net: nn.Module) -> None:
    from bitsandbytes.nn import Linear8bitLt

    _bitsandbytes(net, lambda *shape: Linear8bitLt(*shape, has_fp16_weights=False))


def torchao_int8(net: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(net, Int8WeightOnlyConfig())


def torchao_int4(net: nn.Module) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    quantize_(net, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def needs(library: str, kind: object) -> object:
    missing = importlib.util.find_spec(library) is None
    return pytest.param(kind, marks=pytest.mark.skipif(missing, reason=f"needs {library}"))


BITSANDBYTES = [needs("bitsandbytes", kind) for kind in (nf4, int8)]
KINDS = [*BITSANDBYTES, *(needs("torchao", kind) for kind in (torchao_int8, torchao_int4))]


def net_of(kind: Callable, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net().to(device, dtype)
    kind(net)
    return net


def adapted(kind: Callable, dtype: torch.dtype = torch.float32, device: str = "cpu", **options) -> Net:
    return adapt(net_of(kind, dtype, device), rank=K, **options)


def numbers(net: nn.Module) -> dict[str, Tensor]:
    """What the quantising library holds."""
    found = {}
    for name, module in net.named_modules():
        if is_quantized(module):
            weight = module.weight
            found[name] = weight.dequantize() if hasattr(weight, "tensor_data_names") else weight.data.clone()
    assert found
    return found


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
