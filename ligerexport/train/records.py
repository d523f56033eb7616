"""Read text to learn from: files, directories, data sets of the hub. `data` turns it into tokens.

A record of any form is a conversation or a text, with the file and line that it came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ligerexport.errors import MissingDependency, UsageError
from ligerexport.text.datafiles import ENDINGS, PIPE_HINT, DataError, files_in, read_rows

FORMS = (
    '{"messages": [{"role": "user", "content": "..."}, ...]}',
    '{"conversations": [{"from": "human", "value": "..."}, ...]}',
    '{"prompt": "...", "response": "..."}',
    '{"prompt": "...", "completion": "..."}',
    '{"instruction": "...", "input": "...", "output": "..."}',
    '{"text": "..."}',
    '{"text": "...", "learn": [[begin, end], ...]}',
)
"""Accepted forms of a line in a JSONL file and of a row in a table or data set."""

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
_ROLES |= {"developer": "system", "function": "tool"}
_ROLES |= {role: role for role in ("user", "assistant", "system", "tool")}
_PAIRS = (("prompt", "response", ""), ("prompt", "completion", ""), ("instruction", "output", "input"))
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING = re.compile(
    r"<(think|thinking|reasoning)>|<\|begin_of_thought\|>|think(ing)? step[ -]by[ -]step", re.IGNORECASE
)
_LOOKED_AT = 1000
"""Number of records in which chains of thought are looked for."""
_UNREAD = ("tool_calls", "function_call")


@dataclass(frozen=True)
class Record:
    """A conversation or a text.

    Attributes:
        where: File and line, for messages.
        turns: Role and content of each turn; empty for a text.
        text: The text; empty for a conversation.
        learned: Characters at which the answers in a text begin and end; None if all of it is to be learned.
        alone: Whether the turns are one prompt and its answer, which need no chat template.
    """

    where: str
    turns: tuple[tuple[str, str], ...] = ()
    text: str = ""
    learned: tuple[tuple[int, int], ...] | None = None
    alone: bool = False


def read_records(sources: Sequence[str | Path]) -> list[Record]:
    """Read all sources, in order.

    Args:
        sources: Files, directories of files, or names of data sets on the hub (`owner/name` or `owner/name:split`).

    Raises:
        DataError: There is nothing to read, or a line is damaged or in no form of `FORMS`; the error names both.
        UsageError: There is no such source.
        MissingDependency: A data set of the hub needs the `recover` extra.
    """
    records = [record for source in sources for record in _read(source)]
    if not records:
        names = ", ".join(map(str, sources)) or "no source"
        raise DataError(f"nothing to learn from in {names}", hint="give --data files that hold text or chats")
    return records


def reasoning_share(records: Sequence[Record]) -> float:
    """Return the share of records with the usual marks of a chain of thought; reasoning without marks is not found."""
    some = records[:: -(-len(records) // _LOOKED_AT)]
    marked = (any(map(_REASONING.search, (record.text, *(content for _, content in record.turns)))) for record in some)
    return sum(marked) / len(some)


def _read(source: str | Path) -> Iterator[Record]:
    path = Path(source).expanduser()
    if str(source) and (path.is_dir() or path.is_file()):
        for file in files_in(path) if path.is_dir() else [path]:
            yield from (as_record(row, where) for where, row in read_rows(file))
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:\w+)?", str(source)) and not str(source).lower().endswith(ENDINGS):
        yield from _read_hub(str(source))
    elif str(source) and path.exists():
        raise UsageError(f"{source} is a pipe or a device", hint=PIPE_HINT)
    else:
        raise UsageError(
            f"there is no file or directory {str(source)!r}",
            hint="check the path; a data set of the hub is written owner/name:split",
        )


def _read_hub(name: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise MissingDependency("datasets", extra="recover") from None
    repository, _, split = name.partition(":")
    try:
        rows: Iterable[Any] = datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # the library passes on every exception of its backends
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"there is no file {name} here, and no data set {repository} could be read ({reason})",
            hint="check the spelling and the network; a private data set needs: hf auth login",
        ) from None
    for number, row in enumerate(rows):
        yield as_record(row, f"{name}, row {number}")


def as_record(row: Any, where: str) -> Record:
    """Return an object's record.

    Raises:
        DataError: The object is in no form of `FORMS`.
    """
    if not isinstance(row, Mapping):
        raise _unexpected(where, f"holds {type(row).__name__}")
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if row.get(key) is not None:
            return Record(where, _turns(row[key], where, key, role, content))
    for prompt, answer, more in _PAIRS:
        if row.get(prompt) is not None and answer in row:
            return _pair(where, row, prompt, answer, more)
    if "text" in row:
        text = _text(row, "text", where)
        return Record(where, text=text, learned=_spans(row.get("learn"), len(text), where))
    raise _unexpected(where, f"has the keys {', '.join(map(str, row)) or '(none)'}")


def _turns(turns: Any, where: str, key: str, role: str, content: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise _unexpected(where, f"has no list of turns in '{key}'")
    found = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise _unexpected(where, f"has {type(turn).__name__} as turn {number}")
        names = (role, content) if role in turn else ("role", "content") if "role" in turn else ("from", "value")
        who = _ROLES.get(str(turn.get(names[0])).lower())
        if who is None:
            raise DataError(f"{where} has {names[0]} {turn.get(names[0])!r} in turn {number}",
                            hint=f"name each turn one of: {', '.join(_ROLES)}")  # fmt: skip
        if unread := next((name for name in _UNREAD if turn.get(name)), None):
            raise DataError(f"{where} has {unread} in turn {number}, which recovery cannot learn from",
                            hint="leave such conversations out, or put the calls into the content")  # fmt: skip
        found.append((who, _content(turn, names[1], f"{where}, turn {number},")))
    return tuple(found)


def _pair(where: str, row: Mapping[str, Any], prompt: str, answer: str, more: str = "") -> Record:
    if not isinstance(row[prompt], str) and row[answer] is not None:  # both are turns of one conversation
        said = row[answer] if not isinstance(row[answer], str) else [{"role": "assistant", "content": row[answer]}]
        return Record(where, _turns(row[prompt], where, prompt, "role", "content")
                      + _turns(said, where, answer, "role", "content"))  # fmt: skip
    question = _text(row, prompt, where)
    if more and row.get(more):
        question += "\n\n" + _text(row, more, where)
    return Record(where, (("user", question), ("assistant", _text(row, answer, where))), alone=True)


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where} has {'nothing' if value is None else type(value).__name__} as '{key}', "
                        "expected a text", hint="leave such rows out")  # fmt: skip
    return value


def _spans(spans: Any, size: int, where: str) -> tuple[tuple[int, int], ...] | None:
    """Return where answers begin and end in a text of `size` characters."""
    if spans is None:
        return None
    found: list[tuple[int, int]] = []
    for span in spans if isinstance(spans, Sequence) else [spans]:
        begin, end = span if isinstance(span, Sequence) and len(span) == 2 else (None, None)
        after = found[-1][1] if found else 0
        if not (isinstance(begin, int) and isinstance(end, int) and after <= begin < end <= size):
            raise DataError(f"{where} has {span!r} in 'learn', in a text of {size} characters",
                            hint="give begin and end of each answer, in order: [[10, 14], [52, 60]]")  # fmt: skip
        found.append((begin, end))
    return tuple(found)


def _content(turn: Mapping[str, Any], key: str, where: str) -> str:
    """Return the text of a turn; a list of parts is joined."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return _text(turn, key, where)
    for part in parts:
        if not (isinstance(part, str) or (isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PARTS)):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"{where} has a part of the kind {kind} in '{key}', expected only text",
                            hint="leave such conversations out")  # fmt: skip
    return "".join(part if isinstance(part, str) else _text(part, "text", where) for part in parts)


def _unexpected(where: str, found: str) -> DataError:
    return DataError(f"{where} {found}, expected one of: {'; '.join(FORMS)}", hint="rename the keys of the file")
