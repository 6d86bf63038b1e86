"""Sound files to 16 kHz mono samples, the child-like voice and the telephone; all by the FFmpeg inside PyAV."""

from __future__ import annotations

import hashlib
import math
import struct
import wave
from pathlib import Path
from typing import BinaryIO

import av
import av.container
import av.error
import av.filter
import numpy as np
from numpy.typing import NDArray

from experiments.asr import DemoError

RATE = 16000
CHILD_FACTOR = 1.6
TELEPHONE_RATE = 8000
TELEPHONE_SNR = 0.0  # dB; tiny.en then has a word error rate of 38 % on the held-out prompts
SLACK = 0.1  # seconds that a file may end before its header, or a manifest, says
PIPED = 0x7FFFF000  # a WAV header's size of the data from here on, or 0, is unknown: written to a pipe
MP3_HEADERS = (b"Xing\0\0\0", b"Info\0\0\0")
RAW_FORMATS = {".g722": "g722", ".gsm": "gsm"}  # files without a header: the name tells the format

Samples = NDArray[np.float32]


class AudioError(DemoError):
    """An audio file that is missing, cannot be decoded, is truncated, or holds nothing or no numbers."""


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
                pieces.append(graph.pull().to_ndarray().mean(0))
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    for frame in frames:
        graph.push(frame)
        drain()
    graph.push(None)
    drain()
    return np.concatenate(pieces).astype(np.float32) if pieces else np.zeros(0, np.float32)


def read_audio(path: Path) -> Samples:
    """Samples (n,) float32 at 16 kHz, the mean of all channels. Raises AudioError naming the file."""
    if not path.is_file():
        raise AudioError(f"{path}: there is no such audio file")
    with path.open("rb") as file:
        return decode(file, str(path))


def decode(file: BinaryIO, name: str, longest: float = math.inf) -> Samples:
    """What `read_audio` gives, of an open file called `name`. Raises AudioError beyond `longest` seconds, too."""
    frames, seconds = [], 0.0
    options = {"protocol_whitelist": "none"}  # a playlist would have other files read
    try:
        with av.open(file, "r", format=_raw_format(name), metadata_errors="replace", options=options) as container:
            if not container.streams.audio:
                raise AudioError(f"{name}: contains no audio stream")
            for frame in container.decode(audio=0):
                frames.append(frame)
                seconds += frame.samples / frame.sample_rate
                if seconds > longest:
                    raise AudioError(f"{name}: must last at most {longest:g} s")
            promised = _promised(file, container)
        samples = _run_filters(frames, [("aformat", f"sample_fmts=fltp:sample_rates={RATE}")]) if seconds else None
    except av.error.FFmpegError as error:
        raise AudioError(
            f"{name}: cannot be decoded as audio ({error.strerror}): if it is whole, convert it to WAV or FLAC"
        ) from error
    if samples is None or not len(samples):
        raise AudioError(f"{name}: contains no sound (0 samples)")
    whole = max(promised, seconds * _promised_by_wav(file))
    if seconds < whole - SLACK:
        raise AudioError(f"{name}: is truncated: {seconds:.2f} s of the {whole:.2f} s that its header promises")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: contains NaN or infinite samples")
    return samples


def _raw_format(name: str) -> str | None:
    return RAW_FORMATS.get(Path(name).suffix.lower())


