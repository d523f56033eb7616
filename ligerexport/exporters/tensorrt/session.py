"""Run an artifact on TensorRT, 8.5 and later, through the runner's library `libliger_run.so` and its C interface.

The library holds the engine, the state on the device and the CUDA graph of the step; this module holds the arrays
around it. It needs numpy and no package of TensorRT or CUDA.
"""

from __future__ import annotations

import ctypes
import json
import os
import weakref
from ctypes import POINTER, c_char_p, c_double, c_int, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from ligerexport.artifact.artifact import Artifact
from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import ArtifactError, LigerError, MissingDependency, UsageError
from ligerexport.exporters.session import BatchSession, choose_chunk, dtype_of
from ligerexport.reading import sha256

RUNNER_FILE = "libliger_run.so"
VARIABLE, PLUGIN_VARIABLE = "LIGEREXPORT_TRT_RUNNER", "LIGEREXPORT_TRT_PLUGIN"
INTERFACE = 1
"""`LIGER_INTERFACE` of `runner/capi.h`, the version that this module uses."""
BUILD, ALL_ROWS = 1, -1
_MAKE = f"cmake -S exporters/tensorrt/runner -B b && cmake --build b; export {VARIABLE}=b/{RUNNER_FILE}"
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "liger_interface": (c_int, ()),
    "liger_error": (c_char_p, ()),
    "liger_engine_open": (c_void_p, (c_char_p, c_char_p, c_char_p, c_int, c_int)),
    "liger_engine_close": (None, (c_void_p,)),
    "liger_engine_describe": (c_char_p, (c_void_p,)),
    "liger_session_open": (c_void_p, (c_void_p, c_int, c_int, c_int)),
    "liger_session_close": (None, (c_void_p,)),
    "liger_session_describe": (c_char_p, (c_void_p,)),
    "liger_session_position": (POINTER(c_int32), (c_void_p,)),
    "liger_session_advance": (c_int, (c_void_p, c_void_p, c_int, c_void_p)),
    "liger_session_reset": (c_int, (c_void_p, c_int)),
    "liger_session_read": (c_int, (c_void_p, c_int, c_int, c_void_p, c_size_t)),
    "liger_session_write": (c_int, (c_void_p, c_int, c_int, c_void_p, c_size_t)),
    "liger_session_time_step": (c_int, (c_void_p, c_int, POINTER(c_double))),
}


