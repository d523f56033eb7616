"""What sessions of all engines have in common: prompts, padding, rows that wait, and whose state fits where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from ligerexport.artifact import Artifact, StateTensor
from ligerexport.errors import UsageError
from ligerexport.snapshot import Snapshot

_LONGEST = 1 << 48
"""Tokens that a sequence may have."""
IDLE = -1
"""In place of an id: no token for this row."""


class BatchSession(ABC):
    """Checks what a session is given. See `ligerexport.runtime.Session` for the face.

    A subclass has `_position` `[B]` of tokens seen and `_step_ids` `[B, 1]` int64 for the tokens of a step.
    """

    artifact: Artifact
    batch: int
    chunk: int
    _position: np.ndarray
    _step_ids: np.ndarray

    @abstractmethod
    def _advance(self, ids: np.ndarray) -> np.ndarray:
        """Advance by ids `[B, T]` of the vocabulary and count them; return logits `[B, V]`."""

    @property
    def position(self) -> np.ndarray:
        """Tokens seen, `[B]` int64."""
        return self._position.astype(np.int64)

    def prefill(self, ids: Sequence[int] | np.ndarray, padding: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Advance by a prompt of any length, in chunks.

        Args:
            ids: `[T]` for one sequence, or `[B, T]`.
            padding: `[B]`, how many ids of each row are padding on its left; only in rows that have seen nothing.

        Returns:
            Logits after the last token, `[B, V]` fp32; a view that the next call overwrites.

        Raises:
            UsageError: No tokens, ids outside the vocabulary, or a shape that does not fit.
        """
        array = np.atleast_2d(np.asarray(ids))
        if array.size == 0:
            raise UsageError("the prompt has no tokens", hint="give at least one token of text")
        if array.dtype.kind not in "iu" or array.ndim != 2 or array.shape[0] != self.batch:
            raise UsageError(f"ids {list(array.shape)} of {array.dtype}, integers [{self.batch}, T] were expected")
        self._check_vocabulary(int(array.min()), int(array.max()))
        if padding is not None:
            padded = np.asarray(padding, self._position.dtype)
            if (self._position.astype(bool) & (padded != 0)).any():
                raise UsageError("padding after the first token", hint="pad rows that have seen nothing only")
            self._position -= padded
        return self._advance(array)

    def step(self, ids: int | Sequence[int] | np.ndarray) -> np.ndarray:
        """Advance by one token.

        Args:
            ids: An id for one sequence, or `[B]`; `IDLE` for a row that has seen nothing leaves it so.

        Returns:
            As `prefill`; the logits of an idle row mean nothing.

        Raises:
            UsageError: An id outside the vocabulary, or a row that is idle in the middle of its sequence.
        """
        row = self._step_ids[:, 0]
        row[:] = ids
        idle = row == IDLE
        if idle.any() and not idle.all():
            if (seen := self._position * idle).max() > 0:
                raise UsageError(
                    f"row {seen.argmax()} has seen {seen.max()} tokens and gets none",
                    hint="keep session.snapshot(row) if it goes on later, then session.reset(row)",
                )
            row[idle] = 0
        self._check_vocabulary(int(row.min()), int(row.max()))
        self._position[idle] = np.minimum(self._position[idle], -1)  # padding leaves no trace
        return self._advance(self._step_ids)

    def every(self, ids: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """Advance by a prompt as `prefill` does, and yield the logits after each token.

        Yields:
            `[B, t, V]` fp32, in order; T of them together.
        """
        array = np.atleast_2d(np.asarray(ids))
        for t in range(max(1, array.shape[1])):
            yield self.prefill(array[:, t : t + 1])[:, None].copy()

    def _rows(self, row: int | None) -> slice:
        if row is not None and not 0 <= row < self.batch:
            raise UsageError(f"row {row}", hint=f"this session runs {self.batch} sequences, 0 to {self.batch - 1}")
        return slice(None) if row is None else slice(row, row + 1)

    def _check_snapshot(self, snapshot: Snapshot, row: int | None) -> slice:
        """Check that a state fits here, or into one row; return the rows.

        Raises:
            UsageError: It is the state of another model or of another batch, or no state that a session was in.
        """
        rows, batch = self._rows(row), self.batch if row is None else 1
        if snapshot.model != self.artifact.manifest.fingerprint:
            raise UsageError("this state belongs to another model", hint="load the artifact that it was saved with")
        for tensor in self.artifact.manifest.state:
            given = snapshot.tensors.get(tensor.past)
            shape = self._shape(tensor, batch, None if given is None or given.ndim < 3 else given.shape[2])
            if given is None or given.shape != shape or given.dtype != dtype_of(tensor):
                raise UsageError(
                    f"this state has no {tensor.past} {list(shape)} of {tensor.dtype}",
                    hint=f"{batch} sequences were expected; see Snapshot.stack and Snapshot.sequence",
                )
        seen = snapshot.position
        if seen.shape != (batch,) or seen.dtype.kind != "i":
            raise UsageError(f"this state has seen {seen!r:.60} tokens", hint=f"{batch} numbers were expected")
        for tensor in self.artifact.manifest.state:
            given = snapshot.tensors[tensor.past]
            short = tensor.grows and given.shape[2] < seen.max()
            if short or abs(seen).max() > _LONGEST or (given.dtype.kind == "i" and not _are_positions(given)):
                raise UsageError(f"{tensor.past} of this state is not that after {seen.max()} tokens",
                                 hint="the file is damaged: read the prompt again")  # fmt: skip
        return rows

    def _shape(self, tensor: StateTensor, batch: int | None = None, grown: int | None = None) -> tuple[int, ...]:
        letters = {"B": batch or self.batch, "P": grown or 0}
        return tuple(letters[size] if isinstance(size, str) else size for size in tensor.shape)

    def _check_vocabulary(self, low: int, high: int) -> None:
        size = self.artifact.manifest.model.vocab_size
        if low < 0 or high >= size:
            raise UsageError(f"token id {low if low < 0 else high}", hint=f"ids of this model are 0 to {size - 1}")


def _are_positions(array: np.ndarray) -> bool:
    """Return whether all are tokens of a sequence, or -1 for none."""
    return bool(((array >= -1) & (array <= _LONGEST)).all())


def dtype_of(tensor: StateTensor) -> np.dtype:
    """Return numpy's type of a state tensor; bfloat16, which numpy has not, is kept as the bits of a uint16."""
    return np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)


def choose_chunk(chunk: int | None, default: int, limit: int) -> int:
    """Return the tokens of one call: what was asked for, or `default` where the graph takes as many.

    Raises:
        UsageError: The graph does not take as many.
    """
    chosen = min(default, limit) if chunk is None else chunk
    if not 1 <= chosen <= limit:
        raise UsageError(f"chunk {chosen}", hint=f"this graph takes 1 to {limit} tokens a call")
    return chosen
