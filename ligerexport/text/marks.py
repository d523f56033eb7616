"""Marks around the special tokens that stand in the content of messages, so that they are encoded as the text they are.

A chat template sees the marked content, and its output keeps the marks. What it writes itself is not marked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

_OPEN, _CLOSE = "\U000f0000", "\U000f0001"  # characters for private use
_ESCAPES = {"0": _OPEN, "1": _CLOSE}  # how content spells these two


def mark(value: Any, tokens: Iterable[str]) -> Any:
    """Return a value of JSON with marks around the tokens in its texts; the keys of objects stay as they are."""
    return _mark(value, re.compile("|".join([_OPEN, _CLOSE, *_longest_first(tokens)])))


def encode_marked(
    text: str, tokens: Iterable[str], encode: Callable[[str], list[int]], plain: Callable[[str], list[int]]
) -> list[int]:
    """Return the ids of what a template made of marked content.

    A template may cut a text within its marks. Lone marks are dropped, and still keep what is around them apart.

    Args:
        text: What the template made.
        tokens: Those that may be marked.
        encode: Returns the ids of a text with special tokens.
        plain: Returns the ids of a text in which nothing is a special token.
    """
    inner = "|".join([*_ESCAPES, *_longest_first(tokens)])
    first, *rest = re.split(f"{_OPEN}({inner}){_CLOSE}|[{_OPEN}{_CLOSE}]", text)
    ids = encode(first) if first else []
    line = encode("\n") if rest else []
    for index, part in enumerate(rest):
        if not part:  # None stands for a lone mark
            continue
        part, encoded = (part, encode) if index % 2 else (_ESCAPES.get(part, part), plain)
        after = encoded("\n" + part)  # a tokenizer may put a space before the beginning of a text, which this is not
        ids += after[len(line) :] if after[: len(line)] == line else encoded(part)
    return ids


def is_marked(text: str) -> bool:
    """Return whether there are marks in what a template made."""
    return _OPEN in text or _CLOSE in text


def _longest_first(tokens: Iterable[str]) -> list[str]:
    return [re.escape(token) for token in sorted(tokens, key=len, reverse=True)]


def _mark(value: Any, found: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return found.sub(_wrap, value)
    if isinstance(value, dict):
        return {key: _mark(part, found) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_mark(part, found) for part in value]
    return value


def _wrap(match: re.Match[str]) -> str:
    escape = next((name for name, character in _ESCAPES.items() if character == match[0]), match[0])
    return _OPEN + escape + _CLOSE
