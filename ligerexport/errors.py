"""Every error that users are meant to read: what was found, a hint what to do, and the exit code of the CLI.

`ligerexport.console` prints them. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

Row = TypeVar("Row")


_MOST = 1000
"""Largest number of characters in a line: a message may quote the whole content of a file."""


def one_line(text: str) -> str:
    """Return text without line breaks, control characters and characters that a terminal cannot show."""
    text = (text if len(text) <= _MOST else f"{text[: _MOST - 4]} ...").replace("\n", " ")
    return text if text.isprintable() else "".join(x if x.isprintable() else repr(x)[1:-1] for x in text)


def quoted(word: object) -> str:
    """Return a path or another word of a command, quoted for a shell, so that a hint can be pasted."""
    return subprocess.list2cmdline([str(word)]) if os.name == "nt" else shlex.quote(str(word))


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, without the path of an `OSError`."""
    text = getattr(error, "strerror", None) or str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__


class LigerError(Exception):
    """Base of all errors that carry a message for the user.

    Args:
        message: One line: what was found and what was expected.
        hint: One line: what to do about it, preferably a command. Empty text counts as no hint.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message = one_line(message)
        super().__init__(message)
        self.message = message
        self.hint = one_line(hint) if hint else None


class UsageError(LigerError):
    """An argument or a setting is invalid."""

    exit_code = 2


class SourceError(LigerError):
    """A model could not be found, fetched or unpacked."""


class CheckpointError(LigerError):
    """A checkpoint directory is incomplete, damaged or in a format that is not supported."""


class ArtifactError(LigerError):
    """A built artifact is incomplete, damaged, or made for another version."""


class VerificationError(LigerError):
    """A conversion or a built graph differs from its model."""

    exit_code = 3


class MissingDependency(LigerError):
    """An optional dependency or a piece of hardware is missing.

    Args:
        what: The library or device, as the user knows it.
        extra: The extra of this package that installs it; None when no extra can.
        hint: Replaces the install command where pip cannot install what is missing.
    """

    exit_code = 4

    def __init__(self, what: str, *, extra: str | None = None, hint: str | None = None) -> None:
        super().__init__(
            f"{what} is needed for this and was not found",
            hint=hint or (f"pip install 'ligerexport[{extra}]'" if extra else None),
        )
        self.extra = extra


def close_matches(name: str, choices: Iterable[str]) -> str:
    """Return a hint for a name that is in no table: the nearest names, or all names if none is near."""
    choices = sorted(choices)
    near = get_close_matches(name.lower(), choices, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"choose from {', '.join(choices)}" if choices else "there is nothing to choose from"


def look_up(kind: str, name: str, table: Mapping[str, Row]) -> Row:
    """Return the row of a table with this name.

    Raises:
        UsageError: There is no such row; the hint names close matches.
    """
    if name not in table:
        raise UsageError(f"unknown {kind} '{name}'", hint=close_matches(name, table))
    return table[name]
