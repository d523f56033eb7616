"""A layer kept as softmax: all keys and values, causal, rotary embedding at the positions that transformers uses."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.lowerings import Portable, rotate
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.kernels.memory_attention import MASKED
from ligerexport.model.families import Attention


def softmax_attention(
    lower: Portable,
    frame: Frame,
    spec: ModelSpec,
    projected: tuple[ir.Value, ir.Value, ir.Value],
    past: dict[str, ir.Value],
    softmax: Attention,
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Write one layer of causal softmax attention over all tokens so far.

    Args:
        projected: Query, key, value `[B * T, H * d]`, before rotary embedding.
        past: `key` and `value` `[B, H_kv, P, d]`, keys before rotary embedding.
        softmax: The attention of this layer.

    Returns:
        Output `[B * T, H_q * d]` and `key`, `value` with the new tokens.
    """
    g, heads, d = lower.g, spec.kv_heads, spec.head_dim
    group, (scale, inv_freq, window) = spec.q_heads // heads, softmax
    query = frame.per_token(projected[0], heads, group, d)
    new_key, new_value = (g.transpose(frame.per_token(x, heads, d), 0, 2, 1, 3) for x in projected[1:])
    key, value = g.concat(past["key"], new_key, axis=2), g.concat(past["value"], new_value, axis=2)

    def angles(position: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return cosine and sine `[..., R]` for positions `[...]`."""
        turned = g.op("Cast", g.op("Unsqueeze", position, g.const([-1])), to=ir.DataType.FLOAT)
        angle = g.op("Mul", turned, g.floats(inv_freq))
        return g.op("Cos", angle), g.op("Sin", angle)

    def columns() -> ir.Value:
        """Return the position of each column `[B, C]`; the last column is the newest token."""
        count = g.op("Shape", key, start=2, end=3)
        index = g.op("Range", g.const(0), g.op("Squeeze", count), g.const(1))
        first = g.op("Sub", g.op("Add", frame.position, frame.length), count)
        return g.op("Add", g.op("Unsqueeze", first, g.const([1])), index)

    def turn(x: ir.Value, memo: str, position: Callable[[], ir.Value], axes: list[int]) -> ir.Value:
        if not any(inv_freq):
            return x
        cos, sin = g.once(
            (memo, inv_freq), lambda: tuple(g.op("Unsqueeze", y, g.const(axes)) for y in angles(position()))
        )
        return rotate(g, x, cos, sin, len(inv_freq), d)

    column = g.once("kept_columns", columns)
    query = g.transpose(turn(query, "kept_rows", frame.now, [2, 3]), 0, 2, 1, 3, 4)  # [B, H, T, G, d]
    logits = lower.scores(
        g.reshape(query, 0, 0, -1, d), turn(key, "kept_angles", lambda: column, [1]), scale
    )  # [B, H, T * G, C]

    def mask() -> ir.Value:
        distance = g.op("Sub", g.op("Unsqueeze", frame.now(), g.const([2])), g.op("Unsqueeze", column, g.const([1])))
        seen = g.op("GreaterOrEqual", distance, g.const(0))
        seen = g.op("And", seen, g.op("GreaterOrEqual", g.op("Unsqueeze", column, g.const([1])), g.const(0)))
        if window is not None:
            seen = g.op("And", seen, g.op("Less", distance, g.const(window)))
        return g.op("Unsqueeze", seen, g.const([1, 3]))  # [B, 1, T, 1, C]

    groups = g.once(
        ("kept_groups", group), lambda: g.concat(g.const([0, 0]), frame.length, g.const([group, -1]), axis=0)
    )
    logits = g.op("Where", g.once(("kept_mask", window), mask), g.op("Reshape", logits, groups), g.floats(MASKED))
    weights = g.op("Softmax", logits, axis=-1)
    flat = g.op("Concat", g.const([0, 0, -1]), g.op("Shape", key, start=2, end=3), axis=0)
    mixed = g.op("Reshape", g.op("MatMul", g.op("Reshape", weights, flat), value), groups)
    return g.reshape(g.transpose(mixed, 0, 2, 1, 3, 4), -1, spec.q_heads * d), {"key": key, "value": value}
