"""Sessions on TensorRT: the runner's library and its Python side, with fakes of TensorRT and CUDA.

`trt/fake` has a device that works late and engines of one small model on integers. `benchmarks/trt_session.py` checks
real engines on a GPU.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from conftest import Once

import ligerexport as lx
from ligerexport.artifact.artifact import ArtifactWriter, ByteCounts, Graph, StateTensor, TensorInfo, open_artifact
from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import ArtifactError, LigerError, MissingDependency, UsageError
from ligerexport.exporters.tensorrt.engine import calls
from ligerexport.exporters.tensorrt.session import PLUGIN_VARIABLE, VARIABLE, TensorRTSession, open_runner

ROOT = Path(__file__).parent.parent
RUNNER, FAKE = ROOT / "exporters" / "tensorrt" / "runner", ROOT / "tests" / "trt" / "fake"
IDS = np.random.default_rng(1).integers(0, toy.VOCAB, 41)
CHUNK, MOST = 8, 4
STATE = (
    StateTensor("past.0.slot_key", "present.0.slot_key", ("B", 1, 4, 1), "float16"),
    StateTensor("past.0.slot_position", "present.0.slot_position", ("B", 1, 4), "int32", -1),
    StateTensor("past.0.recurrent_state", "present.0.recurrent_state", ("B", 1, 1), "float32"),
)

pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or not Path("/usr/include/nlohmann/json.hpp").exists(), reason="no g++ or nlohmann-json"
)


def compile_runner(place: Path, version: int) -> None:
    made = place / "libliger_run.so"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-DNV_TENSORRT_MAJOR={version}"]
    flags += ["-DNV_TENSORRT_MINOR=5", f"-I{FAKE}"]
    shared = ["-shared", "-fPIC", "-fvisibility=hidden"]
    sources = [RUNNER / name for name in ("capi.cc", "session.cc", "engine.cc")]
    sources += [FAKE / name for name in ("cuda.cc", "tensorrt.cc")]
    commands = [
        [*flags, *shared, *sources, "-o", made, "-ldl"],
        [*flags, *shared, FAKE / "plugin.cc", "-o", place / "libligerexport_trt.so"],
        [*flags, RUNNER / "main.cc", "-o", place / "liger-run", made, "-Wl,-rpath,$ORIGIN"],
    ]
    for command in commands:
        subprocess.run(["g++", *map(str, command)], check=True)


@pytest.fixture(scope="module", params=[8, 10])
def library(request: pytest.FixtureRequest, once: Once) -> Path:
    """The runner's library for either version of the fake, with a plugin and the command in the same directory."""
    return once(f"runner{request.param}", partial(compile_runner, version=request.param)) / "libliger_run.so"


@pytest.fixture(autouse=True)
def runner(library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(library))
    return library


def make_artifact(destination: Path, state: tuple[StateTensor, ...] = STATE, **changes: Any) -> Path:
    inputs = (TensorInfo("input_ids", "int32", ("B", "T")), TensorInfo("position", "int32", ("B",)))
    inputs += tuple(x.bound(x.past, "plugin") for x in state)
    outputs = (TensorInfo("logits", "float32", ("B", toy.VOCAB)),)
    outputs += tuple(x.bound(x.present, "plugin") for x in state)
    device = {"sms": [90], "max_batch": MOST, "contract": 1, "kernels": "kernels.liger"}
    manifest = toy.manifest(**{
        "target": "trt", "lowering": "plugin", "precision": "float16", "state": state, "device": device,
        "graph": Graph("model.onnx", CHUNK, inputs, outputs), "requires": {},
        "bytes": ByteCounts(16576, sum(x.nbytes for x in state), 128),
    } | changes)  # fmt: skip
    with ArtifactWriter(destination) as writer:
        toy.write_files(writer.directory)
        graph = {side: [vars(x) for x in values] for side, values in (("inputs", inputs), ("outputs", outputs))}
        (writer.directory / "model.onnx").write_text(json.dumps(graph))
        (writer.directory / "kernels.liger").write_bytes(b"kernels")
        writer.commit(manifest)
    return destination


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "artifact")


