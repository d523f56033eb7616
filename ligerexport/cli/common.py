"""What the verbs share: options, the line that says what will be done, plain facts for cards and JSON."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from ligerexport.console import data, format_bytes, say, set_quiet
from ligerexport.errors import UsageError

settings = SimpleNamespace(debug=False)
"""Of the running command."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an older output; it stays until the new one is whole.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]


def begin(quiet: bool, debug: bool) -> None:
    """Set up talk and errors for one command."""
    set_quiet(quiet)
    settings.debug = debug


def announce(verb: str, **arguments: Any) -> None:
    """Say what will be done, with every argument resolved."""
    given = [f"{name}={plain(value)}" for name, value in arguments.items() if value is not None]
    say(f"{verb}: " + "  ".join(given))


def plain(value: Any) -> str:
    """Return a setting as it would be typed: pools as `score=count`, lists with commas."""
    if isinstance(value, (tuple, list)):
        return ",".join("=".join(map(str, x)) if isinstance(x, (tuple, list)) else str(x) for x in value) or "none"
    return str(value)


def finish_json(wanted: bool, result: dict[str, Any]) -> None:
    """Print the result as one line of JSON, if it is wanted."""
    if wanted:
        data(json.dumps(result, ensure_ascii=False))


def parse_slots(text: str | None) -> tuple[tuple[str, int], ...] | None:
    """Read `peak_use=32,novelty=32`; `none` is no slots.

    Raises:
        UsageError: It has another form.
    """
    if text is None:
        return None
    pools = []
    for part in _parts(text):
        name, found, count = part.partition("=")
        if not found or not count.strip().isdigit():
            raise UsageError(f"--slots {text}", hint="write SCORE=COUNT,... as in --slots peak_use=32,novelty=32")
        pools.append((name.strip(), int(count)))
    return tuple(pools)


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Read `8,16`; `none` is no layers.

    Raises:
        UsageError: It has another form.
    """
    if text is None:
        return None
    parts = _parts(text)
    if not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"--keep-softmax {text}", hint="write layer numbers from 0, as in --keep-softmax 8,16")
    return tuple(int(part) for part in parts)


def _parts(text: str) -> list[str]:
    return [] if text.strip() in ("", "none") else text.split(",")


def crossover_row(tokens: int | None) -> tuple[str, str]:
    """Return the card's row about the length from which the Transformer's cache is larger."""
    return "KV cache larger", f"from {tokens:,} tokens on" if tokens else "never: the state grows as fast"


def bytes_row(label: str, count: int) -> tuple[str, str]:
    """Return a row with bytes for people."""
    return label, format_bytes(count)
