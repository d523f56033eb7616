"""The releases of dependencies that this version was tried with, and the warning about any other.

`pyproject.toml` has the releases that may be installed, and `TRIED` those that were tried: a test compares both. A
release that is known to break is outside the bounds of `pyproject.toml`; an untried release gets a warning. `EXTRAS`
has what running an artifact does not need.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from importlib.util import find_spec

from ligerexport.console import warn
from ligerexport.errors import MissingDependency

TRIED: dict[str, tuple[str, str]] = {
    "torch": ("2.11", "2.13"),
    "transformers": ("5.17", "5.24"),
    "onnx": ("1.20", "1.23"),
    "onnx-ir": ("1.0", "1.1"),
    "onnxruntime": ("1.29", "1.32"),
    "peft": ("0.18", "0.21"),
    "gradio": ("6.30", "6.31"),
    "triton": ("3.6", "3.6"),
}
"""Oldest and newest minor release of each distribution that was tried, including their bug fixes."""

EXTRAS: dict[str, tuple[str, ...]] = {
    "build": ("torch", "transformers", "onnx", "onnx_ir"),
    "builtin": ("torch", "transformers", "gguf", "accelerate"),
    "hub": ("huggingface_hub",),
    "recover": ("torch", "transformers", "peft", "accelerate"),
}
"""Modules that a whole command needs, by the extra that installs them. Others are checked where they are used."""


def require(extra: str) -> None:
    """Check that the modules of a row of `EXTRAS` are installed, without importing them.

    Raises:
        MissingDependency: Some are not installed.
    """
    if missing := [name for name in EXTRAS[extra] if find_spec(name) is None]:
        raise MissingDependency(missing[0], extra=extra)


def installed_version(runtime: str) -> str | None:
    """Return the version of a runtime under any of its distribution names, or None if it is not installed."""
    for suffix in ("", "-gpu", "-directml", "-openvino", "-qnn"):
        try:
            return metadata.version(runtime + suffix)
        except metadata.PackageNotFoundError:
            continue
    return None


def versions(*names: str) -> dict[str, str]:
    """Return the versions of ligerexport and of those distributions that are installed, as results record them."""
    return {name: found for name in ("ligerexport", *names) if (found := installed_version(name))}


def untried(name: str) -> str | None:
    """Return why the installed version of a row of `TRIED` gets a warning; None if it was tried or is not installed."""
    from packaging.version import Version

    version = installed_version(name)
    oldest, newest = TRIED[name]
    if version is None or Version(oldest).release <= Version(version).release[:2] <= Version(newest).release:
        return None
    tried = oldest if oldest == newest else f"{oldest} to {newest}"
    return f"{version} was never tried with this version of ligerexport, only {tried}"


@cache
def warn_if_untried(name: str) -> None:
    """Warn, once per process, if the installed version of a row of `TRIED` was never tried."""
    if found := untried(name):
        warn(f"{name} {found}")
