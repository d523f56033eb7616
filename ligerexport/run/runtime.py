"""Run a model: `load` opens an artifact and returns a `Session`, the same interface for every target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from ligerexport.artifact.artifact import Artifact, check_data, is_artifact, open_artifact
from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import ArtifactError, UsageError, close_matches
from ligerexport.exporters.backend import SessionSettings
from ligerexport.exporters.targets import TARGETS, get_backend
from ligerexport.versions import require

__all__ = ["Session", "Snapshot", "load"]


class Session(Protocol):
    """Sequences that advance together through one model, and their state.

    Calls append: a prompt that is cut into pieces anywhere gives the same logits. Only one thread may use a session at
    a time, and sessions of one artifact do not share state. The sequences are independent rows: between two calls, a
    row may be saved, replaced or reset, and a row may wait while others step.

    Attributes:
        artifact: The artifact that it runs.
        batch: Number B of sequences.
        chunk: Number of prompt tokens per call of the engine.
    """

    artifact: Artifact
    batch: int
    chunk: int

    @property
    def position(self) -> np.ndarray:
        """Number of tokens seen, `[B]` int64."""
        ...

    @property
    def state_bytes(self) -> int:
        """Current bytes of the state of all sequences."""
        ...

    def prefill(self, ids: Sequence[int] | np.ndarray, padding: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Advance by a prompt `[T]` or `[B, T]`; return the logits after it, `[B, V]`, valid until the next call."""
        ...

    def step(self, ids: int | Sequence[int] | np.ndarray) -> np.ndarray:
        """Advance by one token; return logits as `prefill` does. A row whose id is -1 waits."""
        ...

    @property
    def drafts(self) -> bool:
        """Whether `propose` is one call of the engine; if not, it is a call for each token."""
        ...

    def propose(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Advance by a draft `[K]` or `[B, K]` of at most 16 tokens; return the logits after each, `[B, K, V]`."""
        ...

    def commit(self, kept: int | Sequence[int] | np.ndarray) -> None:
        """Keep this many tokens of the draft, in all rows or in each, and take the others back."""
        ...

    def every(self, ids: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """Advance by a prompt `[T]` or `[B, T]`; yield the logits after each of its T tokens in parts `[B, t, V]`."""
        ...

    def reset(self, row: int | None = None) -> None:
        """Reset all rows, or one row."""
        ...

    def snapshot(self, row: int | None = None) -> Snapshot:
        """Return a copy of the state, or of one row's state."""
        ...

    def restore(self, snapshot: Snapshot, row: int | None = None) -> None:
        """Restore a state from a session of the same model, of any target, or one sequence's state into a row."""
        ...

    def use(self, adapters: str | Sequence[str | None] | None) -> None:
        """Continue with an adapter that `load` got, by its name, or without one; a sequence names one for each row.

        A state that was read with one adapter is not what another one would have made of the text: reset the row first.
        """
        ...

    @property
    def forgotten(self) -> np.ndarray | None:
        """Smallest possible share of the last token's attention on forgotten tokens, `[B, layers]`, or None.

        It is known of models that keep what they evict, such as those of the preset `evicted`, if they were built with
        `meter=True`, or loaded with it in torch.
        """
        ...

    def held(self, row: int = 0) -> list[list[np.ndarray]]:
        """Return the positions of the tokens in the slots of a sequence, in order, for each layer and KV head."""
        ...

    def sibling(self, batch: int = 1) -> Session:
        """Return a session of new sequences on the same loaded weights."""
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
    adapters: Mapping[str, Path | str] | None = None,
    meter: bool = False,
) -> Session:
    """Open an artifact, or a converted checkpoint with torch, for running.

    An artifact of the target `trt` runs on its GPU and supports only the options `batch`, `chunk` and `hashes`. It
    needs `libliger_run.so` from LIGEREXPORT_TRT_RUNNER or the loader's path, and the plugin's library from
    LIGEREXPORT_TRT_PLUGIN or the same directory. Code in an artifact runs only if one of these variables names it.

    A converted checkpoint supports only `batch`, `chunk`, `device` and `meter`. Its weights are hashed, because the
    hashes say which artifacts may read its states.

    Args:
        path: Directory that `build` or `convert` wrote.
        batch: Number of sequences that advance together.
        threads: Number of threads per operator; None takes the physical cores that this process may use.
        chunk: Number of prompt tokens per call; None takes the fastest measured one.
        prepack: Whether the runtime may copy the weights into its fastest layout. If not, they stay mapped from the
            file, which loads sooner and needs less memory, but reads prompts more slowly. Quantised weights are always
            copied if the runtime's products need that.
        hashes: Whether to check the sha256 of every file first; weights are hashed while the engine loads them.
        scoring: Whether calls compute the logits of all their tokens, for `Session.every`, instead of the last logits.
        device: `cpu`, or `cuda` with the package onnxruntime-gpu; the state stays on it between calls.
        adapters: Directories of PEFT adapters by a name of your choice, for `Session.use`; the artifact was built with
            `lora`. A session begins without one.
        meter: Whether a converted checkpoint computes `Session.forgotten`. An artifact does if it was built with it.

    Raises:
        ArtifactError: The artifact is damaged, of a newer format, or for other runtime versions.
        MissingDependency: The artifact's runtime is not installed, or torch for a checkpoint.
        LigerError: The engine does not run on this machine's GPU.
        CheckpointError: The checkpoint is damaged, not converted, or keeps layers as softmax.
    """
    if not is_artifact(path) and any(Path(path).glob("*.safetensors")):
        require("build")
        from ligerexport.exporters.torch_session import TorchSession

        if adapters:
            raise UsageError("adapters with a checkpoint", hint="merge one: ligerexport convert MODEL --merge ADAPTER")
        return TorchSession(path, batch=batch, chunk=chunk, device=device, meter=meter)
    artifact = open_artifact(path, hashes=hashes, data=False)
    if adapters and not artifact.manifest.lora:
        raise UsageError(f"{path} takes no adapters", hint="build it with --lora R for adapters up to rank R")
    with ThreadPoolExecutor(1) as pool:  # hashing and the engine both release the interpreter's lock
        checked = pool.submit(check_data, artifact) if hashes else None
        try:
            if artifact.manifest.target not in TARGETS:
                raise ArtifactError(
                    f"no runtime here for target '{artifact.manifest.target}'",
                    hint=close_matches(artifact.manifest.target, TARGETS),
                )
            settings = SessionSettings(batch, threads, chunk, prepack, scoring, device, adapters)
            session: Session = get_backend(artifact.manifest.target).open_session(artifact, settings)
            return session
        finally:  # before anything runs, and before errors of the engine about changed weights
            if checked is not None:
                checked.result()
