"""The tree of states: what is found, what goes first when space is short, and what is on the disk."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import LigerError
from ligerexport.serve.delta import Delta
from ligerexport.serve.request import Space
from ligerexport.serve.states import TRIES, States
from ligerexport.serve.store import Store
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
        assert states.find(Space(), ids("aa"))[0] is not None
        keep(states, new)
    assert states.find(Space(), ids("aa"))[0] is not None and states.find(Space(), ids("bb"))[0] is None


def test_the_disk_takes_what_the_memory_cannot_hold(tmp_path: Path) -> None:
    states = States("model", 2 * SIZE, tmp_path, 4 * SIZE)
    for letter in "abcdef":
        keep(states, letter)
        states._settle(set(states._writes))
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


def test_a_slow_disk_loses_no_chat_and_the_oldest_goes_first_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, letters, waits = Store.write, "abcdefghijklmnopqrst", threading.Event()

    def slow(self: Store, *what: Any) -> int:
        waits.wait()
        return write(self, *what)

    def wait() -> None:
        waits.set()
        threading.Condition.wait(states._settled)

    monkeypatch.setattr(Store, "write", slow)
    states = States("model", 0, tmp_path, 10**6)
    monkeypatch.setattr(states._settled, "wait", wait)
    keep(states, *letters)
    assert waits.is_set()
    states.flush()
    states.close()
    assert len(kept(states)) == len(letters)
    again = States("model", 0, tmp_path, len(letters) * SIZE)
    size = again.stats()["states_disk_bytes"] // len(letters)  # with the header of a file
    again.disk = len(letters) * size
    again.insert(Space(), ids("zz"), state(40))
    again.flush()
    assert [letter for letter in letters if again.find(Space(), ids(letter * 2))[0] is None] == ["a"]


@pytest.mark.parametrize("disk", [0, 10**9])
def test_states_that_share_slots_take_little_memory(disk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chats grow, branch, are asked for and are deleted; every state comes back as it was, and all bytes count."""
    random, made = np.random.default_rng(disk), dict[str, Snapshot]()
    states = States("model", 6 * 9_000, tmp_path if disk else None, disk)

    def after(text: str) -> Snapshot:
        """Return a state that has one row for each letter of the text, in the last of 64 places."""
        if text not in made:
            rows = np.zeros((1, 2, 64, 16), np.float32)
            for at, letter in enumerate(text):
                rows[0, :, at % 64] = [ord(letter) + at / 64] * 16
            made[text] = Snapshot(
                "model", np.array([20 * len(text)]), {"past.0.x": rows, "past.0.y": rows[..., 0].copy()}
            )
        return made[text]

    texts, most, packed = ["a" * 60, "b" * 60], 0, 0
    for _ in range(100):
        text = texts[random.integers(len(texts))] + "".join(random.choice([*"cdef"], random.integers(1, 5)))
        texts.append(text)
        states.insert(Space(), ids(text), after(text))
        states._settle(set(states._writes))
        if random.random() < 0.03 and (held := states.find(Space(), ids(texts[random.integers(len(texts))] + "z"))[0]):
            states.forget(held)
        held, _ = states.find(Space(), ids(texts[random.integers(len(texts))] + "z"))
        if held is not None:
            found, letters = states.fetch(held).result(), "".join(map(chr, held.ids[::20].tolist()))
            for name, expected in after(letters).tensors.items():
                np.testing.assert_array_equal(found.tensors[name], expected)
        alive = list(states._held.values())
        bases = {x.base for x in alive if x.base}
        assert states.stats()["states_memory_bytes"] == sum(x.taken for x in {*alive, *bases}) <= states.memory
        assert [x.uses for x in alive] == [sum(y.base is x for y in alive) for x in alive]
        most = max(most, sum(x.taken > 0 for x in alive))
        packed += any(x.uses for x in alive)
    states.close()
    assert most >= 18 and packed > 40, "six whole ones would fit"
    monkeypatch.setattr(Delta, "whole", lambda self: pytest.fail("all whole ones at once could take too much memory"))
    for held in sorted(states._held.values(), key=lambda held: held.node.length):
        states.forget(held)
    assert states.stats() == {"states": 0, "states_memory_bytes": 0, "states_disk_bytes": 0}


