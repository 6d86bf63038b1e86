"""A server that transcribes speech with the adapter that each request names, several adapters in one batch.

    pip install '.[serve,demo]'
    python -m examples.serve --model data/whisper-tiny.en --adapters FOLDER     # with NAME.safetensors, ...
    curl -F audio=@clip.wav -F adapter=NAME localhost:8000/transcribe           # without adapter: the base model
    curl -T other.safetensors localhost:8000/adapters/OTHER                     # while it serves

POST /transcribe answers {"text", "adapter", "seconds"}, with the seconds that the clip lasts. GET /adapters lists the
adapters; PUT and DELETE /adapters/NAME add and remove one, with its file in FOLDER; GET /health says whether all is
well. Adapters have the layers, ranks, side and rotation of the first. Who reaches the port may do all of this.

One thread runs the model: it takes what arrives within --wait seconds, at most --batch clips, and generates once.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import queue
import re
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import ssvd_kernels as sk
from experiments.asr import DemoError
from experiments.asr.audio import RATE, AudioError, Samples, decode
from experiments.asr.commands import exit_status
from experiments.asr.fetch import default_data
from experiments.asr.recognizer import Recognizer, load_recognizer
from experiments.asr.transcribe import pick_device

LARGEST_CLIP, LARGEST_ADAPTER = 32 << 20, 1 << 30  # bytes of an upload
BATCHES_WAITING = 8  # beyond these, requests are refused

logger = logging.getLogger("uvicorn.error")


@dataclass
class Job:
    """A clip to transcribe; without samples, an adapter to remove, which then no batch is using."""

    adapter: str | None
    samples: Samples | None
    answer: Future[str] = field(default_factory=Future)


class Batcher:
    """The thread that runs the model on what waits."""

    def __init__(self, recognizer: Recognizer, bank: sk.AdapterBank, most: int, wait: float) -> None:
        self.recognizer, self.bank, self.most, self.wait = recognizer, bank, most, wait
        self.jobs: queue.Queue[Job | None] = queue.Queue(BATCHES_WAITING * most)
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)

    async def __call__(self, job: Job) -> str:
        try:
            self.jobs.put_nowait(job)
        except queue.Full:
            raise HTTPException(503, "too many requests are waiting: try again", {"Retry-After": "1"}) from None
        return await asyncio.wrap_future(job.answer)

    def stop(self) -> None:
        """Returns when all jobs are done."""
        self.jobs.put(None)
        self.thread.join()

    def _work(self) -> None:
        jobs: list[Job | None] = []
        while jobs[-1:] != [None]:
            jobs = [self.jobs.get()]
            end = time.monotonic() + self.wait
            while jobs[-1] is not None and len(jobs) < self.most:
                try:
                    jobs.append(self.jobs.get(timeout=max(0.0, end - time.monotonic())))
                except queue.Empty:
                    break
            self._run([job for job in jobs if job is not None and job.answer.set_running_or_notify_cancel()])

    def _run(self, jobs: list[Job]) -> None:
        try:
            clips = [job for job in jobs if job.samples is not None and self._has(job)]
            clips.sort(key=lambda job: job.adapter or "")  # an adapter's rows are multiplied together
            if clips:
                with self.bank.rows([job.adapter for job in clips]):
                    texts = self.recognizer.hear([job.samples for job in clips])
                for job, text in zip(clips, texts, strict=True):
                    job.answer.set_result(text)
            for job in jobs:
                if job.samples is None and self._has(job):
                    self.bank.remove(job.adapter)
                    job.answer.set_result("")
        except Exception:
            logger.exception("a batch of %d failed", len(jobs))
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(HTTPException(500, "the model failed: see the server's log"))

    def _has(self, job: Job) -> bool:
        """Whether the job's adapter is there; it may have left since the request came."""
        try:
            self.check(job.adapter)
        except HTTPException as error:
            job.answer.set_exception(error)
        return not job.answer.done()

    def check(self, adapter: str | None) -> None:
        names = self.bank.names()
        if adapter is not None and adapter not in names:
            raise HTTPException(404, f"`adapter` must be one of {', '.join(names) or '(none)'}, got {adapter!r}")


