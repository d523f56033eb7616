"""How long streams wait while prompts are read, on a machine whose times are made up."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.serve.job import Job
from ligerexport.serve.pace import Pace
from ligerexport.serve.request import Event, Request
from ligerexport.serve.scheduler import Scheduler
from ligerexport.serve.states import States

VOCABULARY = 50


class Machine:
    """A session that only lets time pass.

    Args:
        clock: The time in seconds, in a list of one number.
        batch: Number of sequences.
    """

    chunk = 64

    def __init__(self, clock: list[float], batch: int = 1) -> None:
        self.batch, self._clock = batch, clock
        self._takes(0.004 * batch)

    def _takes(self, seconds: float) -> None:
        self._clock[0] += seconds

    def sibling(self, batch: int = 1) -> Machine:
        return Machine(self._clock, batch)

    def use(self, adapters: object) -> None:
        pass

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        calls = -(-len(ids) // self.chunk)
        self._takes(0.01 * calls + 0.0011 * len(ids))
        return np.zeros((1, VOCABULARY), np.float32)

    def step(self, ids: list[int]) -> np.ndarray:
        self._takes(0.005 + 0.003 * self.batch)
        return np.zeros((self.batch, VOCABULARY), np.float32)

    def snapshot(self, row: int | None = None) -> Snapshot:
        self._takes(0.005)
        return Snapshot("model", np.array([1]), {})

    def restore(self, snapshot: Snapshot, row: int | None = None) -> None:
        self._takes(0.002)

    def reset(self, row: int | None = None) -> None:
        self._takes(0.001)


def test_pieces_leave_time_for_the_step() -> None:
    """Calls of a machine that gets three times slower, beside steps of 4 rows."""
    call = {8: 0.02, 16: 0.03, 64: 0.08}
    pace = Pace(0.1, call)
    assert pace.piece(pace.stall) == 64 and pace.piece(10.0) == 16 * 64 and pace.piece(0.03) == 16
    pace.stepped(4, 0.04)
    assert pace.step(1) == 0.0 and pace.step(6) == pytest.approx(0.06)
    assert pace.piece(pace.stall - pace.step(4)) == 16 + int(48 * 0.03 / 0.05)
    for _ in range(12):
        tokens = pace.piece(pace.stall - pace.step(4))
        pace.read(tokens, 3 * float(np.interp(tokens, [0, *call], [0, *call.values()])))
    assert tokens == 8 and pace.piece(1.0) == 4 * 64 and pace.piece(-1.0) == 8


@pytest.mark.parametrize("stall", [0.1, 0.3])
def test_no_stream_waits_longer_than_the_bound(stall: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four streams run when a long prompt comes, and then some short ones, for which the batch grows twice."""
    clock = [0.0]
    monkeypatch.setattr("ligerexport.serve.scheduler.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    scheduler = Scheduler(Machine(clock, 16), States("model", 1 << 30, None, 0), lambda: None, stall)
    random = np.random.default_rng(1)
    times: dict[Job, list[float]] = {}

    def come(prompt: int, answer: int) -> Job:
        job = Job(Request(tuple(random.integers(0, VOCABULARY, prompt).tolist()), max_tokens=answer), VOCABULARY, print)
        times[job] = []
        monkeypatch.setattr(job.ticket, "put", lambda item: isinstance(item, Event) and times[job].append(clock[0]))
        scheduler.admit(job)
        return job

    streams = [come(40, 1 << 20) for _ in range(4)]
    while len(times[streams[-1]]) < 20:
        assert scheduler.jobs
        scheduler.turn()
    began, steps = clock[0], scheduler.counts["steps"]
    long = come(round(80_000 * stall), 8)
    short: list[Job] = []
    while not times[long]:
        if scheduler.counts["steps"] % 25 == 20 and len(short) < 4:
            short.append(come(40, 16))
        assert long in scheduler.jobs
        scheduler.turn()
    end, steps = clock[0], scheduler.counts["steps"] - steps
    assert all(len(times[job]) == 16 and times[job][-1] < end for job in short) and len(short) == 4
    gaps = [gap for job in streams for gap in np.diff([at for at in times[job] if at >= began])]
    assert max(gaps) <= stall
    assert end - began > 0.8 * stall * steps, "pieces use the time that there is"
    scheduler.stop()
    scheduler.close()
