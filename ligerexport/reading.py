"""Files that others wrote: JSON of any content, dataclasses with checked types, hashes, links out of a directory."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ligerexport.errors import LigerError, UsageError

Row = TypeVar("Row")

MOST = 2**53
"""Integers from this value on are not accepted as sizes, and JSON numbers no longer hold them exactly."""


def read_json(file: Path, kind: type[LigerError], hint: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        kind: Class of the error.
        hint: Hint of the error.

    Raises:
        LigerError: An error of class `kind`; the file is not JSON, or not an object.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise kind(f"{file} is not JSON: {error}", hint=hint) from None
    except OSError as error:
        raise kind(f"{file} cannot be read: {error.strerror}", hint=hint) from None
    if not isinstance(content, dict):
        raise kind(f"{file} holds no JSON object", hint=hint)
    return content


def from_plain(cls: type[Row], data: Any) -> Row:
    """Make a dataclass, and those in it, from plain data. Unknown keys are ignored.

    Raises:
        ValueError: A value is missing or does not have the type of its field.
    """
    return _convert(cls, data, cls.__name__)


_hints = lru_cache(maxsize=32)(get_type_hints)


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Return a value in the type of a hint."""
    if hint is Any:
        return value
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _any_of(inner, value, name)
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r:.60}")
        made = {}
        for entry in fields(hint):
            if entry.name in value:
                made[entry.name] = _convert(_hints(hint)[entry.name], value[entry.name], f"{name}.{entry.name}")  # type: ignore[arg-type]
            elif entry.default is MISSING and entry.default_factory is MISSING:
                raise ValueError(f"{name} has no {entry.name}")
        return hint(**made)  # type: ignore[operator]
    if origin is dict and isinstance(value, dict):
        return {key: _convert(inner[1], item, f"{name}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(inner[0], item, name) for item in value)
    if hint is float and type(value) in (int, float) and abs(value) < MOST:
        return float(value)
    if isinstance(hint, type) and type(value) is hint and not (isinstance(value, int) and abs(value) >= MOST):
        return value
    raise ValueError(f"{name} is {value!r:.60}")


def _any_of(hints: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and NoneType in hints:
        return None
    for hint in hints:
        if hint is not NoneType and (is_dataclass(hint) or get_origin(hint) or type(value) is hint):
            return _convert(hint, value, name)
    raise ValueError(f"{name} is {value!r:.60}")


def sha256(file: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def leads_away(file: Path, directory: Path, *others: Path) -> bool:
    """Return whether links lead from a file to a place outside a directory, and outside the others too."""
    places = (directory.resolve(), *(other.resolve() for other in others))
    try:
        found = file.resolve()
    except (OSError, RuntimeError):  # a link in a circle
        return True
    return not any(found.is_relative_to(place) for place in places)


def as_path(text: str | Path) -> Path:
    """Return a path that a user gave, with `~` expanded.

    Raises:
        UsageError: The path is empty, which would mean the current directory.
    """
    if not str(text):
        raise UsageError("a path is empty", hint="name a file or directory, or . for this directory")
    return Path(text).expanduser()


def give_back_memory() -> None:
    """Return memory that a library freed to the system: glibc keeps what a large file took while it was parsed."""
    import ctypes

    with suppress(AttributeError, OSError, TypeError):  # other C libraries, and Windows
        ctypes.CDLL(None).malloc_trim(0)
