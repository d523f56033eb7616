"""Write several tokens in one call of the engine: guess them from the text so far, and keep those that were right.

A guess is the continuation of an earlier place with the same last tokens, or what a second model would write. The
sampler still chooses every token, from the logits that it would get without guesses; a call that has guessed its choice
only answers the next question too. So the distribution of texts is the same, also with penalties and grammars.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np

from ligerexport.errors import UsageError, close_matches
from ligerexport.run.draft import DraftModel, check_tokens
from ligerexport.run.runtime import Session
from ligerexport.run.sampling import Sampler

T = TypeVar("T")
WAYS = "auto", "off", "ngram"
"""Values of `speculate`; `auto` is `ngram` for texts that nobody can have twice, if guesses are taken back cheaply."""
LENGTHS = (0, 1, 3, 7, 15)
"""Numbers of guessed tokens that a call may have beside the one that was chosen."""
LONGEST = 1 << 18
"""Number of tokens of a text, about 400 bytes each, beyond which its first half is no longer looked up."""
GAIN = 1.3
"""Guessing must promise this many times the speed of single steps."""
_FREE, _SHARE = 0.35, 0.008
"""Steps that wrong guesses may cost before any was right: at once, and for each token so far."""
_CAUTION = 8
"""A call may cost this many times as much as it is likely to lose, or all that it can lose, whichever is less."""
_SURE = 0.8
"""Steps by which all that a call can lose may exceed the budget, however sure its guesses are."""
_ROW = 0.25
"""Cost of one more token in a call, as a share of a step, until calls of its length were timed."""
_TIMINGS = 7
"""Largest number of calls of one length whose median is its cost."""
_PATIENCE = 256
"""Number of steps after which the costs of calls that were too slow are forgotten, in case the machine was busy."""


def check_way(speculate: str, ways: Sequence[str] = WAYS) -> None:
    """Check a value of `speculate`.

    Raises:
        UsageError: There is no such value.
    """
    if speculate not in ways:
        raise UsageError(f"speculate '{speculate}'", hint=close_matches(speculate, ways))


class Places:
    """Looks up where the last tokens of a text occurred before.

    Attributes:
        ids: The text, or the later part of a long one.
        count: Number of tokens of the whole text.
        length: Number of last tokens that are the same at the place found, at least; 0 if there is none.
        PRIOR: See `Guesses`.
    """

    PRIOR = (0.2, 0.4, 0.8, 1.6, 1.8), 2.0
    _SIZES = (6, 3, 2)

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.count = self.length = 0
        self._next = 0
        self._seen: dict[tuple[int, ...], int] = {}

    @property
    def next(self) -> int | None:
        """The guess of the next token, if there is one."""
        return self.ids[self._next] if self.length else None

    def read(self, ids: Iterable[int]) -> None:
        """Add tokens to the text."""
        for token in ids:
            if len(self.ids) == LONGEST:
                later, self.ids, self.length, self._seen = self.ids[LONGEST // 2 :], [], 0, {}
                self.count -= len(later)
                self.read(later)
            if self.length and self.ids[self._next] == token:
                self.length, self._next = self.length + 1, self._next + 1
            else:
                self.length = 0
            self.ids.append(token)
            self.count += 1
            for size in (n for n in self._SIZES if n <= len(self.ids)):
                last = tuple(self.ids[-size:])
                place = self._seen.get(last)
                if self.length < size and place is not None:
                    self.length, self._next = size, place
                self._seen[last] = len(self.ids)

    def guess(self, count: int) -> list[int]:
        """Return this many tokens that followed at the place found, or none if there is no such place.

        Behind the end of the text follow the guessed tokens, so a text that repeats itself is continued.
        """
        found = self.ids[self._next : self._next + count] if self.length else []
        while found and len(found) < count:
            found.append(found[len(found) - (len(self.ids) - self._next)])
        return found


Source = Places | DraftModel
"""What guesses tokens."""


class Guesses:
    """Says how many guessed tokens a call should have, from how often guesses were right and what calls cost.

    Guesses from earlier places are counted whether a call had them or not, so none is made only to learn how good they
    are.

    Args:
        prior: How many guesses count as right at first, by `_kind`, and of how many.
    """

    def __init__(self, prior: tuple[Sequence[float], float] = Places.PRIOR) -> None:
        self._right, self._made = np.array(prior[0]), np.full(len(prior[0]), prior[1])
        self._steps: deque[float] = deque(maxlen=_TIMINGS)  # their seconds
        self._costs: dict[int, deque[float]] = {}  # in steps of the same time, by the number of tokens
        self._waited = 0

    @staticmethod
    def _kind(length: int) -> int:
        return min(length, 8) // 2

    def record(self, length: int, right: bool) -> None:
        """Record whether a guess after a match of some length was right."""
        kind = self._kind(length)
        self._right[kind] = 0.95 * self._right[kind] + right
        self._made[kind] = 0.95 * self._made[kind] + 1

    def follow(self, source: Source, token: int) -> None:
        """Record whether the guess of the next token was right, and add the token to the text."""
        if source.next is not None:
            self.record(source.length, source.next == token)
        source.read([token])

    def time(self, tokens: int, seconds: float) -> None:
        """Record what a call of some tokens cost; the first one has one token."""
        if tokens == 1:
            self._steps.append(seconds)
        else:
            step = statistics.median(self._steps)
            self._costs.setdefault(tokens, deque(maxlen=_TIMINGS)).append(seconds / step)

    def cost(self, tokens: int) -> float:
        """Return what a call of some tokens costs, in steps."""
        known = max((n for n in self._costs if n < tokens), default=1)
        slope = _ROW if known == 1 else (self.cost(known) - 1) / (known - 1)
        timed = [*self._costs.get(tokens, ())]
        return statistics.median(timed + [1 + slope * (tokens - 1)] * max(0, 3 - len(timed)))

    def choose(self, lengths: Sequence[int], most: int, budget: float) -> int:
        """Return the number of tokens to guess in each row of a call.

        Args:
            lengths: Of the match in each row; 0 for a row that guesses nothing.
            most: Largest number to return.
            budget: Steps that the call may lose if its guesses are wrong.
        """
        if not self._steps or not any(lengths):
            return 0
        best, chosen, shares = GAIN, 0, [float(length > 0) for length in lengths]
        tokens = float(len(shares))
        for count in range(1, most + 1):
            for row, length in enumerate(lengths):
                kind = self._kind(length + count - 1)
                shares[row] *= self._right[kind] / (self._made[kind] + 1)  # one more that was wrong
            tokens += sum(shares)
            if count == 1:
                wrong = 1 - sum(shares) / len(shares)
            if count not in LENGTHS:
                continue
            cost = self.cost(count + 1)
            if max((cost - 1) * min(1, _CAUTION * wrong), cost - 1 - _SURE) > budget:
                break
            if (speed := tokens / len(shares) / cost) > best:
                best, chosen = speed, count
            if len(self._costs.get(count + 1, ())) < 2:  # longer calls are tried after shorter ones
                break
        self._waited = 0 if chosen else self._waited + 1
        if self._waited == _PATIENCE:
            self._costs, self._waited = {}, 0
        return chosen


class Budget:
    """How many steps wrong guesses may cost: few in advance, and those that right guesses have saved.

    Args:
        most: Largest number of steps.

    Attributes:
        left: The number of steps.
    """

    def __init__(self, most: float = math.inf) -> None:
        self._most, self.left = most, _FREE

    def add(self, tokens: float, cost: float) -> None:
        """Record that a call wrote some tokens, and what it cost in steps."""
        self.left = min(self.left + (1 + _SHARE) * tokens - cost, self._most)


class Speculation:
    """A session of one sequence whose steps may answer from an earlier call that has guessed them.

    Everything but `step` is the session's own.

    Args:
        session: The session, whose drafts take one call.
        source: The text so far, to which `step` adds its tokens.
        guesses: What was measured in this session before.
        clock: Returns the time in seconds.

    Attributes:
        calls: Number of calls of the engine.
        steps: Number of tokens.
    """

    def __init__(
        self, session: Session, source: Source, guesses: Guesses, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._session, self._source, self._guesses, self._clock = session, source, guesses, clock
        self._drafted: list[int] = []
        self._logits = np.empty((1, 0, 0), np.float32)  # after each token of the draft
        self._used, self._end, self._seconds = 0, 0, 0.0
        self._budget = Budget()
        self.calls = self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def step(self, token: int) -> np.ndarray:
        """Advance by one token; return the logits after it, `[1, V]`."""
        self.steps += 1
        source, guesses = self._source, self._guesses
        guesses.follow(source, token)
        if self._drafted and self._used < len(self._drafted) and self._drafted[self._used] == token:
            self._used += 1
            return self._logits[:, self._used - 1]
        self.settle()
        self.calls += 1
        count = guesses.choose([source.length], LENGTHS[-1], self._budget.left)
        start = self._clock()
        draft = [token, *source.guess(count)]
        if len(draft) == 1:
            logits = self._session.step(token)
            guesses.time(1, self._clock() - start)
            self._budget.add(1, 1)
            return logits
        self._logits = self._session.propose(draft)
        self._drafted, self._used, self._seconds = draft, 1, self._clock() - start
        _drafted[self._session], self._end = self._logits, int(self._session.position[0])
        return self._logits[:, 0]

    def settle(self) -> None:
        """Take back what was guessed and not chosen; the session is then as after single steps.

        It does nothing if somebody has given the session another state meanwhile, or another draft.
        """
        drafted, self._drafted = self._drafted, []
        mine = _drafted.get(self._session) is self._logits
        if drafted and mine and self._session.position[0] == self._end:
            start = self._clock()
            self._session.commit(self._used)
            self._guesses.time(len(drafted), self._seconds + self._clock() - start)
            self._budget.add(self._used, self._guesses.cost(len(drafted)))


_drafted: WeakKeyDictionary[Session, np.ndarray] = WeakKeyDictionary()
"""The logits of the last draft of each session, which say whose it was."""
_known: WeakKeyDictionary[Session, dict[type, Guesses]] = WeakKeyDictionary()
"""What was measured in each session with each class of sources."""


class Guessing:
    """How the texts of one conversation are guessed.

    Args:
        session: The session that writes them.
        speculate: Row of `WAYS`, or a session of a model that guesses.
        sampler: What chooses the tokens.

    Raises:
        UsageError: There is no such row, or the model that guesses has another tokenizer.
    """

    def __init__(self, session: Session, speculate: str | Session, sampler: Sampler) -> None:
        if isinstance(speculate, str):
            check_way(speculate)
            if speculate == "auto":
                cheap = session.artifact.manifest.lowering == "native"
                speculate = "ngram" if cheap and not sampler.repeatable else "off"
        else:
            check_tokens(session.artifact, speculate.artifact)
        self._session, self._speculate = session, speculate
        self.forget()

    def forget(self) -> None:
        """Begin another text."""
        self._source: Source | None = Places() if self._speculate == "ngram" else None

    def on(self, ids: Iterable[int]) -> Session:
        """Return a session that guesses, if it can, what follows a prompt that continues the conversation."""
        session = self._session
        if self._speculate == "off" or not session.drafts:
            return session
        if self._source is None:
            assert not isinstance(self._speculate, str)
            self._source = DraftModel(self._speculate, session.artifact.manifest.model.vocab_size)
        source = self._source
        source.read(ids)
        guesses = _known.setdefault(session, {}).setdefault(type(source), Guesses(source.PRIOR))
        return cast(Session, Speculation(session, source, guesses))


def settled(session: Session, chunks: Generator[T]) -> Generator[T]:
    """Return chunks that steps of a session make; before the last one and at their end nothing is guessed any more."""
    return _settled(session, chunks) if isinstance(session, Speculation) else chunks


def _settled(session: Speculation, chunks: Generator[Any]) -> Generator[Any]:
    try:
        for chunk in chunks:
            if chunk.finish:
                session.settle()
            yield chunk
    finally:
        chunks.close()
        session.settle()
