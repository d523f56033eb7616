"""States that several servers share: a place on any filesystem of fsspec, of whose files each server has a list.

The name of a file says of which tokens and of how many it is the state. So a server finds the deepest state of a prompt
in its list, and reads that one file only.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import LigerError, MissingDependency
from ligerexport.serve.store import SUFFIX, Store, Stored, checked, digest, hashing, named, said

IDLE = 20
"""Shortest pause between two lists, as a multiple of the time that the last one took."""
PART = ".part"
LATE = 600.0
"""Seconds after which a part of a file was left by a server that was killed."""
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
"""Names under which filesystems say when a file was written."""

_log = logging.getLogger(__name__)


class SharedStore(Store):
    """The states of one model, `URL/MODEL/SPACE/DIGEST.state`, which other servers read and write too.

    Args:
        url: A directory, or an address that fsspec knows, such as `s3://bucket/states`.
        model: `Manifest.fingerprint`.
        space: Bytes of all states; beyond it, the oldest ones that nobody pinned are removed.
        every: Seconds between two looks at what others wrote.

    Raises:
        MissingDependency: There is no fsspec, or not the package that it needs for this address.
        LigerError: The place cannot be written.
    """

    def __init__(self, url: str, model: str, space: int, every: float = 1.0) -> None:
        try:
            import fsspec

            self._files, root = fsspec.url_to_fs(url)
            self._root, self._space = f"{root.rstrip('/')}/{model}", space
            self._listed: dict[str, dict[int, dict[str, int]]] = {}
            self._files.makedirs(self._root, exist_ok=True)
            self.refresh()
        except ImportError as error:
            raise MissingDependency(error.name or "fsspec", extra="ray") from error
        except Exception as error:  # filesystems raise several kinds
            raise LigerError(f"cannot keep states at {url}: {error}", hint="choose another place") from error
        self._closed = threading.Event()
        threading.Thread(target=self._look, args=(every,), name="list-states", daemon=True).start()

    def scan(self) -> Iterator[tuple[str, Stored]]:
        """Yield nothing: a state of another server, or of an earlier run, is read when a prompt needs it."""
        yield from ()

    def refresh(self) -> None:
        """List the states, and remove the oldest ones if they take too much space."""
        self._files.invalidate_cache()
        found = self._files.find(self._root, detail=True)
        pinned = {name.removesuffix(".json") for name in found if name.endswith(".json")}
        states = {name: facts for name, facts in found.items() if name.endswith(SUFFIX)}
        taken = sum(facts["size"] for facts in states.values())
        for name in sorted(states, key=lambda name: _time(states[name])):
            if taken > self._space and name.removesuffix(SUFFIX) not in pinned:
                taken -= states.pop(name)["size"]
                self._remove(name)
        for name, facts in found.items():
            if name.endswith(PART) and time.time() - facts["mtime"] > LATE:
                self._remove(name)
        listed: dict[str, dict[int, dict[str, int]]] = {}
        for name, facts in states.items():
            _, space, file = name.rsplit("/", 2)
            state = file.removesuffix(SUFFIX)
            if (length := state.rpartition("-")[2]).isdecimal():
                listed.setdefault(space, {}).setdefault(int(length), {})[state] = facts["size"]
        self._listed = listed

    def longest(self, space: str, ids: np.ndarray, limit: int, beyond: int) -> tuple[int, int] | None:
        listed, seen, at, best = self._listed.get(space, {}), hashing(ids[:0]), 0, None
        for length in sorted(length for length in listed if length <= limit):
            seen.update(np.ascontiguousarray(ids[at:length], np.int64).data)
            at = length
            nbytes = listed[length].get(named(seen, length))
            if nbytes is not None and length > beyond:
                best = length, nbytes
        return best

    def write(self, space: str, ids: np.ndarray, snapshot: Snapshot) -> int:
        place = self._place(space, digest(ids))
        with TemporaryDirectory() as directory:
            file = Path(directory) / "state"
            replace(snapshot, ids=ids).save(file)
            try:
                self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
                if "file" in self._files.protocol:  # others see a whole file or none
                    part = f"{place}.{uuid.uuid4().hex}{PART}"
                    self._files.put_file(str(file), part)
                    self._files.mv(part, place)
                else:
                    self._files.put_file(str(file), place)
            except Exception as error:
                raise LigerError(f"cannot write {place}: {error}", hint="look at the place of shared states") from error
            return file.stat().st_size

    def read(self, space: str, ids: np.ndarray) -> Snapshot:
        place = self._place(space, digest(ids))
        with TemporaryDirectory() as directory:
            file = Path(directory) / "state"
            try:
                self._files.get_file(place, str(file))
            except Exception as error:
                raise LigerError(f"cannot read {place}: {error}") from error
            return checked(Snapshot.load(file), ids, place)

    def mark(self, space: str, state: str, name: str, pinned: bool) -> None:
        place = self._place(space, state).removesuffix(SUFFIX) + ".json"
        try:
            if name or pinned:
                self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
                self._files.pipe_file(place, said(name, pinned).encode())
            elif self._files.exists(place):
                self._files.rm_file(place)
        except Exception as error:
            raise LigerError(f"cannot write {place}: {error}", hint="look at the place of shared states") from error

    def remove(self, space: str, state: str) -> None:
        self._remove(self._place(space, state))
        for states in self._listed.get(space, {}).values():
            states.pop(state, None)

    def close(self) -> None:
        self._closed.set()

    def _place(self, space: str, state: str) -> str:
        return f"{self._root}/{space}/{state}{SUFFIX}"

    def _remove(self, place: str) -> None:
        for name in (place, place.removesuffix(SUFFIX) + ".json"):
            with suppress(Exception):  # another server may have removed it
                self._files.rm_file(name)

    def _look(self, every: float) -> None:
        pause = every
        while not self._closed.wait(pause):
            clock = time.monotonic()
            try:
                self.refresh()
            except Exception as error:
                _log.warning("shared states were not listed: %s", error)
            pause = max(every, IDLE * (time.monotonic() - clock))


def _time(facts: Mapping[str, Any]) -> str:
    """Return when a file was written, as a text whose order is that of times on one filesystem."""
    return str(next((facts[name] for name in _TIMES if facts.get(name) is not None), ""))
