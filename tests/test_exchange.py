"""One state for every runtime: what one session saves is continued by any other of the same model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MEMORY, make_checkpoint
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_ragged_graph import HEADS, SIZES

import ligerexport as lx
from ligerexport.artifact.snapshot import Snapshot, digest
from ligerexport.errors import LigerError, UsageError
from ligerexport.exporters.onnx.spec import read_spec
from ligerexport.exporters.targets import STATES, TARGETS
from ligerexport.model.config import LigerConfig
from ligerexport.run.runtime import Session

PROMPT, STEPS = np.random.default_rng(1).integers(3, 131, 70), 128
TIE = 1e-3
"""Largest difference of two logits that the order of sums may exchange, as between two lowerings."""
MEMORIES = {"equal": MEMORY, "recurrent": LigerConfig(window=12, gate="gla"), "ragged": SIZES}

Sessions = dict[str, Session]


@pytest.fixture(scope="module", params=MEMORIES)
def sessions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    """A session of the checkpoint and one of each artifact of it, by names."""
    root = tmp_path_factory.mktemp("exchange")
    model = make_checkpoint(root / "model", MEMORIES[request.param], **HEADS)
    made = {"torch": lx.load(model)}
    for name, options in {name: {"lowering": name} for name in TARGETS["onnx"].lowerings}.items():
        made[name] = lx.load(lx.build(model, root / name, verify=False, **options))
    made["int8"] = lx.load(lx.build(model, root / "int8", weights="int8", block=16, verify=False))
    return made


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ragged")
    return lx.build(make_checkpoint(root / "model", SIZES, **HEADS), root / "engine", verify=False)


def greedy(session: Session, ids: list[int]) -> np.ndarray:
    """Return the logits after each of some tokens, `[T, V]`; tokens that are missing are chosen greedily."""
    logits: list[np.ndarray] = []
    for step in range(STEPS):
        if step == len(ids):
            ids.append(int(logits[-1].argmax()))
        logits.append(session.step(ids[step])[0].copy())
    return np.stack(logits)


def loss(logits: np.ndarray, ids: list[int]) -> float:
    """Return the mean negative log-likelihood of tokens after the first, in nats."""
    logits = logits[:-1].astype(np.float64)
    return float((np.log(np.exp(logits).sum(-1)) - logits[range(STEPS - 1), ids[1:]]).mean())


def test_every_runtime_continues(sessions: Sessions, tmp_path: Path) -> None:
    """What torch saves is read by all, and what all save by `native`; the tokens are torch's greedy choices."""
    ids: list[int] = [5]
    rounds = any(name.endswith("_scale") for name in sessions["torch"].snapshot().tensors)
    losses = {}
    for writer, reader in [*(("torch", name) for name in sessions), *((name, "native") for name in sessions)]:
        sessions[writer].reset()
        sessions[writer].prefill(PROMPT)
        sessions[writer].snapshot().save(tmp_path / "state")
        sessions[reader].restore(Snapshot.load(tmp_path / "state"))
        assert sessions[reader].position.tolist() == [len(PROMPT)]
        found = greedy(sessions[reader], ids)
        losses[writer, reader] = loss(found, ids)
        if (writer, reader) == ("torch", "torch"):
            expected = found
        elif "int8" not in (writer, reader) and not rounds:
            assert abs(found - expected).max() < TIE, (writer, reader)
        elif "int8" not in (writer, reader):  # a code may be rounded the other way
            assert abs(losses[writer, reader] - loss(expected, ids)) < 0.02, (writer, reader)
    assert losses["torch", "int8"] < losses["torch", "torch"] + 0.3
    assert losses["int8", "native"] < losses["torch", "torch"] + 1.0


