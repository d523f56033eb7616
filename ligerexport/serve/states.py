"""The states that the engine keeps: trees of prefixes in memory under a budget, then on a disk under another one.

What is kept longest follows GreedyDual-Size-Frequency (Cherkasova, 1998). A state is worth the tokens that would be
read again without it. The last state of a chat is needed for its next turn, so it only goes if the disk has no room for
it: while too many states are being written, the engine waits, though not for a network. One inside a chat is only
needed for a branch, so it is worth a tenth of that, unless prefixes have branched there already. It is not written if
few tokens make it from the one before: that would double what each turn of a chat writes, and memory cards wear out.
States of one model have nearly equal sizes.

When the memory is full, states are first kept as differences from ones before them, where those are much smaller. The
memory of a state stays as long as another one is a difference from it.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from heapq import nsmallest
from pathlib import Path

import numpy as np

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import LigerError, UsageError
from ligerexport.serve.delta import Delta, difference
from ligerexport.serve.held import Held
from ligerexport.serve.request import Space, StateInfo
from ligerexport.serve.shared import SharedStore
from ligerexport.serve.store import Store, digest, space_key
from ligerexport.serve.tree import Tree

WORTH = 16
"""Smallest number of tokens by which a state must be longer than the one before it."""
WRITING = 16
"""Part of the memory, one in 16, that states may take in addition while they are written; at least `FEW` states."""
FEW = 4
TRIES = 8
"""Number of states that are compared with others before one goes; answers wait for each a few milliseconds."""

_log = logging.getLogger(__name__)


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
        self._settled = threading.Condition(self._lock)
        self._trees: dict[str, Tree] = {}
        self._held: dict[tuple[str, str], Held] = {}
        self._clock, self._uses = 0.0, 0
        self._in_memory = self._on_disk = self._being_written = 0
        self._writes: set[Future[int]] = set()
        for key, found in self._store.scan() if self._store else ():
            held = self._add(key, found.ids, found.nbytes, found.answers)
            held.written, held.name, held.pinned = True, found.name, found.pinned
            self._on_disk += found.nbytes
            self._use(held)

    def find(self, space: Space, ids: np.ndarray) -> tuple[Held | None, int]:
        """Return the deepest state for a beginning of ids, and how many of their tokens any prefix of the space has.

        A state that has seen all of them is only found if an answer can begin there.

        Args:
            space: Where to look; pinned states of the owner "" are found too.
            ids: Tokens `[T]` int64.
        """
        with self._lock:
            found, known = self._find(space_key(space), ids)
            best = next((held for held in found if held.answers or held.node.length < len(ids)), None)
            if space.owner:
                common = (held for held in self._find(space_key(space._replace(owner="")), ids)[0] if held.pinned)
                pinned = next((held for held in common if held.answers or held.node.length < len(ids)), None)
                if pinned is not None and (best is None or pinned.node.length > best.node.length):
                    best = pinned
            best = self._adopted(space_key(space), ids, best.node.length if best else 0) or best
            if best is not None:
                self._use(best)
            return best, max(known, best.node.length if best else 0)

    def fetch(self, held: Held) -> Future[Snapshot]:
        """Return a state, from memory or from the disk; the future fails if it is damaged, or was removed meanwhile."""
        with self._lock:
            snapshot, space, ids = held.snapshot, held.space, held.ids
        if isinstance(snapshot, Delta):
            return self._readers.submit(snapshot.whole)
        if snapshot is None and self._store is not None:
            return self._readers.submit(self._store.read, space, ids)
        ready: Future[Snapshot] = Future()
        if snapshot is None:
            ready.set_exception(LigerError("the state was removed"))
        else:
            ready.set_result(snapshot)
        return ready

    def keep_in_memory(self, held: Held, snapshot: Snapshot) -> None:
        """Keep a state in memory that was read from the disk."""
        with self._lock:
            if held.snapshot is None and self._is_known(held):
                held.snapshot = snapshot
                self._in_memory += held.nbytes
                self._shrink()

    def wants(self, space: Space, ids: np.ndarray) -> bool:
        """Return whether a state after these tokens `[T]` is not there yet and is worth its bytes."""
        held, _ = self.find(space, ids)
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
            held = self._held.get((key, digest(ids)))
            if held and snapshot.logits is not None and not (held.answers or held.pinned or held.name):
                self.forget(held)  # the new one can do more
                held = None
            if held is None:
                held = self._add(key, ids, snapshot.nbytes, snapshot.logits is not None)
            if held.snapshot is None:
                held.snapshot = snapshot
                self._in_memory += held.nbytes
            self._use(held)
            if pin and not held.pinned:
                with suppress(UsageError):  # the request itself can go on
                    self._check_pin(held)
                    held.pinned = True
                    if self._store is not None:
                        self._writer.submit(self._store.mark, key, held.id, held.name, True)
            if write or held.pinned:
                self._write(held)
            self._shrink()

    def secure(self, space: Space, ids: np.ndarray) -> None:
        """Begin to write the deepest state of a prefix `[T]` to the disk, if it is not there."""
        with self._lock:
            held, _ = self.find(space, ids)
            if held is not None:
                self._write(held)

    def forget(self, held: Held) -> None:
        """Remove a state; its memory stays as long as others are differences from it."""
        with self._lock:
            if not self._is_known(held):
                return
            if held.written:
                self._unwrite(held)
            del self._held[held.space, held.id]
            self._trees[held.space].remove(held.node)
            if not held.uses:
                self._release(held)

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
        """Name or pin a state, which is on the disk afterwards; None leaves what there is.

        Raises:
            UsageError: Pinned states would take more than half of the space.
            LigerError: The disk is full.
        """
        name, pinned = held.name if name is None else name, held.pinned if pinned is None else pinned
        with self._lock:
            if pinned and not held.pinned:
                self._check_pin(held)
        if self._store is not None:  # in the order of all writes; the engine need not wait
            self._writer.submit(self._store.mark, held.space, held.id, name, pinned).result()
        with self._lock:
            held.name, held.pinned = name, pinned
            if not (pinned or name):
                return
            self._write(held, always=True)
            writes = set(self._writes)
        self._settle(writes)
        if self._store is not None and not held.written:
            raise LigerError("the state cannot be written: the disk is full", hint="delete other states first")

    def flush(self) -> None:
        """Write all but minor states for which the disk has room, and wait until they are written."""
        with self._lock:
            wanted = (held for held in self._held.values() if not held.minor)
            for held in sorted(wanted, key=lambda held: held.priority, reverse=True):
                self._write(held, always=True)
            writes = set(self._writes)
        self._settle(writes)

    def _settle(self, writes: set[Future[int]]) -> None:
        """Wait until states are written, and known to be."""
        while left := self._writes & writes:
            left.pop().exception()

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

    def _adopted(self, key: str, ids: np.ndarray, beyond: int) -> Held | None:
        """Return a longer state of a prefix that another server wrote; None if there is none.

        It has seen fewer tokens: the name of its file does not say whether an answer can begin there.
        """
        found = self._store.longest(key, ids, len(ids) - 1, beyond) if self._store else None
        if found is None:
            return None
        length, nbytes = found
        held = self._held.get((key, digest(ids[:length]))) or self._add(key, ids[:length], nbytes, False)
        if not held.written:
            held.written = True
            self._on_disk += nbytes
        return held

    def _is_known(self, held: Held) -> bool:
        """Return whether a state was not removed."""
        return self._held.get((held.space, held.id)) is held

    def _tree(self, key: str) -> Tree:
        return self._trees.setdefault(key, Tree())

    def _use(self, held: Held) -> None:
        self._uses += 1
        held.stamp, held.used = self._clock, self._uses

    def _find(self, key: str, ids: np.ndarray) -> tuple[list[Held], int]:
        nodes, known = self._tree(key).find(ids, len(ids))
        return [node.held for node in nodes if isinstance(node.held, Held)], known

    def _add(self, key: str, ids: np.ndarray, nbytes: int, answers: bool) -> Held:
        node = self._tree(key).insert(ids)
        held = node.held = Held(key, digest(ids), node, nbytes, answers)
        self._held[key, held.id] = held
        return held

    def _check_pin(self, held: Held) -> None:
        """Refuse to pin a state if pinned ones would take more than half of the space."""
        space = self.memory if self._store is None else self.disk
        taken = sum(x.nbytes for x in self._held.values() if x.pinned) + held.nbytes
        if taken > space // 2:
            raise UsageError(
                f"pinned states would take {taken} bytes, more than half of {space}",
                hint="unpin or delete others first, or give the server more space",
            )

    def _shrink(self) -> None:
        """Take states out of memory until the budget holds, those of least priority first."""
        while self._in_memory > self.memory:
            loose = [x for x in self._held.values() if x.taken and not x.uses]
            untried = nsmallest(TRIES, (x for x in loose if not x.tried), key=lambda held: held.priority)
            if any(map(self._pack, untried)):
                continue
            loose = [x for x in loose if self._store is not None or not x.pinned]
            victim = min(loose, key=lambda held: held.priority, default=None)
            if victim is None:
                return
            self._clock = max(self._clock, victim.priority[0])
            if not (victim.written or victim.minor):
                self._write(victim)
            lost = not (victim.written or victim.writing or victim.node.children)
            if lost and self._crowded(victim) and not isinstance(self._store, SharedStore):
                self._settled.wait()  # others may change everything meanwhile
                continue
            if victim.writing:
                self._in_memory -= victim.taken
                victim.dropped = True
            elif victim.written:
                self._release(victim)
            else:
                self.forget(victim)

    def _release(self, held: Held) -> None:
        """Take a state out of memory."""
        self._in_memory -= held.taken
        base, held.snapshot, held.base, held.dropped, held.tried = held.base, None, None, False, False
        if base is not None:
            base.uses -= 1
            if not base.uses and not self._is_known(base):
                self._release(base)

    def _pack(self, held: Held) -> bool:
        """Keep a state as a difference from one before it; return whether that was possible."""
        held.tried = True
        before = next((x.held for x in held.node.above() if isinstance(x.held, Held) and x.held.taken), None)
        base = before and (before.base or before)
        if base is None or not isinstance(base.snapshot, Snapshot) or not isinstance(held.snapshot, Snapshot):
            return False
        if base.dropped or (delta := difference(held.snapshot, base.snapshot)) is None:
            return False
        self._in_memory -= held.taken
        held.snapshot, held.base = delta, base
        base.uses += 1
        self._in_memory += held.taken
        return True

    def _write(self, held: Held, always: bool = False) -> None:
        """Begin to write a state, unless too many are on their way already."""
        if self._store is None or held.written or held.writing or held.snapshot is None:
            return
        if (not always and self._crowded(held)) or not self._make_room(held):
            return
        held.writing = True
        self._being_written += held.nbytes
        write = self._writer.submit(self._save, held.space, held.ids, held.snapshot)
        self._writes.add(write)
        write.add_done_callback(self._wrote(held, held.nbytes))

    def _crowded(self, held: Held) -> bool:
        """Return whether too many states are being written for one more."""
        return self._being_written + held.nbytes > max(self.memory // WRITING, FEW * held.nbytes)

    def _save(self, space: str, ids: np.ndarray, state: Snapshot | Delta) -> int:
        assert self._store is not None
        return self._store.write(space, ids, state.whole() if isinstance(state, Delta) else state)

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
                known = self._is_known(held)
                if error is None and known:
                    held.written = True
                    self._on_disk += nbytes
                elif error is None and self._store is not None:  # it was forgotten meanwhile
                    self._store.remove(held.space, held.id)
                else:
                    _log.warning("a state was not written: %s", error)
                    if not isinstance(self._store, SharedStore):  # a network may work again, a full disk stays full
                        self.disk = min(self.disk, self._on_disk)  # later ones replace others
                if held.dropped and known:
                    self._release(held) if held.written else self.forget(held)
                self._writes.discard(write)
                self._settled.notify_all()

        return done
