"""How many tokens of a prompt to read between two steps, from the times of earlier calls and steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

MOST = 16
"""Largest piece, in calls of the engine."""


class Pace:
    """Keeps the time between two tokens of a running job under a bound.

    The times of calls with some numbers of tokens were measured before the first prompt, and those between are
    interpolated. All are multiplied by how much slower calls have been lately: a full memory makes them slower, and so
    do other processes. Steps have an estimate for each size of the batch.

    Args:
        stall: The bound in seconds.
        seconds: Seconds of a call by its number of tokens; the largest number is that of a whole call.
    """

    def __init__(self, stall: float, seconds: Mapping[int, float]) -> None:
        self.stall = stall
        self.least, self.chunk = min(seconds), max(seconds)
        self._tokens = [0, *sorted(seconds)]
        self._seconds = np.maximum.accumulate([0.0, *(seconds[size] for size in self._tokens[1:])])
        self._slower = 1.0
        self._steps: dict[int, float] = {}

    def read(self, tokens: int, seconds: float) -> None:
        """Record the time of a piece."""
        self._slower = _follow(self._slower, seconds / self._piece(tokens))

    def stepped(self, rows: int, seconds: float) -> None:
        """Record the time of a step of a batch."""
        self._steps[rows] = _follow(self._steps.get(rows, seconds), seconds)

    def step(self, rows: int) -> float:
        """Return the likely seconds of a step; a batch that is new takes at most so much longer as it is larger."""
        known = max((size for size in self._steps if size <= rows), default=0)
        return self._steps[known] * rows / known if known else 0.0

    def fits(self, left: float) -> bool:
        """Return whether the smallest piece can be read in some seconds."""
        return left >= self._slower * self._seconds[1]

    def piece(self, left: float) -> int:
        """Return how many tokens can be read in some seconds; at least the smallest measured number."""
        left /= self._slower
        if (calls := int(left / self._seconds[-1])) > 0:
            return min(calls, MOST) * self.chunk
        return max(int(np.interp(left, self._seconds, self._tokens)), self.least)

    def _piece(self, tokens: int) -> float:
        """Return the seconds of a piece when nothing was slower."""
        calls, rest = divmod(tokens, self.chunk)
        return float(calls * self._seconds[-1] + np.interp(rest, self._tokens, self._seconds))


def _follow(old: float, new: float) -> float:
    """Return an estimate that rises fast and falls slowly."""
    return old + (new - old) * (0.5 if new > old else 0.1)
