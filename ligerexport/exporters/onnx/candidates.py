"""The candidates of a memory's slots as graph nodes, and what follows from their positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ligerexport.exporters.onnx.builder import Builder
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.kernels.memory_attention import MASKED
from ligerexport.model.state import MixerSpec

NEVER = 1e30  # larger than the position of any query


@dataclass(frozen=True)
class Candidates:
    """The candidates of one layer and what follows from their positions: C = N slots, oldest first, then T new tokens.

    Attributes:
        position: `[B, H, 1, C]` int64, -1 for an empty slot.
        row: Row of each candidate in the table of keys, `[B * H, C]` int64.
        always: Whether a query sees a candidate in its window or as a sink, `[B, H, 1, T, C]`.
        local: fp32 0 where `always`, otherwise `MASKED`.
        rank: fp32 to add to a rank before the best are taken: 0 for a token that left the window and is no sink, minus
            infinity where `always`, otherwise `MASKED`.
        within: Whether the distance is at most the largest rotary distance, `[B, H, 1, T, C]`.
        carried: Whether a slot held a candidate before the chunk, `[B, H, 1, 1, C]`; None without eviction.
        counts: Per pool that ranks by attention received: 1 where attention counts, otherwise 0; None for other pools.
        ages: Per pool that ages: position divided by horizon, `[B, H, 1, C]` fp32, counted from before the chunk,
            because the positions of a long text would round; None for other pools.
    """

    position: ir.Value
    row: ir.Value
    always: ir.Value
    local: ir.Value | None
    rank: ir.Value | None
    within: ir.Value
    carried: ir.Value | None
    counts: tuple[ir.Value | None, ...]
    ages: tuple[ir.Value | None, ...]


def candidates(frame: Frame, spec: MixerSpec, rows: int, past: list[ir.Value]) -> list[Candidates]:
    """Compare positions at once for all layers with equal mixers, from their `slot_position` `[B, H, N]`.

    Returns one result per layer. Positions are known before the first layer runs, and one large comparison is cheaper
    than many small ones.
    """
    g, config, cap, layers = frame.g, spec.config, spec.max_distance, len(past)

    def by_layer(x: ir.Value) -> list[Any]:
        return split(g, x, layers, axis=0)

    base = g.op("Tile", frame.position, g.const([layers])) if layers > 1 else frame.position  # [L * B]
    base = g.op("Unsqueeze", base, g.const([1, 2]))
    now = g.op("Expand", g.op("Add", base, frame.steps()), g.const([1, spec.kv_heads, 1]))
    position = g.concat(g.concat(*past, axis=0) if layers > 1 else past[0], now, axis=2)  # [L * B, H, C]
    # rows of the table are distances: exact in fp32 wherever it matters, for texts of any length
    row = g.op("Sub", position, g.op("Sub", base, g.const(cap)))
    table_row = g.op("Flatten", g.op("Clip", row, g.const(0), g.const(rows - 1)), axis=2)
    row, position = (g.op("Unsqueeze", x, g.const([2, 3])) for x in (row, position))
    birth = g.op("Cast", row, to=ir.DataType.FLOAT)
    born = g.op("Where", g.op("Less", position, g.const(0)), g.floats(NEVER), birth)
    stays = born
    if config.sinks:
        stays = g.op("Where", g.op("Less", position, g.const(config.sinks)), g.floats(NEVER), birth)
    leaving = frame.row(cap - config.window + 1)
    near = g.op("LessOrEqual", leaving, stays)
    always = g.op("And", g.op("GreaterOrEqual", frame.row(cap), born), near)
    within = g.op("LessOrEqual", frame.row(0), birth)
    none: list[Any] = [None] * layers
    carried = by_layer(g.op("Less", born, g.floats(cap))) if config.evicts else none
    columns = g.op("Squeeze", position, g.const([2]))
    local = rank = none
    if config.slots:
        bias = g.op("Where", always, g.floats(0), g.floats(MASKED))
        local = by_layer(bias) if any(not pool.on_arrival for pool in spec.pools) else none
        outside = g.op("Where", always, g.floats(-np.inf), g.floats(MASKED))
        rank = by_layer(g.op("Where", near, outside, g.floats(0)))
    counts, ages = [], []
    for pool in spec.pools:
        counted = aged = none
        if not pool.on_arrival:
            first = frame.row(cap - pool.first_distance)
            counted = g.op("And", g.op("LessOrEqual", leaving, born), g.op("GreaterOrEqual", first, born))
            counted = by_layer(g.op("Cast", counted, to=ir.DataType.FLOAT))
        if pool.horizon:
            aged = by_layer(g.op("Div", g.op("Squeeze", birth, g.const([2])), g.floats(pool.horizon)))
        counts.append(counted)
        ages.append(aged)
    fields = [by_layer(columns), by_layer(table_row), by_layer(always), local, rank, by_layer(within), carried]
    pools = [[tuple(values[i] for values in x) for i in range(layers)] for x in (counts, ages)]
    return [Candidates(*(x[i] for x in (*fields, *pools))) for i in range(layers)]


def split(g: Builder, x: ir.Value, parts: int, axis: int) -> list[ir.Value]:
    """Split one axis into equal parts."""
    return list(g.op("Split", x, outputs=parts, axis=axis, num_outputs=parts)) if parts > 1 else [x]
