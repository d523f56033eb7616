"""What a device downloads to run an artifact, and the time from there to the first token, without a compiler.

    make wheels
    python benchmarks/install.py dist ARTIFACT -o benchmarks/results/install.json

Sizes are of the files in the wheels of this package and of all that pip installs with it, for each machine that has a
wheel. `least` has those of `LEAST`, which every program that runs a model needs. Times are of fresh processes in an
environment just made for this machine, with nothing else on the path, in turns with those of importing `LEAST`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ligerexport.exporters.onnx.native.cpus import machine

PROMPT = "Once upon a time"
LEAST = ("onnxruntime", "tokenizers")
GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")


def sizes(wanted: Iterable[str], name: str) -> dict[str, Any]:
    """Return the bytes to download and to store of packages and what they need, in all and of the largest."""
    with tempfile.TemporaryDirectory() as place:
        options = [word for glibc in GLIBC for word in ("--platform", f"{glibc}_{name}")]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:", *options]
        subprocess.run([*command, "--dest", place, *wanted], check=True)
        wheels = sorted(Path(place).glob("*.whl"))
        stored = {}
        for file in wheels:
            with zipfile.ZipFile(file) as archive:
                stored["-".join(file.name.split("-")[:2])] = sum(info.file_size for info in archive.infolist())
        largest = dict(sorted(stored.items(), key=lambda row: -row[1])[:8])
        return {
            "packages": len(wheels), "download_bytes": sum(file.stat().st_size for file in wheels),
            "bytes": sum(stored.values()), "largest": largest,
        }  # fmt: skip


def times(wheel: Path, artifact: Path, rounds: int) -> dict[str, Any]:
    """Return the seconds of each command, and of the first run after the installation."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        programs = Path(place, "bin")
        install = [programs / "python", "-m", "pip", "install", "--quiet", wheel.resolve()]
        without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # of this checkout
        subprocess.run(install, cwd=place, env=without, check=True)
        environment = {"PATH": str(programs), "LIGEREXPORT_CACHE": str(Path(place, "cache"))}

        def seconds(*command: object) -> float:
            begin = time.perf_counter()
            words = [str(programs / str(command[0])), *map(str, command[1:])]
            subprocess.run(words, env=environment, cwd=place, check=True, capture_output=True)
            return time.perf_counter() - begin

        run = "ligerexport", "run", artifact.resolve(), PROMPT, "-n", 1, "-q"
        found: dict[str, Any] = {"first_run": seconds(*run)}
        commands = {
            "python": ("python", "-c", "pass"),
            "import_runtime": ("python", "-c", "import onnxruntime, tokenizers"),
            "import": ("python", "-c", "import ligerexport as lx; lx.load, lx.generate"),
            "version": ("ligerexport", "--version"),
            "run": run,
        }
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                taken[name].append(seconds(*command))
        return found | {
            name: {"median": statistics.median(row), "low": min(row), "high": max(row)} for name, row in taken.items()
        }


def main() -> None:
    """Measure every wheel in a directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    wheels = {
        file.stem.rpartition("manylinux_2_")[2].partition("_")[2]: file for file in args.wheels.glob("*manylinux*")
    }
    manifest = json.loads((args.artifact / "manifest.json").read_text())
    result = {
        "command": " ".join(["python", "benchmarks/install.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "artifact": {name: manifest[name] for name in ("lowering", "precision")},
        "sizes": {name: sizes([str(wheel)], name) for name, wheel in sorted(wheels.items())},
        "least": {name: sizes(LEAST, name) for name in sorted(wheels)},
        "seconds": times(wheels[machine()], args.artifact, args.rounds),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