class TensorRTSession(BatchSession):
    """One batch of sequences on an artifact of the target `trt`. `ligerexport.run.runtime.Session` is the interface.

    Args:
        artifact: Artifact from `open_artifact`.
        batch: B, number of sequences that advance together; siblings have at most this many.
        chunk: Prompt tokens per call, shared by the sequences, at most the graph's `max_chunk`; None takes that
            limit.
        graph: Whether steps and whole chunks are replayed as CUDA graphs.
        runner: The library; None tries LIGEREXPORT_TRT_RUNNER, then the loader's paths, but never the artifact.
        plugin: Library of the plugin; None tries LIGEREXPORT_TRT_PLUGIN, then the one built together with
            the runner. A plugin in the artifact runs only if named here or there, with the manifest's hash.
        build: Whether to build the engine even if there is one.

    Raises:
        MissingDependency: There is no runner, or the loader does not find TensorRT.
        ArtifactError: There are only engines for another TensorRT or GPU, or the engine does not load.
        UsageError: `batch` or `chunk` is out of range.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        batch: int = 1,
        chunk: int | None = None,
        graph: bool = True,
        runner: Path | str | None = None,
        plugin: Path | str | None = None,
        build: bool = False,
    ) -> None:
        manifest = artifact.manifest
        most = (manifest.device or {}).get("max_batch", 1)
        if not isinstance(most, int):
            raise ArtifactError(f"kernels for {most!r:.60} sequences in the manifest", hint="build it again")
        if not 1 <= batch <= most:
            raise UsageError(
                f"batch {batch}", hint=f"this artifact has kernels for 1 to {most}; build with --max-batch"
            )
        limit = manifest.graph.max_chunk
        self.artifact, self.chunk, self._graph = artifact, choose_chunk(chunk, limit, limit), graph
        plugin = check_plugin(artifact, plugin or os.environ.get(PLUGIN_VARIABLE))
        self._library = open_runner(runner)
        made = self._library.liger_engine_open(
            os.fsencode(artifact.directory), None if plugin is None else os.fsencode(plugin), None, batch,
            BUILD if build else 0,
        )  # fmt: skip
        if not made:
            raise _failure(self._library, ArtifactError)
        self._engine = _Owned(made, self._library.liger_engine_close)
        self.engine: dict[str, Any] = json.loads(self._library.liger_engine_describe(made))
        self._allocate(batch)

    def _allocate(self, batch: int) -> None:
        """Begin sequences that have seen nothing."""
        made = self._library.liger_session_open(self._engine.handle, batch, int(self._graph), self.chunk)
        if not made:
            raise _failure(self._library, LigerError)
        self._session = _Owned(made, self._library.liger_session_close)
        self.batch = batch
        self._position = np.ctypeslib.as_array(self._library.liger_session_position(made), (batch,))
        self._logits = np.zeros((batch, self.artifact.manifest.model.vocab_size), np.float32)
        self._step_ids = np.zeros((batch, 1), np.int64)
        described = json.loads(self._library.liger_session_describe(made))
        found = [(x["past"], x["dtype"], tuple(x["shape"])) for x in described["state"]]
        if found != [(x.name, x.dtype, (batch, *x.shape[1:])) for x in self.artifact.manifest.graph.inputs[2:]]:
            raise ArtifactError(f"the state of {self.engine['engine']} does not match its manifest", hint="build again")
        self._begin()

    def sibling(self, batch: int = 1) -> TensorRTSession:
        """Return a session for other sequences on the same engine, which may run in another thread.

        Raises:
            UsageError: The engine is for fewer sequences.
        """
        if not 1 <= batch <= (most := int(self.engine["batch"])):
            raise UsageError(f"batch {batch}", hint=f"this engine is for 1 to {most}: load the artifact with more")
        other = object.__new__(TensorRTSession)
        other.__dict__.update(self.__dict__)
        other._allocate(batch)
        return other

    @property
    def state_bytes(self) -> int:
        """Current size of the state of all sequences, in bytes."""
        return sum(int(np.prod(self._shape(x))) * dtype_of(x).itemsize for x in self.artifact.manifest.state)

    def _advance(self, ids: np.ndarray) -> np.ndarray:
        given = np.ascontiguousarray(ids, np.int32)
        self._call("advance", given.ctypes.data, given.shape[1], self._logits.ctypes.data)
        return self._logits

    def _forget(self, row: int | None) -> None:
        self._call("reset", ALL_ROWS if row is None else row)

    def _copy(self, row: int | None) -> Snapshot:
        rows, tensors = self._rows(row), {}
        for i, x in enumerate(self.artifact.manifest.state):
            array = np.empty(self._shape(x, self.batch if row is None else 1), dtype_of(x))
            self._call("read", i, ALL_ROWS if row is None else row, array.ctypes.data, array.nbytes)
            tensors[x.past] = array
        return Snapshot(self.artifact.manifest.fingerprint, self.position[rows], tensors)

    def _replace(self, snapshot: Snapshot, row: int | None) -> None:
        rows = self._rows(row)
        for i, x in enumerate(self.artifact.manifest.state):
            array = np.ascontiguousarray(snapshot.tensors[x.past])
            self._call("write", i, ALL_ROWS if row is None else row, array.ctypes.data, array.nbytes)
        self._position[rows] = snapshot.position

    def time_step(self) -> float:
        """Advance by a token; return the milliseconds that the device took, without the host's time."""
        made = c_double()
        self._call("time_step", 1, ctypes.byref(made))
        return made.value

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self._library, f"liger_session_{name}")(self._session.handle, *arguments):
            raise _failure(self._library, LigerError)


class _Owned:
    """An object that the library made, freed when the last reference goes."""

    def __init__(self, handle: int, close: Any) -> None:
        self.handle = handle
        weakref.finalize(self, close, handle)


def check_plugin(artifact: Artifact, plugin: Path | str | None) -> Path | None:
    """Return the plugin's library if one is named; if it lies in the artifact, check it against the manifest first.

    Raises:
        ArtifactError: The manifest does not list it, or lists another hash.
    """
    if not plugin:
        return None
    file, directory = Path(plugin).resolve(), artifact.directory.resolve()
    if file.is_relative_to(directory):
        listed = artifact.manifest.files.get(file.relative_to(directory).as_posix())
        if listed is None or listed.sha256 != sha256(file):
            raise ArtifactError(f"{plugin} is not a file of this artifact's manifest", hint="copy the artifact again")
    return file


def open_runner(given: Path | str | None = None) -> ctypes.CDLL:
    """Open the runner's library.

    Raises:
        MissingDependency: The runner, or a library that it needs, is not found.
        LigerError: The runner belongs to another version of this package.
    """
    file = str(given or os.environ.get(VARIABLE) or RUNNER_FILE)
    try:
        library = ctypes.CDLL(file)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        found = library.liger_interface()
    except (OSError, AttributeError) as error:
        if str(error).startswith(f"{file}: cannot open"):  # the file itself, not a library that it needs
            raise MissingDependency(f"the runner's library {file}", hint=_MAKE) from error
        raise MissingDependency(
            f"what {file} needs ({error})",
            hint="let LD_LIBRARY_PATH name the libraries of TensorRT that it was built with",
        ) from error
    if found != INTERFACE:
        raise LigerError(f"{file} has interface {found}, {INTERFACE} was expected", hint=_MAKE)
    return library


def _failure(library: ctypes.CDLL, kind: type[LigerError]) -> LigerError:
    """Return the last error of this thread."""
    message, _, hint = library.liger_error().decode(errors="replace").partition("\nhint: ")
    return kind(message, hint=hint)
