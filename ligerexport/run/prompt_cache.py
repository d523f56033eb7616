"""Keep the state after the shared beginning of prompts in a file, and restore it instead of reading the text again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import LigerError
from ligerexport.run.runtime import Session
from ligerexport.staging import remove_leftovers

WORTH = 32
"""Smallest number of tokens for which a file is worthwhile."""


class PromptCache:
    """A file with the state after the beginning of a prompt.

    A state cannot be shortened, so the file is for one beginning: at first, all of a prompt except its last token. If a
    later prompt differs within it, the file is written again for their common beginning or, if that is short, for the
    new prompt. It is written completely or not at all.

    Args:
        path: The file, which need not exist.

    Attributes:
        restored: Number of tokens of the last prompt that were restored.
        keep: Number of its tokens after which to call `save`; 0 for never.
        note: Message about the use of the file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.restored, self.keep, self.note = 0, 0, ""

    def restore(self, session: Session, ids: np.ndarray) -> int:
        """Restore the file's state if a prompt begins with its tokens; return the number of restored tokens.

        Args:
            session: Session of one sequence, in its initial state.
            ids: Ids of the prompt `[T]`.

        Raises:
            LigerError: The path is not a prompt cache.
        """
        self.restored, self.keep, self.note = 0, 0, "made"
        shared, last = 0, len(ids) - 1  # a state does not include the logits after the last token
        if found := self._read():
            kept, known = found
            if kept.model != session.artifact.manifest.fingerprint:
                self.note = "made again: it was for another model"
            elif (shared := common_length(known, ids[:last])) < len(known):
                self.note = f"made again: the prompt differs from it after {shared} tokens"
            else:
                session.restore(kept)
                self.restored, self.note = shared, "used"
                return shared
        self.keep = shared if shared >= WORTH else last
        if self.keep < WORTH:
            self.keep, self.note = 0, f"not made: the prompt has fewer than {WORTH} tokens"
        return 0

    def save(self, session: Session, ids: np.ndarray) -> None:
        """Write the state of a session that has seen `ids` `[T]`."""
        replace(session.snapshot(), ids=ids).save(self.path)

    def _read(self) -> tuple[Snapshot, np.ndarray] | None:
        if not self.path.exists():
            if not self.path.parent.is_dir():
                raise LigerError(f"no directory {self.path.parent} for a prompt cache", hint="create it first")
            return None
        remove_leftovers(self.path)  # also here, because a file that is only read is never written again
        kept = Snapshot.load(self.path)
        if kept.ids is None or kept.position.tolist() != [len(kept.ids)]:
            raise LigerError(f"{self.path} is a saved state, not a prompt cache", hint="choose another file")
        return kept, kept.ids


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """Return the length of the common beginning of two prompts in tokens."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
