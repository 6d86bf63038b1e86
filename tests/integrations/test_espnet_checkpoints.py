"""ESPnet's SSVD checkpoints become adapters and come back: the same W', or a refusal that says why."""

from __future__ import annotations

import logging
from collections.abc import Callable

import espnet_checkpoints as espnet
import pytest
import torch
from bounds import assert_within, unit_roundoff
from cases import relative_error
from models import adapt
from plain import effective
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.integrations.espnet_checkpoints import ConversionError, from_espnet, to_espnet

MAPS = ["linear", "cayley"]


class Model(nn.Module):
    """The plain model that the checkpoints of `espnet_checkpoints` adapt."""

    def __init__(self, state: dict) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"embed": nn.Embedding(7, 3), "norm": nn.LayerNorm(3)})
        for index, (kind, (d_out, d_in)) in enumerate(espnet.SHAPES.items()):
            linear = nn.Linear(d_in, d_out, bias=espnet.BIAS[kind])
            self.encoder[str(index)] = nn.ModuleDict({kind: linear})
        self.load_state_dict(state, strict=False)


def assert_adapts(model: nn.Module, path, expected: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Loaded into `model`, the adapter gives the expected W'."""
    sk.load_adapter(model, path, progress=False)
    layers = sk.ssvd_layers(model)
    assert list(layers) == list(expected)
    for name, layer in layers.items():
        assert_within(layer.weight.detach(), *expected[name], name)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("rotation_map", MAPS)
def test_a_checkpoint_becomes_an_adapter_of_the_same_function(tmp_path, rotation_map, merged, with_base):
    state, base, adapted = espnet.checkpoint(rotation_map, merged=merged)
    torch.save(state, tmp_path / "model.pth")
    paths, bases = (tmp_path / "model.pth", tmp_path / "a.safetensors"), {"base_path": tmp_path / "base.pth"}
    done = from_espnet(*paths, rotation_map=rotation_map, base=base if with_base else None, **bases)
    assert done.ranks == {name: espnet.RANK[name.rpartition(".")[2]] for name in adapted}
    assert set(done.weights.values()) == {"W'" if merged else "W"}
    assert str(done) == f"3 layers, k = 5 to 16, rotation_map {rotation_map}, {3 if merged else 0} of them merged"
    written = torch.load(tmp_path / "base.pth")
    assert set(written) == set(base)
    for name, tensor in base.items():
        layer, _, key = name.rpartition(".")
        if with_base or not merged or layer not in adapted or key == "bias":
            assert torch.equal(written[name], tensor), name
        else:
            assert_within(written[name], espnet.rebuilt(_layer(state, layer)), tensor, name)
    model = Model(written)
    assert_adapts(model, tmp_path / "a.safetensors", adapted)
    assert [layer.side for layer in sk.ssvd_layers(model).values()] == ["input", "input", "output"]
    assert {layer.rotation for layer in sk.ssvd_layers(model).values()} == {rotation_map}


def test_the_update_is_far_above_the_bounds_of_these_tests():
    state, base, adapted = espnet.checkpoint("linear")
    for name, (_, expected) in adapted.items():
        linear, cayley = (torch.tensor(espnet.effective(_layer(state, name), of)) for of in MAPS)
        assert relative_error(base[f"{name}.weight"], expected) > 0.1
        assert relative_error(cayley, expected) > 1e-3 and torch.equal(linear, expected)


def _layer(state: dict, name: str) -> dict:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("rotation_map", MAPS)
def test_an_adapter_becomes_a_checkpoint_of_the_same_function(tmp_path, rotation_map, merged):
    state, base, adapted = espnet.checkpoint(rotation_map)
    path = tmp_path / "adapter.safetensors"
    from_espnet(state, path, rotation_map=rotation_map, base=base)
    found = to_espnet(path, base, tmp_path / "back.pth", merged=merged, progress=False)
    assert set(found) == set(state)
    written = torch.load(tmp_path / "back.pth", weights_only=True)
    assert all(torch.equal(written[key], found[key]) for key in found) and set(written) == set(found)
    for name, expected in adapted.items():
        ours, theirs = _layer(found, name), _layer(state, name)
        assert_within(espnet.both(ours, rotation_map)[1], *expected, name)
        if merged:
            assert_within(ours["weight"], *expected, name)
        else:
            assert torch.equal(ours["weight"], base[f"{name}.weight"])
        for key in ("K_vec", "K_triu_idx", "svd_initialized"):
            assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype
        assert torch.equal(ours["gate"], torch.zeros(1))
        for key in ("u", "v", "s_pre"):
            kept = (..., slice(len(theirs["s"]))) if key == "u" else slice(len(theirs["s"]))
            assert torch.equal(ours[key][kept], theirs[key][kept]) and ours[key].shape == theirs[key].shape, key
        u, v = ours["u"].double(), ours["v"].double()
        for gram in (u.mT @ u, v @ v.mT):  # each product is of two unit vectors, each rounded to float32
            assert (gram - torch.eye(len(gram))).abs().max() <= 2 * unit_roundoff(torch.float32)
        assert_within(espnet.rebuilt(ours), espnet.rebuilt(theirs), base[f"{name}.weight"], name)
    again = tmp_path / "again.safetensors"
    from_espnet(found, again, rotation_map=rotation_map, base=base)
    assert_adapts(Model(base), again, adapted)


@pytest.mark.parametrize("rotation", MAPS)
def test_an_adapter_trained_here_is_exported_without_its_bases(tmp_path, rotation):
    _, base, _ = espnet.checkpoint("linear")
    model, path = Model(base), tmp_path / "ours.safetensors"
    sk.save_adapter(adapt(model, rank=None, ratio=0.5, side="smaller", rotation=rotation), path)
    found = to_espnet(path, base, progress=False)
    for name, layer in sk.ssvd_layers(model).items():
        assert_within(espnet.both(_layer(found, name), rotation)[1], *effective(layer.base_weight, layer), name)


def test_an_absent_map_is_linear_and_said_so(tmp_path, caplog):
    state, base, adapted = espnet.checkpoint("linear")
    assert from_espnet(state, tmp_path / "a.safetensors", base=base).rotation_map == "linear"
    assert "`rotation_map` was not given" in caplog.text
    assert_adapts(Model(base), tmp_path / "a.safetensors", adapted)
    caplog.clear()
    from_espnet(state, tmp_path / "a.safetensors", rotation_map="linear", base=base)
    assert caplog.text == ""


@pytest.mark.parametrize(("trained", "told"), [("cayley", "linear"), ("linear", "cayley"), ("cayley", None)])
def test_merged_weights_tell_a_wrong_map(tmp_path, trained, told):
    state, base, _ = espnet.checkpoint(trained)
    with pytest.raises(ConversionError, match=f"it fits rotation_map='{trained}'"):
        from_espnet(state, tmp_path / "a.safetensors", rotation_map=told, base=base)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints(tmp_path, dtype, merged):
    """Of what its rounded tensors mean; a base in float32 is recognised by them."""
    whole, base, _ = espnet.checkpoint("cayley", merged=merged)
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in whole.items()}
    done = from_espnet(state, tmp_path / "a.safetensors", rotation_map="cayley", base=base)
    assert set(done.weights.values()) == {"W'" if merged else "W"}
    model = Model(base)
    sk.load_adapter(model, tmp_path / "a.safetensors", progress=False)

    def update(tensors: dict) -> Tensor:
        none = {key: 0 * tensors[key] for key in ("K_vec", "s")}
        return espnet.both(tensors, "cayley")[1] - espnet.both({**tensors, **none}, "cayley")[1]

    for name, layer in sk.ssvd_layers(model).items():
        before, meant = (update(_layer(tensors, name)) for tensors in (whole, state))
        assert_within(layer.weight.detach() - layer.base_weight, before, meant)  # twice what rounding has changed


