"""A converted checkpoint as an ONNX graph: the model around the mixers. Its weights are in `weights.py`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ligerexport.artifact.artifact import Manifest, StateTensor
from ligerexport.artifact.claims import METER
from ligerexport.dtypes import BY_ONNX, DTYPES
from ligerexport.exporters.onnx.attention import softmax_attention
from ligerexport.exporters.onnx.builder import Builder, graph_input
from ligerexport.exporters.onnx.candidates import Candidates, candidates
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.linear import HEAD, Weights
from ligerexport.exporters.onnx.lora import adapter_inputs
from ligerexport.exporters.onnx.lowerings import Native, Ort, Portable
from ligerexport.exporters.onnx.mixer import RotaryTables, mixer, rotary_tables
from ligerexport.exporters.onnx.packed import Heads, concat
from ligerexport.exporters.onnx.spec import ACTIVATIONS, ModelSpec
from ligerexport.exporters.onnx.weights import DATA_FILE, FP32, JOINT, WeightStorage, align, data_layout
from ligerexport.exporters.targets import BLOCK, WEIGHTS, get_precision
from ligerexport.exporters.tensorrt.fuse import fuse_for_plugin
from ligerexport.exporters.tensorrt.lowering import Plugin
from ligerexport.exporters.tensorrt.node import plugin_mixer
from ligerexport.model.families import Norms, get_family
from ligerexport.model.state import FORGOTTEN, MixerSpec

LOWERINGS: dict[str, type[Portable]] = {"ort": Ort, "portable": Portable, "native": Native, "plugin": Plugin}
"""The lowerings that a graph can be written in."""
GRAPH_FILE = "model.onnx"
FALLBACK_FILE = "fallback.onnx"
EMBEDDED = 4096
"""Largest constant, in bytes, that stays in the graph's own file."""
Projected = tuple[ir.Value, ir.Value, ir.Value]
"""Query, key and value of a layer."""
Mixed = tuple[ir.Value, dict[str, ir.Value]]
"""Output and new state of a mixer."""


def _onnx(dtype: str) -> str:
    """Return ONNX's name of a row of `DTYPES`."""
    return ir.DataType(DTYPES[dtype].onnx).name


def state_tensors(spec: ModelSpec, lowering: str = "ort", storage: WeightStorage = FP32) -> tuple[StateTensor, ...]:
    """Return the state of the whole model in the order of the graph's inputs."""
    growing, row = ("B", spec.kv_heads, "P", spec.head_dim), LOWERINGS[lowering]
    activation = BY_ONNX[storage.activation].name if row.plugin else "float32"
    types = {"activation": activation, "float32": "float32", "int64": row.integer}
    tensors = []
    for layer, layer_spec in enumerate(spec.mixers):
        past, present = f"past.{layer}", f"present.{layer}"
        if layer_spec is None:
            tensors += [
                StateTensor(f"{past}.{x}", f"{present}.{x}", growing, "float32", grows=True) for x in ("key", "value")
            ]
        else:
            for x in layer_spec.state():
                dtype = types.get(x.dtype, x.dtype)
                tensors.append(StateTensor(f"{past}.{x.name}", f"{present}.{x.name}", ("B", *x.shape), dtype, x.fill))
    return tuple(tensors)


def weight_storage(weights: str = "fp32", block: int = BLOCK, lowering: str = "ort") -> WeightStorage:
    """Return how weights are stored for a lowering."""
    row = LOWERINGS[lowering]
    return WeightStorage(get_precision(weights, block), block, row.transposed, row.plugin)


def storage_of(manifest: Manifest) -> WeightStorage:
    """Return how the weights of an artifact are stored."""
    (weights,) = (name for name, row in WEIGHTS.items() if row.dtype == manifest.precision)
    return weight_storage(weights, manifest.block or BLOCK, manifest.lowering)


