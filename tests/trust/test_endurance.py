"""Long runs: a model behaves the same after any number of tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ligerexport as lx
from ligerexport.errors import LigerError
from ligerexport.exporters.targets import TARGETS
from ligerexport.kernels.ops import liger_mixer, rotary_table
from ligerexport.kernels.reference import liger_mixer_reference
from ligerexport.model.state import FADE, MixerSpec
from tests.checkpoints import FORESIGHT, SIZES, SOME_GATES, make_checkpoint
from tests.tolerances import DRIFT_FP32, MODEL_FP32, OP_FP32

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
EVICTED = replace(FORESIGHT, recurrence="evicted", recurrence_weight=1.0)
RECALL = replace(FORESIGHT, slots=(("learned", 9),), heads=("12+9 5+6", "6+13 14", "20 4+9"), state_dtype="int8")
CELLS = replace(EVICTED, recurrence="cells", cells=3)
LATE = 2**40
"""More tokens than any test reads; int32 and fp32 cannot count them."""
IDS = np.random.default_rng(5).integers(0, SIZES["vocab_size"], 300)


@pytest.fixture(scope="module", params=[x for x in TARGETS["onnx"].lowerings if x != "plugin"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> lx.Session:
    place = tmp_path_factory.mktemp("evicted")
    checkpoint = make_checkpoint(place / "liger", EVICTED)
    return lx.load(lx.build(checkpoint, place / "engine", lowering=request.param, verify=False))


@pytest.fixture(scope="module", params=["native", "ort", "portable", "torch", "cells"])
def ragged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> lx.Session:
    """A session whose slots lie on one axis, or whose evicted tokens go to cells, which only torch runs."""
    place, lowering = tmp_path_factory.mktemp("ragged"), request.param
    checkpoint = make_checkpoint(place / "liger", CELLS if lowering == "cells" else RECALL)
    if lowering in ("torch", "cells"):
        return lx.load(checkpoint)
    return lx.load(lx.build(checkpoint, place / "engine", lowering=lowering, verify=False))


def later(snapshot: lx.Snapshot, tokens: int) -> lx.Snapshot:
    """Return a state as if this many more tokens had come between the sinks and the rest."""
    moved = {
        name: np.where(array >= EVICTED.sinks, array + tokens, array) if name.endswith("slot_position") else array
        for name, array in snapshot.tensors.items()
    }
    return replace(snapshot, position=snapshot.position + tokens, tensors=moved)


@pytest.mark.parametrize("step", [True, False], ids=["step", "prefill"])
def test_a_long_text_is_read_like_a_short_one(session: lx.Session, step: bool) -> None:
    check_long_text(session, step, LATE)


@pytest.mark.parametrize("step", [True, False], ids=["step", "prefill"])
def test_a_long_text_of_other_memories(ragged: lx.Session, step: bool) -> None:
    """A state with positions in int32 is read up to its last one, and then refuses more."""
    narrow = any(tensor.dtype == "int32" for tensor in ragged.artifact.manifest.state)
    check_long_text(ragged, step, 2**31 - 1 - len(IDS) if narrow else LATE)
    if narrow:
        position = ragged.position.tolist()
        for more in (lambda: ragged.step(1), lambda: ragged.prefill([1, 2])):
            with pytest.raises(LigerError, match="counts up to 2,147,483,647"):
                more()
        assert ragged.position.tolist() == position and len(ragged.held()) == 3
        ragged.reset()
        ragged.step(1)


def check_long_text(session: lx.Session, step: bool, late: int) -> None:
    """Check that a session reads the same text after `late` more tokens in the same way."""
    session.reset()
    session.prefill(IDS[:150])  # beyond the largest rotary distance of the sinks
    snapshot = session.snapshot()

    def rest() -> np.ndarray:
        return np.stack([session.step(int(x))[0].copy() for x in IDS[150:]]) if step else session.prefill(IDS[150:])

    expected = rest().copy()
    state = later(session.snapshot(), late)
    session.restore(later(snapshot, late))
    np.testing.assert_allclose(rest(), expected, atol=MODEL_FP32)
    found = session.snapshot()
    assert found.position.tolist() == state.position.tolist()
    for name in (name for name in state.tensors if name.endswith("slot_position")):
        np.testing.assert_array_equal(np.sort(found.tensors[name]), np.sort(state.tensors[name]))


@pytest.mark.parametrize("mixer", [liger_mixer, liger_mixer_reference])
def test_the_op_reads_a_long_text_like_a_short_one(mixer: object) -> None:
    spec = MixerSpec(EVICTED, 4, 2, 16, 16, 0.25, 64)
    rotary = rotary_table(torch.rand(8), 64, 64)
    query, key, value, score = torch.randn(1, 250, 4, 16), *torch.randn(2, 1, 250, 2, 16), torch.randn(1, 250, 2)

    def part(start: int, end: int, position: int, state: dict[str, torch.Tensor]) -> tuple:
        cut = (x[:, start:end] for x in (query, key, value))
        return mixer(*cut, torch.tensor([position]), state, spec, rotary, score[:, start:end])

    _, state = part(0, 150, 0, spec.initial_state(1, torch.float32))
    expected, _ = part(150, 250, 150, state)
    position = state["slot_position"]
    moved = torch.where(position >= EVICTED.sinks, position + LATE, position)
    found, _ = part(150, 250, 150 + LATE, state | {"slot_position": moved})
    torch.testing.assert_close(found, expected, atol=OP_FP32, rtol=0)


@pytest.mark.parametrize("chunk", [1, 64])
def test_however_long_a_text_is_the_next_token_counts(session: lx.Session, chunk: int) -> None:
    def mass(snapshot: lx.Snapshot) -> np.ndarray:
        return np.stack([x[..., 0] for name, x in snapshot.tensors.items() if name.endswith("recurrent_mass")])

    session.reset()
    session.prefill(IDS[:150])
    state = later(session.snapshot(), FADE - 150 - 32)
    for _ in range(6):
        before = mass(state)
        session.restore(state)
        for part in np.split(IDS[:64], 64 // chunk):
            assert np.isfinite(session.prefill(part)).all()
        state = session.snapshot()
        assert (mass(state) >= before / 2 + 32).all() and (mass(state) <= before / 2 + 64).all()
        state = later(state, FADE - 64)  # the same number of tokens is evicted meanwhile
        for name in (name for name in state.tensors if name.endswith("recurrent_mass")):
            state.tensors[name][..., 0] += FADE - 64
    assert (mass(state) < 2 * FADE).all() and (mass(state) > 1.9 * FADE).all()
    session.restore(state)
    session.step(1)
    assert (mass(session.snapshot()) == mass(state) + 1).all()


def test_torch_halves_its_sums_as_sessions_do(session: lx.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ligerexport.exporters.session.FADE", 50)
    monkeypatch.setattr("ligerexport.layers.cache.FADE", 50)
    session.reset()
    model = lx.load_model(session.artifact.directory.parent / "liger").eval()
    cache = None
    for part in np.split(IDS, 30):
        with torch.inference_mode():
            output = model(torch.from_numpy(part)[None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        np.testing.assert_allclose(session.prefill(part), output.logits[:, -1], atol=MODEL_FP32)
    assert max(layer.state["recurrent_mass"][..., 0].max() for layer in cache.layers) <= 100


@pytest.mark.parametrize("harm", ["future", "gaps", "twice", "nan"])
def test_a_state_that_no_text_leaves_does_no_harm(session: lx.Session, harm: str) -> None:
    """The operator in C++ refuses it; ONNX Runtime's own operators accept any numbers."""
    session.reset()
    expected = session.prefill(IDS[:100]).copy()
    snapshot, tensors = session.snapshot(), {}
    for name, array in snapshot.tensors.items():
        if name.endswith("slot_position"):
            tensors[name] = {
                "future": array + 5, "gaps": np.where(array % 3 == 0, -1, array), "twice": np.full_like(array, 95)
            }.get(harm, array)  # fmt: skip
        else:
            tensors[name] = np.full_like(array, np.nan) if harm == "nan" and name.endswith("slot_score") else array
    session.restore(replace(snapshot, tensors=tensors))
    if harm != "nan" and session.artifact.manifest.lowering == "native":
        with pytest.raises(LigerError, match="no text leaves"):
            session.step(int(IDS[0]))
    else:
        for token in IDS[:40]:
            logits = session.step(int(token))
        assert np.isfinite(logits).all() or harm == "nan"
    session.reset()
    np.testing.assert_array_equal(session.prefill(IDS[:100]), expected)


