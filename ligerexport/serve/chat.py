"""`/v1/chat/completions`: conversations through the model's chat template."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from functools import lru_cache, partial
from itertools import takewhile
from typing import Any

from ligerexport.run.generate import check_text
from ligerexport.serve.answers import Asked, Collected, Served, biases, given, strings, usage
from ligerexport.serve.constraints import constraint_of
from ligerexport.serve.errors import ApiError
from ligerexport.serve.request import Event, Finish
from ligerexport.serve.schemas import ChatRequest, Message
from ligerexport.serve.shape import Pieces, chat_logprobs, counted, new_id
from ligerexport.text.marks import is_marked
from ligerexport.text.tokenizer import TextModel

SHORT = 1 << 14
"""Largest number of characters in a part of a conversation whose ids are kept for the next request."""


def turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them."""
    for number, message in enumerate(messages):
        check_text(message.text, f"messages[{number}].content")
    roles = {"developer": "system", "function": "tool"}
    return [{"role": roles.get(message.role, message.role), "content": message.text} for message in messages]


def encode(text: TextModel, messages: Sequence[Message]) -> tuple[list[int], int]:
    """Return the ids of a conversation, and how many of them belong to its beginning, the system messages.

    They are those of `TextModel.encode_chat`. Turns that an earlier request had are not encoded again.
    """
    said = turns(messages)
    rendered = text.render(said, marked=True)
    end = "" if is_marked(rendered) else max(_separators(text), key=rendered.count, default="")
    *past, last = rendered.split(end) if end else [rendered]
    ids = [token for turn in past for token in _kept(_turn, turn)(text, turn + end)] + text.encode_rendered(last)
    system = tuple(turn["content"] for turn in takewhile(lambda turn: turn["role"] == "system", said))
    other = _kept(_with_system, "".join(system))(text, system)
    return ids, next((at for at, pair in enumerate(zip(ids, other, strict=False)) if pair[0] != pair[1]), 0)


def _kept(function: Any, content: str) -> Any:
    """Return a function that keeps its results, or, for a long content, the same function without that."""
    return function if len(content) <= SHORT else function.__wrapped__


@lru_cache(maxsize=1024)
def _turn(text: TextModel, rendered: str) -> list[int]:
    return text.encode_rendered(rendered)


@lru_cache(maxsize=64)
def _with_system(text: TextModel, system: tuple[str, ...]) -> list[int]:
    """Return the ids of a conversation that has the same system messages and begins in another way after them."""
    said = [{"role": "system", "content": content} for content in system]
    return text.encode_chat([*said, {"role": "user", "content": "\x1f"}])


@lru_cache(maxsize=8)
def _separators(text: TextModel) -> tuple[str, ...]:
    """Return the special tokens that end turns and whose neighbours do not change each other's ids."""

    def apart(end: str, before: str, after: str) -> bool:
        whole = text.encode_rendered(before + end + after)
        return whole == text.encode_rendered(before + end) + text.encode_rendered(after)

    ends = (token for token, index in text.special_ids.items() if index in text.turn_ends)
    pairs = [(before, after) for before in ("", "a", "a ") for after in ("", "b", " b", "\nb", "\n\n b")]
    return tuple(end for end in ends if all(apart(end, *pair) for pair in pairs))


class Chat:
    """A request to `/v1/chat/completions`."""

    ends = True

    def __init__(self, model: Served, body: ChatRequest) -> None:
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "Invalid 'top_logprobs': it needs 'logprobs' to be true.", param="top_logprobs",
                           code="invalid_value")  # fmt: skip
        ids, beginning = encode(model.text, body.messages)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self.body, self._usage = body, bool(body.stream_options and body.stream_options.include_usage)
        constraint_of(body, model.text)  # refuses before the engine is asked
        self.asked = Asked(
            model, [ids], given(body, model), body.max_completion_tokens or body.max_tokens or model.longest,
            model.text.turn_ends, strings(body.stop), body.n or 1,
            {"logprobs": logprobs, "logit_bias": biases(body, model), "pin": bool(body.pin),
             "marks": (beginning,) if beginning else ()},
            partial(constraint_of, body, model.text),
        )  # fmt: skip
        self._head = {"id": new_id("chatcmpl"), "object": "chat.completion", "created": int(time.time()),
                      "model": model.name}  # fmt: skip

    def _logprobs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        return chat_logprobs(self.asked.model.text, events) if self.body.logprobs else None

    def whole(self, answers: Sequence[Collected]) -> dict[str, Any]:
        choices = [
            {"index": answer.index, "message": {"role": "assistant", "content": answer.text, "refusal": None},
             "logprobs": self._logprobs(answer.events), "finish_reason": answer.finish}
            for answer in answers
        ]  # fmt: skip
        ends = [answer.end for answer in answers if answer.end]
        return {**self._head, "choices": choices, "usage": counted(usage(self.asked, ends))}

    async def stream(self, pieces: Pieces) -> AsyncGenerator[dict[str, Any] | None]:
        head = {**self._head, "object": "chat.completion.chunk"} | ({"usage": None} if self._usage else {})
        ends: dict[int, Finish] = {}

        def chunk(index: int, delta: dict[str, Any], logprobs: Any, finish: str | None = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return {**head, "choices": [choice]}

        for index in range(self.asked.count):
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None}, None)
        async for found in pieces:
            if found is None:
                yield None
                continue
            index, piece = found
            if piece.text or (self.body.logprobs and piece.events):
                logprobs = self._logprobs(piece.events)
                yield chunk(index, {"content": piece.text}, logprobs)
            if piece.end is not None:
                ends[index] = piece.end
                yield chunk(index, {}, None, piece.finish)
        if self._usage:
            yield {**head, "choices": [], "usage": counted(usage(self.asked, [ends[key] for key in sorted(ends)]))}
