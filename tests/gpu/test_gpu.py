"""On a CUDA device: accuracy of the Cayley op and the linear op, streams, host syncs, graphs, memory, repeatability.

Run as a program (tests/support on PYTHONPATH) it makes one small pass of each op, for compute-sanitizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from bounds import DRAWS, assert_right_for_any_k, assert_within, in_float64, twice, twice_of_draws
from cases import exact_delta, linear_inputs, naive_linear, relative_error, solved_delta, theta_of_norm, together
from models import op_passes, references
from test_gpu_activation import activation_is_accurate, activation_on_device
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.ops import extension

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
F32, HALF, CAYLEY = torch.float32, [torch.float16, torch.bfloat16], ["reference", "ext", "triton"]
RANKS = [1, 2, 63, 64, 65, 153, 409, 512]
# (tokens, d_in, d_out, k)
SHAPES = [
    (1, 64, 64, 8), (1, 7, 5, 1), (37, 100, 60, 1), (130, 72, 96, 72), (64, 384, 384, 153), (1, 384, 1536, 153),
    (200, 130, 67, 65), (257, 1024, 640, 409), (1500, 1280, 1280, 128),
]  # fmt: skip


@pytest.fixture(params=CAYLEY)
def cayley_backend(request: pytest.FixtureRequest) -> str:
    if request.param == "ext" and (reason := extension.supports(DEVICE)) is not None:
        pytest.skip(reason)
    with sk.use_backend(request.param):
        yield request.param


def cayley_passes(theta: Tensor, grad: Tensor, k: int, op: Callable = sk.cayley_delta) -> tuple[Tensor, Tensor]:
    theta = theta.detach().requires_grad_()
    E = op(theta, k)
    return E.detach(), torch.autograd.grad(E, theta, grad)[0]


solve_passes = partial(cayley_passes, op=solved_delta)  # torch.linalg.solve under autograd, one matrix at a time


def on_device(
    shape: tuple[int, int, int, int], dtype: torch.dtype, bases: torch.dtype | None = None, seed: int = 0
) -> dict:
    inputs = {name: t.to(DEVICE) for name, t in linear_inputs(shape, dtype, seed=seed).items()}
    return inputs | {name: inputs[name].to(bases or dtype) for name in ("U", "V")}


# -- the Cayley op -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("k", RANKS)
def test_cayley_error(cayley_backend, k, B, dtype):
    if cayley_backend == "triton" and dtype == torch.float64:
        pytest.skip("float32 only: test_triton_cayley.py has the refusal")
    count = DRAWS if k < 8 else 1
    draws = [(theta_of_norm(k, 0.7, B).to(dtype), torch.randn(B, k, k, dtype=dtype)) for _ in range(count)]
    exact = list(zip(*(solve_passes(theta.double(), grad.double(), k) for theta, grad in draws)))
    plain = list(zip(*(solve_passes(theta, grad, k) for theta, grad in draws)))
    theta, grad = draws[0]
    for value, theirs, truths in zip(cayley_passes(theta.to(DEVICE), grad.to(DEVICE), k), plain, exact, strict=True):
        bound = in_float64(k) if dtype == torch.float64 else twice_of_draws(zip(theirs, truths))
        assert relative_error(value.cpu(), truths[0]) <= bound


@pytest.mark.parametrize("k", [2, 65, 400])
def test_cayley_of_large_rotations(cayley_backend, k):
    theta = torch.cat([theta_of_norm(k, kappa, dtype=torch.float32) for kappa in (0.1, 10.0, 100.0, 1000.0)])
    grad = torch.randn(len(theta), k, k)
    E, dtheta = cayley_passes(theta.to(DEVICE), grad.to(DEVICE), k)
    assert_right_for_any_k(theta, grad, k, E.cpu(), dtheta.cpu())


@pytest.mark.parametrize("k", [1, 2, 65])
def test_cayley_of_an_empty_batch(cayley_backend, k):
    E, dtheta = cayley_passes(torch.empty(0, k * (k - 1) // 2, device=DEVICE), torch.empty(0, k, k, device=DEVICE), k)
    assert E.shape == (0, k, k) and dtheta.shape == (0, k * (k - 1) // 2)


@pytest.mark.parametrize("k", [65, 512])
def test_cayley_on_another_stream(cayley_backend, as_trained, k):
    """theta is written by the stream of the caller, late: a kernel on any other stream would read NaN."""
    ready, grad = theta_of_norm(k, 0.7, 2, torch.float32).to(DEVICE), torch.randn(2, k, k, device=DEVICE)
    cayley_passes(ready, grad, k)
    theta, stream = torch.full_like(ready, float("nan")), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        theta.copy_(ready)
        E, dtheta = cayley_passes(theta, grad, k)
    stream.synchronize()
    ready, grad = ready.cpu(), grad.cpu()
    exact = solve_passes(ready.double(), grad.double(), k)
    for value, plain, truth in zip((E, dtheta), solve_passes(ready, grad, k), exact, strict=True):
        assert_within(value.cpu(), plain, truth)


@pytest.mark.parametrize("k", [1, 64, 409])
def test_cayley_does_not_wait_for_the_device(cayley_backend, as_trained, no_sync, k):
    theta, grad = theta_of_norm(k, 0.7, 3, torch.float32).to(DEVICE), torch.randn(3, k, k, device=DEVICE)
    expected = cayley_passes(theta, grad, k)
    no_sync()
    again = cayley_passes(theta, grad, k)
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(again, expected))


# -- the linear op -------------------------------------------------------------------------------------------------


def linear_is_accurate(draws: list[dict], dtype: torch.dtype, mode: str) -> None:
    """Output and gradients, those of all draws taken together."""
    found = [op_passes(inputs, mode) for inputs in draws]
    plain, exact = ([naive_linear(inputs, kind) for inputs in draws] for kind in (dtype, torch.float64))
    for f, e in zip(found, exact):
        assert all(f[name].shape == e[name].shape for name in e)
    found, plain, exact = map(together, (found, plain, exact))
    for name, truth in exact.items():
        assert relative_error(found[name], truth) <= twice(plain[name], truth, dtype), name


def draws_of(shape: tuple[int, int, int, int], dtype: torch.dtype, bases: torch.dtype | None = None) -> list[dict]:
    """Many where a draw has few numbers: over one of them the yardstick would be luck."""
    count = 1 if min(shape) > 16 else DRAWS if shape[-1] > 1 else DRAWS**2  # dcore may be one number
    return [on_device(shape, dtype, bases, 1000 * seed) for seed in range(count)]


@pytest.mark.parametrize("mode", ["factored", "composed"])
@pytest.mark.parametrize(("dtype", "bases"), [(of, of) for of in (F32, *HALF)] + [(half, F32) for half in HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_linear_error(shape, dtype, bases, mode):
    with sk.use_backend("triton"):
        linear_is_accurate(draws_of(shape, dtype, bases), dtype, mode)


@pytest.mark.parametrize("mode", ["factored", "composed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_linear_takes_any_strides(dtype, mode):
    inputs = on_device((90, 96, 130, 33), dtype)
    with sk.use_backend("triton"):
        strided = {name: torch.stack([t, t], -1)[..., 0] for name, t in inputs.items()}
        strided |= {name: inputs[name].mT.contiguous().mT for name in ("weight", "core", "dy")}
        linear_is_accurate([strided], dtype, mode)
        deep = {**inputs, "x": inputs["x"].view(5, 18, 96), "dy": inputs["dy"].view(5, 18, 130)}
        deep = op_passes({**deep, "x": deep["x"].transpose(0, 1), "dy": deep["dy"].transpose(0, 1)}, mode)
    plain, exact = (naive_linear(inputs, kind) for kind in (dtype, torch.float64))
    for name in ("y", "dx"):
        assert_within(deep[name].transpose(0, 1).reshape(exact[name].shape), plain[name], exact[name], name)
    expanded = {**inputs, "dy": inputs["dy"][:1, :1].expand_as(inputs["dy"])}  # what sum().backward() hands over
    with sk.use_backend("triton"):
        linear_is_accurate([expanded], dtype, mode)


@pytest.mark.parametrize("mode", ["factored", "composed"])
def test_triton_linear_of_no_tokens(mode):
    with sk.use_backend("triton"):
        results = op_passes(on_device((0, 64, 48, 16), torch.bfloat16), mode)
    assert results["y"].shape == (0, 48) and results["dx"].shape == (0, 64)
    assert not results["dcore"].any() and not results["dbias"].any()


@pytest.mark.parametrize("mode", ["factored", "composed"])
def test_linear_on_another_stream(as_trained, mode):
    inputs = on_device((300, 384, 384, 153), torch.bfloat16)
    stream = torch.cuda.Stream()
    late = {**inputs, "x": torch.full_like(inputs["x"], float("nan"))}
    with sk.use_backend("triton"):
        op_passes(inputs, mode)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            late["x"].copy_(inputs["x"])
            results = op_passes(late, mode)
        stream.synchronize()
    plain, exact = (naive_linear(inputs, kind) for kind in (torch.bfloat16, torch.float64))
    for name, truth in exact.items():
        assert relative_error(results[name], truth) <= twice(plain[name], truth, torch.bfloat16), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["factored", "composed", "auto"])
def test_linear_does_not_wait_for_the_device(as_trained, no_sync, mode, dtype):
    inputs = on_device((300, 384, 384, 153), dtype)
    op_passes(inputs, mode)
    no_sync()
    op_passes(inputs, mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["factored", "composed"])
def test_same_bits_at_every_run(as_trained, mode, dtype):
    inputs = on_device((4096, 384, 512, 153), dtype)
    theta, grad = theta_of_norm(153, 0.7, 3, torch.float32).to(DEVICE), torch.randn(3, 153, 153, device=DEVICE)
    with sk.use_backend("triton"):
        first, rotation = op_passes(inputs, mode), cayley_passes(theta, grad, 153)
        for _ in range(5):
            again = op_passes(inputs, mode)
            assert all(torch.equal(again[name], first[name]) for name in first)
            assert all(torch.equal(a, b) for a, b in zip(cayley_passes(theta, grad, 153), rotation))


@pytest.mark.parametrize("kappa", [1e-4, 1e-3, 1e-2, 1e-1])
def test_auto_mode_keeps_small_updates_in_bf16(as_trained, kappa):
    """Gain of the realised update 1.00 +- 0.02: over 16 M outputs the rounding of y averages out, not that of W'."""
    T, d, k = 16384, 1024, 409
    U, V = (torch.linalg.qr(torch.randn(d, k, device=DEVICE, dtype=torch.float64))[0].float() for _ in range(2))
    weight = (torch.randn(d, d, device=DEVICE) / d**0.5).bfloat16()
    E = exact_delta(theta_of_norm(k, kappa), k)[0].to(DEVICE, torch.float32)
    core = torch.linspace(2, 0.5, k, device=DEVICE)[:, None] * E
    x = torch.randn(T, d, device=DEVICE).bfloat16()
    realised = sk.ssvd_linear(x, weight, U, V, core).double() - x.double() @ weight.double().mT
    update = ((x.double() @ V.double()) @ core.double().mT) @ U.double().mT
    assert abs(((realised * update).sum() / update.square().sum()).item() - 1) <= 0.02


