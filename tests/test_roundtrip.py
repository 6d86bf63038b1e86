"""inject, merge, unmerge, remove, save, load, copies and resuming: what comes back is what went in."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import torch
from cases import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels import checkpoint
from ssvd_kernels import model as model_module
from ssvd_kernels.factorize import Factorization, factorize, sketch

SIDES = ["input", "output", "smaller", "both"]
ROTATIONS = ["cayley", "linear", "free"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
MERGED_BOUND = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors: a second thread only spins."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """Linear layers of given shapes, one nested and without bias, beside parameters that are not linear layers."""

    def __init__(self, d0: int, d1: int, d2: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d0)
        self.first = nn.Linear(d0, d1)
        self.block = nn.ModuleDict({"inner": nn.Linear(d1, d2, bias=False)})
        self.last = nn.Sequential(nn.Tanh(), nn.Linear(d2, d0))
        self.block["inner"].weight.requires_grad_(False)  # frozen by its owner before anybody injects
        self.norm.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block["inner"](torch.tanh(self.first(self.norm(x)))))


class Case(NamedTuple):
    dims: tuple[int, int, int]
    dtype: torch.dtype
    config: sk.SSVDConfig
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dims = draw(st.tuples(*[st.integers(1, 20)] * 3))
    side, rotation = draw(st.sampled_from(SIDES)), draw(st.sampled_from(ROTATIONS))
    ranks = st.one_of(st.just(1), st.just(min(dims)), st.integers(1, min(dims)))
    options = {"rank_out": draw(ranks)} if side == "both" and draw(st.booleans()) else {}
    amount = {"ratio": 1.0} if not options and draw(st.integers(0, 3)) == 0 else {"rank": draw(ranks)}
    config = sk.SSVDConfig(**amount, **options, side=side, rotation=rotation)
    return Case(dims, draw(st.sampled_from(DTYPES)), config, draw(st.integers(0, 99)))


def base_net(case: Case) -> Net:
    torch.manual_seed(case.seed)
    return Net(*case.dims).to(case.dtype)


def example(net: nn.Module) -> Tensor:
    weight = next(net.parameters())
    return torch.randn(2, 3, weight.shape[0], generator=torch.Generator().manual_seed(7)).to(weight.dtype)


def train_randomly(net: nn.Module, seed: int = 1, scale: float = 0.3) -> None:
    """Stands for training: random theta and delta_sigma, as large as one would ever see."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sk.ssvd_layers(net).values():
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad:
                    size = 0.1 if name == "delta_sigma" else scale / layer.k**0.5
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(size * noise)


def injected(case: Case, base: Net | None = None) -> Net:
    net = copy.deepcopy(base) if base is not None else base_net(case)
    sk.inject(net, case.config, progress=False)
    train_randomly(net, case.seed)
    return net


def outputs(net: nn.Module) -> tuple[Tensor, Tensor]:
    """(as in training, as in inference)."""
    x = example(net)
    with torch.enable_grad():
        trained = net.train()(x).detach()
    with torch.no_grad():
        return trained, net.eval()(x)


def assert_same_outputs(a: nn.Module, b: nn.Module) -> None:
    for ours, theirs in zip(outputs(a), outputs(b), strict=True):
        assert torch.isfinite(ours).all()
        assert torch.equal(ours, theirs)


def snapshot(net: nn.Module) -> dict:
    return {
        "modules": [(name, id(module), type(module), module.training) for name, module in net.named_modules()],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in net.modules()],
        "attributes": [sorted(module.__dict__) for module in net.modules()],
        "parameters": [(name, id(p), p.dtype, p.requires_grad) for name, p in net.named_parameters()],
        "buffers": [name for name, _ in net.named_buffers()],
    }


def clone_state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_equal_state(net: nn.Module, state: dict[str, Tensor]) -> None:
    now = net.state_dict()
    assert list(now) == list(state)
    for name, value in state.items():
        assert now[name].dtype == value.dtype and torch.equal(now[name], value), name


# -- inject, remove, merge, unmerge ------------------------------------------------------------------------------------


