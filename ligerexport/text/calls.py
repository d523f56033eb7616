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
    """A call of a function, or its beginning.

    Attributes:
        name: The function.
        arguments: A JSON object; empty text if it follows in pieces.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class Arguments:
    """A piece of the arguments of the last call.

    Attributes:
        text: The next characters of a JSON object.
    """

    text: str


Part = str | Call | Arguments


def form_of(template: str) -> Form | None:
    """Return the form that a chat template teaches; None if it has no tools, or teaches another one."""
    if "tools" not in template or "<function=" in template:
        return None
    if "<tool_call>" in template:
        return HERMES
    return LLAMA if '"parameters"' in template and "ipython" in template else None


class CallReader:
    """Splits a stream of text into text and calls. What has the form of a call but is none remains text.

    What begins as a call, with a name and an object of arguments, is one. The arguments then come as they are written,
    and are JSON only if the model keeps to it.

    Args:
        form: How the model writes calls.
        names: The functions.
        several: Whether an answer may have more than one call; if not, later ones are dropped.
    """

    def __init__(self, form: Form, names: Set[str], several: bool = True) -> None:
        self._form, self._names, self._several = form, names, several
        self._open, self._close = form.before.strip(), form.after.strip()
        known = "|".join(map(re.escape, sorted(names)))
        self._begin = re.compile(rf'{self._open}\s*{{\s*"name"\s*:\s*"({known})"\s*,\s*"{form.arguments}"\s*:\s*(?={{)')
        self._held, self._tried, self._calls, self._told = "", 0, 0, False
        self._object: _Object | None = None
        self._after: str | None = None

    def push(self, text: str) -> list[Part]:
        """Return the calls, and the text that cannot belong to a call."""
        self._held += text
        found: list[Part] = []
        while self._held and (self._in_call(found) or (self._tagged(found) if self._open else self._plain(found))):
            pass
        return [part for part in found if part != ""]

    def flush(self) -> list[Part]:
        """Return what was held back when the answer has ended."""
        held, self._held = self._held, ""
        if not self._open or held.lstrip().startswith(self._open):
            call = self._parse(held.strip().removeprefix(self._open))
            if call is not None:
                self._add(call, found := list[Part]())
                return found
        return [held] if held and not (self._calls and held.isspace()) else []

    def _add(self, call: Call, found: list[Part]) -> None:
        self._calls += 1
        if self._wanted:
            found.append(call)

    @property
    def _wanted(self) -> bool:
        """Whether the last call is one of those that an answer may have."""
        return self._calls == 1 or self._several

    def _in_call(self, found: list[Part]) -> bool:
        """Take what belongs to a call that has begun; return whether there was any."""
        if self._object is not None:
            end = self._object.end(self._held)
            piece, self._held = self._held[:end], "" if end is None else self._held[end:]
            if self._wanted:
                found.append(Arguments(piece))
            if end is not None:
                self._object, self._after = None, ""
        elif self._after is not None:
            self._after, self._held = self._after + self._held, ""
            if self._close and (at := self._after.find(self._close)) >= 0:
                self._held, self._after = self._after[at + len(self._close) :], None
        elif not self._told and (begin := self._begin.match(self._held)):
            self._add(Call(begin[1], ""), found)
            self._held, self._tried, self._object = self._held[begin.end() :], 0, _Object()
        else:
            return False
        return True

    def _plain(self, found: list[Part]) -> bool:
        """Hold an answer that begins with an object; other answers are text. Return whether there is more to take."""
        start = self._held.lstrip()
        if not self._told and (not start or start.startswith("{")):
            again, self._held = start != self._held, start
            return again
        found.append(self._held)
        self._held, self._told = "", True
        return False

    def _tagged(self, found: list[Part]) -> bool:
        """Hold what is between two tags, and the white space around it. Return whether there is more to take."""
        if self._calls:
            self._held = self._held.lstrip()
        at = self._held.find(self._open)
        if at < 0:
            keep = next(size for size in range(len(self._open), -1, -1) if self._held.endswith(self._open[:size]))
            cut = len(self._held[: len(self._held) - keep].rstrip())
            found.append(self._held[:cut])
            self._held = self._held[cut:]
            return False
        if at:
            found.append(self._held[:at].rstrip())
            self._held = self._held[at:]
            return True
        end = self._held.find(self._close, self._tried)
        if end < 0:
            return False
        call = self._parse(self._held[len(self._open) : end])
        self._tried = end + len(self._close)
        if call is not None:  # otherwise the tag may be a part of an argument
            self._add(call, found)
            self._held, self._tried = self._held[self._tried :], 0
        return True

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


class _Object:
    """Finds the end of a JSON object in a text that comes in pieces; of what is no JSON, the end of a line or a tag."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False

    def end(self, text: str) -> int | None:
        """Return where the object ends within the next piece; None if it goes on."""
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character not in '"\n'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return at + 1
            elif character == "<":
                return at
        return None
