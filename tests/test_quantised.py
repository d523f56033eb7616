"""Weights below fp32: their values, the graphs that compute with them, and the manifest."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import FORESIGHT, make_checkpoint

import ligerexport as lx
from ligerexport.artifact.artifact import MANIFEST, Artifact, Manifest, open_artifact
from ligerexport.checkpoint.loading import load_model
from ligerexport.errors import UsageError, VerificationError
from ligerexport.exporters.backend import BuildSettings
from ligerexport.exporters.build import PAIR, BuildPlan, build
from ligerexport.exporters.onnx import graph as onnx_graph
from ligerexport.exporters.onnx.graph import weight_storage
from ligerexport.exporters.onnx.native import register
from ligerexport.exporters.onnx.quantise import dequantise, pack, quantise, requantise, unpack
from ligerexport.exporters.onnx.session import OnnxSession
from ligerexport.exporters.onnx.spec import ModelSpec, read_spec
from ligerexport.exporters.onnx.weights import data_layout, stored_slabs, write_weights
from ligerexport.exporters.targets import TARGETS, WEIGHTS
from ligerexport.exporters.verify import compare, inputs, verify

MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "odd": {"vocab_size": 133, "hidden_size": 84, "intermediate_size": 75, "family": "qwen2"},
}
"""`odd`: untied, with biases, no size a multiple of a block, an odd number of rows and an odd number of blocks."""
MAPS = ("q", "k", "v", "o", "gate", "up", "down")
LOWERINGS = TARGETS["onnx"].lowerings
SMALL = [name for name in TARGETS["onnx"].weights if WEIGHTS[name].bits < 32]


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantised") / request.param
    return make_checkpoint(path, FORESIGHT, num_hidden_layers=2, **MODELS[request.param])


def loss(artifact: Artifact, ids: np.ndarray) -> float:
    """Return the loss of a running artifact on a text in nats per token."""
    session = OnnxSession(artifact, scoring=True)
    logits = np.concatenate(list(session.every(ids[:-1])), axis=1)[0].astype(np.float64)
    return float((np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), ids[1:]]).mean())


@pytest.mark.parametrize("weights", SMALL)
@pytest.mark.parametrize("lowering", ["portable", ",".join(PAIR)])
def test_graph_is_torch_with_the_same_weights(checkpoint: Path, tmp_path: Path, lowering: str, weights: str) -> None:
    """`build` compares logits and state; this checks its report, and that a session is close to the compared graph."""
    path = build(checkpoint, tmp_path / "engine", lowering=lowering, weights=weights)
    artifact = open_artifact(path)
    manifest, precision = artifact.manifest, WEIGHTS[weights]
    graphs, checked = [artifact], [manifest.verification]
    if manifest.fallback is not None:
        graphs, checked = [*graphs, artifact.on_fallback()], [*checked, manifest.verification["fallback"]]
    assert [graph.manifest.lowering for graph in graphs] == lowering.split(",")
    assert all(found["passed"] and found["max_logit_error"] < 1e-4 for found in checked)
    assert (manifest.precision, manifest.block) == (precision.dtype, 32 if precision.blocked else None)
    assert manifest.quality is not None
    assert manifest.quality["tokens"] == 399 and manifest.quality["nll"] != manifest.quality["nll_float32"]
    text = verify.prompt_ids(read_spec(checkpoint))
    assert manifest.quality["nll"] == pytest.approx(loss(artifact, text), abs=1e-6)
    plan = BuildPlan(checkpoint, tmp_path / "plan", BuildSettings(lowering=lowering, weights=weights))
    assert manifest.bytes.weights == plan.describe()["weight_bytes"]
    assert manifest.bytes.weights < {16: 0.53, 8: 0.4, 4: 0.36}[precision.bits] * 4 * manifest.model.parameters
    assert manifest.model.parameters == build_parameters(read_spec(checkpoint))
    ids = np.random.default_rng(0).integers(0, 131, 10)  # in the window: nothing that rounding can tip over
    for graph in graphs:
        assert loss(graph, text) == pytest.approx(manifest.quality["nll"], abs=0.1)
        exact = OnnxSession(graph, exact=True).prefill(ids)
        found = OnnxSession(graph).prefill(ids)
        assert np.abs(found - exact).max() <= 0.1 * np.abs(exact).max()
        np.testing.assert_allclose(OnnxSession(graph, exact=True, prepack=False).prefill(ids), exact, atol=1e-4)


def test_what_costs_most_has_more_bits(tmp_path: Path) -> None:
    spec = read_spec(make_checkpoint(tmp_path / "model", FORESIGHT, num_hidden_layers=16, intermediate_size=128))
    storage = weight_storage("int4")
    found = {name: storage.bits(spec, name) for name in spec.weights}
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == 8
    assert found["model.norm.weight"] == found["model.layers.3.self_attn.score_proj.weight"] == 32
    assert {found[f"model.layers.{i}.self_attn.{kind}_proj.weight"] for i in range(16) for kind in "qkv"} == {8}
    assert {found[f"model.layers.{i}.self_attn.o_proj.weight"] for i in range(16)} == {4}
    more = [i for i in range(16) if found[f"model.layers.{i}.mlp.down_proj.weight"] == 8]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    for kind in ("gate", "up"):
        assert [i for i in range(16) if found[f"model.layers.{i}.mlp.{kind}_proj.weight"] == 8] == [0, 1, 15]
    assert {storage.bits(spec, name) for name in found} == {4, 8, 32}
    widths = {spec.weights[name].shape[1] for name, bits in found.items() if bits == 8}
    assert {width % 128 == 0 for width in widths} == {True, False}
    for name in found:
        even = spec.weights[name].shape[-1] % 128 == 0
        assert found[name] == 32 or storage.block_of(spec, name) == (32 if found[name] == 4 else 128 if even else 64)


def test_moments_are_those_of_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TEXTS": 2, "LENGTH": 24, "LARGEST": 1e9, "CHUNK": 32}.items():
        monkeypatch.setattr(inputs, name, value)
    spec = read_spec(make_checkpoint(tmp_path / "model", FORESIGHT, num_hidden_layers=2))
    found = [dict(layer) for layer in inputs.second_moments(spec)]
    model, seen = load_model(spec.path), list[torch.Tensor]()
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.inference_mode():
        model(torch.from_numpy(inputs._texts(spec)))
    expected = (seen[0].T @ seen[0] / len(seen[0])).numpy()
    chunks = found[1]["model.layers.1.mlp.down_proj.weight"]
    assert len(chunks) == -(-len(expected) // 32) > 1 and len(seen[0]) == 48
    for i, chunk in enumerate(chunks):
        part = slice(32 * i, 32 * i + 32)
        np.testing.assert_allclose(chunk, expected[part, part], atol=1e-4 * np.abs(expected).max())
    assert sorted(name.split(".")[-2] for name in found[0]) == sorted(f"{x}_proj" for x in MAPS)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_large_inputs_meet_is_rounded_with_less_error(bits: int) -> None:
    random = np.random.default_rng(0)
    matrix, sizes = random.normal(size=(40, 80)).astype(np.float32), np.exp(random.normal(0, 2, 80))
    even, weighted = (quantise(matrix, bits, 32, moments=moments) for moments in (None, [np.diag(sizes)]))
    plain, better = (((dequantise(x, 80) - matrix) ** 2 @ sizes).mean() for x in (even, weighted))
    assert better < 0.7 * plain


def test_errors_of_a_row_cancel_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are correlated, so the error of an output is smaller than weights that count alone could make it."""
    monkeypatch.setattr("ligerexport.exporters.onnx.quantise.CHUNK", 64)
    random = np.random.default_rng(0)
    matrix = random.normal(size=(300, 84)).astype(np.float32)
    inputs = random.normal(size=(2000, 84)) + 2 * random.normal(size=(2000, 4)) @ random.normal(size=(4, 84))
    moments = [(x.T @ x / len(x)).astype(np.float32) for x in (inputs[:, :64], inputs[:, 64:])]
    alone, together = (
        quantise(matrix, 4, 32, moments=found) for found in ([np.diag(np.diag(x)) for x in moments], moments)
    )
    plain, better = ((((dequantise(x, 84) - matrix) @ inputs.T) ** 2).mean() for x in (alone, together))
    assert better < 0.6 * plain
    np.testing.assert_array_equal(requantise(matrix, together, 16).codes, together.codes)


