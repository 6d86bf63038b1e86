"""Sound files to 16 kHz mono samples, and the child-like voice; both by the FFmpeg inside PyAV."""

from __future__ import annotations

from pathlib import Path

import av
import av.error
import av.filter
import numpy as np
from numpy.typing import NDArray

from . import DemoError

RATE = 16000
CHILD_FACTOR = 1.6
RAW_FORMATS = {".g722": "g722", ".gsm": "gsm"}  # files without a header: the name tells the format

Samples = NDArray[np.float32]


class AudioError(DemoError):
    """An audio file that is missing, cannot be decoded or holds nothing."""


def _run_filters(frames: list[av.AudioFrame], filters: list[tuple[str, str]]) -> Samples:
    graph = av.filter.Graph()
    nodes = [
        graph.add_abuffer(
            template=None,
            sample_rate=frames[0].sample_rate,
            format=frames[0].format.name,
            layout=frames[0].layout.name,
            time_base=frames[0].time_base,
        )
    ]
    nodes += [graph.add(name, arguments) for name, arguments in filters]
    nodes.append(graph.add("abuffersink"))
    graph.link_nodes(*nodes).configure()
    pieces: list[Samples] = []

    def drain() -> None:
        while True:
            try:
                pieces.append(graph.pull().to_ndarray()[0])
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    for frame in frames:
        graph.push(frame)
        drain()
    graph.push(None)
    drain()
    return np.concatenate(pieces).astype(np.float32) if pieces else np.zeros(0, np.float32)


def read_audio(path: Path) -> Samples:
    """Samples (n,) float32 in [-1, 1] at 16 kHz, mono. Raises AudioError naming the file."""
    if not path.is_file():
        raise AudioError(f"{path}: there is no such audio file")
    try:
        with av.open(str(path), format=RAW_FORMATS.get(path.suffix.lower()), metadata_errors="replace") as container:
            if not container.streams.audio:
                raise AudioError(f"{path}: holds no audio stream")
            frames = list(container.decode(audio=0))
    except av.error.FFmpegError as error:
        raise AudioError(f"{path}: cannot be decoded as audio ({error.strerror})") from error
    if not any(frame.samples for frame in frames):
        raise AudioError(f"{path}: holds no sound (0 samples)")
    return _run_filters(frames, [("aformat", f"sample_fmts=flt:channel_layouts=mono:sample_rates={RATE}")])


def raise_voice(samples: Samples, factor: float) -> Samples:
    """Pitch and formants times `factor` at unchanged tempo and length: play faster, then stretch back (WSOLA)."""
    tail = np.zeros(RATE // 5, np.float32)  # the stretch keeps up to 40 ms of the end to itself
    frame = av.AudioFrame.from_ndarray(np.concatenate([samples, tail])[None], format="flt", layout="mono")
    frame.sample_rate = RATE
    filters = [("asetrate", str(round(RATE * factor))), ("aresample", str(RATE)), ("atempo", repr(1 / factor))]
    return _run_filters([frame], filters)[: len(samples)]
