"""Every launcher that `dispatch` calls; `ops` has the same names for torch.compile."""

from .compose import compose
from .ssvd_linear import core_gradient, ssvd_linear_bwd, ssvd_linear_fwd

__all__ = ["compose", "core_gradient", "ssvd_linear_bwd", "ssvd_linear_fwd"]
