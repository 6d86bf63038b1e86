"""The server of examples/serve.py: a real one, on the loopback address, with real clients."""

# ruff: noqa: E402  (the imports below need the extra `serve`)
from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from asr_tiny import real_data, tiny_tokenizer, tone, write_ct2, write_ct2_folder, write_wav

for _needed in ("starlette", "uvicorn", "python_multipart", "httpx2"):
    pytest.importorskip(_needed, reason="the server needs the extra `serve`, and its client httpx2")

import httpx2
import uvicorn

import ssvd_kernels as sk
from examples import serve
from experiments.asr import fetch
from experiments.asr.audio import read_audio
from experiments.asr.recognizer import Recognizer, load_recognizer
from experiments.asr.speech import english_prompts

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
NAMES = ("alice", "bob", "carol", "dave")
SERVED = NAMES[:3]  # from the start
HEARD = ("encoder/conv", "decoder/layer_0/attention/", "decoder/layer_0/ffn/")


def make(recognizer: Recognizer, clips: list[Path], folder: Path, deviation: float, **options) -> dict:
    """Random adapters NAMES in `folder`; (name, clip) -> what is heard with that adapter alone, None: without one."""

    def heard(name: str | None) -> dict:
        return {(name, i): recognizer.hear([read_audio(clip)])[0] for i, clip in enumerate(clips)}

    alone = heard(None)
    sk.inject(recognizer.model, sk.SSVDConfig(**options), progress=False)
    folder.mkdir()
    torch.manual_seed(0)
    for name in NAMES:
        for layer in sk.ssvd_layers(recognizer.model).values():
            layer.theta.data.normal_(0, deviation)
            layer.delta_sigma.data.normal_(0, deviation)
        sk.save_adapter(recognizer.model, folder / f"{name}.safetensors")
        alone |= heard(name)
    return alone


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """A tiny model whose words depend on what it hears, adapters, clips, and what each pair gives alone."""
    folder = tmp_path_factory.mktemp("served")
    ct2 = write_ct2_folder(folder)
    louder = {n: 30 * a if n.endswith("weight") and n.startswith(HEARD) else a for n, a in ct2.variables.items()}
    louder["decoder/position_encodings/encodings"] = louder["decoder/position_encodings/encodings"][:16]  # short texts
    write_ct2(folder / "model.bin", louder)
    settings = json.loads((folder / "config.json").read_text())
    settings["suppress_ids"] = [i for token, i in tiny_tokenizer().get_vocab().items() if not token.isascii()]
    (folder / "config.json").write_text(json.dumps(settings))
    load = partial(load_recognizer, str(folder), folder, torch.device("cpu"))
    clips = [write_wav(folder / f"{i}.wav", tone(150 + 500 * i, 1.2) * (i + 0.2) / 3) for i in range(2)]
    alone = make(load(), clips, folder / "adapters", 1.0, rank=8)
    assert len(set(alone.values())) == 10
    make(load(), [], folder / "rank", 1.0, rank=7)
    other = {n: a + 0.01 if n.endswith("ffn/linear_0/weight") else a for n, a in louder.items()}
    write_ct2(folder / "model.bin", other)
    make(load(), [], folder / "base", 1.0, rank=8)
    write_ct2(folder / "model.bin", louder)
    return SimpleNamespace(folder=folder, clips=clips, alone=alone)


@contextmanager
def running(app) -> Iterator[tuple[uvicorn.Server, httpx2.Client]]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            yield server, client
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def served(made, tmp_path, monkeypatch) -> Iterator[SimpleNamespace]:
    """A running server of the tiny model with the adapters SERVED; `calls` has the rows of each call of `generate`."""
    for name in SERVED:
        (tmp_path / f"{name}.safetensors").write_bytes((made.folder / f"adapters/{name}.safetensors").read_bytes())
    batcher, calls = None, []

    class Watched(serve.Batcher):
        def __init__(self, *args) -> None:
            nonlocal batcher
            super().__init__(*args)
            batcher, generate = self, self.recognizer.model.generate
            self.hook = lambda: None

            def watched(**options):
                calls.append(len(options["input_features"]))
                self.hook()
                return generate(**options)

            self.recognizer.model.generate = watched

    monkeypatch.setattr(serve, "Batcher", Watched)
    command = {"model": str(made.folder), "adapters": tmp_path, "language": "en", "device": "cpu"}
    app = serve.prepare(SimpleNamespace(**command, batch=8, wait=0.01, memory=10**6))
    with running(app) as (server, client):
        yield SimpleNamespace(client=client, batcher=batcher, calls=calls, folder=tmp_path, server=server)


