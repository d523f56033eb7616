"""The scores by which a token that leaves the window earns a slot of the exact memory.

A score is fixed once its token has left the window. The kept set is then the best N of all tokens that left, in
whatever order they are read: a prompt can be cut anywhere. A score is data, one row of `SCORES`; `pack` turns it into
the plain values of a `Pool`, which every dialect reads. A row that combines the existing fields needs no other code. A
new signal, or a new field of `Pool`, is written once in each dialect:

- torch: `_scores` and `_kept` in `kernels/memory_attention.py`
- reference: `_score`, `_kept` and `_rank` in `kernels/reference.py`
- Triton, whole prompts: `kernels/fused/slot_scores.py` (attention received), `kernels/fused/candidates.py` (scores
  on arrival) and `_order` in `kernels/fused/slots.py` (the ranking)
- Triton, one token: `kernels/fused/slots_step.py`; `ragged_step.py` beside it knows scores on arrival only
- ONNX: `candidates` in `exporters/onnx/candidates.py`, `Slots._scores` and `Slots._keep` in `exporters/onnx/mixer.py`
- C++ of the lowering `native`: `exporters/onnx/native/node.py` (attributes), `ort_operator.cc` and `bounded_memory.h`
- verification: `get_ranks` in `exporters/verify/compare.py`

The TensorRT plugin launches the Triton kernels and has no score itself. `kernels/ops.py` and
`exporters/onnx/mixer.py` compute a signal that is known on arrival; all other dialects take it as a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ligerexport.errors import look_up

PEAK_DISTANCE = 4
"""Attention from at most this many tokens away does not count for `peak_use`: neighbours read every token."""

RECENCY = 1024.0
"""Age in tokens that costs a `recent_use` score a factor e, so that old text makes room for what is read now."""

FAINTEST = 1e-30
"""Smallest score whose logarithm ranks a pool that ages."""


@dataclass(frozen=True)
class Score:
    """A rule by which tokens get slots.

    Attributes:
        signal: `received` is the attention received while in the window (over sinks and window alone, so that no score
            depends on what the memory kept), `novelty` is the judge's recall error on arrival, and `learned` is a
            number that comes with the token.
        doc: One line for tables.
        reduce: How attention received is combined over queries and the heads of a group.
        by_value: Whether attention is multiplied by the norm of the token's value, its effect on the output.
        horizon: Age in tokens that costs a factor e in the ranking; None for no ageing.
    """

    signal: Literal["received", "novelty", "learned"]
    doc: str
    reduce: Literal["max", "sum"] = "max"
    by_value: bool = False
    horizon: float | None = None

    @property
    def on_arrival(self) -> bool:
        """Whether the score is a number that is fixed as soon as the token arrives."""
        return self.signal != "received"

    def first_distance(self, window: int) -> int:
        """Return the smallest distance in tokens at which attention received counts."""
        return PEAK_DISTANCE + 1 if self.reduce == "max" else window // 2


class Pool(NamedTuple):
    """One pool of slots in the plain values that all dialects read.

    Attributes:
        size: Number of slots.
        on_arrival: Whether the score is known on arrival; the next three fields mean nothing then.
        by_value: Whether attention received is multiplied by the norm of the token's value.
        summed: Whether attention received is added up; otherwise its largest value counts.
        first_distance: Smallest distance in tokens at which attention received counts.
        horizon: Age in tokens that costs a factor e in the ranking; 0 for no ageing.
    """

    size: int
    on_arrival: bool
    by_value: bool
    summed: bool
    first_distance: int
    horizon: float


SCORES: dict[str, Score] = {
    "peak_use": Score("received", "largest attention weight received at a distance over 4 tokens"),
    "peak_effect": Score("received", "the same times the norm of the token's value", by_value=True),
    "use": Score("received", "attention received in the last half of the stay in the window", "sum"),
    "recent_use": Score("received", "the same, a factor e less for each 1,024 tokens of age", "sum", horizon=RECENCY),
    "novelty": Score("novelty", "error of the linear state when asked for the token's value on arrival"),
    "learned": Score(
        "learned", "what a linear map of the hidden state foresees of later attention; fitted by `convert --calibrate`"
    ),
}


def get_score(name: str) -> Score:
    """Return the row of `SCORES` with this name."""
    return look_up("score", name, SCORES)


def pack(slots: tuple[tuple[str, int], ...], window: int) -> tuple[Pool, ...]:
    """Return the pools of a memory whose window has this many tokens, in order."""
    rows = [(get_score(name), count) for name, count in slots]
    return tuple(
        Pool(count, s.on_arrival, s.by_value, s.reduce == "sum", s.first_distance(window), s.horizon or 0.0)
        for s, count in rows
    )
