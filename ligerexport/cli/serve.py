"""`serve`: an OpenAI-compatible server for artifacts."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from ligerexport.cli import options
from ligerexport.cli.options import Json, Threads, verb
from ligerexport.cli.prompting import prepared
from ligerexport.console import card, format_bytes, progress, warn
from ligerexport.errors import MissingDependency, UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@verb()
def serve(
    artifacts: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]ARTIFACT...", help="Directories that build wrote, or models as for run."),
    ],
    host: Annotated[
        str, typer.Option(help="Address to serve on; other machines can reach any but 127.0.0.1.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with one key in each line; clients need one of them.", show_default=False)
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option("--cors", metavar="ORIGIN", help="Origin whose pages may use this server.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Largest number of answers that are written at the same time.")] = 16,
    queue: Annotated[int, typer.Option(help="Largest number of requests that wait; others get the status 429.")] = 256,
    memory: Annotated[str, typer.Option(help="Memory for states between requests, such as 4GB.")] = "4GB",
    state_dir: Annotated[
        Path | None,
        typer.Option(help="Directory for the states after answers, also after a restart.", show_default=False),
    ] = None,
    disk: Annotated[str, typer.Option(help="Space for states in --state-dir, such as 64GB.")] = "64GB",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Largest answer to a request that names no limit.")
    ] = 4096,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="[MODEL:]NAME=ADAPTER", help="LoRA to serve as MODEL:NAME; may be repeated."),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds after which an answer is cut off.", show_default=False)
    ] = None,
    stall: Annotated[
        str, typer.Option(help="Longest planned time between two tokens of an answer while prompts of others are read.")
    ] = "100ms",
    speculate: Annotated[
        str, typer.Option(help="ngram guesses tokens from earlier places of each text where that is faster.")
    ] = "off",
    drain: Annotated[float, typer.Option(help="Seconds that answers may take to finish when the server stops.")] = 30,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Serve artifacts to clients of OpenAI's API.

    A page for chats is at the server's root. SIGTERM or Ctrl-C finishes the answers that were begun, and ends.
    """
    try:
        from ligerexport.run.speculation import check_way
        from ligerexport.serve.app import Access, make_app
        from ligerexport.serve.drafts import SERVED
        from ligerexport.serve.gate import LOOPBACK, Keys
        from ligerexport.serve.host import listen, run
        from ligerexport.serve.models import open_models
    except ImportError as error:
        raise MissingDependency(error.name or "fastapi", extra="serve") from error
    named, budget, space, bound = _names(artifacts), _bytes(memory), _bytes(disk), _seconds(stall)
    adapters = _adapters(lora or [], named)
    if min(max_batch, queue, max_new_tokens) < 1 or not (deadline is None or deadline > 0):
        raise UsageError(
            "--max-batch, --queue, --max-new-tokens and --deadline must be positive", hint="give at least 1"
        )
    check_way(speculate, SERVED)
    options.check_port(port)
    if not 0 <= drain < math.inf:
        raise UsageError(f"--drain {drain}", hint="give a number of seconds, such as 30")
    access = Access(Keys(api_key_file) if api_key_file else None, LOOPBACK if host in LOOPBACK else None, cors or ())
    options.announce("serve", artifacts=artifacts, lora=lora, host=host, port=port, max_batch=max_batch, queue=queue,
                     memory=memory, state_dir=state_dir, disk=disk, max_new_tokens=max_new_tokens, deadline=deadline,
                     stall=stall, speculate=speculate, drain=drain, device=device, threads=threads)  # fmt: skip
    with listen(host, port) as listener:  # a port in use is found before anything is loaded
        models, found = [], {name: prepared(model) for name, model in named.items()}
        with progress("loading", len(found), "steps") as advance:
            for name, artifact in found.items():
                models.extend(open_models(
                    name, artifact, adapters[name], max_batch=max_batch, memory=budget // len(named),
                    queue=queue, state_dir=state_dir / name if state_dir else None, disk=space // len(named),
                    device=device, threads=threads, longest=max_new_tokens, deadline=deadline, stall=bound,
                    speculate=speculate,
                ))  # fmt: skip
                advance(1)
        if host not in LOOPBACK and api_key_file is None:
            warn(f"anyone who can reach {host} can use this server: --api-key-file FILE asks for a key")
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}"
        served = [model.name for model in models]
        options.finish_json(json, {"address": address, "models": served})
        more = f", {format_bytes(space)} in {state_dir}" if state_dir else ""
        states = f"{format_bytes(budget)} in memory{more}"
        card("serving", [("models", ", ".join(served)), ("page", address), ("API", f"{address}/v1"),
                         ("states", states), ("stop", "Ctrl-C")])  # fmt: skip
        run(make_app(models, access, patience=drain), listener, drain)


def _names(artifacts: list[str]) -> dict[str, Path]:
    """Return each artifact by its name, which is that of its directory if none is given.

    Raises:
        UsageError: Two have the same name, or one has a name that cannot be that of a directory for its states.
    """
    found: dict[str, Path] = {}
    for text in artifacts:
        name, separator, place = text.partition("=")
        if not separator or "/" in name or Path(text).exists():
            name, place = Path(text).resolve().name, text
        if name in ("", ".", ".."):
            raise UsageError(f"{text!r} has no name before the =", hint="give one: chat=DIRECTORY")
        if name in found:
            raise UsageError(f"two artifacts are named {name}", hint="give them names: chat=DIRECTORY code=DIRECTORY")
        found[name] = options.path(place)
    return found


def _adapters(given: list[str], models: Collection[str]) -> dict[str, dict[str, Path]]:
    """Return the adapters of each model by their names.

    Raises:
        UsageError: One has no name or the name of another one, or its model is not served or not named.
    """
    found: dict[str, dict[str, Path]] = {model: {} for model in models}
    for text in given:
        named, separator, place = text.partition("=")
        model, _, name = named.rpartition(":")
        model = model or (next(iter(found)) if len(found) == 1 else "")
        if not (separator and name and place and model in found):
            raise UsageError(f"--lora {text!r} names no adapter of a model",
                             hint=f"give MODEL:NAME=ADAPTER with a model of {', '.join(found)}")  # fmt: skip
        if name in found[model] or f"{model}:{name}" in found:
            raise UsageError(f"two models are named {model}:{name}", hint="give the adapter another name")
        found[model][name] = options.path(place)
    return found


def _bytes(text: str) -> int:
    """Return a number of bytes that is written like 4GB.

    Raises:
        UsageError: It is written in another way.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not found:
        raise UsageError(f"{text!r} is no size", hint="give a number of bytes, such as 500MB or 4GB")
    return int(float(found[1]) * _UNITS[found[2]])


def _seconds(text: str) -> float:
    """Return a number of seconds that is written like 100ms or 0.1s.

    Raises:
        UsageError: It is written in another way, or is 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(m?)s", text.strip().lower())
    seconds = float(found[1]) / (1000 if found[2] else 1) if found else 0.0
    if not seconds:
        raise UsageError(f"--stall {text!r}", hint="give a time such as 100ms or 1s")
    return seconds
