"""`chat`: a conversation with an artifact."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ligerexport.cli import options
from ligerexport.cli.options import Json, verb
from ligerexport.cli.prompting import Asking, MaxNewTokens, Runnable, cached, open_stdin, prepared, show
from ligerexport.cli.remote import RemoteConversation, Server
from ligerexport.console import card, data, err, format_bytes, print_error, say
from ligerexport.errors import LigerError, UsageError, close_matches

if TYPE_CHECKING:
    from ligerexport.run.generate import Chunk, Conversation, Summary

_COMMANDS = {
    "/reset": "forget the conversation",
    "/save": "FILE: save the conversation's state",
    "/load": "FILE: continue a saved conversation",
    "/help": "show this list",
    "/exit": "leave",
}
_ENDINGS = {"eos": "complete", "length": "length limit", "stop": "stop text"}
"""Name of each finish below an answer."""


@verb()
def chat(
    artifact: Annotated[Path | None, Runnable] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    *,
    asking: Asking,
    server: Server,
    json: Json = False,
) -> None:
    """Chat with a model whose only memory is its constant state.

    Each turn reads only its own text. Tokens are sampled with the settings in the model's generation_config.json, or
    at a moderate temperature without any. Ctrl-C stops an answer. The commands are /reset, /save FILE, /load FILE,
    /help and /exit. Lines may come from a pipe.
    """
    if (artifact is None) == (server.server is None):
        raise UsageError("expected either an artifact or --server", hint="ligerexport chat ARTIFACT")
    data("", end="")  # fails at once if stdout is closed
    stdin = open_stdin()
    talk: Conversation | RemoteConversation
    notes: Callable[[], list[tuple[str, str]]] = list
    if artifact is None:
        talk = server.connect(asking, system, max_new_tokens)
    else:
        talk, notes = _open(prepared(artifact), asking, system, max_new_tokens)
    say("Ctrl-C stops an answer, /help lists the commands")
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
    options.finish_json(json, {"turns": turns, "position": talk.position, "state_bytes": talk.state_bytes})
    card(
        f"{len(turns)} turn{'' if len(turns) == 1 else 's'}",
        [("tokens seen", f"{talk.position:,}"), ("state", format_bytes(talk.state_bytes)), *notes()],
    )


def _open(
    artifact: Path, asking: Asking, system: str | None, max_new_tokens: int
) -> tuple[Conversation, Callable[[], list[tuple[str, str]]]]:
    """Open an artifact; return the conversation, and a function that returns the last rows of the card."""
    from ligerexport.run.generate import Conversation
    from ligerexport.run.sampling import Sampler

    sampling, origin = asking.sampling(artifact, True)
    sampler = Sampler(**sampling, seed=asking.seed)
    options.announce("chat", artifact=artifact, max_new_tokens=max_new_tokens, **sampling, seed=asking.seed,
                     stop=asking.stop, prompt_cache=asking.prompt_cache, lora=asking.lora)  # fmt: skip
    session, cache = asking.open(artifact, many=True)  # a conversation has many tokens
    talk = Conversation(
        session, sampler, system=system, max_new_tokens=max_new_tokens, stop=asking.stop or (), prompt_cache=cache,
        special_content=asking.special_content, speculate=asking.guesser(),
    )  # fmt: skip

    def notes() -> list[tuple[str, str]]:
        return [*([("prompt cache", cached(cache))] if cache and cache.note else []), ("sampling", origin or "")]

    return talk, notes


def _lines(stdin: TextIO) -> Iterator[str]:
    """Yield the user's lines until the end of input or two Ctrl-C in a row.

    Several lines that are pasted into a terminal at once are one line.
    """
    interactive, interrupted = stdin.isatty(), False
    if interactive:
        with suppress(ImportError):  # Windows has no readline; its consoles edit lines themselves
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


def _answer(talk: Conversation | RemoteConversation, line: str, json: bool) -> dict[str, Any]:
    """Stream one answer; Ctrl-C ends it after the token that is being computed."""
    pieces: list[Chunk] = []
    stream = talk.say(line)
    with _interruptible() as interrupted:
        for chunk in stream:
            pieces.append(show(chunk, json))
            if interrupted():
                stream.close()
                break
    summary: Summary | None = pieces[-1].summary
    if not json:
        data("")
    finish, speed = (summary.finish, summary.tokens_per_second) if summary else ("stopped", None)
    rate = f", {speed:.1f} tokens per second" if speed else ""
    err.print(f"[{_ENDINGS.get(finish, finish)}{rate}]", style="dim", markup=False)
    return {"answer": "".join(chunk.text for chunk in pieces), "finish": finish}


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed; a second Ctrl-C raises KeyboardInterrupt."""
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


def _command(talk: Conversation | RemoteConversation, line: str) -> bool:
    """Run a command that begins with a slash; return whether the chat continues."""
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
            say(f"saved to {argument}: {Path(argument).stat().st_size:,} bytes")
        case "/load":
            talk.load(argument)
            say(f"after {talk.position:,} tokens")
        case "/help":
            for command, what in _COMMANDS.items():
                say(f"{command:8} {what}")
        case _:
            raise UsageError(f"unknown command '{name}'", hint=close_matches(name, _COMMANDS))
    return True
