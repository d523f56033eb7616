"""Slots of all KV heads on one axis, head after head: see `RAGGED` of `ligerexport.model.state`.

Heads of equal sizes form a group. Keys and values are rounded when they arrive, before anything reads them, and the
slots that remain are gathered as codes, so no code is computed twice. Comments name axes: S slots of all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ligerexport.exporters.onnx.builder import Builder
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.lowerings import Portable
from ligerexport.model.state import MOST, MixerSpec

HALF = np.finfo(np.float16)


class Codes(NamedTuple):
    """Vectors in the type of the state: `codes` `[..., d]`, which `scale` `[...]` fp16 multiplies if there is one."""

    codes: ir.Value
    scale: ir.Value | None


def store(g: Builder, x: ir.Value, dtype: str) -> Codes:
    """Round fp32 vectors as `ligerexport.kernels.ragged.store` does."""
    most = g.floats(float(HALF.max))
    if dtype == "activation":
        return Codes(x, None)
    if dtype == "float16":
        x = g.op("Clip", x, g.floats(-float(HALF.max)), most)
        return Codes(g.op("Cast", x, to=ir.DataType.FLOAT16), None)
    largest = g.op("ReduceMax", g.op("Abs", x), g.const([-1]))
    scale = g.op("Clip", g.op("Div", largest, g.floats(MOST)), g.floats(float(HALF.tiny)), most)
    scale = g.op("Cast", scale, to=ir.DataType.FLOAT16)
    codes = g.op("Round", g.op("Div", x, g.op("Cast", scale, to=ir.DataType.FLOAT)))
    codes = g.op("Cast", g.op("Clip", codes, g.floats(-MOST), g.floats(MOST)), to=ir.DataType.INT8)
    return Codes(codes, g.op("Squeeze", scale, g.const([-1])))


def read(g: Builder, stored: Codes, dtype: str) -> ir.Value:
    """Return stored vectors in fp32."""
    if dtype == "activation":
        return stored.codes
    codes = g.op("Cast", stored.codes, to=ir.DataType.FLOAT)
    if stored.scale is None:
        return codes
    scale = g.op("Cast", stored.scale, to=ir.DataType.FLOAT)
    return g.op("Mul", codes, g.op("Unsqueeze", scale, g.const([-1])))


class Heads:
    """Takes tensors of a layer apart by groups of KV heads, and joins those of groups.

    Args:
        lower: Lowering of the graph.
        spec: The layer.
    """

    def __init__(self, lower: Portable, spec: MixerSpec) -> None:
        self._g, self._most, self.spec = lower.g, lower.max_tensors, spec
        self._groups = [heads for heads, _ in spec.groups]

    def split(self, x: ir.Value, axis: int, widths: Sequence[int] | int = 1) -> list[ir.Value]:
        """Return the part of each group that has one.

        Args:
            x: Tensor with the parts of all heads on an axis, head after head.
            axis: The axis.
            widths: Number of elements of each head, or of every head.
        """
        widths = self._widths(widths)
        sizes = [size for heads in self._groups if (size := sum(widths[h] for h in heads))]
        return self._split(self._pick(x, self._order(widths), axis), axis, sizes)

    def join(self, parts: Sequence[ir.Value], axis: int, widths: Sequence[int] | int = 1) -> ir.Value:
        """Undo `split`."""
        whole, order = concat(self._g, self._most, parts, axis), self._order(self._widths(widths))
        return self._pick(whole, np.argsort(order), axis)

    def positions(self, past: ir.Value) -> list[ir.Value]:
        """Return the positions of each group's slots, `[B, H, N]` int64, from `slot_position` of the state."""
        g, spec = self._g, self.spec
        if not spec.config.ragged:
            return [past]
        parts = self.split(g.op("Cast", past, to=ir.DataType.INT64), 1, spec.slots_per_head)
        return [g.reshape(x, 0, len(group), -1) for x, group in zip(parts, self._groups, strict=True)]

    def _widths(self, widths: Sequence[int] | int) -> Sequence[int]:
        return [widths] * self.spec.kv_heads if isinstance(widths, int) else widths

    def _order(self, widths: Sequence[int]) -> np.ndarray:
        return np.concatenate([places(widths, heads).ravel() for heads in self._groups])

    def _pick(self, x: ir.Value, order: np.ndarray, axis: int) -> ir.Value:
        in_order = np.array_equal(order, np.arange(len(order)))
        return x if in_order else self._g.op("Gather", x, self._g.const(order), axis=axis)

    def _split(self, x: ir.Value, axis: int, sizes: list[int]) -> list[ir.Value]:
        g, most = self._g, len(sizes) if self._most is None else self._most - 2
        if len(sizes) == 1:
            return [x]
        if len(sizes) > most:
            first, rest = self._split(x, axis, [sum(sizes[:most]), sum(sizes[most:])])
            return [*self._split(first, axis, sizes[:most]), *self._split(rest, axis, sizes[most:])]
        return list(g.op("Split", x, g.const(sizes), outputs=len(sizes), axis=axis))


