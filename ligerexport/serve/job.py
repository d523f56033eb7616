"""One request in the engine: its tokens, how the next one is chosen, and the ticket on which its reader waits."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import asdict

import numpy as np

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import UsageError
from ligerexport.run.runtime import Session
from ligerexport.run.sampling import Sampler
from ligerexport.serve.held import Held
from ligerexport.serve.request import Event, Finish, Reason, Request, Space


class Ticket:
    """What `Engine.submit` returns: the events of a request, from any thread or event loop; the last is a `Finish`.

    Args:
        wake: Called after `cancel`, so that the engine looks at it.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.cancelled = False
        self._wake = wake
        self._items: deque[Event | Finish] = deque()
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def cancel(self) -> None:
        """End the request within one step; its reader still gets a `Finish`."""
        self.cancelled = True
        self._wake()

    def put(self, item: Event | Finish) -> None:
        """Append an item and wake the reader."""
        self._items.append(item)
        if (reader := self._reader) is not None:
            with suppress(RuntimeError):  # the reader's loop is closed
                reader[0].call_soon_threadsafe(reader[1].set)

    async def __aiter__(self) -> AsyncIterator[Event | Finish]:
        while True:
            if not self._items:
                waker = asyncio.Event()
                self._reader = asyncio.get_running_loop(), waker
                if not self._items:  # nothing came before the reader was known
                    await waker.wait()
                self._reader = None
            item = self._items.popleft()
            yield item
            if isinstance(item, Finish):
                return


