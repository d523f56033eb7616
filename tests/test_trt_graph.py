"""The graph for the TensorRT plugin: its nodes, that TensorRT 8.5 can parse it, and its numbers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from checkpoints import FORESIGHT, FUSED, MEMORY, make_checkpoint

from ligerexport.artifact.artifact import Artifact, Source
from ligerexport.checkpoint.convert import load_model
from ligerexport.dtypes import DTYPES
from ligerexport.exporters.build import make_manifest
from ligerexport.exporters.onnx.graph import GRAPH_FILE, nodes_by_layer, weight_storage, write_graph
from ligerexport.exporters.onnx.spec import ModelSpec, read_spec
from ligerexport.exporters.onnx.weights import write_weights
from ligerexport.exporters.tensorrt.evaluation import PluginSession
from ligerexport.exporters.tensorrt.node import CODED, EQUAL, products, read_linear
from ligerexport.exporters.verify.compare import state_error
from ligerexport.exporters.verify.slots import by_head
from ligerexport.kernels.plans import layer_digest, spec_fields
from ligerexport.layers.mixer import LigerCache
from ligerexport.model.config import PRESETS, LigerConfig
from ligerexport.model.families import FAMILIES
from ligerexport.model.state import MixerSpec

LOGITS = {"fp32": 2e-4, "fp16": 2e-2, "bf16": 2e-1, "int8": 2e-2}
STATE = {"fp32": 5e-5, "fp16": 2e-2, "bf16": 8e-2, "int8": 2e-2}
CUTS = (40, 1, 1, 17, 1)
KINDS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "float16"}
RECALL = LigerConfig(
    window=8, sinks=2, slots=(("learned", 5),), attention_weight=0.9, recurrence_weight=0.0, state_dtype="int8",
    heads=("12+8 3", "6+20 6+20", "2 4"),
)  # fmt: skip
IN_8_5 = {
    "Add", "Cast", "Concat", "Div", "Gather", "LigerLinear", "LigerMixer", "Mul", "ReduceMean", "Reshape", "Shape",
    "Slice", "Split", "Sqrt", "Tanh",
}  # fmt: skip


def write(path: Path, config: LigerConfig, weights: str, family: str = "llama") -> tuple[ModelSpec, Artifact]:
    """Write checkpoint and graph; return the inputs of a session."""
    spec = read_spec(make_checkpoint(path / "model", config, family))
    storage, directory = weight_storage(weights, lowering="plugin"), path / "graph"
    directory.mkdir()
    write_weights(spec, directory, storage)
    write_graph(spec, directory, lowering="plugin", max_chunk=64, storage=storage)
    return spec, Artifact(directory, make_manifest(spec, Source("x"), "trt", "plugin", 64, {}, {}, storage=storage))


def stored(weight: torch.Tensor, weights: str) -> torch.Tensor:
    """Return a matrix as it is stored, in fp32; int8 has 127 steps from 0 to the largest element of a row."""
    if weights == "int8":
        step = weight.abs().amax(1, keepdim=True) / 127
        return (weight / step).round() * step
    return weight.to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[weights]).float()


def compare(spec: ModelSpec, artifact: Artifact, weights: str) -> None:
    """Run graph and torch over a prompt in pieces, and compare them."""
    model = load_model(spec.path, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():  # as stored, computed in fp32: what both sides are near to
        if parameter.ndim == 2 and "score_proj" not in name:
            parameter.data = stored(parameter.data, weights)
    session, cache = PluginSession(artifact, spec), LigerCache(model.config)
    ids = torch.randint(3, spec.vocab_size, (1, sum(CUTS)), generator=torch.Generator().manual_seed(1))
    for part in ids.split(CUTS, dim=1):
        with torch.inference_mode():
            expected = model(part, past_key_values=cache, use_cache=True).logits[:, -1]
        found = session.prefill(part.numpy())
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.float().numpy(), atol=LOGITS[weights] * expected.abs().max().item())
    for i, layer in enumerate(cache.layers):
        tensors = session.snapshot().tensors
        found = {name: tensors[f"past.{i}.{name}"].astype(np.float64) for name in layer.state}
        wanted = {name: x.numpy().astype(np.float64) for name, x in layer.state.items()}
        for (_, ours), (_, theirs) in zip(*(by_head(x, spec.mixers[i]) for x in (wanted, found)), strict=True):
            assert np.array_equal(ours["slot_position"], theirs["slot_position"])
            for name, tensor in ours.items():
                assert state_error(tensor, theirs[name]) < STATE[weights], (i, name)


@pytest.mark.parametrize("weights", LOGITS)
@pytest.mark.parametrize("preset", FUSED)
def test_presets(tmp_path: Path, preset: str, weights: str) -> None:
    compare(*write(tmp_path, PRESETS[preset].config, weights), weights)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_families(tmp_path: Path, family: str) -> None:
    compare(*write(tmp_path, MEMORY, "fp32", family), "fp32")


@pytest.mark.parametrize("gate", ["mlstm", "gsa:4"])
def test_gates_with_states_of_other_shapes(tmp_path: Path, gate: str) -> None:
    compare(*write(tmp_path, LigerConfig(gate=gate, window=8), "fp32"), "fp32")


def test_ragged_slots(tmp_path: Path) -> None:
    """Four codes of a key or value are one integer of the graph, and codes in the manifest and in snapshots."""
    spec, artifact = write(tmp_path, RECALL, "fp32")
    compare(spec, artifact, "fp32")
    model = onnx.load(artifact.directory / GRAPH_FILE)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model), full_check=False)
    sizes = {x.name: [y.dim_param or y.dim_value for y in x.type.tensor_type.shape.dim] for x in model.graph.input}
    types = {x.name: x.type.tensor_type.elem_type for x in model.graph.input}
    assert sizes["past.0.slot_key"] == ["B", 27, 4] and types["past.0.slot_key"] == onnx.TensorProto.INT32
    assert sizes["past.0.slot_key_scale"] == ["B", 27] and types["past.0.slot_key_scale"] == onnx.TensorProto.FLOAT16
    told = {x.past: (x.dtype, x.shape) for x in artifact.manifest.state}
    assert told["past.0.slot_key"] == ("int8", ("B", 27, 16)) and artifact.manifest.format_version == 2
    listed = [(x.name, DTYPES[x.dtype].onnx, list(x.shape)) for x in artifact.manifest.graph.inputs]
    assert listed == [(name, types[name], sizes[name]) for name in sizes]
    nodes = [node for node in model.graph.node if node.op_type == "LigerMixer"]
    found = [{x.name: onnx.helper.get_attribute_value(x) for x in node.attribute} for node in nodes]
    names = ("contract", "slots", "pools", "ragged", "scored", "halved", "scaled")
    assert [tuple(x[name] for name in names) for x in found] == [
        (3, 27, 1, 1, 22, 0, 1), (3, 56, 1, 1, 56, 0, 1), (3, 10, 0, 1, 0, 0, 1)
    ]  # fmt: skip
    assert [list(node.output) for node in nodes] == [
        [node.output[0], *(x.replace("past", "present") for x in node.input if x.startswith("past"))] for node in nodes
    ]


def test_batch_and_padding(tmp_path: Path) -> None:
    """A row with padding on its left gives the same result as alone."""
    spec, artifact = write(tmp_path, FORESIGHT, "fp32")
    ids = np.random.default_rng(0).integers(3, spec.vocab_size, (2, 30))
    both, alone = PluginSession(artifact, spec, batch=2), PluginSession(artifact, spec)
    found = both.prefill(ids, padding=[0, 9])
    np.testing.assert_allclose(found[1:], alone.prefill(ids[1:, 9:]), atol=2e-4)
    np.testing.assert_allclose(both.step([5, 6])[1:], alone.step(6), atol=2e-4)


@pytest.mark.parametrize("weights", LOGITS)
@pytest.mark.parametrize("preset", FUSED)
def test_nodes(tmp_path: Path, preset: str, weights: str) -> None:
    """The contract between node and plugin, input by input, and nothing that TensorRT 8.5 would read differently."""
    spec, artifact = write(tmp_path, PRESETS[preset].config, weights)
    model = onnx.load(artifact.directory / GRAPH_FILE)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model), full_check=False)
    assert {x.domain: x.version for x in model.opset_import} == {"": 17, "ligerexport": 1} and model.ir_version == 8
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds.keys() <= IN_8_5 and kinds["LigerMixer"] == 3
    assert kinds["LigerLinear"] == 4 * 3 + 1 + (weights == "int8")  # which also looks up rows of the embedding
    assert nodes_by_layer(ir.load(artifact.directory / GRAPH_FILE).graph) == [5, 5, 5]
    assert not any(node.attribute for node in model.graph.node if node.op_type == "Shape")
    info = {x.name: x.type.tensor_type for x in model.graph.input}
    assert info["input_ids"].elem_type == info["position"].elem_type == onnx.TensorProto.INT32
    half = onnx.helper.np_dtype_to_tensor_dtype(artifact_type(weights))
    for i, layer in enumerate(spec.mixers):
        assert layer is not None
        node = [node for node in model.graph.node if node.op_type == "LigerMixer"][i]
        names = [tensor.name for tensor in layer.state()]
        given = list(node.input)
        assert given[1] == "position" and given[3 + layer.config.foresees :] == [f"past.{i}.{x}" for x in names]
        assert list(node.output)[1:] == [f"present.{i}.{x}" for x in names]
        table = next(x for x in model.graph.initializer if x.name == given[2])
        assert list(table.dims) == [2, layer.max_distance + 64 + 1, layer.d_k // 2]  # the last row: turns
        types = {name: info[f"past.{i}.{name}"].elem_type for name in names}
        assert types.pop("slot_key") == types.pop("slot_value") == half
        assert types.pop("slot_position") == onnx.TensorProto.INT32
        assert set(types.values()) <= {onnx.TensorProto.FLOAT}
        config = layer.config
        found: dict[str, Any] = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
        assert found == {
            "plugin_namespace": b"ligerexport", "plugin_version": b"1", "contract": EQUAL,
            "layer_spec": layer_digest(spec_fields(layer)).encode(), "q_heads": 4, "kv_heads": 2, "d_k": 16, "d_v": 16,
            "slots": config.num_slots, "pools": len(config.slots), "max_distance": 64, "joint": 1,
            "foresees": int(config.foresees), "judged": int(config.judged), "recurrent": int(config.recurrent),
            "evicts": int(config.evicts),
        }  # fmt: skip
    state = {t.past: t.dtype for t in artifact.manifest.state}
    assert state["past.0.slot_key"] == KINDS[weights] and state["past.0.slot_position"] == "int32"
    assert artifact.manifest.bytes.state_per_sequence == sum(
        x.nbytes for x in PluginSession(artifact, spec).snapshot().tensors.values()
    )


def artifact_type(weights: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if weights == "bf16" else KINDS[weights])


def test_layer_digest() -> None:
    """It covers everything that defines a layer, and equals the digest from the contract's description."""
    spec = MixerSpec(PRESETS["sinks"].config, 4, 2, 64, 64, 0.125, 8192)
    fields = {"config": spec.config.to_dict(), "q_heads": 4, "kv_heads": 2, "d_k": 64, "d_v": 64, "scale": 0.125,
              "max_distance": 8192}  # fmt: skip
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert layer_digest(spec_fields(spec)) == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("family", "weights"), [*((family, "fp16") for family in FAMILIES), ("qwen2", "int8"), ("gemma3_text", "int8")]
)
def test_products(tmp_path: Path, family: str, weights: str) -> None:
    """Each node names the kernels that its attributes describe, and has the inputs that they need."""
    spec, artifact = write(tmp_path, FORESIGHT, weights, family)
    model = onnx.load(artifact.directory / GRAPH_FILE)
    sizes = {x.name: list(x.dims) for x in model.graph.initializer}
    types = {x.name: x.data_type for x in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "LigerLinear"]
    for node in nodes:
        values = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
        if "activation" in values:
            values["activation"] = values["activation"].decode()
        product = read_linear(values)
        kind = "fp32" if "score_proj" in node.input[1] else weights
        coded = kind == "int8"
        assert values["layer_spec"] == layer_digest(spec_fields(product)).encode() and product.coded == coded
        assert values["contract"] == (CODED if coded else EQUAL)
        n, k = product.outputs, product.inputs
        height = n if product.activation is None else 2 * n
        shape = [k, n] if product.indexed else [height, k]
        held = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT32}
        assert types[node.input[1]] == held[kind]
        rest: list[list[int] | None] = [shape[:1]] * coded
        rest += [[k]] if product.epsilon is not None else []
        rest += [[height]] * product.bias + [None] * product.residual  # a residual is computed
        rest += [[product.side, k], [product.side]] if product.side else []
        found = [sizes.get(name) for name in node.input[1:]]
        if FAMILIES[family].unit_norms and product.epsilon is not None:  # 1 + the stored weight
            assert found[1 + coded] is None
            found[1 + coded] = [k]
        assert found == [[shape[0], shape[1] // (4 if coded else 1)], *rest]
        assert len(node.output) == 1 + (product.side > 0)
    assert {spec for spec, _ in products(ir.load(artifact.directory / GRAPH_FILE).graph)}
    assert not any(x.op_type in ("Gemm", "MatMul") for x in model.graph.node)
    assert spec.intermediate_size in {node.attribute[[x.name for x in node.attribute].index("K")].i for node in nodes}


def test_types_meet_only_in_casts(tmp_path: Path) -> None:
    """Products with stored halves are the plugin's, and all others are fp32, as strongly typed networks require."""
    _, artifact = write(tmp_path, FORESIGHT, "fp16", "gemma3_text")
    model = onnx.shape_inference.infer_shapes(onnx.load(artifact.directory / GRAPH_FILE), strict_mode=True)
    types = {x.name: x.type.tensor_type.elem_type for x in (*model.graph.value_info, *model.graph.input)}
    types |= {x.name: x.data_type for x in model.graph.initializer}
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for node in model.graph.node:
        wide = any(x.name == "wide" and x.i for x in node.attribute)
        if node.op_type in ("LigerMixer", "LigerLinear"):
            types[node.output[0]] = full if wide else half
            continue
        floats = {t for x in node.input if (t := types.get(x)) in (half, full)}
        types |= dict.fromkeys(node.output, node.attribute[0].i if node.op_type == "Cast" else max(floats, default=0))
        assert node.op_type == "Cast" or len(floats) <= 1, node.name
        if node.op_type in ("Add", "Mul", "Div", "Sqrt", "ReduceMean", "Tanh"):
            assert floats == {full}, node.name
    stored = {x.name for x in model.graph.initializer if x.data_type == half}
    assert {node.op_type for node in model.graph.node if stored & set(node.input)} == {"LigerLinear", "Gather"}
