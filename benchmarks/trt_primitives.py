"""Write an artifact whose mixers are TensorRT's own operators, to compare with the plugin's mixer.

    python benchmarks/trt.py shape llama-3-8b --layers 2 --max-chunk 128 --checkpoint CHECKPOINT -o PLUGIN
    python benchmarks/trt_primitives.py CHECKPOINT -o PRIMITIVES
    liger-run PLUGIN --ids 1,2,3 --bench 200 --profile 50; the same with PRIMITIVES

Products are the plugin's nodes in both, so that profiles differ by the mixers alone. It is for timing only: state is
read and written at one address, which the plugin's kernels support and TensorRT's operators do not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper, numpy_helper

import ligerexport as lx
from ligerexport.exporters.onnx import graph as onnx_graph
from ligerexport.exporters.onnx.candidates import candidates
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.mixer import mixer, rotary_tables
from ligerexport.exporters.tensorrt.lowering import Plugin
from ligerexport.model.state import MixerSpec
from ligerexport.reading import sha256

CHUNK = 128
INT32, INT64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64


def primitive_mixer(
    frame: Frame,
    spec: MixerSpec,
    inv_freq: tuple[float, ...],
    projected: tuple[ir.Value, ir.Value, ir.Value],
    past: dict[str, ir.Value],
    score: ir.Value | None,
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Write one mixer as the lowering `portable` does; arguments and results are those of `plugin_mixer`."""
    lower, turns = Plugin(frame.g), torch.tensor(inv_freq)
    tables: Any = lower.g.once(("tables", inv_freq), lambda: rotary_tables(lower, turns, spec, CHUNK))
    (seen,) = candidates(frame, spec, tables.rows, [past["slot_position"]])
    halves = {name: x.dtype for name, x in past.items() if x.dtype == ir.DataType.FLOAT16}
    wide = past | {name: lower.g.op("Cast", past[name], to=ir.DataType.FLOAT) for name in halves}
    mixed, present = mixer(lower, frame, spec, tables, projected, wide, [seen], score)
    return mixed, present | {name: lower.g.op("Cast", present[name], to=dtype) for name, dtype in halves.items()}


def narrow(graph: onnx.GraphProto) -> None:
    """Rewrite what TensorRT 8.5 cannot parse: 64-bit integers, parts of shapes, scattered flags."""
    for x in (*graph.input, *graph.output, *graph.value_info):
        if x.type.tensor_type.elem_type == INT64:
            x.type.tensor_type.elem_type = INT32
    nodes = [part for node in graph.node for part in narrowed(node, graph)]
    del graph.node[:]
    graph.node.extend(nodes)


def narrowed(node: onnx.NodeProto, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes that replace a node; constants that they need are added to the graph."""
    attributes = {x.name: helper.get_attribute_value(x) for x in node.attribute}
    out, name = node.output[0], node.name
    if node.op_type == "Shape" and attributes:
        parts = {key: np.array([attributes.get(key, 0)]) for key in ("start", "end")}
        bounds = [numpy_helper.from_array(part, f"{out}.{key}") for key, part in parts.items()]
        graph.initializer.extend(bounds)
        return [
            helper.make_node("Shape", [node.input[0]], [f"{out}.whole"], f"{name}.whole"),
            helper.make_node("Slice", [f"{out}.whole", *(x.name for x in bounds)], [out], name),
        ]
    if node.op_type == "ScatterElements":  # all of them scatter flags
        data, indices, updates = node.input
        data32, updates32, out32 = (f"{out}.{part}" for part in ("data", "updates", "int32"))
        return [
            helper.make_node("Cast", [data], [data32], data32, to=INT32),
            helper.make_node("Cast", [updates], [updates32], updates32, to=INT32),
            helper.make_node("ScatterElements", [data32, indices, updates32], [out32], name, **attributes),
            helper.make_node("Cast", [out32], [out], out, to=onnx.TensorProto.BOOL),
        ]
    if node.op_type == "Cast" and attributes["to"] == INT64:
        node.attribute[0].i = INT32
    if node.op_type == "Split" and "num_outputs" in attributes:  # an attribute of a later opset
        return [helper.make_node("Split", node.input, node.output, name, axis=attributes["axis"])]
    return [node]


def main() -> None:
    """Build, rewrite the graph, and write its new size and hash into the manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    with patch.object(onnx_graph, "plugin_mixer", primitive_mixer), patch.object(Plugin, "integer", "int64"):
        lx.build(args.checkpoint, args.output, target="trt", engine=False, sms=(90,), max_batch=1, max_chunk=CHUNK,
                 verify=False)  # fmt: skip
    graph, manifest = args.output / "model.onnx", args.output / "manifest.json"
    model = onnx.load(graph, load_external_data=False)
    narrow(model.graph)
    graph.write_bytes(model.SerializeToString())
    said = json.loads(manifest.read_text())
    said["files"][graph.name] |= {"bytes": graph.stat().st_size, "sha256": sha256(graph)}
    manifest.write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
