"""Write an artifact whose mixers are TensorRT's own operators: what the plugin's mixer is compared with.

    python benchmarks/trt.py shape llama-3-8b --layers 2 --max-chunk 128 --checkpoint CHECKPOINT -o PLUGIN
    python benchmarks/trt_primitives.py CHECKPOINT -o PRIMITIVES
    liger-run PLUGIN --ids 1,2,3 --bench 200 --profile 50; the same with PRIMITIVES

Products are the plugin's nodes in both, so that profiles differ by the mixers alone. For times only: state goes in and
comes out at one address, which the plugin's kernels are made for and TensorRT's operators are not.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import onnx_ir as ir
import torch

import ligerexport as lx
from ligerexport.exporters.onnx import graph as onnx_graph
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.lowerings import Plugin
from ligerexport.exporters.onnx.mixer import candidates, mixer, rotary_tables
from ligerexport.state import MixerSpec

CHUNK = 128
INT32, INT64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64


def primitive_mixer(
    lower: Plugin,
    frame: Frame,
    spec: MixerSpec,
    inv_freq: tuple[float, ...],
    projected: tuple[ir.Value, ir.Value, ir.Value],
    past: dict[str, ir.Value],
    score: ir.Value | None,
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Write one mixer as the lowering `portable` does; arguments and results of `plugin_mixer`."""
    turns = torch.tensor(inv_freq)
    tables: Any = lower.g.once(("tables", inv_freq), lambda: rotary_tables(lower, turns, spec, CHUNK))
    (seen,) = candidates(frame, spec, tables.rows, [past["slot_position"]])
    return mixer(lower, frame, spec, tables, projected, past, seen, score)


def narrow(model: onnx.ModelProto) -> None:
    """Rewrite what TensorRT 8.5 does not parse: integers of 64 bits, and attributes of later opsets."""
    for x in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if x.type.tensor_type.elem_type == INT64:
            x.type.tensor_type.elem_type = INT32
    for node in model.graph.node:
        kept = [x for x in node.attribute if x.name != "num_outputs"]
        for x in kept:
            if node.op_type == "Cast" and x.name == "to" and x.i == INT64:
                x.i = INT32
        del node.attribute[:]
        node.attribute.extend(kept)


def main() -> None:
    """Build, rewrite the graph, and say its new hash in the manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    with patch.object(onnx_graph, "plugin_mixer", primitive_mixer), patch.object(Plugin, "integer", "int64"):
        lx.build(args.checkpoint, args.output, target="trt", engine=False, sms=(90,), max_batch=1, max_chunk=CHUNK,
                 verify=False)  # fmt: skip
    graph, manifest = args.output / "model.onnx", args.output / "manifest.json"
    before = hashlib.sha256(graph.read_bytes()).hexdigest()
    model = onnx.load(graph, load_external_data=False)
    narrow(model)
    graph.write_bytes(model.SerializeToString())
    after = hashlib.sha256(graph.read_bytes()).hexdigest()
    manifest.write_text(manifest.read_text().replace(before, after))


if __name__ == "__main__":
    main()
