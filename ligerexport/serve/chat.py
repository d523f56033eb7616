"""`/v1/chat/completions`: conversations through the model's chat template."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any

from ligerexport.run.generate import check_text
from ligerexport.serve.answers import Asked, Collected, Served, biases, given, strings, usage
from ligerexport.serve.constraints import grammar_of, tools_of
from ligerexport.serve.errors import ApiError
from ligerexport.serve.request import Event, Finish
from ligerexport.serve.schemas import ChatRequest, Message, ToolCall
from ligerexport.serve.shape import Pieces, chat_logprobs, counted, new_id
from ligerexport.text.calls import Arguments, Call, CallReader, Part
from ligerexport.text.marks import is_marked
from ligerexport.text.tokenizer import TextModel

SHORT = 1 << 14
"""Largest number of characters in a part of a conversation whose ids are kept for the next request."""


def turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them."""
    roles = {"developer": "system", "function": "tool"}
    said = list[dict[str, Any]]()
    for number, message in enumerate(messages):
        turn: dict[str, Any] = {"role": roles.get(message.role, message.role), "content": message.text}
        if message.tool_calls:
            turn["tool_calls"] = [
                {"type": "function", "function": _called(call, number)} for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        said.append(turn)
    return said


def _called(call: ToolCall, number: int) -> dict[str, Any]:
    """Return an earlier call with its arguments as an object."""
    param = f"messages[{number}].tool_calls"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(400, f"Invalid '{param}': the arguments are no JSON object.", param=param, code="invalid_value")
    check_text(json.dumps(arguments, ensure_ascii=False), param)  # what the JSON escapes is text only now
    return {"name": call.function.name, "arguments": arguments}


def encode(
    text: TextModel, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
) -> tuple[list[int], int]:
    """Return the ids of a conversation, and how many of them belong to its beginning: tools and system messages.

    They are those of `TextModel.encode_chat`. Turns that an earlier request had are not encoded again.
    """
    said = turns(messages)
    rendered = text.render(said, marked=True, tools=tools)
    end = "" if is_marked(rendered) else max(_separators(text), key=rendered.count, default="")
    *past, last = rendered.split(end) if end else [rendered]
    ids = [token for turn in past for token in _kept(_turn, turn)(text, turn + end)] + text.encode_rendered(last)
    system = tuple(turn["content"] for turn in takewhile(lambda turn: turn["role"] == "system", said))
    given = json.dumps(tools)
    other = _kept(_with_system, "".join([*system, given]))(text, system, given)
    return ids, next((at for at, pair in enumerate(zip(ids, other, strict=False)) if pair[0] != pair[1]), 0)


def _kept(function: Any, content: str) -> Any:
    """Return a function that keeps its results, or, for a long content, the same function without that."""
    return function if len(content) <= SHORT else function.__wrapped__


@lru_cache(maxsize=1024)
def _turn(text: TextModel, rendered: str) -> list[int]:
    return text.encode_rendered(rendered)


@lru_cache(maxsize=64)
def _with_system(text: TextModel, system: tuple[str, ...], tools: str) -> list[int]:
    """Return the ids of a conversation with the same tools and system messages that goes on in another way."""
    said = [{"role": "system", "content": content} for content in system]
    return text.encode_chat([*said, {"role": "user", "content": "\x1f"}], tools=json.loads(tools))


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
        self._tools = tools_of(body, model.text)
        ids, beginning = encode(model.text, body.messages, self._tools.shown() if self._tools else None)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self.body, self._usage = body, bool(body.stream_options and body.stream_options.include_usage)
        self.asked = Asked(
            model, [ids], given(body, model), body.max_completion_tokens or body.max_tokens or model.longest,
            model.text.turn_ends, strings(body.stop), body.n or 1,
            {"logprobs": logprobs, "logit_bias": biases(body, model), "pin": bool(body.pin),
             "marks": (beginning,) if beginning else ()},
            grammar_of(body, model, self._tools),
        )  # fmt: skip
        self._head = {"id": new_id("chatcmpl"), "object": "chat.completion", "created": int(time.time()),
                      "model": model.name}  # fmt: skip

    def _logprobs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        return chat_logprobs(self.asked.model.text, events) if self.body.logprobs else None

    def _reader(self) -> CallReader | None:
        return self._tools.reader() if self._tools else None

    def _choice(self, answer: Collected) -> dict[str, Any]:
        reader = self._reader()
        parts = [*reader.push(answer.text), *reader.flush()] if reader else [answer.text]
        text = "".join(part for part in parts if isinstance(part, str))
        calls = list[dict[str, Any]]()
        for part in parts:
            if isinstance(part, Call):
                calls.append(_call(part))
            elif isinstance(part, Arguments):
                calls[-1]["function"]["arguments"] += part.text
        message = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
        return {"index": answer.index, "message": message | ({"tool_calls": calls} if calls else {}),
                "logprobs": self._logprobs(answer.events), "finish_reason": _reason(answer.finish, calls)}  # fmt: skip

    def whole(self, answers: Sequence[Collected]) -> dict[str, Any]:
        choices = [self._choice(answer) for answer in answers]
        ends = [answer.end for answer in answers if answer.end]
        return {**self._head, "choices": choices, "usage": counted(usage(self.asked, ends))}

    async def stream(self, pieces: Pieces) -> AsyncGenerator[dict[str, Any] | None]:
        head = {**self._head, "object": "chat.completion.chunk"} | ({"usage": None} if self._usage else {})
        ends: dict[int, Finish] = {}
        readers = [self._reader() for _ in range(self.asked.count)]
        calls = [0] * self.asked.count

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return {**head, "choices": [choice]}

        for index in range(self.asked.count):
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
        async for found in pieces:
            if found is None:
                yield None
                continue
            index, piece = found
            parts: list[Part] = [piece.text]
            if (reader := readers[index]) is not None:
                parts = [*reader.push(piece.text), *(reader.flush() if piece.end else ())]
            text = "".join(part for part in parts if isinstance(part, str))
            if text or (self.body.logprobs and piece.events):
                yield chunk(index, {"content": text}, self._logprobs(piece.events))
            for part in parts:
                if isinstance(part, Call):
                    calls[index] += 1
                    yield chunk(index, {"tool_calls": [{"index": calls[index] - 1, **_call(part)}]})
                elif isinstance(part, Arguments):
                    written = {"index": calls[index] - 1, "function": {"arguments": part.text}}
                    yield chunk(index, {"tool_calls": [written]})
            if piece.end is not None:
                ends[index] = piece.end
                yield chunk(index, {}, None, _reason(piece.finish, calls[index]))
        if self._usage:
            yield {**head, "choices": [], "usage": counted(usage(self.asked, [ends[key] for key in sorted(ends)]))}


def _call(call: Call) -> dict[str, Any]:
    return {"id": new_id("call"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _reason(finish: str | None, calls: object) -> str | None:
    return "tool_calls" if calls and finish == "stop" else finish
