"""States on a disk: one file for each, which any process with the same model and owner may read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import LigerError
from ligerexport.serve.request import Space
from ligerexport.staging import remove_leftovers, staged_file

SUFFIX = ".state"
_HINT = "choose another --state-dir"


@dataclass(frozen=True)
class Stored:
    """A state on the disk: its tokens `[T]`, its file's size in bytes, and what users said about it.

    `answers` says whether it has the logits after its last token.
    """

    ids: np.ndarray
    answers: bool
    nbytes: int
    name: str
    pinned: bool


def digest(ids: np.ndarray) -> str:
    """Return the name of a prefix `[T]` int64, which ends with its length."""
    return named(hashing(ids), len(ids))


def hashing(ids: np.ndarray) -> hashlib.blake2b:
    """Return a hash of a prefix `[T]` int64, to which more tokens can be added."""
    return hashlib.blake2b(np.ascontiguousarray(ids, np.int64).data, digest_size=16)


def named(seen: hashlib.blake2b, length: int) -> str:
    """Return the name of a prefix from its hash."""
    return f"{seen.hexdigest()}-{length}"


def space_key(space: Space) -> str:
    """Return the name of the directory of a space's states."""
    owner = hashlib.blake2b(space.owner.encode(), digest_size=16).hexdigest() if space.owner else "all"
    return f"{owner}-{space.adapter}" if space.adapter else owner


def adapter_digest(directory: Path | str) -> str:
    """Return the name of the weights of an adapter, whatever it is called."""
    files = [Path(directory).expanduser() / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=16).hexdigest()


class Store:
    """The files of one model's states, `MODEL/SPACE/DIGEST.state`, with a `.json` beside those that a user marked.

    Args:
        directory: Directory of the states of all models.
        model: `Manifest.fingerprint`.

    Raises:
        LigerError: The directory cannot be written.
    """

    def __init__(self, directory: Path, model: str) -> None:
        self.directory = directory / model
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise LigerError(f"cannot write {self.directory}: {error.strerror}", hint=_HINT) from error

    def scan(self) -> Iterator[tuple[str, Stored]]:
        """Yield each space's key and state, the oldest first. Files that are no state of this model are removed."""
        for stage in self.directory.glob("*/.*.partial"):  # what a killed server was writing
            remove_leftovers(stage.with_name(stage.name[1:].rsplit(".", 2)[0]))
        files = sorted(self.directory.glob(f"*/*{SUFFIX}"), key=lambda file: file.stat().st_mtime_ns)
        for file in files:
            try:
                ids, answers = _read_ids(file)
            except Exception:  # safetensors raises several kinds for damaged files
                file.unlink(missing_ok=True)
                continue
            name, pinned = _read_marks(file.with_suffix(".json"))
            yield file.parent.name, Stored(ids, answers, file.stat().st_size, name, pinned)

    def write(self, space: str, ids: np.ndarray, snapshot: Snapshot) -> int:
        """Write a state whole or not at all; return the file's size in bytes.

        Raises:
            LigerError: The disk is full, or the file cannot be written.
        """
        file = self._file(space, digest(ids))
        replace(snapshot, ids=ids).save(file)
        return file.stat().st_size

    def read(self, space: str, ids: np.ndarray) -> Snapshot:
        """Return the state of a prefix.

        Raises:
            LigerError: The file is damaged, is of another prefix, or is gone.
        """
        file = self._file(space, digest(ids))
        return checked(Snapshot.load(file), ids, str(file))

    def mark(self, space: str, state: str, name: str, pinned: bool) -> None:
        """Write what a user said about a state.

        Raises:
            LigerError: The disk is full, or the file cannot be written.
        """
        file = self._file(space, state).with_suffix(".json")
        if name or pinned:
            with staged_file(file, hint=_HINT) as stage:
                stage.write_text(said(name, pinned), encoding="utf-8")
        else:
            file.unlink(missing_ok=True)

    def remove(self, space: str, state: str) -> None:
        """Remove a state's files, if they exist."""
        file = self._file(space, state)
        for path in (file, file.with_suffix(".json")):
            with suppress(OSError):
                path.unlink()

    def longest(self, space: str, ids: np.ndarray, limit: int, beyond: int) -> tuple[int, int] | None:
        """Return the number of tokens of the deepest state of a prefix that others wrote, and its bytes.

        Args:
            space: Key of the space.
            ids: Tokens `[T]` int64.
            limit: Largest number of tokens that the state may have seen.
            beyond: Number of tokens that it must exceed.
        """
        return None

    def close(self) -> None:
        """End what the store does by itself."""

    def _file(self, space: str, state: str) -> Path:
        return self.directory / space / f"{state}{SUFFIX}"


def checked(snapshot: Snapshot, ids: np.ndarray, place: str) -> Snapshot:
    """Return a state that was read, without its tokens.

    Raises:
        LigerError: It is that of other tokens.
    """
    if snapshot.ids is None or not np.array_equal(snapshot.ids, ids) or snapshot.position.tolist() != [len(ids)]:
        raise LigerError(f"{place} is the state of other tokens")
    return replace(snapshot, ids=None)


def said(name: str, pinned: bool) -> str:
    """Return the content of the file with what a user said about a state."""
    return json.dumps({"name": name, "pinned": pinned})


def _read_ids(file: Path) -> tuple[np.ndarray, bool]:
    """Return the tokens of a state, and whether it has logits, without reading the state itself.

    Raises:
        ValueError: The file has another name than its tokens.
    """
    from safetensors import safe_open

    with safe_open(str(file), framework="numpy") as opened:
        ids: np.ndarray = opened.get_tensor("ids")
        answers = "logits" in opened.keys()  # noqa: SIM118  (it is no dict)
    if ids.ndim != 1 or ids.dtype != np.int64 or digest(ids) != file.stem:
        raise ValueError(f"{file} is the state of other tokens")
    return ids, answers


def _read_marks(file: Path) -> tuple[str, bool]:
    try:
        marks = json.loads(file.read_text(encoding="utf-8"))
        return str(marks["name"]), bool(marks["pinned"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", False