@PROPERTY
@given(cases())
def test_remove_gives_back_the_very_modules_weights_and_flags(case):
    net = base_net(case)
    before, state, expected = snapshot(net), clone_state(net), net(example(net)).detach()
    report = sk.inject(net, case.config, progress=False)
    assert report.modules == ["first", "block.inner", "last.1"] == list(sk.ssvd_layers(net))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} <= {"theta", "theta_out", "delta_sigma"}
    assert report.trainable == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert torch.equal(net(example(net)).detach(), expected)  # bit-identical before training
    train_randomly(net, case.seed)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(example(net)).square().sum().backward()
    optimizer.step()
    sk.merge(net)
    sk.remove(net)
    assert snapshot(net) == before
    assert_equal_state(net, state)
    assert torch.equal(net(example(net)).detach(), expected)


@PROPERTY
@given(cases())
def test_merged_equals_unmerged_and_unmerge_is_exact(case):
    net = injected(case)
    state, (trained, inferred) = clone_state(net), outputs(net)
    sk.merge(net)
    assert all(layer.merged for layer in sk.ssvd_layers(net).values())
    assert_equal_state(net, state)  # a merged model's state dict still holds the base weights
    with torch.no_grad():
        merged = net(example(net))
    assert relative_error(merged, trained) <= MERGED_BOUND[case.dtype]
    sk.merge(net)
    with torch.no_grad():
        assert torch.equal(net(example(net)), merged)
    sk.unmerge(net)
    assert_equal_state(net, state)
    again = outputs(net)
    assert torch.equal(again[0], trained) and torch.equal(again[1], inferred)


@PROPERTY
@given(cases())
def test_merge_with_unload_leaves_plain_layers_that_hold_the_effective_weight(case):
    net = injected(case)
    weights = {name: layer.weight.detach().clone() for name, layer in sk.ssvd_layers(net).items()}
    sk.merge(net)
    with torch.no_grad():
        merged = net.eval()(example(net))
    base_weights = {name: layer.base_weight for name, layer in sk.ssvd_layers(net).items()}
    untouched = {name: weight.clone() for name, weight in base_weights.items()}
    sk.merge(net, unload=True)
    assert not sk.ssvd_layers(net)
    assert [type(net.get_submodule(name)) for name in weights] == [nn.Linear] * 3
    assert list(net.state_dict()) == list(Net(*case.dims).state_dict())
    with torch.no_grad():
        assert torch.equal(net(example(net)), merged)
    for name, weight in weights.items():
        assert torch.equal(net.get_submodule(name).weight, weight)
        assert torch.equal(base_weights[name], untouched[name])  # shared, perhaps, with another copy of the model
    assert net.first.weight.requires_grad and not net.block["inner"].weight.requires_grad


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("d_out", "d_in", "k", "k_out"), [(9, 6, 4, 5), (5, 8, 5, 2), (7, 7, 3, 3)])
def test_effective_weight_is_the_formula(side, d_out, d_in, k, k_out):
    """W' = U H (Sigma + dSigma) G V^T + rest, written out in float64 with none of the package's algebra."""
    linear = nn.Linear(d_in, d_out, dtype=torch.float64)
    W = linear.weight.detach().clone()
    extra = {"rank_out": k_out} if side == "both" else {}
    layer = sk.SSVDLinear.from_linear(linear, sk.SSVDConfig(rank=k, side=side, **extra))
    train_randomly(nn.Sequential(layer))
    rotate_in = side in ("input", "both") or (side == "smaller" and d_out >= d_in)
    theta_left = layer.theta_out if side == "both" else None if rotate_in else layer.theta
    n = layer.k
    eye = torch.eye(n, dtype=torch.float64)
    G = _cayley_by_hand(layer.theta, n) if rotate_in else eye
    H = eye if theta_left is None else _cayley_by_hand(theta_left, n).T
    U, V, sigma = layer.U, layer.V, layer.sigma
    shifted = torch.diag(sigma + layer.delta_sigma.detach())
    expected = U @ H @ shifted @ G @ V.T + W - U @ torch.diag(sigma) @ V.T
    assert relative_error(layer.weight.detach(), expected) <= 1e-13


