"""`/v1/completions`: texts, or token ids, that the model continues."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ligerexport.run.generate import check_text
from ligerexport.serve.answers import Asked, Collected, Piece, Served, biases, given, strings, usage
from ligerexport.serve.errors import ApiError
from ligerexport.serve.request import Event, Finish
from ligerexport.serve.schemas import MOST_ANSWERS, CompletionRequest
from ligerexport.serve.shape import Pieces, counted, new_id, token_text

DEFAULT_TOKENS = 16
"""OpenAI's `max_tokens` for requests that leave it out."""


def _prompts(model: Served, body: CompletionRequest) -> tuple[list[list[int]], list[str]]:
    """Return the ids and the text of each prompt."""
    given: Any = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    count = body.n or 1
    if len(given) * count > MOST_ANSWERS:
        raise ApiError(400, f"Invalid 'n': {len(given)} prompts with {count} answers each are more than {MOST_ANSWERS} "
                       "answers.", param="n", code="invalid_value")  # fmt: skip
    most = max(model.text.vocabulary.values())
    ids, texts = [], []
    for prompt in given:
        if isinstance(prompt, str):
            check_text(prompt)
            ids.append(model.text.encode(prompt))
            texts.append(prompt)
        else:
            if prompt and max(prompt) > most:
                raise ApiError(400, f"Invalid 'prompt': {max(prompt)} is no token id. Expected ids from 0 to {most}.",
                               param="prompt", code="invalid_value")  # fmt: skip
            ids.append(prompt)
            texts.append(model.text.decode(prompt) if body.echo else "")
    return ids, texts


class Completion:
    """A request to `/v1/completions`."""

    ends = True

    def __init__(self, model: Served, body: CompletionRequest) -> None:
        for name, wanted in (("suffix", bool(body.suffix)), ("best_of", body.best_of not in (None, body.n or 1))):
            if wanted:
                raise ApiError(400, f"'{name}' is not supported by this server.", param=name,
                               code="unsupported_parameter")  # fmt: skip
        self.body, self._usage = body, bool(body.stream_options and body.stream_options.include_usage)
        ids, self._texts = _prompts(model, body)
        self.asked = Asked(
            model, ids, given(body, model), DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens,
            model.text.eos_ids, strings(body.stop), body.n or 1,
            {"logprobs": body.logprobs, "logit_bias": biases(body, model), "pin": bool(body.pin),
             "prompt_logprobs": bool(body.echo) and body.logprobs is not None},
        )  # fmt: skip
        self._head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()),
                      "model": model.name}  # fmt: skip

    def _logprobs(self, events: Sequence[Event], offset: int) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        text = self.asked.model.text
        tokens = [token_text(text, event.token) for event in events]
        starts = [offset]
        for token in tokens:
            starts.append(starts[-1] + len(token))
        tops = [None if event.logprob is None else {token_text(text, token): value for token, value in event.top}
                for event in events]  # fmt: skip
        return {"tokens": tokens, "token_logprobs": [event.logprob for event in events], "top_logprobs": tops,
                "text_offset": starts[:-1]}  # fmt: skip

    def _echo(self, index: int) -> str:
        return self._texts[index // self.asked.count] if self.body.echo else ""

    def whole(self, answers: Sequence[Collected]) -> dict[str, Any]:
        choices = [
            {"index": answer.index, "text": self._echo(answer.index) + answer.text,
             "logprobs": self._logprobs(answer.events, 0), "finish_reason": answer.finish}
            for answer in answers
        ]  # fmt: skip
        ends = [answer.end for answer in answers if answer.end]
        return {**self._head, "choices": choices, "usage": counted(usage(self.asked, ends))}

    async def stream(self, pieces: Pieces) -> AsyncGenerator[dict[str, Any] | None]:
        head = self._head | ({"usage": None} if self._usage else {})
        ends: dict[int, Finish] = {}
        offsets = dict.fromkeys(range(len(self.asked.prompts) * self.asked.count), 0)

        def chunk(index: int, piece: Piece) -> dict[str, Any]:
            logprobs = self._logprobs(piece.events, offsets[index])
            offsets[index] += sum(len(token) for token in logprobs["tokens"]) if logprobs else 0
            choice = {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}
            return {**head, "choices": [choice]}

        for index in offsets:
            if self.body.echo:
                yield chunk(index, Piece(self._echo(index)))
        async for found in pieces:
            if found is None:
                yield None
                continue
            index, piece = found
            if piece.end is not None:
                ends[index] = piece.end
            if piece.text or piece.finish or self.body.logprobs is not None:
                yield chunk(index, piece)
        if self._usage:
            yield {**head, "choices": [], "usage": counted(usage(self.asked, [ends[key] for key in sorted(ends)]))}
