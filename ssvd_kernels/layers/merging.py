"""The weight W' of a merged layer: composed in at least float32, rounded once, and checked."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..config import check_choice
from ..ops import reference

logger = logging.getLogger(__name__)

ROUNDINGS = {"nearest": reference.compose_ref, "stochastic": reference.compose_operand_ref}


@torch.no_grad()
def merged_weight(
    weight: Tensor, U: Tensor, V: Tensor, core: Tensor, rounding: str, name: str, dtype: torch.dtype | None = None
) -> Tensor:
    """W' = weight + U core V^T (d_out, d_in) in `dtype`, by default weight's; `rounding` as for `ssvd_kernels.merge`.

    Raises ValueError, naming `name`, if W' is not finite, or if `rounding` is unknown. Warns if rounding loses the
    update: if the projection of W' - weight on U core V^T is not 1.00 +- 0.02.
    """
    check_choice("rounding", rounding, ROUNDINGS)
    with reference.without_autocast(weight):
        merged = ROUNDINGS[rounding](weight, U, V, core, dtype or weight.dtype)
        if not bool(torch.isfinite(merged).all()):
            raise ValueError(f"merging {name} would produce NaN or infinity in {merged.dtype}: nothing was changed")
        if merged.dtype in (torch.float16, torch.bfloat16) and bool((core != 0).any()):
            update = U.float() @ core.float() @ V.float().mT
            gain = (((merged.float() - weight.float()) * update).sum() / update.square().sum()).item()
            if abs(gain - 1) > 0.02:
                share = f"{100 * gain:.0f} % of the update"
                logger.warning(
                    "merging %s in %s with rounding=%r preserves only %s", name, merged.dtype, rounding, share
                )
    return merged
