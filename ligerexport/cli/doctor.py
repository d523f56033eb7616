"""`doctor`: show what is installed or missing, with the command to install it. Nothing heavy is imported."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ligerexport.checkpoint.sources import BUILTIN_MODELS
from ligerexport.cli import options
from ligerexport.cli.options import Json, verb
from ligerexport.errors import LigerError, MissingDependency
from ligerexport.exporters.backend import Check
from ligerexport.exporters.onnx.native import check_ready, find
from ligerexport.exporters.targets import TARGETS, get_backend
from ligerexport.staging import CACHE_HINT, cache_dir
from ligerexport.versions import TRIED, installed_version, untried

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "ligerexport"


@verb(verbose=False)
def doctor(
    target: Annotated[str | None, typer.Option(help="Check what this target needs as well.")] = None,
    plugin: Annotated[Path | None, typer.Option(metavar="FILE", help="Library of the TensorRT plugin.")] = None,
    json: Json = False,
) -> None:
    """Show what is missing and how to install it."""
    checks = examine(target, plugin)
    if json:
        fine = all(check.ok or not check.needed for check in checks)
        options.finish_json(True, {"ok": fine, "checks": [asdict(check) for check in checks]})
    else:
        options.print_table(("", "", "", ""), [
            ("ok" if c.ok else "missing" if c.needed else "-", c.name, c.found, "" if c.ok else c.mend or "")
            for c in checks
        ])  # fmt: skip
    if any(check.needed and not check.ok for check in checks):
        raise typer.Exit(MissingDependency.exit_code)


def examine(target: str | None = None, plugin: Path | None = None) -> list[Check]:
    """Check this machine, and the requirements of a target.

    Args:
        target: Row of `TARGETS`; None checks only the requirements of all targets.
        plugin: Library of the TensorRT plugin, which is checked too.
    """
    checks = [_python(), *_packages(), _releases(), *_machine(), _operator(), *_cache()]
    return checks + (get_backend(target).examine(plugin) if target else [])


def _python() -> Check:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    return Check("python", version, SpecifierSet(">=3.11").contains(version), True, "install Python 3.11 or later")


def _packages() -> list[Check]:
    """Check the requirements of the installed package: its base, the runtimes, and the extras."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires(PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        return [Check(PACKAGE, "runs from a checkout without being installed", False, True, "pip install -e .")]
    base = [requirement for requirement in wanted if requirement.marker is None or requirement.marker.evaluate()]
    runtimes = [Requirement(f"{name}{version}") for t in TARGETS.values() for name, version in t.requires.items()]
    checks = [_package(requirement) for requirement in dict.fromkeys(base + runtimes)]
    for extra in sorted({*(metadata.metadata(PACKAGE).get_all("Provides-Extra") or ())} - {"all", "dev", "onnx"}):
        missing = [row.name for row in _extra(wanted, extra) if not _satisfied(row)]
        found = f"missing: {', '.join(missing)}" if missing else "installed"
        checks.append(Check(f"extra {extra}", found, not missing, False, f"pip install '{PACKAGE}[{extra}]'"))
    return checks


def _extra(wanted: Sequence[Requirement], extra: str) -> list[Requirement]:
    """Return what an extra requires, with what the extras of this package that it names require."""
    rows = [r for r in wanted if r.marker and not r.marker.evaluate() and r.marker.evaluate({"extra": extra})]
    named = [name for row in rows if row.name == PACKAGE for name in sorted(row.extras)]
    own = [row for row in rows if row.name != PACKAGE]
    return [*own, *(requirement for name in named for requirement in _extra(wanted, name))]


def _satisfied(requirement: Requirement) -> bool:
    version = installed_version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _package(requirement: Requirement) -> Check:
    version = installed_version(requirement.name)
    found = version or "not installed"
    if version and not _satisfied(requirement):
        found = f"{version}, but {requirement.specifier} is needed"
    mend = f"pip install '{requirement.name}{requirement.specifier}'"
    return Check(requirement.name, found, _satisfied(requirement), True, mend)


def _releases() -> Check:
    """List the packages whose release is untested; they may work nevertheless."""
    found = {name: untried(name) for name in TRIED}
    strange = [name for name, what in found.items() if what]
    if not strange:
        return Check("tried releases", "all installed packages")
    mend = " ".join(["pip install", *(f"'{name}=={TRIED[name][1]}.*'" for name in strange)])
    return Check("tried releases", "; ".join(f"{name} {found[name]}" for name in strange), False, False, mend)


def _machine() -> list[Check]:
    from ligerexport.threads import default_threads

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return [
        Check("cores", f"{default_threads()} to use, {os.cpu_count()} in total"),
        Check("memory", f"{memory / 1e9:.1f} GB" if memory else "unknown"),
    ]


def _operator() -> Check:
    """Say which library the lowering native would load, without compiling one."""
    try:
        path = find()
        check_ready()
    except LigerError as error:
        return Check("operator of native", error.message, False, False, error.hint)
    return Check("operator of native", str(path) if path else "compiled when it is first needed")


def _cache() -> list[Check]:
    try:
        directory = cache_dir()
    except LigerError as error:
        return [Check("cache", error.message, False, False, error.hint)]
    place = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK | os.X_OK)
    said = "" if writable else ", not writable"
    rows = [Check("cache", f"{directory}, {free / 1e9:.1f} GB free{said}", writable, False, CACHE_HINT)]
    for name in BUILTIN_MODELS:
        cached = os.path.isfile(directory / "models" / name / "config.json")
        command = f"{PACKAGE} convert {name} -o liger"
        rows.append(Check(f"model {name}", "cached" if cached else "not fetched yet", cached, False, command))
    return rows
