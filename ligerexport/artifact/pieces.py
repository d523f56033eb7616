"""Hashes of large files in pieces, so that all cores share the work."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ligerexport.threads import default_threads

PIECE = 1 << 26
"""Bytes of a piece of a file that has a sha256 of its own."""


def sha256_pieces(file: Path) -> tuple[str, ...]:
    """Return the sha256 in hexadecimal of each `PIECE` bytes of a larger file, which several cores compute together."""

    def one(start: int) -> str:
        digest, left = hashlib.sha256(), PIECE
        with file.open("rb", buffering=0) as opened:
            opened.seek(start)
            while part := opened.read(min(left, 1 << 20)):
                digest.update(part)
                left -= len(part)
        return digest.hexdigest()

    size = file.stat().st_size
    with ThreadPoolExecutor(default_threads()) as pool:
        return tuple(pool.map(one, range(0, size, PIECE))) if size > PIECE else ()
