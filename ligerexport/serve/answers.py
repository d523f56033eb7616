"""From a request to its answers: tickets of the engine, and their events as text.

The engine knows tokens only. Text, stop strings and reasons to end are made here; the shapes of OpenAI's endpoints are
in `chat`, `completions` and `responses`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest

from ligerexport.run.generate import StopStrings
from ligerexport.run.grammar import Grammar
from ligerexport.serve.engine import Engine
from ligerexport.serve.errors import ApiError
from ligerexport.serve.job import Ticket
from ligerexport.serve.metrics import Metrics
from ligerexport.serve.request import Event, Finish, Request, Settings
from ligerexport.serve.schemas import Chosen, Sampled
from ligerexport.text.tokenizer import Detokenizer, TextModel

CONTEXT = 64
"""Number of tokens of the prompt on which the text of the first tokens may depend."""
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
            "seed")  # fmt: skip
"""Fields of a request that are settings of the sampler."""
PING = 15.0
"""Seconds of silence after which a stream sends a comment, so that proxies keep it open."""


@dataclass(frozen=True)
class Served:
    """A model under its name.

    Attributes:
        name: The name in requests.
        engine: The engine that runs it.
        settings: Settings of the sampler for requests that leave them out.
        longest: Largest number of tokens in an answer to a request without a limit.
        deadline: Seconds after which an answer is cut off; None never.
        facts: What `/v1/models` says in addition.
        adapter: Adapter of the engine that answers use; None for none.
    """

    name: str
    engine: Engine
    settings: Mapping[str, Any]
    longest: int = 4096
    deadline: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def text(self) -> TextModel:
        """The tokenizer and the chat template."""
        return self.engine.text


@dataclass(frozen=True)
class Asked:
    """A request in tokens, with what all of its answers share.

    Attributes:
        model: The model.
        prompts: Ids of each prompt.
        settings: Arguments of `Settings`.
        max_tokens: Largest number of tokens in an answer.
        ends: Ids that end an answer.
        stops: Strings that end an answer.
        count: Number of answers to each prompt.
        options: Further fields of the engine's `Request`.
        grammar: What each answer follows.
    """

    model: Served
    prompts: Sequence[Sequence[int]]
    settings: Mapping[str, Any]
    max_tokens: int
    ends: frozenset[int]
    stops: Sequence[str] = ()
    count: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    grammar: Grammar | None = None

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in all prompts."""
        return sum(map(len, self.prompts))


@dataclass(frozen=True)
class Piece:
    """Text of an answer.

    Attributes:
        text: The text that the events complete.
        events: The tokens since the last piece.
        finish: `stop` or `length` in the last piece.
        end: What the engine says about the whole answer, in the last piece.
    """

    text: str
    events: tuple[Event, ...] = ()
    finish: str | None = None
    end: Finish | None = None


class Answer:
    """One answer, whose pieces are iterated.

    Args:
        index: Number of the answer within the response.
        ticket: Ticket of the engine.
        prompt: Ids before the answer.
        text: The tokenizer.
        stops: The strings that end it.
    """

    def __init__(self, index: int, ticket: Ticket, prompt: Sequence[int], text: TextModel, stops: StopStrings) -> None:
        self.index, self.ticket = index, ticket
        self._detokenizer, self._stops = Detokenizer(text, prompt[-CONTEXT:]), stops

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the answer as it is written.

        Raises:
            ApiError: The engine failed, or the answer was cancelled.
        """
        stopped = False
        async for event in self.ticket:
            if isinstance(event, Finish):
                yield self._last(event, stopped)
            elif event.prompt:
                yield Piece("", (event,))
            elif not stopped:
                out, stopped = self._stops.push(self._detokenizer.push(event.token))
                if stopped:
                    self.ticket.cancel()
                yield Piece(out, (event,))

    def _last(self, end: Finish, stopped: bool) -> Piece:
        if not stopped and end.reason == "error":
            raise ApiError(500, "The model failed while it wrote this answer.", code="server_error",
                           kind="server_error")  # fmt: skip
        if not stopped and end.reason == "cancelled":
            raise ApiError(503, "The answer was cancelled.", code="service_unavailable", kind="server_error")
        rest = ""
        if not stopped:
            rest, stopped = self._stops.push(self._detokenizer.flush())
            rest += self._stops.flush()
        return Piece(rest, (), "stop" if stopped or end.reason == "stop" else "length", end)


@dataclass
class Collected:
    """A complete answer."""

    index: int
    text: str = ""
    events: list[Event] = field(default_factory=list)
    finish: str = ""
    end: Finish | None = None

    def add(self, piece: Piece) -> None:
        """Add a piece."""
        self.text += piece.text
        self.events += piece.events
        self.finish, self.end = piece.finish or self.finish, piece.end or self.end


def given(body: Sampled, model: Served) -> dict[str, Any]:
    """Return the arguments of `Settings`: what the request says, and the model's own settings for the rest."""
    said = {name: value for name in SETTINGS if (value := getattr(body, name, None)) is not None}
    if "seed" in said:
        said["seed"] %= 1 << 63  # OpenAI allows negative ones
    if "top_p" in said:
        said["top_p"] = max(said["top_p"], 1e-9)  # OpenAI allows 0
    if "top_k" in said:
        said["top_k"] = max(said["top_k"], 0)  # -1 means all
    return {**model.settings, **said}


def strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the stop strings of a request."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def biases(body: Chosen, model: Served) -> dict[int, float]:
    """Return what is added to the logits of tokens.

    Raises:
        ApiError: A key is no id of the vocabulary.
    """
    most = max(model.text.vocabulary.values())
    for key in body.logit_bias or ():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) <= most):
            raise ApiError(400, f"Invalid key in 'logit_bias': {key[:20]!r}. You should only be submitting token ids "
                           f"from 0 to {most}.", param="logit_bias", code="invalid_value")  # fmt: skip
    return {int(key): value for key, value in (body.logit_bias or {}).items()}


def start(asked: Asked, owner: str, client: str) -> list[Answer]:
    """Hand a request to the engine.

    Args:
        asked: The request.
        owner: Whose states may be read and written.
        client: Who takes turns with others for a place.

    Raises:
        ApiError: A prompt is empty.
        QueueFull, Draining: The engine takes no more requests.
        UsageError: A stop string has text before a special token.
    """
    if not asked.prompts or not all(asked.prompts):
        raise ApiError(400, "Invalid prompt: it has no tokens.", param="prompt", code="invalid_value")
    model, answers = asked.model, list[Answer]()
    until = None if model.deadline is None else time.monotonic() + model.deadline
    try:
        for index in range(len(asked.prompts) * asked.count):
            prompt, stops = tuple(asked.prompts[index // asked.count]), StopStrings(asked.stops, model.text.special_ids)
            seed = asked.settings.get("seed")
            settings = {**asked.settings, "seed": None if seed is None else seed + index % asked.count}
            request = Request(
                prompt, Settings(**settings), asked.max_tokens, asked.ends | stops.ids, owner=owner, client=client,
                adapter=model.adapter, deadline=until,
                constraint=asked.grammar.begin() if asked.grammar else None, **asked.options,
            )  # fmt: skip
            answers.append(Answer(index, model.engine.submit(request), prompt, model.text, stops))
    except BaseException:
        for answer in answers:
            answer.ticket.cancel()
        raise
    return answers


@asynccontextmanager
async def watched(request: HttpRequest, answers: Sequence[Answer]) -> AsyncIterator[None]:
    """Cancel answers when the client leaves, and however the block ends."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for answer in answers:
            answer.ticket.cancel()

    waiting = asyncio.create_task(wait())
    try:
        yield
    finally:
        waiting.cancel()
        for answer in answers:
            answer.ticket.cancel()


async def merged(answers: Sequence[Answer], metrics: Metrics, model: str) -> AsyncGenerator[tuple[int, Piece] | None]:
    """Yield the pieces of all answers in the order in which they come, and None after each `PING` of silence."""
    queue: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()

    async def read(answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                queue.put_nowait((answer.index, piece))
        except BaseException as error:
            queue.put_nowait(error)
            raise

    timer = metrics.timer(model)
    tasks = [asyncio.create_task(read(answer)) for answer in answers]
    left = len(tasks)
    try:
        while left:
            try:
                async with asyncio.timeout(PING):
                    found = await queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(found, BaseException):
                raise found
            timer(found[1])
            left -= found[1].end is not None
            yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage(asked: Asked, ends: Sequence[Finish]) -> tuple[int, int, int]:
    """Return the tokens in the prompts, those of them that came from states, and the tokens in the answers."""
    cached = sum(end.cached_tokens for end in ends[:: asked.count])
    return asked.prompt_tokens, cached, sum(end.completion_tokens for end in ends)
