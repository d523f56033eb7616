"""Make a directory with Debian's Python for 64-bit ARM, in which QEMU runs programs: python tests/arm64.py build/arm64.

It needs Debian 12 or newer, whose releases and mirrors it takes. The test of the aarch64 wheel takes `build/arm64`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "build" / "arm64"
"""Where the test looks for the directory."""


def make(place: Path) -> None:
    """Fetch Python with all that it depends on, and unpack it."""
    state = place / "var" / "lib" / "apt"
    (state / "lists" / "partial").mkdir(parents=True)
    (state / "archives" / "partial").mkdir(parents=True)
    (state / "status").touch()  # nothing is installed yet
    settings = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "APT::Sandbox::User": "root", "Dir::State": state,
        "Dir::State::status": state / "status", "Dir::Cache": state, "Acquire::Languages": "none",
        "APT::Install-Recommends": "false",
    }  # fmt: skip
    (state / "apt.conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    environment = os.environ | {"APT_CONFIG": str(state / "apt.conf")}
    for words in (["update"], ["install", "--yes", "--download-only", "python3", "libstdc++6"]):
        subprocess.run(["apt-get", "-qq", *words], env=environment, check=True)
    for package in (state / "archives").glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, place], check=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
