"""Mark special tokens in the content of messages, so that they are encoded as plain text.

A chat template gets the marked content, and its output keeps the marks. The template's own text is not marked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

_OPEN, _CLOSE = "\U000f0000", "\U000f0001"  # private-use characters
_ESCAPES = {"0": _OPEN, "1": _CLOSE}  # escapes of these two in content


def mark(value: Any, tokens: Iterable[str]) -> Any:
    """Return a JSON value with marks around the tokens in its texts; keys of objects do not change."""
    return _mark(value, re.compile("|".join([_OPEN, _CLOSE, *_longest_first(tokens)])))


def encode_marked(
    text: str, tokens: Iterable[str], encode: Callable[[str], list[int]], plain: Callable[[str], list[int]]
) -> list[int]:
    """Return the ids of a template's output for marked content.

    A template may cut a text within its marks. Lone marks are dropped, but the texts on both sides stay separate.

    Args:
        text: Output of the template.
        tokens: Tokens that may be marked.
        encode: Function from a text with special tokens to ids.
        plain: Function from a text to ids that recognises no special tokens.
    """
    inner = "|".join([*_ESCAPES, *_longest_first(tokens)])
    first, *rest = re.split(f"{_OPEN}({inner}){_CLOSE}|[{_OPEN}{_CLOSE}]", text)
    ids = encode(first) if first else []
    line = encode("\n") if rest else []
    for index, part in enumerate(rest):
        if not part:  # None stands for a lone mark
            continue
        part, encoded = (part, encode) if index % 2 else (_ESCAPES.get(part, part), plain)
        after = encoded("\n" + part)  # a tokenizer may put a space before the beginning of a text
        ids += after[len(line) :] if after[: len(line)] == line else encoded(part)
    return ids


def is_marked(text: str) -> bool:
    """Return whether a template's output has marks."""
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
