"""The tree of states: what is found, what goes first when space is short, and what is on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.serve.request import Space
from ligerexport.serve.states import States
from ligerexport.serve.tree import Node, Tree

SIZE = 800
"""Bytes of a state."""


def state(length: int) -> Snapshot:
    return Snapshot("model", np.array([length]), {"past.0.x": np.full((1, SIZE // 8), length, np.int64)})


def ids(text: str) -> np.ndarray:
    """Return a prefix: every letter stands for 20 equal tokens."""
    return np.repeat(np.frombuffer(text.encode(), np.uint8), 20).astype(np.int64)


def keep(states: States, *texts: str, owner: str = "") -> None:
    for text in texts:
        states.insert(Space(owner), ids(text), state(20 * len(text)))


def kept(states: States, owner: str = "") -> list[int]:
    return [info.tokens // 20 for info in states.infos(Space(owner))]


def test_a_tree_finds_what_a_list_finds() -> None:
    """Random prefixes come and go; the tree has no node too many, and agrees with a search through all prefixes."""
    random, tree, held = np.random.default_rng(1), Tree(), {}
    for _ in range(400):
        prefix = random.integers(0, 2, random.integers(1, 9))
        key = tuple(prefix.tolist())
        if key in held and random.random() < 0.7:
            tree.remove(held.pop(key))
        elif key not in held:
            held[key] = tree.insert(prefix)
            held[key].held = key
        query = random.integers(0, 2, 10)
        limit = int(random.integers(1, 11))
        begins = [tuple(query[:n].tolist()) for n in range(1, limit + 1)]
        found, known = tree.find(query, limit)
        assert [node.held for node in found] == [x for x in reversed(begins) if x in held]
        assert known == max((n for n, x in enumerate(begins, 1) if any(key[:n] == x for key in held)), default=0)
        nodes: list[Node] = [tree.root]
        for node in nodes:
            nodes += node.children.values()
        assert all(node.held is not None or len(node.children) > 1 for node in nodes[1:])
        assert sum(node.held is not None for node in nodes) == len(held)


def test_chats_stay_and_what_is_inside_them_goes() -> None:
    """Two chats of three turns each, and room for five of their seven states: the beginning that they share stays."""
    states = States("model", 5 * SIZE, None, 0)
    keep(states, "aaaaa", "aaaaab", "aaaaabb", "aaaaabbb", "aaaaac", "aaaaacc", "aaaaaccc")
    assert sorted(kept(states))[0] == 5 and kept(states)[:2] == [8, 8] and len(kept(states)) == 5
    assert states.stats()["states_memory_bytes"] == 5 * SIZE


def test_what_was_used_lately_stays() -> None:
    states = States("model", 3 * SIZE, None, 0)
    keep(states, "a", "b", "c")
    for new in "defgh":
        assert states.find(Space(), ids("aa"), 40)[0] is not None
        keep(states, new)
    assert states.find(Space(), ids("a"), 20)[0] is not None and states.find(Space(), ids("b"), 20)[0] is None


def test_the_disk_takes_what_the_memory_cannot_hold(tmp_path: Path) -> None:
    states = States("model", 2 * SIZE, tmp_path, 4 * SIZE)
    for letter in "abcdef":
        keep(states, letter)
        while states._writes:
            pass
    states.flush()
    stats = states.stats()
    assert stats["states_memory_bytes"] <= 2 * SIZE and stats["states_disk_bytes"] <= 4 * SIZE
    assert len(list(tmp_path.rglob("*.state"))) * SIZE == stats["states_disk_bytes"] > 2 * SIZE
    held = next(held for held in states._held.values() if held.snapshot is None)
    snapshot = states.fetch(held).result()
    np.testing.assert_array_equal(snapshot.tensors["past.0.x"], state(20).tensors["past.0.x"])
    states.close()
    again = States("model", 9 * SIZE, tmp_path, 9 * SIZE)
    assert sorted(x.id for x in again.infos(Space())) == sorted(x.id for x in states.infos(Space()) if x.on_disk)
    assert States("other", SIZE, tmp_path, SIZE).infos(Space()) == []


def test_pinned_states_stay_but_not_all_can_be_pinned() -> None:
    states = States("model", 4 * SIZE, None, 0)
    for letter in "abc":
        states.insert(Space(), ids(letter), state(20), pin=True)
    keep(states, "defgh", "ijklm", "nopqr")
    pinned = [info for info in states.infos(Space()) if info.pinned]
    assert len(pinned) == 2 and len(states.infos(Space())) == 4