def application(batcher: Batcher, folder: Path) -> Starlette:
    """Serves the batcher's model; `folder` keeps the adapters' files."""
    bank, longest = batcher.bank, batcher.recognizer.window

    async def transcribe(request: Request) -> JSONResponse:
        async with request.form(max_files=1, max_fields=1) as form:
            audio, adapter = form.get("audio"), form.get("adapter")
            if not isinstance(audio, UploadFile) or isinstance(adapter, UploadFile) or {*form} - {"audio", "adapter"}:
                raise HTTPException(422, "the form must have a file `audio`, may have a text `adapter`, and no more")
            batcher.check(adapter)
            try:
                samples = await run_in_threadpool(decode, audio.file, audio.filename or "audio", longest)
            except AudioError as error:
                raise HTTPException(422, str(error)) from None
        text = await batcher(Job(adapter, samples))
        return JSONResponse({"text": text, "adapter": adapter, "seconds": len(samples) / RATE})

    async def adapters(request: Request) -> JSONResponse:
        return JSONResponse({"adapters": bank.names(), "bytes_per_adapter": bank.bytes_per_adapter})

    async def add(request: Request) -> JSONResponse:
        name = request.path_params["name"]
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise HTTPException(422, f"`name` must consist of at most 64 letters, digits, '_' and '-', got {name!r}")
        path = folder / f"{name}.safetensors"
        try:
            file = path.open("xb")
        except FileExistsError:
            raise HTTPException(409, f"there is an adapter {name!r}: DELETE it first") from None
        try:
            with file:
                async for chunk in request.stream():
                    file.write(chunk)
            await run_in_threadpool(bank.add, name, path)
        except BaseException as error:
            path.unlink()
            if isinstance(error, ValueError):
                raise HTTPException(422, str(error).replace(str(path), path.name)) from None
            raise
        return JSONResponse({"adapter": name}, 201)

    async def remove(request: Request) -> JSONResponse:
        name = request.path_params["name"]
        await batcher(Job(name, None))
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
        return JSONResponse({"adapter": name})

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"waiting": batcher.jobs.qsize()}, 200 if batcher.thread.is_alive() else 503)

    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    async def left(request: Request, error: ClientDisconnect) -> JSONResponse:
        return JSONResponse({"error": "the upload ended early"}, 400)  # which nobody reads

    @asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        batcher.thread.start()
        yield
        await run_in_threadpool(batcher.stop)

    routes = [
        Route("/transcribe", transcribe, methods=["POST"], max_body_size=LARGEST_CLIP),
        Route("/adapters", adapters),
        Route("/adapters/{name}", add, methods=["PUT"], max_body_size=LARGEST_ADAPTER),
        Route("/adapters/{name}", remove, methods=["DELETE"]),
        Route("/health", health),
    ]
    handlers = {HTTPException: refused, ClientDisconnect: left}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=running)


def prepare(options: argparse.Namespace) -> Starlette:
    files = sorted(options.adapters.glob("*.safetensors"))
    if not files:
        raise DemoError(f"--adapters must be a folder with adapters, NAME.safetensors, got {options.adapters}")
    recognizer = load_recognizer(options.model, default_data(), pick_device(options.device), options.language)
    sk.load_adapter(recognizer.model, files[0])
    bank = sk.AdapterBank(recognizer.model, options.memory)
    least = (options.batch + 1) * bank.bytes_per_adapter  # a batch of different ones, and one that is being added
    if options.memory < least:
        raise DemoError(f"--memory must hold --batch + 1 adapters, {least} bytes, got {options.memory}")
    for file in files:
        bank.add(file.stem, file)
    return application(Batcher(recognizer, bank, options.batch, options.wait), options.adapters)


def size(text: str) -> int:
    """Bytes, of a number with KB, MB or GB."""
    found = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if not found:
        raise argparse.ArgumentTypeError(f"must be a number with KB, MB or GB, got {text!r}")
    return int(found[1]) * 1000 ** ["", "K", "M", "G"].index(found[2])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a Whisper model, or its Hugging Face name")
    parser.add_argument(
        "--adapters", type=Path, required=True, help="folder with an adapter at least, NAME.safetensors"
    )
    parser.add_argument("--language", default="en", help="of a multilingual model (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="clips at once (default: %(default)s)")
    parser.add_argument("--wait", type=float, default=0.02, help="seconds for others to join (default: %(default)s)")
    parser.add_argument("--memory", type=size, default="512MB", help="for the adapters in use (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.batch < 1 or options.wait < 0:
        parser.error("--batch must be at least 1 and --wait at least 0")
    return exit_status(lambda: uvicorn.run(prepare(options), host=options.host, port=options.port) or 0)


if __name__ == "__main__":
    sys.exit(main())
