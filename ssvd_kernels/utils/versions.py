"""Known incompatible releases of other packages, reported where users encounter them."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet

# (two ranges of releases, what fails when both are installed, and the remedy)
CONFLICTS = (
    (
        {"transformers": ">=5.24", "peft": "<0.22"},
        "load_adapter() and add_adapter() of transformers models raise; PEFT's own functions work",
        "pip install 'transformers<5.24', or a PEFT of 0.22 or newer",
    ),
)


def conflicts() -> list[str]:
    """A sentence for each of `CONFLICTS` that this environment has."""
    return [
        f"{' and '.join(f'{name} {metadata.version(name)}' for name in pair)} are incompatible: {fails}. {remedy}"
        for pair, fails, remedy in CONFLICTS
        if all(_installed(name, releases) for name, releases in pair.items())
    ]


def _installed(name: str, releases: str) -> bool:
    try:
        return SpecifierSet(releases, prereleases=True).contains(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
