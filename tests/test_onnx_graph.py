"""The ONNX graph: its mixer against the torch op, the model against torch, and the graph's guarantees."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from checkpoints import FORESIGHT, MEMORY, make_checkpoint
from torch import Tensor

import ligerexport as lx
from ligerexport.checkpoint.convert import load_model
from ligerexport.dtypes import DTYPES
from ligerexport.errors import CheckpointError, LigerError
from ligerexport.exporters.onnx.builder import CONTRIB, Builder, graph_input
from ligerexport.exporters.onnx.candidates import candidates
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.graph import LOWERINGS, build_graph, state_tensors, write_graph
from ligerexport.exporters.onnx.mixer import mixer, rotary_tables
from ligerexport.exporters.onnx.native import DOMAIN, register
from ligerexport.exporters.onnx.packed import Heads
from ligerexport.exporters.onnx.spec import ModelSpec, read_spec
from ligerexport.exporters.onnx.weights import write_weights
from ligerexport.exporters.targets import TARGETS
from ligerexport.exporters.verify.compare import state_error
from ligerexport.exporters.verify.slots import by_head
from ligerexport.kernels.ops import liger_mixer, rotary_table
from ligerexport.layers.mixer import LigerCache
from ligerexport.model.config import PRESETS, LigerConfig
from ligerexport.model.families import FAMILIES
from ligerexport.model.state import MixerSpec

OUTPUT = 5e-5
STATE = 5e-5
LOGITS = 2e-4
CHUNK = 96
OTHERS = [family for family in FAMILIES if family not in ("llama", "qwen3")]
INV_FREQ = 1 / (100 ** (torch.arange(8) / 8))

EVICTED = replace(FORESIGHT, recurrence_weight=1.0, recurrence="evicted", recurrence_distance=5)
MIXERS = {
    "paper": LigerConfig(gate="gla", window=16, max_distance=200),
    "hgrn2": LigerConfig(gate="hgrn2", window=9, sinks=2, attention_weight=0.7, recurrence_weight=0.4, max_distance=30),
    "gsa": LigerConfig(gate="gsa", window=9, sinks=2, attention_weight=0.7, recurrence_weight=0.4, max_distance=30),
    "gsa and scores": LigerConfig(gate="gsa", window=10, sinks=3, max_distance=25, slots=(("use", 2), ("novelty", 3))),
    "memories": LigerConfig(window=9, sinks=2, max_distance=30, slots=(("novelty", 3),), memories=3),
    "scores": LigerConfig(gate="gla", window=10, sinks=3, max_distance=25,
                          slots=(("use", 2), ("novelty", 3), ("peak_use", 4), ("peak_effect", 2), ("recent_use", 2))),
    "memory": MEMORY,
    "foresight": FORESIGHT,
    "evicted": EVICTED,
    "evicted from the window": replace(EVICTED, slots=(), recurrence_weight=0.7),
}  # fmt: skip


def mixer_graph(spec: MixerSpec, lowering: str, inv_freq: Tensor = INV_FREQ) -> onnx.ModelProto:
    g = Builder()
    lower = LOWERINGS[lowering](g)
    ids, position = graph_input("input_ids", "INT64", ("B", "T")), graph_input("position", "INT64", ("B",))
    widths = {"q": spec.q_heads * spec.d_k, "k": spec.kv_heads * spec.d_k, "v": spec.kv_heads * spec.d_v}
    projected = tuple(graph_input(name, "FLOAT", ("BT", width)) for name, width in widths.items())
    score = graph_input("score", "FLOAT", ("BT", spec.kv_heads)) if spec.config.foresees else None
    types = {t.name: ir.DataType(DTYPES[t.dtype].onnx).name if t.dtype in DTYPES else "FLOAT" for t in spec.state()}
    past = {t.name: graph_input(f"past.{t.name}", types[t.name], ("B", *t.shape)) for t in spec.state()}
    frame = Frame(g, ids, position)
    groups = [group for _, group in spec.groups]
    tables = rotary_tables(lower, inv_freq, max(groups, key=lambda group: group.config.num_slots), CHUNK)
    positions = [] if lower.native else Heads(lower, spec).positions(past["slot_position"])
    seen = [candidates(frame, group, tables.rows, [x])[0] for group, x in zip(groups, positions, strict=False)]
    output, present = mixer(lower, frame, spec, tables, projected, past, seen, score)  # type: ignore[arg-type]
    outputs = [g.output(output, "output", "FLOAT", ("BT", spec.q_heads * spec.d_v))]
    outputs += [g.output(present[t.name], f"present.{t.name}", types[t.name], ("B", *t.shape)) for t in spec.state()]
    graph = ir.Graph(
        [ids, position, *projected, *([score] if score else []), *past.values()], outputs, nodes=g.nodes,
        initializers=list(g.initializers.values()), opset_imports={"": 21, CONTRIB: 1, DOMAIN: 1}, name="mixer",
    )  # fmt: skip
    functions = lower.functions() if spec.config.recurrent or spec.config.judged else []
    return ir.serde.serialize_model(ir.Model(graph, ir_version=10, functions=functions))


def session_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads leave torch the cores
    register(options)
    return options


class MixerSession:
    """A mixer graph and its state, called like the torch op."""

    def __init__(self, model: onnx.ModelProto, spec: MixerSpec, batch: int) -> None:
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
        )
        self.wanted = {entry.name for entry in self.session.get_inputs()}
        self.state = {name: x.numpy() for name, x in spec.initial_state(batch, torch.float32).items()}

    def run(self, query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
        batch, length, heads, _ = query.shape
        feeds = {"input_ids": np.zeros((batch, length), np.int64), "position": position.numpy()}
        feeds |= {
            name: x.reshape(batch * length, -1).numpy() for name, x in zip("qkv", (query, key, value), strict=True)
        }
        feeds["score"] = foreseen(value).reshape(batch * length, -1).numpy()
        feeds |= {f"past.{name}": x for name, x in self.state.items()}
        output, *state = self.session.run(None, {k: v for k, v in feeds.items() if k in self.wanted})
        self.state = dict(zip(self.state, state, strict=True))
        return torch.from_numpy(output).view(batch, length, heads, -1)


def foreseen(value: Tensor) -> Tensor:
    """Return learned scores for `value` `[..., d_v]`."""
    return -value.norm(dim=-1)


def mixer_spec(config: LigerConfig) -> MixerSpec:
    return MixerSpec(config, q_heads=6, kv_heads=2, d_k=16, d_v=24, scale=0.25, max_distance=config.max_distance or 64)


def projections(length: int, outliers: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    query, key = (torch.randn(2, length, heads, 16, generator=generator) * 1.5 for heads in (6, 2))
    value = torch.randn(2, length, 2, 24, generator=generator)
    if outliers:
        key[:, ::13, :, :3] = -100
    return query, key, value


def compare_states(expected: dict[str, Any], found: dict[str, np.ndarray], tolerance: float, mixer: MixerSpec) -> None:
    sides = (by_head({k: np.asarray(v) for k, v in state.items()}, mixer) for state in (expected, found))
    for (head, ours), (_, theirs) in zip(*sides, strict=True):
        np.testing.assert_array_equal(ours["slot_position"], theirs["slot_position"])
        for name, tensor in ours.items():
            assert state_error(tensor, theirs[name]) < tolerance, name + head


@pytest.mark.parametrize("outliers", [False, True], ids=["plain", "outliers"])
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("lowering", TARGETS["onnx"].lowerings)
@pytest.mark.parametrize("cuts", [(96, 44), (1,) * 40 + (7, 1, 92), (63, 1, 76)], ids=["chunks", "steps", "odd"])
def test_mixer_is_the_torch_op(lowering: str, name: str, outliers: bool, cuts: tuple[int, ...]) -> None:
    """Two sequences, one with padding on its left, d_k != d_v, three query heads per key head."""
    spec = mixer_spec(MIXERS[name])
    query, key, value = projections(sum(cuts), outliers)
    session, position, start = MixerSession(mixer_graph(spec, lowering), spec, 2), torch.tensor([0, -9]), 0
    found = []
    for length in cuts:
        part = slice(start, start + length)
        found.append(session.run(query[:, part], key[:, part], value[:, part], position + start))
        start += length
    table = rotary_table(INV_FREQ, spec.max_distance, CHUNK)
    start_state = spec.initial_state(2, torch.float32)
    expected, state = liger_mixer(query, key, value, position, start_state, spec, table, foreseen(value))
    real = position[:, None] + torch.arange(start) >= 0
    assert (torch.cat(found, dim=1) - expected)[real].abs().max() < OUTPUT
    compare_states(state, session.state, STATE, spec)


@pytest.mark.parametrize("inv_freq", [INV_FREQ[:6], torch.zeros(8)], ids=["some", "all"])
@pytest.mark.parametrize("lowering", TARGETS["onnx"].lowerings)
def test_evicted_tokens_where_channels_are_not_rotated(lowering: str, inv_freq: Tensor) -> None:
    spec = mixer_spec(EVICTED)
    query, key, value = projections(90, outliers=False)
    position = torch.tensor([0, -9])
    session = MixerSession(mixer_graph(spec, lowering, inv_freq), spec, 2)
    found = session.run(query, key, value, position)
    table = rotary_table(inv_freq, spec.max_distance, CHUNK)
    start = spec.initial_state(2, torch.float32)
    expected, state = liger_mixer(query, key, value, position, start, spec, table, foreseen(value))
    real = position[:, None] + torch.arange(90) >= 0
    assert (found - expected)[real].abs().max() < OUTPUT
    compare_states(state, session.state, STATE, spec)


@pytest.mark.parametrize("name", ["scores", "memories"])
def test_function_body_is_the_kernel(name: str) -> None:
    """Runtimes without a kernel for LinearAttention inline the body in the model."""
    spec = mixer_spec(MIXERS[name])
    model = mixer_graph(spec, "ort")
    inlined = onnx.inliner.inline_local_functions(model)
    assert not [node for node in inlined.graph.node if node.op_type == "LinearAttention"]
    sessions = [MixerSession(m, spec, 2) for m in (model, inlined)]
    query, key, value = projections(60, outliers=True)
    for part in (slice(0, 37), slice(37, 38), slice(38, 60)):
        outputs = [
            s.run(query[:, part], key[:, part], value[:, part], torch.tensor([part.start, part.start]))
            for s in sessions
        ]
        assert (outputs[0] - outputs[1]).abs().max() < OUTPUT
    compare_states(sessions[0].state, sessions[1].state, STATE, spec)


class GraphSession:
    """A whole graph with its state, two sequences."""

    def __init__(self, spec: ModelSpec, directory: Path, lowering: str) -> None:
        directory.mkdir()
        write_weights(spec, directory)
        write_graph(spec, directory, lowering=lowering, max_chunk=CHUNK)
        onnx.checker.check_model(str(directory / "model.onnx"), full_check=True)
        self.session = onnxruntime.InferenceSession(
            str(directory / "model.onnx"), session_options(), providers=["CPUExecutionProvider"]
        )
        letters = {"B": 2, "P": 0}
        self.state = {
            t.past: np.full([letters[n] if isinstance(n, str) else n for n in t.shape], t.fill, t.dtype)
            for t in state_tensors(spec)
        }

    def run(self, ids: Tensor, position: Tensor) -> Tensor:
        feeds = self.state | {"input_ids": ids.numpy(), "position": position.numpy()}
        wanted = {entry.name for entry in self.session.get_inputs()}
        logits, *state = self.session.run(None, {k: v for k, v in feeds.items() if k in wanted})
        self.state = dict(zip(self.state, state, strict=True))
        return torch.from_numpy(logits)


WORDS: dict[str, Any] = {"vocab_size": 90 + 64}
"""Number of tokens that `check_model` reads, all different: in the first layer equal tokens have equal scores, between
which rounding would choose."""


def check_model(spec: ModelSpec, directory: Path, lowerings: Sequence[str] = TARGETS["onnx"].lowerings) -> None:
    """Compare a prompt, its rest, and steps with torch: two sequences, the second with padding on its left.

    Torch takes longest, so it answers once for all lowerings.
    """
    model = load_model(spec.path, dtype=torch.float32).eval()
    cache = LigerCache(model.config)
    sessions, padding = {name: GraphSession(spec, directory / name, name) for name in lowerings}, torch.tensor([0, 5])
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(spec.vocab_size, generator=generator) for _ in padding])
    start = 0
    for length in (50, 40, *([1] * 64)):
        part = ids[:, start : start + length]
        mask = (torch.arange(start + length) >= padding[:, None]).long()
        with torch.inference_mode():
            expected = model(part, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]
        for name, session in sessions.items():
            found = session.run(part, start - padding)
            assert (found - expected).abs().max() < LOGITS, f"{name} after {start + length} tokens"
        start += length
    for layer, mixer_spec_ in enumerate(spec.mixers):
        for session in sessions.values() if mixer_spec_ is not None else ():
            state = {t.name: session.state[f"past.{layer}.{t.name}"] for t in mixer_spec_.state()}
            compare_states(cache.layers[layer].state, state, 2 * STATE, mixer_spec_)


@pytest.mark.parametrize(
    ("family", "gate"), [*product(["llama", "qwen3"], ["gla", "hgrn2", "gsa"]), *((f, "gla") for f in OTHERS)]
)
def test_model_is_the_torch_model(tmp_path: Path, family: str, gate: str) -> None:
    config = LigerConfig(gate=gate, window=20, sinks=2, slots=(("peak_effect", 4), ("novelty", 6)))
    check_model(read_spec(make_checkpoint(tmp_path / "model", config, family, **WORDS)), tmp_path)


@pytest.mark.parametrize("config", [FORESIGHT, EVICTED], ids=["foresight", "evicted"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scores_of_the_hidden_state(tmp_path: Path, family: str, config: LigerConfig) -> None:
    check_model(read_spec(make_checkpoint(tmp_path / "model", config, family, **WORDS)), tmp_path)


def test_scores_must_be_in_the_checkpoint(tmp_path: Path) -> None:
    """A checkpoint with only its configuration changed has no scores."""
    path = make_checkpoint(tmp_path / "model", replace(MEMORY, slots=(("recent_use", 3),)))
    config = json.loads((path / "config.json").read_text()) | {"liger": FORESIGHT.to_dict()}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="score_proj"):
        read_spec(path)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotary_types(tmp_path: Path, rope: dict[str, Any]) -> None:
    path = make_checkpoint(tmp_path / "model", MEMORY, rope_parameters=rope | {"rope_theta": 5000.0}, **WORDS)
    check_model(read_spec(path), tmp_path, ["ort"])


def test_rotary_embedding_for_long_texts(tmp_path: Path) -> None:
    """As in Phi-4-mini: short factors, a factor on queries and keys, and a head that is only partly rotated."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "attention_factor": 1.3,
            "short_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0], "long_factor": [9.0] * 6,
            "original_max_position_embeddings": 45}  # fmt: skip
    path = make_checkpoint(tmp_path / "model", MEMORY, "phi3", rope_parameters=rope, **WORDS)
    spec = read_spec(path)
    assert {mixer.max_distance for mixer in spec.mixers if mixer} == {45}
    check_model(spec, tmp_path)


