"""The state after the beginning that prompts share, in a file: read once, restored afterwards instead of read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import LigerError
from ligerexport.run.runtime import Session
from ligerexport.staging import remove_leftovers

WORTH = 32
"""Tokens below which a beginning is not worth a file."""


class PromptCache:
    """A file with the state after the beginning of a prompt.

    A state cannot be cut, so the file stands for one beginning: at first for all of a prompt but its last token. Where
    a later prompt parts from it, the file is made again, for what the two share or, where that is next to nothing, for
    the new prompt. It is written whole or not at all.

    Args:
        path: The file, which need not exist.

    Attributes:
        restored: Tokens of the last prompt that were restored.
        keep: Tokens of it after which `save` is due; 0 is never.
        note: What became of the file, in words.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.restored, self.keep, self.note = 0, 0, ""

    def restore(self, session: Session, ids: np.ndarray) -> int:
        """Go to the state after as many tokens of a prompt as the file knows; return how many.

        Args:
            session: Of one sequence that has seen nothing.
            ids: The prompt `[T]`.

        Raises:
            LigerError: The path holds something else.
        """
        self.restored, self.keep, self.note = 0, 0, "made"
        shared, last = 0, len(ids) - 1  # the logits after the last token are not in a state
        if found := self._read():
            kept, known = found
            if kept.model != session.artifact.manifest.fingerprint:
                self.note = "made again: it was of another model"
            elif (shared := _shared(known, ids[:last])) < len(known):
                self.note = f"made again: the prompt parts from it after {shared} tokens"
            else:
                session.restore(kept)
                self.restored, self.note = shared, "used"
                return shared
        self.keep = shared if shared >= WORTH else last
        if self.keep < WORTH:
            self.keep, self.note = 0, f"not made: the prompt has under {WORTH} tokens"
        return 0

    def save(self, session: Session, ids: np.ndarray) -> None:
        """Write the state of a session that has seen `ids` `[T]`."""
        replace(session.snapshot(), ids=ids).save(self.path)

    def _read(self) -> tuple[Snapshot, np.ndarray] | None:
        if not self.path.exists():
            if not self.path.parent.is_dir():
                raise LigerError(f"no directory {self.path.parent} for a prompt cache", hint="make it first")
            return None
        remove_leftovers(self.path)  # here too: a file that is only read is not written again
        kept = Snapshot.load(self.path)
        if kept.ids is None or kept.position.tolist() != [len(kept.ids)]:
            raise LigerError(f"{self.path} is a saved state and no prompt cache", hint="choose another file")
        return kept, kept.ids


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many tokens two prompts begin with alike."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