def _cayley_by_hand(theta: Tensor, n: int) -> Tensor:
    """(I - K)(I + K)^-1 on the top-left corner, identity elsewhere; K[i < j] = +theta row by row."""
    k = next(k for k in range(1, n + 1) if k * (k - 1) // 2 == theta.numel())
    K = torch.zeros(n, n, dtype=torch.float64)
    values = iter(theta.tolist())
    for i in range(k):
        for j in range(i + 1, k):
            K[i, j] = next(values)
            K[j, i] = -K[i, j]
    eye = torch.eye(n, dtype=torch.float64)
    return torch.linalg.solve(eye + K, eye - K)  # the two factors commute


# -- adapters on disk --------------------------------------------------------------------------------------------------


@PROPERTY
@given(cases(), st.booleans())
def test_saved_adapter_loads_into_a_fresh_base_bit_for_bit(case, save_bases):
    base = base_net(case)
    net = injected(case, base)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        sk.save_adapter(net, path, save_bases=save_bases)
        fresh, present = copy.deepcopy(base), copy.deepcopy(base)
        assert sk.load_adapter(fresh, path, progress=False) == list(sk.ssvd_layers(net))
        assert_same_outputs(fresh, net)
        assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in net.parameters()]
        sk.inject(present, case.config, progress=False)
        train_randomly(present, 99)
        outputs(present)  # whatever was cached must go
        sk.load_adapter(present, path, progress=False)
        assert_same_outputs(present, net)
        sk.save_adapter(present, path)
        third = copy.deepcopy(base)
        sk.load_adapter(third, path, progress=False)
        assert_same_outputs(third, net)
        sk.remove(third)
        assert_equal_state(third, base.state_dict())


def _flipped(weight: Tensor, k: int, name: str = "weight") -> Factorization:
    found = factorize(weight, k, name)
    signs = torch.where(torch.arange(k) % 2 == 0, -1.0, 1.0).to(found.U.dtype)
    U, V = found.U * signs, found.V * signs
    return found._replace(U=U, V=V, sketch=sketch(U, V))


def _replaced(weight: Tensor, k: int, name: str, U: Tensor, S: Tensor, V: Tensor) -> Factorization:
    found = factorize(weight, k, name)
    U, S, V = (tensor.to(found.U.dtype).contiguous() for tensor in (U[:, :k], S[:k], V[:, :k]))
    return found._replace(U=U, sigma=S, V=V, sketch=sketch(U, V))


def _transposed(weight: Tensor, k: int, name: str = "weight") -> Factorization:
    V, S, Uh = torch.linalg.svd(weight.detach().double().T.contiguous(), full_matrices=False)
    return _replaced(weight, k, name, Uh.T, S, V)


def _gram(weight: Tensor, k: int, name: str = "weight") -> Factorization:
    W = weight.detach().double()
    values, vectors = torch.linalg.eigh(W.T @ W)
    V, S = vectors.flip(1), values.flip(0).clamp(min=0).sqrt()
    return _replaced(weight, k, name, (W @ V[:, :k]) / S[:k], S, V)


OTHER_BASES = {"flipped": _flipped, "transposed": _transposed, "gram": _gram}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("other", OTHER_BASES)
@pytest.mark.parametrize("into", ["base", "injected"])
def test_adapter_loads_on_a_base_factorised_otherwise(tmp_path, monkeypatch, other, side, into):
    config = sk.SSVDConfig(ratio=0.4, side=side)
    base = Net(96, 160, 72)
    net = copy.deepcopy(base)
    sk.inject(net, config, progress=False)
    train_randomly(net, scale=0.5)
    sk.save_adapter(net, tmp_path / "a.safetensors")
    monkeypatch.setattr(model_module, "factorize", OTHER_BASES[other])
    fresh = copy.deepcopy(base)
    sk.inject(fresh, config, progress=False)
    pairs = list(zip(sk.ssvd_layers(fresh).values(), sk.ssvd_layers(net).values(), strict=True))
    assert any(((a.V * b.V).sum(0) < 0).any() for a, b in pairs)  # the basis is another one indeed
    if into == "base":
        fresh = copy.deepcopy(base)
    sk.load_adapter(fresh, tmp_path / "a.safetensors", progress=False)
    for ours, theirs in zip(outputs(fresh), outputs(net), strict=True):
        assert relative_error(ours, theirs) <= 1e-6
    base_output = outputs(base)[0]
    assert relative_error(base_output, outputs(net)[0]) > 0.05  # the update is not too small to notice


