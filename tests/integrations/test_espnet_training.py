"""The ESPnet adapter under ESPnet's own command line, trainer and loader: trained, saved, averaged, resumed, loaded."""

from __future__ import annotations

import argparse
import runpy
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bounds import assert_within
from espnet_models import TinyTask, asr_model, espnet2, integration, outputs, write_data
from models import references

import ssvd_kernels as sk

forms = pytest.mark.parametrize("form", ["weight", "activation"])


def train(folder: Path, epochs: int, form: str, encoder: str = "e_branchformer", strategy: str = "all") -> Path:
    """Trains for `epochs` on random data as a recipe would, going on from what is there; the folder of its results."""
    data, base, results = folder / "data", folder / "base.pth", folder / "results"
    if not base.exists():
        torch.manual_seed(3)
        torch.save(asr_model(encoder).state_dict(), base)
    config = folder / "train.yaml"
    config.write_text(
        f"""
        encoder: {encoder}
        use_adapter: true
        adapter: ssvd_kernels
        adapter_conf:
            {{rotation_ratio: 0.5, rotation_map: cayley, target_modules: [attn.linear_q, w_2], form: {form}}}
        save_strategy: {strategy}
        freeze_param: [encoder, decoder, ctc]
        optim: adamw
        optim_conf: {{lr: 0.02}}
        batch_type: unsorted
        batch_size: 2
        keep_nbest_models: 3
        best_model_criterion: [[valid, loss, min]]
        num_att_plot: 0
        use_tensorboard: false
        use_matplotlib: false
        num_workers: 0
        ngpu: 0
        resume: true
        """
    )
    arguments = write_data(data) if not data.exists() else (folder / "arguments").read_text().split()
    (folder / "arguments").write_text(" ".join(arguments))
    options = f"--config {config} --output_dir {results} --max_epoch {epochs} --init_param {base}".split()
    TinyTask.main(cmd=[*options, *arguments])
    return results


def load(results: Path, file: str) -> torch.nn.Module:
    model, _ = TinyTask.build_model_from_file(results / "config.yaml", results / file)
    return model.eval()


@forms
@pytest.mark.parametrize("encoder", ["e_branchformer", "transformer"])
def test_a_trained_model_file_loads_and_averages(tmp_path, encoder, form):
    results = train(tmp_path, 3, form, encoder)
    last, state = load(results, "3epoch.pth"), torch.load(results / "3epoch.pth")
    base = asr_model(encoder)
    base.load_state_dict(torch.load(tmp_path / "base.pth"))
    layers = sk.ssvd_layers(last)
    assert {name.rpartition(".")[2] for name in layers} == {"linear_q", "w_2"} and any("src_attn" in n for n in layers)
    assert {(layer.side, layer.form) for layer in layers.values()} == {("input", form), ("output", form)}
    assert all(layer.theta.abs().max() > 0 and layer.delta_sigma.abs().max() > 0 for layer in layers.values())
    assert (outputs(last) - outputs(base)).abs().max() > 1e-3
    for name, tensor in base.state_dict().items():  # only the adapter was trained
        assert torch.equal(state[name], tensor), name

    averaged = load(results, "valid.loss.ave_3best.pth")
    epochs = [torch.load(results / f"{epoch}epoch.pth") for epoch in (1, 2, 3)]
    means = []
    for name, layer in sk.ssvd_layers(averaged).items():  # the other tensors are averages of equal ones, to rounding
        assert layer.factorized
        thetas = [epoch[f"{name}.theta"] for epoch in epochs]
        means.append((layer.theta.detach(), sum(thetas) / 3, sum(theta.double() for theta in thetas) / 3))
    assert_within(*map(torch.cat, zip(*means)))
    plain, exact = references(last, outputs)
    assert_within(outputs(last), plain, exact)
    sk.merge(last)
    assert_within(outputs(last), plain, exact, "merged")


@forms
def test_training_goes_on_where_it_was_interrupted(tmp_path, form):
    whole = torch.load(train(tmp_path, 2, form) / "2epoch.pth")
    for strategy in ("all", "required_grad_only"):
        folder = tmp_path / strategy
        folder.mkdir()
        train(folder, 1, form, strategy=strategy)
        resumed = torch.load(train(folder, 2, form, strategy=strategy) / "2epoch.pth")
        assert any(name.endswith("theta") for name in resumed)
        for name, tensor in resumed.items():
            assert torch.equal(tensor, whole[name]), name
    assert not any(name.endswith("weight") for name in resumed)


@forms
def test_what_trained_alone_loads_over_the_base_weights_only(tmp_path, form):
    results = train(tmp_path, 1, form, strategy="required_grad_only")
    with pytest.raises(RuntimeError, match="no base weight was loaded"):
        load(results, "1epoch.pth")
    model, _ = TinyTask.build_model_from_file(results / "config.yaml", tmp_path / "base.pth")
    untrained = outputs(model.eval())
    model.load_state_dict(torch.load(results / "1epoch.pth"), strict=False)
    whole = torch.load(tmp_path / "base.pth") | torch.load(results / "1epoch.pth")
    torch.save(whole, results / "whole.pth")
    assert (outputs(model) - untrained).abs().max() > 1e-3
    assert torch.equal(outputs(load(results, "whole.pth")), outputs(model))


def test_the_launcher_runs_an_espnet_program(capsys, monkeypatch):
    usage = "usage: python -m ssvd_kernels.integrations.espnet"
    program = ["espnet2.bin.aggregate_stats_dirs", "--help"]
    for arguments, code, text in ((program, 0, "--input_dir"), (["--help"], 0, usage), ([], 2, usage)):
        monkeypatch.setattr("sys.argv", ["espnet.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            integration.main()
        assert stopped.value.code == code and text in "".join(capsys.readouterr())


@pytest.mark.parametrize(("strategy", "runs"), [("adapter_only", False), ("required_grad_only", True)])
def test_the_launcher_refuses_what_espnet_would_refuse_after_an_epoch(capsys, monkeypatch, strategy, runs):
    called: list[bool] = []
    parser = argparse.ArgumentParser()
    for option in ("--save_strategy", "--adapter"):
        parser.add_argument(option)
    program = SimpleNamespace(get_parser=lambda: parser, main=lambda: called.append(True))
    monkeypatch.setitem(sys.modules, "some_train", program)
    monkeypatch.setattr("sys.argv", ["espnet.py", "some_train", "--save_strategy", strategy, "--adapter=ssvd_kernels"])
    with nullcontext() if runs else pytest.raises(SystemExit):
        integration.main()
    assert called == [True] * runs
    assert ("save_strategy must be all or required_grad_only" in capsys.readouterr().err) != runs


def test_processes_that_espnet_spawns_register_too(monkeypatch):
    monkeypatch.setattr(espnet2.layers.create_adapter, "create_adapter_fn_table", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
        runpy.run_module(integration.__name__, run_name="__mp_main__")
    assert espnet2.layers.create_adapter.create_adapter_fn_table == {"ssvd_kernels": integration.create_adapter}
