"""The levels of processors that a wheel's libraries are compiled for, and what this machine's processor has.

`levels.json` is the table, which CMake reads too. Every core must have what a level needs, in Linux' names.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_NAMES = {"arm64": "aarch64", "amd64": "x86_64"}
_FEATURES = ("flags", "Features")
_MODEL = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU variant", "CPU part")


@dataclass(frozen=True)
class Level:
    """One library of a machine's type.

    Attributes:
        file: Name of the library.
        flags: What the compiler is told.
        needs: Features that every core needs.
    """

    file: str
    flags: tuple[str, ...]
    needs: frozenset[str]


@cache
def levels() -> dict[str, tuple[Level, ...]]:
    """Return the levels of each type of machine, the fastest first."""
    table = json.loads(Path(__file__).with_name("levels.json").read_text(encoding="utf-8"))
    return {
        machine: tuple(
            Level(f"liger-{machine}-{row['name']}.so", tuple(row["flags"].split()), frozenset(row["needs"].split()))
            for row in rows
        )
        for machine, rows in table.items()
    }


def machine() -> str:
    """Return the type of this machine, as `levels` names it."""
    name = platform.machine()
    return _NAMES.get(name.lower(), name)


def features() -> frozenset[str]:
    """Return what every core of this machine has; nothing where Linux does not say it."""
    cores = [frozenset(value.split()) for name, value in _cpuinfo() if name in _FEATURES]
    return cores[0].intersection(*cores[1:]) if cores else frozenset()


def processor() -> str:
    """Return a text that differs for processors that may need different libraries."""
    found = {f"{name} {value}" for name, value in _cpuinfo() if name in _FEATURES + _MODEL}
    return "\n".join([machine(), *sorted(found or {platform.processor()})])


def best(directory: Path) -> Path | None:
    """Return the library in a directory for the fastest level that this processor has; None if there is none."""
    has = features()
    rows = (directory / row.file for row in levels().get(machine(), ()) if row.needs <= has)
    return next((path for path in rows if path.is_file()), None)


def _cpuinfo() -> list[tuple[str, str]]:
    """Return Linux' names and values, for each core; nothing elsewhere."""
    if not CPUINFO.is_file():
        return []
    pairs = (line.partition(":") for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines())
    return [(name.strip(), value.strip()) for name, _, value in pairs]
