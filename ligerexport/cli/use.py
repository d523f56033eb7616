"""`run` and `chat`: text from an artifact."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ligerexport.cli import common
from ligerexport.cli.common import Debug, Json, Quiet
from ligerexport.console import card, data, err, format_bytes, print_error, progress, say, silent
from ligerexport.errors import LigerError, UsageError, close_matches

if TYPE_CHECKING:
    from ligerexport.generate import Chunk, Conversation, Summary
    from ligerexport.prompt_cache import PromptCache

Artifact = Annotated[Path, typer.Argument(help="Directory that build wrote.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to write.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 takes the most likely token each time.")]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from this many most likely tokens; 0 is all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Then from the most likely ones that sum to this.")]
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

_LONG_PROMPT = 2048
"""Tokens from which a progress bar is worth it, and so are weights in the order that is fastest."""


def run(
    artifact: Artifact,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    chat: Annotated[bool, typer.Option("--chat", help="Ask the prompt through the model's chat template.")] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    special_content: SpecialContent = False,
    prompt_cache: PromptCacheFile = None,
    threads: Threads = None,
    no_hash: NoHash = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt; text streams to stdout."""
    common.begin(quiet, debug)
    from ligerexport.generate import generate
    from ligerexport.prompt_cache import PromptCache
    from ligerexport.runtime import load

    if prompt == "-":
        prompt = sys.stdin.read()
    common.announce("run", artifact=artifact, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                    top_p=top_p, seed=seed, stop=stop, prompt_cache=prompt_cache)  # fmt: skip
    long = len(prompt) > 4 * _LONG_PROMPT
    session = load(artifact, threads=threads, prepack=long, hashes=not no_hash)
    cache = PromptCache(prompt_cache) if prompt_cache else None
    chunks = generate(
        session, prompt, chat=chat, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=seed, stop=stop or (), special_content=special_content, prompt_cache=cache,
        progress=progress if long else silent,
    )  # fmt: skip
    pieces = [_show(chunk, json) for chunk in chunks]
    if not json:
        data("")
    summary = pieces[-1].summary
    assert summary is not None
    manifest = session.artifact.manifest
    speed = summary.tokens_per_second
    common.finish_json(json, {
        "text": "".join(chunk.text for chunk in pieces), "prompt_tokens": summary.prompt_tokens,
        "cached_tokens": summary.cached_tokens,
        "new_tokens": summary.new_tokens, "finish": summary.finish, "ttft_seconds": summary.ttft,
        "tokens_per_second": speed, "state_bytes": summary.state_bytes, "kv_cache_larger_from": manifest.crossover,
    })  # fmt: skip
    card(
        f"{summary.new_tokens} tokens after {summary.prompt_tokens}",
        [
            *([("speed", f"{speed:.1f} tokens per second")] if speed else []),
            ("first token", f"{summary.ttft:.2f} s"),
            *([("prompt cache", _cached(cache))] if cache else []),
            ("state", f"{format_bytes(summary.state_bytes)}, whatever the length" if not manifest.growth
             else f"{format_bytes(summary.state_bytes)}, {format_bytes(manifest.growth)} more a token"),
            common.crossover_row(manifest.crossover),
        ],
        next_command=f"ligerexport chat {artifact}",
    )  # fmt: skip


def _cached(cache: PromptCache) -> str:
    tokens = cache.restored or cache.keep
    return cache.note + (f", {tokens:,} tokens in {cache.path}" if tokens else "")


def _show(chunk: Chunk, json: bool) -> Chunk:
    if not json:
        data(chunk.text, end="")
    return chunk


_COMMANDS = {
    "/reset": "forget the conversation",
    "/save": "FILE: keep the conversation's state",
    "/load": "FILE: go on with a kept one",
    "/help": "this list",
    "/exit": "leave",
}


def chat(
    artifact: Artifact,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    special_content: SpecialContent = False,
    prompt_cache: PromptCacheFile = None,
    threads: Threads = None,
    no_hash: NoHash = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Talk; the constant state is all its memory.

    Each turn reads its own text alone. Ctrl-C stops an answer. There are /reset, /save FILE, /load FILE, /help and
    /exit. Lines may come from a pipe.
    """
    common.begin(quiet, debug)
    from ligerexport.generate import Conversation, Sampler
    from ligerexport.prompt_cache import PromptCache
    from ligerexport.runtime import load

    sampler = Sampler(temperature, top_k, top_p, seed)
    common.announce("chat", artifact=artifact, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                    top_p=top_p, seed=seed, stop=stop, prompt_cache=prompt_cache)  # fmt: skip
    session = load(artifact, threads=threads, hashes=not no_hash)
    cache = PromptCache(prompt_cache) if prompt_cache else None
    talk = Conversation(
        session, sampler, system=system, max_new_tokens=max_new_tokens, stop=stop or (), prompt_cache=cache,
        special_content=special_content,
    )  # fmt: skip
    say("Ctrl-C stops an answer, /help lists what else there is")
    turns: list[dict[str, Any]] = []
    for line in _lines():
        try:
            if line.startswith("/"):
                if not _command(talk, line):
                    break
            elif line:
                turns.append({"user": line} | _answer(talk, line, json))
        except LigerError as error:
            print_error(error)
    common.finish_json(json, {"turns": turns, "position": int(session.position[0]), "state_bytes": session.state_bytes})
    card(
        f"{len(turns)} turns",
        [
            ("tokens seen", f"{int(session.position[0]):,}"),
            common.bytes_row("state", session.state_bytes),
            *([("prompt cache", _cached(cache))] if cache and cache.note else []),
        ],
    )


def _lines() -> Iterator[str]:
    """Yield the user's lines until the end of input; two Ctrl-C in a row at the prompt leave."""
    interactive, interrupted = sys.stdin.isatty(), False
    if interactive:
        import readline  # noqa: F401  (input() then edits lines and keeps a history)
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
            if not interactive and not line:
                return
            interrupted = False
            yield line.strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted or not interactive:
                raise
            interrupted = True
            say("\n/exit or Ctrl-C again leaves")


def _answer(talk: Conversation, line: str, json: bool) -> dict[str, Any]:
    """Stream one answer; Ctrl-C ends it after the token that is being computed."""
    pieces: list[Chunk] = []
    stream = talk.say(line)
    with _interruptible() as interrupted:
        for chunk in stream:
            pieces.append(_show(chunk, json))
            if interrupted():
                stream.close()
                break
    summary: Summary | None = pieces[-1].summary
    if not json:
        data("")
    finish, speed = (summary.finish, summary.tokens_per_second) if summary else ("stopped", None)
    rate = f", {speed:.1f} tokens per second" if speed else ""
    err.print(f"[{finish}{rate}]", style="dim", markup=False)
    return {"answer": "".join(chunk.text for chunk in pieces), "finish": finish}


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed; a second Ctrl-C is the usual exception."""
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _command(talk: Conversation, line: str) -> bool:
    """Do what a line with a slash says; return whether the chat goes on."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name in ("/save", "/load") and not argument:
        raise UsageError(f"{name} needs a file", hint=f"{name} FILE")
    match name:
        case "/exit":
            return False
        case "/reset":
            talk.reset()
            say("forgotten")
        case "/save":
            talk.save(argument)
            say(f"kept in {argument}: {Path(argument).stat().st_size:,} bytes")
        case "/load":
            talk.load(argument)
            say(f"after {int(talk.session.position[0]):,} tokens")
        case "/help":
            for command, what in _COMMANDS.items():
                say(f"{command:8} {what}")
        case _:
            raise UsageError(f"unknown command '{name}'", hint=close_matches(name, _COMMANDS))
    return True
