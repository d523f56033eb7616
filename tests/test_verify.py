"""`build` writes only artifacts that pass: planted faults are caught, and their layer is named."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoints import FORESIGHT, MEMORY, make_checkpoint

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.checkpoint.convert import load_model
from ligerexport.console import silent
from ligerexport.errors import CheckpointError, LigerError, UsageError, VerificationError
from ligerexport.exporters.build import build
from ligerexport.exporters.onnx import graph as onnx_graph
from ligerexport.exporters.onnx import session as onnx_session
from ligerexport.exporters.onnx.session import OnnxSession
from ligerexport.exporters.onnx.spec import ModelSpec, read_spec
from ligerexport.exporters.onnx.weights import weight_slabs
from ligerexport.exporters.verify import compare, ties, verify
from ligerexport.exporters.verify import torch_model as reference
from ligerexport.exporters.verify.torch_model import Answer, Reference
from ligerexport.layers.mixer import LigerCache
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import FAMILIES
from ligerexport.run.runtime import load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("verify") / "model", MEMORY)


@pytest.mark.parametrize("lowering", ["ort", "portable"])
def test_artifact_runs(checkpoint: Path, tmp_path: Path, lowering: str) -> None:
    path = build(checkpoint, tmp_path / "engine", lowering=lowering)
    result = json.loads((path / "manifest.json").read_text())["verification"]
    assert result["passed"] and result["greedy_tokens"] == result["greedy_tokens_equal"] > 0
    assert 0 < result["max_logit_error"] < result["tolerance"]["logits"]
    assert load(path).prefill([3, 4, 5]).shape == (1, 131)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["engine"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(tmp_path: Path, family: str) -> None:
    path = build(make_checkpoint(tmp_path / "model", MEMORY, family), tmp_path / "engine")
    result = json.loads((path / "manifest.json").read_text())["verification"]
    assert result["passed"] and 0 < result["max_logit_error"] < result["tolerance"]["logits"]


def test_scores_of_the_hidden_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are part of the artifact, and wrong scores are found in their layer."""
    model = make_checkpoint(tmp_path / "model", FORESIGHT)
    build(model, tmp_path / "engine")
    write = onnx_graph.write_graph

    def broken(spec: ModelSpec, directory: Path, **options: Any) -> None:
        write(spec, directory, **options)
        data = np.memmap(directory / onnx_graph.DATA_FILE, mode="r+")
        _weight(spec, data, "model.layers.1.self_attn.score_proj.weight")[1] *= -1
        data.flush()

    monkeypatch.setattr(onnx_graph, "write_graph", broken)
    monkeypatch.setattr(onnx_session, "check_graph", lambda artifact: None)  # which knows no operators of faults
    with pytest.raises(VerificationError, match=r"layers\.1\.self_attn\.score_proj\.weight as it is stored"):
        build(model, tmp_path / "other")


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_model_a_layer_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, large: bool
) -> None:
    """With a softmax layer, over several calls, and from a cache; never with the weights of more than one layer."""
    if large:  # a few rows of the embedding and the output at a time
        monkeypatch.setattr("ligerexport.exporters.verify.torch_model.SHARE", 0)
        monkeypatch.setattr("ligerexport.exporters.onnx.weights.SLAB", 1000)
    path = make_checkpoint(tmp_path / "model", replace(MEMORY, keep_softmax=(0,)), family, dtype=torch.bfloat16)
    reference, model = Reference(read_spec(path)), load_model(path, torch.float32).eval()
    cache, own = LigerCache(model.config), reference.new_cache()
    pieces = np.split(np.random.default_rng(3).integers(0, 131, 60), [40, 41, 59])
    put, loaded = reference._put, [0]

    def count(*change: Any) -> None:
        put(*change)
        loaded.append(sum(p.numel() for p in reference._model.parameters() if not p.is_meta))

    monkeypatch.setattr(reference, "_put", count)
    answers = reference.answers(pieces[:2], own) + reference.answers(pieces[2:], own, hidden=True)
    largest = max(sum(p.numel() for p in part.parameters()) for part in (*model.model.layers, model.lm_head))
    assert largest <= max(loaded) <= largest + 64 and loaded[-1] == 0  # 64: the norm before the output
    for answer in answers:
        with torch.inference_mode():
            expected = model(torch.from_numpy(answer.ids)[None], past_key_values=cache, use_cache=True).logits[0]
        np.testing.assert_allclose(answer.logits, expected[-1].numpy(), atol=1e-5)
        for layer in (1, 2):
            for name, tensor in cache.layers[layer].state.items():
                np.testing.assert_allclose(answer.state[f"past.{layer}.{name}"], tensor.numpy(), atol=1e-5)
        np.testing.assert_allclose(answer.state["past.0.value"], cache.layers[0].values.numpy(), atol=1e-5)
    every = reference.every(np.concatenate(pieces))
    np.testing.assert_allclose(every[[39, 40, 58, 59]], [answer.logits for answer in answers], atol=1e-4)


