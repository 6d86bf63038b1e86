"""Many adapters over one base: every row of a batch computes what its own adapter computes alone."""

from __future__ import annotations

import threading

import pytest
import quantized_nets
import torch
from banks import NAMES, X, adapted, alone, assert_rows, base_net, files_of, filled, mixed
from bounds import assert_within
from cases import relative_error
from models import references
from speech_models import llama, whisper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssvd_kernels as sk

# -- what the rows compute --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["weight", "activation"])
@pytest.mark.parametrize(
    "options",
    [
        {"side": "input"},
        {"side": "output"},
        {"side": "both"},
        {"side": "smaller", "rotation": "linear"},
        {"rotation": "free"},
        {"rotation": "banded", "band": 2},
    ],
    ids=str,
)
def test_every_row_has_its_own_adapter(form, options, tmp_path):
    net = adapted(base_net(), form=form, **options)
    bank = filled(net, files_of(net, tmp_path))
    for names in (["c", None, "a", "b"], ["a", "a", "b", "a"], 4 * [None], 4 * ["b"], ["b", None, None, None]):
        y = mixed(net, bank, names)
        assert_rows(net, y, names)
        with bank.rows(names):  # with gradients on, which none of them has
            assert relative_error(net(X), y.double()) < 1e-6
    assert relative_error(mixed(net, bank, 4 * ["a"])[0], mixed(net, bank, 4 * ["b"])[0].double()) > 1e-3


@pytest.mark.parametrize("form", ["weight", "activation"])
def test_half_precision(form, tmp_path):
    net = adapted(base_net(torch.bfloat16), form=form)
    bank = filled(net, files_of(net, tmp_path))
    names, x = ["c", None, "a", "b"], X.bfloat16()
    assert_rows(net, mixed(net, bank, names, x), names, x)


@pytest.mark.parametrize("form", ["weight", "activation"])
def test_autocast(form, tmp_path):
    net = adapted(base_net(), form=form)
    bank, names = filled(net, files_of(net, tmp_path)), ["c", None, "a", "b"]
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed(net, bank, names)
        single = [alone(net, name, X, lambda net, x: net(x).detach())[row] for row, name in enumerate(names)]
    for row, name in enumerate(names):
        exact = alone(net, name, X, lambda net, x: references(net, lambda net: net(x).detach())[1])[row]
        assert_within(y[row], single[row], exact, str(name))
    assert torch.equal(y[1], single[1])


@pytest.mark.parametrize("form", ["weight", "activation"])
@pytest.mark.parametrize("kind", quantized_nets.BITSANDBYTES[:1])
def test_quantised_base(kind, form, tmp_path):
    net = quantized_nets.adapted(kind, form=form)
    for name in NAMES:
        sk.add_adapter(net, name)
        sk.set_adapter(net, name)
        for layer in sk.ssvd_layers(net).values():
            nn.init.normal_(layer.theta, std=0.1)
    net.eval()
    bank = filled(net, files_of(net, tmp_path))
    x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(3))
    y, names = mixed(net, bank, ["b", "c", None, "a"], x), ["b", "c", None, "a"]
    for row, name in enumerate(names):
        with torch.no_grad():
            single = alone(net, name, x[row : row + 1], lambda net, x: net(x))[0]
        assert relative_error(y[row], single.double()) <= 2e-6


def test_names_repeat_as_generate_repeats_rows(net, bank):
    y = mixed(net, bank, ["a", None])
    assert_rows(net, y, ["a", "a", None, None])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("make", [whisper, llama])
def test_generate(make, use_cache, options, tmp_path):
    torch.manual_seed(0)
    net = adapted(make(), rank=5)
    bank = filled(net, files_of(net, tmp_path))
    if make is whisper:
        inputs = {"input_features": torch.randn(4, 8, 40)}
    else:
        inputs = {"input_ids": torch.randint(3, 32, (4, 5))}
    options = {**options, "use_cache": use_cache, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    names: list[str | None] = ["b", None, "a", "c"]
    with bank.rows(names):
        found = net.generate(**inputs, **options)
    every = options.get("num_return_sequences", 1)
    found = found.view(4, every, -1)
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        single = alone(net, name, X, lambda net, _, own=own: net.generate(**own, **options))
        assert torch.equal(found[row], single), name
    assert len({tuple(row.flatten().tolist()) for row in found}) > 1


def test_sampling_draws_from_each_rows_own_distribution(tmp_path):
    torch.manual_seed(0)
    net = adapted(llama(), rank=5)
    bank = filled(net, files_of(net, tmp_path))
    ids = torch.randint(3, 32, (1, 5)).expand(2, 5)
    options = {"max_new_tokens": 1, "do_sample": True, "output_logits": True, "return_dict_in_generate": True}
    with bank.rows(["a", "b"]):
        logits = net.generate(ids, **options).logits[0]
    for row, name in enumerate("ab"):
        single = alone(net, name, X, lambda net, _: net.generate(ids[:1], **options).logits[0])
        assert relative_error(logits[row : row + 1], single.double()) <= 2e-6


# -- whose rows they are ----------------------------------------------------------------------------------------------


def test_rows_belong_to_a_threads_own_calls(net, bank):
    expected = {name: mixed(net, bank, 4 * [name]) for name in NAMES}
    with torch.no_grad():
        default = net(X)
    wrong: list[object] = []
    start = threading.Barrier(4)

    def serve(name: str | None) -> None:
        start.wait()
        for _ in range(20):
            with torch.no_grad():
                y = net(X) if name is None else mixed(net, bank, 4 * [name])
            if not torch.equal(y, default if name is None else expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in (*NAMES, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_adapters_come_and_go_while_others_serve(net, files):
    bank = sk.AdapterBank(net)
    bank.add("a", files["a"])
    expected, wrong = mixed(net, bank, 4 * ["a"]), 0
    started, done = threading.Event(), threading.Event()

    def serve() -> None:
        nonlocal wrong
        while not done.is_set():
            wrong += not torch.equal(mixed(net, bank, 4 * ["a"]), expected)
            started.set()

    thread = threading.Thread(target=serve)
    thread.start()
    started.wait()
    for number in range(20):  # the pool grows, and slots change their owners
        bank.add(f"b{number}", files["b"])
        if number % 3 == 0:
            bank.remove(f"b{number}")
    done.set()
    thread.join()
    assert not wrong and len(bank) == 1 + 20 - 7


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputation_in_the_backward_has_the_rows_of_its_forward(net, bank, use_reentrant):
    """The block has ended by then."""
    parameters, names = bank.trainable(["a", "b"]), ["a", "b", "a", None]
    inner = net.block["inner"]
    net.forward = lambda x: net.last(checkpoint(inner, torch.tanh(net.first(x)), use_reentrant=use_reentrant))
    x = X.clone().requires_grad_()

    def gradients() -> list[Tensor]:
        with bank.rows(names):
            loss = net(x).square().mean()
        loss.backward()
        grads = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return grads

    found = gradients()
    net.forward = lambda x: net.last(inner(torch.tanh(net.first(x))))
    for ours, plain in zip(found, gradients(), strict=True):
        assert bool(plain.any()) and relative_error(ours, plain.double()) <= 2e-6


def test_inference_mode_and_then_gradients(net, files):
    with torch.inference_mode():
        bank = sk.AdapterBank(net)
        bank.add("a", files["a"])
    bank.add("b", files["b"])
    with bank.rows(["a", "b", None, "a"]):
        with torch.inference_mode():
            y = net(X)
        x = X.clone().requires_grad_()
        again = net(x)
    again.sum().backward()
    assert torch.equal(again, y) and x.grad is not None and bool(x.grad.any())
