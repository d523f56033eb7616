"""Where text to learn from is read: JSON lines, plain text, data sets of the hub. Tokens are `data`'s business.

Whatever the form, a record is a conversation or a text, and knows the file and line that it came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ligerexport.errors import LigerError, MissingDependency, UsageError

FORMS = (
    '{"messages": [{"role": "user", "content": "..."}, ...]}',
    '{"conversations": [{"from": "human", "value": "..."}, ...]}',
    '{"prompt": "...", "response": "..."}',
    '{"instruction": "...", "input": "...", "output": "..."}',
    '{"text": "..."}',
)
"""What a line of a JSONL file, or a row of a data set, may look like."""

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
_ROLES |= {role: role for role in ("user", "assistant", "system", "tool")}
_JSONL = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".md", ".text")


class DataError(LigerError):
    """A file to learn from is empty, damaged or in another form."""


@dataclass(frozen=True)
class Record:
    """A conversation or a text.

    Attributes:
        where: File and line, for messages.
        turns: Role and content of each turn; empty for a text.
        text: The text; empty for a conversation.
        alone: Whether the turns are one prompt and its answer, which need no chat template.
    """

    where: str
    turns: tuple[tuple[str, str], ...] = ()
    text: str = ""
    alone: bool = False


def read_records(sources: Sequence[str | Path]) -> list[Record]:
    """Read all sources, in order.

    Args:
        sources: Files, directories of files, or names of data sets on the hub (`owner/name` or `owner/name:split`).

    Raises:
        DataError: A line is damaged or in no form of `FORMS`, or there is nothing to read; names file and line.
        UsageError: There is no such source.
        MissingDependency: A data set of the hub needs the `recover` extra.
    """
    records = [record for source in sources for record in _read(source)]
    if not records:
        names = ", ".join(map(str, sources)) or "no source"
        raise DataError(f"nothing to learn from in {names}", hint="give --data files that hold text or chats")
    return records


def _read(source: str | Path) -> Iterator[Record]:
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (*_JSONL, *_TEXT) and file.is_file())
        if not files:
            raise DataError(f"no text in {path}", hint=f"files end in {', '.join((*_JSONL, *_TEXT))}")
        for file in files:
            yield from _read_file(file)
    elif path.is_file():
        yield from _read_file(path)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:\w+)?", str(source)) and not path.suffix.startswith((".json", ".txt")):
        yield from _read_hub(str(source))
    else:
        raise UsageError(
            f"there is no file or directory {source}", hint="a data set of the hub is written owner/name:split"
        )


def _read_file(file: Path) -> Iterator[Record]:
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: byte {error.start} cannot be read", hint=f"iconv -t utf-8 {file} > {file.stem}.utf8"
        ) from None
    if file.suffix not in _JSONL:
        if content.strip():
            yield Record(str(file), text=content)
        return
    if file.suffix == ".json" and content.lstrip().startswith("["):  # one array instead of lines
        rows = _parse(content, str(file))
        yield from (as_record(row, f"{file}, entry {number}") for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{file}:{number}"
            yield as_record(_parse(line, where), where)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}", hint=f"each line is one object, such as {FORMS[0]}") from None


def _read_hub(name: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise MissingDependency("datasets", extra="recover") from None
    repository, _, split = name.partition(":")
    try:
        rows: Iterable[Any] = datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # the library lets through whatever its backends raise
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"there is no file {name} here, and no data set {repository} could be read ({reason})",
            hint="check the spelling and the network; a private data set needs: hf auth login",
        ) from None
    for number, row in enumerate(rows):
        yield as_record(row, f"{name}, row {number}")


def as_record(row: Any, where: str) -> Record:
    """Return what one object says.

    Raises:
        DataError: It is in no form of `FORMS`.
    """
    if not isinstance(row, Mapping):
        raise _unexpected(where, f"holds {type(row).__name__}")
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if row.get(key) is not None:
            return Record(where, _turns(row[key], where, key, role, content))
    if "prompt" in row and "response" in row:
        return _pair(where, row, "prompt", "response")
    if "instruction" in row and "output" in row:
        return _pair(where, row, "instruction", "output", "input")
    if "text" in row:
        return Record(where, text=_text(row, "text", where))
    raise _unexpected(where, f"has the keys {', '.join(map(str, row)) or '(none)'}")


def _turns(turns: Any, where: str, key: str, role: str, content: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise _unexpected(where, f"has no list of turns in '{key}'")
    found = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise _unexpected(where, f"has {type(turn).__name__} as turn {number}")
        names = (role, content) if role in turn else ("role", "content") if "role" in turn else ("from", "value")
        if turn.get(names[0]) not in _ROLES:
            raise _unexpected(where, f"has {names[0]} {turn.get(names[0])!r} in turn {number}")
        found.append((_ROLES[turn[names[0]]], _text(turn, names[1], f"{where}, turn {number},")))
    return tuple(found)


def _pair(where: str, row: Mapping[str, Any], prompt: str, answer: str, more: str = "") -> Record:
    question = _text(row, prompt, where)
    if more and row.get(more):
        question += "\n\n" + _text(row, more, where)
    return Record(where, (("user", question), ("assistant", _text(row, answer, where))), alone=True)


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _unexpected(where, f"has {'nothing' if value is None else type(value).__name__} as '{key}'")
    return value


def _unexpected(where: str, found: str) -> DataError:
    return DataError(f"{where} {found}, expected one of: {'; '.join(FORMS)}", hint="rename the keys of the file")
