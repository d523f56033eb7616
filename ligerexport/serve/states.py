"""The states that the engine keeps: trees of prefixes in memory under a budget, then on a disk under another one.

What is kept longest follows GreedyDual-Size-Frequency (Cherkasova, 1998). A state is worth the tokens that would be
read again without it. The last state of a chat is needed for its next turn. One inside a chat is only needed for a
branch, so it is worth a tenth of that, unless prefixes have branched there already. States of one model have nearly
equal sizes.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import LigerError, UsageError
from ligerexport.serve.request import Space, StateInfo
from ligerexport.serve.shared import SharedStore
from ligerexport.serve.store import Store, digest, space_key
from ligerexport.serve.tree import Node, Tree

WORTH = 16
"""Smallest number of tokens by which a state must be longer than the one before it."""
INSIDE = 0.1
"""Worth of a state inside a chat, as a share of that of the last one."""
WRITING = 16
"""Part of the memory, one in 16, that states may take in addition while they are written; at least `FEW` states."""
FEW = 4

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Held:
    """A state at a node of a tree.

    Attributes:
        space: Key of the tree in which it is.
        id: `digest` of its tokens.
        node: Its place.
        nbytes: Its size.
        snapshot: The state itself; None if it is on the disk only.
        written: Whether it is on the disk.
        writing: Whether it is on its way there.
        dropped: Whether the memory gives it up once it is written; it counts as written already.
        pinned, name: See `StateInfo`.
        stamp: Value of the cache's clock at its last use.
        used: Number of that use.
    """

    space: str
    id: str
    node: Node
    nbytes: int
    snapshot: Snapshot | None = None
    written: bool = False
    writing: bool = False
    dropped: bool = False
    pinned: bool = False
    name: str = ""
    stamp: float = 0.0
    used: int = 0

    @property
    def ids(self) -> np.ndarray:
        """The tokens that the state has seen, `[T]` int64."""
        edges, node = [self.node.edge], self.node.parent
        while node is not None:
            edges.append(node.edge)
            node = node.parent
        return np.concatenate(edges[::-1])

    @property
    def priority(self) -> tuple[float, int]:
        """When it goes: the smallest first, and of equal ones the one that was used longest ago."""
        before = next((node.length for node in self.node.above()), 0)
        branches = len(self.node.children)
        share = 1.0 if branches == 0 else max(INSIDE, branches - 1.0)
        return self.stamp + share * (self.node.length - before), self.used


class States:
    """All states of one engine. Its methods may be called from any thread.

    Args:
        model: `Manifest.fingerprint`.
        memory: Bytes of states in memory.
        directory: Directory for states on the disk; None keeps them in memory only.
        disk: Bytes of states on the disk.
        shared: Place of states that other servers use too, instead of a directory; see `SharedStore`.

    Raises:
        LigerError: The directory cannot be written.
    """

    def __init__(self, model: str, memory: int, directory: Path | None, disk: int, shared: str | None = None) -> None:
        self.memory, self.disk = memory, disk if shared is None else sys.maxsize  # a shared store keeps to its space
        self._store: Store | None = None if directory is None else Store(directory, model)
        if shared is not None:
            self._store = SharedStore(shared, model, disk)
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="read-states")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write-states")
        self._lock = threading.RLock()
        self._trees: dict[str, Tree] = {}
        self._held: dict[tuple[str, str], Held] = {}
        self._clock, self._uses = 0.0, 0
        self._in_memory = self._on_disk = self._being_written = 0
        self._writes: set[Future[int]] = set()
        for key, found in self._store.scan() if self._store else ():
            held = self._add(key, found.ids, found.nbytes)
            held.written, held.name, held.pinned = True, found.name, found.pinned
            self._on_disk += found.nbytes

    def find(self, space: Space, ids: np.ndarray, limit: int) -> tuple[Held | None, int]:
        """Return the deepest state for a beginning of ids, and how many of their tokens any prefix there has.

        Args:
            space: Where to look; pinned states of the owner "" are found too.
            ids: Tokens `[T]` int64.
            limit: Largest number of tokens that the state may have seen.
        """
        with self._lock:
            nodes, known = self._tree(space_key(space)).find(ids, limit)
            best = next((node.held for node in nodes if isinstance(node.held, Held)), None)
            if space.owner:
                common, _ = self._tree(space_key(space._replace(owner=""))).find(ids, limit)
                pinned = next((x.held for x in common if isinstance(x.held, Held) and x.held.pinned), None)
                if pinned is not None and (best is None or pinned.node.length > best.node.length):
                    best = pinned
            best = self._adopted(space_key(space), ids, limit, best.node.length if best else 0) or best
            if best is not None:
                self._use(best)
            return best, max(known, best.node.length if best else 0)

    def fetch(self, held: Held) -> Future[Snapshot]:
        """Return a state, from memory or from the disk; the future fails if its file is damaged or gone."""
        with self._lock:
            snapshot, space, ids = held.snapshot, held.space, held.ids
        if snapshot is None:
            assert self._store is not None
            return self._readers.submit(self._store.read, space, ids)
        ready: Future[Snapshot] = Future()
        ready.set_result(snapshot)
        return ready

    def keep_in_memory(self, held: Held, snapshot: Snapshot) -> None:
        """Keep a state in memory that was read from the disk."""
        with self._lock:
            if held.snapshot is None and self._held.get((held.space, held.id)) is held:
                held.snapshot = snapshot
                self._in_memory += held.nbytes
                self._shrink()

    def wants(self, space: Space, ids: np.ndarray) -> bool:
        """Return whether a state after these tokens `[T]` is not there yet and is worth its bytes."""
        held, _ = self.find(space, ids, len(ids))
        return len(ids) - (held.node.length if held else 0) >= WORTH

    def insert(
        self, space: Space, ids: np.ndarray, snapshot: Snapshot, *, pin: bool = False, write: bool = False
    ) -> None:
        """Keep a state.

        Args:
            space: Where to keep it.
            ids: Tokens that it has seen `[T]` int64.
            snapshot: The state of one sequence, which nobody changes any more.
            pin: Whether to pin it.
            write: Whether to write it to the disk at once, and not only when the memory is full.
        """
        with self._lock:
            key = space_key(space)
            held = self._held.get((key, digest(ids))) or self._add(key, ids, snapshot.nbytes)
            if held.snapshot is None:
                held.snapshot = snapshot
                self._in_memory += held.nbytes
            self._use(held)
            if pin and not held.pinned:
                with suppress(LigerError):  # the request itself can go on
                    self._set(held, held.name, True)
            if write or held.pinned:
                self._write(held)
            self._shrink()

    def secure(self, space: Space, ids: np.ndarray) -> None:
        """Begin to write the deepest state of a prefix `[T]` to the disk, if it is not there."""
        with self._lock:
            held, _ = self.find(space, ids, len(ids))
            if held is not None:
                self._write(held)

    def forget(self, held: Held) -> None:
        """Remove a state."""
        with self._lock:
            if self._held.get((held.space, held.id)) is not held:
                return
            self._release(held)
            if held.written:
                self._unwrite(held)
            del self._held[held.space, held.id]
            self._trees[held.space].remove(held.node)

    def infos(self, space: Space) -> list[StateInfo]:
        """Return the states of a space, the longest first."""
        with self._lock:
            mine = [held for held in self._held.values() if held.space == space_key(space)]
            return [
                StateInfo(x.id, x.node.length, x.nbytes, x.snapshot is not None, x.written, x.pinned, x.name)
                for x in sorted(mine, key=lambda held: -held.node.length)
            ]

    def get(self, space: Space, state: str) -> Held:
        """Return a state of a space.

        Raises:
            UsageError: There is none with this id or name.
        """
        with self._lock:
            key = space_key(space)
            named = (x for x in self._held.values() if x.space == key and x.name == state and state)
            held = self._held.get((key, state)) or next(named, None)
        if held is None:
            raise UsageError(f"there is no state {state!r:.60}", hint="list the states first")
        return held

    def change(self, held: Held, *, name: str | None = None, pinned: bool | None = None) -> None:
        """Name or pin a state; None leaves what there is.

        Raises:
            UsageError: Pinned states would take more than half of the space.
            LigerError: The disk is full.
        """
        with self._lock:
            self._set(held, held.name if name is None else name, held.pinned if pinned is None else pinned)
            if held.pinned or held.name:
                self._write(held)

    def flush(self) -> None:
        """Write all states for which the disk has room, and wait until they are written."""
        with self._lock:
            for held in sorted(self._held.values(), key=lambda held: held.priority, reverse=True):
                self._write(held, always=True)
        while writes := set(self._writes):
            for write in writes:
                write.exception()

    def close(self) -> None:
        """Finish what is being written, and end the threads."""
        self._readers.shutdown()
        self._writer.shutdown()
        if self._store is not None:
            self._store.close()

    def stats(self) -> dict[str, float]:
        """Return how many states there are and their bytes."""
        with self._lock:
            return {
                "states": len(self._held),
                "states_memory_bytes": self._in_memory,
                "states_disk_bytes": self._on_disk,
            }

    def _adopted(self, key: str, ids: np.ndarray, limit: int, beyond: int) -> Held | None:
        """Return a longer state of a prefix that another server wrote; None if there is none."""
        found = self._store.longest(key, ids, limit, beyond) if self._store else None
        if found is None:
            return None
        length, nbytes = found
        held = self._held.get((key, digest(ids[:length]))) or self._add(key, ids[:length], nbytes)
        if not held.written:
            held.written = True
            self._on_disk += nbytes
        return held

    def _tree(self, key: str) -> Tree:
        return self._trees.setdefault(key, Tree())

    def _use(self, held: Held) -> None:
        self._uses += 1
        held.stamp, held.used = self._clock, self._uses

    def _add(self, key: str, ids: np.ndarray, nbytes: int) -> Held:
        node = self._tree(key).insert(ids)
        held = node.held = Held(key, digest(ids), node, nbytes)
        self._held[key, held.id] = held
        return held

    def _set(self, held: Held, name: str, pinned: bool) -> None:
        if pinned and not held.pinned:
            space = self.memory if self._store is None else self.disk
            taken = sum(x.nbytes for x in self._held.values() if x.pinned) + held.nbytes
            if taken > space // 2:
                raise UsageError(
                    f"pinned states would take {taken} bytes, more than half of {space}",
                    hint="unpin or delete others first, or give the server more space",
                )
        if self._store is not None:
            self._store.mark(held.space, held.id, name, pinned)
        held.name, held.pinned = name, pinned

    def _shrink(self) -> None:
        """Take states out of memory until the budget holds, those of least priority first."""
        while self._in_memory > self.memory:
            loose = (x for x in self._held.values() if x.snapshot is not None and not x.dropped)
            loose = (x for x in loose if self._store is not None or not x.pinned)
            victim = min(loose, key=lambda held: held.priority, default=None)
            if victim is None:
                return
            self._clock = max(self._clock, victim.priority[0])
            if not victim.written:
                self._write(victim)
            if victim.writing:
                victim.dropped = True
                self._in_memory -= victim.nbytes
            elif victim.written:
                self._release(victim)
            else:
                self.forget(victim)

    def _release(self, held: Held) -> None:
        """Take a state out of memory."""
        if held.snapshot is not None and not held.dropped:
            self._in_memory -= held.nbytes
        held.snapshot, held.dropped = None, False

    def _write(self, held: Held, always: bool = False) -> None:
        """Begin to write a state, unless too many are on their way already."""
        if self._store is None or held.written or held.writing or held.snapshot is None:
            return
        allowed = max(self.memory // WRITING, FEW * held.nbytes)
        if (not always and self._being_written + held.nbytes > allowed) or not self._make_room(held):
            return
        held.writing = True
        self._being_written += held.nbytes
        write = self._writer.submit(self._store.write, held.space, held.ids, held.snapshot)
        self._writes.add(write)
        write.add_done_callback(self._wrote(held, held.nbytes))

    def _make_room(self, held: Held) -> bool:
        """Remove states from the disk until a new one fits; return whether it does."""
        while self._on_disk + self._being_written + held.nbytes > self.disk:
            others = (x for x in self._held.values() if x.written and not x.pinned)
            victim = min(others, key=lambda other: other.priority, default=None)
            if victim is None or (victim.priority > held.priority and not held.pinned):
                return False
            self._clock = max(self._clock, victim.priority[0])
            if victim.snapshot is None:
                self.forget(victim)
            else:
                self._unwrite(victim)
        return True

    def _unwrite(self, held: Held) -> None:
        assert self._store is not None
        self._store.remove(held.space, held.id)
        held.written = False
        self._on_disk -= held.nbytes

    def _wrote(self, held: Held, nbytes: int) -> Callable[[Future[int]], None]:
        def done(write: Future[int]) -> None:
            error = write.exception()
            with self._lock:
                held.writing = False
                self._being_written -= nbytes
                known = self._held.get((held.space, held.id)) is held
                if error is None and known:
                    held.written = True
                    self._on_disk += nbytes
                elif error is None and self._store is not None:  # it was forgotten meanwhile
                    self._store.remove(held.space, held.id)
                else:
                    _log.warning("a state was not written: %s", error)
                    self.disk = min(self.disk, self._on_disk)  # later ones replace others
                if held.dropped and known:
                    self._release(held) if held.written else self.forget(held)
                self._writes.discard(write)

        return done