@pytest.mark.parametrize(
    ("family", "windows"),
    [("mistral", [24, 24, 24]), ("smollm3", [None, None, None]), ("gemma3_text", [24, None, 24])],
)
def test_layers_kept_as_softmax(tmp_path: Path, family: str, windows: list[int | None]) -> None:
    """With a sliding window of the family's own, without rotary embedding, and with rotary embeddings of two kinds."""
    liger = LigerConfig(window=20, keep_softmax=(0, 1))
    sizes = WORDS | ({"sliding_window": 24} if family == "mistral" else {})
    path = make_checkpoint(tmp_path / "model", liger, family, **sizes)
    spec = read_spec(path)
    assert [softmax.window for softmax in spec.attention] == windows
    check_model(spec, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_bf16(tmp_path: Path, tied: bool) -> None:
    path = make_checkpoint(
        tmp_path / "model", MEMORY, dtype=torch.bfloat16, shard="40KB", tie_word_embeddings=tied, attention_bias=True,
        **WORDS,
    )  # fmt: skip
    assert len(list(path.glob("*.safetensors"))) > 2
    spec = read_spec(path)
    assert spec.tied == tied
    check_model(spec, tmp_path, ["ort"])


def proto(spec: ModelSpec, lowering: str) -> onnx.ModelProto:
    return ir.serde.serialize_model(build_graph(spec, lowering=lowering))


@pytest.mark.parametrize(
    ("changes", "lowering"),
    [
        *product(({}, {"gate": "gsa"}, {"attention_weight": 1.0, "recurrence": "evicted"}), TARGETS["onnx"].lowerings),
        *product(({"memories": 2},), TARGETS["onnx"].lowerings),
        *product(({"heads": ("8+2+2 4+1+2", "", "8+2+2 8+2+2"), "state_dtype": "int8"},), TARGETS["onnx"].ragged),
    ],
)
def test_state_may_be_updated_in_place(tmp_path: Path, lowering: str, changes: dict[str, Any]) -> None:
    """Every past has one consumer, and its present is computed from the output of that consumer."""
    liger = LigerConfig(window=8, sinks=1, slots=(("use", 2), ("novelty", 2)), keep_softmax=(1,), **changes)
    graph = proto(read_spec(make_checkpoint(tmp_path / "model", liger)), lowering).graph
    producer = {output: node for node in graph.node for output in node.output}
    for value in graph.input:
        if not value.name.startswith("past."):
            continue
        consumers = [node for node in graph.node if value.name in node.input]
        assert len(consumers) == 1, value.name
        todo, seen = [value.name.replace("past.", "present.", 1)], set()
        while todo:
            node = producer.get(todo.pop())
            if node is not None and node.name not in seen:
                seen.add(node.name)
                todo.extend(node.input)
        assert consumers[0].name in seen, value.name


@pytest.mark.parametrize(
    ("lowering", "preset"),
    [
        (lowering, preset)
        for lowering, preset in product(TARGETS["onnx"].lowerings, PRESETS)
        if lowering in TARGETS["onnx"].ragged or not PRESETS[preset].config.ragged
    ],
)
def test_nodes(tmp_path: Path, lowering: str, preset: str) -> None:
    """Every layer has the same number of nodes, no loop, and nothing that the preset does not use."""
    config = PRESETS[preset].config
    graphs = [
        proto(read_spec(make_checkpoint(tmp_path / str(layers), config, num_hidden_layers=layers)), lowering).graph
        for layers in (2, 3, 5)
    ]
    two, three, five = (len(graph.node) for graph in graphs)
    assert five - three == 2 * (three - two)
    layers = Counter(node.name.split("/")[0] for node in graphs[2].node if node.name.startswith("layers."))
    assert len(layers) == 5 and len(set(layers.values())) == 1
    kinds = Counter(node.op_type for node in graphs[2].node)
    assert not kinds.keys() & {"If", "Loop", "Scan"}
    within = config.evicts and lowering == "native"  # our own operator has the recurrence too
    recurrences = 5 * (config.recurrent - within + config.judged)
    assert kinds["BoundedMemory"] + kinds["RaggedMemoryInt8"] == (5 if lowering == "native" else 0)
    assert kinds["LinearAttention"] == (0 if lowering == "portable" else recurrences)
    assert kinds["CumSum"] == (recurrences if lowering == "portable" else 0) + 5 * (config.evicts - within)
    names = {value.name.split(".")[2] for value in graphs[2].input if value.name.startswith("past.")}
    assert ("recurrent_state" in names, "memory_state" in names) == (config.linear, config.routed)
    assert ("judge_state" in names) == config.judged
    if lowering == "portable":
        assert {node.domain for node in graphs[2].node} == {""}


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
@pytest.mark.parametrize("name", MIXERS)
def test_portable_nodes_are_narrow(tmp_path: Path, name: str, family: str) -> None:
    """WebGPU guarantees 8 storage buffers per shader, one for each input and output; in a model of any depth."""
    spec = read_spec(make_checkpoint(tmp_path / "model", MIXERS[name], family, num_hidden_layers=9))
    for node in proto(spec, "portable").graph.node:
        assert len(node.input) + len(node.output) <= 8, node.name


@pytest.mark.parametrize("lowering", TARGETS["onnx"].lowerings)
def test_weights_keep_their_names(tmp_path: Path, lowering: str) -> None:
    """Weights with the same input, which form one product, have a joint name."""
    spec = read_spec(make_checkpoint(tmp_path / "model", MEMORY, tie_word_embeddings=True))
    names = set(spec.weights) - {"lm_head.weight"}
    expected = {re.sub(r"\.[qkv]_", ".qkv_", re.sub(r"\.(gate|up)_", ".gate_up_", name)) for name in names}
    graph = proto(spec, lowering).graph
    assert expected <= {tensor.name for tensor in graph.initializer}
    readers = [node.op_type for node in graph.node if "model.embed_tokens.weight" in node.input]
    assert readers == ["Gather", "Gemm"]


@pytest.mark.parametrize("change", [5, -1, 1 << 40])
def test_native_memory_from_a_state_that_no_session_left(tmp_path: Path, change: int) -> None:
    """Future positions, a window that ends too early, and an impossible window."""
    model = make_checkpoint(tmp_path / "model", MEMORY)
    session = lx.load(lx.build(model, tmp_path / "engine", lowering="native", verify=False))
    session.prefill(np.arange(40))
    state = session.snapshot()
    moved = {name: x + change if "position" in name else x for name, x in state.tensors.items()}
    session.restore(replace(state, tensors=moved))
    with pytest.raises(LigerError, match="no text leaves"):
        session.prefill(np.arange(70))
