"""The benchmark's versions: their memory, their own float64, the blocks of the models, and what is measured when."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bounds import assert_within, unit_roundoff
from cases import relative_error
from models import references
from torch import nn

import ssvd_kernels as sk
from bench import cases, layers, peers, stacks, versions, work
from bench.harness import BACKWARD, FORWARD, WHOLE, Clock, Passes, Version, measure
from bench.layers import Factors, Problem
from bench.memory import saved_bytes, static_bytes
from bench.records import machine
from ssvd_kernels.model import rotations
from ssvd_kernels.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
T, D_IN, D_OUT, K = 24, 32, 48, 8
TINY = (torch.float32, T, D_IN, D_OUT, K)


def rows_of(case, *names: str) -> dict[tuple[str, str], dict]:
    """The rows of the first round by version and mode, of the versions in `names` alone."""
    chosen = versions_of(case, *names)
    rows = measure(replace(case, build=lambda device: chosen), Clock(CPU, quick=True), 0.001, machine(CPU))
    return {(r["version"], r["mode"].partition(" ")[0]): r for r in rows if r["round"] == 1 and r["pass"] == WHOLE}


def versions_of(case, *names: str) -> list[Version]:
    return [version for version in case.build(CPU) if version.name in names]


# -- memory --------------------------------------------------------------------------------------------------------


def test_storages_are_counted_once():
    a = torch.zeros(10)
    assert static_bytes([a, a[2:], a.view(2, 5), torch.zeros(3)]) == 4 * 13


def test_saved_bytes_of_known_graphs():
    x, weight = torch.randn(T, D_IN, requires_grad=True), torch.randn(D_OUT, D_IN, requires_grad=True)
    size = 4 * T * D_IN
    assert saved_bytes(lambda x: x @ weight.detach().mT, x, [weight]) == (0, 0)
    assert saved_bytes(lambda x: x @ weight.mT, x, [weight]) == (0, size)
    assert saved_bytes(lambda x: x.exp().sin().sum(), x, []) == (size, 0)  # exp keeps its result, which sin reads
    assert saved_bytes(lambda x: (2 * x).square().sum(), x, []) == (size, 0)
    with torch.no_grad():
        assert saved_bytes(lambda x: (2 * x).square().sum(), x, []) == (0, 0)


def test_what_a_module_keeps_beside_the_graph_counts_too():
    class Keeping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache = torch.ones(5)
            return x + 1

    assert saved_bytes(Keeping(), torch.randn(3, requires_grad=True), []) == (20, 0)


@pytest.mark.slow
def test_memory_columns_of_the_op():
    rows = rows_of(cases.linear_case(*TINY), "frozen linear", "full fine-tuning", "naive", "ssvd")
    weight, z, x = 4 * (D_IN * D_OUT + D_OUT), 4 * T * K, 4 * T * D_IN
    bases = 4 * K * (D_IN + D_OUT + K)
    for key, static, saved, kept in (
        (("frozen linear", ""), weight, 0, 0),
        (("full fine-tuning", ""), weight, 0, x),
        (("naive", ""), weight + bases, z, 0),  # z core^T is only needed for a gradient of U
        (("ssvd", "factored"), weight + bases, z, 0),
        (("ssvd", "composed"), weight + bases, z + 4 * D_IN * D_OUT, 0),  # W'
    ):
        found = [int(rows[key][name]) for name in ("static_bytes", "saved_bytes", "input_bytes")]
        assert found == [static, saved, kept], key


def test_a_composed_layer_saves_its_weight_and_a_factored_one_does_not():
    rows = rows_of(cases.layer_case(*TINY), "ssvd")
    saved = {mode: int(row["saved_bytes"]) for (_, mode), row in rows.items()}
    assert saved["composed"] - saved["factored"] == 4 * D_IN * D_OUT
    assert saved["factored"] >= 4 * (T * K + 2 * K * K)  # z, E and the core


# -- versions ------------------------------------------------------------------------------------------------------


def test_the_plain_layers_agree_with_this_package_in_float64():
    x, dy, f = Problem.draw(torch.float64, T, D_IN, D_OUT, K, CPU)
    makes = (layers.NaiveLayer, layers.RebuiltLayer, layers.ssvd_layer)
    first, *others = (versions.in_float64(make(f), x, dy) for make in makes)
    for found in others:
        for got, want in zip(found, first, strict=True):
            # U, V and sigma were rounded to float32, in three layers that hold them
            assert relative_error(got, want) <= 8 * unit_roundoff(torch.float32)


def test_mixed_precision_keeps_the_base_in_float32():
    case = cases.layer_case(torch.bfloat16, T, D_IN, D_OUT, K, base=torch.float32)
    assert str(case).startswith("layer bfloat16 on float32 ")
    rows = rows_of(case, "frozen linear", "naive", "ssvd")
    assert rows and not any(row["note"] for row in rows.values())
    assert {(row["dtype"], row["base"]) for row in rows.values()} == {("bfloat16", "float32")}


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_is_gated_by_its_own_float64(name):
    pytest.importorskip("peft")
    (version,) = versions_of(cases.layer_case(*TINY), name)
    assert rows_of(cases.layer_case(*TINY), name)[name, ""]["note"] == ""
    assert isinstance(version.run, Passes) and len(version.run.leaves) > 1
    frozen, *_ = versions_of(cases.layer_case(*TINY), "frozen linear")
    assert relative_error(version.exact[0], frozen.exact[0]) > 1e-3  # the adapter does something
    assert all(gradient.abs().max() > 0 for gradient in version.exact)
    wrong = replace(version, run=replace(version.run, forward=lambda x, *_: version.run.forward(x) * (1 + 1e-4)))
    case = cases.Case("layer", torch.float32, lambda device: [wrong], "")
    (row,) = measure(case, Clock(CPU, quick=True), 0.001, machine(CPU))
    assert row["note"] == "refused: wrong result" and row["last"] == 1


def test_psoft_has_the_known_factors_and_not_a_factorisation_of_its_own(monkeypatch):
    pytest.importorskip("peft")
    f = Factors.draw(torch.float32, D_IN, D_OUT, K, CPU)
    monkeypatch.setattr(torch.linalg, "svd", None)
    A, B = peers.layer("PSOFT", f)._get_psoft_ab_cache_buffers("default")
    U, sigma, V = f.top()
    assert_within((B @ A).detach(), U * sigma @ V.mT, U.double() * sigma.double() @ V.double().mT)


def test_torch_orthogonal_gives_the_same_rotation():
    theta = torch.randn(3, 10) / 10
    plain, exact = (peers.Orthogonal(reference.skew(each, 5))().detach() for each in (theta, theta.double()))
    assert_within(sk.cayley(theta, 5), plain, exact)


@pytest.mark.slow
def test_compiled_layers_agree_with_float64():
    rows = rows_of(cases.layer_case(*TINY, compile=True), "naive compiled", "rebuilt weight compiled")
    assert len(rows) == 2 and not any(row["note"] for row in rows.values())
    assert all(row["saved_bytes"] == "" and row["static_bytes"] for row in rows.values())


# -- operations ----------------------------------------------------------------------------------------------------


def test_accumulation_sums_the_gradients_of_four_micro_batches():
    frozen, *_, ssvd = versions_of(cases.accumulate_case(*TINY), "frozen linear", "ssvd")
    assert len(frozen.exact) == 2 and len(ssvd.exact) == 4  # y, dx (, dtheta, ddelta)
    f = Factors.draw(torch.float32, D_IN, D_OUT, K, CPU)
    layer, xs = layers.ssvd_layer(f), [torch.randn(T, D_IN) for _ in range(cases.MICRO_BATCHES)]
    dys = [torch.randn(T, D_OUT) for _ in xs]
    *_, dtheta, _ = cases._accumulated(layer, xs, dys)()

    def summed(network: nn.Module) -> torch.Tensor:
        y, theta = [network(x) for x in xs], next(p for p in network.parameters() if p.requires_grad)
        return torch.autograd.grad(y, theta, [dy.to(y[0].dtype) for dy in dys])[0]

    plain, exact = references(nn.Sequential(layer), summed)
    assert_within(dtheta, plain, exact)


def test_floors_cover_what_is_known():
    shape = (T, D_IN, D_OUT, K)
    assert work.layer_flops("frozen linear", "", *shape) == 4 * T * D_IN * D_OUT
    assert work.layer_flops("full fine-tuning", "", *shape) == 6 * T * D_IN * D_OUT
    assert work.layer_flops("LoRA r16", "", *shape) == 4 * T * D_IN * D_OUT + 6 * T * 16 * (D_IN + D_OUT)


@pytest.mark.parametrize("architecture, shapes", [
    (stacks.WHISPER, {(1280, 1280): 4 + 8, (5120, 1280): 2, (1280, 5120): 2}),
    (stacks.OWSM, {(1024, 1024): 4 + 8, (4096, 1024): 3 + 1, (1024, 4096): 2 + 1, (1024, 2048): 2}),
])  # fmt: skip
def test_the_blocks_have_the_layers_of_the_real_models(architecture, shapes):
    stack = architecture._replace(depth=1).stack()
    found = [tuple(m.weight.shape) for m in stack.modules() if isinstance(m, nn.Linear)]
    assert {shape: found.count(shape) for shape in found} == shapes
    assert 250 <= len(stacks._linears(architecture.stack())) <= 256  # the models have 512 and 380


def test_cross_attention_reads_the_encoder():
    case = stacks.WHISPER._replace(d=32, depth=1)
    stack = stacks.fill(case, stacks._factors(case, torch.float32, CPU), layers.linear)
    x, seen = torch.randn(1, 6, 32), []
    stack.decoder[0].cross.key.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    stack.encoder[0].register_forward_hook(lambda module, args, y: seen.append(y))
    stack(x)
    assert seen[0] is seen[1]


def test_a_model_row_rotates_once_a_forward_and_steps_after_the_gate(monkeypatch):
    case = stacks.model_case(torch.float32, stacks.WHISPER._replace(d=32, depth=1), 1, 16)
    version = next(v for v in case.build(CPU) if v.name == "ssvd")
    thetas = [t for t in version.held if t.ndim == 1 and t.requires_grad]
    before, calls = [theta.clone() for theta in thetas], []
    original = rotations.core_of
    monkeypatch.setattr(rotations, "core_of", lambda *args: calls.append(1) or original(*args))
    version.check()
    assert len(calls) == 1 and all(map(torch.equal, thetas, before))
    version.run()
    assert len(calls) == 2 and not any(map(torch.equal, thetas, before))
    # a step of AdamW moves a number by about its learning rate
    assert all(torch.allclose(a, b, atol=10 * stacks.LR) for a, b in zip(thetas, before))


def test_the_table_has_what_is_promised():
    cpu = cases.table(CPU, quick=False)
    assert {case.operation for case in cpu} == set(cases.OPERATIONS) and len(set(map(str, cpu))) == len(cpu)
    layer = [case for case in cpu if case.operation == "layer"]
    assert {case.T for case in layer} == {1, 64, 256, 512, 1024, 4096} and len(layer) == 28
    assert {case.passes for case in layer} == {(WHOLE,), (WHOLE, FORWARD, BACKWARD)}
    cuda = cases.table(torch.device("cuda"), quick=False)
    layer = [case for case in cuda if case.operation == "layer"]
    assert {case.T for case in layer} == {1, 64, 1024, 4096, 16384, 65536}
    assert all(case.passes == (WHOLE, FORWARD, BACKWARD) for case in layer)
    assert {case.base for case in layer} == {None, torch.float32}
    whisper = "whisper-large 16+16"
    models = [case.model for case in cuda if case.operation == "model"]
    assert models == [whisper, "owsm-1b 12+12", f"{whisper}, query and value"]