class Job:
    """A request that was accepted.

    Args:
        request: The request.
        vocabulary: Number of tokens of the model.
        wake: See `Ticket`.
        adapter: Digest of the request's adapter; empty text for none.

    Attributes:
        space: Where its states belong.
        tokens: The prompt and the tokens that were written.
        prompt: The prompt `[T]` int64.
        at: Number of `tokens` that the model has seen.
        cached: How many of them came from a state.
        row: Row of the batch; None while the job waits or its prompt is read.
        reader: Session that reads the prompt.
        start: State from which the job continues in a row, if no reader has it.
        logits: Logits `[V]` after the prompt, once it is read; None before.
        held: The state from which the job starts, until it is there.
        loading: The same state, which may still be read from the disk.
        stops: Numbers of tokens at which to keep the prompt's state, the largest first.
        behind: A job whose prompt begins alike, and the number of tokens until which it reads for both.

    Raises:
        UsageError: A value of the request makes no sense.
    """

    def __init__(self, request: Request, vocabulary: int, wake: Callable[[], None], adapter: str = "") -> None:
        ids = np.asarray(request.prompt)
        if ids.ndim != 1 or len(ids) < 1 or ids.dtype.kind not in "iu":
            raise UsageError("the prompt has no tokens", hint="give at least one token of text")
        for token in (int(ids.min()), int(ids.max()), *request.logit_bias):
            if not 0 <= token < vocabulary:
                raise UsageError(f"token id {token}", hint=f"ids of this model are 0 to {vocabulary - 1}")
        if request.max_tokens < 0:
            raise UsageError(f"max_tokens {request.max_tokens}", hint="give at least 0")
        if request.logprobs is not None and not 0 <= request.logprobs <= vocabulary:
            raise UsageError(f"logprobs {request.logprobs}", hint=f"give 0 to {vocabulary}")
        self.request, self.ticket = request, Ticket(wake)
        self.client = request.client or request.owner
        self.space = Space(request.owner, adapter)
        self.prompt = ids.astype(np.int64)
        self.tokens: list[int] = self.prompt.tolist()
        self.arrived = time.monotonic()
        self.at = self.cached = 0
        self.row: int | None = None
        self.reader: Session | None = None
        self.start: Snapshot | None = None
        self.logits: np.ndarray | None = None
        self.held: Held | None = None
        self.loading: Future[Snapshot] | None = None
        self.behind: tuple[Job, int] | None = None
        self.stops: list[int] = []
        self._finished = False
        self._mask: Future[np.ndarray] | None = None
        self._sampler = Sampler(**asdict(request.settings))
        self._sampler.read(self.tokens)
        if request.prompt_logprobs:
            self.ticket.put(Event(self.tokens[0], prompt=True))

    def overdue(self) -> Reason | None:
        """Return why the job must end now, if it must."""
        if self.ticket.cancelled:
            return "cancelled"
        deadline = self.request.deadline
        return "deadline" if deadline is not None and time.monotonic() >= deadline else None

    @property
    def scored(self) -> bool:
        """Whether steps read the prompt, since each of its tokens gets its log-probability."""
        return self.request.prompt_logprobs

    @property
    def seen_ids(self) -> np.ndarray:
        """The tokens that the model has seen, `[T]` int64."""
        written = self.tokens[len(self.prompt) : self.at]
        return np.concatenate([self.prompt[: self.at], np.array(written, np.int64)])

    @property
    def written(self) -> int:
        """Number of tokens that were written."""
        return len(self.tokens) - len(self.prompt)

    def prepare(self, pool: Executor) -> None:
        """Begin to find the tokens that are allowed after the next one, while the model reads it."""
        if self.request.constraint is not None and self.at + 1 >= len(self.prompt):
            self._mask = pool.submit(self.request.constraint.mask)

    def follow(self, logits: np.ndarray, draft: np.ndarray | None = None) -> tuple[int, Reason | None]:
        """Take the logits `[K, V]` after the next token and guesses of those that follow it, until a guess is wrong.

        Returns:
            The number of tokens that were right, and why the job ends, if it does.
        """
        for count, row in enumerate(logits, 1):
            reason = self.seen(row)
            if reason or draft is None or count == len(draft) or self.tokens[self.at] != draft[count]:
                return count, reason
        raise AssertionError("a call has logits for each of its tokens")

    def seen(self, logits: np.ndarray) -> Reason | None:
        """Take the logits `[V]` after the next token; return why the job ends, if it does."""
        self.at += 1
        if self.at < len(self.prompt):
            self.ticket.put(self._event(int(self.prompt[self.at]), logits, prompt=True))
            return None
        return self.choose(logits)

    def choose(self, logits: np.ndarray) -> Reason | None:
        """Choose a token from the logits `[V]` after the tokens so far; return why the job ends, if it does."""
        request = self.request
        if request.max_tokens == 0:
            return "length"
        changed = self._allowed(logits)
        if changed is None:
            return "stop"
        token = self._sampler(changed)
        if token in request.stop_tokens:
            return "stop"
        self.tokens.append(token)
        self.ticket.put(self._event(token, logits))
        if request.constraint is not None and not request.constraint.accept(token):
            return "stop"
        return "length" if self.written >= request.max_tokens else None

    def _allowed(self, logits: np.ndarray) -> np.ndarray | None:
        """Return logits with the bias, and without tokens that the constraint forbids; None if it forbids all."""
        request = self.request
        if request.logit_bias:
            logits = logits.copy()
            logits[list(request.logit_bias)] += np.fromiter(request.logit_bias.values(), np.float32)
        if request.constraint is None:
            return logits
        waiting, self._mask = self._mask, None
        mask = request.constraint.mask() if waiting is None else waiting.result()
        return np.where(mask, logits, np.float32(-np.inf)) if mask.any() else None

    def _event(self, token: int, logits: np.ndarray, prompt: bool = False) -> Event:
        count = self.request.logprobs
        if count is None:
            return Event(token, prompt=prompt)
        shifted = logits.astype(np.float64) - logits.max()
        shifted -= np.log(np.exp(shifted).sum())
        best = np.argpartition(-shifted, count - 1)[:count] if 0 < count < len(shifted) else np.arange(len(shifted))
        best = best[np.argsort(-shifted[best], kind="stable")] if count else best[:0]
        return Event(token, float(shifted[token]), tuple((int(i), float(shifted[i])) for i in best), prompt)

    def finish(self, reason: Reason, error: str | None = None) -> None:
        """Tell the reader once that the request has ended."""
        if not self._finished:
            self._finished = True
            self.ticket.put(Finish(reason, len(self.prompt), self.cached, self.written, error))
