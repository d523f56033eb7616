"""A converted checkpoint as an ONNX graph: the model around the mixers. Its weights are in `weights.py`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ligerexport.dtypes import DTYPES
from ligerexport.exporters.onnx.attention import softmax_attention
from ligerexport.exporters.onnx.builder import Axis, Builder, graph_input
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.linear import Weights
from ligerexport.exporters.onnx.lowerings import LOWERINGS, Plugin, Portable
from ligerexport.exporters.onnx.mixer import Candidates, RotaryTables, candidates, mixer, rotary_tables
from ligerexport.exporters.onnx.spec import ACTIVATIONS, ModelSpec
from ligerexport.exporters.onnx.weights import DATA_FILE, FP32, JOINT, WeightFormat, align, data_layout
from ligerexport.exporters.targets import BLOCK, get_precision
from ligerexport.exporters.tensorrt.node import plugin_mixer
from ligerexport.model.families import Norms, get_family

GRAPH_FILE = "model.onnx"
EMBEDDED = 4096
"""Constants of at most this many bytes stay in the graph's own file."""


@dataclass(frozen=True)
class StateTensorSpec:
    """One tensor of the state of one layer; `shape` with its letters `B` and `P`."""

    layer: int
    name: str
    shape: tuple[Axis, ...]
    dtype: str
    fill: float
    grows: bool

    @property
    def past(self) -> str:
        """Name of the input."""
        return f"past.{self.layer}.{self.name}"

    @property
    def present(self) -> str:
        """Name of the output."""
        return f"present.{self.layer}.{self.name}"

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence, where it does not grow."""
        count = prod(size for size in self.shape if isinstance(size, int))
        return count * DTYPES[self.dtype].nbytes


def _onnx(dtype: str) -> str:
    """Return ONNX's name of a row of `DTYPES`."""
    return ir.DataType(DTYPES[dtype].onnx).name


def state_tensors(spec: ModelSpec, lowering: str = "ort", form: WeightFormat = FP32) -> tuple[StateTensorSpec, ...]:
    """Return the state of the whole model in the order of the graph's inputs."""
    growing, row = ("B", spec.kv_heads, "P", spec.head_dim), LOWERINGS[lowering]
    activation = form.precision.dtype if row.plugin and form.typed else "float32"
    types = {"activation": activation, "float32": "float32", "int64": row.integer}
    tensors = []
    for layer, layer_spec in enumerate(spec.mixers):
        if layer_spec is None:
            tensors += [StateTensorSpec(layer, name, growing, "float32", 0.0, True) for name in ("key", "value")]
        else:
            fixed = layer_spec.state()
            tensors += [StateTensorSpec(layer, t.name, ("B", *t.shape), types[t.dtype], t.fill, False) for t in fixed]
    return tuple(tensors)


def weight_format(
    weights: str = "fp32", block: int = BLOCK, lowering: str = "ort", typed: bool = False
) -> WeightFormat:
    """Return how weights are stored for a lowering, and with `typed` that products run in their type.

    Raises:
        UsageError: No such precision, or no kernel takes such blocks.
    """
    return WeightFormat(get_precision(weights, block), block, LOWERINGS[lowering].transposed, typed)


