"""The speech experiment: training that resumes, the run's folder and report, and the commands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from asr_tiny import command as tiny_command
from asr_tiny import tone, write_built_in, write_wav

import ssvd_kernels as sk
from experiments.asr import DemoError, demo, report, runfolder, speech, strength, train, transcribe
from experiments.asr.recognizer import Recognizer, Score, load_recognizer
from ssvd_kernels.adapters.file_format import read_adapter

pytestmark = pytest.mark.usefixtures("one_thread")


def test_batches_cover_every_epoch():
    seen = [i for step in range(6) for i in train.batch_indices(4, 2, step, seed=7)]
    assert [sorted(seen[e : e + 4]) for e in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert len({tuple(seen[e : e + 4]) for e in (0, 4, 8)}) > 1
    assert len(train.batch_indices(3, 8, 0, seed=0)) == 8


def test_learning_rate_warms_up_and_decays():
    rates = [train.Recipe(steps=100, lr=1.0).lr_at(step) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and rates[9] == 1.0
    assert rates[99] == 1 / 90 and all(r > 0 for r in rates)
    assert train.Recipe(steps=1, lr=1.0).lr_at(0) == 1.0


def fit(folder: Path, ct2: Path, clips: speech.Speech) -> tuple[train.History, dict[str, torch.Tensor]]:
    recognizer = load_recognizer(str(ct2), ct2, torch.device("cpu"))
    sk.inject(recognizer.model, sk.SSVDConfig(rank=4), progress=False)
    recipe = train.Recipe(steps=6, batch=2, lr=1e-2, checkpoint_every=2)
    run = runfolder.RunFolder(folder, {"recipe": vars(recipe)})
    history = train.train(recognizer, clips, recipe, run)
    return history, {n: p.detach().clone() for n, p in recognizer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("how", ["signal", "crash"])
def test_resumed_training_equals_uninterrupted(how, ct2_folder, clips, tmp_path, monkeypatch):
    whole, weights = fit(tmp_path / "whole", ct2_folder.path, clips)
    assert len(whole.losses) == 6 and whole.losses[-1] < whole.losses[0]
    loss, calls, on_interrupt = train.cross_entropy, [], signal.getsignal(signal.SIGINT)

    def interrupted(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:  # the step after a checkpoint: a signal saves it, a crash loses it
            if how == "crash":
                raise MemoryError("as if the process had been killed")
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "cross_entropy", interrupted)
    with pytest.raises((train.Interrupted, MemoryError)):
        fit(tmp_path / "parts", ct2_folder.path, clips)
    resumed, again = fit(tmp_path / "parts", ct2_folder.path, clips)
    assert len(calls) == (6 if how == "signal" else 8)
    assert resumed.losses == whole.losses
    assert again.keys() == weights.keys() and all(torch.equal(again[n], weights[n]) for n in weights)
    assert signal.getsignal(signal.SIGINT) is on_interrupt


def test_groups_keep_their_share_of_the_learning_rate(ct2_folder, clips, tmp_path):
    recognizer = load_recognizer(str(ct2_folder.path), ct2_folder.path, torch.device("cpu"))
    sk.inject(recognizer.model, sk.SSVDConfig(rank=4), progress=False)
    first, *rest = [p for p in recognizer.model.parameters() if p.requires_grad]
    groups = [{"params": [first], "lr": 3e-2}, {"params": rest}]
    recipe = train.Recipe(steps=3, batch=2, lr=1e-2)
    run = runfolder.RunFolder(tmp_path / "run", {})
    train.train(recognizer, clips, recipe, run, groups=groups)
    assert [group["lr"] for group in groups] == pytest.approx([3 * recipe.lr_at(2), recipe.lr_at(2)])


def test_divergence_is_reported(ct2_folder, clips, tmp_path, monkeypatch):
    loss = train.cross_entropy
    monkeypatch.setattr(train, "cross_entropy", lambda *args: loss(*args) * float("nan"))
    with pytest.raises(DemoError, match=r"step 1: the loss is nan"):
        fit(tmp_path / "run", ct2_folder.path, clips)


def test_run_folder_refuses_other_settings_and_damage(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(DemoError, match="--resume requires a checkpoint"):
        runfolder.RunFolder(folder, {"rank": 4}, resume=True)
    run = runfolder.RunFolder(folder, {"rank": 4})
    run.save_checkpoint({"step": 1})
    assert runfolder.RunFolder(folder, {"rank": 4}, resume=True).load_checkpoint() == {"step": 1}
    with pytest.raises(DemoError, match="rank: 4 there, 8 now"):
        runfolder.RunFolder(folder, {"rank": 8})
    (folder / runfolder.CHECKPOINT).write_bytes(b"half a file")
    with pytest.raises(DemoError, match="delete it, or give --fresh"):
        run.load_checkpoint()
    assert runfolder.RunFolder(folder, {"rank": 8}, fresh=True).load_checkpoint() is None


def test_evaluations_are_kept_by_what_they_depend_on(tmp_path):
    run, calls = runfolder.RunFolder(tmp_path, {}), []

    def compute() -> list[str]:
        calls.append(1)
        return [f"heard {len(calls)}"]

    for weights, heard in (("a", 1), ("a", 1), ("b", 2)):
        assert run.transcripts("before", {"weights": weights}, compute) == [f"heard {heard}"]


def test_report_shows_all_numbers_and_failed_checks(tmp_path):
    before, after = Score([(20, 60, 70, 300), (10, 40, 10, 100)]), Score([(8, 100, 20, 400)])
    half = Score([(4, 100, 20, 400)])
    rows = [report.Row("target", before, {1.0: after, 0.5: half}),
            report.Row("source", Score([(1, 20, 3, 90)]), {1.0: Score([(2, 20, 3, 90)]), 0.5: half})]  # fmt: skip
    facts = {"Trained parameters": "12 of 600", "Time per step": "1 s", "Adapter file": "50 bytes"}
    result = report.Report("title", rows, facts, {"Merged the same": False}, [3.0, 2.0, 1.5], {"total": 600})
    assert not result.passed
    text = report.write(result, tmp_path)
    assert "| WER before | WER strength 1 | WER strength 0.5 |" in text
    assert all(shown in text for shown in ("30.0 %", "8.0 %", "5.0 %", "10.0 %", "12 of 600", "Merged the same: NO"))
    first, second = (row["scores"] for row in json.loads((tmp_path / "report.json").read_text())["rows"])
    assert first["before"]["wer"] == 0.3 and first["before"]["cer"] == 0.2 and first["before"]["utterances"] == 2
    assert second["strength 0.5"]["wer"] == 0.04
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.md").read_text() == text


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(demo, "LEAST", 2)  # of 17 clips, two are on the validation side
    recipe = ["--rank", "4", "--steps", "3", "--batch", "2", "--eval-window", "2"]
    return [*tiny_command(tmp_path, 17, 40, 1.2), *recipe, "--out", str(tmp_path / "run")]


@pytest.mark.slow
def test_demo_on_a_users_speech(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(strength, "balanced", lambda points: points[1])
    assert demo.main(command) == 0
    kept = json.loads((tmp_path / "run/report.json").read_text())
    assert kept["checks"] == {name: True for name in kept["checks"]} and len(kept["checks"]) == 2
    assert len(kept["losses"]) == 3
    assert kept["adapter_bytes"] == (tmp_path / "run/adapter.safetensors").stat().st_size
    assert kept["transcripts"]["reloaded"] == kept["transcripts"]["after"]
    assert kept["trainable"] == 22 * 10  # k(k+1)/2 = 10 a layer; two encoder layers of 6, one decoder layer of 10
    assert (tmp_path / "run/report.png").is_file()
    assert list(kept["rows"][0]["scores"]) == ["before", "strength 1", "strength 0.5"] and kept["strength"] == 0.5
    assert read_adapter(tmp_path / "run/adapter.safetensors").strength == 0.5
    out = capsys.readouterr().out
    assert "9 clips to train on" in out and "2 to choose the strength by" in out and "6 m to measure" in out
    assert "Strength: 0.5, by the mean WER of 2 validation clips (0.25: " in out and "WER strength 0.5" in out
    untouched = Mock(side_effect=AssertionError("a finished run trains or transcribes again"))
    monkeypatch.setattr(train, "cross_entropy", untouched)
    monkeypatch.setattr(Recognizer, "transcribe", untouched)
    monkeypatch.setattr(demo, "transcripts_of_new_process", lambda *args: ["something else"])
    assert demo.main(command) == 1
    assert "Adapter reloaded in a new process transcribes the same: NO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said", "trained"),
    [
        ([], "split off validation speech (9 + 2 clips): strength 1 is kept\n11 clips to train on", 11),
        (["--strength", "0.5"], "11 clips to train on", 11),
        (["--eval-manifest", "m.jsonl"], "(17 + 0 clips): strength 1 is kept", 17),
    ],
)
def test_without_a_choice_everything_trains(command, arguments, said, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "LEAST", 8)
    monkeypatch.chdir(tmp_path)
    training, validation, sets = demo.gather(demo.parse([*command, *arguments, "--language", "es"]))
    assert said in capsys.readouterr().out and training.language == sets["m"].language == "es"
    assert len(training) == trained and validation == [] and list(sets) == ["m"]


def test_the_source_domain_stays_english_beside_another_language(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_built_in(tmp_path / "data")
    asked = [argument for argument in command if argument != "--no-source"]
    args = demo.parse([*asked, "--language", "es", "--data", str(tmp_path / "data")])
    training, validation, sets = demo.gather(args)
    assert training.language == "es" and [data.language for data in validation] == ["es", "en"]
    languages = {"m": "es", speech.AS_RECORDED: "en", "LibriVox reader": "en", "playing cards": "en"}
    assert {name: data.language for name, data in sets.items()} == languages
    prompts = [{clip.text for clip in data.clips} for data in (validation[1], sets[speech.AS_RECORDED])]
    assert all(prompts) and not prompts[0] & prompts[1]
    assert all(text.startswith("This is prompt") for text in set.union(*prompts))
    assert [len(sets[name]) for name in ("LibriVox reader", "playing cards")] == [3, 3]  # without those too long


def test_which_strength_is_chosen(monkeypatch):
    points = [strength.Point(s, Score([(t, 100, 0, 1)]), Score([(o, 100, 0, 1)])) for s, t, o in
              ((0.25, 9, 2), (0.5, 5, 4), (0.75, 4, 5), (1.0, 3, 9))]  # fmt: skip
    monkeypatch.setattr(strength, "measure", lambda *args: points)
    evaluate, clips = Mock(window=30), [[0] * 24] * 2
    value, why = demo.choose(evaluate, "weights", clips, None)
    assert value == 0.5  # of two equal means the smaller
    assert why == "0.5, by the mean WER of 24 + 24 validation clips (0.25: 5.5 %, 0.5: 4.5 %, 0.75: 4.5 %, 1: 6.0 %)"
    points[:] = [point._replace(source=None) for point in points]
    assert demo.choose(evaluate, "weights", clips[:1], None)[0] == 1
    assert demo.choose(evaluate, "weights", [], 0.0) == (0.0, "0, as given")
    assert demo.choose(evaluate, "weights", [], None)[0] == 1


@pytest.mark.parametrize("value", ["-0.1", "1.6", "nan"])
def test_a_given_strength_is_in_its_range(value, capsys):
    with pytest.raises(SystemExit):
        demo.parse(["--strength", value])
    assert f"--strength must be between 0 and 1.5, got {value}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_terminal_shows_the_commands_own_lines_only(command):
    """transformers imports torchao where it is installed, which complains about itself."""
    bars = "reading|before|factorising|fine-tuning|strength|target|source|merged|transcribing"
    own = re.compile(rf"(|WER .*|({bars})\b.*%\|.*)")
    for arguments in (["--help"], [*command, "--steps", "1"]):
        start = [sys.executable, "-m", "experiments.asr.demo", *arguments]
        done = subprocess.run(start, capture_output=True, text=True)
        foreign = [line for line in re.split(r"[\r\n]", done.stderr) if not own.fullmatch(line)]
        assert done.returncode == 0 and not foreign


@pytest.mark.slow
def test_demo_stops_and_goes_on(command, tmp_path, monkeypatch, capsys):
    loss = train.cross_entropy

    def interrupted(*args: object) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)  # type: ignore[arg-type]

    assert demo.main([*command, "--resume"]) == 2
    assert "--resume requires a checkpoint" in capsys.readouterr().err
    monkeypatch.setattr(train, "cross_entropy", interrupted)
    assert demo.main(command) == 130
    assert "stopped after step 1 of 3" in capsys.readouterr().err
    monkeypatch.setattr(train, "cross_entropy", loss)
    assert demo.main([*command, "--resume"]) == 0
    assert demo.main([*command, "--steps", "4"]) == 2
    assert "steps: 3 there, 4 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "17"], "`rank` must be between 1 and 16 "),
        (["--side", "left"], "`side` must be one of 'input', 'output', 'smaller', 'both', got 'left'"),
        (["--device", "gpu7"], "--device must be auto, cpu or, with a GPU, cuda, got gpu7"),
        (["--manifest", "none.jsonl"], "none.jsonl: the manifest cannot be read"),
        (["--manifest", os.devnull], f"{os.devnull}: the manifest is empty"),
        (["--eval-manifest", os.devnull], f"{os.devnull}: the manifest is empty"),
        (["--window", "0.5"], "--window must be at least the length of the longest clip, "),
        (["--eval-window", "31"], "`window` must be greater than 0 and at most 2 s, got 31.0 s"),
    ],
)
def test_demo_names_bad_arguments(command, arguments, message, capsys):
    assert demo.main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bad_folders_are_found_before_anything_is_read(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speech.Clip, "read", lambda clip: 1 / 0)
    (tmp_path / "file").write_text("")
    for main in (demo.main, lambda argv: strength.main(["model", "a.safetensors", "--target", "t.jsonl", *argv[-2:]])):
        assert main([*command, "--out", str(tmp_path / "file" / "run")]) == 2
        assert "file/run: nothing can be written there, because of " in capsys.readouterr().err
    assert demo.main([*command, "--language", "germanic"]) == 2
    assert "`language` must be a code or a name that Whisper knows" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["text", "checkpoint", "adapter"])
def test_a_full_disk_is_named_and_leaves_what_was_there(what, tmp_path):
    """As if at most 4096 bytes fitted; in a process of its own, which cannot take that back."""
    code = f"""