def until(reached: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def ask(served: SimpleNamespace, clip: Path | tuple[str, bytes], adapter: str | None = None, **more) -> httpx2.Response:
    audio = clip if isinstance(clip, tuple) else (clip.name, clip.read_bytes())
    data = {**more} if adapter is None else {"adapter": adapter, **more}
    return served.client.post("/transcribe", files={"audio": audio}, data=data)


def put(served: SimpleNamespace, name: str, content: bytes) -> httpx2.Response:
    return served.client.put(f"/adapters/{name}", content=content)


def test_clients_at_once_share_a_batch_and_hear_their_own_adapter(served, made):
    pairs = list(itertools.product((None, *SERVED), range(2)))
    served.batcher.wait = 20  # until all are there
    for _ in range(3):
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(lambda pair: ask(served, made.clips[pair[1]], pair[0]), pairs))
        assert [answer.json() for answer in answers] == [
            {"text": made.alone[pair], "adapter": pair[0], "seconds": 1.2} for pair in pairs
        ]
    assert served.calls == [8, 8, 8]


def test_what_waits_goes_at_most_a_batch_at_a_time(served, made):
    served.batcher.hook = threading.Barrier(1 + 1).wait  # the worker is held in its first call
    release = served.batcher.hook
    with ThreadPoolExecutor(12) as clients:
        first = clients.submit(ask, served, made.clips[0])
        until(lambda: served.calls)
        rest = [clients.submit(ask, served, made.clips[0], "bob") for _ in range(11)]
        until(lambda: served.client.get("/health").json()["waiting"] == 11)
        served.batcher.hook = lambda: None
        release()
        assert first.result().json()["text"] == made.alone[None, 0]
        assert {answer.result().json()["text"] for answer in rest} == {made.alone["bob", 0]}
    assert served.calls == [1, 8, 3]


def test_any_sample_rate_and_what_is_there(served, made, tmp_path):
    slow = write_wav(tmp_path / "slow.wav", tone(300, 1.0, 8000), 8000)
    assert ask(served, slow).json()["seconds"] == pytest.approx(1.0, abs=0.01)
    listed = served.client.get("/adapters").json()
    assert listed == {"adapters": [*SERVED], "bytes_per_adapter": served.batcher.bank.bytes_per_adapter}
    assert served.client.get("/health").json() == {"waiting": 0}


def test_requests_that_cannot_be_served_say_why(served, made, tmp_path):
    wav = made.clips[0].read_bytes()
    long = write_wav(tmp_path / "long.wav", tone(300, 2.1))
    cases = [
        (ask(served, made.clips[0], "erin"), 404, "must be one of alice, bob, carol, got 'erin'"),
        (ask(served, made.clips[0], ""), 404, "must be one of alice, bob, carol, got ''"),
        (ask(served, made.clips[0], "../alice"), 404, "must be one of alice"),
        (ask(served, ("a.wav", b"no audio at all")), 422, "a.wav: cannot be decoded as audio"),
        (ask(served, ("a.wav", b"")), 422, "a.wav: cannot be decoded as audio"),
        (ask(served, ("a.wav", wav[:30])), 422, "a.wav: "),
        (ask(served, write_wav(tmp_path / "none.wav", tone(300, 0))), 422, "none.wav: "),
        (ask(served, long), 422, "long.wav: must last at most 2 s"),
        (ask(served, ("a.wav", wav), adaptor="bob"), 422, "the form must have a file `audio`"),
        (served.client.post("/transcribe", data={"adapter": "bob"}), 422, "the form must have a file `audio`"),
        (served.client.post("/transcribe", content=wav), 422, "the form must have a file `audio`"),
        (served.client.get("/nothing"), 404, "Not Found"),
    ]
    for answer, status, why in cases:
        assert (answer.status_code, why in answer.json()["error"]) == (status, True), answer.text
    assert not served.calls
    assert ask(served, ("a.wav", bytes(serve.LARGEST_CLIP + 1))).status_code == 413
    assert ask(served, made.clips[1], "bob").json()["text"] == made.alone["bob", 1]


