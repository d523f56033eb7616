"""What sessions of all engines share: prompts, padding, idle rows, and checks of the states that they are given."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from ligerexport.artifact.artifact import Artifact, StateTensor
from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import LigerError, UsageError
from ligerexport.exporters.exchange import adapt, check_origin, held_positions
from ligerexport.exporters.exchange import dtype_of as dtype_of
from ligerexport.model.state import FADE, fade

_LONGEST = 1 << 48
"""Largest number of tokens that a sequence may have."""
NARROW = (1 << 31) - 1
"""The same if its state has positions in int32."""
IDLE = -1
"""Stands for an id: this row gets no token."""

_READ = "the file is damaged: read the prompt again"

DRAFT = 16
"""Largest number of tokens of a draft."""

PATIENCE = 120.0
"""Seconds that the end of the process waits for a running call, which may take long on a busy machine."""


class BatchSession(ABC):
    """Checks the arguments of a session. See `ligerexport.run.runtime.Session` for the interface.

    A subclass has `_position` `[B]`, the tokens seen, and `_step_ids` `[B, 1]` int64 for the tokens of a step. It calls
    `_begin` when its state has seen nothing yet.
    """

    artifact: Artifact
    batch: int
    chunk: int
    adapters: tuple[str | None, ...] = ()
    _position: np.ndarray
    _step_ids: np.ndarray
    _longest: int
    _process: int | None = None
    _drafted: np.ndarray | None = None
    _before: Snapshot | None = None

    def _begin(self) -> None:
        narrow = any(tensor.dtype == "int32" for tensor in self.artifact.manifest.state)
        self._longest = NARROW if narrow else _LONGEST
        self._process = self._process or os.getpid()  # a sibling shares the weights that its original loaded
        self._busy, self._torn, self._drafted, self._before = threading.RLock(), False, None, None
        _sessions.add(self)

    def use(self, adapters: str | Sequence[str | None] | None) -> None:
        """See `ligerexport.run.runtime.Session`."""
        if isinstance(adapters, str) or any(adapters or ()):
            raise UsageError("this session takes no adapters", hint="build for ONNX Runtime with --lora R")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads out during a block.

        Raises:
            UsageError: Another thread is inside.
            LigerError: The weights were loaded before this process was forked.
        """
        if self._process != os.getpid():
            raise LigerError(
                "this session was loaded before its process forked, and the engine's threads are not in the child",
                hint="load the artifact after the fork, or start processes by spawn",
            )
        if not self._busy.acquire(blocking=False):
            if _leaving.is_set():
                threading.Event().wait()  # until the process ends
            raise UsageError("two threads use one session", hint="give each its own: session.sibling()")
        try:
            yield
        finally:
            self._busy.release()

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Change the state in a block; if an exception ends it, also Ctrl-C, the state cannot be used any more."""
        self._torn = True
        yield
        self._torn = False

    def _check_whole(self) -> None:
        if self._torn:
            raise LigerError(
                "the last call on this session did not complete, so its state is undefined",
                hint="reset the session or restore a snapshot",
            )
        if self._drafted is not None:
            raise UsageError(
                f"a draft of {self._drafted.shape[1]} tokens waits", hint="call session.commit with the tokens to keep"
            )

    @abstractmethod
    def _advance(self, ids: np.ndarray) -> np.ndarray:
        """Advance by ids `[B, T]` of the vocabulary and count them; return logits `[B, V]`."""

    def _advance_for_ever(self, ids: np.ndarray) -> np.ndarray:
        """Advance, and halve the sums of rows that have seen `FADE` more tokens."""
        with self._fading():
            return self._advance(ids)

    @contextmanager
    def _fading(self) -> Iterator[None]:
        before = self._fades()
        yield
        times = self._fades() - before
        for row in np.flatnonzero(times).tolist():
            snapshot = self._copy(row)
            self._replace(replace(snapshot, tensors=fade(snapshot.tensors, int(times[row]))), row)

    def _fades(self) -> np.ndarray:
        return np.maximum(self._position, 0) // FADE

    @abstractmethod
    def _forget(self, row: int | None) -> None:
        """Do what `reset` does."""

    @abstractmethod
    def _copy(self, row: int | None) -> Snapshot:
        """Do what `snapshot` does."""

    @abstractmethod
    def _replace(self, snapshot: Snapshot, row: int | None) -> None:
        """Do what `restore` does with a state that fits."""

    @property
    def forgotten(self) -> np.ndarray | None:
        """Share of the attention of the last token that fell on forgotten tokens, `[B, layers]` fp32.

        It is a view that the next call overwrites, and None if the session does not know it.
        """
        return None

    def held(self, row: int = 0) -> list[list[np.ndarray]]:
        """Return the positions of the tokens that a sequence holds exactly, in order, for each layer and KV head.

        A layer that is kept as softmax holds all tokens.

        Args:
            row: The sequence.
        """
        return held_positions(self.artifact.manifest, self.snapshot(row))

    @property
    def position(self) -> np.ndarray:
        """Number of tokens seen, `[B]` int64."""
        return self._position.astype(np.int64)

    def prefill(self, ids: Sequence[int] | np.ndarray, padding: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Advance by a prompt of any length, in chunks.

        Args:
            ids: `[T]` for one sequence, or `[B, T]`.
            padding: `[B]`, number of padding ids on the left of each row, allowed only in rows that have seen nothing.

        Returns:
            Logits after the last token, `[B, V]` fp32; a view that the next call overwrites.

        Raises:
            UsageError: There are no tokens, an id is outside the vocabulary, or a shape does not fit.
        """
        array = self._checked(ids)
        with self._alone():
            self._check_length(array.shape[1])
            padded = np.asarray(0 if padding is None else padding, self._position.dtype)
            if (self._position.astype(bool) & (padded != 0)).any():
                raise UsageError("padding after the first token", hint="pad rows that have seen nothing only")
            self._check_whole()
            with self._change():
                self._position -= padded
                return self._advance_for_ever(array)

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return ids of the vocabulary as `[B, T]`."""
        array = np.atleast_2d(np.asarray(ids))
        if array.size == 0:
            raise UsageError("the prompt has no tokens", hint="give at least one token of text")
        if array.dtype.kind not in "iu" or array.ndim != 2 or array.shape[0] != self.batch:
            raise UsageError(f"ids {list(array.shape)} of {array.dtype}, integers [{self.batch}, T] were expected")
        self._check_vocabulary(int(array.min()), int(array.max()))
        return array

    def step(self, ids: int | Sequence[int] | np.ndarray) -> np.ndarray:
        """Advance by one token.

        Args:
            ids: An id for one sequence, or `[B]`; a row whose id is `IDLE` waits. The state of a row that waits in the
                middle of its sequence is copied before and after the step.

        Returns:
            The same as `prefill`; the logits of an idle row mean nothing.

        Raises:
            UsageError: An id is outside the vocabulary, or all rows wait.
        """
        with self._alone():
            row = self._step_ids[:, 0]
            row[:] = ids
            idle = row == IDLE
            if not idle.all():
                row[idle] = 0
            self._check_vocabulary(int(row.min()), int(row.max()))
            self._check_length(1)
            self._check_whole()
            with self._change():
                return self._step_rows(idle)

    def _step_rows(self, idle: np.ndarray) -> np.ndarray:
        """Advance by `_step_ids`, but rows `[B]` that are idle."""
        waiting = {i: self._copy(i) for i in np.flatnonzero(idle & (self._position > 0)).tolist()}
        begun = idle & (self._position <= 0)
        self._position[begun] = np.minimum(self._position[begun], -1)  # padding leaves no trace
        logits = self._advance_for_ever(self._step_ids)
        for i, copied in waiting.items():
            self._replace(copied, i)
        return logits

    @property
    def drafts(self) -> bool:
        """Whether `propose` is one call of the engine."""
        return False

    def propose(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Advance by a draft, whose last tokens `commit` takes back. No other call is allowed before that.

        Args:
            ids: `[K]` for one sequence, or `[B, K]`; at most `DRAFT` tokens.

        Returns:
            Logits after each token, `[B, K, V]` fp32; a view that the next call overwrites.

        Raises:
            UsageError: There are no tokens or too many, an id is outside the vocabulary, or a shape does not fit.
        """
        array = self._checked(ids).astype(np.int64)
        if array.shape[1] > DRAFT:
            raise UsageError(f"a draft of {array.shape[1]} tokens", hint=f"give at most {DRAFT}")
        with self._alone():
            self._check_length(array.shape[1])
            self._check_whole()
            with self._change():
                logits = self._draft(array)
                self._drafted = array
                return logits

    def commit(self, kept: int | Sequence[int] | np.ndarray) -> None:
        """Keep the first tokens of the draft: the state is what it was before it, advanced by these tokens.

        Args:
            kept: Number of tokens, or `[B]`, one for each row.

        Raises:
            UsageError: No draft waits, or it has fewer tokens.
        """
        with self._alone():
            if self._drafted is None:
                raise UsageError("no draft waits", hint="call session.propose first")
            length = self._drafted.shape[1]
            counts = [kept] * self.batch if isinstance(kept, int) else np.atleast_1d(kept).tolist()
            if len(counts) != self.batch or not 0 <= min(counts) <= max(counts) <= length:
                raise UsageError(f"{kept} tokens of a draft", hint=f"give 0 to {length}, once or for each row")
            with self._change():
                if min(counts) < length:
                    self._settle(counts)
                self._drafted = self._before = None

    def _draft(self, ids: np.ndarray) -> np.ndarray:
        """Do what `propose` does; sessions of engines that compute the logits of all tokens do it in one call."""
        self._before = self._copy(None)
        tokens = np.hsplit(ids, ids.shape[1])
        return np.stack([self._advance_for_ever(np.ascontiguousarray(x)).copy() for x in tokens], axis=1)

    def _settle(self, kept: list[int]) -> None:
        """Do what `commit` does with `_drafted` and fewer tokens of some rows."""
        assert self._before is not None and self._drafted is not None
        self._replace(self._before, None)
        if len(set(kept)) == 1:
            if kept[0]:
                self._advance_for_ever(self._drafted[:, : kept[0]])
            return
        for t in range(max(kept)):
            self._step_ids[:, 0] = self._drafted[:, t]
            self._step_rows(np.array(kept) <= t)

    def every(self, ids: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """Advance by a prompt as `prefill` does, and yield the logits after each token.

        Yields:
            `[B, t, V]` fp32, in order; the t add up to T.
        """
        array = np.atleast_2d(np.asarray(ids))
        for t in range(max(1, array.shape[1])):
            yield self.prefill(array[:, t : t + 1])[:, None].copy()

    def reset(self, row: int | None = None) -> None:
        """Forget all rows, or one."""
        self._rows(row)
        with self._renew(row):
            self._forget(row)

    def snapshot(self, row: int | None = None) -> Snapshot:
        """Return a copy of the state of all rows, or of one."""
        self._rows(row)
        with self._alone():
            self._check_whole()
            copied = self._copy(row)
        return replace(copied, identity=self.artifact.manifest.identity)

    def restore(self, snapshot: Snapshot, row: int | None = None) -> None:
        """Set the state from a snapshot of a session of the same model, for all rows or for one.

        The session may be of another target, lowering or precision; `adapt` says how types are converted.

        Raises:
            UsageError: The snapshot is of another model, conversion or batch.
        """
        fitting = self._fit(snapshot, row)
        with self._renew(row):
            self._replace(fitting, row)

    @contextmanager
    def _renew(self, row: int | None) -> Iterator[None]:
        with self._alone():
            if row is not None:  # other rows stay undefined if they were
                self._check_whole()
            with self._change():
                yield
                self._drafted = self._before = None

    def _rows(self, row: int | None) -> slice:
        if row is not None and not 0 <= row < self.batch:
            raise UsageError(f"row {row}", hint=f"this session runs {self.batch} sequences, 0 to {self.batch - 1}")
        return slice(None) if row is None else slice(row, row + 1)

    def _fit(self, snapshot: Snapshot, row: int | None) -> Snapshot:
        """Return a state in the form of this session, or of one of its rows.

        Raises:
            UsageError: The snapshot is of another model or batch, or no session can have been in its state.
        """
        self._rows(row)
        batch, manifest = self.batch if row is None else 1, self.artifact.manifest
        check_origin(snapshot, manifest)
        tensors = adapt(snapshot.tensors, manifest)
        for tensor in manifest.state:
            given = tensors.get(tensor.past)
            shape = self._shape(tensor, batch, None if given is None or given.ndim < 3 else given.shape[2])
            if given is None or given.shape != shape or given.dtype != dtype_of(tensor):
                raise UsageError(
                    f"this state has no {tensor.past} {list(shape)} of {tensor.dtype}",
                    hint=f"{batch} sequences were expected; see Snapshot.stack and Snapshot.sequence",
                )
        if unknown := tensors.keys() - {tensor.past for tensor in manifest.state}:
            raise UsageError(f"this state has a tensor {min(unknown)!r:.60}, which the model does not have", hint=_READ)
        seen = snapshot.position
        if seen.shape != (batch,) or seen.dtype.kind != "i":
            raise UsageError(f"this state has seen {seen!r:.60} tokens", hint=f"{batch} numbers were expected")
        for tensor in manifest.state:
            given = tensors[tensor.past]
            short = tensor.grows and given.shape[2] < seen.max()
            if (
                short
                or abs(seen).max() > self._longest
                or (tensor.dtype in ("int64", "int32") and not ((given >= -1) & (given <= self._longest)).all())
            ):
                raise UsageError(f"{tensor.past} of this state cannot be the one after {seen.max()} tokens", hint=_READ)
        return replace(snapshot, tensors=tensors)

    def _shape(self, tensor: StateTensor, batch: int | None = None, grown: int | None = None) -> tuple[int, ...]:
        letters = {"B": batch or self.batch, "P": grown or 0}
        return tuple(letters[size] if isinstance(size, str) else size for size in tensor.shape)

    def _check_length(self, tokens: int) -> None:
        """Check that every sequence may have this many more tokens.

        Raises:
            LigerError: It may not.
        """
        if (seen := int(self._position.max())) + tokens > self._longest:
            raise LigerError(
                f"a sequence of {seen:,} tokens cannot have {tokens:,} more: its state counts up to {self._longest:,}",
                hint="reset the row, and read the part of the text that matters again",
            )

    def _check_vocabulary(self, low: int, high: int) -> None:
        size = self.artifact.manifest.model.vocab_size
        if low < 0 or high >= size:
            raise UsageError(f"token id {low if low < 0 else high}", hint=f"ids of this model are 0 to {size - 1}")


_sessions: weakref.WeakSet[BatchSession] = weakref.WeakSet()
_inherited: list[BatchSession] = []
_leaving = threading.Event()


@atexit.register
def _leave() -> None:
    """Keep daemon threads from returning from an engine after the interpreter is gone, which would abort it."""
    _leaving.set()
    end = time.monotonic() + PATIENCE
    for session in list(_sessions):
        session._busy.acquire(timeout=max(0.0, end - time.monotonic()))


def _inherit() -> None:
    """Keep sessions alive that a fork copied: freeing an engine would wait for threads that the child does not have."""
    _inherited.extend(_sessions)
    _sessions.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_inherit)


def choose_chunk(chunk: int | None, default: int, limit: int) -> int:
    """Return the tokens per call: `chunk` if given, otherwise `default`, limited to what the graph takes.

    Raises:
        UsageError: The graph does not take this many.
    """
    chosen = min(default, limit) if chunk is None else chunk
    if not 1 <= chosen <= limit:
        raise UsageError(f"chunk {chosen}", hint=f"this graph takes 1 to {limit} tokens a call")
    return chosen
