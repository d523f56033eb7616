"""Search a call of many tokens for the tied scores that explain why it differs from torch.

A token may keep a slot by a tie in the middle of a call and lose it before the end, while its effects remain.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.exporters.verify.compare import Comparison, Engine, Mismatch, get_ranks
from ligerexport.exporters.verify.slots import by_head, of_layer, places
from ligerexport.exporters.verify.torch_model import Answer, Reference, State
from ligerexport.layers.mixer import LigerCache
from ligerexport.model.config import LigerConfig
from ligerexport.model.scores import get_score

OFTEN = 8
"""Largest share of tokens that may tie, one in eight; if more do, the scores are noise."""
TRIES = 32
"""Number of ties in the middle of a call that are decided the other way, one at a time."""
SINGLE = 4
"""Number of these that are also tried with single tokens after them: a whole call may round later ties differently."""
NUDGE = 1e-6
"""Distance by which a rank is then moved past the other: several units in the last place of a score."""


def replay(
    check: Comparison,
    session: Engine,
    torch_model: Reference,
    past: LigerCache,
    ids: np.ndarray,
    start: int = 0,
    advance: Callable[[float], None] = lambda amount: None,
) -> None:
    """Compare a call with torch chunk by chunk, and continue from torch's state after each near tie.

    Args:
        check: Compares states and logits.
        session: Session in the state before the call.
        torch_model: Gives the expected answers.
        past: Torch's state before the call.
        ids: Tokens of the call `[T]`.
        start: Tokens before the call.
        advance: Called with the number of tokens that were compared.

    Raises:
        Mismatch: A difference is no near tie, or there are too many ties.
    """
    ties, rest = 0, ids
    while len(rest):
        chunks = np.split(rest, range(session.chunk, len(rest), session.chunk))
        for answer in torch_model.answers(chunks, copy.deepcopy(past)):
            before, logits = session.snapshot(), session.prefill(answer.ids)[0]
            agree = _equal(check, session.snapshot(), answer, logits)
            found = [answer] if agree else _first_tie(check, session, torch_model, past, before, answer.ids, start)
            count, past = sum(len(part.ids) for part in found), found[-1].after()
            rest, start, ties = rest[count:], start + count, ties + (not agree)
            advance(count)
            if ties * OFTEN > len(ids) + OFTEN:
                raise Mismatch(None, f"{ties} of {len(ids)} tokens ended in tied scores")
            if not agree:  # torch's answers for later chunks no longer apply
                break


def narrow(
    torch_model: Reference,
    past: LigerCache,
    ids: np.ndarray,
    differs: Callable[[list[Answer]], object],
    *,
    hidden: bool = False,
) -> list[Answer]:
    """Search a call for the token at which it begins to differ from torch, which runs pieces and then single tokens.

    The other side must make calls that begin where this one does, because the original call must be explained: if it
    were cut like torch's, every second tie would be decided the same way in both. The number of tokens is bisected, so
    a difference that disappears again may be missed.

    Args:
        torch_model: Gives the expected answers.
        past: Torch's state before the call.
        ids: Tokens of the call `[T]`.
        differs: Returns whether a call with the tokens of these answers ends differently from torch.
        hidden: The same as for `Reference.answers`.

    Returns:
        Torch's answers up to that token. If the call agrees with torch's pieces, torch decided the tie the other way,
        and the answers end with a piece.
    """
    known: list[Answer] = []
    group, base = ids, past
    for width in (math.isqrt(len(ids)), 1):
        pieces = np.split(group, range(width, len(group), width))
        answers = torch_model.answers(pieces, copy.deepcopy(base), hidden=hidden)
        if not differs([*known, *answers]):
            return [*known, *answers]
        low, high = 0, len(answers)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if differs([*known, *answers[:middle]]) else (middle, high)
        known, group = known + answers[:low], answers[low].ids
        base = known[-1].after() if known else past
    return [*known, answers[low]]


def _equal(check: Comparison, found: Snapshot, answer: Answer, logits: np.ndarray) -> bool:
    """Return whether a call ended exactly as torch's did, without even a tie."""
    try:
        return check.agrees(found, answer, logits)
    except Mismatch:
        return False


