"""Variants of an artifact's step graph, made in memory; weights and state are the artifact's.

One returns the logits of every token of a call. The other rounds no activations, also not those that it keeps in its
state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from ligerexport.artifact.artifact import Manifest
from ligerexport.dtypes import DTYPES
from ligerexport.exporters.onnx.lowerings import FP32_ACTIVATIONS
from ligerexport.exporters.onnx.native import EXACT_OPERATORS

ROUNDED = (ir.DataType.INT8, ir.DataType.FLOAT16)
"""Types of keys and values in the state that take fewer bits than fp32."""


def exact_graph(graph: Path, outputs: Iterable[str] = ()) -> bytes:
    """Return the graph with activations, keys and values left in fp32.

    They are else rounded in products with quantised weights and in a state of a smaller type.

    Args:
        graph: The graph's file; the weights stay in the files beside it.
        outputs: Names of fp32 values that become outputs too, in this order.
    """
    model = ir.load(graph)
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name in outputs:
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(values[name])
    small = any(value.dtype in ROUNDED for value in model.graph.inputs)
    for node in model.graph:
        node.op_type = EXACT_OPERATORS.get(node.op_type, node.op_type)
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", FP32_ACTIVATIONS)
        if small and node.op_type == "Round" and (unrounded := node.inputs[0]) is not None:
            node.outputs[0].replace_all_uses_with(unrounded)
        if small and node.op_type == "Cast" and node.attributes["to"].as_int() in ROUNDED:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype in ROUNDED:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.to_proto(model).SerializeToString()


def exact_manifest(manifest: Manifest) -> Manifest:
    """Return the manifest of the graph that `exact_graph` returns."""
    small = [row.name for row in DTYPES.values() if row.onnx in ROUNDED]
    state = (replace(t, dtype="float32") if t.dtype in small else t for t in manifest.state)
    return replace(manifest, state=tuple(state))


def every_token(graph: Path) -> bytes | None:
    """Return the graph with logits `[B * T, V]`; its weights stay in the files beside `graph`.

    Returns None for a graph that `ligerexport.exporters.onnx.graph` did not write, because its last token is picked in
    an unknown way.
    """
    model = ir.load(graph)
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    gathers = None if logits is None else _last_token(logits)
    if logits is None or not gathers:
        return None
    for gather, rows in gathers.items():
        gather.outputs[0].replace_all_uses_with(rows)
    logits.shape = ir.Shape([None, logits.shape[-1] if logits.shape else None])
    return ir.to_proto(model).SerializeToString()


def _last_token(logits: ir.Value) -> dict[ir.Node, ir.Value] | None:
    """Return the nodes above `logits` that take the last token of `[B, T, D]`, and the `[B * T, D]` that each reads."""
    found: dict[ir.Node, ir.Value] = {}
    waiting, seen = [logits], set()
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type != "Gather":
            waiting += [value for value in node.inputs if value is not None]
            continue
        rows, index = node.inputs
        assert rows is not None and index is not None
        axis, reshape, last = node.attributes.get("axis"), rows.producer(), ir.convenience.get_const_tensor(index)
        if axis is None or axis.as_int() != 1 or last is None or last.numpy().tolist() != -1:
            return None
        if reshape is None or reshape.op_type != "Reshape" or reshape.inputs[0] is None:
            return None
        found[node] = reshape.inputs[0]
    return found
