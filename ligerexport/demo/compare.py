"""Let two models answer one prompt, each in its own process, in turns so that each has the machine to itself.

The next turn goes to the model with less computing time, so both clocks advance together and the faster model gets
ahead. Both are warm before the clocks start. The workers of `ligerexport.measure.bench` measure times and bytes.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from ligerexport.errors import LigerError
from ligerexport.measure.bench.bench import labels
from ligerexport.measure.bench.llama import check_llama_cpp, in_llama_cpp
from ligerexport.measure.bench.worker import Worker
from ligerexport.text.tokenizer import Detokenizer, TextModel
from ligerexport.threads import default_threads

FRAME = 0.2
"""Seconds between two updates of the page."""
REST = 0.06
"""Pause in seconds after each update, so that a browser on this machine draws it while no token is timed."""
TURN = 0.3
"""Target time in seconds for reading a piece of a prompt; pieces are multiples of `STEP` tokens."""
STEP = 64
RECENT = 8
"""Number of last tokens in the median that is shown as current."""

Answer = TypeVar("Answer")


@dataclass
class Stream:
    """One model's answer so far.

    Attributes:
        name: Name of the model.
        facts: Facts from the model's worker.
        prompt: Ids of the prompt.
        read: Number of prompt tokens that were read.
        clock: Computing time in seconds.
        first: Seconds to the first token; None before it.
        text: Text of the answer.
        written: Number of tokens in the answer.
        latencies: Milliseconds of each token except the first.
        memory: After each turn: tokens seen, bytes of state or KV cache, resident bytes, bytes on a GPU.
        finish: Reason for the end: `eos`, `length`, `stopped`, `failed`; None before the end.
        error: Why it failed.
        ids: Ids of the answer.
        held: Positions that each KV head of each layer holds after the answer; None if it was stopped or is unknown.
        forgotten: For each token of the answer, the share of the attention that fell on forgotten tokens, by layer; no
            tokens if it is unknown.
    """

    name: str
    facts: dict[str, Any]
    prompt: Sequence[int]
    read: int = 0
    clock: float = 0.0
    first: float | None = None
    text: str = ""
    written: int = 0
    latencies: list[float] = field(default_factory=list)
    memory: list[tuple[int, int, int, int | None]] = field(default_factory=list)
    finish: str | None = None
    error: LigerError | None = None
    ids: list[int] = field(default_factory=list)
    held: list[list[list[int]]] | None = None
    forgotten: list[list[float]] = field(default_factory=list)

    @property
    def seen(self) -> int:
        """Number of tokens in the model's memory, which lacks the last written one."""
        return self.read + max(0, self.written - 1)

    @property
    def now(self) -> float | None:
        """Median milliseconds per token over the last few tokens."""
        return statistics.median(self.latencies[-RECENT:]) if self.latencies else None

    @property
    def median(self) -> float | None:
        """Median milliseconds per token over all tokens."""
        return statistics.median(self.latencies) if self.latencies else None


class Stopped(Exception):
    """The user stopped the answer."""


class Pair:
    """The processes of two models, with one queue for both.

    Args:
        model: See `ligerexport.measure.opened.open_model`.
        against: See `model`.
        **options: See `ligerexport.measure.opened.open_model`.

    Raises:
        LigerError: A model cannot be opened.
    """

    def __init__(self, model: str, against: str, **options: Any) -> None:
        self.names = labels(model, against)
        self._models = dict(zip(self.names, (model, against), strict=True))
        self._options = options
        self._queue = ThreadPoolExecutor(1)  # one model computes at a time, first come, first served
        self._workers: dict[str, Worker] = {}
        if any(map(in_llama_cpp, self._models.values())):
            check_llama_cpp()
        for name in self.names:
            self._worker(name)

    def _worker(self, name: str) -> Worker:
        """Return the worker of a model, which is started again if it died."""
        if name not in self._workers or not self._workers[name].alive:
            model, options = self._models[name], self._options
            if in_llama_cpp(model):
                options = {"length": None, "batch": 1, "threads": options["threads"] or default_threads()}
            self._workers[name] = Worker(model, **options)
        return self._workers[name]

    def facts(self, name: str) -> dict[str, Any]:
        """Return the worker's facts about its model."""
        return self._workers[name].facts

    def call(self, stop: threading.Event, work: Callable[[], Answer]) -> Answer:
        """Wait for a turn, call `work` in it, and return the result.

        Raises:
            Stopped: `stop` was set; the result is dropped.
        """
        if stop.is_set():
            raise Stopped
        future = self._queue.submit(work)
        while True:
            try:
                return future.result(timeout=0.05)
            except NotYet:
                if stop.is_set():
                    future.cancel()
                    raise Stopped from None

    def race(
        self, session: str, prompt: Sequence[int], text: TextModel, most: int, stop: threading.Event
    ) -> Iterator[tuple[Stream, Stream]]:
        """Let both answer a prompt.

        Args:
            session: A unique name.
            prompt: Ids of the prompt.
            text: Tokenizer of both models.
            most: Largest number of tokens in an answer.
            stop: Event that ends the answers, which then finish as `stopped`.

        Yields:
            Both streams, the same objects each time, several times a second and at the end. A model that fails does
            not stop the other.
        """
        writers = [_Writer(self, name, session, prompt, text, most) for name in self.names]
        streams = writers[0].stream, writers[1].stream
        shown = 0.0
        try:
            for writer in writers:
                writer.attempt(partial(writer.ask, stop, "warm"))
            while going := [writer for writer in writers if writer.stream.finish is None]:
                writer = min(going, key=lambda writer: writer.stream.clock)
                writer.attempt(partial(writer.turn, stop))
                if time.perf_counter() - shown > FRAME:
                    yield streams
                    time.sleep(REST)
                    shown = time.perf_counter()
            for writer in writers:
                if writer.stream.error is None:
                    writer.stream.held = writer.ask(stop, "held")["held"]
        except Stopped:
            for stream in streams:
                stream.finish = stream.finish or "stopped"
        finally:
            for name in self.names:
                self.after(partial(self.forget, name, session))
        yield streams

    def forget(self, name: str, session: str) -> None:
        """Let a model's worker forget a session, if it is alive."""
        if self._workers[name].alive:
            self._workers[name]("close", session)

    def after(self, work: Callable[[], Any]) -> None:
        """Call `work` after the turns that wait, and do not wait for it."""
        self._queue.submit(work)

    def work(self, name: str, do: str, session: str, **arguments: Any) -> dict[str, Any]:
        """Call the worker of a model, during a turn."""
        return self._worker(name)(do, session, **arguments)

    def close(self) -> None:
        """End both processes."""
        self._queue.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers.values():
            worker.close()


