"""Files of text: the content decides the format, and files without text are refused by name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy

from ligerexport.errors import UsageError
from ligerexport.text.corpus import read_tokens, text_files
from ligerexport.text.datafiles import DataError, files_in, read_rows
from ligerexport.text.tokenizer import TextModel
from ligerexport.train.records import read_records

ROWS = [{"prompt": 'say "hi",\nthere', "completion": "über 🦊"}, {"prompt": "NA", "completion": "01"}]
JSONL = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in ROWS)
TABLE = 'prompt,completion\n"say ""hi"",\nthere",über 🦊\nNA,01\n'


def arrow(kind: str) -> Callable[[], bytes]:
    def made() -> bytes:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table, sink = pa.Table.from_pylist(ROWS), pa.BufferOutputStream()
        if kind == "parquet":
            parquet.write_table(table, sink)
        else:
            with getattr(pa.ipc, f"new_{kind}")(sink, table.schema) as writer:
                writer.write_table(table)
        return sink.getvalue().to_pybytes()

    return made


def zstd(content: bytes) -> bytes:
    pa = pytest.importorskip("pyarrow")
    return pa.Codec("zstd").compress(content, asbytes=True)


@pytest.mark.parametrize("name", ["a", "A.JSONL", "a.txt", "a.csv", "a.bin"])
@pytest.mark.parametrize(
    "content",
    [
        JSONL.encode(), b"\xef\xbb\xbf" + JSONL.encode(), JSONL.encode("utf-16"), JSONL.replace("\n", "\r\n").encode(),
        json.dumps(ROWS).encode(), json.dumps(ROWS, indent=2).encode(), TABLE.encode(), TABLE.encode("utf-8-sig"),
        TABLE.replace("prompt,completion", "prompt\tcompletion").replace('",ü', '"\tü').replace("NA,", "NA\t").encode(),
        gzip.compress(JSONL.encode()), bz2.compress(TABLE.encode()), lzma.compress(JSONL.encode()),
        lambda: zstd(JSONL.encode()), arrow("parquet"), arrow("stream"), arrow("file"),
        lambda: gzip.compress(arrow("parquet")()),
    ],
    ids=["jsonl", "mark", "utf16", "crlf", "array", "indented", "csv", "csv-mark", "tsv", "gz", "bz2", "xz", "zst",
         "parquet", "stream", "arrow", "parquet-gz"],
)  # fmt: skip
def test_the_content_says_what_a_file_is(tmp_path: Path, name: str, content: Any) -> None:
    content = content() if callable(content) else content
    file = tmp_path / name
    file.write_bytes(content)
    assert [row for _, row in read_rows(file)] == ROWS


@pytest.mark.parametrize("name", ["a", "A.TXT", "a.md", "a.txt.gz"])
@pytest.mark.parametrize("text", ["Plain, with commas\nand {braces}", "[a](link) first\n", "text, prompt and more\n"])
def test_plain_text_stays_plain(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.replace("\n", "\r\n").encode())
    assert list(read_rows(file)) == [(str(file), {"text": text})]


def packed(member: str) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(member, "x")

    return write


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"%PDF-1.7 text", "is a PDF document"),
        (packed("word/document.xml"), "is a Word document"),
        (packed("xl/workbook.xml"), "is an Excel sheet"),
        (packed("train.jsonl"), "is a ZIP archive"),
        (b"\x89PNG\r\n", "is an image"),
        (b"a\0b", "is a binary file, or UTF-16"),
        (gzip.compress(b"x" * 9000)[:20], "is damaged"),
        (b"BZh9" + b"x" * 20, "is damaged"),
        (zstd(b"x" * 9000)[:12], "is damaged"),
        (gzip.compress(b"%PDF-1.7"), "is a PDF document"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"\xff\xfea\0\x00\xd8b\0", "is damaged"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r":2 is not UTF-8: its byte 14"),
        (b"fine\ncaf\xe9", r":2 is not UTF-8: its byte 4"),
        (b'[{"text": "a"}, {"text": "\\udc00"}]', r"entry 2 has \\udc00 alone"),
        (b"prompt,completion\na,b\nc\n", r":3 has 1 values for the 2 names"),
        (b'prompt,completion\na,"b\n', r":2 is not a row of a table"),
        (b"PAR1" + b"x" * 20, "is damaged after row 0"),
        (b"ARROW1\0\0" + b"x" * 20, "is damaged after row 0"),
        (b'{"text": \n', r":1 is not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # compressed bytes say when they were made
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, content: Any, message: str) -> None:
    pytest.importorskip("pyarrow")
    file = tmp_path / "given"
    content(file) if callable(content) else file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(file))
    assert caught.value.message.startswith(str(file)) and caught.value.hint


@pytest.mark.skipif(not shutil.which("iconv"), reason="needs iconv")
def test_the_hint_for_another_encoding_can_be_pasted(tmp_path: Path) -> None:
    file = tmp_path / "it's a file.txt"
    file.write_bytes("caf\xe9 \u201cquoted\u201d".encode("cp1252"))
    with pytest.raises(DataError) as caught:
        list(read_rows(file))
    command = str(caught.value.hint)
    subprocess.run(command[command.index("iconv") :], shell=True, cwd=tmp_path, check=True)
    assert [row for _, row in read_rows(tmp_path / "it's a file.utf8")] == [{"text": "caf\xe9 \u201cquoted\u201d"}]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_called_one_and_no_name_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    for read in (lambda: read_records([pipe]), lambda: text_files([pipe])):
        with pytest.raises(UsageError, match="pipe is a pipe or a device"):
            read()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no file or directory ''"):
        read_records([""])


def test_a_directory_is_read_in_any_case_and_names_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".git").mkdir()
    for name in ("a.JSONL", "b.csv.GZ", "rows", "LICENSE", "c.Txt", "d.pdf", ".git/x.txt", "state.json", "e.bin"):
        content = JSONL.encode() if name in ("a.JSONL", "rows") else b"some words"
        (tmp_path / name).write_bytes(gzip.compress(TABLE.encode()) if name.endswith("GZ") else content)
    assert [file.name for file in files_in(tmp_path)] == ["a.JSONL", "b.csv.GZ", "c.Txt", "rows"]
    assert "3 files" in (said := capsys.readouterr().err) and "LICENSE" in said
    assert len(read_records([tmp_path])) == 7


def test_reading_writes_nothing_into_the_home(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(arrow("parquet")())
    (tmp_path / "home").mkdir()
    code = f"from ligerexport.train.records import read_records; print(len(read_records(['{tmp_path}/rows.parquet'])))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment | {"HOME": str(tmp_path / "home")},
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "2\n" and not list((tmp_path / "home").rglob("*")), done.stderr


def test_prose_comes_from_texts_and_from_rows_that_have_a_text(tmp_path: Path) -> None:
    toy.write_files(tmp_path)
    text = TextModel(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "A.TXT").write_text("\ufeffone")
    (tmp_path / "rows").write_text('{"text": "two"}\n{"text": "three"}\n')
    ids = read_tokens(text_files([tmp_path / "in", tmp_path / "rows"]), text)
    assert ids.count(toy.EOS) == 3 and text.decode(ids) == "onetwothree"
    (tmp_path / "chats").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UsageError, match="chats:1 has no column 'text'"):
        read_tokens([tmp_path / "chats"], text)
    (tmp_path / "x.pdf").write_bytes(b"%PDF-1.4")
    with pytest.raises(DataError, match="is a PDF document"):
        read_tokens([tmp_path / "x.pdf"], text)