def test_a_small_update_is_told_from_none(tmp_path):
    """merged or not is decided by the nearer composition, also below the rounding of the checkpoint's dtype."""
    for merged in (True, False):
        state, base, adapted = espnet.checkpoint("linear", merged=merged, scale=1e-3)
        for name in adapted:
            state[f"{name}.s"] *= 1e-2
            if merged:
                state[f"{name}.weight"] = torch.tensor(espnet.effective(_layer(state, name), "linear"))
            state |= {f"{name}.{key}": t.half() for key, t in _layer(state, name).items() if t.is_floating_point()}
        done = from_espnet(state, tmp_path / "a.safetensors", rotation_map="linear", base=base)
        assert set(done.weights.values()) == {"W'" if merged else "W"}


@pytest.mark.parametrize("change", ["reordered", "absent", "averaged"])
def test_indices_in_another_order_absent_or_averaged(tmp_path, change):
    """Early checkpoints lack them and svd_initialized; ESPnet's average sums both, and divides no integers."""
    rotation_map = "cayley" if change == "reordered" else "linear"
    state, base, adapted = espnet.checkpoint(rotation_map)
    for name in adapted:
        index, K_vec = state[f"{name}.K_triu_idx"], state[f"{name}.K_vec"]
        if change == "reordered":
            order = torch.randperm(K_vec.numel())
            turned = torch.arange(K_vec.numel()) % 3 == 0  # K[j, i] = -K[i, j]
            state[f"{name}.K_triu_idx"] = torch.where(turned, index[:, order].flip(0), index[:, order])
            state[f"{name}.K_vec"] = torch.where(turned, -K_vec[order], K_vec[order])
        elif change == "absent":
            del state[f"{name}.K_triu_idx"], state[f"{name}.svd_initialized"]
        else:
            index *= 3
            state[f"{name}.svd_initialized"] = torch.tensor(True) / 3
    from_espnet(state, tmp_path / "a.safetensors", rotation_map=rotation_map, base=base)
    assert_adapts(Model(base), tmp_path / "a.safetensors", adapted)


