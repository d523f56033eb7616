"""Search a call of many tokens for the tied scores that explain why it differs from torch.

A token may keep a slot by a tie in the middle of a call and be gone at its end, while what it changed is still there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ligerexport.exporters.reference import Answer, Reference, State
from ligerexport.exporters.verify import Comparison, Mismatch, get_ranks, of_layer
from ligerexport.memory import get_score

if TYPE_CHECKING:
    from ligerexport.exporters.verify import Engine
    from ligerexport.snapshot import Snapshot

OFTEN = 8
"""Of so many tokens one may tie; more is noise in the scores."""
GROUP = 16
"""Tokens whose states are kept at a time."""
TRIES = 32
"""Ties in the middle of a call that are decided the other way, one at a time."""
NUDGE = 1e-6
"""By how much a rank then goes beyond the other's: several units in the last place of a score."""


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
                count = _first_tie(check, session, torch_model, past, before, part, start)
                torch_model.answers(np.split(part[:count], count), cache, whole=())
            if ties * OFTEN > len(ids) + OFTEN:
                raise Mismatch(None, f"{ties} of {len(ids)} tokens ended in tied scores")
            part, start = part[count:], start + count


def single_steps(torch_model: Reference, cache: Any, ids: np.ndarray, *, hidden: bool = False) -> Iterator[Answer]:
    """Yield torch's answers to single tokens, so many at a time that their states can be kept."""
    for group in np.split(ids, range(GROUP, len(ids), GROUP)):
        yield from torch_model.answers(np.split(group, len(group)), cache, hidden=hidden)


def _agree(check: Comparison, session: Engine, torch_model: Reference, cache: Any, part: np.ndarray) -> bool:
    """Feed one call to the session and its tokens one by one to torch; return whether they end alike."""
    answer = torch_model.answers(np.split(part, len(part)), cache, whole={len(part) - 1})[-1]
    logits = session.prefill(part)[0]
    return _equal(check, session.snapshot(), answer, logits)


def _equal(check: Comparison, found: Snapshot, answer: Answer, logits: np.ndarray) -> bool:
    """Return whether a call ended as torch did, with not even a tie between them."""
    try:
        return check.agrees(found, answer, logits)
    except Mismatch:
        return False


def _first_tie(
    check: Comparison,
    session: Engine,
    torch_model: Reference,
    past: Any,
    before: Snapshot,
    part: np.ndarray,
    start: int,
) -> int:
    """Make the call longer until it differs; return its tokens, the session in torch's state, after a near tie.

    The longer call can have rounded a tie in its middle otherwise than the shorter ones did, and keep the same slots in
    the end. Then torch must end as it did once that tie is decided the other way.
    """
    ids, scores = np.empty(0, np.int64), [before.tensors]
    for answer in single_steps(torch_model, copy.deepcopy(past), part):
        ids = np.append(ids, answer.ids)
        scores.append({name: x for name, x in answer.state.items() if name.endswith(("slot_position", "slot_score"))})
        session.restore(before)
        logits, after = session.prefill(ids)[0], session.snapshot()
        try:
            if check.agrees(after, answer, logits):
                continue
        except Mismatch as mismatch:
            others = (_otherwise(check, torch_model, past, ids, tie) for tie in _ties(check, scores)[:TRIES])
            if not any(_equal(check, after, other, logits) for other in others):
                raise Mismatch(mismatch.layer, f"{mismatch.what} after {start + len(ids)} tokens") from mismatch
        check.resume(session, after, answer)
        return len(ids)
    raise Mismatch(None, f"the call after {start} tokens does not give the same twice")


@dataclass(frozen=True, order=True)
class _Tie:
    """A token that lost its slot by as good as nothing: by how much its rank, where, and when."""

    gap: float
    step: int
    layer: int
    row: tuple[int, ...]
    pool: int
    position: int


def _ties(check: Comparison, states: list[State]) -> list[_Tie]:
    """Return the near ties in a sequence of torch's states, the nearest first."""
    found = []
    for layer, mixer in enumerate(check.spec.mixers):
        if mixer is None or not mixer.config.slots:
            continue
        for step, (old, new) in enumerate(pairwise(of_layer(state, layer) for state in states)):
            for row in np.ndindex(old["slot_position"].shape[:2]):
                was, now = old["slot_position"][row], new["slot_position"][row]
                left = was < now.max() - mixer.config.window + 1
                lost = left & (was >= 0) & ~np.isin(was, now)
                held = left & (was >= mixer.config.sinks) & ~lost
                ranks = get_ranks(old["slot_score"][row], was, mixer.config.slots)
                for pool, rank in enumerate(ranks):
                    gaps = rank[held, None] - rank[lost]
                    for i, loser in zip(*np.nonzero(np.abs(gaps) <= check.tolerance.tie), strict=True):
                        found.append(_Tie(abs(gaps[i, loser]), step, layer, row, pool, int(was[lost][loser])))
    return sorted(found)


@torch.inference_mode()
def _otherwise(check: Comparison, torch_model: Reference, past: Any, ids: np.ndarray, tie: _Tie) -> Answer:
    """Return torch's answer to the last token of a call once a tie in the middle of it is decided the other way."""
    cache = copy.deepcopy(past)
    if tie.step:
        torch_model.answers(np.split(ids[: tie.step], tie.step), cache, whole=())
    state, mixer = cache.layers[tie.layer].state, check.spec.mixers[tie.layer]
    assert mixer is not None
    scores = state["slot_score"][tie.row][tie.pool]
    lift, chosen = tie.gap + NUDGE, state["slot_position"][tie.row] == tie.position
    if get_score(mixer.config.slots[tie.pool][0]).signal == "given":  # a logarithm already
        scores[chosen] += lift
    else:
        scores[chosen] *= math.exp(lift)
    rest = ids[tie.step :]
    return torch_model.answers(np.split(rest, len(rest)), cache, whole={len(rest) - 1})[-1]
