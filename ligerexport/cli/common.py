"""What the verbs share: options, the line that says what will be done, plain facts for cards and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from ligerexport.console import data_json, format_bytes, say, set_quiet
from ligerexport.errors import UsageError
from ligerexport.model.config import Slots

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


def parse_slots(text: str | None) -> Slots | None:
    """Read `peak_use=32,novelty=32`; `none` is no slots.

    Raises:
        UsageError: It has another form.
    """
    if text is None:
        return None
    return _counts(text, f"--slots {text}", "write SCORE=COUNT,... as in --slots peak_use=32,novelty=32")


def parse_layer_memory(texts: Sequence[str] | None) -> tuple[tuple[int, int, Slots], ...] | None:
    """Read several of `7,18:window=240,peak_use=32`: layers, then their window and pools.

    Raises:
        UsageError: One has another form.
    """
    if texts is None:
        return None
    memory = []
    for text in texts:
        given = f"--layer-memory {text}"
        hint = "write LAYER,...:window=TOKENS,SCORE=COUNT,... as in --layer-memory 7,18:window=240,recent_use=112"
        layers, _, sizes = text.partition(":")
        pools = _counts(sizes, given, hint)
        numbers = [part.strip() for part in layers.split(",")]
        if not all(number.isdigit() for number in numbers) or [n for n, _ in pools].count("window") != 1:
            raise UsageError(given, hint=hint)
        slots = tuple(pool for pool in pools if pool[0] != "window")
        memory += [(int(number), dict(pools)["window"], slots) for number in numbers]
    return tuple(memory)


def _counts(text: str, given: str, hint: str) -> Slots:
    """Read `NAME=COUNT,...`."""
    pools = []
    for part in _parts(text):
        name, found, count = part.partition("=")
        if not found or not count.strip().isdigit():
            raise UsageError(given, hint=hint)
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


def parse_sms(text: str | None) -> tuple[int, ...] | None:
    """Read `86,8.9`.

    Raises:
        UsageError: It has another form.
    """
    if text is None:
        return None
    numbers = [part.strip().replace(".", "") for part in _parts(text)]
    if not numbers or not all(number.isdigit() for number in numbers):
        raise UsageError(f"--sm {text}", hint="write compute capabilities, as in --sm 87,89")
    return tuple(map(int, numbers))


def _parts(text: str) -> list[str]:
    return [] if text.strip() in ("", "none") else text.split(",")


def crossover_row(tokens: int | None) -> tuple[str, str]:
    """Return the card's row about the length from which the Transformer's cache is larger."""
    return "KV cache larger", f"from {tokens:,} tokens on" if tokens else "never: the state grows as fast"


def bytes_row(label: str, count: int) -> tuple[str, str]:
    """Return a row with bytes for people."""
    return label, format_bytes(count)
