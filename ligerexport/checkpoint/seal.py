"""Check that the weights of a converted or recovered checkpoint did not change since it was made.

Its files are often links to the source's, so overwriting the source changes them too. A separate file records the size,
time and hash of each. A file is hashed again only if its size or time changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ligerexport.errors import CheckpointError, quoted
from ligerexport.reading import read_json

SEAL = "ligerexport-weights.json"
"""Holds `{"files": {name: {"size", "mtime_ns", "sha256"}}}`, beside the weights."""
_BLOCK = 1 << 22


def write_seal(
    directory: Path,
    files: Sequence[Path],
    known: Mapping[str, str] | None = None,
    advance: Callable[[float], None] = lambda amount: None,
) -> None:
    """Record size, time and hash of a checkpoint's weight files.

    Args:
        files: The weight files, which may be links.
        known: Hashes of files that are already hashed, by name.
        advance: Called with the number of bytes that were hashed.
    """
    known = known or {}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        rows = pool.map(lambda file: _row(file, known.get(file.name), advance), files)
        _write(directory / SEAL, dict(zip([file.name for file in files], rows, strict=True)))


def check_seal(directory: Path, files: Sequence[Path]) -> None:
    """Refuse weights that differ from the record. Without a record, nothing is refused.

    Raises:
        CheckpointError: A file has other content, or is not in the record.
    """
    path = directory / SEAL
    if not path.is_file():
        return
    mend = f"convert the model again, or recover it again; if you changed the weights on purpose, delete {quoted(path)}"
    rows = read_json(path, CheckpointError, mend).get("files")
    if not isinstance(rows, dict) or any(not isinstance(row, dict) for row in rows.values()):
        raise CheckpointError(f"{path} is damaged", hint=mend)
    found = {}
    for file in files:
        row = rows.get(file.name, {})
        state = file.stat()
        same = (row.get("size"), row.get("mtime_ns")) == (state.st_size, state.st_mtime_ns) and "sha256" in row
        found[file.name] = row if same else _row(file)
        if found[file.name]["sha256"] != row.get("sha256"):
            raise CheckpointError(f"{file} has other weights than when it was made", hint=mend)
    if found != rows:
        with suppress(OSError):  # in a read-only place the file is hashed each time
            _write(path, found)


def _row(
    file: Path, digest: str | None = None, advance: Callable[[float], None] = lambda amount: None
) -> dict[str, Any]:
    state, hashed = file.stat(), hashlib.sha256()
    if digest is None:
        with file.open("rb") as source:
            while block := source.read(_BLOCK):
                hashed.update(block)
                advance(len(block))
    return {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": digest or hashed.hexdigest()}


def _write(path: Path, rows: Mapping[str, Any]) -> None:
    """Write the record atomically, so that two processes may do so at once."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps({"files": rows}, indent=2) + "\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
