"""The base class of targets, which says how a target is prepared, built, checked and run, and its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ligerexport.console import ProgressFactory
from ligerexport.errors import ArtifactError, UsageError
from ligerexport.exporters.targets import BLOCK, Target

if TYPE_CHECKING:
    from ligerexport.artifact.artifact import Artifact, Manifest
    from ligerexport.exporters.build import BuildPlan
    from ligerexport.exporters.onnx.spec import ModelSpec


@dataclass(frozen=True)
class BuildSettings:
    """The arguments of `build` that say what to build. `BuildPlan` chooses a value for each None."""

    target: str = "onnx"
    lowering: str | None = None
    max_chunk: int | None = None
    weights: str | None = None
    block: int = BLOCK
    sms: Sequence[int] | None = None
    max_batch: int = 8
    plugin: Path | str | None = None
    engine: bool = True
    genai: bool = False
    verify: bool = True
    state: str | None = None
    meter: bool = False
    lora: int = 0


@dataclass(frozen=True)
class SessionSettings:
    """The arguments of `load` that say how to run."""

    batch: int = 1
    threads: int | None = None
    chunk: int | None = None
    prepack: bool = True
    scoring: bool = False
    device: str = "cpu"
    adapters: Mapping[str, Path | str] | None = None


@dataclass(frozen=True)
class Check:
    """One thing that `doctor` checked.

    Attributes:
        name: What was checked.
        found: What was found.
        ok: Whether what was found is sufficient.
        needed: Whether converting, building or running needs it.
        mend: A command that fixes it.
    """

    name: str
    found: str
    ok: bool = True
    needed: bool = False
    mend: str | None = None


class Backend:
    """A target. The methods here fit a target whose artifact is a graph and needs no GPU.

    Args:
        name: Key of `TARGETS`.
        row: The row with this key.
    """

    def __init__(self, name: str, row: Target) -> None:
        self.name, self.row = name, row

    def prepare(self, settings: BuildSettings) -> BuildSettings:
        """Check the target's own options and the installed libraries, before any work is done.

        Returns:
            The settings, with the GPUs chosen where the target is for GPUs.

        Raises:
            UsageError: An option does not belong to this target, or a number is out of range.
            MissingDependency: A library is not installed.
        """
        if settings.sms or settings.plugin or not settings.engine:
            raise UsageError(f"GPU options with the target {self.name}", hint="--sm, --plugin, --no-engine go with trt")
        return settings

    def check_model(self, spec: ModelSpec) -> None:
        """Check that the target supports all layers of a checkpoint.

        Raises:
            UsageError: The target does not support a layer.
        """

    def choose_chunk(self, spec: ModelSpec, wanted: int | None) -> int:
        """Return the largest number of tokens per call.

        Raises:
            UsageError: `wanted` is more than the target allows.
        """
        return self.row.chunk if wanted is None else wanted

    def describe(self, plan: BuildPlan, weight_bytes: int) -> dict[str, Any]:
        """Return what a build would write and need, for `--dry-run`."""
        return {}

    def finish(self, plan: BuildPlan, directory: Path, manifest: Manifest, progress: ProgressFactory) -> Manifest:
        """Add the target's own files to a verified graph and its weights; return the manifest that lists them."""
        return manifest

    def open_session(self, artifact: Artifact, settings: SessionSettings) -> Any:
        """Open an artifact for running; return a `ligerexport.run.runtime.Session`.

        Raises:
            ArtifactError: The artifact cannot be run from Python.
            MissingDependency: The runtime is not installed.
        """
        raise ArtifactError(f"no runtime here for target '{self.name}'")

    def examine(self, plugin: Path | None) -> list[Check]:
        """Check what building and running need on this machine, for `doctor`; `plugin` is the TensorRT plugin."""
        return []