def test_adapter_loads_with_another_thread_count(tmp_path):
    config = sk.SSVDConfig(ratio=0.4)
    base, before = Net(256, 320, 200), torch.get_num_threads()
    nets = {}
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            nets[threads] = copy.deepcopy(base)
            if threads == 2:
                sk.inject(nets[threads], config, progress=False)
                train_randomly(nets[threads], scale=0.5)
                sk.save_adapter(nets[threads], tmp_path / "a.safetensors")
            else:
                sk.load_adapter(nets[threads], tmp_path / "a.safetensors", progress=False)
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(outputs(nets[1]), outputs(nets[2]), strict=True):
        assert relative_error(ours, theirs) <= 1e-6


def _orthogonal(linear: nn.Linear) -> Tensor:
    return nn.init.orthogonal_(torch.empty_like(linear.weight))


def _deficient(linear: nn.Linear) -> Tensor:
    return torch.randn(linear.out_features, 2) @ torch.randn(2, linear.in_features)


AMBIGUOUS = {
    "zero": lambda linear: torch.zeros_like(linear.weight),
    "repeated": _orthogonal,
    "rank deficient": _deficient,
    "one pair equal": lambda linear: torch.eye(*linear.weight.shape) * torch.tensor([5.0, 4, 4, 3, 2, 1, 0.5, 0.2]),
}


@pytest.mark.parametrize("spectrum", AMBIGUOUS)
@pytest.mark.parametrize("other", [factorize, _flipped, _transposed])
def test_basis_that_cannot_be_recomputed_is_stored_and_loads(tmp_path, monkeypatch, caplog, spectrum, other):
    base = Net(8, 12, 10)
    with torch.no_grad():
        base.first.weight.copy_(AMBIGUOUS[spectrum](base.first))
    net = copy.deepcopy(base)
    sk.inject(net, sk.SSVDConfig(rank=6), progress=False)
    train_randomly(net)
    with caplog.at_level("INFO", logger="ssvd_kernels"):
        sk.save_adapter(net, tmp_path / "a.safetensors")
    assert "first" in caplog.text
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        stored = {key for key in file.keys() if key.endswith((".U", ".V"))}
    assert stored == {"first.U", "first.V"}  # that layer's, and no other's
    monkeypatch.setattr(model_module, "factorize", other)
    for fresh in (copy.deepcopy(base), copy.deepcopy(base)):
        sk.load_adapter(fresh, tmp_path / "a.safetensors", progress=False)
        for ours, theirs in zip(outputs(fresh), outputs(net), strict=True):
            assert relative_error(ours, theirs) <= 1e-6
        sk.save_adapter(fresh, tmp_path / "a.safetensors")  # and again from what was loaded
    present = copy.deepcopy(base)
    sk.inject(present, sk.SSVDConfig(rank=6), progress=False)
    sk.load_adapter(present, tmp_path / "a.safetensors", progress=False)
    for ours, theirs in zip(outputs(present), outputs(net), strict=True):
        assert relative_error(ours, theirs) <= 1e-6


