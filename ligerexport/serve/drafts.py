"""Guessed tokens in the rows of a batch: what is guessed, and whether a call of several tokens pays for all rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np

from ligerexport.run.runtime import Session
from ligerexport.run.speculation import LENGTHS, Budget, Guesses, Places, check_way
from ligerexport.serve.job import Job

SERVED = "off", "ngram"
"""Values of `speculate` in the server."""
_SAVED = 4.0
"""Most steps that a batch may lose by wrong guesses after right ones."""


class Drafts:
    """Chooses the tokens of the next call of a batch.

    Rows share a call, so a row that guesses nothing takes as long as the others and writes one token. What calls cost
    is measured for each number of rows.

    Args:
        speculate: Row of `SERVED`.

    Raises:
        UsageError: There is no such row.
    """

    def __init__(self, speculate: str) -> None:
        check_way(speculate, SERVED)
        self._off = speculate == "off"
        self._places: WeakKeyDictionary[Job, Places] = WeakKeyDictionary()
        self._guesses: defaultdict[int, Guesses] = defaultdict(Guesses)
        self._budgets: defaultdict[int, Budget] = defaultdict(partial(Budget, _SAVED))

    def tokens(self, session: Session, jobs: Sequence[Job | None]) -> np.ndarray | None:
        """Return the next token of each row and guesses after it, `[B, K]`; None if a step is better."""
        if self._off or not session.drafts:
            return None
        size = len(jobs)
        rows = {row: self._read(job, self._guesses[size]) for row, job in enumerate(jobs) if job is not None}
        lengths = [places.length for places in rows.values()]
        count = self._guesses[size].choose(lengths, LENGTHS[-1], self._budgets[size].left)
        if not count:
            return None
        ids = np.zeros((size, 1 + count), np.int64)
        for row, places in rows.items():
            ids[row] = [places.ids[-1], *(places.guess(count) or [0] * count)]
        return ids

    def took(self, rows: int, tokens: int, seconds: float, written: float) -> None:
        """Record how long a call took, and how many tokens it wrote in a row on average."""
        if not self._off:
            guesses = self._guesses[rows]
            guesses.time(tokens, seconds)
            self._budgets[rows].add(written, guesses.cost(tokens) if tokens > 1 else 1.0)

    def _read(self, job: Job, guesses: Guesses) -> Places:
        """Return the places of a job that have read all its tokens up to the next one."""
        if job not in self._places:
            self._places[job] = Places()
            self._places[job].read(job.tokens[: job.at])
        places = self._places[job]
        for token in job.tokens[places.count : job.at + 1]:
            guesses.follow(places, token)
        return places