def test_adapters_come_and_go_while_clients_are_served(served, made):
    dave, done, wrong = (made.folder / "adapters/dave.safetensors").read_bytes(), threading.Event(), []

    def keep_asking(name: str) -> None:
        while not done.is_set():
            answer = ask(served, made.clips[0], name)
            if answer.json().get("text") != made.alone[name, 0]:
                wrong.append(answer.text)

    with ThreadPoolExecutor(3) as clients:
        for name in SERVED:
            clients.submit(keep_asking, name)
        try:
            for _ in range(2):
                assert put(served, "dave", dave).status_code == 201
                assert ask(served, made.clips[1], "dave").json()["text"] == made.alone["dave", 1]
                assert (served.folder / "dave.safetensors").read_bytes() == dave
                assert served.client.delete("/adapters/dave").status_code == 200
                assert ask(served, made.clips[1], "dave").status_code == 404
                assert served.client.delete("/adapters/dave").status_code == 404
        finally:
            done.set()
    assert not wrong
    assert sorted(path.stem for path in served.folder.iterdir()) == served.batcher.bank.names() == [*SERVED]


def test_an_adapter_that_is_removed_serves_those_who_asked_before(served, made):
    hold = threading.Barrier(2)
    served.batcher.hook = hold.wait
    with ThreadPoolExecutor(4) as clients:
        running = clients.submit(ask, served, made.clips[0], "bob")
        until(lambda: served.calls)
        waiting = clients.submit(ask, served, made.clips[1], "bob")
        until(lambda: served.batcher.jobs.qsize() == 1)
        removals = [clients.submit(served.client.delete, "/adapters/bob") for _ in range(2)]
        until(lambda: served.batcher.jobs.qsize() == 3)
        served.batcher.hook = lambda: None
        hold.wait()
        assert [job.result().json()["text"] for job in (running, waiting)] == [made.alone["bob", i] for i in range(2)]
        assert sorted(job.result().status_code for job in removals) == [200, 404]


def test_adapters_that_cannot_be_added_leave_nothing(served, made):
    dave = (made.folder / "adapters/dave.safetensors").read_bytes()
    cases = [
        (put(served, "alice", dave), 409, "there is an adapter 'alice'"),
        (put(served, "a.b", dave), 422, "`name` must consist of"),
        (put(served, "a" * 65, dave), 422, "`name` must consist of"),
        (put(served, "%2e%2e", dave), 422, "`name` must consist of"),
        (put(served, "..%2fdave", dave), 404, "Not Found"),
        (put(served, "dave", b""), 422, "dave.safetensors is damaged"),
        (put(served, "dave", dave[:-100]), 422, "dave.safetensors is damaged"),
        (put(served, "dave", (made.folder / "rank/dave.safetensors").read_bytes()), 422, "dave.safetensors was saved"),
        (put(served, "dave", (made.folder / "base/dave.safetensors").read_bytes()), 422, "another base model"),
    ]
    for answer, status, why in cases:
        error = answer.json()["error"]
        assert (answer.status_code, why in error, str(served.folder) in error) == (status, True, False), answer.text
    assert sorted(path.stem for path in served.folder.iterdir()) == served.batcher.bank.names() == [*SERVED]


@pytest.mark.parametrize("request_line", ["POST /transcribe", "PUT /adapters/dave"])
def test_an_upload_that_breaks_off_changes_nothing(served, made, request_line, caplog):
    body = b'--x\r\nContent-Disposition: form-data; name="audio"; filename="a.wav"\r\n\r\n' + made.clips[0].read_bytes()
    head = (
        f"{request_line} HTTP/1.1\r\nHost: h\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 99999"
    )
    address = (served.client.base_url.host, served.client.base_url.port)
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
    assert ask(served, made.clips[0], "bob").json()["text"] == made.alone["bob", 0]
    assert sorted(path.stem for path in served.folder.iterdir()) == [*SERVED] and served.calls == [1]
    with socket.create_connection(address) as connection:  # as long as it says, but without the form's end
        connection.sendall(head.replace("99999", str(len(body))).encode() + b"\r\n\r\n" + body)
        assert b" 422 " in connection.recv(1000).split(b"\r\n")[0]
    assert "Traceback" not in caplog.text


