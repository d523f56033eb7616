"""What the endpoints that write text have in common: tokens in, OpenAI's JSON out, whole or as a stream."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from ligerexport.serve.answers import Asked, Collected, Piece
from ligerexport.serve.request import Event
from ligerexport.text.tokenizer import TextModel

Pieces = AsyncGenerator[tuple[int, Piece] | None]


class Shape(Protocol):
    """One request and the form of its response.

    Attributes:
        asked: The request in tokens.
        ends: Whether a stream ends with `[DONE]`.
    """

    asked: Asked
    ends: bool

    def whole(self, answers: Sequence[Collected]) -> dict[str, Any]:
        """Return the response to a request without a stream."""
        ...

    def stream(self, pieces: Pieces) -> AsyncGenerator[dict[str, Any] | None]:
        """Yield the objects of a stream, and None where the connection is silent for long."""
        ...


def new_id(prefix: str) -> str:
    """Return an identifier that was not given before."""
    return f"{prefix}-{secrets.token_hex(12)}"


def token_text(text: TextModel, token: int) -> str:
    """Return a token as text; bytes that are no characters by themselves are written as `\\xe2`."""
    return text.token_bytes(token).decode(errors="backslashreplace")


def counted(found: tuple[int, int, int]) -> dict[str, Any]:
    """Return the result of `usage` in the form of both kinds of completions."""
    prompt, cached, written = found
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip


def chat_logprobs(text: TextModel, events: Sequence[Event]) -> dict[str, Any]:
    """Return log probabilities in the form of chat completions."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = text.token_bytes(token)
        return {"token": raw.decode(errors="backslashreplace"), "logprob": logprob, "bytes": list(raw)}

    rows = [entry(event.token, event.logprob) | {"top_logprobs": [entry(*top) for top in event.top]}
            for event in events]  # fmt: skip
    return {"content": rows, "refusal": None}