def test_layer_kept_as_softmax(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", LigerConfig(window=16, sinks=2, keep_softmax=(1,)))
    build(model)
    assert load(model / "onnx").artifact.manifest.growth == 2 * 2 * 16 * 4


def swap_layers(spec: ModelSpec, data: np.memmap) -> None:
    one, other = (_weight(spec, data, f"model.layers.{i}.mlp.down_proj.weight") for i in (1, 2))
    one[:], other[:] = other.copy(), one.copy()


def next_number(spec: ModelSpec, data: np.memmap) -> None:
    norm = _weight(spec, data, "model.layers.2.input_layernorm.weight")
    norm[5] = np.nextafter(norm[5], np.float32(2))


def unread_row(spec: ModelSpec, data: np.memmap) -> None:
    unseen = next(i for i in range(spec.vocab_size) if i not in verify.prompt_ids(spec))
    _weight(spec, data, "model.embed_tokens.weight")[unseen] *= -1


def _weight(spec: ModelSpec, data: np.memmap, name: str) -> np.ndarray:
    part = onnx_graph.data_layout(spec)[name]
    return data[part.offset : part.offset + part.nbytes].view(np.float32).reshape(part.shape)


@pytest.mark.parametrize(
    ("fault", "name"),
    [(swap_layers, r"layers\.1\.mlp\.down_proj"), (next_number, r"layers\.2\.input_"), (unread_row, "embed_tokens")],
)
def test_wrong_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None], name: str
) -> None:
    """Faults of any size are found, even if the text does not use the weight."""
    write = onnx_graph.write_graph

    def broken(spec: ModelSpec, directory: Path, **options: Any) -> None:
        write(spec, directory, **options)
        data = np.memmap(directory / onnx_graph.DATA_FILE, mode="r+")
        fault(spec, data)
        data.flush()

    monkeypatch.setattr(onnx_graph, "write_graph", broken)
    monkeypatch.setattr(onnx_session, "check_graph", lambda artifact: None)  # which knows no operators of faults
    with pytest.raises(VerificationError, match=rf"^model\.{name}.* as it is stored is not the checkpoint's"):
        build(checkpoint, tmp_path / "engine")
    assert not list(tmp_path.iterdir())


def _with(spec: ModelSpec, **changes: Any) -> ModelSpec:
    mixers = [replace(m, config=replace(m.config, **changes)) for m in spec.mixers if m is not None]
    return replace(spec, mixers=tuple(mixers))


