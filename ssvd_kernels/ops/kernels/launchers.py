"""Every launcher that `dispatch` calls; `custom_ops` has the same names for torch.compile."""

from .cayley import cayley_delta, cayley_delta_backward
from .compose import add_update, compose
from .launch import core_grad
from .ssvd_activation import ssvd_activation_bwd, ssvd_activation_fwd
from .ssvd_linear import ssvd_linear_bwd, ssvd_linear_fwd

__all__ = [
    "add_update",
    "cayley_delta",
    "cayley_delta_backward",
    "compose",
    "core_grad",
    "ssvd_activation_bwd",
    "ssvd_activation_fwd",
    "ssvd_linear_bwd",
    "ssvd_linear_fwd",
]
