"""The target `onnx`: a graph that ONNX Runtime runs."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING

from ligerexport.artifact.artifact import Artifact
from ligerexport.console import warn
from ligerexport.errors import LigerError
from ligerexport.exporters.backend import Backend, SessionSettings
from ligerexport.exporters.onnx.native import VARIABLE, check_ready

if TYPE_CHECKING:
    from ligerexport.exporters.onnx.session import OnnxSession


class OnnxRuntime(Backend):
    """The backend of the target `onnx`."""

    def open_session(self, artifact: Artifact, settings: SessionSettings) -> OnnxSession:
        """Open an artifact. Quantised weights are always prepacked, because products are ten times slower without."""
        from ligerexport.exporters.onnx.session import OnnxSession

        if artifact.manifest.fallback is not None:
            artifact = _runnable(artifact, settings.device)
        options = asdict(settings) | {"prepack": settings.prepack or artifact.manifest.block is not None}
        return OnnxSession(artifact, **options)


def _runnable(artifact: Artifact, device: str) -> Artifact:
    """Return the artifact, or on its second graph if this machine cannot run the first."""
    if device != "cpu":
        return artifact.on_fallback()
    try:
        check_ready()
    except LigerError as error:
        if os.environ.get(VARIABLE):  # the user has chosen a library
            raise
        artifact = artifact.on_fallback()
        _warn(artifact.manifest.lowering, error.message)
    return artifact


@cache
def _warn(lowering: str, reason: str) -> None:
    """Warn once per process."""
    warn(f"the compiled operator is missing ({reason}), so the slower {lowering} graph runs")
