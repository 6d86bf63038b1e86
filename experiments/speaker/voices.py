"""The real voices: 21 people out of Debian's packages, brought to one telephone band and to utterances of 3 to 4 s.

Their recordings differ in more than the voice (studio or living room, G.722, GSM or Vorbis), so all of them lose what
a telephone would not carry, their silent ends and their loudness. What codecs leave inside the band remains.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from experiments.asr import DemoError, progress
from experiments.asr.audio import RATE, Samples, read_audio, write_wav
from experiments.asr.fetch import ASTERISK, FRENCH, ITALIAN, SPANISH, STAMP, VOICES, ensure
from experiments.asr.runfolder import short_hash

PARTS = (ASTERISK, FRENCH, SPANISH, ITALIAN, VOICES)
BAND = (300.0, 3400.0)  # Hz
SHORTEST, LONGEST = 3.0, 4.0  # seconds of an utterance
UTTERANCES = 12  # of each voice, at most
FLOOR = 10 ** (-35 / 20)  # of the loudest 20 ms: quieter ends are cut off
LOUDNESS = 0.05  # root mean square
NO_SPEECH = re.compile(r"beep|tone|silence|monkeys\.|ring")
THEMES = "egypt|moon|pizzeria"  # of ktuberling, recorded together in most languages


@dataclass(frozen=True)
class Voice:
    """Who, what for, whose recordings of which files (a regular expression on the path below `folder`)."""

    name: str
    role: str  # "train", "validation" or "test"
    package: str  # voices of one package share something of the channel
    folder: str  # below the data folder
    files: str = ""


def _tuberling(language: str, role: str, themes: str = THEMES) -> Voice:
    """Only themes of a median pitch that agrees: some languages were spoken by several people."""
    return Voice(f"ktuberling-{language}", role, "ktuberling", f"{VOICES}/ktuberling/{language}", f"^({themes})")


TABLE = (
    Voice("ivrvoice-ru", "train", "asterisk", f"{VOICES}/asterisk-ru"),
    Voice("wallack-fr", "train", "asterisk", f"{FRENCH}/audio"),
    Voice("jimenez-es", "train", "asterisk", f"{VOICES}/asterisk-es-co"),
    Voice("small-fish-cs", "train", "fillets", f"{VOICES}/fillets", "/cs/[^/]*-m-"),
    Voice("big-fish-cs", "train", "fillets", f"{VOICES}/fillets", "/cs/[^/]*-v-"),
    _tuberling("ca", "train", "butterflie|egypt|robot|tv"),
    _tuberling("da", "train", "moon|pizza|tv"),
    _tuberling("de", "train"),
    _tuberling("gl", "train"),
    _tuberling("lt", "train", "tv|xmas"),
    Voice("desjardins-fr", "validation", "asterisk", f"{VOICES}/asterisk-fr-armelle"),
    _tuberling("el", "validation"),
    _tuberling("ru", "validation"),
    Voice("smith", "test", "asterisk", ".", f"^({ASTERISK}|{SPANISH})/audio/"),  # in two languages
    Voice("flora-it", "test", "asterisk", f"{ITALIAN}/audio"),
    Voice("dalzot-it", "test", "asterisk", f"{VOICES}/asterisk-it-menardi"),
    Voice("small-fish-nl", "test", "fillets", f"{VOICES}/fillets", "/nl/[^/]*-m-"),
    Voice("big-fish-nl", "test", "fillets", f"{VOICES}/fillets", "/nl/[^/]*-v-"),
    _tuberling("sl", "test"),
    _tuberling("uk", "test"),
    _tuberling("wa", "test"),
)
ROLES = {voice.name: voice.role for voice in TABLE}
PACKAGES = {voice.name: voice.package for voice in TABLE}


def narrow(samples: Samples) -> Samples:
    """Samples without what lies outside of BAND, without silent ends, at one loudness."""
    spectrum = np.fft.rfft(samples)
    frequency = np.fft.rfftfreq(len(samples), 1 / RATE)
    spectrum[(frequency < BAND[0]) | (frequency > BAND[1])] = 0
    band = np.fft.irfft(spectrum, len(samples))
    frame = RATE // 50
    power = (band[: len(band) // frame * frame].reshape(-1, frame) ** 2).mean(axis=1)
    if not power.any():
        return np.zeros(0, np.float32)
    loud = np.flatnonzero(power > FLOOR**2 * power.max())
    band = band[loud[0] * frame : (loud[-1] + 1) * frame]
    return (band * LOUDNESS / np.sqrt((band**2).mean())).astype(np.float32)


def utterances(files: list[Path]) -> Iterator[Samples]:
    """Recordings in their order, short ones joined until they last SHORTEST seconds, all cut off at LONGEST."""
    joined = np.zeros(0, np.float32)
    for file in files:
        joined = np.concatenate([joined, narrow(read_audio(file))])
        if len(joined) >= SHORTEST * RATE:
            yield joined[: round(LONGEST * RATE)]
            joined = joined[:0]


def recordings_of(voice: Voice, data: Path) -> list[Path]:
    """The voice's files, in an order that mixes them but is always the same."""
    folder = data / voice.folder
    names = [
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in (".g722", ".gsm", ".ogg", ".wav")
    ]
    chosen = [name for name in names if re.search(voice.files, name) and not NO_SPEECH.search(name)]
    return [folder / name for name in sorted(chosen, key=lambda name: hashlib.sha256(name.encode()).digest())]


def prepare(data: Path, out: Path) -> Path:
    """Writes out/voices-HASH/VOICE/NUMBER.wav unless it is there; returns that folder. Fetches what is missing."""
    ensure(data, PARTS)
    stamps = [json.loads((data / part / STAMP).read_text())["files"] for part in PARTS]
    recipe = [BAND, SHORTEST, LONGEST, UTTERANCES, FLOOR, LOUDNESS, NO_SPEECH.pattern]
    folder = out / f"voices-{short_hash([stamps, recipe, list(map(astuple, TABLE))])[:8]}"
    if folder.is_dir():
        return folder
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".voices-") as name:
        for voice in progress(TABLE, desc="preparing voices", unit="voice"):
            number = 0
            for number, samples in zip(range(1, UTTERANCES + 1), utterances(recordings_of(voice, data))):
                path = Path(name, "all", voice.name, f"{number:02d}.wav")
                path.parent.mkdir(parents=True, exist_ok=True)
                write_wav(path, samples)
            if number < 8:
                raise DemoError(f"{data / voice.folder}: gives {voice.name} only {number} utterances (8 wanted)")
        shutil.move(Path(name, "all"), folder)
    return folder