@pytest.mark.parametrize("kind", ["uint16", "float16"])
def test_order_and_16_bits(sessions: Sessions, kind: str) -> None:
    """A state as a GPU leaves it: slots in any order, activations in 16 bits, positions in 32."""
    session, rng = sessions["ort"], np.random.default_rng(0)
    session.reset()
    session.prefill(PROMPT)
    state, ids = session.snapshot(), [5]
    expected = greedy(session, ids)
    tensors = dict(state.tensors)
    for name in [name for name in tensors if name.endswith("slot_position") and tensors[name].ndim == 3]:
        order = rng.permuted(np.tile(np.arange(tensors[name].shape[2]), (1, HEADS["num_key_value_heads"], 1)), axis=2)
        for part in [part for part in tensors if part.startswith(name.replace("position", ""))]:
            axis = 3 if part.endswith("score") else 2
            index = order[:, :, None] if axis == 3 else order[..., None] if tensors[part].ndim == 4 else order
            tensors[part] = np.take_along_axis(tensors[part], index, axis=axis)
        tensors[name] = tensors[name].astype(np.int32)
    for name in [
        name for name in tensors if name.endswith(("slot_key", "slot_value")) and tensors[name].dtype != "int8"
    ]:
        x = tensors[name]
        tensors[name] = x.astype(kind) if kind == "float16" else (x.view(np.uint32) >> 16).astype(np.uint16)
    session.restore(replace(state, tensors=tensors))
    found = session.snapshot()
    for name, x in state.tensors.items():
        assert found.tensors[name].dtype == x.dtype
        np.testing.assert_allclose(found.tensors[name], x, rtol=2**-11 if kind == "float16" else 2**-7, atol=1e-4)
    assert abs(loss(greedy(session, ids), ids) - loss(expected, ids)) < 0.1


