"""Drafts: a session advances by some tokens and takes the last ones back, each row for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import MEMORY, make_checkpoint
from test_onnx_graph import foreseen, mixer_graph, session_options
from test_ragged import SOFTMAX

import ligerexport as lx
from ligerexport.artifact.artifact import StateTensor
from ligerexport.errors import LigerError, UsageError
from ligerexport.exporters.onnx.lent import UNDO, with_inputs
from ligerexport.exporters.onnx.native.undo import Undo
from ligerexport.exporters.session import DRAFT
from ligerexport.model.state import MixerSpec

IDS = np.random.default_rng(2).integers(3, 131, (2, 60))
RAGGED = replace(SOFTMAX, heads=("3 8+5", "8+5 20", "1+12 6"), state_dtype="int8")
FORMS = {
    "native": ("native", RAGGED),
    "ort": ("ort", RAGGED),
    "portable, sums": ("portable", replace(MEMORY, recurrence_weight=0.5)),
    "native, softmax": ("native", replace(MEMORY, keep_softmax=(1,))),
    "torch": (None, RAGGED),
}


Load = Callable[..., lx.Session]


@pytest.fixture(scope="module", params=[*FORMS, pytest.param("torch on cuda", marks=pytest.mark.gpu)])
def load(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Load:
    name, _, device = request.param.partition(" on ")
    lowering, liger = FORMS[name]
    path = make_checkpoint(tmp_path_factory.mktemp("drafts") / "liger", liger)
    path = path if lowering is None else lx.build(path, lowering=lowering, verify=False)
    return partial(lx.load, path, device=device or "cpu")


def begun(load: Load, batch: int = 1) -> lx.Session:
    session = load(batch=batch)
    session.prefill(IDS[:batch, :40])
    return session


def tensors(session: lx.Session) -> dict[str, np.ndarray]:
    return session.snapshot().tensors


def test_the_state_does_not_know_what_was_taken_back(load: Load) -> None:
    """It is that of single steps, to the bit if no token is kept, and rejected tokens leave no trace in it."""
    session, stepped = begun(load), begun(load)
    untouched = tensors(session)
    logits = np.stack([stepped.step(token)[0].copy() for token in IDS[0, 40:46]])
    before, states = session.snapshot(), []
    for kept in (0, 2, 6):
        for other in (3, 9):
            draft = np.append(IDS[0, 40 : 40 + kept], np.full(6 - kept, other))
            np.testing.assert_allclose(session.propose(draft)[0, :kept], logits[:kept], atol=1e-4)
            session.commit(kept)
            states.append(tensors(session))
            assert session.position == 40 + kept
            session.restore(before)
        for name, found in states[-1].items():
            np.testing.assert_array_equal(found, states[-2][name] if kept else untouched[name])
    for name, x in tensors(stepped).items():
        if x.dtype.kind == "f":
            np.testing.assert_allclose(x, states[-1][name], atol=1e-4, err_msg=name)


def test_rows_keep_what_they_want(load: Load) -> None:
    """Each goes on as a session that runs alone."""
    session = begun(load, batch=2)
    for kept in ((1, 4), (0, 3)):
        at = session.position
        draft = np.stack([row[p : p + 4] for row, p in zip(IDS, at, strict=True)])
        for row, k in enumerate(kept):
            draft[row, k:] = 5
        session.propose(draft)
        session.commit(kept)
        np.testing.assert_array_equal(session.position, at + kept)
    alone = load()
    for row, logits in enumerate(session.step([7, 7])):
        alone.reset()
        np.testing.assert_allclose(alone.prefill([*IDS[row, : 41 + 6 * row], 7])[0], logits, atol=1e-4)


def test_no_other_call_before_the_commit(load: Load) -> None:
    session = begun(load)
    with pytest.raises(UsageError, match="no draft waits"):
        session.commit(0)
    with pytest.raises(UsageError, match="a draft of 17 tokens"):
        session.propose([5] * (DRAFT + 1))
    session.propose([5, 6])
    for call in (session.snapshot, lambda: session.step(5), lambda: session.prefill([5]), lambda: session.propose([5])):
        with pytest.raises(UsageError, match="a draft of 2 tokens waits"):
            call()
    with pytest.raises(UsageError, match="3 tokens of a draft"):
        session.commit(3)
    session.commit(1)
    assert session.position == 41
    session.propose([5])
    session.reset()
    assert session.step(5).shape == (1, 131) and session.position == 1


class Memory:
    """One layer's operator, which updates its state in place."""

    def __init__(self, spec: MixerSpec, batch: int, tokens: int) -> None:
        graph = mixer_graph(spec, "native", 1 / (100 ** (torch.arange(4) / 8)))
        self.session = onnxruntime.InferenceSession(with_inputs(graph.SerializeToString()), session_options())
        self.wanted = {x.name for x in self.session.get_inputs()}
        state = {name: x.numpy() for name, x in spec.initial_state(batch, torch.float32).items()}
        self.state = {StateTensor(f"past.0.{name}", name, (), str(x.dtype)): x for name, x in state.items()}
        self.undo = Undo(self.state, 1, spec.kv_heads, tokens)

    def run(self, inputs: dict[str, torch.Tensor], position: np.ndarray, part: slice, undo: bool = False) -> None:
        binding = self.session.io_binding()
        given: dict[str, Any] = {name: x[:, part].flatten(0, 1).numpy() for name, x in inputs.items()}
        given |= {"position": position, "input_ids": np.zeros((2, part.stop - part.start), np.int64)}
        given |= {UNDO: self.undo.memory} if undo else {}
        for tensor, array in self.state.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(tensor.past.replace("past.0", "past"), value)
            binding.bind_ortvalue_output(f"present.{tensor.present}", value)
        for name, x in given.items():
            if name in self.wanted or name == UNDO:
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)))
        binding.bind_output("output")
        self.session.run_with_iobinding(binding)