def expected(ids: Iterable[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the logits `[V]` and the state of the fake's model after one sequence."""
    key, slot, total = np.zeros((1, 4, 1), np.uint16), np.full((1, 4), -1, np.int32), 0
    for now, token in enumerate(map(int, ids)):
        total = (31 * total + 7 * token + now) % 65521
        slot[0, now % 4], key[0, now % 4, 0] = now, token + 1
    mixed = total + int(slot.sum()) + int((key[0, :, 0].astype(int) * [1, 2, 3, 4]).sum())
    logits = (mixed + 13 * np.arange(toy.VOCAB)) % 97
    state = {"slot_key": key.view(np.float16), "slot_position": slot, "recurrent_state": np.float32([[total]])}
    return logits.astype(np.float32), {f"past.0.{name}": x for name, x in state.items()}


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("cut", [0, 1, 17, 40])
def test_any_cut(artifact: Path, chunk: int | None, cut: int) -> None:
    session = lx.load(artifact, chunk=chunk)
    if cut:
        session.prefill(IDS[:cut])
    logits, state = expected(IDS)
    np.testing.assert_array_equal(session.prefill(IDS[cut:])[0], logits)
    assert session.position.tolist() == [len(IDS)]
    found = session.snapshot().tensors
    assert list(found) == [x.past for x in STATE]
    for name, x in state.items():
        np.testing.assert_array_equal(found[name][0], x)
    assert session.state_bytes == sum(x.nbytes for x in state.values())


@pytest.mark.parametrize("graph", [True, False])
def test_chunks_that_come_again(artifact: Path, graph: bool) -> None:
    """A full chunk is replayed, with calls of other sizes in between, in any state."""
    session = TensorRTSession(open_artifact(artifact), graph=graph)
    for _ in range(2):
        seen = 0
        for tokens in (CHUNK, 5, 2 * CHUNK, 3, CHUNK, 1):
            seen += tokens
            np.testing.assert_array_equal(session.prefill(IDS[seen - tokens : seen])[0], expected(IDS[:seen])[0])
        session.reset()


def test_many_sequences_share_a_chunk(tmp_path: Path) -> None:
    """A call's memory holds the same number of tokens for one sequence and for many, but at least 128 of each."""
    path = make_artifact(tmp_path / "a")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["graph"]["max_chunk"] = 600
    (path / "manifest.json").write_text(json.dumps(manifest))
    ids = np.random.default_rng(2).integers(0, toy.VOCAB, 700)
    session = lx.load(path, batch=MOST)
    (engine,) = path.glob("*.engine")
    assert json.loads(engine.read_text())["profiles"] == [[1, 1], [MOST, 1], [1, 600], [MOST, 150]]
    assert calls(MOST, 600) == [(1, 1), (MOST, 1), (1, 600), (MOST, 150)]
    for made in (session, session.sibling(2), session.sibling(1)):
        rows = np.stack([np.roll(ids, row) for row in range(made.batch)])
        np.testing.assert_array_equal(made.prefill(rows), [expected(row)[0] for row in rows])
    assert calls(8, 600)[3] == (8, 128) and calls(8, 40)[3] == (8, 40) and calls(1, 1) == [(1, 1), (1, 1)]


def test_an_engine_of_other_profiles(artifact: Path) -> None:
    """An engine from an earlier runner, which had three profiles."""
    lx.load(artifact, batch=2)
    (engine,) = artifact.glob("*.engine")
    made = json.loads(engine.read_text())
    del made["profiles"][2]
    engine.write_text(json.dumps(made))
    with pytest.raises(ArtifactError, match="built by another version") as caught:
        lx.load(artifact, batch=2)
    assert "--build" in str(caught.value.hint)


def test_codes_are_integers_of_the_engine(tmp_path: Path) -> None:
    """A state of format 2: the engine has four codes as one integer, snapshots have codes."""
    codes = (
        StateTensor("past.1.slot_key", "present.1.slot_key", ("B", 6, 8), "int8"),
        StateTensor("past.1.slot_key_scale", "present.1.slot_key_scale", ("B", 6), "float16"),
    )
    session = lx.load(make_artifact(tmp_path / "a", (*STATE, *codes), format_version=2), batch=2)
    session.prefill(np.stack([IDS[:5], IDS[5:10]]))
    kept = session.snapshot(1)
    assert not kept.tensors["past.1.slot_key"].any() and kept.tensors["past.1.slot_key_scale"].dtype == np.float16
    kept.tensors["past.1.slot_key"][:] = written = np.arange(-24, 24, dtype=np.int8).reshape(1, 6, 8)
    kept.save(tmp_path / "state")
    session.restore(Snapshot.load(tmp_path / "state"), 0)
    found = session.snapshot()
    np.testing.assert_array_equal(found.tensors["past.1.slot_key"], [*written, *np.zeros_like(written)])
    np.testing.assert_array_equal(session.step([int(IDS[10]), int(IDS[10])]), [expected(IDS[5:11])[0]] * 2)
    assert session.state_bytes == 2 * (28 + 48 + 12)


@pytest.mark.parametrize("graph", [True, False])
def test_steps(artifact: Path, graph: bool) -> None:
    session = TensorRTSession(open_artifact(artifact), graph=graph)
    for i, token in enumerate(IDS):
        np.testing.assert_array_equal(session.step(int(token))[0], expected(IDS[: i + 1])[0])
    session.reset()
    every = np.concatenate(list(session.every(IDS[:5])), 1)[0]
    np.testing.assert_array_equal(every, [expected(IDS[: i + 1])[0] for i in range(5)])
    assert session.time_step() == 0.5 and session.position.tolist() == [6]


def test_rows_at_different_positions(artifact: Path) -> None:
    """Sequences come and go; a row waits until it gets tokens."""
    session = lx.load(artifact, batch=3)
    one = session.sibling()
    one.prefill(IDS[:20])
    session.restore(one.snapshot(), 1)
    rows: list[list[int]] = [[], list(IDS[:20]), []]
    for t in range(12):
        tokens = [int(IDS[t]) if t > 4 else -1, int(IDS[t + 20]), int(IDS[-t - 1])]
        if t == 8:
            session.reset(2)
            rows[2] = []
        logits = session.step(tokens)
        for b, token in enumerate(tokens):
            if token >= 0:
                rows[b].append(token)
                np.testing.assert_array_equal(logits[b], expected(rows[b])[0])
        assert session.position.tolist() == [len(x) for x in rows]
    session.prefill(np.stack([IDS[:11]] * 3))
    for b in range(3):
        found = session.snapshot(b)
        assert found.position.tolist() == [len(rows[b]) + 11]
        for name, x in expected([*rows[b], *IDS[:11]])[1].items():
            np.testing.assert_array_equal(found.tensors[name][0], x)
    waiting = session.snapshot(1)
    session.step([3, -1, 4])
    kept = session.snapshot(1)
    assert kept.position.tolist() == waiting.position.tolist()
    for name, x in waiting.tensors.items():
        np.testing.assert_array_equal(kept.tensors[name], x)


def test_padding(artifact: Path) -> None:
    session = lx.load(artifact, batch=2)
    logits = session.prefill(np.stack([IDS, IDS]), padding=[0, 30])
    np.testing.assert_array_equal(logits, [expected(IDS)[0], expected(IDS[30:])[0]])
    assert session.position.tolist() == [41, 11]
    with pytest.raises(UsageError, match="padding after the first token"):
        session.prefill(np.stack([IDS, IDS]), padding=[0, 3])


def test_snapshots(artifact: Path, tmp_path: Path) -> None:
    session, other = lx.load(artifact), lx.load(artifact, batch=2)
    session.prefill(IDS[:20])
    snapshot = session.snapshot()
    logits = session.prefill(IDS[20:]).copy()
    snapshot.save(tmp_path / "state")
    session.restore(Snapshot.load(tmp_path / "state"))
    assert session.position.tolist() == [20]
    np.testing.assert_array_equal(session.prefill(IDS[20:]), logits)
    other.restore(Snapshot.stack([snapshot, session.snapshot()]))
    assert other.position.tolist() == [20, 41]
    np.testing.assert_array_equal(other.step([IDS[20], 7])[1], expected([*IDS, 7])[0])
    with pytest.raises(UsageError, match="this state has no"):
        other.restore(snapshot)
    foreign = Snapshot("another", snapshot.position, snapshot.tensors)
    with pytest.raises(UsageError, match="another model"):
        session.restore(foreign)


def test_siblings_in_threads(artifact: Path) -> None:
    first = lx.load(artifact, batch=2)
    sessions = [first, *(first.sibling(1 + i % 2) for i in range(3))]

    def work(i: int) -> bool:
        session, ids = sessions[i], np.roll(IDS, i)
        for _ in range(10):
            session.reset()
            session.prefill(np.stack([ids[:30]] * session.batch))
            for token in ids[30:]:
                logits = session.step([int(token)] * session.batch)
            if not (logits == expected(ids)[0]).all():
                return False
        return True

    with ThreadPoolExecutor(len(sessions)) as pool:
        assert all(pool.map(work, range(len(sessions))))
    with pytest.raises(UsageError, match="batch 3"):
        first.sibling(3)


def test_everything_is_freed(artifact: Path) -> None:
    runner = open_runner()
    gc.collect()
    before = runner.fake_alive()
    session: Any = lx.load(artifact)
    other = session.sibling()
    del session
    gc.collect()
    other.prefill(IDS)  # on the engine that both had
    assert runner.fake_alive() > before
    del other
    gc.collect()
    assert runner.fake_alive() == before


@pytest.mark.parametrize("what", ["parse", "build", "run"])
def test_failures(artifact: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    runner = open_runner()
    gc.collect()
    before = runner.fake_alive()
    monkeypatch.setenv("FAKE_FAILS", what)
    messages = {"parse": "node 3: no such operator", "build": "cannot build an engine", "run": "refuses to run"}
    with pytest.raises(LigerError, match=messages[what]):
        lx.load(artifact)
    gc.collect()
    assert runner.fake_alive() == before
    monkeypatch.delenv("FAKE_FAILS")
    session = lx.load(artifact)
    monkeypatch.setenv("FAKE_FAILS", "run")
    with pytest.raises(LigerError, match="refuses to run"):
        session.prefill(IDS)


def engines(artifact: Path) -> list[str]:
    return sorted(x.name for x in artifact.glob("*.engine"))


def test_an_engine_is_built_once_and_found_again(artifact: Path) -> None:
    first: Any = lx.load(artifact, batch=2)
    assert first.engine["build_seconds"] > 0
    (name,) = engines(artifact)
    stamp = (artifact / name).stat().st_mtime_ns
    for batch in (1, 2):  # an engine for more will do
        again: Any = lx.load(artifact, batch=batch)
        assert again.engine["build_seconds"] == 0 and Path(again.engine["engine"]).name == name
    assert (artifact / name).stat().st_mtime_ns == stamp
    lx.load(artifact, batch=3)
    assert len(engines(artifact)) == 2
    TensorRTSession(open_artifact(artifact), batch=2, build=True)
    assert (artifact / name).stat().st_mtime_ns != stamp
    record = json.loads((artifact / f"{name}.json").read_text())
    plugin = (Path(os.environ[VARIABLE]).parent / "libligerexport_trt.so").read_bytes()
    assert record["batch"] == 2 and record["sm"] == 90 and record["plugin"] == f"{zlib.crc32(plugin):08x}"


@pytest.mark.parametrize(
    ("variable", "value", "there", "here"),
    [("FAKE_SM", "87", "sm 90", "sm 87"), ("FAKE_TENSORRT", "8601", "tensorrt ", "tensorrt 8601")],
)
def test_an_engine_of_another_machine(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, there: str, here: str
) -> None:
    lx.load(artifact)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ArtifactError, match=f"was built for .*{there}.*; here is .*{here}") as caught:
        lx.load(artifact)
    assert caught.value.hint == f"liger-run {artifact} --build --batch 1"
    TensorRTSession(open_artifact(artifact), build=True)
    lx.load(artifact)


def test_an_engine_of_another_plugin_or_model(artifact: Path, library: Path, tmp_path: Path) -> None:
    lx.load(artifact)
    (name,) = engines(artifact)
    other = tmp_path / "libligerexport_trt.so"
    other.write_bytes((library.parent / other.name).read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match=r"was built for .*plugin"):
        TensorRTSession(open_artifact(artifact), plugin=other)
    changed = make_artifact(tmp_path / "changed", liger={"gate": "gla", "window": 3})
    for file in (name, f"{name}.json"):
        shutil.copy(artifact / file, changed)
    lx.load(changed)  # the same files: what differs is nothing to an engine
    record = json.loads((changed / f"{name}.json").read_text())
    (changed / f"{name}.json").write_text(json.dumps(record | {"model": "0" * 8}))
    with pytest.raises(ArtifactError, match="model 00000000"):
        lx.load(changed)
    for text in (None, "{", "[]", "{}"):
        (changed / f"{name}.json").unlink(missing_ok=True)
        if text is not None:
            (changed / f"{name}.json").write_text(text)
        with pytest.raises(ArtifactError, match="does not say what it was built for"):
            lx.load(changed)


def test_a_damaged_engine(artifact: Path) -> None:
    lx.load(artifact)
    (name,) = engines(artifact)
    (artifact / name).write_bytes(b"{")
    with pytest.raises(ArtifactError, match="cannot read") as caught:
        lx.load(artifact)
    assert "--build" in str(caught.value.hint)


@pytest.mark.parametrize("settings", [{"batch": MOST + 1}, {"batch": 0}, {"chunk": CHUNK + 1}, {"chunk": 0}])
def test_settings_that_make_no_sense(artifact: Path, settings: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        lx.load(artifact, **settings)


def test_what_is_missing(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_artifact(artifact)
    with pytest.raises(LigerError, match="cannot open the plugin library"):
        TensorRTSession(opened, plugin=tmp_path / "nowhere.so")
    empty = tmp_path / "empty.so"
    subprocess.run(["g++", "-shared", "-xc++", "/dev/null", "-o", empty], check=True)
    with pytest.raises(LigerError, match="no plugin library of ligerexport"):
        TensorRTSession(opened, plugin=empty)
    with pytest.raises(MissingDependency, match=r"what .*empty\.so needs"):
        open_runner(empty)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(MissingDependency, match=r"libliger_run\.so is needed") as caught:
        lx.load(artifact)
    assert "cmake" in str(caught.value.hint)


def test_code_in_the_artifact_runs_only_if_it_is_named(
    artifact: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (library.name, "libligerexport_trt.so"):
        shutil.move(shutil.copy(library.parent / name, tmp_path), artifact / name)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(MissingDependency, match=r"libliger_run\.so"):
        lx.load(artifact)
    monkeypatch.setenv(VARIABLE, str(library))
    monkeypatch.setenv(PLUGIN_VARIABLE, str(artifact / "libligerexport_trt.so"))
    with pytest.raises(ArtifactError, match="not a file of this artifact's manifest"):
        lx.load(artifact)
