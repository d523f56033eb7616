"""What is installed and what is missing, each with the command that mends it. Nothing heavy is imported to find out."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ligerexport.artifact import installed_version
from ligerexport.exporters.targets import TARGETS
from ligerexport.sources import BUILTIN_MODELS
from ligerexport.staging import cache_dir

PACKAGE = "ligerexport"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        found: What is there.
        ok: Whether that is enough.
        needed: Whether converting, building or running needs it.
        mend: A command, where it is not.
    """

    name: str
    found: str
    ok: bool = True
    needed: bool = False
    mend: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def examine() -> list[Check]:
    """Look at this machine."""
    return [_python(), *_packages(), *_machine(), *_cache()]


def _python() -> Check:
    version = platform.python_version()
    return Check("python", version, SpecifierSet(">=3.11").contains(version), True, "install Python 3.11 or later")


def _packages() -> list[Check]:
    """Check what the installed package's metadata asks for: the base, the runtimes, and the extras of what exists."""
    try:
        wanted = [Requirement(line) for line in metadata.requires(PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        return [Check(PACKAGE, "runs from a checkout without being installed", False, True, "pip install -e '.[onnx]'")]
    base = [requirement for requirement in wanted if requirement.marker is None or requirement.marker.evaluate()]
    runtimes = [Requirement(f"{name}{version}") for t in TARGETS.values() for name, version in t.requires.items()]
    checks = [_package(requirement) for requirement in base + runtimes]
    for extra in ("builtin", *sorted({target.extra for target in TARGETS.values()})):
        rows = [r for r in wanted if r.marker and not r.marker.evaluate() and r.marker.evaluate({"extra": extra})]
        missing = [r.name for r in rows if not _satisfied(r)]
        found = f"missing: {', '.join(missing)}" if missing else "installed"
        checks.append(Check(f"extra {extra}", found, not missing, False, f"pip install '{PACKAGE}[{extra}]'"))
    return checks


def _satisfied(requirement: Requirement) -> bool:
    version = installed_version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _package(requirement: Requirement) -> Check:
    version = installed_version(requirement.name)
    found = version or "not installed"
    if version and not _satisfied(requirement):
        found = f"{version}, needed is {requirement.specifier}"
    mend = f"pip install '{requirement.name}{requirement.specifier}'"
    return Check(requirement.name, found, _satisfied(requirement), True, mend)


def _machine() -> list[Check]:
    from ligerexport.exporters.onnx.session import default_threads

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return [
        Check("cores", f"{default_threads()} to use, {os.cpu_count()} in all"),
        Check("memory", f"{memory / 1e9:.1f} GB" if memory else "unknown"),
    ]


def _cache() -> list[Check]:
    directory = cache_dir()
    place = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(place).free
    rows = [Check("cache", f"{directory}, {free / 1e9:.1f} GB free")]
    for name in BUILTIN_MODELS:
        cached = (directory / "models" / name / "config.json").is_file()
        command = f"{PACKAGE} convert {name} -o liger"
        rows.append(Check(f"model {name}", "cached" if cached else "not fetched yet", cached, False, command))
    return rows
