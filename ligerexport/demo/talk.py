"""Chats of several turns with the first model: one conversation for each page, on weights that all pages share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from ligerexport.demo.compare import Pair, Stopped
from ligerexport.run.generate import Conversation
from ligerexport.run.runtime import Session, load
from ligerexport.run.sampling import Sampler, chat_settings

ANSWER = 512
"""Largest number of tokens in an answer."""


@dataclass
class Talk:
    """One conversation, and the memory of the model after each token of its answers: tokens seen, bytes of state."""

    turns: Conversation
    sampler: Sampler
    memory: list[tuple[float, float]] = field(default_factory=list)


class Talks:
    """The conversations of all pages; they take turns with everything else that is computed.

    Args:
        model: An artifact or a converted checkpoint.
        pair: Has the queue.
        threads: Number of threads; None takes the physical cores.
    """

    def __init__(self, model: str, pair: Pair, threads: int | None) -> None:
        self._path, self._pair, self._threads = Path(model).expanduser(), pair, threads
        self._talks: dict[str, Talk] = {}

    @cached_property
    def _loaded(self) -> Session:
        """The model, which the first question loads; the comparison has it in another process."""
        return load(self._path, threads=self._threads, hashes=False)

    @property
    def settings(self) -> tuple[float, float]:
        """Temperature and top-p that the model recommends."""
        found, _ = chat_settings(self._path)
        return found.get("temperature", 1.0), found.get("top_p", 1.0)

    def say(
        self, page: str, text: str, system: str, temperature: float, top_p: float, stop: threading.Event
    ) -> Iterator[tuple[str, Talk]]:
        """Answer in the conversation of a page; yield the answer so far and the conversation, after each token.

        Args:
            page: Unique name of the page.
            text: What the user says.
            system: System message, which only the first turn reads.
            temperature: See `Sampler`.
            top_p: See `Sampler`.
            stop: Event that ends the answer; the conversation can go on.

        Raises:
            LigerError: The model cannot chat, or has no room for the text.
        """
        try:
            if page not in self._talks:
                session = self._pair.call(stop, lambda: self._loaded.sibling())
                sampler = Sampler(**chat_settings(self._path)[0])
                turns = Conversation(session, sampler, system=system.strip() or None, max_new_tokens=ANSWER)
                self._talks[page] = Talk(turns, sampler)
            talk, answer = self._talks[page], ""
            talk.sampler.temperature, talk.sampler.top_p = temperature, top_p
            chunks = talk.turns.say(text)
            try:
                while chunk := self._pair.call(stop, partial(next, chunks, None)):
                    answer += chunk.text
                    talk.memory.append((talk.turns.position, talk.turns.state_bytes))
                    yield answer, talk
            finally:
                self._pair.after(chunks.close)
        except Stopped:
            pass

    def forget(self, page: str) -> None:
        """End the conversation of a page."""
        self._talks.pop(page, None)