@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_wrapped_and_partial_checkpoints(tmp_path, wrapper, caplog):
    """What a trainer wraps, and what save_strategy required_grad_only leaves: no weights."""
    state, base, adapted = espnet.checkpoint("cayley")
    state = {key: value for key, value in state.items() if not key.endswith((".weight", ".bias"))}
    done = from_espnet({wrapper: state, "epoch": 3}, tmp_path / "a.safetensors", rotation_map="cayley", base=base)
    assert set(done.weights.values()) == {"nothing"} and caplog.text == ""
    assert_adapts(Model(base), tmp_path / "a.safetensors", adapted)
    with pytest.raises(ConversionError, match=r"encoder\.0\.tall has neither weight nor bias.*pass `base`"):
        from_espnet(state, tmp_path / "b.safetensors", rotation_map="cayley")


def test_without_its_base_the_adapter_refuses_the_original(tmp_path, caplog):
    state, base, _ = espnet.checkpoint("linear")
    from_espnet(state, tmp_path / "a.safetensors", rotation_map="linear")
    assert "3 of 3 layers do not contain their base weight" in caplog.text
    with pytest.raises(sk.AdapterError, match="another base model"):
        sk.load_adapter(Model(base), tmp_path / "a.safetensors", progress=False)


NAME = "encoder.0.tall"


