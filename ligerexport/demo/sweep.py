"""Measure memory and time per token of both models while one text gets longer."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from ligerexport.demo.compare import Pair, Stopped
from ligerexport.errors import LigerError

POINTS = 16
"""Number of measured lengths, evenly spaced."""
PIECE = 256
"""Largest number of tokens that a model reads in a turn."""
TIMED = 8
"""Number of timed tokens at a length; one more before them is not timed."""


@dataclass
class Curve:
    """What was measured of one model so far.

    Attributes:
        name: Name of the model.
        time: Tokens before the timed ones, and median milliseconds per token.
        memory: Tokens seen, and bytes of state or KV cache.
        error: Why the curve ends early.
    """

    name: str
    time: list[tuple[float, float]] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    error: str | None = None


@dataclass
class Sweep:
    """A measurement that is under way.

    Attributes:
        longest: Last length in tokens.
        curves: One for each model.
        done: Share of the lengths that are done, weighted by tokens, from 0 to 1.
        stopped: Whether the user ended it.
    """

    longest: int
    curves: Sequence[Curve]
    done: float = 0.0
    stopped: bool = False


def sweep(pair: Pair, session: str, ids: Sequence[int], stop: threading.Event) -> Iterator[Sweep]:
    """Let both models read a text, and time some tokens at each length.

    A Transformer in torch gets a cache of random numbers instead of reading, on which its time does not depend.

    Args:
        session: A unique name.
        ids: The text; its length is the last one that is measured.
        stop: Event that ends the measurement.

    Yields:
        The same object each time, after each turn.
    """
    found = Sweep(len(ids), [Curve(name) for name in pair.names])
    lengths = [0, *(len(ids) * (i + 1) // POINTS for i in range(POINTS))]
    try:
        for curve in found.curves:
            _ask(pair, curve, session, stop, "warm")
        for last, length in pairwise(lengths):
            for at in range(last, length, PIECE):
                for curve in found.curves:
                    if curve.error is None:
                        _read(pair, curve, session, ids[at : min(at + PIECE, length)], stop)
                found.done = min(at + PIECE, length) / len(ids)
                yield found
            for curve in found.curves:
                if curve.error is None:
                    _time(pair, curve, session, length, stop)
            yield found
    except Stopped:
        found.stopped = True
    finally:
        for name in pair.names:
            pair.after(partial(pair.forget, name, session))
    yield found


def _read(pair: Pair, curve: Curve, session: str, piece: Sequence[int], stop: threading.Event) -> None:
    if pair.facts(curve.name)["fills"]:
        _ask(pair, curve, session, stop, "fill", tokens=len(piece))
    else:
        _ask(pair, curve, session, stop, "prefill", ids=[list(piece)])


def _time(pair: Pair, curve: Curve, session: str, length: int, stop: threading.Event) -> None:
    answer = _ask(pair, curve, session, stop, "decode", tokens=[0], count=1 + TIMED)
    if answer:
        curve.time.append((length, 1e3 * statistics.median(answer["seconds"][1:])))
        curve.memory.append((length, answer["state_bytes"]))


def _ask(
    pair: Pair, curve: Curve, session: str, stop: threading.Event, do: str, **arguments: Any
) -> dict[str, Any] | None:
    """Call a model's worker in a turn; an error ends its curve, and the other model goes on."""
    try:
        return pair.call(stop, partial(pair.work, curve.name, do, session, **arguments))
    except LigerError as error:
        curve.error = error.message
        return None