def build_graph(spec: ModelSpec, *, lowering: str = "ort", max_chunk: int = 128, form: WeightFormat = FP32) -> ir.Model:
    """Write the step graph of a model; weights refer to `DATA_FILE`, laid out by `data_layout`.

    The residual stream after each layer is named `hidden.LAYER`, for finding where a graph goes wrong.

    Args:
        spec: The checkpoint.
        lowering: Row of `LOWERINGS`.
        max_chunk: Most tokens of one call.
        form: How weights are stored, from `weight_format` for this lowering.
    """
    g = Builder()
    lower = LOWERINGS[lowering](g, form.activation)
    integer = _onnx(lower.integer)
    input_ids, position = graph_input("input_ids", integer, ("B", "T")), graph_input("position", integer, ("B",))
    state = state_tensors(spec, lowering, form)
    past = {t.past: graph_input(t.past, _onnx(t.dtype), t.shape) for t in state}
    family, weights = get_family(spec.family), Weights(g, lower, spec, form)
    weight, linear = weights.vector, weights.linear

    def projections(x: ir.Value, layer: str, joint: str, widths: list[int]) -> list[ir.Value]:
        """Return the maps of one input."""
        if weights.stored(f"{layer}.{joint}"):
            return g.split(linear(x, f"{layer}.{joint}"), widths)
        return [linear(x, f"{layer}.{joint.partition('.')[0]}.{kind}_proj") for kind in JOINT[joint]]

    def scaled(x: ir.Value, factor: float) -> ir.Value:
        return x if factor == 1 else g.op("Mul", x, g.floats(factor))

    def norm_weight(name: str) -> ir.Value:
        stored = weight(f"{name}.weight")
        return g.once(("norm", name), lambda: g.op("Add", stored, g.floats(1))) if family.unit_norms else stored

    def norm(x: ir.Value, name: str | None) -> ir.Value:
        return x if name is None else lower.rms_norm(x, norm_weight(name), spec.norm_eps)

    def head_norm(x: ir.Value, name: str) -> ir.Value:
        """Norm each head, or all of them at once: as the norm is wide."""
        width = spec.weights[f"{name}.weight"].shape[0]
        return g.op("Reshape", norm(g.reshape(x, -1, width), name), g.op("Shape", x))

    def add(x: ir.Value | None, residual: ir.Value, name: str | None) -> tuple[ir.Value, ir.Value]:
        """Return the sum as the norm of the next block leaves it, and the sum, which is there if x is None."""
        if x is None:
            return norm(residual, name), residual
        x = scaled(x, spec.scaling.residual)
        if name is None:
            total = lower.add(x, residual)
            return total, total
        return lower.add_norm(x, residual, norm_weight(name), spec.norm_eps)

    frame = Frame(g, input_ids, position)
    tables, seen = ({}, {}) if lower.plugin else _shared(lower, frame, spec, past, max_chunk)
    activation = ACTIVATIONS[spec.activation]
    heads = [count * spec.head_dim for count in (spec.q_heads, spec.kv_heads, spec.kv_heads)]
    outputs: dict[str, ir.Value] = {}
    residual = scaled(weights.embed(g.reshape(input_ids, -1)), spec.scaling.embedding)
    norms = [_named(family.norms, i) for i in range(len(spec.mixers))]
    normed = norm(residual, norms[0].before_attention)
    x: ir.Value | None
    for i, layer in enumerate(spec.mixers):
        name = f"model.layers.{i}"
        with g.scope(f"layers.{i}"):
            query, key, value = projections(normed, name, "self_attn.qkv_proj", heads)
            if family.qk_norm is not None:
                query, key = head_norm(query, f"{name}.self_attn.q_norm"), head_norm(key, f"{name}.self_attn.k_norm")
            own = {t.name: past[t.past] for t in state if t.layer == i}
            if layer is None:
                mixed, present = softmax_attention(lower, frame, spec, (query, key, value), own, spec.attention[i])
            else:
                score = linear(normed, f"{name}.self_attn.score_proj") if layer.config.foresees else None
                if isinstance(lower, Plugin):
                    inv_freq = spec.attention[i].inv_freq
                    mixed, present = plugin_mixer(lower, frame, layer, inv_freq, (query, key, value), own, score)
                else:
                    mixed, present = mixer(lower, frame, layer, tables[i], (query, key, value), own, seen.get(i), score)
            outputs |= {f"present.{i}.{kind}": tensor for kind, tensor in present.items()}
            mixed = norm(linear(mixed, f"{name}.self_attn.o_proj"), norms[i].after_attention)
            normed, residual = add(mixed, residual, norms[i].before_mlp)
            gate, up = projections(normed, name, "mlp.gate_up_proj", [spec.intermediate_size] * 2)
            x = linear(lower.gated_unit(gate, up, activation), f"{name}.mlp.down_proj")
            x = norm(x, norms[i].after_mlp)
            if lower.plugin:  # by the layer's last product
                residual = lower.add(scaled(x, spec.scaling.residual), residual)
                x = None
        if i + 1 < len(spec.mixers):
            normed, residual = add(x, residual, norms[i + 1].before_attention)
            residual.name = f"hidden.{i}"
    if x is None:
        residual = lower.last(frame, residual, spec.hidden_size)
        normed = norm(residual, "model.norm")
    else:
        x, residual = (lower.last(frame, y, spec.hidden_size) for y in (x, residual))
        normed, residual = add(x, residual, "model.norm")
    residual.name = f"hidden.{len(spec.mixers) - 1}"
    factor, cap = spec.scaling.logits, spec.scaling.logit_cap
    logits = scaled(linear(normed, "lm_head"), factor / (cap or 1))
    if cap is not None:
        logits = scaled(g.op("Tanh", logits), cap)

    named = [g.output(logits, "logits", "FLOAT", ("B", spec.vocab_size))]
    named += [g.output(outputs[t.present], t.present, _onnx(t.dtype), t.shape) for t in state]
    graph = ir.Graph(
        [input_ids, position, *past.values()], named, nodes=g.nodes, initializers=list(g.initializers.values()),
        opset_imports={"": lower.opset} | dict.fromkeys(lower.domains, 1), name="ligerexport",
    )  # fmt: skip
    linear_states = any(layer is not None and (layer.config.recurrent or layer.config.judged) for layer in spec.mixers)
    functions = lower.functions(spec.kv_heads, spec.head_dim) if linear_states else []
    model = ir.Model(graph, ir_version=lower.ir_version, producer_name="ligerexport", functions=functions)
    RemoveUnusedNodesPass()(model)  # what an operator took over from the nodes before it
    return model