@pytest.mark.parametrize("memory", [3 * SIZE, 99 * SIZE])
def test_what_can_be_read_again_soon_is_not_written(memory: int, tmp_path: Path) -> None:
    """That is the state after a short prompt whose answer is there, unless it is pinned or has several answers."""
    states = States("model", memory, tmp_path, 10**6)
    for turn in ("b", "ba", "bb", "p", "pa", "pap", "papa", "q" * 13, "q" * 13 + "a"):
        states.insert(Space(), ids(turn), state(20 * len(turn)), write=turn.endswith("a"), pin=turn == "pap")
        states._settle(set(states._writes))
    states.flush()
    states.close()
    found = [held.ids[::20].tolist() for held in states._held.values() if held.written]
    assert {bytes(x).decode() for x in found} == {"b", "ba", "bb", "pa", "pap", "papa", "q" * 13, "q" * 13 + "a"}
    assert len(list(tmp_path.rglob("*.state"))) == len(found)


def test_nobody_waits_while_a_pin_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, held_lock, mark = States("model", 9 * SIZE, tmp_path, 9 * SIZE), list[bool](), Store.mark

    def slow(self: Store, *what: Any) -> None:
        held_lock.append(states._lock._is_owned())  # type: ignore[attr-defined]
        mark(self, *what)

    monkeypatch.setattr(Store, "mark", slow)
    states.insert(Space(), ids("a"), state(20), pin=True)
    states.change(states.get(Space(), states.infos(Space())[0].id), name="first")
    states.close()
    assert held_lock == [False, False]
    (info,) = States("model", 9 * SIZE, tmp_path, 9 * SIZE).infos(Space())
    assert info.pinned and info.name == "first"


@pytest.mark.parametrize("disk", [0, 10**9])
def test_a_state_may_be_removed_before_it_is_fetched(disk: int, tmp_path: Path) -> None:
    """The engine finds it, and another thread removes it; the error is one after which the engine looks again."""
    states = States("model", 9 * SIZE, tmp_path if disk else None, disk)
    keep(states, "ab")
    states.flush()
    held, _ = states.find(Space(), ids("abc"))
    states.forget(held)
    with pytest.raises(LigerError):
        states.fetch(held).result()
    assert states.find(Space(), ids("abc"))[0] is None
    states.close()


def test_few_states_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that would go first. None of these states is like another one, so one goes."""
    compared = list[int]()

    def differs(state: Snapshot, base: Snapshot) -> None:
        compared.append(int(state.position[0]))

    monkeypatch.setattr("ligerexport.serve.states.difference", differs)
    states = States("model", 30 * SIZE, None, 0)
    for length in range(1, 31):
        states.insert(Space(), np.full(20 * length, 7), state(20 * length))
    assert compared == []
    states.insert(Space(), np.full(620, 7), state(620))
    assert 0 < len(compared) <= TRIES and len(states.infos(Space())) == 30


def test_only_a_state_with_logits_answers_its_own_prompt(tmp_path: Path) -> None:
    states = States("model", 9 * SIZE, tmp_path, 9 * SIZE)
    keep(states, "a", "aa")
    assert states.find(Space(), ids("aa"))[0].node.length == 20 and states.wants(Space(), ids("aa"))
    logits = np.arange(3, dtype=np.float32)
    states.insert(Space(), ids("aa"), replace(state(40), logits=logits))
    assert states.find(Space(), ids("aa"))[0].node.length == 40 and not states.wants(Space(), ids("aa"))
    assert states.stats()["states_memory_bytes"] == 2 * SIZE + logits.nbytes
    states.flush()
    states.close()
    again = States("model", 0, tmp_path, 9 * SIZE)
    held, _ = again.find(Space(), ids("aa"))
    np.testing.assert_array_equal(again.fetch(held).result().logits, logits)
    assert held.node.length == 40 and again.find(Space(), ids("a"))[0] is None


def test_pinned_states_stay_but_not_all_can_be_pinned() -> None:
    states = States("model", 4 * SIZE, None, 0)
    for letter in "abc":
        states.insert(Space(), ids(letter), state(20), pin=True)
    keep(states, "defgh", "ijklm", "nopqr")
    pinned = [info for info in states.infos(Space()) if info.pinned]
    assert len(pinned) == 2 and len(states.infos(Space())) == 4