def _promised(file: BinaryIO, container: av.container.InputContainer) -> float:
    """Seconds by the header; 0 where it has none, and FFmpeg estimates them from the bit rate."""
    kind, stream = container.format.name, container.streams.audio[0]
    file.seek(0)
    beginning = file.read(1 << 20) if kind == "mp3" else b""
    if kind in {"aac", *RAW_FORMATS.values()} or (kind == "mp3" and not any(tag in beginning for tag in MP3_HEADERS)):
        return 0.0
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def _promised_by_wav(file: BinaryIO) -> float:
    """The size of a WAV file's data by its header over what is there (FFmpeg goes by that alone); 1 where unknown."""
    end = file.seek(0, 2)
    file.seek(0)
    if file.read(4) != b"RIFF":
        return 1.0
    file.seek(12)
    while len(head := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", head)
        if name == b"data":
            left = end - file.tell()
            return size / left if 0 < left < size < PIPED else 1.0
        file.seek(size + size % 2, 1)
    return 1.0


def write_wav(path: Path, samples: Samples) -> None:
    """Samples at 16 kHz as a 16-bit WAV file."""
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(RATE)
        stream.writeframes(_whole(samples).astype("<i2").tobytes())


def _whole(samples: Samples) -> NDArray[np.int16]:
    return np.round(samples * 32767).clip(-32768, 32767).astype(np.int16)


def raise_voice(samples: Samples, factor: float) -> Samples:
    """Pitch and formants times `factor` at unchanged tempo and length: play faster, then stretch back (WSOLA)."""
    tail = np.zeros(RATE // 5, np.float32)  # the stretch keeps up to 40 ms of the end to itself
    frame = av.AudioFrame.from_ndarray(np.concatenate([samples, tail])[None], format="flt", layout="mono")
    frame.sample_rate = RATE
    filters = [("asetrate", str(round(RATE * factor))), ("aresample", str(RATE)), ("atempo", repr(1 / factor))]
    return _run_filters([frame], filters)[: len(samples)]


def duration(path: Path) -> float:
    """Seconds that a sound file lasts, from its size or header, or decoded if those don't tell. Raises AudioError."""
    if not path.is_file():
        raise AudioError(f"{path}: there is no such audio file")
    if path.suffix.lower() == ".g722":
        return path.stat().st_size / 8000  # 64 kbit/s
    try:
        with av.open(str(path), format=_raw_format(path.name), metadata_errors="replace") as container:
            length = container.duration
    except av.error.FFmpegError as error:
        raise AudioError(f"{path}: cannot be opened as audio ({error.strerror})") from error
    return len(read_audio(path)) / RATE if length is None else length / av.time_base


def _speech_shaped_noise(samples: Samples, key: str) -> NDArray[np.float64]:
    """Noise (n,) with the spectrum of `samples` and random phases, the same for the same `key` everywhere."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big")
    spectrum = np.abs(np.fft.rfft(samples))
    phases = np.random.Generator(np.random.Philox(key=seed)).random(len(spectrum))
    return np.fft.irfft(spectrum * np.exp(2j * np.pi * phases), len(samples))


def _mu_law(samples: Samples) -> list[av.AudioFrame]:
    """Samples at 8 kHz as G.711 mu-law passes them on."""
    frame = av.AudioFrame.from_ndarray(_whole(samples)[None], format="s16", layout="mono")
    frame.sample_rate = TELEPHONE_RATE
    encoder, decoder = av.CodecContext.create("pcm_mulaw", "w"), av.CodecContext.create("pcm_mulaw", "r")
    for context in (encoder, decoder):
        context.sample_rate, context.layout, context.format = TELEPHONE_RATE, "mono", "s16"
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    return [decoded for packet in packets for decoded in decoder.decode(packet)]


def telephone(samples: Samples, key: str, snr: float = TELEPHONE_SNR) -> Samples:
    """A noisy telephone call: speech-shaped noise at `snr` dB, 300 to 3400 Hz, 8 kHz, G.711 mu-law; as long as before.

    The noise is drawn from `key`, so that one recording always gets the same.
    """
    noise = _speech_shaped_noise(samples, key)
    noise *= 10 ** (-snr / 20) * np.linalg.norm(samples) / (np.linalg.norm(noise) or 1.0)
    frame = av.AudioFrame.from_ndarray((samples + noise).astype(np.float32)[None], format="flt", layout="mono")
    frame.sample_rate = RATE
    band = 2 * [("highpass", "f=300"), ("lowpass", "f=3400")]  # twice: 24 dB an octave
    passed = _mu_law(_run_filters([frame], [*band, ("aresample", str(TELEPHONE_RATE))]))
    heard = _run_filters(passed, [("aformat", f"sample_fmts=flt:channel_layouts=mono:sample_rates={RATE}")])
    return np.pad(heard, (0, max(0, len(samples) - len(heard))))[: len(samples)]


CHANNELS = {"": lambda samples, key: samples, "telephone": telephone}
