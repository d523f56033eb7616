"""The target `onnx`: a graph that ONNX Runtime runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ligerexport.artifact.artifact import Artifact
from ligerexport.exporters.backend import Backend, SessionSettings

if TYPE_CHECKING:
    from ligerexport.exporters.onnx.session import OnnxSession


class OnnxRuntime(Backend):
    """The backend of the target `onnx`."""

    def open_session(self, artifact: Artifact, settings: SessionSettings) -> OnnxSession:
        """Open an artifact. Quantised weights are always prepacked, because products are ten times slower without."""
        from ligerexport.exporters.onnx.session import OnnxSession

        options = asdict(settings) | {"prepack": settings.prepack or artifact.manifest.block is not None}
        return OnnxSession(artifact, **options)
