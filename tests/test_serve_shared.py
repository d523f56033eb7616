"""States that servers share, and requests that one process takes and another one answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import LigerError
from ligerexport.serve.app import make_app
from ligerexport.serve.forward import BLOCK, Call, Head, answer, beginnings, read_body
from ligerexport.serve.models import open_models
from ligerexport.serve.request import Space
from ligerexport.serve.shared import SharedStore
from ligerexport.serve.states import States

fsspec = pytest.importorskip("fsspec")

ALL = 1 << 20
TEXT = np.arange(200, dtype=np.int64) % 7


def state(length: int) -> Snapshot:
    return Snapshot("model", np.array([length]), {"past.0.x": np.full((1, 100), length, np.int64)})


def store(states: States) -> SharedStore:
    assert isinstance(states._store, SharedStore)
    return states._store


def keep(states: States, *lengths: int, pin: bool = False) -> None:
    for length in lengths:
        states.insert(Space(), TEXT[:length], state(length), write=True, pin=pin)
    states.flush()


def found(states: States, limit: int = len(TEXT)) -> int:
    """Return the length of the deepest state of the text."""
    held, _ = states.find(Space(), TEXT[: limit + 1])
    return held.node.length if held else 0


@pytest.fixture(params=["directory", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Where states are shared: a directory, and a filesystem that has no files of this machine."""
    yield str(tmp_path / "states") if request.param == "directory" else "memory://states"
    fsspec.filesystem("memory").store.clear()


def test_a_server_goes_on_from_a_state_of_another(place: str) -> None:
    one, other = (States("model", ALL, None, ALL, place) for _ in range(2))
    keep(one, 40, 120)
    assert found(one) == 120 and found(other) == 0
    store(other).refresh()
    assert found(other, limit=119) == 40 and found(other) == 120
    assert other.find(Space("someone"), TEXT)[0] is None and other.find(Space(), TEXT[::-1])[0] is None
    held, known = other.find(Space(), TEXT)
    assert held is not None and known == 120
    np.testing.assert_array_equal(other.fetch(held).result().tensors["past.0.x"], state(120).tensors["past.0.x"])
    assert found(States("model", ALL, None, ALL, place)) == 120  # a replica that starts again
    assert found(States("another", ALL, None, ALL, place)) == 0


def test_a_state_that_is_gone_is_not_found_again(place: str) -> None:
    one, other = (States("model", 0, None, ALL, place) for _ in range(2))
    keep(one, 40, 120)
    store(other).refresh()
    held, _ = other.find(Space(), TEXT)
    assert held is not None
    one.forget(one.get(Space(), held.id))
    with pytest.raises(LigerError, match="cannot read"):
        other.fetch(held).result()
    other.forget(held)  # as the scheduler does
    assert found(other) == 40


def test_one_error_of_the_network_costs_one_state(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("the network is down")

    one, other = (States("model", ALL, None, ALL, place) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(store(one)._files, "put_file", fails)
        keep(one, 40)
    keep(one, 120)
    store(other).refresh()
    assert found(other) == 120
    one.close()
    other.close()


def test_the_oldest_states_make_room_and_pinned_ones_stay(place: str) -> None:
    states = States("model", ALL, None, 4000, place)
    keep(states, 20, pin=True)
    for length in (60, 100, 140, 180):
        keep(states, length)
        store(states).refresh()
    again = States("model", ALL, None, 4000, place)
    assert found(again) == 180 and found(again, limit=59) == 20 and found(again, limit=139) == 20


def test_chats_share_their_turns_and_not_their_system_message() -> None:
    def digests(*said: str, key: bytes = b"", model: str = "m") -> tuple[bytes, ...]:
        roles = {"s": "system", "u": "user", "a": "assistant"}
        messages = [{"role": roles[text[0]], "content": text} for text in said]
        return beginnings(json.dumps({"model": model, "messages": messages}).encode(), key)

    chat = digests("s", "u1", "a1", "u2")
    assert len(chat) == 3 and digests("s", "u1") == chat[:1] and digests("s") == ()
    assert not set(chat) & {*digests("s", "u2"), *digests("u1"), *digests("s", "u1", key=b"k"),
                            *digests("s", "u1", model="n")}  # fmt: skip
    for prompt in ("x" * 3 * BLOCK, list(range(3 * BLOCK)), ["x" * 3 * BLOCK, "y"]):
        whole, begin = (beginnings(json.dumps({"prompt": text}).encode()) for text in (prompt, prompt[: 2 * BLOCK]))
        assert len(whole) == 3 and (whole[:2] == begin or len(prompt) == 2)
    for bad in (b"", b"{", b"[1]", b'{"messages": 5}', b'{"prompt": [{}, 1]}', b"[" * 9999, b'{"prompt": [[[]]]}'):
        assert len(beginnings(bad)) <= 1


def test_a_body_that_is_too_long_is_not_read_to_its_end() -> None:
    left = [b"ab", b"cd", b"ef"]

    async def pieces() -> AsyncIterator[bytes]:
        while left:
            yield left.pop(0)

    assert asyncio.run(read_body(pieces(), 3)) is None and left == [b"ef"]
    assert asyncio.run(read_body(pieces(), 2)) == b"ef"


def test_another_process_answers_like_the_server(tmp_path: Path) -> None:
    models = open_models("toy", toy.build(tmp_path / "toy"), {}, longest=256, deadline=None, max_batch=2, threads=1)
    app, engine = make_app(models), models[0].engine
    body = {"model": "toy", "prompt": "Once", "temperature": 0, "logit_bias": {str(toy.EOS): -100}}

    def call(path: str, **changes: Any) -> Call:
        raw = json.dumps(body | changes).encode() if path != "/health" else b""
        return Call("POST" if raw else "GET", path, b"", ((b"content-type", b"application/json"),), raw, None, ())

    async def ask(request: Call) -> tuple[int, bytes]:
        head, *content = [piece async for piece in answer(app, request)]
        assert isinstance(head, Head)
        return head.status, b"".join(piece for piece in content if isinstance(piece, bytes))

    async def leave() -> None:
        """Read the first token of an answer that would take very long, and go."""
        pieces = answer(app, call("/v1/completions", max_tokens=10**9, stream=True))
        assert isinstance(await anext(pieces), Head) and b"data: " in bytes(await anext(pieces))  # type: ignore[arg-type]
        await pieces.aclose()

    async def run() -> None:
        assert await ask(call("/health")) == (200, b'{"status":"ok"}')
        assert (await ask(call("/v1/completions", model="x")))[0] == 404
        status, whole = await ask(call("/v1/completions", max_tokens=8))
        _, streamed = await ask(call("/v1/completions", max_tokens=8, stream=True))
        events = [json.loads(line[6:]) for line in streamed.split(b"\n") if line.startswith(b"data: {")]
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        assert status == 200 and json.loads(whole)["choices"][0]["text"] == text != ""
        await leave()
        await engine.drain(10**6)  # ends with the answer above

    asyncio.run(run())
    engine.close()