FAULTS: dict[str, Callable[[ModelSpec], ModelSpec]] = {
    "sink dropped": lambda spec: _with(spec, sinks=1, slots=(("recent_use", 3), ("peak_effect", 4), ("novelty", 6))),
    "window off by one": lambda spec: _with(
        spec, window=11, slots=(("recent_use", 3), ("peak_effect", 4), ("novelty", 6))
    ),
    "pools swapped": lambda spec: _with(spec, slots=(("recent_use", 3), ("novelty", 4), ("peak_effect", 5))),
    "rope base": lambda spec: replace(
        spec, attention=tuple(a._replace(inv_freq=tuple(f * 1.01 for f in a.inv_freq)) for a in spec.attention)
    ),
    "epsilon": lambda spec: replace(spec, norm_eps=1e-3),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_graph(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Each fault is in every layer and shows in the first."""
    write = onnx_graph.write_graph
    monkeypatch.setattr(onnx_graph, "write_graph", lambda spec, *a, **k: write(FAULTS[fault](spec), *a, **k))
    with pytest.raises(VerificationError, match="layer 0 is the first that differs"):
        build(checkpoint, tmp_path / "engine")
    assert not list(tmp_path.iterdir())


def test_memory_that_runs_out_is_no_fault_of_the_graph(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(session: OnnxSession, binding: Any, ids: np.ndarray) -> None:
        raise LigerError("ONNX Runtime failed after 0 tokens: std::bad_alloc")

    monkeypatch.setattr(OnnxSession, "_run", fail)
    with pytest.raises(LigerError, match=r"^ONNX Runtime failed after 0 tokens: std::bad_alloc$"):
        build(checkpoint, tmp_path / "engine")


def slots(positions: list[int], scores: list[float]) -> dict[str, np.ndarray]:
    return {
        "slot_position": np.array([[positions]]),
        "slot_score": np.array([[[scores]]], np.float32),
    }


@pytest.mark.parametrize(
    ("found", "near"),
    [
        (slots([3, 6, 9], [0.5, 0.25001, 0.125]), True),
        (slots([3, 6, 9], [0.5, 0.26, 0.125]), False),
        (slots([3, 6, 8], [0.5, 0.25001, 0.3]), False),
    ],
    ids=["tie", "other score", "one tie and one error"],
)
def test_near_ties(found: dict[str, np.ndarray], near: bool) -> None:
    expected = slots([3, 5, 9], [0.5, 0.25, 0.125])
    assert compare.is_near_tie(expected, found, (("use", 3),), 1e-4) is near


def test_learned_scores_are_compared_as_they_are() -> None:
    """They are already logarithms, most of them negative."""
    expected, near, other = (slots([3, p, 9], [-5.0, s, -2.0]) for p, s in ((5, -6.0), (6, -6.00001), (6, -5.5)))
    assert compare.is_near_tie(expected, near, (("learned", 3),), 1e-4)
    assert not compare.is_near_tie(expected, other, (("learned", 3),), 1e-4)


def test_a_near_tie_is_counted_and_resolved(checkpoint: Path) -> None:
    """A session that keeps a token with an equal score continues from torch's state and passes."""
    spec = read_spec(checkpoint)
    answers = Reference(spec).answers([np.arange(30), np.arange(30, 60), *np.arange(60, 63)[:, None]])
    session = Replay(answers)
    position = session.state[0]["past.1.slot_position"]
    changed = position.copy()
    kept = np.flatnonzero((position[0, 0] > 2) & (position[0, 0] < 15))[0]
    changed[0, 0, kept] = next(p for p in range(2, 18) if p not in position[0, 0])
    session.state[0] = session.state[0] | {"past.1.slot_position": changed}
    comparison = verify.Verification(spec, replace(compare.tolerance_of("float32"), tie=0.5))
    comparison.run(session, answers, lambda amount: None, prompt=2)
    assert comparison.result.near_ties == 1 and comparison.result.passed
    assert session.restored == 1


def perturb(directory: Path, layer: int, size: float, only: int | None = None) -> None:
    """Add `size` to the rank of every second candidate of a layer's learned pool, or of the token at `only`."""
    model = onnx.load(directory / onnx_graph.GRAPH_FILE, load_external_data=False)
    nodes = list(model.graph.node)
    at = next(i for i, node in enumerate(nodes) if node.name == f"layers.{layer}/TopK_1")
    made = [
        ("Shape", [nodes[at].input[0]], "fault.count", {"start": 4}),
        ("Squeeze", ["fault.count"], "fault.columns", {}),
        ("Range", ["fault.zero", "fault.columns", "fault.one"], "fault.column", {}),
        ("Mod", ["fault.column", "fault.two"], "fault.odd", {}),
        ("Shape", ["input_ids"], "fault.tokens", {"start": 1}),
        ("Squeeze", ["fault.tokens"], "fault.length", {}),
        ("Range", ["fault.zero", "fault.length", "fault.one"], "fault.step", {}),
        ("Add", ["fault.step", "position"], "fault.now", {}),
        ("Equal", ["fault.now", "fault.only"], "fault.here", {}),
        ("Or", ["fault.here", "fault.everywhere"], "fault.hit", {}),
        ("Cast", ["fault.hit"], "fault.factor", {"to": onnx.TensorProto.FLOAT}),
        ("Unsqueeze", ["fault.factor", "fault.axis"], "fault.row", {}),
        ("Cast", ["fault.odd"], "fault.odd_f", {"to": onnx.TensorProto.FLOAT}),
        ("Mul", ["fault.row", "fault.odd_f"], "fault.place", {}),
        ("Mul", ["fault.place", "fault.size"], "fault.noise", {}),
        ("Add", [nodes[at].input[0], "fault.noise"], "fault.rank", {}),
    ]  # fmt: skip
    values = {"zero": 0, "one": 1, "two": 2, "only": -1 if only is None else only, "axis": [1]}
    constants = {name: np.array(value, np.int64) for name, value in values.items()}
    constants |= {"everywhere": np.array(only is None), "size": np.array(size, np.float32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(x, f"fault.{name}") for name, x in constants.items())
    nodes[at].input[0] = "fault.rank"
    nodes[at:at] = [onnx.helper.make_node(op, names, [out], **settings) for op, names, out, settings in made]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, directory / onnx_graph.GRAPH_FILE)


def plant(monkeypatch: pytest.MonkeyPatch, *fault: Any) -> None:
    write = onnx_graph.write_graph

    def broken(spec: ModelSpec, directory: Path, **options: Any) -> None:
        write(spec, directory, **options)
        perturb(directory, *fault)

    monkeypatch.setattr(onnx_graph, "write_graph", broken)
    monkeypatch.setattr(onnx_session, "check_graph", lambda artifact: None)  # which knows no operators of faults


def test_a_tie_inside_a_call_is_found_token_by_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first layer, tokens with the same id have equal learned scores: a little noise decides which is kept."""
    model = make_checkpoint(tmp_path / "model", FORESIGHT)
    plant(monkeypatch, 0, 4e-5)
    phases: list[str] = []

    def progress(description: str, total: float | None = None, unit: str = "bytes") -> Any:
        phases.append(description)
        return silent(description)

    artifact = load(build(model, tmp_path / "engine", progress=progress)).artifact
    assert artifact.manifest.verification["passed"] and artifact.manifest.verification["near_ties"] > 0
    assert any(re.fullmatch(r"tied scores after \d+ tokens", phase) for phase in phases)
    spec = read_spec(model)
    answers = Reference(spec).answers(np.split(verify.prompt_ids(spec), [200]))
    with pytest.raises(compare.Mismatch):
        verify.Verification(spec, compare.tolerance_of("float32")).run(OnnxSession(artifact), answers, str, prompt=2)


class Counting:
    """A torch model that answers any pieces, and counts them."""

    def __init__(self) -> None:
        self.pieces = 0

    def answers(self, pieces: list[np.ndarray], cache: Any, **options: Any) -> list[Answer]:
        self.pieces += len(pieces)
        return [Answer(ids, ids, {}, True, LigerCache.__new__(LigerCache)) for ids in pieces]


@pytest.mark.parametrize("first", [*range(1, 65), None])
def test_a_tie_is_found_in_few_calls(first: int | None) -> None:
    """For a tie at any of 64 tokens, torch answers 16 pieces and the session 8 calls."""
    model, calls = Counting(), []

    def differs(answers: list[Answer]) -> bool:
        calls.append(sum(len(answer.ids) for answer in answers))
        return first is not None and calls[-1] >= first

    found = ties.narrow(model, None, np.arange(64), differs)
    np.testing.assert_array_equal(np.concatenate([answer.ids for answer in found]), np.arange(first or 64))
    assert model.pieces <= 16 and len(calls) <= 8


def test_weights_that_fit_are_read_twice_at_most(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to compare and once to keep them; if memory is short, they are read again for each pass."""
    read: list[str] = []
    monkeypatch.setattr(reference, "weight_slabs", lambda spec, name: read.append(name) or weight_slabs(spec, name))
    for free, times in ((1 << 40, 2), (0, 4)):
        monkeypatch.setattr(reference, "free_memory", lambda free=free: free)
        model, name = Reference(read_spec(checkpoint)), "model.layers.1.mlp.down_proj.weight"
        read.clear()
        for _ in range(4):
            model.answers([np.arange(3)])
        assert read.count(name) == times


class ByLength:
    """A session that answers a call with the list's entry for the call's length."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers, self.last = answers, answers[0]

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.last = self.answers[len(ids) - 1]
        return self.last.logits[None]

    def snapshot(self) -> Snapshot:
        return Snapshot("", np.zeros(1), self.last.state)

    def restore(self, snapshot: Snapshot) -> None:
        pass


@pytest.mark.parametrize("off", [0.0, 1e-2], ids=["tie", "tie and error"])
def test_a_tie_that_the_end_of_a_call_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    """A longer call can round a tie in its middle differently, and still end with the same slots."""
    spec = read_spec(make_checkpoint(tmp_path / "model", FORESIGHT))
    reference = Reference(spec)
    check = compare.Comparison(spec, compare.tolerance_of("float32"))
    seen, ids = verify.prompt_ids(spec)[:60], verify.prompt_ids(spec)[60:84]
    past = reference.new_cache()
    before = Snapshot("", np.zeros(1), reference.answers([seen], past)[0].state)
    answers = reference.answers(np.split(ids, len(ids)), copy.deepcopy(past))

    def hidden(answer: Answer) -> bool:
        try:
            return check.agrees(Snapshot("", np.zeros(1), answer.state), answers[-1], answer.logits) and False
        except compare.Mismatch:
            return True

    near = ties._ties(check, [before.tensors, *(answer.state for answer in answers)])
    other = next(filter(hidden, (ties._otherwise(check, reference, past, ids, tie, len(ids)) for tie in near)))
    session = ByLength([*answers[:-1], replace(other, logits=other.logits + np.float32(off))])
    monkeypatch.setattr(ties, "narrow", lambda *anything: answers)  # in pieces torch could round ties otherwise, too
    if off:
        with pytest.raises(compare.Mismatch, match="after 84 tokens"):
            ties._first_tie(check, session, reference, past, before, ids, 60)
    else:
        assert ties._first_tie(check, session, reference, past, before, ids, 60) == answers
        pieces = [*answers[:-1], replace(other, ids=answers[-1].ids)]  # torch's went the other way, its steps did not
        monkeypatch.setattr(ties, "narrow", lambda *anything: pieces)
        (*_, end) = ties._first_tie(check, ByLength(answers), reference, past, before, ids, 60)
        assert np.array_equal(end.logits, answers[-1].logits)


@pytest.mark.parametrize(("layer", "token"), [(0, 205), (1, 205), (1, 310)])
def test_a_wrong_rank_at_one_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int, token: int) -> None:
    """No other call or text shows it."""
    model = make_checkpoint(tmp_path / "model", FORESIGHT)
    plant(monkeypatch, layer, 1.0, token)
    with pytest.raises(VerificationError, match=rf"layer {layer}: slot_position: .* after {token + 1} tokens"):
        build(model, tmp_path / "engine")


class Replay:
    """A session with given answers that counts restored states."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        self.state = [answer.state for answer in answers]
        self.at, self.restored = -1, 0

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.at = 1 if len(ids) == 60 else self.at + 1
        return self.answers[self.at].logits[None]

    def step(self, token: int) -> np.ndarray:
        self.at += 1
        return self.answers[self.at].logits[None]

    def reset(self) -> None:
        self.at = -1

    def snapshot(self) -> Any:
        return Snapshot("", np.zeros(1), self.state[self.at])

    def restore(self, snapshot: Any) -> None:
        self.restored += 1


def test_refusals(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown target 'onx'"):
        build(checkpoint, tmp_path / "a", target="onx")
    with pytest.raises(UsageError, match="unknown lowering 'portabel'"):
        build(checkpoint, tmp_path / "a", lowering="portabel")
    plain = make_checkpoint(tmp_path / "plain", MEMORY)
    config = json.loads((plain / "config.json").read_text()) | {"model_type": "llama"}
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is not converted"):
        build(plain, tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("keep me")
    with pytest.raises(UsageError, match="not empty"):
        build(checkpoint, tmp_path / "full")
    assert not (tmp_path / "a").exists()
