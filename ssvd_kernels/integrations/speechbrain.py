"""SpeechBrain: SSVDAdapter for `speechbrain.nnet.adapters.AdaptedModel`, which calls adapter_class(module, **kwargs).

    AdaptedModel(model, SSVDAdapter, target_layers=["*.q_proj"], adapter_kwargs={"ratio": 0.4})

AdaptedModel saves only what requires a gradient, and loads with strict=False. The data that identifies theta's basis is
therefore saved along with it. Like `load_adapter`, loading repairs signs and rejects any other mismatch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..basis.factorize import SAFE_GAP, SKETCH_ROWS, match_signs
from ..basis.pointwise import is_pointwise, is_transposed
from ..config import BasisDtype, Form, Rotation, Side, SSVDConfig
from ..layers.activation import SSVDActivationLinear, SSVDPointwise
from ..layers.adapt import check_method
from ..layers.base_layer import BASES
from ..layers.inactive import TRAINED
from ..layers.ssvd import SSVDLinear


class SSVDAdapter(SSVDLinear):
    """SSVDLinear(linear) with the choices of `SSVDConfig` as arguments; exactly one of rank and ratio.

    Give AdaptedModel the pretrained weights first, or manual_adapter_insertion=True and insert_adapters() after they
    are loaded: the constructor factorises the weight that `linear` holds, and base weights loaded later are refused.
    `ssvd_kernels.save_adapter`, `load_adapter` and `merge` work on the AdaptedModel. Each layer computes its own
    rotation; `ssvd_kernels.inject` would compute all of them in one batch. Errors as SSVDLinear.
    `linear` may be a convolution of kernel 1, such as the attribute `conv` of SpeechBrain's own (target "*.conv.conv").
    """

    def __new__(cls, linear: nn.Module | None = None, *args: Any, form: Form = "auto", **options: Any) -> SSVDAdapter:
        if cls is SSVDAdapter:
            if is_pointwise(linear) or is_transposed(linear):
                cls = SSVDPointwiseAdapter
            elif form == "activation":
                cls = SSVDActivationAdapter
        return super().__new__(cls)

    def __init__(
        self,
        linear: nn.Linear,
        rank: int | None = None,
        ratio: float | None = None,
        side: Side = "input",
        rotation: Rotation = "cayley",
        rank_out: int | None = None,
        ratio_out: float | None = None,
        band: int | None = None,
        *,
        form: Form = "auto",
        basis_dtype: BasisDtype = "auto",
    ) -> None:
        more = {"rank_out": rank_out, "ratio_out": ratio_out, "band": band, "form": form, "basis_dtype": basis_dtype}
        config = SSVDConfig(rank, ratio, side, rotation, **more)  # type: ignore[arg-type]
        check_method(linear, config, "`linear`")
        super().__init__(linear, config)

    def get_extra_state(self) -> Tensor:
        """[length of text, text, sketch]: what theta means and on which basis; a tensor that is saved as if trained."""
        text = list(self._meaning().encode())
        return torch.cat([torch.tensor([len(text), *text]), self.basis.sketch.flatten()]).requires_grad_()

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to do: compared before anything is loaded."""

    def _meaning(self) -> str:
        rotation = self.rotation if self.band is None else f"{self.rotation}, band={self.band}"
        return f"base weight {self.basis.fingerprint}, k={self.k_in}, {self.k_out}, {self.side}, {rotation}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars and self.basis.gap < SAFE_GAP:  # cannot be recomputed safely: to be saved, too
            for key in self._basis_names():
                destination[prefix + key] = destination[prefix + key].detach().requires_grad_()

    def _basis_names(self) -> list[str]:
        return [name for name in self._parameters if name in ("sigma", *BASES)]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        error_msgs: list[str] = args[-1]
        signs = None
        if any(prefix + key in state_dict for key in TRAINED) and prefix + "weight" not in state_dict:
            try:
                signs = self._signs(state_dict, prefix)
            except ValueError as error:
                error_msgs.append(f"{prefix[:-1]}: {error}")
                return
        errors_before = len(error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if signs is not None and len(error_msgs) == errors_before:
            self.flip_basis(signs)

    def _signs(self, state_dict: Any, prefix: str) -> Tensor | None:
        """Those that turn the basis into the saved one; None if it is in the state dict. ValueError if nothing does."""
        state = state_dict.get(f"{prefix}_extra_state")
        if state is None:
            raise ValueError("the state dict does not say which singular vectors its theta refers to")
        length = 1 + int(state[0])
        saved = bytes(map(int, state[1:length])).decode()
        if saved != self._meaning():
            raise ValueError(f"saved for {saved}, but the model has {self._meaning()}")
        given = {name for name in BASES if prefix + name in state_dict}
        if given:
            if not given <= set(self._basis_names()):
                raise ValueError(f"its basis is {', '.join(sorted(given))}, that of another `form`")
            return None
        signs = match_signs(state[length:].detach().view(2 * SKETCH_ROWS, -1), self.basis.sketch)
        if signs is None:
            raise ValueError("its singular vectors cannot be matched with those that were adapted")
        return signs


class SSVDActivationAdapter(SSVDActivationLinear, SSVDAdapter):
    """What `SSVDAdapter` makes for form="activation"."""


class SSVDPointwiseAdapter(SSVDPointwise, SSVDAdapter):
    """What `SSVDAdapter` makes of a convolution of kernel 1."""
