"""`/v1/responses`, as far as it is about text. Nothing is stored: a client sends the whole conversation each time."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ligerexport.serve.answers import Asked, Collected, Served, given, usage
from ligerexport.serve.chat import encode
from ligerexport.serve.constraints import grammar_of
from ligerexport.serve.errors import ApiError
from ligerexport.serve.request import Finish
from ligerexport.serve.schemas import Message, ResponseRequest
from ligerexport.serve.shape import Pieces, new_id


class Response:
    """A request to `/v1/responses`."""

    ends = False

    def __init__(self, model: Served, body: ResponseRequest) -> None:
        if body.previous_response_id is not None:
            raise ApiError(400, "'previous_response_id' is not supported: responses are not stored. Send the whole "
                           "conversation, of which only what is new will be read.", param="previous_response_id",
                           code="unsupported_parameter")  # fmt: skip
        items = [Message(role="user", content=body.input)] if isinstance(body.input, str) else list[Message](body.input)
        if body.instructions:
            items.insert(0, Message(role="system", content=body.instructions))
        ids, beginning = encode(model.text, items)
        self.body, settings = body, given(body, model)
        self.asked = Asked(
            model, [ids], settings, body.max_output_tokens or model.longest, model.text.turn_ends,
            options={"pin": bool(body.pin), "marks": (beginning,) if beginning else ()},
            grammar=grammar_of(body, model),
        )  # fmt: skip
        self._item = new_id("msg")
        self._head: dict[str, Any] = {
            "id": new_id("resp"), "object": "response", "created_at": int(time.time()), "error": None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": model.name,
            "parallel_tool_calls": True, "previous_response_id": None, "store": False,
            "reasoning": {"effort": None, "summary": None}, "temperature": settings.get("temperature"),
            "text": {"format": {"type": "text"}} | (body.text or {}), "tool_choice": "auto", "tools": [],
            "top_p": settings.get("top_p"), "truncation": "disabled", "user": body.user,
            "metadata": body.metadata or {},
        }  # fmt: skip

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {"type": "message", "id": self._item, "status": status, "role": "assistant", "content": [_part(text)]}

    def _done(self, text: str, finish: str | None, end: Finish) -> dict[str, Any]:
        prompt, cached, written = usage(self.asked, [end])
        status = "completed" if finish == "stop" else "incomplete"
        why = None if status == "completed" else {"reason": "max_output_tokens"}
        counts = {"input_tokens": prompt, "input_tokens_details": {"cached_tokens": cached}, "output_tokens": written,
                  "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + written}  # fmt: skip
        return {**self._head, "status": status, "incomplete_details": why, "output": [self._message(text, status)],
                "usage": counts}  # fmt: skip

    def whole(self, answers: Sequence[Collected]) -> dict[str, Any]:
        answer = answers[0]
        assert answer.end is not None
        return self._done(answer.text, answer.finish, answer.end)

    async def stream(self, pieces: Pieces) -> AsyncGenerator[dict[str, Any] | None]:
        number = 0

        def event(kind: str, **fields: Any) -> dict[str, Any]:
            nonlocal number
            number += 1
            return {"type": f"response.{kind}", "sequence_number": number - 1, **fields}

        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        begun = {**self._head, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        yield event("created", response=begun)
        yield event("in_progress", response=begun)
        started = {"type": "message", "id": self._item, "status": "in_progress", "role": "assistant", "content": []}
        yield event("output_item.added", output_index=0, item=started)
        yield event("content_part.added", **place, part=_part(""))
        text = ""
        async for found in pieces:
            if found is None:
                yield None
                continue
            _, piece = found
            if piece.text:
                text += piece.text
                yield event("output_text.delta", **place, delta=piece.text, logprobs=[])
            if piece.end is not None:
                done = self._done(text, piece.finish, piece.end)
                yield event("output_text.done", **place, text=text, logprobs=[])
                yield event("content_part.done", **place, part=_part(text))
                yield event("output_item.done", output_index=0, item=done["output"][0])
                yield event(done["status"], response=done)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
