"""A converted checkpoint as an ONNX graph: the model around the mixers. Its weights are in `weights.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ligerexport.exporters.onnx.attention import softmax_attention
from ligerexport.exporters.onnx.builder import CONTRIB, IR_VERSION, OPSET, Axis, Builder, graph_input
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.linear import Weights
from ligerexport.exporters.onnx.lowerings import LOWERINGS
from ligerexport.exporters.onnx.mixer import candidates, mixer, rotary_tables
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.onnx.weights import DATA_FILE, FP32, WeightFormat, align, data_layout
from ligerexport.exporters.targets import BLOCK, get_precision
from ligerexport.state import TensorSpec

GRAPH_FILE = "model.onnx"
EMBEDDED = 4096
"""Constants of at most this many bytes stay in the graph's own file."""
DTYPES = {"activation": "float32", "float32": "float32", "int64": "int64"}
_ONNX = {"float32": "FLOAT", "int64": "INT64"}


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


def state_tensors(spec: ModelSpec) -> tuple[StateTensorSpec, ...]:
    """Return the state of the whole model in the order of the graph's inputs."""
    growing = ("B", spec.kv_heads, "P", spec.head_dim)
    tensors = []
    for layer, layer_spec in enumerate(spec.mixers):
        if layer_spec is None:
            tensors += [StateTensorSpec(layer, name, growing, "float32", 0.0, True) for name in ("key", "value")]
        else:
            tensors += [_fixed(layer, tensor) for tensor in layer_spec.state()]
    return tuple(tensors)


def _fixed(layer: int, tensor: TensorSpec) -> StateTensorSpec:
    return StateTensorSpec(layer, tensor.name, ("B", *tensor.shape), DTYPES[tensor.dtype], tensor.fill, False)


def weight_format(weights: str = "fp32", block: int = BLOCK, lowering: str = "ort") -> WeightFormat:
    """Return how weights are stored for a lowering.

    Raises:
        UsageError: No such precision, or no kernel takes such blocks.
    """
    return WeightFormat(get_precision(weights, block), block, LOWERINGS[lowering].transposed)


def build_graph(spec: ModelSpec, *, lowering: str = "ort", max_chunk: int = 128, form: WeightFormat = FP32) -> ir.Model:
    """Write the step graph of a model; weights refer to `DATA_FILE`, laid out by `data_layout`.

    The residual stream after each layer is named `hidden.LAYER`, for finding where a graph goes wrong.

    Args:
        spec: The checkpoint.
        lowering: Row of `LOWERINGS`.
        max_chunk: Most tokens of one call.
        form: How weights are stored, from `weight_format` for this lowering.
    """
    import torch

    g = Builder()
    lower = LOWERINGS[lowering](g)
    input_ids, position = graph_input("input_ids", "INT64", ("B", "T")), graph_input("position", "INT64", ("B",))
    state = state_tensors(spec)
    past = {t.past: graph_input(t.past, _ONNX[t.dtype], t.shape) for t in state}
    weights = Weights(g, lower, spec, form)
    weight, linear = weights.vector, weights.linear

    def head_norm(x: ir.Value, name: str) -> ir.Value:
        width = int(weight(f"{name}.weight").shape[0])  # type: ignore[index,arg-type]
        normed = lower.rms_norm(g.reshape(x, -1, width), weight(f"{name}.weight"), spec.norm_eps)
        return g.op("Reshape", normed, g.op("Shape", x))

    frame = Frame(g, input_ids, position)
    positions = [past[t.past] for t in state if t.name == "slot_position"]
    mixers = [layer for layer in spec.mixers if layer is not None]
    if mixers:
        tables = rotary_tables(g, torch.tensor(spec.inv_freq), mixers[0], max_chunk)
        seen = iter(candidates(frame, mixers[0], tables.rows, positions))
    outputs: dict[str, ir.Value] = {}
    residual = weights.embed(g.reshape(input_ids, -1))
    normed = lower.rms_norm(residual, weight("model.layers.0.input_layernorm.weight"), spec.norm_eps)
    for i, layer in enumerate(spec.mixers):
        name = f"model.layers.{i}"
        with g.scope(f"layers.{i}"):
            query, key, value = (linear(normed, f"{name}.self_attn.{kind}_proj") for kind in "qkv")
            if spec.qk_norm:
                query, key = head_norm(query, f"{name}.self_attn.q_norm"), head_norm(key, f"{name}.self_attn.k_norm")
            own = {t.name: past[t.past] for t in state if t.layer == i}
            if layer is None:
                mixed, present = softmax_attention(lower, frame, spec, (query, key, value), own, spec.windows[i])
            else:
                score = linear(normed, f"{name}.self_attn.score_proj") if layer.config.foresees else None
                mixed, present = mixer(lower, frame, layer, tables, (query, key, value), own, next(seen), score)
            outputs |= {f"present.{i}.{kind}": tensor for kind, tensor in present.items()}
            mixed = linear(mixed, f"{name}.self_attn.o_proj")
            after = weight(f"{name}.post_attention_layernorm.weight")
            normed, residual = lower.add_norm(mixed, residual, after, spec.norm_eps)
            gate = lower.silu(linear(normed, f"{name}.mlp.gate_proj"))
            x = linear(g.op("Mul", gate, linear(normed, f"{name}.mlp.up_proj")), f"{name}.mlp.down_proj")
        if i + 1 < len(spec.mixers):
            following = weight(f"model.layers.{i + 1}.input_layernorm.weight")
            normed, residual = lower.add_norm(x, residual, following, spec.norm_eps)
            residual.name = f"hidden.{i}"
    x, residual = (g.op("Gather", frame.per_token(y, spec.hidden_size), g.const(-1), axis=1) for y in (x, residual))
    normed, residual = lower.add_norm(x, residual, weight("model.norm.weight"), spec.norm_eps)
    residual.name = f"hidden.{len(spec.mixers) - 1}"
    logits = linear(normed, "lm_head")

    named = [g.output(logits, "logits", "FLOAT", ("B", spec.vocab_size))]
    named += [g.output(outputs[t.present], t.present, _ONNX[t.dtype], t.shape) for t in state]
    graph = ir.Graph(
        [input_ids, position, *past.values()], named, nodes=g.nodes, initializers=list(g.initializers.values()),
        opset_imports={"": OPSET, CONTRIB: 1}, name="ligerexport",
    )  # fmt: skip
    functions = lower.functions(spec.kv_heads, spec.head_dim) if spec.liger.recurrent or spec.liger.judged else []
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="ligerexport", functions=functions)


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
