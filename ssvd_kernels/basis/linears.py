"""The layers that can be adapted: plain linear layers, those quantised by bitsandbytes or torchao, and pointwise ones.

This module does not import a quantisation library: code that has such a layer has already imported its library.
"""

from __future__ import annotations

import sys
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..utils.fsdp import is_sharded
from .forwards import computed_as
from .pointwise import CONVOLUTIONS, is_pointwise, is_transposed, matrix_of, why_not_pointwise

_OTHER_LIBRARIES = {"hqq": "HQQ", "awq": "AutoAWQ", "auto_gptq": "AutoGPTQ", "gptqmodel": "GPTQModel"}
_LINEAR = "an nn.Linear with its own weight and forward (which may only cast the weight to x's dtype)"


def is_linear(module: object) -> bool:
    """Whether `module` computes x W^T + b from a plain parameter W (a parametrized one, say, does not)."""
    if not isinstance(module, nn.Linear):
        return False
    weight = module._parameters.get("weight")
    # not of a tensor subclass, which may compute otherwise, nor a lazy one, which has no values yet
    return (type(weight) in (Tensor, nn.Parameter) or is_sharded(weight)) and computed_as(module) is not None


def is_quantized(module: object) -> TypeGuard[nn.Linear]:
    """Whether `module` is a linear layer whose weight one of the libraries above has quantised, or is about to."""
    return is_bitsandbytes(module) or _is_torchao(module)


def is_foreign(module: object) -> bool:
    """Whether `module` is a linear layer that another library has quantised."""
    kind = type(module)
    return kind.__module__.partition(".")[0] in _OTHER_LIBRARIES and "Linear" in kind.__name__


def check_library(module: nn.Module, name: str) -> None:
    """Raises TypeError for a layer that `is_foreign`."""
    if is_foreign(module):
        library = _OTHER_LIBRARIES[type(module).__module__.partition(".")[0]]
        raise TypeError(
            f"`{name}` is a {type(module).__name__} of {library}, whose weights SSVD cannot read: quantise by "
            "bitsandbytes or torchao, or leave it out (`exclude`)"
        )


def quantizes_input(linear: nn.Linear) -> bool:
    """Whether a layer that `is_quantized` rounds not only its weight but x, too (to 8 bits, say)."""
    kinds = "act_quant_kwargs", "activation_quantization"  # as torchao's weights say
    own = any(getattr(linear.weight, kind, None) is not None for kind in kinds)
    return own or is_bitsandbytes(linear, "Linear8bitLt")


def input_dtype(linear: nn.Linear, dtype: torch.dtype) -> torch.dtype:
    """The dtype to which `linear` rounds an x of `dtype`: bitsandbytes' 4-bit layers may have a narrower one."""
    own = linear.compute_dtype if is_bitsandbytes(linear, "Linear4bit") and linear.compute_type_is_set else None
    return own if isinstance(own, torch.dtype) and own.itemsize < dtype.itemsize else dtype


def is_adaptable(module: object) -> bool:
    """Whether SSVD can adapt `module`: a plain nn.Linear, a quantised or a pointwise layer."""
    return is_quantized(module) or is_linear(module) or is_pointwise(module) or is_transposed(module)


def features(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a layer that `is_adaptable`."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    d_out, d_in = base_weight(module).shape
    return d_in, d_out


def check_linear(module: object, name: str) -> None:
    """Raises TypeError unless `module` is an nn.Linear (or a subclass that computes the same from a plain weight)."""
    if is_quantized(module):
        raise TypeError(
            f"`{name}` must be an unquantised nn.Linear, got a quantised {type(module).__name__}: use inject or "
            "SSVDQuantizedLinear"
        )
    if not is_linear(module):
        raise TypeError(f"`{name}` must be {_LINEAR}, got {type(module).__name__}")


def check_adaptable(module: nn.Module, name: str, origin: str = "") -> None:
    """Raises TypeError unless `module` `is_adaptable` and computes what its class does; `origin` follows its name in
    the message."""
    if not is_adaptable(module):
        check_library(module, name)
        if isinstance(module, CONVOLUTIONS) and (reason := why_not_pointwise(module)) is not None:
            raise TypeError(
                f"`{name}`{origin} must be a convolution of kernel size 1, stride 1, no padding and one group, got "
                f"{type(module).__name__} with {reason}"
            )
        raise TypeError(
            f"`{name}`{origin} must be {_LINEAR}, or one quantised by bitsandbytes or torchao, "
            f"got {type(module).__name__}"
        )
    if "forward" in module.__dict__ and not is_quantized(module):  # whose own forward is called
        raise TypeError(
            f"`{name}` has a `forward` of its own, set on the instance (by offloading, say), which an adapted layer "
            "would not call: adapt the model first, then patch or offload it"
        )


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """From now on the hooks of `source` are those of `target`, too; handles remove them from both."""
    for name, value in source.__dict__.items():
        if name.startswith(("_forward_hooks", "_forward_pre_hooks", "_backward", "_is_full_backward_hook")):
            target.__dict__[name] = value


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """`share_hooks`, of which `source`, which `target` calls, keeps none."""
    share_hooks(source, target)
    share_hooks(nn.Identity(), source)  # a new module's: none


def base_weight(linear: nn.Module, name: str = "linear") -> Tensor:
    """W (d_out, d_in) of a layer that `is_adaptable`; a quantised one's is dequantised anew by its own library.

    Raises ValueError for a bitsandbytes layer that holds no quantised weight (such layers quantise when they are moved
    to their device), or one repacked for inference, which cannot be dequantised.
    """
    if not isinstance(linear, nn.Linear):
        weight: Tensor = linear.weight  # type: ignore[assignment]
        return matrix_of(weight, linear)
    if _is_torchao(linear):
        return linear.weight.detach().dequantize()
    if not is_bitsandbytes(linear):
        return linear.weight
    functional, weight = sys.modules["bitsandbytes"].functional, linear.weight
    kind, state = type(linear).__name__, getattr(weight, "quant_state", None)
    if is_bitsandbytes(linear, "Linear8bitLt") and weight.dtype == torch.int8:
        scales = linear.state.SCB if weight.SCB is None else weight.SCB  # type: ignore[union-attr, attr-defined]
        return functional.int8_vectorwise_dequant(weight.data, scales)
    if state is None:
        raise ValueError(
            f"`{name}` must be quantised, got a {kind} with a {weight.dtype} weight: move it to its device to "
            "quantise it (in 8 bits with has_fp16_weights=False)"
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"`{name}` is a {kind} whose weight bitsandbytes repacked for CPU inference in its first forward pass in "
            "eval mode: reload the model and adapt it before any forward pass"
        )
    return functional.dequantize_4bit(weight.data, state)


def is_bitsandbytes(module: object, *kinds: str) -> bool:
    """Whether `module` is a layer of bitsandbytes, of one of these kinds if any are named."""
    library = sys.modules.get("bitsandbytes.nn")
    if library is None:
        return False
    return isinstance(module, tuple(getattr(library, kind) for kind in kinds or ("Linear4bit", "Linear8bitLt")))


def _is_torchao(module: object) -> bool:
    library = sys.modules.get("torchao.utils")
    if library is None or not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    return isinstance(module._parameters.get("weight"), library.TorchAOBaseTensor)


def parameter_count(model: nn.Module) -> int:
    """The number of parameters of `model`; quantised weights are counted unpacked."""
    quantized = [module for module in model.modules() if is_quantized(module)]
    unpacked = sum(linear.out_features * linear.in_features - linear.weight.numel() for linear in quantized)
    return sum(parameter.numel() for parameter in model.parameters()) + unpacked
