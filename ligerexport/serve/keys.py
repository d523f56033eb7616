"""Files of API keys, as the server and the chat with a server read them."""

from __future__ import annotations

from pathlib import Path

from ligerexport.errors import UsageError


def read_keys(file: Path) -> list[str]:
    """Return the keys of a text with one in each line; empty lines and lines that begin with # do not count.

    Raises:
        UsageError: The file has no key, or is no text.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8", hint="write one key in each line of a text") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"{file} has no API key", hint="write one key in each line")
    return keys
