"""Which nodes of a graph an execution provider runs, by its own operator list; the others run on the CPU.

The lists in `providers.json` are taken from ONNX Runtime's documentation and kernel registrations at one commit (1.24),
for the operators of our graphs. They give first opset, last opset, and the types of the first inputs.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ligerexport.exporters.onnx.builder import OPSET

BOOL = {"And", "Not", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
TYPED_BY = {"Where": 1, "DequantizeLinear": 1, "GatherBlockQuantized": 2}
"""Index of the input that gives an output its type, where it is not the first."""


@dataclass(frozen=True)
class Placement:
    """Which nodes of a graph a provider runs.

    Attributes:
        taken: Number of nodes that it runs.
        fallback: Number of nodes that run on the CPU, by operator and reason.
        partitions: Number of runs of taken nodes with no other node between them, in the graph's order: an estimate.
    """

    taken: int
    fallback: dict[str, int]
    partitions: int


@cache
def operators() -> dict[str, dict[str, Any]]:
    """Return the lists: `source`, `commit` and `ops` of each provider."""
    return json.loads(Path(__file__).with_name("providers.json").read_text(encoding="utf-8"))


def place(graph: ir.Graph, provider: str) -> Placement:
    """Return which nodes of a graph a provider takes."""
    ops, types = operators()[provider]["ops"], _types(graph)
    reasons = [_reason(node, ops, types) for node in graph]
    starts = sum(here is None and before is not None for before, here in zip(["", *reasons], reasons, strict=False))
    left = Counter(reason for reason in reasons if reason is not None)
    return Placement(reasons.count(None), dict(left.most_common()), starts)


def _reason(node: ir.Node, ops: dict[str, Any], types: dict[ir.Value, str]) -> str | None:
    """Return why a node is not taken, or None."""
    kind = node.op_type
    if kind not in ops:
        return f"{kind}: no kernel"
    since, until, inputs = ops[kind]
    if not node.domain and not since <= OPSET <= (until or OPSET):
        return f"{kind}: opset {OPSET}"
    for value, allowed in zip(node.inputs, inputs, strict=False):
        if value is not None and types[value] not in allowed.split():
            return f"{kind}: {types[value]}"
    return None


def _types(graph: ir.Graph) -> dict[ir.Value, str]:
    """Return the type of every value, spelled as in the lists."""

    def name(dtype: int) -> str:
        return ir.DataType(dtype).name.lower()

    types = {value: name(value.dtype) for value in (*graph.inputs, *graph.initializers.values()) if value.dtype}
    for node in graph:
        kind, attributes = node.op_type, node.attributes
        if kind in BOOL:
            found = "bool"
        elif kind == "Shape":
            found = "int64"
        elif kind == "Cast":
            found = name(attributes["to"].as_int())
        elif kind == "ConstantOfShape":
            found = name(attributes["value"].as_tensor().dtype)
        else:
            found = types[node.inputs[TYPED_BY.get(kind, 0)]]  # type: ignore[index]
        types |= dict.fromkeys(node.outputs, found)
        if kind == "TopK":
            types[node.outputs[1]] = "int64"
    return types
