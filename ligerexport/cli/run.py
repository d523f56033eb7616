"""`run`: continue a prompt with an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ligerexport.artifact.artifact import Manifest
from ligerexport.cli import options
from ligerexport.cli.options import Json, verb
from ligerexport.cli.prompting import Asking, MaxNewTokens, Runnable, cached, open_stdin, prepared, show
from ligerexport.console import card, data, format_bytes, progress, silent, warn
from ligerexport.errors import UsageError, quoted
from ligerexport.model.config import LigerConfig
from ligerexport.reading import read_json

_LONG_PROMPT = 2048
"""Smallest number of tokens for which a progress bar, and copying the weights into their fastest layout, pays off."""


@verb()
def run(
    artifact: Annotated[Path, Runnable],
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to continue; - reads stdin. Write -- before a text that begins with a dash."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Read the prompt from this file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    max_new_tokens: MaxNewTokens = 128,
    state: Annotated[
        Path | None, typer.Option("--state", help="Continue from this saved state of any runtime of the same model.")
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option("--save-state", help="Write the state after the prompt to this file.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", help="File with a JSON schema that the text fits.")
    ] = None,
    regex: Annotated[str | None, typer.Option("--regex", help="Regular expression that the whole text fits.")] = None,
    grammar: Annotated[
        Path | None, typer.Option("--grammar", help="File with a grammar that the text follows, as Lark or GBNF.")
    ] = None,
    forgetting: Annotated[
        bool,
        typer.Option(
            "--forgetting",
            help="Say which share of the attention fell on forgotten tokens; an artifact needs build --meter.",
        ),
    ] = False,
    *,
    asking: Asking,
    json: Json = False,
) -> None:
    """Continue a prompt. The text streams to stdout.

    Each token is the most likely one. With --chat, tokens are sampled as set in the model's generation_config.json. A
    prompt that is too long for a command line can come from a file or a pipe. A model is converted and built at its
    first run; its artifact, verified and in int4, is kept in the cache. A state that one runtime saved can be
    continued by every other: a checkpoint on a GPU reads a long text, and an artifact on a small device goes on.
    """
    from ligerexport.artifact.snapshot import Snapshot
    from ligerexport.run.generate import Chunk, generate, text_model

    data("", end="")  # fails at once if stdout is closed
    prompt, model = _prompt(prompt, file), artifact
    artifact = prepared(model)
    sampling, origin = asking.sampling(artifact, chat)
    options.announce("run", artifact=artifact, max_new_tokens=max_new_tokens, **sampling, seed=asking.seed,
                     stop=asking.stop, prompt_cache=asking.prompt_cache, lora=asking.lora, state=state,
                     save_state=save_state, json_schema=json_schema, regex=regex, grammar=grammar,
                     speculate=asking.speculate)  # fmt: skip
    schema = None if json_schema is None else read_json(json_schema, UsageError, "give a file with one JSON object")
    rules = None if grammar is None else grammar.read_text(encoding="utf-8")
    long = len(prompt) > 4 * _LONG_PROMPT
    session, cache = asking.open(artifact, many=long, meter=forgetting)
    if state is not None:
        session.restore(Snapshot.load(state))
    chunks = generate(
        session, prompt, chat=chat, max_new_tokens=max_new_tokens, **sampling, seed=asking.seed, stop=asking.stop or (),
        json_schema=schema, regex=regex, grammar=rules, special_content=asking.special_content, prompt_cache=cache,
        fresh=state is None, report_forgetting=forgetting, speculate=asking.guesser(),
        progress=progress if long else silent,
    )  # fmt: skip
    pieces = list[Chunk]()
    for chunk in chunks:
        if save_state is not None and not pieces:  # before the session reads what was written
            session.snapshot().save(save_state)
        pieces.append(show(chunk, json))
    if not json:
        data("")
    summary = pieces[-1].summary
    assert summary is not None
    manifest = session.artifact.manifest
    speed = summary.tokens_per_second
    text = "".join(chunk.text for chunk in pieces)
    options.finish_json(json, {
        "text": text, "prompt_tokens": summary.prompt_tokens,
        "cached_tokens": summary.cached_tokens,
        "new_tokens": summary.new_tokens, "finish": summary.finish, "ttft_seconds": summary.ttft,
        "tokens_per_second": speed, "state_bytes": summary.state_bytes, "kv_cache_larger_from": manifest.crossover,
    } | ({"forgotten": summary.forgotten} if forgetting else {}))  # fmt: skip
    card(
        f"{summary.new_tokens} tokens after {summary.prompt_tokens}",
        [
            *([("speed", f"{speed:.1f} tokens per second")] if speed else []),
            ("first token", f"{summary.ttft:.2f} s"),
            *([("prompt cache", cached(cache))] if cache else []),
            ("state", f"{format_bytes(summary.state_bytes)}, at any length" if not manifest.growth
             else f"{format_bytes(summary.state_bytes)}, {format_bytes(manifest.growth)} more per token"),
            options.crossover_row(manifest.crossover),
            *([("forgotten", _forgotten(summary.forgotten, manifest))] if forgetting else []),
            *([("sampling", origin)] if origin else []),
        ],
        next_command=f"ligerexport chat {quoted(model)}",
    )  # fmt: skip
    if summary.finish == "eos" and not text.strip():
        asked = chat or not text_model(artifact).chat_template
        warn("the model ended the text at once" + ("" if asked else "; --chat sends the prompt as a question"))


def _forgotten(share: float | None, manifest: Manifest) -> str:
    """Return a message about the share of the attention that fell on forgotten tokens."""
    if share is not None:
        return f"at least {share:.1%} of the attention fell on forgotten tokens"
    evicts = LigerConfig.from_dict(manifest.liger).evicts
    return "unknown, since " + ("it was built without --meter" if evicts else "nothing keeps what this model forgets")


def _prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt from the argument, the file or stdin.

    Raises:
        UsageError: There is no prompt, or two, or it is not text.
    """
    if (prompt is None) == (file is None):
        raise UsageError(
            "expected one prompt, as PROMPT or with --file",
            hint='ligerexport run ARTIFACT "What is gravity?" --chat; PROMPT can be - to read stdin',
        )
    if file is not None:
        prompt = open_stdin().read() if str(file) == "-" else file.read_text(encoding="utf-8", errors="surrogateescape")
    elif prompt == "-":
        prompt = open_stdin().read()
    return str(prompt).removeprefix("\ufeff")  # some editors and shells write this mark at the beginning
