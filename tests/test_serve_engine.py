"""The engine of the server: rows come and go, states are found again, and every request that was accepted ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import toy

import ligerexport as lx
from ligerexport.errors import LigerError, UsageError
from ligerexport.exporters.onnx.session import OnnxSession
from ligerexport.serve.engine import Engine
from ligerexport.serve.job import Ticket
from ligerexport.serve.request import Draining, Event, Finish, QueueFull, Request, Settings
from ligerexport.serve.scheduler import Scheduler

IDS = np.random.default_rng(8).integers(0, toy.VOCAB, (6, 120)).tolist()
SYSTEM = IDS[0][:50]
PROMPTS = [(SYSTEM + row)[: 60 + 9 * i] for i, row in enumerate(IDS)]


@pytest.fixture
def start(built: tuple[Path, Path]) -> Iterator[Callable[..., Engine]]:
    engines = []

    def make(**settings: Any) -> Engine:
        engines.append(Engine(built[1], **({"max_batch": 4, "threads": 1} | settings)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def ask(prompt: list[int], **settings: Any) -> Request:
    return Request(tuple(prompt), **({"max_tokens": 20} | settings))


def answers(engine: Engine, *requests: Request) -> list[tuple[list[Event], Finish]]:
    """Return the events and the end of each request, which are submitted together."""

    async def collect(ticket: Ticket) -> tuple[list[Event], Finish]:
        *events, finish = [item async for item in ticket]
        return events, finish

    async def run() -> list[tuple[list[Event], Finish]]:
        return await asyncio.gather(*(collect(ticket) for ticket in map(engine.submit, requests)))

    return asyncio.run(run())


def tokens(engine: Engine, *requests: Request) -> list[list[int]]:
    return [[event.token for event in events] for events, _ in answers(engine, *requests)]


def alone(artifact: Path, prompt: list[int], **settings: Any) -> list[int]:
    session = lx.load(artifact)
    return [chunk.token for chunk in lx.generate(session, prompt, **({"max_new_tokens": 20} | settings))]


class Watch:
    """A constraint that allows everything and calls a function with the number of tokens before each choice."""

    def __init__(self, call: Callable[[int], Any]) -> None:
        self.call, self.count = call, 0

    def mask(self) -> np.ndarray:
        self.call(self.count)
        return np.ones(toy.VOCAB, bool)

    def accept(self, token: int) -> bool:
        self.count += 1
        return True


def test_many_at_once_answer_as_alone(built: tuple[Path, Path], start: Callable[..., Engine]) -> None:
    """More requests than places, of different lengths, with one seed each; all but one share their beginning."""
    engine, drawn = start(), {"temperature": 0.9, "top_p": 0.9, "presence_penalty": 0.5}
    requests = [ask(p, max_tokens=9 + 5 * i, settings=Settings(seed=i, **drawn)) for i, p in enumerate(PROMPTS)]
    for (events, finish), (i, prompt) in zip(answers(engine, *requests), enumerate(PROMPTS), strict=True):
        expected = alone(built[1], prompt, max_new_tokens=9 + 5 * i, seed=i, **drawn)
        assert [event.token for event in events] == expected
        assert finish == Finish("length", len(prompt), 0 if i == 0 else 50, len(expected))
    stats = engine.stats()
    assert (stats["cached"], stats["read"]) == (250, 60 + sum(len(prompt) - 50 for prompt in PROMPTS[1:]))
    assert stats["steps"] < stats["stepped"]


def test_the_same_prompt_at_once_is_read_once(start: Callable[..., Engine]) -> None:
    engine = start()
    first, *others = answers(engine, *[ask(PROMPTS[3])] * 4)
    assert engine.stats()["read"] == len(PROMPTS[3])
    assert all(other[0] == first[0] and other[1].cached_tokens == len(PROMPTS[3]) for other in others)


def test_the_first_token_takes_no_step_and_masks_are_made_beside_steps(
    built: tuple[Path, Path], start: Callable[..., Engine]
) -> None:
    engine, threads = start(), list[str]()
    watch = Watch(lambda _: threads.append(threading.current_thread().name))
    assert tokens(engine, ask(PROMPTS[0], max_tokens=1)) == [alone(built[1], PROMPTS[0], max_new_tokens=1)]
    assert engine.stats()["steps"] == 0
    assert tokens(engine, ask(PROMPTS[0], max_tokens=4, constraint=watch)) == [
        alone(built[1], PROMPTS[0], max_new_tokens=4)
    ]
    assert engine.stats()["steps"] == 3 and engine.stats()["read"] == len(PROMPTS[0])
    assert threads[0] == "ligerexport-engine" and {name[:5] for name in threads[1:]} == {"masks"} and len(threads) == 4


def test_turns_branches_and_a_restart_start_from_the_deepest_state(
    built: tuple[Path, Path], start: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ligerexport.serve.held.SHORT", 20)
    engine = start(state_dir=tmp_path)
    prompt = PROMPTS[2]
    (answer,) = tokens(engine, ask(prompt, marks=(50,)))
    asyncio.run(engine.drain(60))
    with pytest.raises(Draining):
        engine.submit(ask(prompt))
    engine.close()
    turn, edited = prompt + answer + IDS[5][:30], prompt[:60] + IDS[4][:40]
    engine = start(state_dir=tmp_path, memory=0)  # which does not limit the disk
    for request, cached in ((turn, len(prompt) + 19), (edited, 50), (prompt, len(prompt))):
        ((events, finish),) = answers(engine, ask(request))
        assert [event.token for event in events] == alone(built[1], request)
        assert finish.cached_tokens == cached


def test_damaged_files_are_not_used(built: tuple[Path, Path], start: Callable[..., Engine], tmp_path: Path) -> None:
    engine = start(state_dir=tmp_path)
    (expected,) = tokens(engine, ask(PROMPTS[1]))
    asyncio.run(engine.drain(60))
    files = list(tmp_path.rglob("*.state"))
    for file in files:
        content = bytearray(file.read_bytes())
        content[-40:] = bytes(x ^ 1 for x in content[-40:])
        file.write_bytes(content)
    (files[0].parent / "0.state").write_bytes(b"no state")
    (files[0].parent / ".1.state.abc.partial").mkdir()
    again = start(state_dir=tmp_path)
    assert not (files[0].parent / "0.state").exists() and not [*tmp_path.rglob("*.partial")]
    ((events, finish),) = answers(again, ask(PROMPTS[1] + expected))
    assert [event.token for event in events] == alone(built[1], PROMPTS[1] + expected)
    assert finish.cached_tokens == 0


def test_a_full_disk_costs_only_the_cache(
    start: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    engine = start(state_dir=tmp_path, memory=40_000)
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    for prompt in PROMPTS:
        assert len(tokens(engine, ask(prompt))[0]) == 20
    asyncio.run(engine.drain(60))
    assert engine.stats()["states_disk_bytes"] == 0 and not [*tmp_path.rglob("*.state")]


def test_owners_do_not_share_states(start: Callable[..., Engine]) -> None:
    engine = start()
    prompt, cached = PROMPTS[0], []
    for owner in ("one", "two", "one", "", "three"):
        ((_, finish),) = answers(engine, ask(prompt, owner=owner))
        cached.append(finish.cached_tokens)
    assert cached == [0, 0, 60, 0, 0]
    for pin in (False, True):  # also if it was read before
        answers(engine, ask(SYSTEM, pin=pin, max_tokens=0))
    ((_, finish),) = answers(engine, ask(prompt, owner="four"))
    assert finish.cached_tokens == 50
    assert [info.tokens for info in engine.states("") if info.pinned] == [50]
    same = engine.states("two")[0].id  # the same tokens
    engine.delete("one", same)
    with pytest.raises(UsageError, match="no state"):
        engine.delete("one", same)
    assert engine.states("two")[0].id == same


def test_states_are_named_pinned_and_deleted(start: Callable[..., Engine], tmp_path: Path) -> None:
    engine = start(state_dir=tmp_path)
    answers(engine, ask(PROMPTS[0]), ask(IDS[1]))
    last, *others = engine.states()
    engine.name("", last.id, "tea")
    engine.pin("", "tea")
    engine.delete("", others[0].id)
    asyncio.run(engine.drain(60))
    found = start(state_dir=tmp_path).states()
    assert {others[0].id} == {info.id for info in (last, *others)} - {info.id for info in engine.states()}
    assert [(info.id, info.pinned) for info in found if info.name == "tea"] == [(last.id, True)]
    assert others[0].id not in {info.id for info in found}


def test_cancelling_ends_within_a_step(start: Callable[..., Engine]) -> None:
    engine, tickets = start(), []
    tickets.append(
        engine.submit(ask(PROMPTS[0], max_tokens=999, constraint=Watch(lambda n: n == 3 and tickets[0].cancel())))
    )

    async def end() -> list[Event | Finish]:
        return [item async for item in tickets[0]]

    *events, finish = asyncio.run(end())
    assert (len(events), finish.reason, finish.completion_tokens) == (4, "cancelled", 4)
    assert tokens(engine, ask(PROMPTS[1])), "the row is free again"


def test_deadlines(start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("ligerexport.serve.job.time", SimpleNamespace(monotonic=lambda: now[0]))

    def late(count: int) -> None:
        now[0] = 10.0 if count == 5 else 0.0

    running, waiting = (
        ask(PROMPTS[0], max_tokens=99, deadline=9.0, constraint=Watch(late)),
        ask(PROMPTS[1], deadline=-1.0),
    )
    (events, finish), (none, never) = answers(start(), running, waiting)
    assert (len(events), finish.reason, none, never.reason) == (6, "deadline", [], "deadline")


@pytest.mark.parametrize(("memory", "disk"), [(60_000, 300_000), (0, 100_000), (10**9, 10**9)])
def test_a_storm(tmp_path: Path, memory: int, disk: int) -> None:
    """Random requests of three owners come and are cancelled; every answer is that of a session, and all bytes count.

    The arithmetic of the toy is exact, so that no answer may differ.
    """
    random, artifact = np.random.default_rng(memory), toy.build(tmp_path / "toy")
    common = random.integers(0, toy.BYTES, 250).tolist()
    engine = Engine(artifact, max_batch=6, threads=1, memory=memory, disk=disk, state_dir=tmp_path / "states")
    session = lx.load(artifact)

    async def one(place: asyncio.Semaphore) -> None:
        prompt = common[: random.integers(1, 250)] + random.integers(0, toy.BYTES, random.integers(0, 60)).tolist()
        most, stop = int(random.integers(1, 40)), int(random.integers(0, 60))
        scored, pin = random.random() < 0.1, random.random() < 0.02
        owner = ("", "a", "b")[random.integers(3)]
        request = ask(prompt, max_tokens=most, owner=owner, marks=(50, 100), pin=pin, prompt_logprobs=scored)
        async with place:
            ticket, found = engine.submit(request), []
            async for item in ticket:
                if len(found) >= stop:
                    ticket.cancel()
                if isinstance(item, Event) and not item.prompt:
                    found.append(item.token)
        assert isinstance(item, Finish) and item.reason in ("length", "cancelled")
        expected = [chunk.token for chunk in lx.generate(session, prompt, max_new_tokens=most)]  # it may end earlier
        assert found[: len(expected)] == expected[: len(found)]

    async def run() -> None:
        place = asyncio.Semaphore(20)
        await asyncio.gather(*(one(place) for _ in range(50)))
        await engine.drain(60)

    asyncio.run(run())
    states = list(engine._states._held.values())
    stats = engine.stats()
    assert stats["states_memory_bytes"] == sum(x.taken for x in states) <= memory
    assert stats["states_disk_bytes"] == sum(x.nbytes for x in states if x.written) <= disk
    assert len(list(tmp_path.rglob("*.state"))) == sum(x.written for x in states)
    engine.close()


def test_a_full_queue_refuses_and_clients_take_turns(start: Callable[..., Engine]) -> None:
    engine, gate, inside = start(max_batch=1, queue=4), threading.Event(), threading.Event()

    def hold(count: int) -> None:
        inside.set()
        gate.wait()

    order: list[str] = []
    engine.submit(ask(PROMPTS[0], client="a", constraint=Watch(hold)))
    inside.wait()

    async def run() -> None:
        async def one(client: str, ticket: Ticket) -> None:
            items = [item async for item in ticket]
            assert len(items) == 21
            order.append(client)

        clients = ["a", "a", "a", "b"]
        tickets = [engine.submit(ask(PROMPTS[i], client=client)) for i, client in enumerate(clients)]
        with pytest.raises(QueueFull) as full:
            engine.submit(ask(PROMPTS[5]))
        assert full.value.retry_after >= 1
        gate.set()
        await asyncio.gather(*map(one, clients, tickets))

    asyncio.run(run())
    assert order.index("b") < 2


def test_draining_finishes_what_was_accepted(start: Callable[..., Engine]) -> None:
    engine = start(max_batch=1)

    async def run() -> list[Finish]:
        tickets = [engine.submit(ask(prompt)) for prompt in PROMPTS]
        await engine.drain(60)
        return [[item async for item in ticket][-1] for ticket in tickets]

    assert [finish.reason for finish in asyncio.run(run())] == ["length"] * 6


def test_an_error_ends_only_what_it_concerns(
    built: tuple[Path, Path], start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, step = start(), OnnxSession.step

    def bad(count: int) -> None:
        if count == 2:
            raise RuntimeError("no such rule")

    (events, failed), (other, finish) = answers(engine, ask(PROMPTS[0], constraint=Watch(bad)), ask(PROMPTS[1]))
    assert (len(events), failed.reason, failed.error) == (2, "error", "no such rule")
    assert finish.reason == "length" and [event.token for event in other] == alone(built[1], PROMPTS[1])

    def breaks(self: OnnxSession, ids: Any) -> np.ndarray:
        monkeypatch.setattr(OnnxSession, "step", step)
        self._torn = True
        raise LigerError("the engine broke")

    monkeypatch.setattr(OnnxSession, "step", breaks)
    assert {finish.error for _, finish in answers(engine, ask(PROMPTS[0]))} == {"the engine broke"}
    assert tokens(engine, ask(PROMPTS[0])) == [alone(built[1], PROMPTS[0])]


def test_an_engine_that_keeps_failing_says_so(start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(max_batch=1)

    def fails(self: Scheduler) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Scheduler, "turn", fails)
    with engine._changed:  # it takes none before all are there, since it gives up after three
        tickets = [engine.submit(ask(PROMPTS[0])) for _ in range(4)]
    engine._thread.join()
    ends = [ticket._items[-1] for ticket in tickets]
    assert [(end.reason, end.error) for end in ends if isinstance(end, Finish)] == [("error", "a bug")] * 4
    with pytest.raises(LigerError, match="a bug"):
        engine.submit(ask(PROMPTS[0]))


def test_closing_ends_requests_whose_states_cannot_be_kept(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Scheduler) -> None:
        raise RuntimeError("a bug")

    engine = start()
    monkeypatch.setattr(Scheduler, "stop", fails)
    ticket = engine.submit(ask(PROMPTS[0], max_tokens=1 << 30))
    engine.close()
    (end,) = [item for item in ticket._items if isinstance(item, Finish)]
    assert end.reason == "cancelled" and engine._idle.is_set()


def test_log_probabilities_of_prompts_and_answers(built: tuple[Path, Path], start: Callable[..., Engine]) -> None:
    prompt, session = PROMPTS[0], lx.load(built[1])
    request = ask(prompt, max_tokens=4, logprobs=3, prompt_logprobs=True)
    ((events, finish),) = answers(start(), request)
    text = [event.token for event in events]
    assert text[: len(prompt)] == prompt and finish.completion_tokens == 4
    assert events[0] == Event(prompt[0], prompt=True)
    assert [event.prompt for event in events] == [True] * len(prompt) + [False] * 4
    for token, event in zip(text, events[1:], strict=False):
        logits = session.step(token)[0].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        assert event.logprob == pytest.approx(expected[event.token], abs=1e-4)
        assert [i for i, _ in event.top] == (-expected).argsort()[:3].tolist()


def test_bias_and_stop_tokens(start: Callable[..., Engine]) -> None:
    engine = start()
    ((events, finish),) = answers(engine, ask(PROMPTS[0], logit_bias={7: 1e4}, max_tokens=3))
    assert [event.token for event in events] == [7, 7, 7]
    ((events, finish),) = answers(engine, ask(PROMPTS[0], logit_bias={7: 1e4}, stop_tokens=frozenset({7})))
    assert (events, finish.reason, finish.completion_tokens) == ([], "stop", 0)


def test_what_makes_no_sense_is_refused(start: Callable[..., Engine]) -> None:
    engine, cold = start(), Settings(temperature=-1.0)
    wrong: tuple[dict[str, Any], ...] = (
        {"prompt": []}, {"prompt": [toy.VOCAB]}, {"max_tokens": -1}, {"logit_bias": {-1: 1.0}}, {"settings": cold},
        {"logprobs": -1},
    )  # fmt: skip
    for settings in wrong:
        with pytest.raises(UsageError):
            engine.submit(ask(**({"prompt": [1]} | settings)))