@pytest.mark.parametrize("state_dtype", ["activation", "float16", "int8"])
@pytest.mark.parametrize("start", [0, 5, 30])
def test_the_operator_takes_back_to_the_bit(start: int, state_dtype: str) -> None:
    """The state is slot for slot that of a call of the kept tokens, also while memories fill, in each row."""
    config = replace(SOFTMAX, heads=("3 8+5 1+12 20",), state_dtype=state_dtype)
    spec = MixerSpec(config, q_heads=4, kv_heads=4, d_k=8, d_v=12, scale=0.3, max_distance=64)
    generator = torch.Generator().manual_seed(start)
    inputs = {
        name: torch.randn(2, start + 9, heads * d, generator=generator) for name, heads, d in
        (("q", 4, 8), ("k", 4, 8), ("v", 4, 12))
    }  # fmt: skip
    inputs["score"] = foreseen(inputs["v"].unflatten(2, (4, 12)))
    memory, draft = Memory(spec, 2, 9), slice(start, start + 9)
    if start:
        memory.run(inputs, np.zeros(2, np.int64), slice(0, start))
    begin, position = {t: x.copy() for t, x in memory.state.items()}, np.full(2, start)

    def again() -> None:
        for tensor, x in begin.items():
            memory.state[tensor][...] = x

    expected = []
    for kept in range(10):
        again()
        if kept:
            memory.run(inputs, position, slice(start, start + kept))
        expected.append({t: x.copy() for t, x in memory.state.items()})
    for kept in range(10):
        again()
        memory.run(inputs, position, draft, undo=True)
        rows = kept, 9 - kept
        memory.undo.kept[:] = rows
        memory.undo.take_back()
        for tensor, x in memory.state.items():
            for row, k in enumerate(rows):
                np.testing.assert_array_equal(x[row], expected[k][tensor][row], err_msg=f"{tensor.past} {kept}")


def test_records_of_another_state_are_refused(tmp_path: Path) -> None:
    """A forged graph cannot make a session write elsewhere."""
    built = lx.build(make_checkpoint(tmp_path / "liger", RAGGED), lowering="native", verify=False)
    session: Any = begun(partial(lx.load, built))
    before = {t.past: x.copy() for t, x in session._fixed.items()}
    session.propose([5, 6])
    after = {t.past: x.copy() for t, x in session._fixed.items()}
    assert any((x != after[name]).any() for name, x in before.items())
    session._undo._ranges[:] = 0
    with pytest.raises(LigerError, match="in the place"):
        session.commit(1)
    for tensor, x in session._fixed.items():
        np.testing.assert_array_equal(x, after[tensor.past])
    with pytest.raises(LigerError, match="did not complete"):
        session.step(5)
