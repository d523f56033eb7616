"""A thin layer over onnx_ir that makes writing a graph read like arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"

Axis = int | str


class Builder:
    """Collects the nodes and initializers of one graph, or of the body of a function.

    Args:
        function: Whether this is the body of a function, which holds its constants as nodes.
        prefix: Text before every name, for nodes that go into an existing graph.
    """

    def __init__(self, *, function: bool = False, prefix: str = "") -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._function = function
        self._prefix = prefix
        self._scope = ""
        self._memo: dict[Any, Any] = {}
        self._names: dict[str, int] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put a prefix before the names of all nodes and values that are made in the block."""
        outer, self._scope = self._scope, f"{self._scope}{name}/"
        yield
        self._scope = outer

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the result of `make`, which is called only once for each key, so that layers share its result."""
        if key not in self._memo:
            outer, self._scope = self._scope, "shared/"
            self._memo[key] = make()
            self._scope = outer
        return self._memo[key]

    def op(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; return its output, or a tuple when `outputs` is more than 1."""
        name = self._name(kind)
        values = [ir.Value(name=name if outputs == 1 else f"{name}.{i}") for i in range(outputs)]
        made = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]
        self.nodes.append(ir.Node(domain, kind, inputs, made, outputs=values, name=name))
        return values[0] if outputs == 1 else tuple(values)

    def const(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """Return a constant; equal constants are added to the graph only once."""
        array = np.asarray(value, dtype)
        return self.once((array.dtype.str, array.shape, array.tobytes()), lambda: self._const(array))

    def floats(self, value: Any) -> ir.Value:
        """Return an fp32 constant."""
        return self.const(value, np.float32)

    def table(self, name: str, array: np.ndarray) -> ir.Value:
        """Return a named constant."""
        return self.once(("table", name), lambda: self.initializer(ir.tensor(array, name=name)))

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Add an initializer under the tensor's own name."""
        assert tensor.name is not None
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.initializers[tensor.name] = value
        return value

    def reshape(self, x: ir.Value, *shape: int | ir.Value) -> ir.Value:
        """Reshape to sizes, which may be values `[1]`; 0 keeps an axis and -1 stands for the rest."""
        if all(isinstance(size, int) for size in shape):
            return self.op("Reshape", x, self.const(shape))
        sizes = [self.const([size]) if isinstance(size, int) else size for size in shape]
        return self.op("Reshape", x, self.concat(*sizes, axis=0))

    def transpose(self, x: ir.Value, *perm: int) -> ir.Value:
        """Permute axes."""
        return self.op("Transpose", x, perm=list(perm))

    def concat(self, *parts: ir.Value, axis: int) -> ir.Value:
        """Concatenate."""
        return self.op("Concat", *parts, axis=axis)

    def slice(self, x: ir.Value, start: int, stop: int, axis: int) -> ir.Value:
        """Take a range of one axis."""
        return self.op("Slice", x, self.const([start]), self.const([stop]), self.const([axis]))

    def split(self, x: ir.Value, widths: list[int]) -> list[ir.Value]:
        """Split the last axis into parts of these widths."""
        return list(self.op("Split", x, self.const(widths), outputs=len(widths), axis=-1))

    def whole(self, *parts: ir.Value) -> ir.Value | None:
        """Return the value that was split into exactly these parts, if there is one."""
        node = parts[0].producer()
        return node.inputs[0] if node is not None and node.op_type == "Split" and node.outputs == parts else None

    def output(self, value: ir.Value, name: str, dtype: str, shape: tuple[Axis, ...]) -> ir.Value:
        """Name a value as an output of the graph."""
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType[dtype]), ir.Shape(shape)
        return value

    def _name(self, kind: str) -> str:
        stem = self._prefix + self._scope + kind
        count = self._names[stem] = self._names.get(stem, -1) + 1
        return f"{stem}_{count}" if count else stem

    def _const(self, array: np.ndarray) -> ir.Value:
        if self._function:
            return self.op("Constant", value=ir.tensor(array))
        return self.initializer(ir.tensor(array, name=self._name("const")))


def graph_input(name: str, dtype: str, shape: tuple[Axis, ...]) -> ir.Value:
    """Return an input of a graph."""
    return ir.Value(name=name, type=ir.TensorType(ir.DataType[dtype]), shape=ir.Shape(shape))
