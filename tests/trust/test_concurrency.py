"""Sessions side by side, in threads and processes, and processes that end while a session works."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import ligerexport as lx
from ligerexport.errors import LigerError, UsageError
from tests.checkpoints import FORESIGHT, make_checkpoint

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
SEEDS, TOKENS = range(64), 12
IDS = np.arange(40)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    return lx.build(make_checkpoint(place / "liger", FORESIGHT), lowering="native", verify=False)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import concurrency

    return concurrency


@pytest.mark.parametrize("threads", [1, 16])
def test_sessions_in_threads_write_what_they_write_alone(artifact: Path, harness: ModuleType, threads: int) -> None:
    model = lx.load(artifact, threads=2)
    expected = harness.alone(model, SEEDS, TOKENS)
    assert len(set(expected)) == len(SEEDS)
    assert harness.together(model, SEEDS, TOKENS, threads)[0] == expected


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_sessions_in_processes_write_what_they_write_alone(
    artifact: Path, harness: ModuleType, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)  # for the spawned process
    expected = harness.alone(lx.load(artifact, threads=1), SEEDS[:8], TOKENS)
    assert harness.processes(str(artifact), method, 2, SEEDS[:8], TOKENS)[0] == expected


def test_a_session_from_before_a_fork_says_so(artifact: Path, harness: ModuleType) -> None:
    model = lx.load(artifact, threads=2)
    for session in (model, model.sibling()):
        assert "before its process forked" in harness.inherited(session)
    model.step(1)  # it continues in the parent


def test_an_interrupted_session_goes_on_rightly_or_refuses(artifact: Path, harness: ModuleType) -> None:
    counts = harness.interrupt(lx.load(artifact, threads=1), 100, 8)
    assert counts["refused"] > 0


class Engine:
    """The engine of a session, with an event in the middle of a call."""

    def __init__(self, session: Any, happens: Any) -> None:
        self._engine, self._happens = session._session, happens
        session._session = self

    def run_with_iobinding(self, binding: Any) -> None:
        self._engine.run_with_iobinding(binding)
        self._happens()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_fails_in_one_session_stays_there(artifact: Path, error: type[BaseException]) -> None:
    model = lx.load(artifact)
    broken, other = model.sibling(), model.sibling()
    model.prefill(IDS[:20])
    other.restore(model.snapshot())
    expected = model.prefill(IDS[20:]).copy()

    def fail() -> None:
        raise error("now")

    Engine(broken, fail)
    with pytest.raises((error, LigerError)):
        broken.prefill(IDS[20:])
    for use in (lambda: broken.step(1), broken.snapshot, lambda: broken.restore(other.snapshot(), 0)):
        with pytest.raises(LigerError, match="did not complete"):
            use()
    with pytest.raises(UsageError):
        other.step(10**6)
    np.testing.assert_array_equal(other.prefill(IDS[20:]), expected)
    broken._session = model._session
    broken.reset()
    broken.prefill(IDS[:20])
    np.testing.assert_array_equal(broken.prefill(IDS[20:]), expected)
    broken._torn = True
    broken.restore(model.snapshot())
    broken.step(1)


def test_two_threads_on_one_session_are_refused(artifact: Path) -> None:
    session = lx.load(artifact)
    expected = session.sibling().prefill(IDS).copy()
    inside, leave = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        leave.wait()

    Engine(session, wait)
    first = threading.Thread(target=session.prefill, args=(IDS,))
    first.start()
    inside.wait()
    for use in (lambda: session.step(1), session.reset, session.snapshot):
        with pytest.raises(UsageError, match="two threads"):
            use()
    leave.set()
    first.join()
    assert session.position.tolist() == [len(IDS)]
    np.testing.assert_array_equal(session._logits, expected)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_sessions_are_freed_in_any_order(artifact: Path, order: tuple[int, ...]) -> None:
    model = lx.load(artifact)
    sessions = [model, model.sibling(), model.sibling(2)]
    engine = weakref.ref(model._session)
    del model
    for gone in order:
        sessions[gone] = None
        gc.collect()
        for i in {0, 1, 2} - {*order[: order.index(gone) + 1]}:
            sessions[i].step(1)
    assert engine() is None


LEAVES = {
    "while a thread steps": "threading.Thread(target=work, daemon=True).start(); stepping.wait()",
    "with an error while a thread steps": "threading.Thread(target=work, daemon=True).start(); stepping.wait(); 1 / 0",
    "by Ctrl-C": "print('ready', flush=True); work()",
}


@pytest.mark.parametrize("how", LEAVES)
def test_a_process_ends(artifact: Path, how: str) -> None:
    code = f"""
import sys, threading
import ligerexport as lx
session = lx.load(sys.argv[1], threads=2)
stepping = threading.Event()
def work():
    while True:
        session.step(1)
        stepping.set()
{LEAVES[how]}
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(artifact)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if how == "by Ctrl-C":
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    last = (errors.strip() or "nothing").splitlines()[-1]
    assert (process.returncode, last.partition(":")[0]) == {
        "while a thread steps": (0, "nothing"),
        "with an error while a thread steps": (1, "ZeroDivisionError"),
        "by Ctrl-C": (-signal.SIGINT, "KeyboardInterrupt"),
    }[how]