def build_graph(
    spec: ModelSpec,
    *,
    lowering: str = "ort",
    max_chunk: int = 128,
    storage: WeightStorage = FP32,
    meter: bool = False,
    lora: int = 0,
) -> ir.Model:
    """Write the step graph of a model; weights refer to `DATA_FILE`, laid out by `data_layout`.

    The residual stream after each layer is named `hidden.LAYER`, for finding where a graph goes wrong.

    Args:
        spec: The checkpoint.
        lowering: Row of `LOWERINGS`.
        max_chunk: Largest number of tokens per call.
        storage: How weights are stored, from `weight_storage` for this lowering.
        lora: Largest rank of adapters that the graph takes; 0 for none.
        meter: Whether the output `METER` follows the state.
    """
    g = Builder()
    lower = LOWERINGS[lowering](g, meter)
    integer = _onnx(lower.integer)
    input_ids, position = graph_input("input_ids", integer, ("B", "T")), graph_input("position", integer, ("B",))
    state = state_tensors(spec, lowering, storage)
    given = [t.bound(t.past, lowering) for t in state]
    made = [t.bound(t.present, lowering) for t in state]
    past = {t.name: graph_input(t.name, _onnx(t.dtype), t.shape) for t in given}
    taken = adapter_inputs(spec, data_layout(spec, storage), lora)
    adapters = {x.name: graph_input(x.name, "FLOAT", x.shape) for x in taken}
    blocks = _Blocks(g, lower, spec, Weights(g, lower, spec, storage, adapters, input_ids))
    frame = Frame(g, input_ids, position)
    mixers = _mixers(lower, frame, spec, past, max_chunk)
    outputs: dict[str, ir.Value] = {}
    normed, residual = blocks.embed(input_ids)
    x: ir.Value | None = None
    for i in range(len(spec.mixers)):
        prefix = f"past.{i}."
        own = {name.removeprefix(prefix): value for name, value in past.items() if name.startswith(prefix)}
        with g.scope(f"layers.{i}"):
            mixed, present = blocks.attention(i, normed, partial(mixers, i, own))
            x, residual = blocks.mlp(i, mixed, residual)
        outputs |= {f"present.{i}.{kind}": tensor for kind, tensor in present.items()}
        if i + 1 < len(spec.mixers):
            normed, residual = blocks.add(x, residual, blocks.norms[i + 1].before_attention)
            residual.name = f"hidden.{i}"
    logits = blocks.logits(frame, x, residual)

    named = [g.output(logits, "logits", "FLOAT", ("B", spec.vocab_size))]
    named += [g.output(outputs[t.name], t.name, _onnx(t.dtype), t.shape) for t in made]
    if meter:
        shares = [outputs.get(f"present.{i}.{FORGOTTEN}") for i in range(len(spec.mixers))]
        means = [frame.filled(0.0, 1) if x is None else g.op("ReduceMean", x, g.const([1])) for x in shares]
        share = concat(g, lower.max_tensors, means, axis=1)
        named.append(g.output(share, METER, "FLOAT", ("B", len(means))))
    graph = ir.Graph(
        [input_ids, position, *past.values(), *adapters.values()], named, nodes=g.nodes,
        initializers=list(g.initializers.values()),
        opset_imports={"": lower.opset} | dict.fromkeys(lower.domains, 1), name="ligerexport",
    )  # fmt: skip
    linear_states = any(layer is not None and (layer.config.recurrent or layer.config.judged) for layer in spec.mixers)
    functions = lower.functions() if linear_states else []
    model = ir.Model(graph, ir_version=lower.ir_version, producer_name="ligerexport", functions=functions)
    if lower.plugin:
        fuse_for_plugin(model, storage.activation)
    RemoveUnusedNodesPass()(model)  # whose work another operator took over
    return model


