"""Questions about passages from a file of rows, and their split into two halves by passage."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ligerexport.errors import UsageError
from ligerexport.measure.evaluate.settings import HALVES
from ligerexport.reading import as_path
from ligerexport.text.datafiles import read_rows

ROW = 'write rows such as {"passage": "...", "question": "...", "answer": "..."}; a title may be added'


@dataclass(frozen=True)
class Question:
    """A question about a passage, with its answer."""

    passage: str
    question: str
    answer: str
    title: str = ""

    @property
    def half(self) -> str:
        """`dev` or `test`, by a hash of the passage alone: all questions about a passage are in the same half."""
        return HALVES[hashlib.sha256(self.passage.encode()).digest()[0] % 2]


def questions_file(path: str | Path) -> Path:
    """Return the file that a user named.

    Raises:
        UsageError: There is no such file.
    """
    file = as_path(path)
    if not file.is_file():
        raise UsageError(f"no file {file}", hint="give a file of JSON rows: --questions FILE")
    return file


def read_questions(file: Path, half: str | None = None) -> list[Question]:
    """Return the questions of a file in its order, without those that occur twice.

    Args:
        file: JSON, JSON lines, or another file with rows that have the columns `passage`, `question`, `answer` and, if
            they like, `title`.
        half: `dev` or `test` takes the questions whose passages are in that half; None takes all.

    Raises:
        DataError: The file is damaged or has no rows.
        UsageError: A row lacks a text, or there are no questions.
    """
    found: dict[Question, None] = {}
    for where, row in read_rows(file):
        texts: dict[str, str] = {}
        for name in Question.__dataclass_fields__:
            value = row.get(name) if isinstance(row, dict) else None
            value = "" if value is None and name == "title" else value
            if not isinstance(value, str) or not (value.strip() or name == "title"):
                raise UsageError(f"{where} has no text in '{name}'", hint=ROW)
            texts[name] = value.strip()
        found[Question(**texts)] = None
    chosen = [question for question in found if half in (None, question.half)]
    if not chosen:
        raise UsageError(f"{file} has no questions" + (f" in the half '{half}'" if found else ""), hint=ROW)
    return chosen
