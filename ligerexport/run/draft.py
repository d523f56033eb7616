"""A second model that guesses tokens: it reads what the first one reads, and writes ahead of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ligerexport.artifact.artifact import Artifact
from ligerexport.errors import UsageError
from ligerexport.run.runtime import Session, Snapshot


def check_tokens(artifact: Artifact, other: Artifact) -> None:
    """Check that ids stand for the same texts in two artifacts.

    Raises:
        UsageError: They have different tokenizers, or none and different numbers of tokens.
    """
    one, two = (model.directory / "tokenizer.json" for model in (artifact, other))
    if one.is_file() and two.is_file():
        same = one.read_bytes() == two.read_bytes() or _ids(one) == _ids(two)
    else:
        same = artifact.manifest.model.vocab_size == other.manifest.model.vocab_size
    if not same:
        raise UsageError(
            f"the tokenizer of {other.directory} is another one than that of {artifact.directory}",
            hint="let a model of the same family guess",
        )


def _ids(file: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return dict(Tokenizer.from_file(str(file)).get_vocab())


class DraftModel:
    """Guesses the likeliest tokens of another model, which has the same tokenizer.

    Args:
        session: A session of that model; a sibling of it is used.
        vocabulary: Number of tokens of the model whose tokens are guessed.

    Attributes:
        PRIOR: See `Guesses`.
    """

    PRIOR = (9.0,) * 5, 10.0

    def __init__(self, session: Session, vocabulary: int) -> None:
        self._session = session.sibling()
        self._vocabulary = min(vocabulary, session.artifact.manifest.model.vocab_size)
        self._unread: list[int] = []
        self._before: Snapshot | None = None  # the state before `_fed`
        self._fed: list[int] = []  # guesses that the session has seen
        self._ahead: list[int] = []  # guesses of which nobody knows whether they are right
        self._right = 0  # guesses before them

    @property
    def length(self) -> int:
        """The number of the next guess, from 1 on."""
        return self._right + 1

    @property
    def next(self) -> int | None:
        """The guess of the next token, if there is one already."""
        return self._ahead[0] if self._ahead else None

    def read(self, ids: Iterable[int]) -> None:
        """Add tokens to the text."""
        for token in ids:
            right = self.next == token
            self._ahead, self._right = (self._ahead[1:], self._right + 1) if right else ([], 0)
            if token < self._vocabulary:
                self._unread.append(token)

    def guess(self, count: int) -> list[int]:
        """Return this many tokens that may follow."""
        if not self._unread or not count:
            return []
        session, fed = self._session, self._fed
        if self._unread[: len(fed)] == fed:
            del self._unread[: len(fed)]
        elif self._before is not None:
            session.restore(self._before)
        found = [self._best(session.prefill(self._unread))]
        if count > 1:
            self._before = session.snapshot()
        while len(found) < count:
            found.append(self._best(session.step(found[-1])))
        self._unread, self._fed, self._ahead, self._right = [], found[:-1], found, 0
        return found

    def _best(self, logits: np.ndarray) -> int:
        return int(logits[0, : self._vocabulary].argmax())
