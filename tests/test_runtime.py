"""Sessions on a tiny graph with real ONNX Runtime: cuts, aliasing, growing state, snapshots, batches, bad input."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import toy

import ligerexport as lx
from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import LigerError, UsageError
from ligerexport.threads import default_threads

IDS = np.random.default_rng(1).integers(0, toy.VOCAB, 41)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.build(tmp_path_factory.mktemp("toy") / "artifact")


def unbound(artifact: Path, cuts: list[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run the graph without bindings: fresh memory for every input and output."""
    session = onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])
    state = {
        "past.0.recurrent_state": np.zeros((1, toy.WIDTH), np.float32),
        "past.0.slot_position": np.full((1, 2), -1, np.int64),
        "past.1.key": np.zeros((1, 1, 0, toy.WIDTH), np.float32),
    }
    names = [x.name for x in session.get_outputs()]
    position = 0
    for part in np.split(IDS, cuts):
        feed = {"input_ids": part[None], "position": np.array([position]), **state}
        logits, *present = session.run(names, feed)
        state = {name.replace("present", "past"): x for name, x in zip(names[1:], present, strict=True)}
        position += len(part)
    return logits, state


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("cut", [0, 1, 17, 40])
def test_bound_session_equals_plain_runs_for_any_cut(artifact: Path, chunk: int, cut: int) -> None:
    expected, state = unbound(artifact, [16, 32])
    session = lx.load(artifact, chunk=chunk)
    if cut:
        session.prefill(IDS[:cut])
    np.testing.assert_array_equal(session.prefill(IDS[cut:]), expected)
    for name, tensor in session.snapshot().tensors.items():
        np.testing.assert_array_equal(tensor, state[name])
    assert session.position.tolist() == [len(IDS)]


def test_steps_equal_prefill(artifact: Path) -> None:
    expected, _ = unbound(artifact, [16, 32])
    session = lx.load(artifact)
    session.prefill(IDS[:5])
    for token in IDS[5:]:
        logits = session.step(int(token))
    np.testing.assert_array_equal(logits, expected)


def test_state_bytes_count_what_grows(artifact: Path) -> None:
    session = lx.load(artifact)
    fixed = session.state_bytes
    assert fixed == session.artifact.manifest.bytes.state_per_sequence
    session.prefill(IDS)
    assert session.state_bytes == fixed + len(IDS) * session.artifact.manifest.growth
    session.reset()
    assert session.state_bytes == fixed


def test_reset_gives_a_fresh_session(artifact: Path) -> None:
    session = lx.load(artifact)
    first = session.prefill(IDS).copy()
    session.reset()
    np.testing.assert_array_equal(session.prefill(IDS), first)


def test_snapshot_goes_back_and_over_to_another_session(artifact: Path, tmp_path: Path) -> None:
    session, other = lx.load(artifact), lx.load(artifact)
    session.prefill(IDS[:20])
    snapshot = session.snapshot()
    expected = session.prefill(IDS[20:]).copy()
    session.restore(snapshot)
    np.testing.assert_array_equal(session.prefill(IDS[20:]), expected)
    snapshot.save(tmp_path / "state")
    other.prefill(IDS)
    other.restore(Snapshot.load(tmp_path / "state"))
    assert other.position.tolist() == [20]
    np.testing.assert_array_equal(other.prefill(IDS[20:]), expected)
    assert [x.name for x in tmp_path.iterdir()] == ["state"]


def test_two_sessions_do_not_mix(artifact: Path) -> None:
    one, two, alone = (lx.load(artifact) for _ in range(3))
    expected = alone.prefill(IDS).copy()
    for a, b in zip(IDS, IDS[::-1], strict=True):
        last = one.step(int(a))
        two.step(int(b))
    np.testing.assert_array_equal(last, expected)
    assert not np.array_equal(two.step(0), one.step(0))


def test_a_batch_equals_its_rows(artifact: Path) -> None:
    rows = np.stack([IDS, IDS[::-1]])
    batch, alone = lx.load(artifact, batch=2), lx.load(artifact)
    batch.prefill(rows[:, :-1])
    logits = batch.step(rows[:, -1])
    for row, found in zip(rows, logits, strict=True):
        alone.reset()
        np.testing.assert_array_equal(alone.prefill(row)[0], found)