def concat(g: Builder, most: int | None, parts: Sequence[ir.Value], axis: int) -> ir.Value:
    """Concatenate any number of tensors by nodes of at most `most` inputs and outputs."""
    count = len(parts) if most is None else most - 1
    if len(parts) == 1:
        return parts[0]
    if len(parts) > count:
        return concat(g, most, [concat(g, most, parts[:count], axis), *parts[count:]], axis)
    return g.concat(*parts, axis=axis)


def places(widths: Sequence[int], heads: Sequence[int]) -> np.ndarray:
    """Return the places of some heads of equal widths on an axis that all heads share, `[heads, width]`."""
    starts = [0, *accumulate(widths)]
    return np.array([range(starts[h], starts[h + 1]) for h in heads], np.int64)


class Pool:
    """The slots of a layer and its new tokens on one axis: S slots, then T times all heads.

    Args:
        frame: The call.
        heads: The layer.
        past: State by the names of `MixerSpec.state`.
        new: Key and value of the new tokens, codes `[B, T, H, d]`.
    """

    def __init__(self, frame: Frame, heads: Heads, past: dict[str, ir.Value], new: dict[str, Codes]) -> None:
        self._g, self._frame, self._heads, self._spec = frame.g, frame, heads, heads.spec
        self._slots = heads.spec.slots_per_head
        self._width = {"slot_key": [heads.spec.d_k], "slot_value": [heads.spec.d_v]}
        self._parts = {}
        for name, x in new.items():
            codes = self._g.reshape(x.codes, 0, -1, *self._width[name])
            self._parts[name] = self._g.concat(past[name], codes, axis=1)
            if x.scale is not None:
                scale = self._g.reshape(x.scale, 0, -1)
                self._parts[f"{name}_scale"] = self._g.concat(past[f"{name}_scale"], scale, axis=1)
        kind, parts = heads.spec.config.state_dtype, self._parts
        self._vectors = {name: read(frame.g, Codes(parts[name], parts.get(f"{name}_scale")), kind) for name in new}

    def read(self, name: str, group: tuple[int, ...]) -> ir.Value:
        """Return the candidates of a group, `[B, H, C, d]` fp32."""
        return self._g.op("Gather", self._vectors[name], self._index(group), axis=1)

    def place(self, group: tuple[int, ...], chosen: ir.Value) -> ir.Value:
        """Return the places of chosen candidates `[B, H, N]` of a group on the axis."""
        g, index = self._g, self._index(group)
        each = g.once("each sequence", lambda: g.concat(self._frame.batch, g.const([1, 1]), axis=0))
        return g.op("GatherElements", g.op("Expand", index, each), chosen, axis=2)

    def keep(self, chosen: list[ir.Value]) -> dict[str, ir.Value]:
        """Return codes and scales of the slots that remain, from their places by group."""
        g, spec, frame, total = self._g, self._spec, self._frame, sum(self._slots)

        def base() -> ir.Value:
            size = g.op("Add", g.op("Mul", frame.length, g.const([spec.kv_heads])), g.const([total]))
            rows = g.op("Range", g.const(0), g.op("Squeeze", frame.batch), g.const(1))
            return g.op("Mul", g.op("Unsqueeze", rows, g.const([1])), size)

        row = self._heads.join([g.reshape(x, 0, -1) for x in chosen], 1, self._slots)
        row = g.op("Add", row, g.once(("pool", total, spec.kv_heads), base))
        rows = {name: g.reshape(x, -1, *self._width.get(name, ())) for name, x in self._parts.items()}
        return {name: g.op("Gather", x, row) for name, x in rows.items()}

    def _index(self, group: tuple[int, ...]) -> ir.Value:
        """Return the places of a group's candidates, `[H, C]` int64."""
        g, count, first = self._g, self._spec.kv_heads, sum(self._slots)

        def make() -> ir.Value:
            new = g.once(("arrivals", count), lambda: g.op("Mul", self._frame.steps(), g.const(count)))
            new = g.op("Add", new, g.const([[first + h] for h in group]))
            return g.concat(g.const(places(self._slots, group)), new, axis=1)

        return g.once(("places", self._slots, group), make)
