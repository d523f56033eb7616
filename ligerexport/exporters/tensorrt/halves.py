"""The pass that lets products of a portable graph run in fp16 or bf16 if their weights have that type."""

from __future__ import annotations

import onnx_ir as ir

from ligerexport.exporters.onnx.builder import Builder


def halve_products(graph: ir.Graph) -> None:
    """Replace each fp32 product with a weight that is cast from fp16 or bf16 by one in that type.

    The input is cast down and the result is cast up; biases are added in fp32.

    Args:
        graph: Graph of the lowering `portable`; changed in place.
    """
    narrowed: dict[ir.Value | None, ir.Value] = {}
    for node in list(graph):
        cast = node.inputs[1].producer() if node.op_type == "Gemm" and node.inputs[1] is not None else None
        weight = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
        if weight is None or weight.dtype is None:
            continue
        g, x = Builder(prefix=f"{node.name}/half/"), node.inputs[0]
        if x not in narrowed:
            narrowed[x] = g.op("Cast", x, to=weight.dtype)
        product = g.op("Gemm", narrowed[x], weight, transB=1)
        wide = g.op("Cast", product, to=ir.DataType.FLOAT)
        for bias in node.inputs[2:]:
            wide = g.op("Add", wide, bias)
        (old,) = node.outputs
        wide.name, wide.type, wide.shape, old.name = old.name, old.type, old.shape, None
        if old.is_graph_output():
            graph.outputs[graph.outputs.index(old)] = wide
        old.replace_all_uses_with(wide)
        graph.insert_before(node, g.nodes)
        graph.remove(node)
