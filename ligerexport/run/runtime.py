"""Run a model: `load` opens an artifact and returns a `Session`, the same face for every target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from ligerexport.artifact.artifact import Artifact, check_data, open_artifact
from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import ArtifactError, close_matches
from ligerexport.exporters.backend import SessionSettings
from ligerexport.exporters.targets import TARGETS, get_backend

__all__ = ["Session", "Snapshot", "load"]


class Session(Protocol):
    """Sequences that advance together through one model, and the state that carries them.

    Calls append: cut a prompt anywhere, call for each piece, get the same logits. One session is for one thread at a
    time; sessions of one artifact do not share state. Its sequences are rows that do not touch each other: one may be
    taken out, put in or forgotten between two calls, and a row that has seen nothing may stay so.

    Attributes:
        artifact: What it runs.
        batch: B, sequences.
        chunk: Prompt tokens a call of the engine.
    """

    artifact: Artifact
    batch: int
    chunk: int

    @property
    def position(self) -> np.ndarray:
        """Tokens seen, `[B]` int64."""
        ...

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of all sequences, now."""
        ...

    def prefill(self, ids: Sequence[int] | np.ndarray, padding: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Advance by a prompt `[T]` or `[B, T]`; return the logits after it, `[B, V]`, valid until the next call."""
        ...

    def step(self, ids: int | Sequence[int] | np.ndarray) -> np.ndarray:
        """Advance by one token; return as `prefill`. The id -1 leaves a row that has seen nothing as it is."""
        ...

    def every(self, ids: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """Advance by a prompt `[T]` or `[B, T]`; yield the logits after each token as `[B, t, V]`, T together."""
        ...

    def reset(self, row: int | None = None) -> None:
        """Forget everything, or one row."""
        ...

    def snapshot(self, row: int | None = None) -> Snapshot:
        """Return a copy of the state, or of that of one row."""
        ...

    def restore(self, snapshot: Snapshot, row: int | None = None) -> None:
        """Go to a state that a session of the same model was in, or take one sequence into one row."""
        ...

    def sibling(self, batch: int = 1) -> Session:
        """Return a session of other sequences on the same loaded weights."""
        ...


def load(
    path: Path | str,
    *,
    batch: int = 1,
    threads: int | None = None,
    chunk: int | None = None,
    prepack: bool = True,
    hashes: bool = True,
    scoring: bool = False,
    device: str = "cpu",
) -> Session:
    """Open an artifact for running.

    An artifact of the target `trt` runs on its GPU, with `libliger_run.so` from LIGEREXPORT_TRT_RUNNER or where the
    loader looks, and the plugin's library from LIGEREXPORT_TRT_PLUGIN or beside that: code in an artifact runs only if
    it is named there. Of the options it has `batch`, `chunk` and `hashes`.

    Args:
        path: Directory that `build` wrote.
        batch: Sequences that advance together.
        threads: Threads of one operator; None takes the physical cores that this process may use.
        chunk: Prompt tokens a call; None takes the measured best.
        prepack: Whether the runtime may copy the weights into the order that is fastest; without, they stay mapped
            from the file, which loads sooner and takes less memory and more time a token. Quantised ones are copied
            in any case where its products need that.
        hashes: Whether to check the sha256 of every file first; that of the weights while the engine takes them in.
        scoring: Whether calls compute the logits of all their tokens, for `Session.every`; else it steps.
        device: `cpu`, or `cuda` with the package onnxruntime-gpu; the state stays there between calls.

    Raises:
        ArtifactError: The artifact is damaged, of a newer format, or for other runtime versions.
        MissingDependency: Its runtime is not installed.
        LigerError: The engine does not run on the GPU that is here.
    """
    artifact = open_artifact(path, hashes=hashes, data=False)
    with ThreadPoolExecutor(1) as pool:  # hashing leaves the interpreter's lock, and so does the engine
        checked = pool.submit(check_data, artifact) if hashes else None
        try:
            if artifact.manifest.target not in TARGETS:
                raise ArtifactError(
                    f"no runtime here for target '{artifact.manifest.target}'",
                    hint=close_matches(artifact.manifest.target, TARGETS),
                )
            settings = SessionSettings(batch, threads, chunk, prepack, scoring, device)
            session: Session = get_backend(artifact.manifest.target).open_session(artifact, settings)
            return session
        finally:  # before anything runs, and before what the engine may say of changed weights
            if checked is not None:
                checked.result()
