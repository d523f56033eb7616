"""Calls of functions in answers, in the forms that chat templates teach: their grammar, and the way back from text."""

from __future__ import annotations

import json
import re
from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """How a model writes a call: as a JSON object with the function's name and its arguments.

    Attributes:
        before, after: Text around the object.
        between: Text between two calls; None if an answer has one call only.
        arguments: Name of the arguments in the object.
    """

    before: str
    after: str
    between: str | None
    arguments: str


HERMES = Form("<tool_call>\n", "\n</tool_call>", "\n", "arguments")
"""Form of Hermes and Qwen."""
LLAMA = Form("", "", None, "parameters")
"""Form of Llama 3, whose answer is either a text or a call."""


@dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
        name: The function.
        arguments: A JSON object.
    """

    name: str
    arguments: str


def form_of(template: str) -> Form | None:
    """Return the form that a chat template teaches; None if it has no tools, or teaches another one."""
    if "tools" not in template or "<function=" in template:
        return None
    if "<tool_call>" in template:
        return HERMES
    return LLAMA if '"parameters"' in template and "ipython" in template else None


class CallReader:
    """Splits a stream of text into text and calls. What has the form of a call but is none remains text.

    Args:
        form: How the model writes calls.
        names: The functions.
        several: Whether an answer may have more than one call; if not, later ones are dropped.
    """

    def __init__(self, form: Form, names: Set[str], several: bool = True) -> None:
        self._form, self._names, self._several = form, names, several
        self._open, self._close = form.before.strip(), form.after.strip()
        self._held, self._tried, self._called, self._told = "", 0, False, False

    def push(self, text: str) -> list[str | Call]:
        """Return the calls that are complete, and the text that cannot belong to a call."""
        self._held += text
        return [part for part in (self._tagged() if self._open else self._plain()) if part]

    def flush(self) -> list[str | Call]:
        """Return what was held back when the answer has ended."""
        held, self._held = self._held, ""
        if not self._open or held.lstrip().startswith(self._open):
            call = self._parse(held.strip().removeprefix(self._open))
            if call is not None:
                return self._once(call)
        return [held] if held and not (self._called and held.isspace()) else []

    def _once(self, call: Call) -> list[str | Call]:
        first, self._called = not self._called, True
        return [call] if first or self._several else []

    def _plain(self) -> list[str | Call]:
        """Hold an answer that begins with an object; other answers are text."""
        start = self._held.lstrip()
        if not self._told and (not start or start.startswith("{")):
            return []
        out, self._held, self._told = self._held, "", True
        return [out]

    def _tagged(self) -> list[str | Call]:
        """Hold what is between two tags, and the white space around it."""
        found: list[str | Call] = []
        while True:
            if self._called:
                self._held = self._held.lstrip()
            at = self._held.find(self._open)
            if at < 0:
                keep = next(size for size in range(len(self._open), -1, -1)
                            if self._held.endswith(self._open[:size]))  # fmt: skip
                cut = len(self._held[: len(self._held) - keep].rstrip())
                found.append(self._held[:cut])
                self._held = self._held[cut:]
                return found
            found.append(self._held[:at].rstrip())
            self._held = self._held[at:] if at else self._held
            end = self._held.find(self._close, self._tried)
            if end < 0:
                return found
            call = self._parse(self._held[len(self._open) : end])
            self._tried = end + len(self._close)
            if call is not None:  # otherwise the tag may be a part of an argument
                found += self._once(call)
                self._held, self._tried = self._held[self._tried :], 0

    def _parse(self, text: str) -> Call | None:
        try:
            content = json.loads(re.sub(r"\s*;\s*\Z", "", text))
        except (ValueError, RecursionError):
            return None
        if not isinstance(content, dict) or not isinstance(content.get("name"), str):
            return None
        arguments = content.get(self._form.arguments, {})
        if content["name"] not in self._names or not isinstance(arguments, dict):
            return None
        return Call(content["name"], json.dumps(arguments, ensure_ascii=False))