@pytest.mark.parametrize("save_bases", [False, True])
@pytest.mark.parametrize("into", ["base", "injected"])
def test_loaded_model_does_not_depend_on_the_file_any_more(tmp_path, save_bases, into):
    """The file may be memory-mapped while it is read; a parameter that stays mapped changes, or crashes, with it."""
    net = Net(24, 40, 32)
    fresh = copy.deepcopy(net)
    sk.inject(net, sk.SSVDConfig(rank=10), progress=False)
    train_randomly(net)
    path = tmp_path / "a.safetensors"
    sk.save_adapter(net, path, save_bases=save_bases)
    if into == "injected":
        sk.inject(fresh, sk.SSVDConfig(rank=10), progress=False)
    sk.load_adapter(fresh, path, progress=False)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_outputs(fresh, net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapter_with_its_bases_loads_on_a_rounded_base(tmp_path, dtype):
    base = Net(24, 40, 32)
    net = copy.deepcopy(base)
    sk.inject(net, sk.SSVDConfig(rank=10), progress=False)
    train_randomly(net)
    path = tmp_path / "a.safetensors"
    sk.save_adapter(net, path, save_bases=True)
    rounded = copy.deepcopy(base).to(dtype)
    sk.load_adapter(rounded, path, progress=False)
    for name, layer in sk.ssvd_layers(rounded).items():
        update = sk.ssvd_layers(net)[name].core().detach()
        assert torch.equal(layer.core().detach(), update)
        assert layer.base_weight.dtype == dtype
    assert relative_error(outputs(rounded)[0], outputs(net)[0]) <= 8 * torch.finfo(dtype).eps
    sk.save_adapter(net, path)
    with pytest.raises(sk.AdapterError, match="save_bases=True"):
        sk.load_adapter(copy.deepcopy(base).to(dtype), path, progress=False)


def _deep(d_in: int, d_out: int) -> nn.Module:
    """Three linear layers under names as long as a real model's: model.decoder.layers.0.encoder_attn.out_proj."""
    layer = nn.ModuleDict({name: nn.Linear(d_in, d_out) for name in ("q_proj", "k_proj", "out_proj")})
    net: nn.Module = nn.ModuleDict({"encoder_attn": layer})
    for part in ("10", "layers", "decoder", "model"):
        net = nn.ModuleDict({part: net})
    return net


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("side", ["input", "both"])
@pytest.mark.parametrize("k", [153, 128, 127, 64, 16, 1])
def test_adapter_file_size(tmp_path, k, side, rotation):
    net = _deep(k + 5, k + 40)
    report = sk.inject(net, sk.SSVDConfig(rank=k, side=side, rotation=rotation), progress=False)
    train_randomly(net)
    path = tmp_path / "a.safetensors"
    sk.save_adapter(net, path)
    trained, size = 4 * report.trainable, path.stat().st_size
    assert size > trained
    if k >= 128:
        assert size <= 1.3 * trained
    else:
        assert size <= trained + 4096 * len(report.modules)


class Crash(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError("disk full"), Crash()])
@pytest.mark.parametrize("when", ["writing", "replacing"])
@pytest.mark.parametrize("existing", [True, False])
def test_crash_while_saving_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error, when, existing):
    net = Net(8, 12, 10)
    sk.inject(net, sk.SSVDConfig(rank=3), progress=False)
    path = tmp_path / "a.safetensors"
    if existing:
        sk.save_adapter(net, path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    train_randomly(net)

    def half_written(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half of it")
        raise error

    def not_replaced(*args, **kwargs):
        raise error

    if when == "writing":
        monkeypatch.setattr(checkpoint, "save_file", half_written)
    else:
        monkeypatch.setattr(checkpoint.os, "replace", not_replaced)
    with pytest.raises(type(error)):
        sk.save_adapter(net, path)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    sk.save_adapter(net, path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


# -- copies, state dicts, resuming -------------------------------------------------------------------------------------


def _pickled(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
@pytest.mark.parametrize("state", ["fresh", "after training forward", "after cached eval", "merged"])
@pytest.mark.parametrize("side", ["input", "both"])
def test_copies_are_equal_and_independent(duplicate, state, side):
    base = Net(12, 16, 9)
    net = copy.deepcopy(base)
    sk.inject(net, sk.SSVDConfig(rank=5, side=side), progress=False)
    train_randomly(net)
    if state == "after training forward":
        net.train()(example(net)).sum().backward()
        net.zero_grad()
    elif state == "after cached eval":
        with torch.no_grad():
            net.eval()(example(net))
    elif state == "merged":
        sk.merge(net.eval())
    with torch.no_grad():
        expected = net(example(net))
        twin = duplicate(net)
        assert torch.equal(twin(example(net)), expected)
        if state == "merged":
            sk.unmerge(twin)
    ours = {p.data_ptr() for p in net.parameters() if p.numel()}
    assert not ours & {p.data_ptr() for p in twin.parameters() if p.numel()}
    twin.train()(example(net)).square().sum().backward()
    assert all(p.grad is None for p in net.parameters())
    train_randomly(twin, 5)
    with torch.no_grad():
        assert not torch.equal(twin.eval()(example(net)), expected)
        assert torch.equal(net(example(net)), expected)
    sk.remove(twin)
    assert_equal_state(twin, base.state_dict())
    with torch.no_grad():
        assert torch.equal(net(example(net)), expected)


@pytest.mark.parametrize("side", SIDES)
def test_state_dict_carries_its_own_basis(tmp_path, monkeypatch, side):
    config, base = sk.SSVDConfig(rank=5, side=side), Net(12, 16, 9)
    net = copy.deepcopy(base)
    sk.inject(net, config, progress=False)
    train_randomly(net)
    torch.save(net.state_dict(), tmp_path / "state.pt")
    monkeypatch.setattr(model_module, "factorize", _flipped)
    fresh = copy.deepcopy(base)
    sk.inject(fresh, config, progress=False)
    outputs(fresh)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert_same_outputs(fresh, net)
    sk.save_adapter(fresh, tmp_path / "a.safetensors")
    again = copy.deepcopy(base)
    sk.load_adapter(again, tmp_path / "a.safetensors", progress=False)
    assert_same_outputs(again, net)


def test_base_checkpoints_load_both_ways():
    base = Net(12, 16, 9)
    net = copy.deepcopy(base)
    sk.inject(net, sk.SSVDConfig(rank=5), progress=False)
    train_randomly(net)
    expected = outputs(net)
    result = net.load_state_dict(base.state_dict(), strict=False)
    assert not result.unexpected_keys
    names = {"theta", "delta_sigma", "U", "sigma", "V"}
    assert {key.rpartition(".")[2] for key in result.missing_keys} == names
    assert all(torch.equal(a, b) for a, b in zip(outputs(net), expected, strict=True))
    plain = Net(12, 16, 9)
    assert not plain.load_state_dict(net.state_dict(), strict=False).missing_keys
    assert_same_outputs(plain, base)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("by", ["state dict", "adapter"])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_resumed_training_is_bit_equal_to_uninterrupted_training(tmp_path, monkeypatch, by, fused, rotation):
    config, base = sk.SSVDConfig(rank=5, rotation=rotation), Net(12, 16, 9)

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = copy.deepcopy(base)
        sk.inject(net, config, progress=False)
        trained = [p for p in net.parameters() if p.requires_grad]
        return net, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01, fused=fused)

    def steps(net: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
        losses = []
        for number in numbers:
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(number))
            loss = (net(x) - x.flip(-1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    net, optimizer = start()
    steps(net, optimizer, range(4))
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    sk.save_adapter(net, tmp_path / "a.safetensors")
    expected = steps(net, optimizer, range(4, 8))
    assert len(set(expected)) == 4

    monkeypatch.setattr(model_module, "factorize", _flipped)
    resumed, optimizer = start()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    if by == "state dict":
        resumed.load_state_dict(state["model"], strict=True)
    else:
        sk.load_adapter(resumed, tmp_path / "a.safetensors", progress=False)
    optimizer.load_state_dict(state["optimizer"])
    assert steps(resumed, optimizer, range(4, 8)) == expected
    for (name, a), (_, b) in zip(resumed.named_parameters(), net.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_equal_adapters_are_equal_files(tmp_path):
    files = set()
    for index in range(8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 7))
        sk.inject(model, sk.SSVDConfig(rank=3), progress=False)
        sk.save_adapter(model, tmp_path / f"{index}.safetensors")
        files.add((tmp_path / f"{index}.safetensors").read_bytes())
    assert len(files) == 1
