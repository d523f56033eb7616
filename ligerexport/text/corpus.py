"""Turn files and directories of plain text into one stream of tokens and windows of it, to measure or to fit on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ligerexport.errors import UsageError
from ligerexport.reading import as_path
from ligerexport.text.datafiles import PIPE_HINT, ending, read_rows
from ligerexport.text.tokenizer import TextModel

if TYPE_CHECKING:
    from torch import Tensor


def text_files(paths: Iterable[str | Path], option: str = "--text") -> list[Path]:
    """Return files as they are, and for each directory all `.txt` files below it, ordered by name.

    Args:
        paths: Files and directories.
        option: Option with which the user gave them, for hints.

    Raises:
        UsageError: A path does not exist, or a directory has no text.
    """
    files: list[Path] = []
    for path in map(as_path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if ending(file) == ".txt" and file.is_file())
            if not found:
                raise UsageError(f"no .txt file in {path}", hint=f"give files: {option} FILE")
            files += found
        elif path.is_file():
            files.append(path)
        elif path.exists():
            raise UsageError(f"{path} is a pipe or a device", hint=PIPE_HINT)
        else:
            raise UsageError(f"no file or directory {path}", hint=f"give plain text: {option} FILE_OR_DIRECTORY")
    return files


def end_of_text(text: TextModel) -> list[int]:
    """Return a list with the token that ends a text; an empty list if the model has none."""
    return [] if text.eos_id is None else [text.eos_id]


def read_tokens(files: Iterable[Path], text: TextModel) -> list[int]:
    """Return the tokens of all texts, each followed by the model's end-of-text token, if it has one.

    Raises:
        DataError, UsageError: As for `read_texts`.
    """
    end = end_of_text(text)
    return [token for content in read_texts(files) for token in [*text.encode(content, special=False), *end]]


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    """Yield all texts. A file is one text, or rows with the column `text`.

    Raises:
        DataError: A file is damaged, or is not text.
        UsageError: The rows have no text.
    """
    for file in files:
        for where, row in read_rows(file):
            content = row.get("text") if isinstance(row, dict) else None
            if not isinstance(content, str):
                raise UsageError(f"{where} has no column 'text'", hint="give plain text, or rows that have a text")
            yield content


def cut_windows(ids: Sequence[int], length: int, count: int, prefix: Sequence[int] = ()) -> Tensor:
    """Return windows `[n, length]` that do not overlap, spread evenly over the stream.

    Args:
        ids: Token ids of the stream.
        length: Number of tokens in a window, its prefix included.
        count: Largest number of windows.
        prefix: Ids that begin every text of this model, such as BOS.

    Raises:
        UsageError: The stream is shorter than one window.
    """
    import torch

    body = length - len(prefix)
    if len(ids) < body:
        raise UsageError(
            f"the text has {len(ids):,} tokens, one window has {length:,}",
            hint=f"give more text, or smaller windows: --length {1 << max(1, len(ids).bit_length() - 1)}",
        )
    stream = torch.tensor(ids[: len(ids) // body * body]).view(-1, body)
    windows = stream[:: max(1, len(stream) // count)][:count]
    return torch.cat([torch.tensor(list(prefix), dtype=torch.long).expand(len(windows), -1), windows], dim=1)
