"""What is installed and what is missing, each with the command that mends it. Nothing heavy is imported to find out."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ligerexport.checkpoint.sources import BUILTIN_MODELS
from ligerexport.cli import options
from ligerexport.cli.options import Json, verb
from ligerexport.errors import LigerError, MissingDependency
from ligerexport.exporters.targets import TARGETS, get_target
from ligerexport.kernels.tuning import FORWARD
from ligerexport.staging import CACHE_HINT, cache_dir
from ligerexport.versions import TRIED, installed_version, untried

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "ligerexport"


@verb(verbose=False)
def doctor(
    target: Annotated[str | None, typer.Option(help="Look at what this target needs too.")] = None,
    plugin: Annotated[Path | None, typer.Option(metavar="FILE", help="Library of the TensorRT plugin.")] = None,
    json: Json = False,
) -> None:
    """Say what is missing, and what mends it."""
    checks = examine(target, plugin)
    if json:
        fine = all(check.ok or not check.needed for check in checks)
        options.finish_json(True, {"ok": fine, "checks": [check.to_dict() for check in checks]})
    else:
        options.print_table(("", "", "", ""), [
            ("ok" if c.ok else "missing" if c.needed else "-", c.name, c.found, "" if c.ok else c.mend or "")
            for c in checks
        ])  # fmt: skip
    if any(check.needed and not check.ok for check in checks):
        raise typer.Exit(MissingDependency.exit_code)


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


def examine(target: str | None = None, plugin: Path | None = None) -> list[Check]:
    """Look at this machine, and at what a target for GPUs needs.

    Args:
        target: Row of `TARGETS`; None looks at what all need.
        plugin: Library of the plugin for TensorRT, to be looked at too.

    Raises:
        UsageError: No such target.
    """
    checks = [_python(), *_packages(), _releases(), *_machine(), *_cache()]
    return checks + (_gpu(target, plugin) if target and get_target(target).sms else [])


def _python() -> Check:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    return Check("python", version, SpecifierSet(">=3.11").contains(version), True, "install Python 3.11 or later")


def _packages() -> list[Check]:
    """Check what the installed package's metadata asks for: the base, the runtimes, and the extras of what exists."""
    from packaging.requirements import Requirement

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


def _releases() -> Check:
    """Name what is installed in a release that was never tried; it may work all the same."""
    found = {name: untried(name) for name in TRIED}
    strange = [name for name, what in found.items() if what]
    if not strange:
        return Check("tried releases", "all that is installed")
    mend = " ".join(["pip install", *(f"'{name}=={TRIED[name][1]}.*'" for name in strange)])
    return Check("tried releases", "; ".join(f"{name} {found[name]}" for name in strange), False, False, mend)


def _machine() -> list[Check]:
    from ligerexport.threads import default_threads

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return [
        Check("cores", f"{default_threads()} to use, {os.cpu_count()} in all"),
        Check("memory", f"{memory / 1e9:.1f} GB" if memory else "unknown"),
    ]


def _gpu(target: str, plugin: Path | None) -> list[Check]:
    """Check runtime, driver, GPU and plugin."""
    from ligerexport.exporters.tensorrt import machine

    rtx, sms, driver = target == "trt-rtx", get_target(target).sms, machine.driver()
    module, library = machine.python_module(rtx=rtx), None if rtx else machine.library()
    name, extra = ("TensorRT-RTX", "rtx") if rtx else ("TensorRT", "trt")
    mend = f"pip install '{PACKAGE}[{extra}]'" + ("" if rtx else "; on a Jetson: apt install nvidia-jetpack")
    found = ", ".join(x for x in (module, library) if x) or "neither Python package nor library found"
    rows = [Check(name, found, bool(module or library), True, mend)]
    version = f"CUDA {driver.version}" if driver else "not found"
    rows.append(
        Check("CUDA driver", version, driver is not None, False, "install NVIDIA's driver, where there is a GPU")
    )
    gpus = driver.sms if driver else ()
    fits = bool(gpus) and all(sm in sms or (not rtx and sm > FORWARD) for sm in gpus)
    known = f"{target} is for compute capability {', '.join(map(str, sms))}; name the device's with --sm"
    rows.append(Check("GPU", ", ".join(f"sm_{sm}" for sm in gpus) or "none", fits, False, known))
    if not rtx:
        here = plugin is not None and plugin.is_file()
        found = "not given" if plugin is None else str(plugin) if here else f"{plugin} is not there"
        mend = "cmake -S exporters/tensorrt/runner -B build/trt && cmake --build build/trt, then --plugin FILE"
        rows.append(Check("plugin", found, here, False, mend))
        triton = installed_version("triton")
        rows.append(
            Check("triton", triton or "not installed", triton is not None, False, f"pip install '{PACKAGE}[gpu]'")
        )
    return rows


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
