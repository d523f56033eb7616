"""A second graph for onnxruntime-genai, made from an artifact's own: the same nodes and weights, other state tensors.

onnxruntime-genai carries two tensors per layer, `conv_state` and `recurrent_state`, which start as zero and have the
same shapes in all layers. So one layer stands for all: its `recurrent_state` packs every fp32 tensor of the state, its
`conv_state` every int64 tensor and the position, each minus its initial value. Keys and values of layers kept as
softmax are its KV cache.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ligerexport.artifact.artifact import Artifact, StateTensor
from ligerexport.errors import UsageError, VerificationError
from ligerexport.exporters.onnx.builder import Builder, graph_input
from ligerexport.exporters.onnx.session import DEFAULT_CHUNK, OnnxSession, optimisation
from ligerexport.exporters.targets import get_target
from ligerexport.text.tokenizer import TextModel, eos_ids

GRAPH_FILE = "genai.onnx"
CONFIG_FILE = "genai_config.json"
PAST, PRESENT = "past_key_values.%d.", "present.%d."
PACKED = {"float32": ("recurrent_state", "FLOAT"), "int64": ("conv_state", "INT64")}
"""Name and type of the tensor that carries all state of a type."""
CONTEXT = 1 << 20
"""Longest text of a generator, in tokens; onnxruntime-genai needs such a number, although the model has no limit."""
LENGTH = 1 << 15
"""Number of tokens that a generator allocates for by default."""


def check_genai(checkpoint: Path, target: str, lowering: str, ragged: bool = False) -> None:
    """Check that onnxruntime-genai can run what will be built.

    Raises:
        UsageError: The target is not for ONNX Runtime, the lowering is `native`, the memory is `ragged`, or the model
            names no end-of-text id.
    """
    if not get_target(target).onnxruntime:
        raise UsageError(f"onnxruntime-genai with the target {target}", hint="--target onnx")
    if lowering == "native":
        raise UsageError("onnxruntime-genai does not have the operator of the lowering native", hint="--lowering ort")
    if ragged:
        raise UsageError(
            "onnxruntime-genai carries no state with sizes for each KV head or in a small type",
            hint="build without --genai, or convert with another preset, such as --preset memory",
        )
    if not _ends(checkpoint):
        raise UsageError(
            f"{checkpoint} has no eos_token_id", hint="onnxruntime-genai needs it; see generation_config.json"
        )


def write_genai(artifact: Artifact) -> None:
    """Write the graph and configuration beside those of an unfinished artifact."""
    model = ir.load(artifact.graph)
    _pack(model.graph, artifact)
    ir.save(model, artifact.directory / GRAPH_FILE)
    (artifact.directory / CONFIG_FILE).write_text(json.dumps(configuration(artifact), indent=1) + "\n")
    _verify(artifact)


def _ends(directory: Path) -> list[int]:
    """Return the ids that end a text, those of the configurations first; the first id also pads batches."""
    first = eos_ids(directory)
    more = TextModel(directory).eos_ids if (directory / "tokenizer.json").is_file() else frozenset()
    return [*sorted(first), *sorted(more - first)]


def configuration(artifact: Artifact) -> dict[str, Any]:
    """Return `genai_config.json`."""
    shape = artifact.manifest.model
    eos = _ends(artifact.directory)
    return {
        "model": {
            "type": "decoder", "vocab_size": shape.vocab_size, "context_length": CONTEXT,
            "eos_token_id": eos, "pad_token_id": eos[0],
            "decoder": {
                "filename": GRAPH_FILE, "hidden_size": shape.hidden_size, "head_size": shape.d_k,
                "num_attention_heads": shape.q_heads, "num_key_value_heads": shape.kv_heads,
                "num_hidden_layers": shape.layers,
                "session_options": {"log_severity_level": 3, "provider_options": [],
                                    "graph_optimization_level": optimisation(artifact.manifest)},
                "inputs": {"input_ids": "input_ids", "past_key_names": f"{PAST}key",
                           "past_value_names": f"{PAST}value"},
                "outputs": {"logits": "logits", "present_key_names": f"{PRESENT}key",
                            "present_value_names": f"{PRESENT}value"},
            },
        },
        "search": {"max_length": LENGTH, "chunk_size": min(DEFAULT_CHUNK, artifact.manifest.graph.max_chunk),
                   "do_sample": False, "past_present_share_buffer": False},
    }  # fmt: skip


def _pack(graph: ir.Graph, artifact: Artifact) -> None:
    """Replace the state among a graph's inputs and outputs by the packed one."""
    inputs, outputs = ({str(value.name): value for value in values} for values in (graph.inputs, graph.outputs))
    state, g = artifact.manifest.state, Builder(prefix="genai/")
    fixed = {dtype: [t for t in state if not t.grows and t.dtype == dtype] for dtype in PACKED}
    layer = min(_layer(t) for tensors in fixed.values() for t in tensors)
    sizes = {dtype: [prod(map(int, t.shape[1:])) for t in tensors] for dtype, tensors in fixed.items()}
    sizes["int64"].append(1)  # the position
    pasts, presents, parts = [], [], {}
    for dtype, tensors in fixed.items():
        name, kind = PACKED[dtype]
        pasts.append(graph_input(PAST % layer + name, kind, ("B", sum(sizes[dtype]))))
        parts[dtype] = g.op("Split", pasts[-1], g.const(sizes[dtype]), outputs=len(sizes[dtype]), axis=1)
        for tensor, part in zip(tensors, parts[dtype], strict=False):
            whole = g.reshape(part, -1, *map(int, tensor.shape[1:]))
            inputs[tensor.past].replace_all_uses_with(_add(g, whole, np.array(tensor.fill, dtype)))
    seen = parts["int64"][-1]
    inputs["position"].replace_all_uses_with(g.op("Squeeze", seen, g.const([1])))
    graph.insert_before(graph[0], g.nodes)

    count = len(g.nodes)
    seen = g.op("Add", seen, g.op("Shape", inputs["input_ids"], start=1, end=2))
    for dtype, tensors in fixed.items():
        name, kind = PACKED[dtype]
        for tensor in tensors:
            outputs[tensor.present].name = f"genai/whole.{tensor.present}"
        flat = [
            g.reshape(_add(g, outputs[tensor.present], np.array(-tensor.fill, dtype)), -1, size)
            for tensor, size in zip(tensors, sizes[dtype], strict=False)
        ]
        joined = g.concat(*flat, *([seen] if dtype == "int64" else []), axis=1)
        presents.append(g.output(joined, PRESENT % layer + name, kind, ("B", sum(sizes[dtype]))))
    last, shape = outputs["logits"], ("B", 1, artifact.manifest.model.vocab_size)
    last.name = "genai/last"
    logits = g.output(g.op("Unsqueeze", last, g.const([1])), "logits", "FLOAT", shape)
    graph.extend(g.nodes[count:])

    for tensor in state:
        if tensor.grows:
            inputs[tensor.past].name = PAST % _layer(tensor) + tensor.past.rpartition(".")[2]
            pasts.append(inputs[tensor.past])
            presents.append(outputs[tensor.present])
    for value in g.initializers.values():
        graph.register_initializer(value)
    graph.inputs[:] = [inputs["input_ids"], *pasts]
    graph.outputs[:] = [logits, *presents]