def test_padding_starts_before_the_first_token(artifact: Path) -> None:
    session = lx.load(artifact, batch=2)
    session.prefill(np.stack([IDS, IDS]), padding=[0, 3])
    assert session.position.tolist() == [len(IDS), len(IDS) - 3]
    with pytest.raises(UsageError, match="padding after the first token"):
        session.prefill(np.stack([IDS, IDS]), padding=[0, 3])


@pytest.mark.parametrize("ids", [[], np.zeros((1, 0), np.int64)])
def test_no_tokens(artifact: Path, ids: list[int]) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        lx.load(artifact).prefill(ids)


@pytest.mark.parametrize("ids", [[toy.VOCAB], [-1], [0.5], [[1], [2]]])
def test_ids_that_do_not_fit_change_nothing(artifact: Path, ids: list[int]) -> None:
    session = lx.load(artifact)
    with pytest.raises(UsageError):
        session.prefill(ids)
    assert session.position.tolist() == [0]


def test_step_outside_the_vocabulary(artifact: Path) -> None:
    with pytest.raises(UsageError, match=f"token id {toy.VOCAB}"):
        lx.load(artifact).step(toy.VOCAB)


@pytest.mark.parametrize("settings", [{"chunk": 17}, {"chunk": 0}, {"batch": 0}, {"threads": 0}])
def test_settings_that_make_no_sense(artifact: Path, settings: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        lx.load(artifact, **settings)


def test_a_state_of_another_model_is_refused(artifact: Path, tmp_path: Path) -> None:
    other = lx.load(toy.build(tmp_path / "other", liger={"gate": "gla", "window": 3}))
    with pytest.raises(UsageError, match="another conversion of this model"):
        lx.load(artifact).restore(other.snapshot())
    with pytest.raises(UsageError, match=r"past\.0"):
        lx.load(artifact, batch=2).restore(lx.load(artifact).snapshot())


def test_a_file_that_is_no_state(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for name in ("text", "absent"):
        with pytest.raises(LigerError, match="cannot read a state"):
            Snapshot.load(tmp_path / name)


def test_threads_default_to_cores_that_exist() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_built_artifact_equals_torch(built: tuple[Path, Path], chunk: int) -> None:
    import torch

    checkpoint, artifact = built
    ids = np.random.default_rng(2).integers(0, toy.VOCAB, (1, 90))
    with torch.no_grad():
        expected = lx.load_model(checkpoint)(torch.from_numpy(ids)).logits[:, -1].numpy()
    session = lx.load(artifact, chunk=chunk)
    session.prefill(ids[:, :37])
    snapshot = session.snapshot()
    for _ in range(2):
        session.prefill(ids[:, 37:-3])
        for token in ids[0, -3:]:
            logits = session.step(int(token))
        np.testing.assert_allclose(logits, expected, atol=2e-5)
        session.restore(snapshot)


def test_built_artifact_takes_rows_of_different_lengths(built: tuple[Path, Path]) -> None:
    rows = np.random.default_rng(3).integers(0, toy.VOCAB, (2, 40))
    batch, alone = lx.load(built[1], batch=2), lx.load(built[1])
    batch.prefill(rows[:, :-1], padding=[0, 11])
    logits = batch.step(rows[:, -1])
    for row, found, padding in zip(rows, logits, (0, 11), strict=True):
        alone.reset()
        np.testing.assert_allclose(alone.prefill(row[padding:])[0], found, atol=2e-5)


def test_a_prompt_of_100_000_tokens(built: tuple[Path, Path]) -> None:
    session = lx.load(built[1])
    if session.artifact.manifest.growth:
        pytest.skip("a layer kept as softmax grows")
    session.prefill(np.zeros(1000, np.int64))
    state, memory = session.state_bytes, _resident()
    assert np.isfinite(session.prefill(np.arange(100_000) % toy.VOCAB)).all()
    assert session.state_bytes == state and session.position.tolist() == [101_000]
    assert _resident() - memory < 20e6


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
