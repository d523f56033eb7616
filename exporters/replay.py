"""Search a call of many tokens for the tied scores that explain why it differs from torch.

A token may keep a slot by a tie in the middle of a call and be gone at its end, while what it changed is still there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ligerexport.exporters.reference import Answer, Reference
from ligerexport.exporters.verify import Comparison, Mismatch

if TYPE_CHECKING:
    from ligerexport.exporters.verify import Engine
    from ligerexport.snapshot import Snapshot

OFTEN = 8
"""Of so many tokens one may tie; more is noise in the scores."""
GROUP = 16
"""Tokens whose states are kept at a time."""


def replay(check: Comparison, session: Engine, torch_model: Reference, seen: list[np.ndarray], ids: np.ndarray) -> None:
    """Compare a call with torch token by token, and go on from torch's state after each near tie.

    Torch steps. The session makes calls that are one token longer each time, because the call as it was must be
    explained: had both stepped, every second tie would fall the same way in both. Where a call as a whole agrees with
    torch's steps, it is torch's own call that went the other way.

    Args:
        check: Compares.
        session: In the state before the call.
        torch_model: Answers.
        seen: Pieces of the prompt before the call.
        ids: Tokens of the call `[T]`.

    Raises:
        Mismatch: The first difference after some token is no near tie, or ties are too many.
    """
    cache, ties, start = torch_model.new_cache(), 0, sum(map(len, seen))
    if seen:
        torch_model.answers(seen, cache, whole=())
    for part in np.split(ids, range(session.chunk, len(ids), session.chunk)):
        while len(part):
            before, past = session.snapshot(), copy.deepcopy(cache)
            if _agree(check, session, torch_model, cache, part):
                count = len(part)
            else:
                cache, ties = past, ties + 1
                steps = _steps(torch_model, copy.deepcopy(past), part)
                count = _first_tie(check, session, before, steps, start)
                torch_model.answers(np.split(part[:count], count), cache, whole=())
            if ties * OFTEN > len(ids) + OFTEN:
                raise Mismatch(None, f"{ties} of {len(ids)} tokens ended in tied scores")
            part, start = part[count:], start + count


def _steps(torch_model: Reference, cache: Any, ids: np.ndarray) -> Iterator[Answer]:
    """Yield torch's answers to single tokens, so many at a time that their states can be kept."""
    for group in np.split(ids, range(GROUP, len(ids), GROUP)):
        yield from torch_model.answers(np.split(group, len(group)), cache)


def _agree(check: Comparison, session: Engine, torch_model: Reference, cache: Any, part: np.ndarray) -> bool:
    """Feed one call to the session and its tokens one by one to torch; return whether they end alike."""
    answer = torch_model.answers(np.split(part, len(part)), cache, whole={len(part) - 1})[-1]
    logits = session.prefill(part)[0]
    try:
        return check.agrees(session.snapshot(), answer, logits)
    except Mismatch:
        return False


def _first_tie(check: Comparison, session: Engine, before: Snapshot, answers: Iterator[Answer], start: int) -> int:
    """Make the call longer until it differs; return its tokens, the session in torch's state, after a near tie."""
    ids = np.empty(0, np.int64)
    for answer in answers:
        ids = np.append(ids, answer.ids)
        session.restore(before)
        logits = session.prefill(ids)[0]
        try:
            if check.agrees(session.snapshot(), answer, logits):
                continue
        except Mismatch as mismatch:
            raise Mismatch(mismatch.layer, f"{mismatch.what} after {start + len(ids)} tokens") from mismatch
        check.resume(session, session.snapshot(), answer)
        return len(ids)
    raise Mismatch(None, f"the call after {start} tokens does not give the same twice")
