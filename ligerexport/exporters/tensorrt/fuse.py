"""The pass that turns a graph of standard operators into a graph of the TensorRT plugin's nodes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import onnx_ir as ir

from ligerexport.exporters.onnx.builder import Builder
from ligerexport.exporters.onnx.spec import ACTIVATIONS
from ligerexport.exporters.tensorrt.node import MIXER, plugin_linear
from ligerexport.kernels.linear import LinearSpec


def fuse_for_plugin(model: ir.Model, activation: ir.DataType) -> None:
    """Replace each product with a weight, and the nodes around it, by a node of the plugin.

    A product takes over the norm of its input, and the gated unit or the sum that follows it. A small fp32 product of
    the same input as a layer's query, key and value becomes a second output of their node. Inputs and outputs of
    products with weights of 16 or 8 bits are cast to the type of activations; everything else is fp32.

    Args:
        model: Graph that `build_graph` wrote with the lowering `plugin`; changed in place. The nodes
            that were taken over stay in it, unused.
        activation: Type of inputs and outputs of products with weights of 16 or 8 bits.
    """
    fuse = _Fuser(model.graph, activation)
    rules = {"Gemm": fuse.product, "Add": fuse.residual, "GatedUnit": fuse.gated_unit, MIXER: fuse.mixer}
    for node in list(model.graph):
        if rule := rules.get(node.op_type):
            rule(node)


class _Product(NamedTuple):
    """A node of the plugin: its specification, and its inputs by name, in order."""

    spec: LinearSpec
    inputs: dict[str, ir.Value]


class _Fuser:
    """Rewrites one node at a time, in the order of the graph, so that the inputs of the current node are final."""

    def __init__(self, graph: ir.Graph, activation: ir.DataType) -> None:
        self._graph, self._activation, self._g = graph, activation, Builder()
        self._head = [node for node in graph if node.op_type == "Gemm"][-1]
        self._products: dict[ir.Value, _Product] = {}
        self._narrowed: dict[ir.Value, ir.Value] = {}

    def product(self, node: ir.Node) -> None:
        """Write `x @ weight^T + bias`, with the norm that x comes from."""
        x, weight, *rest = _inputs(node)
        scale: list[ir.Value] = []
        if (source := weight.producer()) is not None:  # a Cast, or a DequantizeLinear of codes
            weight, *scale = _inputs(source)
        assert weight.shape is not None
        (n, k), halves = weight.shape.numpy(), weight.dtype != ir.DataType.FLOAT
        given, epsilon = {"input": self._narrow(x, node) if halves else x, "weight": weight}, None
        given |= zip(["scale"], scale, strict=False)
        if norm := _find_norm(x):
            given["input"], given["norm"], epsilon = norm
        given |= zip(["bias"], rest, strict=False)
        wide = node is self._head or not halves
        spec = LinearSpec(n, 4 * k if scale else k, epsilon, bias=bool(rest), wide=wide, coded=bool(scale))
        self._replace(node, _Product(spec, given))

    def residual(self, node: ir.Node) -> None:
        """Move an addition into the product before it."""
        x, residual = _inputs(node)
        if found := self._products.get(x):
            spec = replace(found.spec, residual=True, wide=True)
            self._replace(node, _Product(spec, found.inputs | {"residual": residual}))

    def gated_unit(self, node: ir.Node) -> None:
        """Move a gated unit into the product that computes both its halves."""
        found, kind = self._products[_inputs(node)[0]], node.attributes["activation"].as_int()
        spec = replace(found.spec, outputs=found.spec.outputs // 2, activation=list(ACTIVATIONS.values())[kind])
        self._replace(node, found._replace(spec=spec))

    def mixer(self, node: ir.Node) -> None:
        """Convert a mixer's query, key and value to their type, and compute its score in their product if possible."""
        projected = 1 if node.attributes["joint"].as_int() else 3
        score = projected + 2 if node.attributes["foresees"].as_int() else None
        if projected == 1 and score is not None:
            self._merge(node, score)
        for i, x in enumerate(_inputs(node)[:projected]):
            node.replace_input_with(i, self._narrow(x, node))
        mixed = node.outputs[0]
        uses = list(mixed.uses())
        wide = self._widen(mixed, node, after=True)
        for user, i in uses:
            user.replace_input_with(i, wide)

    def _merge(self, node: ir.Node, score: int) -> None:
        """Compute the score of a mixer in the node of its joint projection, if both have one input."""
        joint, side = (self._products.get(_inputs(node)[i]) for i in (0, score))
        if joint is None or side is None:
            return
        spec = replace(joint.spec, side=side.spec.outputs)
        alike = all(joint.inputs.get(name) is side.inputs.get(name) for name in ("input", "norm"))
        if alike and side.spec == spec.of_side():
            given = [*joint.inputs.values(), side.inputs["weight"], side.inputs["bias"]]
            made, beside = self._emit(node, spec, given)
            node.replace_input_with(0, made)
            node.replace_input_with(score, beside)

    def _replace(self, node: ir.Node, product: _Product) -> None:
        """Replace a node by a product; the node stays in the graph unused."""
        (old,) = node.outputs
        (new,) = self._emit(node, product.spec, list(product.inputs.values()))
        if old.name != node.name:  # it was given a name
            new.name, new.type, new.shape = old.name, old.type, old.shape
        if old.is_graph_output():
            outputs = self._graph.outputs
            outputs[outputs.index(old)] = new
        old.replace_all_uses_with(new)
        self._products[new] = product

    def _emit(self, before: ir.Node, spec: LinearSpec, given: list[ir.Value]) -> tuple[ir.Value, ...]:
        """Write a product before a node; return its result in fp32, and that of its side product."""
        made = self._write(before, lambda: plugin_linear(self._g, spec, given))
        result, *side = made if spec.side else (made,)
        return result if spec.wide else self._widen(result, before), *side

    def _narrow(self, x: ir.Value, before: ir.Node) -> ir.Value:
        """Return an fp32 value in the type of activations."""
        if self._activation == ir.DataType.FLOAT:
            return x
        return self._narrowed.get(x) or self._write(before, lambda: self._g.op("Cast", x, to=self._activation))

    def _widen(self, x: ir.Value, node: ir.Node, *, after: bool = False) -> ir.Value:
        """Return activations in fp32, so that `_narrow` gives x again."""
        if self._activation == ir.DataType.FLOAT:
            return x
        wide: ir.Value = self._write(node, lambda: self._g.op("Cast", x, to=ir.DataType.FLOAT), after=after)
        self._narrowed[wide] = x
        return wide

    def _write(self, node: ir.Node, make: Callable[[], Any], *, after: bool = False) -> Any:
        """Put the nodes that `make` makes before or after a node, named as if they were written there."""
        scope = (node.name or "").rpartition("/")[0]
        with self._g.scope(scope) if scope else nullcontext():
            made = make()
        insert = self._graph.insert_after if after else self._graph.insert_before
        insert(node, self._g.nodes)
        self._g.nodes = []
        return made


def _find_norm(x: ir.Value) -> tuple[ir.Value, ir.Value, float] | None:
    """Return the input of the norm, its weight and its epsilon, if `Plugin.rms_norm` wrote x."""
    ratio, weight = _made_by(x, "Mul")
    source, root = _made_by(ratio, "Div")
    total, _ = _made_by(root, "Sqrt")
    _, epsilon = _made_by(total, "Add")
    if source is None or weight is None or epsilon is None or epsilon.const_value is None:
        return None
    return source, weight, float(epsilon.const_value.numpy())


def _made_by(x: ir.Value | None, kind: str) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the first two inputs of the node that x comes from, if it is of this kind."""
    node = None if x is None else x.producer()
    if node is None or node.op_type != kind:
        return None, None
    first, second, *_ = *node.inputs, None
    return first, second


def _inputs(node: ir.Node) -> list[ir.Value]:
    """Return the inputs of a node that are given."""
    return [x for x in node.inputs if x is not None]