def put(key: str, value: Tensor) -> Callable[[dict], None]:
    return lambda state: state.update({f"{NAME}.{key}": value})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: [s.pop(k) for k in list(s) if k.endswith("K_vec")], "no key ends in '.K_vec'"),
        (lambda s: s.pop(f"{NAME}.gate"), r"encoder\.0\.tall lacks gate"),
        (lambda s: [s.pop(f"{NAME}.{key}") for key in ("u", "v")], r"lacks u, v,"),
        (lambda s: s[f"{NAME}.svd_initialized"].fill_(False), "svd_initialized is False"),
        (put("K_vec", torch.zeros(14)), r"K_vec, s and s_pre must have .* elements, got 14, 6 and 16"),
        (put("s", torch.zeros(5)), r"K_vec, s and s_pre must have .* elements, got 15, 5 and 16"),
        (put("u", torch.zeros(24, 15)), r"u, v and s_pre must have shapes .*got \(24, 15\)"),
        (put("weight", torch.zeros(20, 16)), r"weight must have shape \(24, 16\) or \(16, 24\), .*got \(20, 16\)"),
        (lambda s: s[f"{NAME}.s"].fill_(float("nan")), r"tall\.s must contain finite floats, got NaN or infinity"),
        (put("s_pre", torch.ones(16, dtype=torch.int64)), r"s_pre must contain finite floats, got torch.int64"),
        (lambda s: s[f"{NAME}.K_triu_idx"].fill_(1), "K_triu_idx must contain each pair of 0..5 exactly once"),
        (lambda s: s[f"{NAME}.weight"].mul_(1.01), r"tall\.weight has a relative error of .* to W and of .* to W'"),
        (lambda s: s[f"{NAME}.u"].zero_(), r"`base` is a different model"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, change, match):
    state, base, _ = espnet.checkpoint("linear")
    change(state)
    with pytest.raises(ConversionError, match=match):
        from_espnet(state, tmp_path / "a.safetensors", rotation_map="linear", base=base)
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_refused(tmp_path):
    state, base, _ = espnet.checkpoint("linear")
    with pytest.raises(ConversionError, match=r"`base` has no encoder\.0\.tall\.weight"):
        from_espnet(state, tmp_path / "a.safetensors", rotation_map="linear", base={})
    other = {**base, f"{NAME}.weight": base[f"{NAME}.weight"] * 1.001}
    with pytest.raises(ConversionError, match=r"`base` is a different model: its encoder\.0\.tall\.weight differs"):
        from_espnet(state, tmp_path / "a.safetensors", rotation_map="linear", base=other)
    from_espnet(state, tmp_path / "a.safetensors", rotation_map="linear", base=base)
    with pytest.raises(sk.AdapterError, match="another base model"):
        to_espnet(tmp_path / "a.safetensors", other, progress=False)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"rotation": "free", "side": "smaller"}, "must have rotation 'linear' or 'cayley' for ESPnet, got 'free'"),
        ({"rotation": "banded", "band": 1}, "must have rotation 'linear' or 'cayley' for ESPnet, got 'banded'"),
        ({"side": "both"}, "must have side='input', the smaller side, for ESPnet, got 'both'"),
        ({"side": "output"}, "must have side='input', the smaller side, for ESPnet, got 'output'"),
        ({"side": "input"}, r"wide of shape \(16, 24\) must have side='output', .*got 'input'"),
        (sk.SpectralFTConfig(top=3, rank=1), "must be adapted by SSVD for ESPnet, got SpectralFT"),
        (
            {"side": "smaller", "targets": ["tall"], "modules_to_save": ["wide"]},
            r"modules that train whole, but .*'encod",
        ),
    ],
)
def test_adapters_that_espnet_has_not_are_refused(tmp_path, config, match):
    _, base, _ = espnet.checkpoint("linear")
    model = Model(base)
    given = sk.SSVDConfig(rank=3, **config) if isinstance(config, dict) else config
    sk.inject(model, given, progress=False)
    sk.save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match=match):
        to_espnet(tmp_path / "a.safetensors", base, tmp_path / "back.pth", progress=False)
    assert not (tmp_path / "back.pth").exists()


def test_files_are_read_without_running_their_code(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": {}, "reporter": logging.Filter()}, path)
    with pytest.raises(ConversionError, match=r"`checkpoint` must be a model file .*weights_only=True"):
        from_espnet(path, tmp_path / "a.safetensors", rotation_map="linear")
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ConversionError, match="`checkpoint` must be a model file of tensors only"):
        from_espnet(path, tmp_path / "a.safetensors", rotation_map="linear")
    torch.save([1, 2], path)
    with pytest.raises(ConversionError, match="must contain a state dict, got list"):
        from_espnet(path, tmp_path / "a.safetensors", rotation_map="linear")
    with pytest.raises(FileNotFoundError, match="`checkpoint` must be an existing file, got "):
        from_espnet(tmp_path / "none.pth", tmp_path / "a.safetensors", rotation_map="linear")
    with pytest.raises(ValueError, match="`rotation_map` must be one of 'linear', 'cayley', got 'caley'"):
        from_espnet({}, tmp_path / "a.safetensors", rotation_map="caley")
    with pytest.raises(FileNotFoundError, match="`base_path` must be in an existing folder, got "):
        from_espnet({}, tmp_path / "a.safetensors", rotation_map="linear", base_path=tmp_path / "no" / "base.pth")
