"""What the verbs share: options, settings of the command, tables, facts for cards and JSON."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from types import SimpleNamespace
from typing import Annotated, Any, TypeVar

import typer
from rich.table import Table
from rich.text import Text

from ligerexport.console import data_json, data_table, format_bytes, say, set_quiet
from ligerexport.errors import one_line
from ligerexport.threads import use_threads

settings = SimpleNamespace(debug=False, verbose=False)
"""Of the running command."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Say first what will be done, with every setting.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an older output; it stays until the new one is whole.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]


def begin(quiet: bool, debug: bool, verbose: bool = False) -> None:
    """Set up talk and errors for one command."""
    set_quiet(quiet)
    settings.debug, settings.verbose = debug, verbose


def announce(verb: str, **arguments: Any) -> None:
    """Say what will be done, with every argument resolved, where --verbose asks for it."""
    if not settings.verbose:
        return
    given = [f"{name}={plain(value)}" for name, value in arguments.items() if value is not None]
    say(f"{verb}: " + "  ".join(given))


def plain(value: Any) -> str:
    """Return a setting as it would be typed: pools as `score=count`, lists with commas, memories as their option."""
    if not isinstance(value, (tuple, list)):
        return str(value)
    if value and all(isinstance(x, (tuple, list)) and len(x) == 3 for x in value):
        return " ".join(f"{layer}:window={window},{plain(slots)}" for layer, window, slots in value)
    return ",".join("=".join(map(str, x)) if isinstance(x, (tuple, list)) else str(x) for x in value) or "none"


def finish_json(wanted: bool, result: dict[str, Any]) -> None:
    """Print the result as one line of JSON, if it is wanted."""
    if wanted:
        data_json(result)


def parts(text: str) -> list[str]:
    """Return what commas separate; `none` is nothing."""
    return [] if text.strip() in ("", "none") else text.split(",")


def crossover_row(tokens: int | None) -> tuple[str, str]:
    """Return the card's row about the length from which the Transformer's cache is larger."""
    return "KV cache larger", f"from {tokens:,} tokens on" if tokens else "never: the state grows as fast"


def bytes_row(label: str, count: int) -> tuple[str, str]:
    """Return a row with bytes for people."""
    return label, format_bytes(count)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(header))
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    data_table(table)


Threads = Annotated[int | None, typer.Option("--threads", help="Default: physical cores.")]
Verb = TypeVar("Verb", bound=Callable[..., None])


def computes(verb: Verb) -> Verb:
    """Let a verb run with the threads of its option `--threads`, and without the warnings of libraries."""

    @wraps(verb)
    def run(*args: Any, threads: int | None, **options: Any) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own say as much
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells of each attempt to reach the hub
        with use_threads(threads), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            verb(*args, threads=threads, **options)

    return run  # type: ignore[return-value]
