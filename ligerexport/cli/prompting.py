"""What `run` and `chat` share: options, the standard input, what is said of a prompt cache."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ligerexport.console import data
from ligerexport.errors import UsageError

if TYPE_CHECKING:
    from ligerexport.run.generate import Chunk
    from ligerexport.run.prompt_cache import PromptCache

Artifact = Annotated[Path, typer.Argument(help="Directory that build wrote.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to write.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", help="0 takes the most likely token each time.")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Draw from this many most likely tokens; 0 is all.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Then from the most likely ones that sum to this.")]
MinP = Annotated[
    float | None, typer.Option("--min-p", help="Then from those with this share of the likeliest one's probability.")
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Above 1: tokens that were read or written become less likely."),
]
PresencePenalty = Annotated[
    float | None, typer.Option("--presence-penalty", help="Subtracted from the logits of tokens in the answer so far.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option("--frequency-penalty", help="The same, times how often the token is in the answer.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed writes the same text.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="Text or special token that ends the answer; may be repeated.")
]
SpecialContent = Annotated[
    bool, typer.Option("--special-content", help="Special tokens in what is asked act as such; else they are text.")
]
Threads = Annotated[int | None, typer.Option("--threads", help="Default: physical cores.")]
NoHash = Annotated[bool, typer.Option("--no-hash", help="Do not compare the files' sha256 first.")]
PromptCacheFile = Annotated[
    Path | None, typer.Option("--prompt-cache", help="File that keeps the state after the beginning of the prompt.")
]


def open_stdin() -> TextIO:
    """Return stdin, which is UTF-8 as files are, with the line ends of any system; a terminal has its own encoding.

    A byte that is no text arrives as half a character, which is refused with the prompt.

    Raises:
        UsageError: It is closed.
    """
    if sys.stdin is None:
        raise UsageError("stdin is closed, so there is nothing to read", hint="leave out <&-, or take --file")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding=None if sys.stdin.isatty() else "utf-8", errors="surrogateescape", newline=None)
    return sys.stdin


def choose_sampling(artifact: Path, chat: bool, **given: float | None) -> tuple[dict[str, Any], str | None]:
    """Return settings for `Sampler`, and for a chat a line that says which they are and where they come from."""
    from ligerexport.run.sampling import chat_settings, describe

    settings = {name: value for name, value in given.items() if value is not None}
    if not chat:
        return settings, None
    recommended, origin = chat_settings(artifact)
    origin = f"{origin}, and your options" if settings else origin
    return recommended | settings, describe(recommended | settings, origin)


def cached(cache: PromptCache) -> str:
    tokens = cache.restored or cache.keep
    return cache.note + (f", {tokens:,} tokens in {cache.path}" if tokens else "")


def show(chunk: Chunk, json: bool) -> Chunk:
    if not json:
        data(chunk.text, end="")
    return chunk
