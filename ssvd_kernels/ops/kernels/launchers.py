"""Every launcher that `dispatch` calls; `custom_ops` has the same names for torch.compile."""

from .cayley import cayley_delta, cayley_delta_backward
from .compose import compose
from .linear_and_projection import concat
from .split_k import core_grad
from .ssvd_activation import ssvd_activation_bwd, ssvd_activation_fwd
from .ssvd_linear import ssvd_linear_bwd, ssvd_linear_fwd

__all__ = [
    "cayley_delta",
    "cayley_delta_backward",
    "compose",
    "concat",
    "core_grad",
    "ssvd_activation_bwd",
    "ssvd_activation_fwd",
    "ssvd_linear_bwd",
    "ssvd_linear_fwd",
]