def swap(tensors: dict[str, np.ndarray], one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


HOSTILE: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "absent": (lambda x: x.pop("past.0.slot_key"), r"no past\.0\.slot_key"),
    "scale": (lambda x: x.pop("past.0.slot_key_scale"), r"no past\.0\.slot_key"),
    "more": (lambda x: x.update(past=x["position"]), "a tensor 'past'"),
    "layer": (lambda x: x.update({"past.9.slot_key": x["past.0.slot_key"]}), "a tensor 'past.9.slot_key'"),
    "shape": (lambda x: x.update({"past.1.slot_value": x["past.1.slot_value"][:, 1:]}), r"no past\.1"),
    "axes": (lambda x: x.update({"past.1.slot_position": x["past.1.slot_position"][0]}), r"no past\.1"),
    "type": (lambda x: x.update({"past.1.slot_key": x["past.1.slot_key"].astype(bool)}), r"no past\.1"),
    "wide": (lambda x: x.update({"past.1.slot_position": x["past.1.slot_position"] + np.int64(1 << 40)}), r"no past"),
    "negative": (lambda x: x.update({"past.1.slot_position": x["past.1.slot_position"] - 5}), "cannot be the one"),
    "positions": (lambda x: x.update(position=x["position"].astype(float)), "its position"),
    "layers": (lambda x: swap(x, "past.0.slot_key", "past.1.slot_key"), r"no past\.0\.slot_key"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(ragged: Path, tmp_path: Path, name: str) -> None:
    """Files whose hash is right, but not their content."""
    session, (change, message) = lx.load(ragged), HOSTILE[name]
    session.prefill(PROMPT)
    session.snapshot().save(tmp_path / "state")
    with safe_open(tmp_path / "state", "numpy") as file:
        header = file.metadata()
    tensors = load_file(tmp_path / "state")
    change(tensors)
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(tensors, tmp_path / "state", header | {"sha256": digest(tensors)})
    with pytest.raises(LigerError, match=message) as caught:
        session.restore(Snapshot.load(tmp_path / "state"))
    assert "\n" not in str(caught.value) and caught.value.hint


def test_changed_files(ragged: Path, tmp_path: Path) -> None:
    """A file of which any byte changed is refused, or its header says the same in other words."""
    session, rng = lx.load(ragged), np.random.default_rng(2)
    session.prefill(PROMPT)
    expected = session.snapshot()
    expected.save(tmp_path / "state")
    whole = (tmp_path / "state").read_bytes()
    for at in [*range(0, 3000, 29), *rng.integers(3000, len(whole), 50)]:
        changed = bytearray(whole)
        changed[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "state").write_bytes(changed)
        with suppress(LigerError):
            found = Snapshot.load(tmp_path / "state")
            session.restore(found)
            assert found.tensors.keys() == expected.tensors.keys()
            assert all((x == expected.tensors[name]).all() for name, x in found.tensors.items())


def test_formats(ragged: Path, tmp_path: Path) -> None:
    """The format before is read by the artifact that wrote it, and that after is refused by its number."""
    session = lx.load(ragged)
    session.prefill(PROMPT)
    state = session.snapshot()
    state.save(tmp_path / "state")
    tensors = load_file(tmp_path / "state")
    save_file(tensors, tmp_path / "old", {"ligerexport.snapshot": "1", "model": state.model})
    session.restore(Snapshot.load(tmp_path / "old"))
    save_file(tensors, tmp_path / "old", {"ligerexport.snapshot": "1", "model": "other"})
    with pytest.raises(UsageError, match="another model, or to other weights"):
        session.restore(Snapshot.load(tmp_path / "old"))
    save_file(tensors, tmp_path / "new", {"ligerexport.snapshot": "3", "model": state.model})
    with pytest.raises(LigerError, match=r"its format 3 is newer than this program reads \(2\)"):
        Snapshot.load(tmp_path / "new")
    conversion = f"{(state.identity or '').partition('-')[0]}-0"
    for identity, what in ((conversion, "another conversion of this model"), ("0-0", "another model")):
        with pytest.raises(UsageError, match=f"belongs to {what}$"):
            session.restore(replace(state, model="other", identity=identity))


@pytest.mark.parametrize("preset", ["equal", "ragged"])
def test_types_of_the_state(tmp_path: Path, preset: str) -> None:
    """One checkpoint is built with each type; every artifact reads the states of the others."""
    model, sessions = make_checkpoint(tmp_path / "model", MEMORIES[preset], **HEADS), {}
    for kind, lowering in (("fp32", "ort"), ("fp16", "native"), ("int8", "portable")):
        path = lx.build(
            model, tmp_path / kind, state=kind, lowering=lowering, weights="int8" if kind == "int8" else None
        )
        sessions[kind] = lx.load(path)
        manifest = sessions[kind].artifact.manifest
        assert manifest.liger.get("state_dtype", "activation") == STATES[kind]
        assert manifest.slots == tuple(mixer.slots_per_head for mixer in read_spec(model).mixers if mixer is not None)
        assert manifest.format_version == 2 or (preset, kind) == ("equal", "fp32")
        if kind == "int8":
            assert manifest.quality is not None
            assert manifest.quality["nll_state"] != manifest.quality["nll_float32"]
    sizes = {kind: session.artifact.manifest.bytes.state_per_sequence for kind, session in sessions.items()}
    assert sizes["int8"] < sizes["fp16"] < sizes["fp32"]
    assert len({session.artifact.manifest.fingerprint for session in sessions.values()}) == 3
    ids: list[int] = [5]
    sessions["fp32"].prefill(PROMPT)
    exact = sessions["fp32"].snapshot()
    expected = greedy(sessions["fp32"], ids)
    for kind in ("fp16", "int8"):
        sessions[kind].restore(exact)
        back = sessions[kind].snapshot()
        sessions["fp32"].restore(back)
        for name, x in sessions["fp32"].snapshot().tensors.items():
            kept = exact.tensors[name]
            if name.endswith(("slot_key", "slot_value")):
                bound = abs(kept).max(-1, keepdims=True) / 254 * 1.01 if kind == "int8" else abs(kept) / 2048
                assert (abs(x - kept) <= bound + 1e-7).all(), name
            else:
                np.testing.assert_array_equal(x, kept)
        assert abs(loss(greedy(sessions["fp32"], ids), ids) - loss(expected, ids)) < 0.1
        sessions[kind].restore(sessions["fp32"].snapshot())
        sessions[kind].restore(back)  # codes are kept as they are
        for name, x in back.tensors.items():
            np.testing.assert_array_equal(x, sessions[kind].snapshot().tensors[name])


def test_an_unknown_type(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", MEMORY)
    with pytest.raises(UsageError, match="unknown type of the state 'int4'"):
        lx.build(model, tmp_path / "engine", state="int4")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MEMORIES)
def test_a_gpu_reads_and_a_cpu_goes_on(tmp_path: Path, name: str) -> None:
    """The fused step leaves slots in any order; the state also goes back to the GPU."""
    go_on(make_checkpoint(tmp_path / "model", MEMORIES[name], **HEADS, vocab_size=400), tmp_path, "cuda")


def go_on(model: Path, place: Path, device: str) -> None:
    """Read prompts and some steps on a device, and continue there and with an artifact.

    No token comes twice: in the first layer both would have the same score, and the last bit would choose the one that
    is forgotten.
    """
    reader, artifact = lx.load(model, device=device), lx.load(lx.build(model, place / "ort", verify=False))
    for seed in range(5):
        ids = np.random.default_rng(seed).permutation(range(3, 400)).tolist()
        reader.reset()
        reader.prefill(np.array(ids[:70]))
        for token in ids[70:130]:
            reader.step(token)
        reader.snapshot().save(place / "state")
        later = ids[130 : 130 + STEPS]
        expected = loss(greedy(reader, later), later)
        artifact.restore(Snapshot.load(place / "state"))
        artifact.snapshot().save(place / "back")
        assert abs(loss(greedy(artifact, later), later) - expected) < 0.002
        reader.restore(Snapshot.load(place / "back"))
        assert abs(loss(greedy(reader, later), later) - expected) < 0.002
