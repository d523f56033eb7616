"""Sequences that come and go in a batch: rows are independent, and siblings share weights but no state."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import toy

import ligerexport as lx
from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import UsageError

IDS = np.random.default_rng(5).integers(0, toy.VOCAB, (4, 90))
CLOSE = 2e-5


@lru_cache(maxsize=2)
def loaded(artifact: Path) -> lx.Session:
    return lx.load(artifact)


def alone(artifact: Path, ids: Iterable[int]) -> np.ndarray:
    return loaded(artifact).sibling().prefill(np.array(list(ids)))[0]


def run(artifact: Path, visitor: bool) -> np.ndarray:
    """Step rows 0 and 2 of three, of different lengths; a visitor comes to row 1, leaves, and another one comes."""
    session = lx.load(artifact, batch=3)
    for row, length in ((0, 20), (2, 7)):
        one = session.sibling()
        one.prefill(IDS[row, :length])
        session.restore(one.snapshot(), row)
    logits: list[np.ndarray] = []
    guest = -1
    for i in range(40):
        if visitor and i in (5, 25):
            one.reset()
            one.prefill(IDS[1, :33] if i == 5 else IDS[3, :2])
            session.restore(one.snapshot(), 1)
            guest = 1 if i == 5 else 3
        if visitor and i == 17:
            np.testing.assert_allclose(logits[-1][1], alone(artifact, IDS[1, : 33 + 12]), atol=CLOSE)
            session.reset(1)
            guest = -1
        token = IDS[guest, session.position[1]] if guest > 0 else -1
        logits.append(session.step([IDS[0, 20 + i], token, IDS[2, 7 + i]]).copy())
    assert session.position.tolist() == [60, 17 if visitor else 0, 47]
    for row, ids in enumerate((IDS[0, :60], IDS[3, :17] if visitor else [], IDS[2, :47])):
        if len(ids):
            np.testing.assert_allclose(logits[-1][row], alone(artifact, ids), atol=CLOSE)
    return np.stack(logits)[:, [0, 2]]


def test_what_comes_and_goes_does_not_touch_the_others(built: tuple[Path, Path]) -> None:
    """Equal bit for bit if the state has constant size; if it grows, longer sums have another order."""
    with_visitor, without = run(built[1], True), run(built[1], False)
    if lx.load(built[1]).artifact.manifest.growth:
        np.testing.assert_allclose(with_visitor, without, atol=CLOSE)
    else:
        np.testing.assert_array_equal(with_visitor, without)


def test_a_row_that_waits_has_seen_nothing(built: tuple[Path, Path]) -> None:
    session = lx.load(built[1], batch=2)
    for token in IDS[0, :50]:
        session.step([token, -1])
    assert session.position.tolist() == [50, 0]
    for pair in zip(IDS[0, 50:70], IDS[1, :20], strict=True):
        logits = session.step(pair)
    np.testing.assert_allclose(logits[1], alone(built[1], IDS[1, :20]), atol=CLOSE)
    session.prefill(IDS[:2, :4])
    np.testing.assert_array_equal(session.position, [74, 24])


def test_rows_wait_in_the_middle(built: tuple[Path, Path]) -> None:
    """Three rows get tokens in turns of random lengths; each has the logits of a session that runs alone."""
    session, turns = lx.load(built[1], batch=3), np.random.default_rng(3)
    expected = [[x.copy() for x in map(session.sibling().step, IDS[row, :24])] for row in range(3)]
    seen = np.zeros(3, np.int64)
    while (seen < 24).any():
        active = (turns.random(3) < 0.6) & (seen < 24)
        if not active.any():
            continue
        before = session.snapshot()
        logits = session.step(np.where(active, IDS[range(3), seen], -1))
        after = session.snapshot()
        for row in range(3):
            if active[row]:
                np.testing.assert_allclose(logits[row], expected[row][seen[row]][0], atol=CLOSE)
            elif seen[row]:
                kept, found = before.sequence(row).tensors, after.sequence(row).tensors
                for name in kept:
                    grown = [
                        x[:, :, -seen[row] :] if name.endswith((".key", ".value")) else x
                        for x in (kept[name], found[name])
                    ]
                    np.testing.assert_array_equal(*grown)
        seen += active
        assert session.position.tolist() == [x if x else min(p, 0) for x, p in zip(seen, session.position, strict=True)]
    with pytest.raises(UsageError, match="token id -1"):
        session.step([-1, -1, -1])


def test_a_new_row_may_be_padded_beside_older_ones(built: tuple[Path, Path]) -> None:
    session = lx.load(built[1], batch=2)
    session.step([IDS[0, 0], -1])
    logits = session.prefill(np.stack([IDS[0, 1:31], IDS[1, :30]]), padding=[0, 0]).copy()
    np.testing.assert_allclose(logits[1], alone(built[1], IDS[1, :30]), atol=CLOSE)
    session.reset(1)
    rows = np.stack([IDS[0, 31:51], np.append(np.zeros(8, int), IDS[2, :12])])
    logits = session.prefill(rows, padding=[0, 8])
    np.testing.assert_allclose(logits, [alone(built[1], IDS[0, :51]), alone(built[1], IDS[2, :12])], atol=CLOSE)


def test_one_prefix_forks_into_all_rows(built: tuple[Path, Path]) -> None:
    session = lx.load(built[1])
    session.prefill(IDS[0, :40])
    batch = session.sibling(batch=3)
    batch.restore(Snapshot.stack([session.snapshot()] * 3))
    for i, logits in enumerate(batch.prefill(IDS[:3, 40:60])):
        np.testing.assert_allclose(logits, alone(built[1], [*IDS[0, :40], *IDS[i, 40:60]]), atol=CLOSE)


def test_stack_and_sequence_are_inverse(built: tuple[Path, Path]) -> None:
    session = lx.load(built[1])
    snapshots = []
    for row, length in enumerate((11, 30, 3)):
        session.reset()
        session.prefill(IDS[row, :length])
        snapshots.append(session.snapshot())
    batch = session.sibling(batch=3)
    batch.restore(Snapshot.stack(snapshots))
    assert batch.position.tolist() == [11, 30, 3]
    tokens = [int(IDS[0, 11]), int(IDS[1, 30]), int(IDS[2, 3])]
    logits = batch.step(tokens).copy()
    whole = batch.snapshot()
    for row, snapshot in enumerate(snapshots):
        session.restore(snapshot)
        np.testing.assert_allclose(session.step(tokens[row])[0], logits[row], atol=CLOSE)
        for left in (whole.sequence(row), batch.snapshot(row)):
            session.restore(left)
            found = session.step(5)[0].copy()
            session.restore(snapshot)
            session.step(tokens[row])
            np.testing.assert_allclose(found, session.step(5)[0], atol=CLOSE)
    assert batch.snapshot(2).nbytes <= batch.snapshot(1).nbytes


def test_siblings_share_the_loaded_weights(built: tuple[Path, Path], tmp_path: Path) -> None:
    """One is created after the files are deleted, and both run at once."""
    session = lx.load(shutil.copytree(built[1], tmp_path / "copy"))
    shutil.rmtree(tmp_path / "copy")
    sessions = [session, session.sibling(), session.sibling()]

    def read(row: int) -> list[np.ndarray]:
        return [sessions[row].step(int(token)).copy() for token in IDS[row]]

    with ThreadPoolExecutor() as pool:
        together = list(pool.map(read, range(3)))
    fresh = lx.load(built[1])
    for row, logits in enumerate(together):
        fresh.reset()
        np.testing.assert_array_equal([fresh.step(int(token)).copy() for token in IDS[row]], logits)


def test_rows_that_do_not_fit(built: tuple[Path, Path], tmp_path: Path) -> None:
    session = lx.load(built[1], batch=2)
    both = session.snapshot()
    for use in (session.reset, session.snapshot, both.sequence, lambda row: session.restore(both.sequence(0), row)):
        for row in (2, -1):
            with pytest.raises(UsageError, match=f"row {row}"):
                use(row)
    with pytest.raises(UsageError, match=r"past\.0"):
        session.restore(both, 0)
    with pytest.raises(UsageError, match="batch 0"):
        session.sibling(batch=0)
    other = lx.load(toy.build(tmp_path / "toy")).snapshot()
    for states in ([], [both, other]):
        with pytest.raises(UsageError, match="states of one model"):
            Snapshot.stack(states)
