"""Every launcher that `dispatch` calls; `ops` has the same names for torch.compile."""

from .compose import compose
from .concat import concat
from .core_grad import core_grad
from .ssvd_linear import core_gradient, ssvd_linear_bwd, ssvd_linear_fwd

__all__ = ["compose", "concat", "core_grad", "core_gradient", "ssvd_linear_bwd", "ssvd_linear_fwd"]