def test_an_error_of_the_model_reaches_its_batch_alone(served, made):
    served.batcher.wait, served.batcher.hook = 1, lambda: 1 / 0
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda name: ask(served, made.clips[0], name), [None, *SERVED] * 2))
    assert {(answer.status_code, answer.json()["error"]) for answer in answers} == {
        (500, "the model failed: see the server's log")
    }
    served.batcher.wait, served.batcher.hook = 0.01, lambda: None
    assert ask(served, made.clips[0], "bob").json()["text"] == made.alone["bob", 0]
    assert served.client.delete("/adapters/bob").status_code == 200  # no failed batch holds it


def test_a_full_queue_refuses_and_a_shutdown_answers_what_waits(served, made):
    hold = threading.Event()
    served.batcher.hook = lambda: hold.wait(60)
    served.batcher.jobs.maxsize = 3
    with ThreadPoolExecutor(4) as clients:
        accepted = [clients.submit(ask, served, made.clips[0], "bob")]
        until(lambda: served.calls)
        accepted += [clients.submit(ask, served, made.clips[0], name) for name in SERVED]
        until(lambda: served.batcher.jobs.qsize() == 3)
        refused = ask(served, made.clips[0])
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        served.server.should_exit = True
        hold.set()
        texts = [answer.result().json()["text"] for answer in accepted]
    assert texts == [made.alone[name, 0] for name in ("bob", *SERVED)]
    served.batcher.thread.join(60)
    assert not served.batcher.thread.is_alive()


def test_options_that_cannot_work_are_refused(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(uvicorn, "run", lambda *args, **options: 1 / 0)
    command = ["--model", str(made.folder), "--device", "cpu", "--adapters"]
    assert serve.main([*command, str(tmp_path)]) == 2
    assert "must be a folder with adapters" in capsys.readouterr().err
    assert serve.main([*command, str(made.folder / "adapters"), "--memory", "12KB"]) == 2
    assert re.search(r"--memory must hold --batch \+ 1 adapters, \d+ bytes, got 12000", capsys.readouterr().err)
    assert serve.main([*command, str(made.folder / "base")]) == 2
    assert "another base model" in capsys.readouterr().err
    for wrong in (["--memory", "many"], ["--batch", "0"], ["--wait", "-1"]):
        with pytest.raises(SystemExit):
            serve.main([*command, str(tmp_path), *wrong])
    assert [serve.size(text) for text in ("7", "5kB", "512MB", "1G")] == [7, 5000, 512_000_000, 10**9]


@pytest.mark.slow
@pytest.mark.data
def test_real_model_and_speech_as_the_first_lines_say(tmp_path):
    data = real_data(fetch.MODEL, fetch.ASTERISK)
    model, folder = str(data / fetch.MODEL), tmp_path / "adapters"
    clips = [clip.path for clip in english_prompts(data) if 2 < clip.duration() < 4][:2]
    alone = make(load_recognizer(model, data, torch.device("cpu")), clips, folder, 0.008, ratio=0.4, targets="whisper")
    assert len(set(alone.values())) >= 5
    command = [sys.executable, "-m", "examples.serve", "--model", model, "--adapters", str(folder), "--port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    pairs = list(alone)[:8]
    with subprocess.Popen([*command, "--wait", "2"], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = next(found[1] for line in process.stderr if (found := re.search(r"http://127.0.0.1:(\d+)", line)))
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=300) as client:
                served = SimpleNamespace(client=client)
                with ThreadPoolExecutor(8) as clients:
                    answers = list(clients.map(lambda pair: ask(served, clips[pair[1]], pair[0]), pairs))
        finally:
            process.send_signal(signal.SIGINT)
            errors = process.communicate(timeout=60)[1]
    assert {pair: answer.json()["text"] for pair, answer in zip(pairs, answers)} == {
        pair: alone[pair] for pair in pairs
    }
    assert process.returncode == 0 and "Finished server process" in errors and "Traceback" not in errors