# -- layers and models ---------------------------------------------------------------------------------------------


def small_model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 96)).to(DEVICE, dtype)
    sk.inject(model, sk.SSVDConfig(ratio=0.4), progress=False)
    return model


def trained_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    (model(x) - x.roll(1, -1)).square().mean().backward()
    optimizer.step()


def test_a_training_step_in_a_cuda_graph(as_trained):
    model = small_model()
    eager = copy.deepcopy(model)
    x = torch.randn(64, 96, device=DEVICE, dtype=torch.bfloat16)
    optimizers = {id(m): torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.3) for m in (model, eager)}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            trained_step(model, optimizers[id(model)], x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizers[id(model)].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        trained_step(model, optimizers[id(model)], x)
    for _ in range(5):
        graph.replay()
    for _ in range(8):
        trained_step(eager, optimizers[id(eager)], x)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.abs().max() > 0, name
            # one computation twice: what eight steps make of sums in another order, no matter of its own rounding
            torch.testing.assert_close(parameter, eager.get_parameter(name), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_what_one_stream_fills_late_serves_another(as_trained, dtype):
    model, x = small_model(dtype).eval(), torch.randn(64, 96, device=DEVICE, dtype=dtype)
    expected = model(x)
    model.eval()  # forgets what it kept
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(100_000_000)
        model(x)
    with torch.cuda.stream(second):
        y = model(x)
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_a_training_step_does_not_wait_for_the_device(as_trained, no_sync):
    model, x = small_model(), torch.randn(64, 96, device=DEVICE, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3)
    trained_step(model, optimizer, x)
    no_sync()
    trained_step(model, optimizer, x)


def requested(when: str) -> int:
    """Bytes asked of the allocator, without what it rounds up."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("mode", ["factored", "composed"])
def test_what_is_kept_for_the_backward(as_trained, backend, mode):
    """y, x V in bf16, and in composed mode W'."""
    T, d, k = 512, 2048, 64
    inputs = on_device((T, d, d, k), torch.bfloat16)
    x, core = inputs["x"].requires_grad_(), inputs["core"].requires_grad_()

    def forward() -> Tensor:
        return sk.ssvd_linear(x, inputs["weight"], inputs["U"], inputs["V"], core, inputs["bias"], mode)

    with sk.use_backend(backend):
        torch.autograd.grad(forward(), [x, core], inputs["dy"])  # library workspaces are allocated once
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = requested("current")
        y = forward()
        kept = requested("current") - before
        assert kept <= 2 * T * (d + k) + (2 * d * d if mode == "composed" else 0) + 2**16
        torch.autograd.grad(y, [x, core], inputs["dy"])
        peak = requested("peak") - before
    if mode == "factored" and backend == "triton":
        assert peak < 2 * d * d  # never forms a weight


def test_merged_and_removed_on_the_device():
    model, x = small_model(torch.float32).eval(), torch.randn(32, 96, device=DEVICE)
    with torch.no_grad():
        for layer in sk.ssvd_layers(model).values():
            layer.theta.normal_(0, 0.02)
            layer.delta_sigma.normal_(0, 0.02)
        adapted = model(x)
        plain, exact = references(model, lambda network: network(x))
        sk.merge(model)
        for y in (adapted, model(x)):
            assert_within(y, plain, exact)
        sk.unmerge(model)
        assert torch.equal(model(x), adapted)
        sk.remove(model)
        assert relative_error(model(x), adapted) > 1e-3


def small_pass() -> None:
    """Both ops, forward and backward, at sizes with several blocks and ragged edges."""
    assert extension.supports(DEVICE) is None, extension.supports(DEVICE)
    for k in (1, 65, 153):
        for dtype in (torch.float32, torch.float64):
            theta, grad = theta_of_norm(k, 0.5, 2, dtype), torch.randn(2, k, k, dtype=dtype, device=DEVICE)
            for backend in ("ext", "triton") if dtype == torch.float32 else ("ext",):
                with sk.use_backend(backend):
                    E, dtheta = cayley_passes(theta.to(DEVICE), grad, k)
                exact = exact_delta(theta, k)
                allowed = twice(solved_delta(theta, k), exact) if dtype == torch.float32 else in_float64(k)
                assert relative_error(E.cpu(), exact) <= allowed and bool(dtheta.isfinite().all())
    with sk.use_backend("triton"):
        for shape in ((37, 70, 130, 33), (300, 128, 96, 64)):
            for dtype in (torch.float32, torch.bfloat16):
                for mode in ("factored", "composed"):
                    linear_is_accurate([on_device(shape, dtype)], dtype, mode)
                activation_is_accurate([activation_on_device(shape[:2] + shape[3:], dtype)], dtype)
    torch.cuda.synchronize()
    print("small pass: results agree with float64")


if __name__ == "__main__":
    small_pass()
