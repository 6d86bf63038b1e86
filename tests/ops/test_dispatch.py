"""Bad arguments of the functions and the layer, and forced modes and backends that cannot serve: errors that say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from cases import linear_inputs
from torch import nn

import ssvd_kernels as sk
from ssvd_kernels.ops import dispatch, extension

# -- arguments ---------------------------------------------------------------------------------------------------------

FLOATING = r"must have a floating-point dtype, got torch\."
ELSEWHERE = "must be on the same device as `x` "
FROZEN = "must be frozen, got requires_grad=True"
MODE = "`mode` must be one of 'auto', 'composed', 'factored', got "


@pytest.mark.parametrize("function", [sk.cayley, sk.cayley_delta])
@pytest.mark.parametrize(
    ("theta", "k", "error", "match"),
    [
        (torch.zeros(5), 4, ValueError, r"`theta` must have shape \(\.\.\., 6\).*k=4.*got \(5,\)"),
        (torch.zeros(6, 1), 4, ValueError, r"`theta` must have shape \(\.\.\., 6\).*k=4.*got \(6, 1\)"),
        (torch.zeros(1), 1, ValueError, r"`theta` must have shape \(\.\.\., 0\).*k=1.*got \(1,\)"),
        (torch.zeros(()), 2, ValueError, r"`theta` must have shape \(\.\.\., 1\).*k=2.*got \(\)"),
        (torch.zeros(6, dtype=torch.int64), 4, TypeError, rf"`theta` {FLOATING}int64"),
        (torch.zeros(6, dtype=torch.bool), 4, TypeError, rf"`theta` {FLOATING}bool"),
        (torch.zeros(0), 0, ValueError, r"`k` must be an integer >= 1, got 0"),
        (torch.zeros(6), -3, ValueError, r"`k` must be an integer >= 1, got -3"),
        (torch.zeros(6), 4.0, ValueError, r"`k` must be an integer >= 1, got 4\.0"),
    ],
    ids=str,
)
def test_cayley_refuses(function, theta, k, error, match):
    with pytest.raises(error, match=match):
        function(theta, k)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(3, 5)}, ValueError, r"`x` must have shape \(\.\.\., 6\) .*got \(3, 5\)"),
        ({"x": torch.zeros(())}, ValueError, r"`x` must have shape \(\.\.\., 6\) .*got \(\)"),
        ({"x": torch.zeros(3, 6, dtype=torch.int64)}, TypeError, rf"`x` {FLOATING}int64"),
        ({"x": torch.zeros(3, 6).double()}, ValueError, r"`weight` must .*`x` \(torch\.float64\), got torch\.float32"),
        ({"x": torch.zeros(3, 6, device="meta")}, ValueError, rf"{ELSEWHERE}\(meta\), got cpu"),
        ({"weight": torch.zeros(5)}, ValueError, r"`weight` and `U` must have shapes \(d_out, d_in\) .*got \(5,\)"),
        ({"weight": torch.zeros(5, 6, dtype=torch.int8)}, (TypeError, ValueError), r"weight.*torch\.int8"),
        ({"U": torch.zeros(5)}, ValueError, r"`weight` and `U` must have shapes .*and \(5,\)"),
        ({"V": torch.zeros(6, 3, device="meta")}, ValueError, rf"`V` {ELSEWHERE}\(cpu\), got meta"),
        ({"U": torch.zeros(4, 3)}, ValueError, r"`U` must have shape \(5, 3\) .*got \(4, 3\)"),
        ({"V": torch.zeros(6, 2)}, ValueError, r"`V` must have shape \(6, 3\) .*got \(6, 2\)"),
        ({"core": torch.zeros(3, 2)}, ValueError, r"`core` must have shape \(3, 3\) .*got \(3, 2\)"),
        ({"core": torch.zeros(3, 3, dtype=torch.int64)}, (TypeError, ValueError), r"core.*torch\.int64"),
        ({"bias": torch.zeros(1)}, ValueError, r"`bias` must have shape \(5,\) .*got \(1,\)"),
        ({"weight": torch.zeros(5, 6, requires_grad=True)}, ValueError, f"`weight` {FROZEN}"),
        ({"U": torch.zeros(5, 3, requires_grad=True)}, ValueError, f"`U` {FROZEN}"),
        ({"mode": "fast"}, ValueError, f"{MODE}'fast'"),
        ({"mode": "merged"}, ValueError, f"{MODE}'merged'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ssvd_linear_refuses(change, error, match):
    arguments = {key: value for key, value in linear_inputs((4, 6, 5, 3), torch.float32).items() if key != "dy"}
    with pytest.raises(error, match=match):
        sk.ssvd_linear(**{**arguments, **change})


def test_layer_refuses_inputs_that_do_not_fit():
    layer = sk.SSVDLinear.from_linear(nn.Linear(6, 5), sk.SSVDConfig(rank=3))
    for training in (True, False):
        layer.train(training)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                with pytest.raises((ValueError, RuntimeError), match=r"\(3, 5\)|3x5"):
                    layer(torch.zeros(3, 5))
                with pytest.raises((ValueError, RuntimeError), match=r"float64|Double|dtype"):
                    layer(torch.zeros(3, 6, dtype=torch.float64))


# -- forced modes and backends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False], ids=["training", "eval"])
def test_forced_mode_that_does_not_exist_raises(grad):
    layer = sk.SSVDLinear.from_linear(nn.Linear(6, 5), sk.SSVDConfig(rank=3)).train(grad)
    layer.mode = "compsoed"
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=f"{MODE}'compsoed'"):
        layer(torch.zeros(3, 6))


@pytest.mark.parametrize("grad", [True, False], ids=["training", "eval"])
def test_forced_backend_that_cannot_serve_raises(grad):
    layer = sk.SSVDLinear.from_linear(nn.Linear(6, 5, dtype=torch.float64), sk.SSVDConfig(rank=3)).train(grad)
    x = torch.zeros(3, 6, dtype=torch.float64)
    expected = layer(x).detach()
    layer.eval().train(grad)  # drops what was cached
    refusal = r"'triton' does not support (cayley|linear) on cpu in torch\.float64: \w+"
    with torch.set_grad_enabled(grad), sk.use_backend("triton"), pytest.raises(RuntimeError, match=refusal):
        layer(x)
    assert torch.equal(layer(x).detach(), expected)  # and the choice is free again


def test_forced_extension_that_is_not_there_raises(monkeypatch):
    monkeypatch.setattr(extension, "supports", lambda device: "_C was not built: no compiler")
    theta = torch.zeros(3)
    assert torch.equal(sk.cayley_delta(theta, 3), torch.zeros(3, 3))  # auto falls back
    refusal = r"'ext' does not support cayley on cpu in torch\.float32: .*no compiler"
    with sk.use_backend("ext"), pytest.raises(RuntimeError, match=refusal):
        sk.cayley_delta(theta, 3)
    with pytest.raises(ValueError, match=r"`name` must be one of 'auto', 'reference', 'ext', 'triton', got 'cuda'"):
        with sk.use_backend("cuda"):
            pass
    assert dispatch.forced == "auto"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SSVD_BACKEND": "gpu"}, "`SSVD_BACKEND` must be one of 'auto', 'reference', 'ext', 'triton', got 'gpu'"),
        (
            {"SSVD_BACKEND": "ext", "SSVD_DISABLE_EXT": "1"},
            "'ext' does not support cayley on cpu in torch.float32: SSVD_D",
        ),
    ],
    ids=["unknown", "disabled"],
)
def test_backend_forced_by_the_environment_that_cannot_serve_raises(variables, expected):
    program = "import torch, ssvd_kernels as sk; sk.cayley(torch.zeros(3), 3)"
    environment = {**os.environ, **variables, "PYTHONPATH": str(Path(sk.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and expected in run.stderr


@pytest.mark.parametrize(("n", "padded"), [(32, 0), (24, 2)])
def test_the_cayley_backward_pads_only_what_other_backends_computed(n, padded, monkeypatch):
    pads: list[tuple[int, ...]] = []
    kernels = Mock(cayley_delta_backward=lambda grad, E, k: (grad.shape, E.shape))
    monkeypatch.setattr(dispatch, "backend_for", lambda *_: "triton")
    monkeypatch.setattr(dispatch.triton_linear, "kernels", lambda: kernels)
    monkeypatch.setattr(dispatch.F, "pad", lambda matrix, pad: pads.append(pad) or torch.zeros(1, 32, 32))
    E = torch.zeros(1, n, n)
    with sk.use_backend("triton"):
        assert dispatch.cayley_delta_backward(E, E, 21) == 2 * ((1, 32, 32),)
    assert pads == padded * [(0, 8, 0, 8)]
