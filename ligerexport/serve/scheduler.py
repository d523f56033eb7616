"""Continuous batching: every turn reads a piece of one prompt, and feeds one token to every row of the batch.

A prompt is read by a session of its own, so that a piece touches no other row. It moves to a row of the batch when all
but its last token are read, and a step feeds that one. Batches have 1, 2, 3, 4, 6, 8, 12, ... rows: a row without a job
costs time, and so do jobs that move to a batch of another size.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import LigerError
from ligerexport.run.prompt_cache import common_length
from ligerexport.run.runtime import Session
from ligerexport.serve.job import Job
from ligerexport.serve.request import Reason
from ligerexport.serve.states import WORTH, States

STALL = 0.15
"""Longest time in seconds between two tokens of a running job while prompts are read."""
_SHARE = 0.8
"""Share of `STALL` that a piece of a prompt and a step plan to take; the rest is for copies of states."""
_LEAST = 8
"""Smallest piece of a prompt in tokens, even if it takes longer than planned."""
_MOST = 16
"""Largest piece, in calls of the engine."""
_SPARE = 32
"""Number of steps with too many rows before the batch gets smaller."""
_IDLE = -1

_log = logging.getLogger(__name__)


class Pace:
    """Chooses how many tokens of a prompt to read between two steps, from the times of earlier ones.

    A piece takes a time of its own and a time per token. Both were measured before the first prompt, and are multiplied
    by how much slower pieces have been lately, for instance because other processes compute too.

    Args:
        chunk: Number of tokens per call of the engine.
        least: Seconds of a piece of `_LEAST` tokens.
        whole: Seconds of a piece of `chunk` tokens.
    """

    def __init__(self, chunk: int, least: float, whole: float) -> None:
        self.chunk = chunk
        self._token = max(whole - least, 0.1 * whole) / max(1, chunk - _LEAST)
        self._call = max(0.0, whole - chunk * self._token)
        self._slower, self._step = 1.0, 0.0

    def read(self, tokens: int, seconds: float) -> None:
        """Record the time of a piece."""
        calls = -(-tokens // self.chunk)
        self._slower = _follow(self._slower, seconds / (calls * self._call + tokens * self._token))

    def stepped(self, seconds: float) -> None:
        """Record the time of a step."""
        self._step = _follow(self._step, seconds)

    def piece(self, running: bool) -> int:
        """Return how many tokens to read; without running jobs, at least a whole call."""
        left = (STALL * _SHARE - (self._step if running else 0.0)) / self._slower
        calls = int(left / (self._call + self.chunk * self._token))
        if calls >= 1 or not running:
            return min(max(calls, 1), _MOST) * self.chunk
        return min(max(int((left - self._call) / self._token), _LEAST), self.chunk)


def _follow(old: float, new: float) -> float:
    """Return an estimate that rises fast and falls slowly."""
    return old + (new - old) * (0.5 if new > old else 0.1)


class Scheduler:
    """The jobs that have a place. All calls come from one thread.

    Args:
        session: Session with as many rows as there are places; it and its siblings belong to this object.
        states: Where states come from and go to.
        wake: Called when a state was read from the disk.

    Attributes:
        counts: Totals since the start, by name.
    """

    def __init__(self, session: Session, states: States, wake: Callable[[], None]) -> None:
        self._root, self._states, self._wake = session, states, wake
        self.places = session.batch
        self._batches = {self.places: session}
        self._rows: list[Job | None] = [None]
        self._readers: list[Session] = []
        self._reading: list[Job] = []
        self._turn = self._spare = 0
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.pace = self._measure()

    @property
    def jobs(self) -> list[Job]:
        """All jobs that have a place."""
        return [*self._reading, *self.running]

    @property
    def running(self) -> list[Job]:
        """Jobs that have a row."""
        return [job for job in self._rows if job is not None]

    @property
    def busy(self) -> bool:
        """Whether a turn would do anything."""
        return any(job is not None for job in self._rows) or any(self._ready(job) for job in self._reading)

    def _measure(self) -> Pace:
        """Time pieces of two lengths, the second time that a session reads them."""
        reader = self._root.sibling()
        seconds = {}
        for size in (_LEAST, reader.chunk) * 2:
            clock = time.perf_counter()
            reader.prefill(np.zeros(size, np.int64))
            seconds[size] = time.perf_counter() - clock
        self._readers.append(reader)
        return Pace(reader.chunk, seconds[_LEAST], seconds[reader.chunk])

    def admit(self, job: Job) -> None:
        """Give a job a place."""
        self._reading.append(job)
        self._start(job)

    def turn(self) -> None:
        """End what must end, read a piece of a prompt, and advance all rows by a token."""
        for job in self.jobs:
            if reason := job.overdue():
                self._end(job, reason)
        for job in list(self._reading):
            if job.reader is None and self._ready(job):
                self._guard(job, self._open)
        if readers := [job for job in self._reading if job.reader is not None]:
            self._guard(self._choose(readers), self._read)
        if any(job is not None for job in self._rows):
            self._step()

    def fail(self, error: Exception) -> bool:
        """End all jobs after an unexpected error; return whether there can be others."""
        for job in self.jobs:
            job.finish("error", str(error) or type(error).__name__)
        self._reading, self._readers, self._rows = [], [], [None]
        self._batches = {self.places: self._root}
        try:
            self._root.reset()
        except Exception:
            _log.exception("the session cannot be reset")
            return False
        return True

    def stop(self) -> None:
        """End all jobs."""
        for job in self.jobs:
            self._end(job, "cancelled")

    def _guard(self, job: Job, work: Callable[[Job], None]) -> None:
        """Do something for a job of which no other one has to know; an error ends the job."""
        try:
            work(job)
        except Exception as error:
            self._reading = [other for other in self._reading if other is not job]
            job.reader = None  # its state is undefined
            self._report(job, error)

    def _report(self, job: Job, error: Exception) -> None:
        if not isinstance(error, LigerError):
            _log.exception("a request failed")
        job.finish("error", str(error) or type(error).__name__)

    def _start(self, job: Job) -> None:
        """Look for the deepest state of a prompt, and plan where to keep others."""
        job.held, job.loading, job.behind, job.at, job.cached = None, None, None, 0, 0
        if job.request.prompt_logprobs:
            return
        space, last = job.space, job.last
        held, known = self._states.find(space, job.prompt, last)
        cached = held.node.length if held else 0
        for other in self._reading[: self._reading.index(job)]:
            if other.space == space and not other.request.prompt_logprobs:
                common = min(common_length(other.prompt, job.prompt), last, other.last)
                if common >= cached + WORTH and other.at < common:
                    other.stops = sorted({*other.stops, common}, reverse=True)
                    job.behind = other, common
                    return
        marks = {at for at in job.request.marks if at < last}
        job.stops = [last]
        for at in sorted({known, *marks}, reverse=True):
            if cached + WORTH <= at <= job.stops[-1] - WORTH:
                job.stops.append(at)
        if held is not None:
            job.held, job.loading = held, self._states.fetch(held)
            job.loading.add_done_callback(lambda _: self._wake())

    def _ready(self, job: Job) -> bool:
        """Return whether a job that is not running can go on."""
        if job.behind is not None:
            other, common = job.behind
            return other.at >= common or other not in self._reading
        return job.loading is None or job.loading.done()

    def _open(self, job: Job) -> None:
        """Take the state from which a prompt starts."""
        if job.behind is not None:
            self._start(job)
            if not self._ready(job):
                return
        if job.held is None or job.loading is None:
            self._begin(job, None, 0)
            return
        try:
            snapshot = job.loading.result()
            self._begin(job, snapshot, job.held.node.length)
        except LigerError as error:
            _log.warning("a state was dropped: %s", error)
            self._states.forget(job.held)
            self._start(job)
        else:
            self._states.keep_in_memory(job.held, snapshot)

    def _begin(self, job: Job, snapshot: Snapshot | None, cached: int) -> None:
        """Continue a prompt after the tokens that a state has seen."""
        job.cached = cached
        if cached < job.last and not job.request.prompt_logprobs:
            job.reader, job.at = self._reader(job, snapshot), cached
            job.stops = [at for at in job.stops if at > cached]  # others may have added some meanwhile
        else:
            self._join(job, snapshot, cached)
        self.counts["cached"] += cached

    def _reader(self, job: Job, snapshot: Snapshot | None) -> Session:
        """Return a session of one row for a job, in a state, or one that has seen nothing."""
        reader = self._readers.pop() if self._readers else self._root.sibling()
        reader.use(job.request.adapter)
        reader.reset() if snapshot is None else reader.restore(snapshot)
        return reader

    def _choose(self, readers: list[Job]) -> Job:
        """Return the oldest job and the one that is nearest to its end by turns, so that both go on."""
        self._turn += 1
        return readers[0] if self._turn % 2 else min(readers, key=lambda job: job.last - job.at)

    def _read(self, job: Job) -> None:
        """Read a piece of a prompt."""
        assert job.reader is not None
        end = min(job.at + self.pace.piece(bool(self.running)), job.stops[-1])
        clock = time.perf_counter()
        job.reader.prefill(job.prompt[job.at : end])
        seconds = time.perf_counter() - clock
        self.pace.read(end - job.at, seconds)
        self.counts["read"] += end - job.at
        self.seconds["reading"] += seconds
        job.at = end
        if end == job.stops[-1]:
            job.stops.pop()
            snapshot = self._keep(job, job.reader.snapshot())
            if end == job.last:
                self._readers.append(job.reader)
                job.reader = None
                self._join(job, snapshot, job.at)

    def _keep(self, job: Job, snapshot: Snapshot) -> Snapshot:
        """Keep a state of a prompt if it is worth its bytes."""
        space, ids = job.space, job.prompt[: job.at]
        if self._states.wants(space, ids):
            self._states.insert(space, ids, snapshot, write=job.at < job.last)
        return snapshot

    def _join(self, job: Job, snapshot: Snapshot | None, at: int) -> None:
        """Give a job whose prompt is read a row, or end it if that was all."""
        if job.request.pin and snapshot is not None:
            self._states.insert(job.space, job.prompt[:at], snapshot, pin=True)
        if job.request.max_tokens == 0 and not job.request.prompt_logprobs:
            job.at = at
            self._reading.remove(job)
            job.finish("length")
            return
        if None not in self._rows:
            self._resize(self._fitting(len(self._rows) + 1))
        row = self._rows.index(None)
        if snapshot is None:
            self._batch.reset(row)
        else:
            self._batch.restore(snapshot, row)
        self._reading.remove(job)
        self._rows[row], job.row, job.at = job, row, at

    def _fitting(self, jobs: int) -> int:
        """Return the smallest size of a batch for a number of jobs."""
        power = 1 << (jobs - 1).bit_length()
        size = power * 3 // 4 if jobs <= power * 3 // 4 else power
        return min(size, self.places)

    @property
    def _batch(self) -> Session:
        size = len(self._rows)
        if size not in self._batches:
            self._batches[size] = self._root.sibling(size)
        return self._batches[size]

    def _resize(self, size: int) -> None:
        """Move all running jobs to a batch of another size."""
        old, jobs = self._batch, self.running
        self._rows, self._spare = [None] * size, 0
        for row, job in enumerate(jobs):
            self._batch.restore(old.snapshot(job.row), row)
            self._rows[row], job.row = job, row
        old.reset()

    def _step(self) -> None:
        """Feed a token to every row."""
        ids = [_IDLE if job is None else job.tokens[job.at] for job in self._rows]
        clock = time.perf_counter()
        try:
            self._batch.use([None if job is None else job.request.adapter for job in self._rows])
            logits = self._batch.step(ids)
        except Exception as error:
            for job in self.running:
                self._report(job, error)
            self._batch.reset()
            self._rows = [None]
            return
        for job in self.running:
            assert job.row is not None
            try:
                reason = job.seen(logits[job.row])
            except Exception as error:  # its settings, its grammar, or logits that are no numbers
                self._report(job, error)
                self._vacate(job.row)
                continue
            if reason:
                self._end(job, reason)
        seconds = time.perf_counter() - clock
        self.pace.stepped(seconds)
        self.counts["steps"] += 1
        self.counts["stepped"] += len(ids) - ids.count(_IDLE)
        self.seconds["stepping"] += seconds
        self._narrow()

    def _narrow(self) -> None:
        """Make the batch smaller after enough steps in which that was possible."""
        size = self._fitting(max(1, len(self.running)))
        self._spare = self._spare + 1 if size < len(self._rows) else 0
        if self._spare >= _SPARE:
            self._resize(size)

    def _end(self, job: Job, reason: Reason) -> None:
        """End a job and keep its state."""
        session: Session | None = job.reader if job.row is None else self._batch
        if session is not None and job.at > job.cached and not job.request.prompt_logprobs:
            space, ids = job.space, np.array(job.tokens[: job.at], np.int64)
            if self._states.wants(space, ids):
                self._states.insert(space, ids, session.snapshot(job.row or 0), write=True)
            else:
                self._states.secure(space, ids)
        if job.row is not None:
            self._vacate(job.row)
        else:
            self._reading.remove(job)
            if job.reader is not None:
                self._readers.append(job.reader)
                job.reader = None
        self.counts["ended"] += 1
        job.finish(reason)

    def _vacate(self, row: int) -> None:
        self._rows[row] = None
        self._batch.reset(row)