def nodes_by_layer(graph: ir.Graph) -> list[int]:
    """Return how many nodes each layer has; what layers share is in none."""
    places = Counter(node.name.split("/")[0] for node in graph if node.name and node.name.startswith("layers."))
    return [places[f"layers.{i}"] for i in range(len(places))]


def _shared(
    lower: Portable, frame: Frame, spec: ModelSpec, past: dict[str, ir.Value], max_chunk: int
) -> tuple[dict[int, RotaryTables], dict[int, Candidates]]:
    """Write what layers share before the first one runs: tables of those that turn alike, candidates of equal mixers.

    Returns:
        Both by layer; no candidates for the lowering `native`.
    """
    import torch

    mixers = {i: layer for i, layer in enumerate(spec.mixers) if layer is not None}
    alike: dict[Any, list[int]] = {}
    for i, layer in mixers.items():
        turns = spec.attention[i].inv_freq, layer.max_distance, layer.scale, layer.config.evicts
        alike.setdefault(turns, []).append(i)
    tables: dict[int, RotaryTables] = {}
    for count, ((inv_freq, *_), layers) in enumerate(alike.items()):
        largest = max((mixers[i] for i in layers), key=lambda layer: layer.config.num_slots)
        name = f"rotary.{count}" if count else "rotary"
        tables |= dict.fromkeys(layers, rotary_tables(lower, torch.tensor(inv_freq), largest, max_chunk, name))
    seen: dict[int, Candidates] = {}
    for mixer_spec in () if lower.native else dict.fromkeys(mixers.values()):
        equal = [i for i, layer in mixers.items() if layer == mixer_spec]
        width = (lower.max_tensors or len(equal) + 1) - 1
        for layers in (equal[start : start + width] for start in range(0, len(equal), width)):
            positions = [past[f"past.{i}.slot_position"] for i in layers]
            seen |= zip(layers, candidates(frame, mixer_spec, tables[layers[0]].rows, positions), strict=True)
    return tables, seen


def _named(norms: Norms, layer: int) -> Norms:
    """Return the norms of a layer under their whole names."""
    return Norms(*(name and f"model.layers.{layer}.{name}" for name in norms))


def write_graph(
    spec: ModelSpec, directory: Path, *, lowering: str = "ort", max_chunk: int = 128, form: WeightFormat = FP32
) -> None:
    """Write the graph, and its large constants behind the weights in `DATA_FILE`."""
    model = build_graph(spec, lowering=lowering, max_chunk=max_chunk, form=form)
    end = max(align(part.offset + part.nbytes) for part in data_layout(spec, form).values())
    with (directory / DATA_FILE).open("r+b") as data:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes <= EMBEDDED:
                continue
            data.seek(end)
            data.write(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                DATA_FILE, end, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
            )
            end = align(end + tensor.nbytes)
    ir.save(model, directory / GRAPH_FILE)
