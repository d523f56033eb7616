"""The values that all layers of a graph share in one call."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ligerexport.exporters.onnx.builder import Builder


class Frame:
    """Sizes, positions and padding of one call, each computed at most once.

    Args:
        input_ids: `[B, T]`.
        position: `[B]`, number of tokens seen.
    """

    def __init__(self, g: Builder, input_ids: ir.Value, position: ir.Value) -> None:
        self.g, self.input_ids, self.position = g, input_ids, position

    @property
    def length(self) -> ir.Value:
        """T, `[1]`."""
        return self.g.once("T", lambda: self.g.op("Shape", self.input_ids, start=1, end=2))

    @property
    def batch(self) -> ir.Value:
        """B, `[1]`."""
        return self.g.once("B", lambda: self.g.op("Shape", self.input_ids, start=0, end=1))

    @property
    def batch_length(self) -> ir.Value:
        """B and T, `[2]`."""
        return self.g.once("B and T", lambda: self.g.op("Shape", self.input_ids))

    def per_token(self, x: ir.Value, *shape: int) -> ir.Value:
        """Reshape `[B * T, ...]` to `[B, T, *shape]`."""
        g = self.g
        target = g.once(("per_token", shape), lambda: g.concat(self.batch_length, g.const(shape), axis=0))
        return g.op("Reshape", x, target)

    def steps(self) -> ir.Value:
        """Return 0 to T - 1, `[T]` int64."""
        g = self.g
        return g.once("steps", lambda: g.op("Range", g.const(0), g.op("Squeeze", self.length), g.const(1)))

    def now(self) -> ir.Value:
        """Return the position of each token `[B, T]` int64."""
        g = self.g
        return g.once("now", lambda: g.op("Add", g.op("Unsqueeze", self.position, g.const([1])), self.steps()))

    def row(self, offset: int) -> ir.Value:
        """Return, for each query, its row plus `offset` in the table of keys, `[T, 1]` fp32."""
        g = self.g

        def make() -> ir.Value:
            t = g.op("Cast", g.op("Add", self.steps(), g.const(offset)), to=ir.DataType.FLOAT)
            return g.op("Unsqueeze", t, g.const([1]))

        return g.once(("row", offset), make)

    def real(self, scale: float = 1.0) -> ir.Value:
        """Return `scale` for tokens and 0 for padding, `[B, T, 1]` fp32."""
        g = self.g

        def make() -> ir.Value:
            values = g.op("Where", g.op("Less", self.now(), g.const(0)), g.floats(0), g.floats(scale))
            return g.op("Unsqueeze", values, g.const([2]))

        return g.once(("real", scale), make)

    def filled(self, value: float, *shape: int) -> ir.Value:
        """Return `[B, *shape]` fp32, all elements `value`; in `shape`, 0 stands for T and -1 for T + 1."""
        g = self.g

        def make() -> ir.Value:
            sizes = {0: self.length, -1: g.op("Add", self.length, g.const([1]))}
            parts = [sizes[size] if size in sizes else g.const([size]) for size in shape]
            return g.op(
                "ConstantOfShape", g.concat(self.batch, *parts, axis=0), value=ir.tensor(np.array([value], np.float32))
            )

        return g.once(("filled", value, shape), make)

    def candidates(self, slots: int) -> ir.Value:
        """Return C, `[1]`."""
        g = self.g
        return g.once(("C", slots), lambda: g.op("Add", self.length, g.const([slots])))

    def row_base(self, heads: int, slots: int) -> ir.Value:
        """Return the index of each head's first candidate when all are in one list, `[B, H, 1]` int64."""
        g = self.g

        def make() -> ir.Value:
            index = g.op("Range", g.const(0), g.op("Squeeze", g.op("Mul", self.batch, g.const([heads]))), g.const(1))
            return g.reshape(g.op("Mul", index, self.candidates(slots)), -1, heads, 1)

        return g.once(("row_base", heads, slots), make)

    def columns(self, slots: int) -> tuple[ir.Value, ir.Value]:
        """Return 0 to C - 1, and C to 2 C - 1, `[C]` fp32."""
        g = self.g

        def make() -> tuple[ir.Value, ir.Value]:
            index = g.op("Range", g.const(0), g.op("Squeeze", self.candidates(slots)), g.const(1))
            later = g.op("Add", index, self.candidates(slots))
            return tuple(g.op("Cast", x, to=ir.DataType.FLOAT) for x in (index, later))  # type: ignore[return-value]

        return g.once(("columns", slots), make)
