"""A variant of an artifact's step graph, made in memory, that rounds no activations, also not those in its state."""

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
