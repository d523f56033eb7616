"""Common parts of the verbs: options, the settings of the command, tables, and facts for cards and JSON."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, get_type_hints

import typer
from rich.table import Table
from rich.text import Text

from ligerexport.console import card, data_json, data_table, format_bytes, say, set_quiet
from ligerexport.errors import UsageError, one_line
from ligerexport.reading import as_path
from ligerexport.threads import use_threads

settings = SimpleNamespace(debug=False, verbose=False)
"""The settings of the running command."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an older output, once the new one is complete.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Number of threads; default: physical cores.")]


@dataclass(frozen=True)
class _Talk:
    """Options of every verb; verbs that only print facts have no `--verbose`."""

    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors on stderr.")] = False
    verbose: Annotated[bool, typer.Option("--verbose", help="First print what will be done and every setting.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False


def verb(*, verbose: bool = True, computes: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a verb.

    It gets the options of `_Talk`. A parameter annotated with a dataclass becomes one option per field, so that verbs
    can share options. Options that take a path refuse an empty one.

    Args:
        verbose: Whether the verb has `--verbose`.
        computes: Whether the verb has `--threads` and hides warnings of libraries.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        found = signature.parameters.values()
        groups: dict[str, Any] = {
            parameter.name: parameter.annotation for parameter in found if is_dataclass(parameter.annotation)
        }

        @wraps(function)
        def run(*args: Any, quiet: bool = False, verbose: bool = False, debug: bool = False, **given: Any) -> None:
            begin(quiet, debug, verbose)
            for name, group in groups.items():
                given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
            with computing(given.get("threads")) if computes else nullcontext():
                function(*args, **given)

        parameters = [x for one in found for x in (_options(one.annotation) if one.name in groups else [one])]
        parameters += [x for x in _options(_Talk) if verbose or x.name != "verbose"]
        for parameter in parameters:
            if "Path" in str(parameter.annotation):
                for info in parameter.annotation.__metadata__:
                    info.parser = path
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _options(group: Any) -> list[Parameter]:
    """Return the fields of a dataclass as parameters."""
    hints = get_type_hints(group, include_extras=True)
    return [Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
            for field in fields(group)]  # fmt: skip


def path(text: str | Path) -> Path:
    """Return the path of an option; an empty one is refused."""
    as_path(text)
    return Path(text)


@contextmanager
def computing(threads: int | None = None) -> Iterator[None]:
    """Use this many threads, and hide the warnings and progress bars of libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own bars replace them
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # otherwise it prints each attempt to reach the hub
    with use_threads(threads), warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


def begin(quiet: bool, debug: bool, verbose: bool = False) -> None:
    """Configure the output of one command."""
    set_quiet(quiet)
    settings.debug, settings.verbose = debug, verbose


def announce(verb: str, **arguments: Any) -> None:
    """With --verbose, print what will be done, with the value of every setting."""
    if not settings.verbose:
        return
    given = [f"{name}={plain(value)}" for name, value in arguments.items() if value is not None]
    say(f"{verb}: " + "  ".join(given))


def plain(value: Any) -> str:
    """Return a setting as a user would type it: pools as `score=count`, lists with commas, memories as their option."""
    if not isinstance(value, (tuple, list)):
        return str(value)
    if value and all(isinstance(x, (tuple, list)) and len(x) == 3 for x in value):
        return " ".join(f"{layer}:window={window},{plain(slots)}" for layer, window, slots in value)
    return ",".join("=".join(map(str, x)) if isinstance(x, (tuple, list)) else str(x) for x in value) or "none"


def finish_json(wanted: bool, result: dict[str, Any]) -> None:
    """Print the result as one line of JSON, if `wanted`."""
    if wanted:
        data_json(result)


def check_port(port: int | None) -> None:
    """Check a port before anything is loaded.

    Raises:
        UsageError: It is out of range.
    """
    if not 0 <= (port or 0) <= 65535:
        raise UsageError(f"--port {port} is out of range", hint="give 1 to 65535, such as --port 8080")


def parts(text: str) -> list[str]:
    """Split a text at its commas; `none` means no parts."""
    return [] if text.strip() in ("", "none") else text.split(",")


def crossover_row(tokens: int | None) -> tuple[str, str]:
    """Return the card's row with the length from which the Transformer's cache is larger."""
    return "KV cache larger", f"from {tokens:,} tokens on" if tokens else "never: the state grows as fast"


def finish_made(json: bool, title: str, facts: dict[str, Any], next_command: str | None) -> None:
    """Print facts about a result, as a card and, if requested, as JSON."""
    finish_json(json, facts)
    labels = {"path": "where", "weight_bytes": "weights", "exact_slots": "tokens per head"}
    rows = []
    for key, value in facts.items():
        if key == "kv_cache_larger_from":
            rows.append(crossover_row(value))
        elif value is not None:
            text = format_bytes(value) if key.endswith("bytes") else str(value)
            if key == "scores_explain":
                text = f"{value:.0%} of the variance"
            rows.append((labels.get(key, key.removesuffix("_bytes").replace("_", " ")), text))
    card(title, rows, next_command=next_command)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout; if no column has a name, without a header."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(header))
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    data_table(table)
