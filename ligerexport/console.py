"""How the commands print: data goes to stdout, everything else to stderr.

rich handles colour, width and `NO_COLOR`. Long work takes `progress` as an
argument, so that library code stays silent by default.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import StringIO
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ligerexport.errors import LigerError

Advance = Callable[[float], None]
Unit = Literal["bytes", "steps"]

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, highlight=False)

_FIRST, _EVERY = 2.0, 10.0
"""Seconds until a phase first says how far it is, and least seconds to the next time, where stderr is no terminal."""
_UNBOUNDED = 1 << 20
"""Width of a table, in characters, where no terminal cuts its lines."""


class ProgressFactory(Protocol):
    """What long work accepts as `progress`: it opens one phase and returns a function that advances it."""

    def __call__(
        self, description: str, total: float | None = None, unit: Unit = "bytes"
    ) -> AbstractContextManager[Advance]: ...


def silent(description: str, total: float | None = None, unit: Unit = "bytes") -> AbstractContextManager[Advance]:
    """Report nothing; this is the default wherever `progress` is an argument."""
    return nullcontext(lambda amount: None)


def set_quiet(quiet: bool = True) -> None:
    """Silence messages on stderr. Data and errors are still printed."""
    err.quiet = quiet


def say(message: str) -> None:
    """Print a message of one line."""
    err.print(Text(message), soft_wrap=True)


def warn(message: str) -> None:
    """Print one line that the user should read, although the work continues."""
    err.print(Text.assemble(("warning: ", "yellow"), message), soft_wrap=True)


def data(text: str, *, end: str = "\n") -> None:
    """Print text on stdout exactly as it is: no markup, no wrapping, no colour.

    Raises:
        LigerError: stdout is closed, or its encoding lacks some of the characters.
    """
    with _writable():
        out.file.write(text + end)
        out.file.flush()


def data_json(value: Any) -> None:
    """Print a value on stdout as one line of JSON, in ASCII if the encoding of stdout needs it."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(out.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value)
    data(text)


def data_table(table: Table | None = None) -> None:
    """Print a table on stdout, or an empty line."""
    with _writable():
        _print(out, table or "")


def _print(console: Console, table: Table | str) -> None:
    """Print a table, which is as wide as a terminal at most; in a file or a pipe, no line is wrapped."""
    if console.is_terminal:
        return console.print(table)
    whole = Console(file=StringIO(), width=_UNBOUNDED, highlight=False)
    whole.print(table)
    lines = whole.file.getvalue().splitlines()  # type: ignore[attr-defined]
    console.print(Text("\n".join(line.rstrip() for line in lines)), soft_wrap=True)


@contextmanager
def _writable() -> Iterator[None]:
    """Turn errors of writing to stdout into a `LigerError`."""
    if sys.stdout is None:
        raise LigerError("stdout is closed, and this command writes to it", hint="send it to a file, or to /dev/null")
    try:
        yield
    except UnicodeEncodeError as error:
        raise LigerError(
            f"stdout is in {out.encoding}, which does not have {error.object[error.start]!a}",
            hint="set PYTHONIOENCODING=utf-8, or a locale in UTF-8",
        ) from None


def card(title: str, rows: Sequence[tuple[str, str]], *, next_command: str | None = None) -> None:
    """Print the short summary that ends a command.

    Args:
        title: What was done, in a few words.
        rows: Label and value, in order.
        next_command: Command to type next; printed last, unwrapped so that it can be copied.
    """
    width = max(len(label) for label, _ in [*rows, ("next", "")])
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=width + 2)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(f"  {label}"), Text(value))
    err.print(Text(title, style="bold green"))
    _print(err, table)
    if next_command:  # outside the table, which would wrap it
        err.print(Text.assemble((f"  {'next':{width}}  ", "dim"), next_command), soft_wrap=True)


def print_error(error: LigerError) -> None:
    """Print an error and its hint, even when quiet."""
    quiet, err.quiet = err.quiet, False
    err.print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
    if error.hint:
        err.print(Text.assemble(("hint: ", "bold cyan"), error.hint), soft_wrap=True)
    err.quiet = quiet


@contextmanager
def no_bars() -> Iterator[None]:
    """Silence every tqdm bar, including those of libraries that have no option for it."""
    from tqdm.std import tqdm

    plain = tqdm.__init__

    def silent_init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs | {"disable": True})

    setattr(tqdm, "__init__", silent_init)  # noqa: B010
    try:
        yield
    finally:
        setattr(tqdm, "__init__", plain)  # noqa: B010


@contextmanager
def progress(description: str, total: float | None = None, unit: Unit = "bytes") -> Iterator[Advance]:
    """Show one long phase: a bar on a terminal; elsewhere a line now and then, and one at the end.

    Args:
        description: The phase, in a few words.
        total: Amount at which the phase is done; None if it is not known.
        unit: Unit of the amounts.

    Yields:
        A function that takes the amount done since its last call.
    """
    start, done = time.perf_counter(), 0.0

    def tell() -> float:
        seconds = time.perf_counter() - start
        say(f"{description}: {f'{done / total:.0%} after' if total and done else 'at work for'} {seconds:.0f} s")
        return max(_EVERY, seconds / 10)  # so that hours of work do not fill a log

    lines = nullcontext() if err.quiet or err.is_terminal else _repeated(tell)
    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = [TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn()]
    with Progress(*columns, console=err, transient=True, disable=err.quiet or not err.is_terminal) as bar, lines:
        task = bar.add_task(description, total=total)

        def advance(amount: float) -> None:
            nonlocal done
            done += amount
            bar.advance(task, amount)

        yield advance
    seconds = time.perf_counter() - start
    amount = f"{format_bytes(done)} in " if unit == "bytes" and done else ""
    say(f"{description}: {amount}{seconds:.1f} s")


@contextmanager
def _repeated(tell: Callable[[], float]) -> Iterator[None]:
    """Call a function now and then, while the body runs; it returns the number of seconds until the next call."""
    ended = threading.Event()

    def work() -> None:
        wait = _FIRST
        while not ended.wait(wait):
            wait = tell()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def format_bytes(count: float) -> str:
    """Return a number of bytes in decimal units."""
    if abs(count) < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
    count /= 1000
    return f"{count:.3g} GB" if abs(count) < 999.5 else f"{count:,.0f} GB"