import resource, signal, torch
import ssvd_kernels as sk
from pathlib import Path
from experiments.asr import commands, runfolder
run, layer = runfolder.RunFolder(Path({str(tmp_path)!r}), {{}}), torch.nn.Sequential(torch.nn.Linear(200, 200))
sk.inject(layer, sk.SSVDConfig(ratio=0.9), progress=False)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
write = {{
    "text": lambda: runfolder.write_json(run.path / "text", "a" * 9999),
    "checkpoint": lambda: run.save_checkpoint({{"a": torch.zeros(9999)}}),
    "adapter": lambda: sk.save_adapter(layer, run.path / "adapter"),
}}
raise SystemExit(commands.exit_status(write[{what!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.fullmatch(rf"error: .*{what}.*cannot be written.*\n", done.stderr), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_each_set_is_heard_and_scored_in_its_own_language(clips, tmp_path, monkeypatch):
    known: list[str] = []
    recognizer = Mock(fingerprint="")

    def set_language(language: str) -> None:
        known.append(language)
        recognizer.language = language

    recognizer.set_language = set_language
    monkeypatch.setattr(clips, "language", "es")
    english = Mock(language="en", fingerprint="", texts=[])
    for data in (clips, english, clips):
        folder = Mock()
        demo.Evaluation(recognizer, folder, 2)("before", "", "set", data)
        assert folder.transcripts.call_args[0][1]["language"] == data.language
    monkeypatch.setattr(sk, "set_strength", lambda *args: None)
    strength.measure(recognizer, Mock(), {}, [1.0], clips, english)
    assert known == ["es", "en", "es", "es", "en"]


def test_transcribe_prints_what_it_hears(ct2_folder, tmp_path, monkeypatch, capsys):
    audio = write_wav(tmp_path / "a.wav", tone(300, 1))
    base = ["transcribe", "--model", str(ct2_folder.path), "--window", "2"]
    monkeypatch.setattr("sys.argv", [*base, str(audio)])
    assert transcribe.main() == 0
    assert capsys.readouterr().out.startswith(f"{audio}\t")
    monkeypatch.setattr("sys.argv", [*base, str(audio), "--adapter", str(tmp_path / "none.safetensors")])
    assert transcribe.main() == 2
    assert "none.safetensors" in capsys.readouterr().err
