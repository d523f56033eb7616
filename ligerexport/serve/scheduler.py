"""Continuous batching: every turn reads a piece of one prompt, and feeds one token to every row of the batch.

A prompt is read by a session of its own, so that a piece touches no other row. Its last piece gives the first token of
the answer; only then is its state kept, and moves to a row of the batch. Batches have 1, 2, 3, 4, 6, 8, 12, ... rows: a
row without a job costs time, and so do jobs that move to a batch of another size.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import LigerError
from ligerexport.run.prompt_cache import common_length
from ligerexport.run.runtime import Session
from ligerexport.serve.drafts import Drafts
from ligerexport.serve.job import Job
from ligerexport.serve.pace import Pace
from ligerexport.serve.request import Reason
from ligerexport.serve.states import WORTH, States

STALL = 0.1
"""Default of the longest planned time in seconds between two tokens of a running job while prompts are read."""
_SIZES = 8, 16, 32
"""Numbers of tokens of calls that are timed, beside that of a whole one; the first is the smallest piece."""
_SPARE = 32
"""Number of steps with too many rows before the batch gets smaller."""
_IDLE = -1

_log = logging.getLogger(__name__)


class Scheduler:
    """The jobs that have a place. All calls come from one thread.

    Args:
        session: Session with as many rows as there are places; it and its siblings belong to this object.
        states: Where states come from and go to.
        wake: Called when a state was read from the disk.
        stall: Longest planned time in seconds between two tokens of a running job.
        speculate: See `Drafts`.

    Attributes:
        counts: Totals since the start, by name.
    """

    def __init__(
        self,
        session: Session,
        states: States,
        wake: Callable[[], None],
        stall: float = STALL,
        speculate: str = "off",
    ) -> None:
        self._root, self._states, self._wake = session, states, wake
        self.places = session.batch
        self._batches = {self.places: session}
        self._rows: list[Job | None] = [None]
        self._readers: list[Session] = []
        self._reading: list[Job] = []
        self._turn = self._spare = 0
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._drafts = Drafts(speculate)
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._since = time.perf_counter()
        self.pace = self._measure(stall)

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

    def _measure(self, stall: float) -> Pace:
        """Time calls of some lengths, the second time that a session makes them."""
        reader = self._root.sibling()
        seconds = {}
        for size in (*(size for size in _SIZES if size < reader.chunk), reader.chunk) * 2:
            clock = time.perf_counter()
            reader.prefill(np.zeros(size, np.int64))
            seconds[size] = time.perf_counter() - clock
        self._readers.append(reader)
        return Pace(stall, seconds)

    def admit(self, job: Job) -> None:
        """Give a job a place."""
        self._reading.append(job)
        self._start(job)

    def turn(self) -> None:
        """End what must end, open states and read a piece of a prompt while there is time, and advance all rows."""
        for job in self.jobs:
            if reason := job.overdue():
                self._end(job, reason)
        if not self.running:
            self._since = time.perf_counter()
        for number, (job, work) in enumerate(self._tasks()):
            if number and not self.pace.fits(self._left()):
                break
            self._guard(job, work)
        if self.running:
            self._step()

    def _tasks(self) -> Iterator[tuple[Job, Callable[[Job], None]]]:
        """Yield what can be done before a step, the shortest first."""
        for job in list(self._reading):
            if job.logits is not None:
                yield job, self._join
            elif job.reader is None and self._ready(job):
                yield job, self._open
        if readers := [job for job in self._reading if job.reader is not None and job.logits is None]:
            yield self._choose(readers), self._read

    def _left(self) -> float:
        """Return how many seconds are left before the next step must begin."""
        step = self.pace.step(len(self._rows)) if self.running else 0.0
        return self.pace.stall - step - (time.perf_counter() - self._since)

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

    def close(self) -> None:
        """End the thread that computes masks."""
        self._masks.shutdown()

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
        if job.scored:
            return
        space, whole = job.space, len(job.prompt)
        held, known = self._states.find(space, job.prompt)
        cached = held.node.length if held else 0
        for other in self._reading[: self._reading.index(job)]:
            if other.space == space and not other.scored:
                common = common_length(other.prompt, job.prompt)
                end = common == len(other.prompt)
                if not end:  # the state there will have no logits
                    common = min(common, whole - 1)
                if common >= cached + WORTH and (end or other.at < common):
                    other.stops = sorted({*other.stops, common}, reverse=True)
                    job.behind = other, common
                    return
        marks = {at for at in job.request.marks if at < whole}
        job.stops = [whole]
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
            return common <= other.at < len(other.prompt) or other not in self._reading
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
        job.cached = job.at = cached
        self.counts["cached"] += cached
        if job.scored:
            self._join(job)
        elif snapshot is not None and snapshot.logits is not None and cached == len(job.prompt):
            job.start = snapshot
            self._first(job, snapshot.logits)
        else:
            job.reader = self._reader(job, snapshot)
            job.stops = [at for at in job.stops if at > cached]  # others may have added some meanwhile

    def _reader(self, job: Job, snapshot: Snapshot | None) -> Session:
        """Return a session of one row for a job, in a state, or one that has seen nothing."""
        reader = self._readers.pop() if self._readers else self._root.sibling()
        reader.use(job.request.adapter)
        reader.reset() if snapshot is None else reader.restore(snapshot)
        return reader

    def _choose(self, readers: list[Job]) -> Job:
        """Return the oldest job and the one that is nearest to its end by turns, so that both go on."""
        self._turn += 1
        return readers[0] if self._turn % 2 else min(readers, key=lambda job: len(job.prompt) - job.at)

    def _read(self, job: Job) -> None:
        """Read a piece of a prompt; without running jobs, at least a whole call."""
        assert job.reader is not None
        most = self.pace.piece(self._left())
        end = min(job.at + (most if self.running else max(most, self.pace.chunk)), job.stops[-1])
        clock = time.perf_counter()
        logits = job.reader.prefill(job.prompt[job.at : end])
        seconds = time.perf_counter() - clock
        self.pace.read(end - job.at, seconds)
        self.counts["read"] += end - job.at
        self.seconds["reading"] += seconds
        job.at = end
        if end == len(job.prompt):
            self._first(job, logits[0].copy())
        elif end == job.stops[-1]:
            job.stops.pop()
            self._keep(job, write=True)

    def _first(self, job: Job, logits: np.ndarray) -> None:
        """Choose the first token, which need not wait until the state has moved."""
        job.logits = logits
        if reason := job.choose(logits):
            self._end(job, reason)

    def _snapshot(self, job: Job) -> Snapshot:
        """Return the state of a job, with the logits after a prompt that was just read."""
        session = job.reader if job.row is None else self._batch
        if session is None:
            assert job.start is not None
            return job.start
        return replace(session.snapshot(job.row or 0), logits=job.logits)

    def _keep(self, job: Job, *, write: bool) -> Snapshot | None:
        """Keep the state of a job if it is worth its bytes, and return it then."""
        space, ids = job.space, job.seen_ids
        pin = job.request.pin and job.at == len(job.prompt)
        if not (pin or self._states.wants(space, ids)):
            if write:
                self._states.secure(space, ids)
            return None
        snapshot = self._snapshot(job)
        self._states.insert(space, ids, snapshot, pin=pin, write=write)
        return snapshot

    def _join(self, job: Job) -> None:
        """Give a job a row, and keep the state of its prompt."""
        start = None if job.scored else self._keep(job, write=False) or self._snapshot(job)
        if None not in self._rows:
            self._resize(self._fitting(len(self._rows) + 1))
        row = self._rows.index(None)
        if start is None:
            self._batch.reset(row)
        else:
            self._batch.restore(start, row)
        self._leave(job)
        self._rows[row], job.row, job.start, job.logits = job, row, None, None

    def _leave(self, job: Job) -> None:
        """Take a job from those that are being read, and its reader from it."""
        self._reading.remove(job)
        if job.reader is not None:
            self._readers.append(job.reader)
            job.reader = None

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
        """Feed a token to every row, or also guesses of the next ones."""
        size = len(self._rows)
        draft = self._drafts.tokens(self._batch, self._rows)
        for job in self.running:
            job.prepare(self._masks)
        clock = time.perf_counter()
        try:
            self._batch.use([None if job is None else job.request.adapter for job in self._rows])
            if draft is None:
                ids = [_IDLE if job is None else job.tokens[job.at] for job in self._rows]
                logits = self._batch.step(ids)[:, None]
            else:
                logits = self._batch.propose(draft)
        except Exception as error:
            for job in self.running:
                self._report(job, error)
            self._batch.reset()
            self._rows = [None]
            return
        ended: list[tuple[Job, Reason]] = []
        failed: list[tuple[Job, Exception]] = []
        kept = [0] * size
        for job in self.running:
            row = job.row
            assert row is not None
            try:
                kept[row], reason = job.follow(logits[row], None if draft is None else draft[row])
                if reason:
                    ended.append((job, reason))
            except Exception as error:  # its settings, its grammar, or logits that are no numbers
                failed.append((job, error))
        if draft is not None:
            self._batch.commit(kept)
        self._since = time.perf_counter()
        seconds, tokens, rows = self._since - clock, logits.shape[1], len(self.running)
        self.pace.stepped(size, seconds)
        self._drafts.took(size, tokens, seconds, sum(kept) / rows)
        self.counts["steps"] += 1
        self.counts["stepped"] += sum(kept)
        self.seconds["stepping"] += seconds
        for job, reported in failed:
            assert job.row is not None
            self._report(job, reported)
            self._vacate(job.row)
        for job, reason in ended:
            self._end(job, reason)
        self._narrow()

    def _narrow(self) -> None:
        """Make the batch smaller after enough steps in which that was possible."""
        size = self._fitting(max(1, len(self.running)))
        self._spare = self._spare + 1 if size < len(self._rows) else 0
        if self._spare >= _SPARE:
            self._resize(size)

    def _end(self, job: Job, reason: Reason) -> None:
        """End a job and keep its state."""
        begun = job.row is not None or job.reader is not None or job.start is not None
        if begun and job.at and not job.scored:
            self._keep(job, write=True)
        if job.row is not None:
            self._vacate(job.row)
        else:
            self._leave(job)
        self.counts["ended"] += 1
        job.finish(reason)

    def _vacate(self, row: int) -> None:
        self._rows[row] = None
        self._batch.reset(row)