def _verify(artifact: Artifact) -> None:
    """Compare the packed graph with the artifact's own as both will run, through a prompt in pieces and steps.

    They have the same nodes and are loaded alike, so their logits are normally equal. The usual bound covers processors
    on which they are not.
    """
    import onnxruntime

    from ligerexport.exporters.verify.compare import tolerance_of

    manifest, options = artifact.manifest, onnxruntime.SessionOptions()
    prepack, tolerance = manifest.block is not None, tolerance_of(manifest.precision).logits
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, optimisation(manifest))
    options.add_session_config_entry("session.disable_prepacking", str(int(not prepack)))
    path = artifact.directory / GRAPH_FILE
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    own = OnnxSession(artifact, prepack=prepack)
    letters = {"B": 1, "P": 0}
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    state = {x.name: np.zeros([letters.get(n, n) for n in x.shape], types[x.type]) for x in session.get_inputs()[1:]}
    ids = np.random.default_rng(0).integers(0, manifest.model.vocab_size, 2 * own.chunk + 8)
    for part in np.split(ids, [own.chunk, 2 * own.chunk, *range(2 * own.chunk + 1, len(ids))]):
        logits, *present = session.run(None, {"input_ids": part[None], **state})
        state = dict(zip(state, present, strict=True))
        if not (error := np.abs(logits[:, 0] - own.prefill(part)).max()) <= tolerance:
            raise VerificationError(
                f"the graph for onnxruntime-genai: logits are off by {error:.1e}, at most {tolerance:.0e} was expected",
                hint="nothing was written; build without --genai and please report this with onnxruntime's version",
            )


def _add(g: Builder, x: ir.Value, value: np.ndarray) -> ir.Value:
    return g.op("Add", x, g.const(value, value.dtype)) if value else x


def _layer(tensor: StateTensor) -> int:
    return int(tensor.past.split(".")[1])