def _first_tie(
    check: Comparison,
    session: Engine,
    torch_model: Reference,
    past: LigerCache,
    before: Snapshot,
    ids: np.ndarray,
    start: int,
) -> list[Answer]:
    """Search a call for a near tie; return torch's answers up to it, with the session in torch's state after it.

    The call may have rounded a tie in its middle differently from a shorter call, and still keep the same slots.
    Then torch must reach the same end once that tie is decided the other way.
    """

    def call(answers: list[Answer]) -> tuple[Snapshot, np.ndarray]:
        session.restore(before)
        logits = session.prefill(np.concatenate([answer.ids for answer in answers]))[0]
        return session.snapshot(), logits

    def differs(answers: list[Answer]) -> bool:
        after, logits = call(answers)
        return not _equal(check, after, answers[-1], logits)

    answers = narrow(torch_model, past, ids, differs)
    after, logits = call(answers)
    try:
        check.agrees(after, answers[-1], logits, before.tensors, start)
    except Mismatch as mismatch:
        ids = np.concatenate([answer.ids for answer in answers])
        steps = torch_model.answers(np.split(ids, len(ids)), copy.deepcopy(past), whole={len(ids) - 1})
        if _equal(check, after, steps[-1], logits):  # torch's pieces decided the tie the other way
            check.resume(session, after, steps[-1])
            return steps
        ties = _ties(check, [before.tensors, *(answer.state for answer in steps)], mismatch.layer)
        tries = [(tie, len(ids)) for tie in ties[:TRIES]] + [(tie, 1) for tie in ties[:SINGLE]]
        others = (_otherwise(check, torch_model, past, ids, tie, width) for tie, width in tries)
        if not any(_equal(check, after, other, logits) for other in others):
            raise Mismatch(mismatch.layer, f"{mismatch.what} after {start + len(ids)} tokens") from mismatch
    check.resume(session, after, answers[-1])
    return answers


@dataclass(frozen=True, order=True)
class _Tie:
    """A token that nearly kept its slot: the difference in rank, its place, and its time."""

    gap: float
    step: int
    layer: int
    row: tuple[int, int]
    pool: int
    position: int


def _ties(check: Comparison, states: list[State], last: int | None = None) -> list[_Tie]:
    """Return the near ties in a sequence of torch's states, the nearest first; none in layers after `last`."""
    found = []
    for layer, mixer in enumerate(check.spec.mixers[: None if last is None else last + 1]):
        if mixer is None or not mixer.config.slots:
            continue
        for step, (old, new) in enumerate(pairwise(of_layer(state, layer) for state in states)):
            for head, sides in enumerate(zip(by_head(old, mixer), by_head(new, mixer), strict=True)):
                before, after = (state for _, state in sides)
                for b, h in np.ndindex(before["slot_position"].shape[:2]) if "slot_score" in before else ():
                    was, now = before["slot_position"][b, h], after["slot_position"][b, h]
                    scores, row = before["slot_score"][b, h], (b, head + h)
                    lost, held = _competing(was, now, mixer.heads[row[1]].config)
                    for pool, rank in enumerate(get_ranks(scores, was, mixer.config.slots)):
                        gaps = rank[held, None] - rank[lost]
                        for i, loser in zip(*np.nonzero(np.abs(gaps) <= check.tolerance.tie), strict=True):
                            found.append(_Tie(abs(gaps[i, loser]), step, layer, row, pool, int(was[lost][loser])))
    return sorted(found)


def _competing(was: np.ndarray, now: np.ndarray, config: LigerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return which tokens of a head lost their slot between two states, and which kept it by their rank."""
    left = was < now.max() - config.window + 1
    lost = left & (was >= 0) & ~np.isin(was, now)
    return lost, left & (was >= config.sinks) & ~lost


@torch.inference_mode()
def _otherwise(check: Comparison, torch_model: Reference, past: Any, ids: np.ndarray, tie: _Tie, width: int) -> Answer:
    """Return torch's answer to the last token of a call if a tie in the middle of it is decided the other way.

    The tokens after the tie are read in calls of `width` tokens.
    """
    cache = copy.deepcopy(past)
    if tie.step:
        torch_model.answers([ids[: tie.step]], cache, whole=())
    state, mixer = cache.layers[tie.layer].state, check.spec.mixers[tie.layer]
    assert mixer is not None
    slots, scored = places(mixer, tie.row[1])
    packed = state["slot_position"].ndim == 2
    scores = state["slot_score"][tie.row[0], tie.pool, scored] if packed else state["slot_score"][tie.row][tie.pool]
    position = state["slot_position"][tie.row[0], slots] if packed else state["slot_position"][tie.row]
    lift, chosen = tie.gap + NUDGE, position == tie.position
    if get_score(mixer.config.slots[tie.pool][0]).signal == "learned":  # already a logarithm
        scores[chosen] += lift
    else:
        scores[chosen] *= math.exp(lift)
    rest = ids[tie.step :]
    return torch_model.answers(np.split(rest, range(width, len(rest), width)), cache)[-1]
