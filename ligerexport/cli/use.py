"""`run` and `chat`: text from an artifact."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ligerexport.cli import common
from ligerexport.cli.common import Debug, Json, Quiet, Verbose
from ligerexport.console import card, data, err, format_bytes, print_error, progress, say, silent, warn
from ligerexport.errors import LigerError, UsageError, close_matches, quoted

if TYPE_CHECKING:
    from ligerexport.run.generate import Chunk, Conversation, Summary
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

_LONG_PROMPT = 2048
"""Tokens from which a progress bar is worth it, and so are weights in the order that is fastest."""


def run(
    artifact: Artifact,
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to continue; - reads stdin, and -- goes before a text that begins with a dash."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Read the prompt from this file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask the prompt through the model's chat template.")] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    special_content: SpecialContent = False,
    prompt_cache: PromptCacheFile = None,
    threads: Threads = None,
    no_hash: NoHash = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt; text streams to stdout.

    Takes the most likely token each time; with --chat it samples as the model's generation_config.json says. A prompt
    that is too long for a command line comes from a file or a pipe.
    """
    common.begin(quiet, debug, verbose)
    from ligerexport.run.generate import generate, text_model
    from ligerexport.run.prompt_cache import PromptCache
    from ligerexport.run.runtime import load

    data("", end="")  # says at once that stdout is closed
    prompt = _prompt(prompt, file)
    sampling, origin = _sampling(artifact, chat, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                                 repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
                                 frequency_penalty=frequency_penalty)  # fmt: skip
    common.announce("run", artifact=artifact, max_new_tokens=max_new_tokens, **sampling, seed=seed, stop=stop,
                    prompt_cache=prompt_cache)  # fmt: skip
    long = len(prompt) > 4 * _LONG_PROMPT
    session = load(artifact, threads=threads, prepack=long, hashes=not no_hash)
    cache = PromptCache(prompt_cache) if prompt_cache else None
    chunks = generate(
        session, prompt, chat=chat, max_new_tokens=max_new_tokens, **sampling, seed=seed, stop=stop or (),
        special_content=special_content, prompt_cache=cache, progress=progress if long else silent,
    )  # fmt: skip
    pieces = [_show(chunk, json) for chunk in chunks]
    if not json:
        data("")
    summary = pieces[-1].summary
    assert summary is not None
    manifest = session.artifact.manifest
    speed = summary.tokens_per_second
    text = "".join(chunk.text for chunk in pieces)
    common.finish_json(json, {
        "text": text, "prompt_tokens": summary.prompt_tokens,
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
            *([("sampling", origin)] if origin else []),
        ],
        next_command=f"ligerexport chat {quoted(artifact)}",
    )  # fmt: skip
    if summary.finish == "eos" and not text.strip():
        asked = chat or not text_model(artifact).chat_template
        warn("the model ended the text at once" + ("" if asked else "; --chat asks it the prompt as a question"))


def _prompt(prompt: str | None, file: Path | None) -> str:
    """Return the one prompt that was given, wherever it comes from.

    Raises:
        UsageError: There is none or two, or it cannot be read as text.
    """
    if (prompt is None) == (file is None):
        raise UsageError("one prompt was expected, as PROMPT or with --file", hint="- as PROMPT reads stdin")
    if file is not None:
        prompt = _stdin().read() if str(file) == "-" else file.read_text(encoding="utf-8", errors="surrogateescape")
    elif prompt == "-":
        prompt = _stdin().read()
    return str(prompt).removeprefix("\ufeff")  # some editors and shells begin a text with this mark


def _stdin() -> TextIO:
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


def _sampling(artifact: Path, chat: bool, **given: float | None) -> tuple[dict[str, Any], str | None]:
    """Return settings for `Sampler`, and for a chat a line that says which they are and where they come from."""
    from ligerexport.run.sampling import chat_settings, describe

    settings = {name: value for name, value in given.items() if value is not None}
    if not chat:
        return settings, None
    recommended, origin = chat_settings(artifact)
    origin = f"{origin}, and your options" if settings else origin
    return recommended | settings, describe(recommended | settings, origin)


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
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    special_content: SpecialContent = False,
    prompt_cache: PromptCacheFile = None,
    threads: Threads = None,
    no_hash: NoHash = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Talk; the constant state is all its memory.

    Each turn reads its own text alone. Tokens are drawn as the model's generation_config.json says, or else at a
    moderate temperature. Ctrl-C stops an answer. There are /reset, /save FILE, /load FILE, /help and /exit. Lines may
    come from a pipe.
    """
    common.begin(quiet, debug, verbose)
    from ligerexport.run.generate import Conversation
    from ligerexport.run.prompt_cache import PromptCache
    from ligerexport.run.runtime import load
    from ligerexport.run.sampling import Sampler

    data("", end="")  # says at once that stdout is closed
    stdin = _stdin()
    sampling, origin = _sampling(artifact, True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                                 repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
                                 frequency_penalty=frequency_penalty)  # fmt: skip
    sampler = Sampler(**sampling, seed=seed)
    common.announce("chat", artifact=artifact, max_new_tokens=max_new_tokens, **sampling, seed=seed, stop=stop,
                    prompt_cache=prompt_cache)  # fmt: skip
    session = load(artifact, threads=threads, hashes=not no_hash)
    cache = PromptCache(prompt_cache) if prompt_cache else None
    talk = Conversation(
        session, sampler, system=system, max_new_tokens=max_new_tokens, stop=stop or (), prompt_cache=cache,
        special_content=special_content,
    )  # fmt: skip
    say("Ctrl-C stops an answer, /help lists what else there is")
    turns: list[dict[str, Any]] = []
    for line in _lines(stdin):
        try:
            if line.startswith("/") and "\n" not in line:
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
            ("sampling", origin or ""),
        ],
    )


def _lines(stdin: TextIO) -> Iterator[str]:
    """Yield the user's lines until the end of input; two Ctrl-C in a row at the prompt leave.

    Several lines that are pasted into a terminal at once are one.
    """
    interactive, interrupted = stdin.isatty(), False
    if interactive:
        with suppress(ImportError):  # Windows has none; its consoles edit lines themselves
            import readline  # input() then edits lines and keeps a history

            readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            line = input("> ") if interactive else stdin.readline()
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
    argument = os.path.expanduser(argument.strip())
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
