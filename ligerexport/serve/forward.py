"""A request of HTTP as a value, which one process takes and another one answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

Pairs = tuple[tuple[bytes, bytes], ...]

BLOCK = 1024
"""Number of characters, or of token ids, in a part of a prompt that is no conversation."""


@dataclass(frozen=True)
class Call:
    """A request.

    Attributes:
        method, path: As in the request.
        query: What follows the `?`.
        headers: Headers in lower case.
        body: Content.
        client: Address of the client; None if it is unknown.
        beginnings: Result of `beginnings`.
    """

    method: str
    path: str
    query: bytes
    headers: Pairs
    body: bytes
    client: tuple[str, int] | None
    beginnings: tuple[bytes, ...]


@dataclass(frozen=True)
class Head:
    """What comes before the content of a response."""

    status: int
    headers: Pairs


async def read_body(pieces: AsyncIterator[bytes], most: int) -> bytes | None:
    """Return the content of a request; None if it has more than `most` bytes, of which the rest is not read."""
    body = bytearray()
    async for piece in pieces:
        body += piece
        if len(body) > most:
            return None
    return bytes(body)


def beginnings(body: bytes, key: bytes = b"") -> tuple[bytes, ...]:
    """Return a digest of each beginning of a prompt at which an earlier request may have ended, the shortest first.

    In a conversation these are the ends of its messages. System messages are the beginning of many conversations, so
    they have no digest of their own.

    Args:
        body: Content of a request to any endpoint.
        key: What keeps clients apart.
    """
    try:
        content = json.loads(body)
        prompt = next((content[name] for name in ("messages", "input", "prompt") if content.get(name)), None)
    except (ValueError, AttributeError, RecursionError):
        return ()
    seen, found = hashlib.blake2b(key, digest_size=16), list[bytes]()
    seen.update(repr(content.get("model")).encode(errors="replace"))
    for part, counts in _parts(prompt):
        seen.update(part.encode(errors="replace"))
        if counts:
            found.append(seen.digest())
    return tuple(found)


def _parts(prompt: Any) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a prompt, and whether an earlier request may have ended there."""
    if isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt):
        talking = False
        for message in prompt:
            talking = talking or message.get("role") not in ("system", "developer")
            yield repr((message.get("role"), message.get("content"))), talking
        return
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str | list):
        for at in range(0, len(prompt), BLOCK):
            yield str(prompt[at : at + BLOCK]), True


async def answer(app: Callable[..., Any], call: Call) -> AsyncGenerator[Head | bytes]:
    """Let an ASGI application answer a request; yield the head, and then the content in pieces.

    If the generator is closed before its end, the application learns that the client has left.
    """
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "",
             "method": call.method, "path": call.path, "raw_path": call.path.encode(), "query_string": call.query,
             "headers": [list(pair) for pair in call.headers], "client": call.client, "server": None}  # fmt: skip
    out: asyncio.Queue[Head | bytes | None] = asyncio.Queue()
    gone, body = asyncio.Event(), [call.body]

    async def receive() -> dict[str, Any]:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            out.put_nowait(Head(message["status"], tuple((bytes(k), bytes(v)) for k, v in message["headers"])))
        elif message.get("body"):
            out.put_nowait(message["body"])

    task = asyncio.create_task(app(scope, receive, send))
    task.add_done_callback(lambda _: out.put_nowait(None))
    try:
        while (piece := await out.get()) is not None:
            yield piece
        with suppress(asyncio.CancelledError):
            await task
    finally:
        gone.set()
        task.cancel()
