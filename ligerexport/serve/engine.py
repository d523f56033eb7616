"""The engine of the server: one artifact, one thread that computes, and requests from any thread or event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ligerexport.artifact.artifact import Manifest
from ligerexport.errors import LigerError, UsageError, close_matches
from ligerexport.run.generate import text_model
from ligerexport.run.runtime import load
from ligerexport.serve.job import Job, Ticket
from ligerexport.serve.request import Draining, QueueFull, Request, Space, StateInfo
from ligerexport.serve.scheduler import STALL, Scheduler
from ligerexport.serve.states import States
from ligerexport.serve.store import adapter_digest
from ligerexport.serve.waiting import Waiting
from ligerexport.text.tokenizer import TextModel

DISK = 64_000_000_000
"""Default of the bytes of states on the disk."""
_LOOK = 0.1
"""Seconds between two looks at deadlines while all jobs wait for the disk."""
_FAILURES = 3
"""Number of turns in a row that may fail unexpectedly before the engine takes no more requests."""

_log = logging.getLogger(__name__)


class Engine:
    """Runs the requests for one artifact. It owns a thread, which `close` ends.

    Args:
        artifact: What `ligerexport.run.runtime.load` opens.
        max_batch: Number of requests that are read or answered at once.
        memory: Bytes of states in memory. The rows of running requests and their readers are not part of it.
        state_dir: Directory for states; None keeps them in memory only. Its states are found again after a restart.
        disk: Bytes of states in that directory.
        shared: Place of states that other servers use too, instead of a directory; see `SharedStore`.
        queue: Number of requests that may wait.
        stall: Longest planned time in seconds between two tokens of an answer while prompts of others are read.
        adapters: See `ligerexport.run.runtime.load`.
        speculate: `ngram` guesses tokens from earlier places of each text where that is faster; `off` does not.
        options: Other arguments of `load`, such as `device` and `threads`.

    Attributes:
        manifest: What the artifact says about itself.
        directory: Where the artifact is.

    Raises:
        UsageError: A number is out of range, or there is no such way to guess.
        LigerError: The artifact cannot be opened, or the directory cannot be written.
    """

    def __init__(
        self,
        artifact: Path | str,
        *,
        max_batch: int = 16,
        memory: int = 4 << 30,
        state_dir: Path | None = None,
        disk: int = DISK,
        shared: str | None = None,
        queue: int = 256,
        stall: float = STALL,
        adapters: Mapping[str, Path] | None = None,
        speculate: str = "off",
        **options: Any,
    ) -> None:
        leasts = ("max_batch", max_batch, 1), ("memory", memory, 0), ("disk", disk, 0), ("queue", queue, 1)
        for name, value, least in leasts:
            if value < least:
                raise UsageError(f"{name} {value}", hint=f"give at least {least}")
        session = load(artifact, batch=max_batch, adapters=adapters, **options)
        self.manifest: Manifest = session.artifact.manifest
        self.directory = session.artifact.directory
        self._states = States(self.manifest.fingerprint, memory, state_dir, disk, shared)
        self._adapters = {name: adapter_digest(path) for name, path in (adapters or {}).items()}
        self._changed = threading.Condition()
        self._waiting = Waiting(queue)
        self._poked = self._draining = self._closing = False
        self._failed = ""
        self._idle = threading.Event()
        self._idle.set()
        self._scheduler = Scheduler(session, self._states, self._wake, stall, speculate)
        self._thread = threading.Thread(target=self._work, name="ligerexport-engine", daemon=True)
        self._thread.start()

    @cached_property
    def text(self) -> TextModel:
        """The tokenizer and the chat template.

        Raises:
            ArtifactError: The artifact has no tokenizer.
        """
        return text_model(self.directory)

    @property
    def failed(self) -> str:
        """Why it takes no more requests; empty text while it works."""
        return self._failed

    def submit(self, request: Request) -> Ticket:
        """Accept a request; its events come through the ticket.

        Raises:
            UsageError: A value of the request makes no sense.
            QueueFull: Too many requests wait.
            Draining: The engine is about to end.
            LigerError: The engine has failed.
        """
        space = self._space(request.owner, request.adapter)
        job = Job(request, self.manifest.model.vocab_size, self._wake, space.adapter)
        with self._changed:
            if self._failed:
                raise LigerError(f"the engine has failed: {self._failed}", hint="start the server again")
            if self._draining or self._closing:
                raise Draining
            if not self._waiting.put(job):
                each = sum(self._scheduler.seconds.values()) / max(1, self._scheduler.counts["ended"])
                raise QueueFull(len(self._waiting), max(1.0, len(self._waiting) * each))
            self._idle.clear()
        self._wake()
        return job.ticket

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, finish those that were accepted, and write the states.

        Args:
            timeout: Seconds after which requests that still run are cancelled.
        """
        with self._changed:
            self._draining = True
        if not await asyncio.to_thread(self._idle.wait, timeout):
            self._end_all()
            await asyncio.to_thread(self._idle.wait)
        await asyncio.to_thread(self._states.flush)

    def close(self) -> None:
        """Cancel all requests and end the thread."""
        with self._changed:
            self._closing = True
        self._wake()
        self._thread.join()
        self._scheduler.close()
        self._states.close()

    def states(self, owner: str = "", adapter: str | None = None) -> list[StateInfo]:
        """Return the states of an owner with an adapter or without one, the longest first."""
        return self._states.infos(self._space(owner, adapter))

    def pin(self, owner: str, state: str, pinned: bool = True, adapter: str | None = None) -> None:
        """Keep a state until it is deleted, or no longer; `state` is an id or a name.

        Raises:
            UsageError: There is no such state, or pinned ones would take more than half of the space.
            LigerError: The disk is full.
        """
        self._states.change(self._states.get(self._space(owner, adapter), state), pinned=pinned)

    def name(self, owner: str, state: str, name: str, adapter: str | None = None) -> None:
        """Name a state; see `pin` for errors."""
        self._states.change(self._states.get(self._space(owner, adapter), state), name=name)

    def delete(self, owner: str, state: str, adapter: str | None = None) -> None:
        """Delete a state, also from the disk; see `pin` for errors."""
        self._states.forget(self._states.get(self._space(owner, adapter), state))

    def stats(self) -> dict[str, float]:
        """Return gauges (`running`, `reading`, `waiting`, bytes of states) and totals since the start.

        `read` counts tokens of prompts, `cached` those that came from states, `stepped` tokens that steps fed, and the
        names with `seconds` the time that they took.
        """
        scheduler = self._scheduler
        with self._changed:
            running, jobs = len(scheduler.running), len(scheduler.jobs)
            gauges = {"running": running, "reading": jobs - running, "waiting": len(self._waiting)}
        totals = {name: float(scheduler.counts[name]) for name in ("read", "cached", "steps", "stepped")}
        seconds = {f"seconds_{name}": scheduler.seconds[name] for name in ("reading", "stepping")}
        return gauges | totals | seconds | self._states.stats()

    def _space(self, owner: str, adapter: str | None) -> Space:
        """Return where states of an owner and an adapter belong.

        Raises:
            UsageError: There is no such adapter.
        """
        if adapter is None:
            return Space(owner)
        if adapter not in self._adapters:
            raise UsageError(f"no adapter '{adapter}' was loaded", hint=close_matches(adapter, self._adapters))
        return Space(owner, self._adapters[adapter])

    def _wake(self) -> None:
        with self._changed:
            self._poked = True
            self._changed.notify_all()

    def _end_all(self) -> None:
        with self._changed:
            for job in (*self._waiting, *self._scheduler.jobs):
                job.ticket.cancelled = True
        self._wake()

    def _work(self) -> None:
        failures = 0
        while not self._closing:
            try:
                self._next()
                steps = self._scheduler.counts["steps"]
                self._scheduler.turn()
                failures = 0 if self._scheduler.counts["steps"] > steps else failures
            except Exception as error:
                _log.exception("a turn of the engine failed")
                failures += 1
                if failures == _FAILURES or not self._scheduler.fail(error):
                    self._failed = str(error) or type(error).__name__
                    break
        with self._changed:
            self._closing = True
            if not self._failed:
                try:
                    self._scheduler.stop()
                except Exception:
                    _log.exception("the states of requests that still ran are lost")
            for job in (*self._scheduler.jobs, *self._waiting.clear()):
                job.finish("error", self._failed) if self._failed else job.finish("cancelled")
            self._idle.set()

    def _next(self) -> None:
        """Wait until there is something to do, and give places to jobs that wait."""
        scheduler = self._scheduler
        with self._changed:
            if not scheduler.jobs and not self._waiting:
                self._idle.set()
            while not (self._poked or scheduler.busy or self._admits() or self._closing):
                self._changed.wait(_LOOK if scheduler.jobs else None)
                self._poked = self._poked or bool(scheduler.jobs)
            self._poked = False
            for job in self._waiting.sweep():
                job.finish(job.overdue() or "cancelled")
            while self._admits():
                scheduler.admit(self._waiting.take(scheduler.jobs))

    def _admits(self) -> bool:
        return len(self._waiting) > 0 and len(self._scheduler.jobs) < self._scheduler.places