@pytest.mark.parametrize("config", [EVICTED, RECALL, CELLS], ids=["evicted", "recall", "cells"])
def test_the_harness_in_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: lx.LigerConfig) -> None:
    """It continues after a stop, is as near to fp64 as an unbroken run, and notices a lost token."""
    from drift import Exact, compare, exact
    from endurance import Clock, OutOfTime, Pieces, cut, cycles, step, summary

    checkpoint = cut(make_checkpoint(tmp_path / "liger", config), tmp_path / "cut", 2, 100, 32)
    engine = checkpoint if config.celled else lx.build(checkpoint, tmp_path / "engine", lowering="native", verify=False)
    session = lx.load(engine, threads=1)
    manifest = session.artifact.manifest
    steps, again, truth, trips = (Pieces(tmp_path / name) for name in ("steps", "again", "exact", "trips"))
    step(session, steps, 400, 100, 4.0, Clock(600))
    with pytest.raises(OutOfTime):
        step(session, again, 400, 100, 4.0, Clock(-1))
    for end in (200, 400):
        step(session.sibling(), again, end, 100, 4.0, Clock(600))
    exact(Exact(checkpoint), steps, truth, Clock(600))
    found = summary(steps, 100, manifest)
    assert found["steps"] == 400 and found["distinct_tokens"] > 50 and found["processes"] == 1
    for i in range(4):
        np.testing.assert_array_equal(steps.read(i)["logits"], again.read(i)["logits"])
        row = compare(steps.read(i), truth.read(i), Exact(checkpoint).mixers)
        assert len(row["sums"]) == 2 * config.evicts and max(row["sums"], default=0) < DRIFT_FP32
        assert row["logits"] < MODEL_FP32 or not all(row["same"])
    lost = steps.read(3)
    count = {"evicted": "recurrent_mass", "cells": "cell_count"}.get(config.recurrence, "slot_position")
    lost[f"past.0.{count}"][..., 0] -= 1
    if config.state_dtype == "int8":
        lost["past.0.slot_position"][..., 0] = -1
    steps.write(lost)
    with pytest.raises(ValueError, match="layer 0 has seen"):
        summary(steps, 100, manifest)
    lost["past.0.slot_position"] -= 1
    with pytest.raises(ValueError, match="no near tie"):
        compare(lost, truth.read(3), Exact(checkpoint).mixers)
    cycles(session, trips, 64, 32, Clock(600))
    assert len(trips) == 2


@pytest.mark.parametrize("gate", SOME_GATES)
@pytest.mark.parametrize("keys", ["open", "signs"])
def test_gates_that_never_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: str, keys: str) -> None:
    from open_gates import drive

    rows = drive(tmp_path, gate, keys, 5000)["rows"]
    assert rows[-1]["tokens"] == 5000 and rows[-1]["largest"] <= rows[-1]["bound"]
