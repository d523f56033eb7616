"""The scores by which a token that leaves the window earns a slot of the exact memory.

A score is fixed once its token has left the window, so the kept set is the best N of all that left, whatever the
order: a prompt can be cut anywhere. The arithmetic is in `ligerexport.kernels`; here is what each score means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ligerexport.errors import look_up

PEAK_DISTANCE = 4
"""Attention from fewer or as many tokens away does not count for `peak_use`: every token is looked at by its next."""


RECENCY = 1024.0
"""Tokens of age that cost a `recent_use` score a factor e; so old text gives way to what is read now."""


@dataclass(frozen=True)
class Score:
    """What a slot is kept for.

    Attributes:
        signal: `received` for attention received while in the window (over sinks and window alone, so that no score
            depends on what the memory kept), `novelty` for the judge's recall error on arrival, `given` for a number
            that comes with the token.
        doc: One line for tables.
        reduce: How attention received is gathered over queries and the heads of a group.
        by_value: Whether attention counts times the norm of the token's value, so as what it added to the output.
        horizon: Tokens of age that cost a factor e in the ranking; None for no ageing.
    """

    signal: Literal["received", "novelty", "given"]
    doc: str
    reduce: Literal["max", "sum"] = "max"
    by_value: bool = False
    horizon: float | None = None

    @property
    def on_arrival(self) -> bool:
        """Whether the score is a number that is fixed as soon as the token is there."""
        return self.signal != "received"

    def first_distance(self, window: int) -> int:
        """Return the smallest distance in tokens at which attention received counts."""
        return PEAK_DISTANCE + 1 if self.reduce == "max" else window // 2


SCORES: dict[str, Score] = {
    "peak_use": Score("received", "largest attention weight received at a distance over 4 tokens"),
    "peak_effect": Score("received", "the same times the norm of the token's value", by_value=True),
    "use": Score("received", "attention received in the last half of the stay in the window", "sum"),
    "recent_use": Score("received", "the same, a factor e less for each 1,024 tokens of age", "sum", horizon=RECENCY),
    "novelty": Score("novelty", "error of the linear state when asked for the token's value on arrival"),
    "learned": Score(
        "given", "what a linear map of the hidden state foresees of later attention; fitted by `convert --calibrate`"
    ),
}


def get_score(name: str) -> Score:
    """Return the row of `SCORES` with this name.

    Raises:
        UsageError: No such score; the hint names close matches.
    """
    return look_up("score", name, SCORES)