class _Blocks:
    """Writes the blocks of a model around its mixers.

    Args:
        lower: Lowering of the graph.
        weights: Weights of the model.
    """

    def __init__(self, g: Builder, lower: Portable, spec: ModelSpec, weights: Weights) -> None:
        self.g, self.lower, self.spec, self.weights = g, lower, spec, weights
        self.family = get_family(spec.family)
        self.norms = [
            Norms(*(name and f"model.layers.{i}.{name}" for name in self.family.norms)) for i in range(len(spec.mixers))
        ]

    def embed(self, input_ids: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the first residual stream, normed and unchanged."""
        rows = self.weights.embed(self.g.reshape(input_ids, -1))
        residual = self._scaled(rows, self.spec.scaling.embedding)
        return self._norm(residual, self.norms[0].before_attention), residual

    def attention(
        self, i: int, x: ir.Value, mix: Callable[[Projected, ir.Value | None], Mixed]
    ) -> tuple[ir.Value, dict[str, ir.Value]]:
        """Write the attention of a layer; return its output and the layer's new state."""
        name, spec, linear = f"model.layers.{i}.self_attn", self.spec, self.weights.linear
        heads = [count * spec.head_dim for count in (spec.q_heads, spec.kv_heads, spec.kv_heads)]
        query, key, value = self._projections(x, f"model.layers.{i}", "self_attn.qkv_proj", heads)
        if self.family.qk_norm is not None:
            query, key = self._head_norm(query, f"{name}.q_norm"), self._head_norm(key, f"{name}.k_norm")
        layer = spec.mixers[i]
        score = linear(x, f"{name}.score_proj") if layer is not None and layer.config.foresees else None
        mixed, present = mix((query, key, value), score)
        return self._norm(linear(mixed, f"{name}.o_proj"), self.norms[i].after_attention), present

    def mlp(self, i: int, mixed: ir.Value, residual: ir.Value) -> tuple[ir.Value | None, ir.Value]:
        """Write the MLP of a layer; return its output and the residual stream, or None and their sum."""
        name, spec, lower = f"model.layers.{i}", self.spec, self.lower
        normed, residual = self.add(mixed, residual, self.norms[i].before_mlp)
        gate, up = self._projections(normed, name, "mlp.gate_up_proj", [spec.intermediate_size] * 2)
        x = self.weights.linear(lower.gated_unit(gate, up, ACTIVATIONS[spec.activation]), f"{name}.mlp.down_proj")
        x = self._norm(x, self.norms[i].after_mlp)
        if lower.adds_late:
            return x, residual
        return None, lower.add(self._scaled(x, spec.scaling.residual), residual)

    def logits(self, frame: Frame, x: ir.Value | None, residual: ir.Value) -> ir.Value:
        """Return the logits after the last token; `mlp` returned x and the residual stream."""
        spec, last = self.spec, partial(self.lower.last, frame, width=self.spec.hidden_size)
        x, residual = x and last(x), last(residual)
        normed, residual = self.add(x, residual, "model.norm")
        residual.name = f"hidden.{len(spec.mixers) - 1}"
        factor, cap = spec.scaling.logits, spec.scaling.logit_cap
        logits = self._scaled(self.weights.linear(normed, HEAD), factor / (cap or 1))
        return logits if cap is None else self._scaled(self.g.op("Tanh", logits), cap)

    def add(self, x: ir.Value | None, residual: ir.Value, name: str | None) -> tuple[ir.Value, ir.Value]:
        """Return the norm of the sum for the next block, and the sum; without x, `residual` is the sum."""
        if x is None:
            return self._norm(residual, name), residual
        x = self._scaled(x, self.spec.scaling.residual)
        if name is None:
            total = self.lower.add(x, residual)
            return total, total
        return self.lower.add_norm(x, residual, self._norm_weight(name), self.spec.norm_eps)

    def _projections(self, x: ir.Value, layer: str, joint: str, widths: list[int]) -> list[ir.Value]:
        """Return the linear maps of one input that `JOINT` has under one name."""
        linear = self.weights.linear
        if self.weights.stored(f"{layer}.{joint}"):
            return self.g.split(linear(x, f"{layer}.{joint}"), widths)
        return [linear(x, f"{layer}.{joint.partition('.')[0]}.{kind}_proj") for kind in JOINT[joint]]

    def _scaled(self, x: ir.Value, factor: float) -> ir.Value:
        return x if factor == 1 else self.g.op("Mul", x, self.g.floats(factor))

    def _norm_weight(self, name: str) -> ir.Value:
        stored = self.weights.vector(f"{name}.weight")
        if not self.family.unit_norms:
            return stored
        return self.g.once(("norm", name), lambda: self.g.op("Add", stored, self.g.floats(1)))

    def _norm(self, x: ir.Value, name: str | None) -> ir.Value:
        return x if name is None else self.lower.rms_norm(x, self._norm_weight(name), self.spec.norm_eps)

    def _head_norm(self, x: ir.Value, name: str) -> ir.Value:
        """Norm each head, or all heads at once, depending on the width of the norm's weight."""
        width = self.spec.weights[f"{name}.weight"].shape[0]
        return self.g.op("Reshape", self._norm(self.g.reshape(x, -1, width), name), self.g.op("Shape", x))


def _mixers(
    lower: Portable, frame: Frame, spec: ModelSpec, past: dict[str, ir.Value], max_chunk: int
) -> Callable[[int, dict[str, ir.Value], Projected, ir.Value | None], Mixed]:
    """Return a function that writes the mixer of a layer from its index, past state, projections and score."""
    tables, seen = ({}, {}) if lower.plugin else _shared(lower, frame, spec, past, max_chunk)

    def mix(i: int, own: dict[str, ir.Value], projected: Projected, score: ir.Value | None) -> Mixed:
        layer, softmax = spec.mixers[i], spec.attention[i]
        if layer is None:
            return softmax_attention(lower, frame, spec, projected, own, softmax)
        if lower.plugin:
            return plugin_mixer(frame, layer, softmax.inv_freq, projected, own, score)
        own_seen = [seen[i, heads] for heads, _ in layer.groups if not lower.native]
        return mixer(lower, frame, layer, tables[i], projected, own, own_seen, score, i)

    return mix


def nodes_by_layer(graph: ir.Graph) -> list[int]:
    """Return the number of nodes of each layer, without the nodes that layers share."""
    places = Counter(node.name.split("/")[0] for node in graph if node.name and node.name.startswith("layers."))
    return [places[f"layers.{i}"] for i in range(len(places))]


def _shared(
    lower: Portable, frame: Frame, spec: ModelSpec, past: dict[str, ir.Value], max_chunk: int
) -> tuple[dict[int, RotaryTables], dict[tuple[int, tuple[int, ...]], Candidates]]:
    """Write what layers share before the first one runs: tables for equal rotary settings, candidates of equal mixers.

    Returns:
        Tables by layer, and candidates by layer and group of KV heads; the lowering `native` has no candidates.
    """
    import torch

    mixers = {i: layer for i, layer in enumerate(spec.mixers) if layer is not None}
    alike: dict[Any, list[int]] = {}
    for i, layer in mixers.items():
        turns = spec.attention[i].inv_freq, layer.max_distance, layer.scale, layer.config.evicts
        alike.setdefault(turns, []).append(i)
    tables: dict[int, RotaryTables] = {}
    for count, ((inv_freq, *_), layers) in enumerate(alike.items()):
        each = (group for i in layers for _, group in mixers[i].groups)
        largest = max(each, key=lambda group: group.config.num_slots)
        name = f"rotary.{count}" if count else "rotary"
        tables |= dict.fromkeys(layers, rotary_tables(lower, torch.tensor(inv_freq), largest, max_chunk, name))
    groups: dict[MixerSpec, list[tuple[tuple[int, tuple[int, ...]], ir.Value]]] = {}
    for i, layer in mixers.items() if not lower.native else ():
        by_group = Heads(lower, layer).positions(past[f"past.{i}.slot_position"])
        for (heads, group), position in zip(layer.groups, by_group, strict=True):
            groups.setdefault(group, []).append(((i, heads), position))
    seen: dict[tuple[int, tuple[int, ...]], Candidates] = {}
    for group, members in groups.items():
        width = (lower.max_tensors or len(members) + 1) - 1
        for start in range(0, len(members), width):
            owners, positions = zip(*members[start : start + width], strict=True)
            rows = tables[owners[0][0]].rows
            seen |= zip(owners, candidates(frame, group, rows, list(positions)), strict=True)
    return tables, seen


def write_graph(
    spec: ModelSpec,
    directory: Path,
    *,
    lowering: str = "ort",
    max_chunk: int = 128,
    storage: WeightStorage = FP32,
    lora: int = 0,
    meter: bool = False,
    file: str = GRAPH_FILE,
    constants: dict[bytes, int] | None = None,
) -> None:
    """Write the graph, and append its large constants to the weights in `DATA_FILE`.

    Args:
        file: Name of the graph's file.
        constants: Offsets of the constants that another graph has appended, by their bytes; this one's are added.
    """
    model = build_graph(spec, lowering=lowering, max_chunk=max_chunk, storage=storage, lora=lora, meter=meter)
    constants = {} if constants is None else constants
    with (directory / DATA_FILE).open("r+b") as data:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes <= EMBEDDED:
                continue
            raw = tensor.tobytes()
            if raw not in constants:
                constants[raw] = data.seek(align(data.seek(0, os.SEEK_END)))
                data.write(raw)
            value.const_value = ir.ExternalTensor(
                DATA_FILE, constants[raw], tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
            )
    ir.save(model, directory / file)
