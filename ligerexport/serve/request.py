"""What goes into the engine of the server and what comes out: requests, events, and the states that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

from ligerexport.errors import LigerError

Reason = Literal["stop", "length", "cancelled", "deadline", "error"]


class QueueFull(LigerError):
    """The engine has as many waiting requests as it accepts.

    Args:
        waiting: Number of them.
        retry_after: Seconds after which a place is likely to be free.
    """

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting", hint=f"try again in {retry_after:.0f} seconds")
        self.retry_after = retry_after


class Draining(LigerError):
    """The engine finishes what it has accepted and takes no new requests."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down", hint="send the request to another server, or try again later")


class Constraint(Protocol):
    """A grammar that says which tokens may follow."""

    def mask(self) -> np.ndarray:
        """Return which tokens are allowed now, bool `[V]`."""
        ...

    def accept(self, token: int) -> bool:
        """Record a token; return False if the text is complete with it."""
        ...


class Space(NamedTuple):
    """Where states belong: a state is found only in the space in which it was made.

    Attributes:
        owner: Whose states they are; all owners also find the pinned ones of the owner "".
        adapter: Digest of the adapter with which the text was read; empty text for none.
    """

    owner: str = ""
    adapter: str = ""


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen; see `ligerexport.run.sampling.Sampler` for each value."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """A text to continue.

    Attributes:
        prompt: Token ids, at least one.
        settings: How tokens are chosen.
        max_tokens: Largest number of tokens to write; 0 only reads the prompt.
        stop_tokens: Ids that end the text and are not emitted.
        owner: Whose states may be used and are made; one owner never reads the states of another one. All owners also
            read the pinned states of the owner "".
        client: Who takes turns with others for a place; empty text means the owner.
        logprobs: None for none; otherwise the log-probability of each token, and those of this many likeliest ones.
        prompt_logprobs: Whether the prompt's tokens are emitted first, with `logprobs`. It is then read token by token.
        logit_bias: Values added to the logits of tokens.
        constraint: Allows some tokens only.
        deadline: Time of `time.monotonic()` in seconds at which the request ends.
        pin: Whether to keep the state of the prompt without its last token for good.
        adapter: Name of an adapter that the engine has; None for none.
        marks: Numbers of tokens after which the prompt may branch, such as the ends of turns. States are kept there.
    """

    prompt: tuple[int, ...]
    settings: Settings = field(default_factory=Settings)
    max_tokens: int = 256
    stop_tokens: frozenset[int] = frozenset()
    owner: str = ""
    client: str = ""
    logprobs: int | None = None
    prompt_logprobs: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    constraint: Constraint | None = None
    deadline: float | None = None
    pin: bool = False
    adapter: str | None = None
    marks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Event:
    """One token.

    Attributes:
        token: Its id.
        logprob: Its log-probability in the model's own distribution, before settings and bias; None if it was not
            asked for, and for the first token of a prompt.
        top: The likeliest tokens and their log-probabilities, the likeliest first.
        prompt: Whether it is a token of the prompt.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    prompt: bool = False


@dataclass(frozen=True)
class Finish:
    """The end of a request.

    Attributes:
        reason: Why it ended.
        prompt_tokens: Number of tokens in the prompt.
        cached_tokens: How many of them came from a state.
        completion_tokens: Number of tokens that were written, without one of `stop_tokens`.
        error: Message for the reason "error".
    """

    reason: Reason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    error: str | None = None


@dataclass(frozen=True)
class StateInfo:
    """A state that the engine keeps.

    Attributes:
        id: Digest of its tokens, the same after a restart.
        tokens: Number of tokens that it has seen.
        bytes: Its size.
        in_memory, on_disk: Where it is.
        pinned: Whether it stays until it is deleted.
        name: Name that a user gave it, or empty text.
    """

    id: str
    tokens: int
    bytes: int
    in_memory: bool
    on_disk: bool
    pinned: bool
    name: str
