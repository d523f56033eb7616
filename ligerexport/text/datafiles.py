"""Read files of text in the formats of the library `datasets`; a file's content decides its format.

JSON, CSV, Parquet and Arrow files have rows; a plain text is one row with the column `text`. Each may be compressed.
Nothing is written, not even a cache, and rows are read one by one.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ligerexport.console import warn
from ligerexport.errors import LigerError, MissingDependency, quoted

Rows = Iterator[tuple[str, Any]]
"""Pairs of a row's place, for messages, and the row."""

COLUMNS = ("text", "messages", "conversations", "prompt,response", "prompt,completion", "instruction,output")
"""Names in the header of a table of text; a header has all names of one of these rows."""
_JSON = (".jsonl", ".ndjson", ".json")
_TABLES = (".csv", ".tsv")
ENDINGS = (*_JSON, *_TABLES, ".parquet", ".arrow", ".txt", ".md", ".text")
"""Endings of the files that are read in a directory, in upper or lower case, compressed or not."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

PIPE_HINT = "a file is read more than once: write the pipe's content to a file first"
_HEAD = 1 << 14
_MARKS = ((b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig"))
_OTHERS = (
    (b"%PDF", "a PDF document"), (b"\xd0\xcf\x11\xe0", "an old Office document"), (b"{\\rtf", "a rich text document"),
    (b"7z\xbc\xaf", "a 7z archive"), (b"Rar!", "a RAR archive"), (b"SQLite format 3", "an SQLite database"),
    (b"\x89HDF", "an HDF5 file"), (b"\x89PNG", "an image"), (b"\xff\xd8\xff", "an image"), (b"GIF8", "an image"),
    (b"GGUF", "a model in GGUF"), (b"\x7fELF", "a program"), (b"version https://git-lfs", "a Git LFS pointer"),
)  # fmt: skip
_PACKED = {
    "word/": "a Word document", "xl/": "an Excel sheet", "ppt/": "a PowerPoint document", "mimetype": "an e-book or "
    "OpenDocument file", "archive/data.pkl": "a PyTorch file",
}  # fmt: skip
_OF_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json")  # files that the library saves beside rows
_NAME = re.compile(r"[a-z_][\w.-]*")


class DataError(LigerError):
    """A file to learn from is empty, damaged or in another form."""


def files_in(directory: Path) -> list[Path]:
    """Return the files below a directory with one of `ENDINGS`, or with rows and no ending, ordered by name.

    Hidden files are left out, and a warning counts all others.

    Raises:
        DataError: There is no such file.
    """
    found, others = [], []
    for file in sorted(directory.rglob("*")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(directory).parts):
            continue
        if ending(file) in ENDINGS or (not file.suffix and _holds_rows(file)):
            found += [] if file.name in _OF_DATASETS else [file]
        else:
            others.append(file)
    if not found:
        raise DataError(f"no text in {directory}", hint=f"give files that end in {', '.join(ENDINGS)}")
    if others:
        are = "file is" if len(others) == 1 else "files are"
        warn(f"{len(others)} {are} not read in {directory}, such as {others[0].relative_to(directory)}")
    return found


def read_rows(file: Path) -> Rows:
    """Yield the rows of a file.

    Raises:
        DataError: The file is damaged, not UTF-8, or not text; the error names the file and, if possible, the line.
        MissingDependency: Parquet, Arrow and Zstandard need the `recover` extra.
    """
    try:
        head = _head(file)
        kind = _kind(file, head)
        if kind in ("parquet", "arrow"):
            yield from _table(file, kind)
            return
        encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
        with _open(file) as stream:
            lines = _lines(stream, file, encoding)
            if kind == "json":
                yield from _json(lines, file)
            elif kind == "text":
                text = "".join(lines).replace("\r\n", "\n").replace("\r", "\n")
                if text.strip():
                    yield str(file), {"text": text}
            else:
                yield from _csv(lines, file, kind)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "errno", None) is not None:  # from the system, not from a decompressor
            raise
        raise DataError(f"{file} is damaged: {error}", hint="copy or download it again") from None


def _zstd(file: Path) -> Any:
    return io.BufferedReader(_pyarrow().input_stream(str(file), compression="zstd"))


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise MissingDependency("pyarrow", extra="recover") from None
    return pyarrow


_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open, b"\x28\xb5\x2f\xfd": _zstd,
}  # fmt: skip


def _open(file: Path) -> IO[bytes]:
    """Open a file and decompress it."""
    stream = file.open("rb")
    head = stream.read(8)
    for magic, opener in _OPENERS.items():
        if head.startswith(magic):
            stream.close()
            return opener(file)  # type: ignore[no-any-return]
    stream.seek(0)
    return stream


def _head(file: Path) -> bytes:
    with _open(file) as stream:
        return stream.read(_HEAD)


def ending(file: Path) -> str:
    """Return the ending in lower case, without a compression's ending."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _holds_rows(file: Path) -> bool:
    try:
        return _kind(file, _head(file)) != "text"
    except (DataError, OSError, EOFError, zlib.error, lzma.LZMAError):
        return False


