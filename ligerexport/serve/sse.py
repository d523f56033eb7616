"""Server-sent events: the form in which text streams to clients."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.requests import Request

from ligerexport.serve.answers import Answer, merged, watched
from ligerexport.serve.errors import explain
from ligerexport.serve.metrics import Metrics
from ligerexport.serve.shape import Shape

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers that keep proxies from collecting a stream before they pass it on."""


def event(content: dict[str, Any], *, named: bool) -> str:
    """Return an object as one event, whose name is its `type` if it is `named`."""
    name = f"event: {content['type']}\n" if named else ""
    return f"{name}data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def stream(request: Request, shape: Shape, answers: Sequence[Answer], metrics: Metrics) -> StreamingResponse:
    """Return the response that streams answers; they are cancelled when the client leaves."""

    async def events() -> AsyncIterator[str]:
        pieces = merged(answers, metrics, shape.asked.model.name)
        objects: AsyncGenerator[dict[str, Any] | None] = shape.stream(pieces)
        async with watched(request, answers):
            try:
                async for content in objects:
                    yield ": working\n\n" if content is None else event(content, named=not shape.ends)
            except Exception as error:  # the status is sent already
                failure = explain(error).body()
                yield event(failure if shape.ends else {"type": "error", **failure["error"]}, named=not shape.ends)
            finally:
                await objects.aclose()
                await pieces.aclose()
        if shape.ends:
            yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers=HEADERS)