def build_parameters(spec: ModelSpec) -> int:
    return sum(prod(weight.shape) for weight in spec.weights.values())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_products_are_fused(checkpoint: Path, tmp_path: Path, lowering: str, bits: int) -> None:
    """Every product with a weight except the learned scores', tied or with a bias, uses few bits.

    If rows are stored one after the other, weights with the same input form one product.
    """
    spec, storage = read_spec(checkpoint), weight_storage(f"int{bits}", 32, lowering)
    write_weights(spec, tmp_path, storage)
    onnx_graph.write_graph(spec, tmp_path, lowering=lowering, storage=storage)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    register(options)
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    import onnx

    nodes = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    products = ("MatMulNBits", "BlockLinear", "Gemm", "DequantizeLinear")
    kinds = sorted(node.op_type for node in nodes if node.op_type in products)
    expected = {
        "ort": ["Gemm"] * 2 + ["MatMulNBits"] * (2 * 4 + 1),
        "portable": ["Gemm"] * 2 + ["MatMulNBits"] * (2 * 7 + 1),
        "native": ["BlockLinear"] * (2 * 4 + 1),
    }
    assert kinds == expected[lowering]
    levels = {a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {4}


class Keeping(onnxruntime.SessionOptions):
    """Options that save the graph that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.optimized_model_filepath = "run.onnx"


@pytest.mark.parametrize("weights", TARGETS["onnx"].weights)
def test_a_graph_is_run_as_it_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    """Loading does not optimise the graph; only weights in fp16 become fp32, once."""
    import onnx

    checkpoint = make_checkpoint(tmp_path / "checkpoint", FORESIGHT, num_hidden_layers=2)
    path = lx.build(checkpoint, tmp_path / "engine", weights=weights, verify=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onnxruntime, "SessionOptions", Keeping)
    lx.load(path)
    built, run = (onnx.load(file, load_external_data=False).graph for file in (path / "model.onnx", "run.onnx"))
    kinds, run_kinds = (sorted(node.op_type for node in graph.node) for graph in (built, run))
    if weights != "fp16":
        assert run_kinds == kinds
    halves = {x.name for x in run.initializer if x.data_type == onnx.TensorProto.FLOAT16}
    assert not [node.name for node in run.node if node.op_type == "Cast" and node.input[0] in halves]


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_quantised_products_keep_their_fast_order(tmp_path: Path, weights: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", FORESIGHT, num_hidden_layers=2)
    session = lx.load(lx.build(checkpoint, tmp_path / "engine", weights=weights, verify=False), prepack=False)
    assert isinstance(session, OnnxSession)
    assert mapped(session) == (weights == "fp32")


def mapped(session: OnnxSession) -> bool:
    """Return whether weights stay mapped from the file."""
    return session._session.get_session_options().get_session_config_entry("session.disable_prepacking") == "1"


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_tied_embedding_is_stored_once(tmp_path: Path, lowering: str) -> None:
    spec = read_spec(make_checkpoint(tmp_path / "model", FORESIGHT, num_hidden_layers=1, tie_word_embeddings=True))
    graph = onnx_graph.build_graph(spec, lowering=lowering, storage=weight_storage("int4", 32, lowering)).graph
    places: dict[int, list[str]] = {}
    for name, value in graph.initializers.items():
        if (offset := getattr(value.const_value, "offset", None)) is not None:
            places.setdefault(offset, []).append(name)
    shared = sorted(name for names in places.values() if len(names) > 1 for name in names)
    suffixes = ("", "_scale", "_zero_point")
    assert shared == sorted(f"{name}.weight{s}" for name in ("lm_head", "model.embed_tokens") for s in suffixes)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("weights", SMALL)
def test_what_is_written_is_what_is_read(checkpoint: Path, tmp_path: Path, lowering: str, weights: str) -> None:
    from safetensors.numpy import load_file

    spec, storage = read_spec(checkpoint), weight_storage(weights, 16, lowering)
    write_weights(spec, tmp_path, storage)
    layout, data = data_layout(spec, storage), np.fromfile(tmp_path / "model.onnx.data", np.uint8)
    for name, original in load_file(checkpoint / "model.safetensors").items():
        if original.ndim == 2 and "score_proj" not in name:
            found = np.concatenate([stored for stored, _ in stored_slabs(spec, storage, tmp_path, name)])
            bits = storage.bits(spec, name)
            if storage.precision.blocked:
                expected = dequantise(quantise(original, bits, storage.block_of(spec, name)), original.shape[1])
            else:
                expected = original.astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(found, expected)
        else:
            part = layout[name]
            np.testing.assert_array_equal(data[part.offset :][: part.nbytes].view(np.float32), original.ravel())


def test_quantiser() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((300, 100)).astype(np.float32)
    matrix[0], matrix[1, 40:], matrix[2, 5] = 0, 0, 1000
    matrix[3] = np.arange(100) % 2
    for bits, limit in ((4, 0.08), (8, 0.006)):
        blocks = quantise(matrix, bits, 32)
        found = dequantise(blocks, 100)
        assert found.shape == matrix.shape and np.isfinite(found).all()
        assert np.linalg.norm((found - matrix)[4:]) < limit * np.linalg.norm(matrix[4:])
        assert not found[0].any() and not found[1, 64:].any()
        np.testing.assert_allclose(found[3], matrix[3], atol=1e-6)
        assert abs(found[2, 5] - 1000) < 1
        assert not dequantise(blocks, 128)[:, 100:].any()
        np.testing.assert_array_equal(unpack(pack(blocks.codes[:, :99], bits), bits, 99), blocks.codes[:, :99])


def broken(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any) -> str:
    """Plant a fault between writing and verification; return the error of `build`."""
    write = onnx_graph.write_graph

    def plant(spec: ModelSpec, directory: Path, **options: Any) -> None:
        write(fault(spec, directory, options["storage"]), directory, **options)

    monkeypatch.setattr(onnx_graph, "write_graph", plant)
    with pytest.raises(VerificationError) as caught:
        build(checkpoint, tmp_path / "engine", weights="int4")
    assert not list(tmp_path.iterdir())
    return caught.value.message


def test_wrong_weights_are_not_taken_for_rounded_ones(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(spec: ModelSpec, directory: Path, storage: Any) -> ModelSpec:
        part = data_layout(spec, storage)["model.layers.1.self_attn.k_proj.weight_scale"]
        data = np.memmap(directory / onnx_graph.DATA_FILE, mode="r+")
        data[part.offset : part.offset + part.nbytes].view(np.float32).reshape(part.shape)[3] *= -1
        data.flush()
        return spec

    message = broken(checkpoint, tmp_path, monkeypatch, fault)
    assert "model.layers.1.self_attn.k_proj.weight" in message and "row 3" in message


def test_a_fault_of_the_graph_is_not_taken_for_rounding(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = broken(checkpoint, tmp_path, monkeypatch, lambda spec, *_: replace(spec, norm_eps=1e-3))
    assert "layer 0 is the first that differs" in message


def test_refusals(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown precision of weights 'int44'") as caught:
        build(checkpoint, tmp_path / "a", weights="int44")
    assert caught.value.hint is not None and "int4" in caught.value.hint
    with pytest.raises(UsageError, match="block 48") as caught:
        build(checkpoint, tmp_path / "a", weights="int4", block=48)
    assert caught.value.hint == "choose from 16, 32, 64, 128, 256"
    assert not (tmp_path / "a").exists()


def test_older_artifacts_and_states(checkpoint: Path, tmp_path: Path) -> None:
    """A manifest without the newer fields is read, and a state belongs to the weights that made it."""
    path = build(checkpoint, tmp_path / "engine", verify=False)
    data = json.loads((path / MANIFEST).read_text())
    fingerprint = open_artifact(path).manifest.fingerprint
    del data["block"], data["quality"]
    (path / MANIFEST).write_text(json.dumps(data))
    old = open_artifact(path).manifest
    assert old.block is None and old.quality is None and old.fingerprint == fingerprint
    quantised = replace(old, precision="int4", block=32)
    assert len({m.fingerprint for m in (old, quantised, replace(quantised, block=64))}) == 3
    assert Manifest.from_dict(quantised.to_dict()) == quantised
    assert isinstance(Artifact(path, quantised).graph, Path)
    assert all(compare.tolerance_of(row.dtype).weights == row.error for row in WEIGHTS.values())