def _kind(file: Path, head: bytes) -> str:
    """Return `parquet`, `arrow`, `json`, `text`, or the separator of a table's columns.

    Raises:
        DataError: The file is something else, which the message names.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if other := _other(file, head):
        raise DataError(f"{file} is {other}, not text",
                        hint="give text, JSON lines, CSV or Parquet; save other documents as text")  # fmt: skip
    kind = ending(file)
    text = head.decode(next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8"), errors="ignore")
    if re.match(r'\s*(\[\s*)?\{\s*"', text):
        return "json"
    return _separator(text.partition("\n")[0].strip(), kind) or ("json" if kind in _JSON else "text")


def _other(file: Path, head: bytes) -> str | None:
    """Return the kind of a file that is not text; None for text."""
    if head.startswith(b"PK\x03\x04"):
        try:
            names = zipfile.ZipFile(file).namelist()
        except (zipfile.BadZipFile, OSError):
            names = []
        return next(
            (what for start, what in _PACKED.items() if any(x.startswith(start) for x in names)), "a ZIP archive"
        )
    if head[257:262] == b"ustar":
        return "a tar archive"
    if known := next((what for magic, what in _OTHERS if head.startswith(magic)), None):
        return known
    if b"\0" in head and not head.startswith(tuple(mark for mark, _ in _MARKS)):
        return "a binary file, or UTF-16 without a byte order mark"
    return None


def _separator(header: str, kind: str) -> str | None:
    """Return the separator of a header's names; None if it is not a header. A table may have any ending."""
    for separator in ",\t;|":
        names = [name.strip().strip('"') for name in header.split(separator)]
        plain = len(names) > 1 and all(_NAME.fullmatch(name) for name in names)
        if (plain or kind in _TABLES) and any(set(row.split(",")) <= set(names) for row in COLUMNS):
            return separator
    return {".csv": ",", ".tsv": "\t"}.get(kind)


def _lines(stream: IO[bytes], file: Path, encoding: str) -> Iterator[str]:
    """Yield the lines with their line ends.

    Raises:
        DataError: A line is not in this encoding.
    """
    hint = ("if it is in Windows' western encoding: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {quoted(file)} > {quoted(f'{file.stem}.utf8')}")  # fmt: skip
    if encoding.startswith("utf-8"):
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}:{number} is not UTF-8: its byte {error.start + 1} cannot be read", hint=hint
                ) from None
        return
    try:
        yield from io.TextIOWrapper(stream, encoding, newline="\n")
    except UnicodeError as error:
        raise DataError(f"{file} is damaged: {error}", hint="copy or download it again") from None


def _json(lines: Iterator[str], file: Path) -> Rows:
    """Yield the rows of JSON lines, of an array, or of one object over several lines."""
    first = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        if first and line.lstrip().startswith("["):
            for index, entry in enumerate(_parse("".join([line, *lines]), str(file)), 1):
                where = f"{file}, entry {index}"
                yield where, _whole(entry, where)
            return
        try:
            row = _parse(line, where)
        except DataError:
            if not first:
                raise
            line += "".join(lines)
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise
        yield where, _whole(row, where) if "\\u" in line else row
        first = False


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = 'write one object per line, such as {"text": "..."} or {"messages": [...]}'
        raise DataError(f"{where} is not JSON: {error}", hint=hint) from None


def _whole(value: Any, where: str) -> Any:
    """Return a value after checking its texts for unpaired surrogates.

    Raises:
        DataError: A text has one, as programs that cut text at a fixed length leave it.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{where} has {half} alone, which is half of a character",
                        hint="write the character itself, or both halves") from None  # fmt: skip
    return value


def _csv(lines: Iterator[str], file: Path, separator: str) -> Rows:
    csv.field_size_limit((1 << 31) - 1)  # the limit of one text
    rows = csv.reader(lines, delimiter=separator, strict=True)
    header: list[str] = []
    try:
        while True:
            where = f"{file}:{rows.line_num + 1}"
            row = next(rows, None)
            if row is None:
                return
            if header and row:
                if len(row) != len(header):
                    raise DataError(f"{where} has {len(row)} values for the {len(header)} names of the header",
                                    hint="quote values that contain the separator or a line break")  # fmt: skip
                yield where, dict(zip(header, row, strict=True))
            header = header or [name.strip() for name in row]
    except csv.Error as error:
        raise DataError(f"{where} is not a row of a table: {error}", hint="double the quotes inside quotes") from None


def _table(file: Path, kind: str) -> Rows:
    pyarrow, number = _pyarrow(), 0
    from pyarrow import ipc, parquet

    try:
        with _open(file) as stream:
            plain = isinstance(stream, io.BufferedReader) and stream.seekable()
            source = stream if plain else io.BytesIO(stream.read())
            if kind == "parquet":
                batches = parquet.ParquetFile(source).iter_batches(1024)
            elif source.read(6) == b"ARROW1":
                reader = ipc.open_file(source)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                source.seek(0)
                batches = iter(ipc.open_stream(source))
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file} is damaged after row {number}: {error}", hint="copy or download it again") from None
