"""Print the licences of the packages in constraints.txt: `python tests/licences.py > docs/reference/licences.md`.

Pinned packages must be installed. A test compares names and versions, and checks the licences.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
KNOWN = (
    "apache", "mit", "bsd", "isc", "mpl", "mozilla", "python software", "psf", "zlib", "unlicense", "cnri", "0bsd",
    "hpnd", "bsl", "lesser general public", "nvidia proprietary",
)  # fmt: skip
"""Words in licences with no conditions for other software. The LGPL is for chardet, which the extra `eval` installs;
NVIDIA's is for the extra `rtx`, whose wheels must not be redistributed by themselves."""
PROGRAMS = ("codespell",)
"""Programs of the extra `dev` that are run and never imported. The GPL has no conditions for their input."""
SAID_ELSEWHERE = dict.fromkeys(("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"), "NVIDIA proprietary")
"""Licences of packages without one in their metadata, from their sources."""


def canonical(name: str) -> str:
    """Return the normalised name of a package."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_known(licence: str) -> bool:
    """Return whether every part of a licence expression is known."""
    return all(any(word in part.lower() for word in KNOWN) for part in re.split(r" AND | OR |; ", licence))


def of(name: str) -> tuple[str, str]:
    """Return version and licence of an installed package."""
    about = metadata.metadata(name)
    classified = [x.rpartition(" :: ")[2] for x in about.get_all("Classifier") or () if x.startswith("License :: ")]
    classified = [x for x in classified if x not in ("OSI Approved", "DFSG approved")]
    stated = about.get("License-Expression") or "; ".join(classified) or (about.get("License") or "").strip()
    return metadata.version(name).partition("+")[0], SAID_ELSEWHERE.get(canonical(name)) or stated.partition("\n")[
        0
    ].strip("() ")


def read(file: Path) -> dict[str, tuple[str, str]]:
    """Return the document's content: version and licence by name."""
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \|$", file.read_text(), re.MULTILINE)
    return {canonical(name): (version, licence) for name, version, licence in rows}


def text() -> str:
    """Return the document."""
    names = re.findall(r"^([A-Za-z0-9_.-]+)==", CONSTRAINTS.read_text(), re.MULTILINE)
    rows = [(name, *of(name)) for name in sorted(names, key=canonical)]
    lines = [
        "# Licences of what this package uses", "",
        "All of constraints.txt, by `python tests/licences.py > docs/reference/licences.md`. The package itself is",
        "Apache-2.0. None of these are part of it: `pip` installs them, and most belong to extras.", "",
        "Its texts for fitting a memory (`ligerexport/data/calibration`) are presidents' messages of 1790 to 1940, in",
        "the public domain, documents that `benchmarks/calibration_text.py` generates, and what SmolLM2-135M-Instruct",
        "(Apache-2.0) wrote.", "",
        "| package | version | licence |", "|---|---|---|",
        *(f"| `{name}` | {version} | {licence or 'not said'} |" for name, version, licence in rows),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