class _Writer:
    """Advances one stream, turn by turn."""

    def __init__(self, pair: Pair, name: str, session: str, prompt: Sequence[int], text: TextModel, most: int) -> None:
        self.stream = Stream(name, pair.facts(name), prompt)
        self._pair, self._session, self._most = pair, session, most
        self._end, self._detokenizer = text.turn_ends, Detokenizer(text, prompt)
        self._token, self._piece = 0, STEP

    def attempt(self, work: Callable[[], Any]) -> None:
        """Call `work`; an error ends this answer."""
        try:
            work()
        except LigerError as error:
            self.stream.finish, self.stream.error = "failed", error

    def turn(self, stop: threading.Event) -> None:
        """Read a piece of the prompt, or write a token.

        Raises:
            LigerError: The model failed, or has no room for the tokens.
        """
        stream = self.stream
        needed, room = max(len(stream.prompt), stream.seen + 1), stream.facts["room"]
        if room is not None and needed > room:
            raise LigerError(f"the text takes {needed:,} tokens, and {stream.name} has room for {room:,}",
                             hint="choose a shorter text")  # fmt: skip
        if stream.read < len(stream.prompt):
            piece = list(stream.prompt[stream.read : stream.read + self._piece])
            answer = self.ask(stop, "prefill", ids=[piece])
            seconds, tokens = answer["seconds"], answer["tokens"]
            stream.read += len(piece)
            stream.clock += seconds
            self._piece = max(1, round(len(piece) / seconds * TURN / STEP)) * STEP
            if stream.read == len(stream.prompt):
                stream.first = stream.clock
                self._write(tokens[0], answer["forgotten"])
        else:
            answer = self.ask(stop, "decode", tokens=[self._token])
            (seconds,), ((token,),) = answer["seconds"], answer["tokens"]
            stream.clock += seconds
            stream.latencies.append(seconds * 1e3)
            self._write(token, answer["forgotten"])
        stream.memory.append((stream.seen, answer["state_bytes"], answer["rss"], answer["device"]))

    def ask(self, stop: threading.Event, do: str, **arguments: Any) -> dict[str, Any]:
        """Call the model's worker in a turn."""
        return self._pair.call(stop, partial(self._pair.work, self.stream.name, do, self._session, **arguments))

    def _write(self, token: int, forgotten: list[float] | None) -> None:
        stream = self.stream
        if forgotten is not None:
            stream.forgotten.append(forgotten)
        stream.written += 1
        stream.ids.append(token)
        self._token = token
        if token in self._end:
            stream.finish = "eos"
        else:
            stream.text += self._detokenizer.push(token)
            stream.finish = "length" if stream.written >= self._most else None
        if stream.finish:
            stream.text += self._detokenizer.flush()


def same_text(model: TextModel, other: TextModel) -> None:
    """Refuse models that would read the ids of one prompt differently.

    Raises:
        LigerError: Their vocabularies differ.
    """
    if model.vocabulary != other.vocabulary:
        raise LigerError("the models have different tokenizers",
                         hint="compare a model with the Transformer that it was converted from")  # fmt: skip
