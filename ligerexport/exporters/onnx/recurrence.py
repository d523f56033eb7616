"""The recurrence of a gate as graph nodes, which `liger_mixer` adds to the softmax over the slots."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ligerexport.exporters.onnx.builder import Builder
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.lowerings import Portable, advance, causal, reach, split_heads, unsqueeze
from ligerexport.model.gates import STRONGEST, get_gate
from ligerexport.model.state import MixerSpec

TINY = float(np.finfo(np.float32).tiny)
FEATURE_MAPS: dict[str, Callable[[Builder, ir.Value], ir.Value]] = {
    "softmax": lambda g, x: g.op("Softmax", x, axis=-1),
    "one_minus_sigmoid": lambda g, x: g.op("Sigmoid", g.op("Neg", x)),
}
"""Functions that write nodes from raw projections `[..., d_k]` to features of the recurrence."""
DECAYS: dict[str, Callable[[Builder, ir.Value, float], ir.Value]] = {
    "logsigmoid": lambda g, x, divisor: g.op("Softplus", g.op("Neg", x)),
    "minus_exp": lambda g, x, divisor: g.op("Exp", g.op("Clip", x, None, g.floats(math.log(STRONGEST * divisor)))),
    "head_logsigmoid": lambda g, x, divisor: g.op("Softplus", g.op("Neg", _mean(g, x))),
    "head_minus_softplus": lambda g, x, divisor: g.op("Softplus", _mean(g, x)),
}
"""Functions that write nodes from raw keys `[B, T, H, d_k]` to the decay times minus its divisor, `[B, T, H, d_k]` or
`[B, T, H]`. The divisor is an argument too, for a limit of the decay."""


def _mean(g: Builder, x: ir.Value) -> ir.Value:
    return g.op("ReduceMean", x, g.const([-1]), keepdims=0)


def weighted_mean(g: Builder, x: ir.Value, width: int) -> ir.Value:
    """Divide the last axis, of `width` and one more, by the sum of weights in its last column; 0 if there are none."""
    total, weight = g.op("Split", x, g.const([width, 1]), outputs=2, axis=-1)
    return g.op("Div", total, g.op("Clip", weight, g.floats(TINY)))


def gated_recurrence(
    lower: Portable,
    frame: Frame,
    spec: MixerSpec,
    projected: tuple[ir.Value, ir.Value, ir.Value],
    features: ir.Value | None,
    past: dict[str, ir.Value],
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Write the recurrence of one layer.

    Args:
        projected: Query, key, value `[B * T, H * d]`.
        features: Softmax of the keys `[B, T, H_kv, d_k]`, 0 for padding, if it was computed already.
        past: State by the names of `MixerSpec.state`.

    Returns:
        Output `[B * T, H_q * d_v]` and the new state.
    """
    g, gate, heads, present = lower.g, get_gate(spec.config.gate), spec.kv_heads, dict[str, ir.Value]()
    key, value = (frame.per_token(x, -1) for x in projected[1:])
    if gate.normalised:  # a value that is always 1, for the sum of the weights
        beside = g.op("Pad", g.reshape(value, 0, 0, heads, -1), g.const([0, 0, 0, 0, 0, 0, 0, 1]), g.floats(1))
        value = g.reshape(beside, 0, 0, -1)
    if not gate.floor:
        raw = key  # functions of single channels need no axis of heads
        if gate.decay.startswith("head_"):
            raw = g.reshape(key, 0, 0, heads, -1)
        elif spec.rows < spec.d_k:
            raw = _mean(g, g.reshape(key, 0, 0, heads * spec.rows, -1))
        decay = g.op("Mul", DECAYS[gate.decay](g, raw, gate.decay_divisor), frame.real(-1 / gate.decay_divisor))
    if gate.keyed:
        # 1 - exp(g) without cancellation: ONNX has no expm1
        k = g.op("Mul", g.op("Tanh", g.op("Mul", decay, g.floats(-0.5))), g.op("Add", g.op("Exp", decay), g.floats(1)))
        by_head = split_heads(g, key, heads), split_heads(g, k, heads), split_heads(g, decay, heads)
        logits, present["recurrent_key"] = _row_logits(
            lower, frame, spec, projected[0], *by_head, past["recurrent_key"]
        )
        q = FEATURE_MAPS[gate.query_map](g, logits)
    else:
        q = FEATURE_MAPS[gate.query_map](g, frame.per_token(projected[0], spec.q_heads, spec.d_k))
        if gate.key_map == "softmax" and features is not None:
            k = g.reshape(features, 0, 0, -1)
        else:
            k = FEATURE_MAPS[gate.key_map](g, frame.per_token(projected[1], heads, spec.d_k))
            k = g.op("Mul", g.reshape(k, 0, 0, -1), frame.real(1 - gate.floor))
    if gate.floor:
        decay = g.op("Log", g.op("Sub", g.floats(1), k))
    if spec.config.routed:
        read, present["memory_state"] = _in_memories(lower, frame, spec, projected[1], q, (k, value, decay), past)
    else:
        read, present["recurrent_state"] = lower.linear_attention(
            g.reshape(q, 0, 0, -1), k, value, past["recurrent_state"], decay, (spec.q_heads, heads), spec.rows
        )
    if gate.normalised:
        read = weighted_mean(g, g.reshape(read, 0, 0, spec.q_heads, -1), spec.d_v)
    return g.reshape(read, -1, spec.q_heads * spec.d_v), present


def _in_memories(
    lower: Portable,
    frame: Frame,
    spec: MixerSpec,
    projected: ir.Value,
    query: ir.Value,
    written: tuple[ir.Value, ir.Value, ir.Value],
    past: dict[str, ir.Value],
) -> tuple[ir.Value, ir.Value]:
    """Run the recurrence in the memories that each token uses; see `ligerexport.kernels.memories`.

    Every memory is a head of one linear attention, in which tokens that do not use it have a key and a decay of 0.

    Args:
        projected: Key `[B * T, H * d_k]` as projected.
        query: Features `[B, T, H_q, d_k]`.
        written: Features of the key, value and decay `[B, T, H * d]`.
        past: State by the names of `MixerSpec.state`.

    Returns:
        Output `[B, T, H, G * d_v]` and the new states.
    """
    g, heads, memories = lower.g, spec.kv_heads, spec.config.memories
    count, group = memories + 1, spec.q_heads // spec.kv_heads
    member = (np.arange(spec.d_k)[:, None] % memories == np.arange(memories)) / np.sqrt(spec.d_k / memories)
    logits = g.op("MatMul", frame.per_token(projected, heads, spec.d_k), g.floats(member))
    best, _ = g.op("TopK", logits, g.const([spec.config.active]), outputs=2, axis=-1)
    chosen = g.op("GreaterOrEqual", logits, g.slice(best, -1, np.iinfo(np.int64).max, 3))
    weights = g.op("Softmax", g.op("Where", chosen, logits, g.floats(-np.inf)), axis=-1)

    def with_shared(x: ir.Value) -> ir.Value:
        return unsqueeze(g, g.op("Pad", x, g.const([0] * 7 + [1]), g.floats(1)), 4)  # [B, T, H, M + 1, 1]

    uses = with_shared(g.op("Cast", chosen, to=ir.DataType.FLOAT))
    q = g.op("Mul", g.reshape(query, 0, 0, heads, 1, -1), with_shared(weights))
    k, v, decay = (g.reshape(g.op("Mul", g.reshape(x, 0, 0, heads, 1, -1), uses), 0, 0, -1) for x in written)
    state = g.reshape(past["memory_state"], 0, -1, spec.d_k, spec.d_v)
    sizes = count * spec.q_heads, count * heads
    read, state = lower.linear_attention(g.reshape(q, 0, 0, -1), k, v, state, decay, sizes, spec.d_k)
    read = g.op("ReduceSum", g.reshape(read, 0, 0, heads, count, group * spec.d_v), g.const([3]), keepdims=0)
    return read, g.reshape(state, 0, heads, count, spec.d_k, spec.d_v)


def _row_logits(
    lower: Portable,
    frame: Frame,
    spec: MixerSpec,
    query: ir.Value,
    key: ir.Value,
    write: ir.Value,
    decay: ir.Value,
    state: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """Run S_t = exp(g_t) S_{t-1} + w_t k_t^T, o_t = S_t q_t; see `ligerexport.kernels.linear_attention.row_logits`.

    No operator reads a state by its columns, so this uses standard operators: q_t k_i times the rest of w_i at time t,
    one number per row. State and keys are joined first, so that the state has one consumer and may be updated in place.

    Args:
        spec: The layer; M is its number of rows.
        query: `[B * T, H_q * d_k]`.
        key: `[B, H, T, d_k]`.
        write: `[B, H, T, M]`.
        decay: `[B, H, T, M]`.
        state: `[B, H, M, d_k]`.

    Returns:
        Output `[B, T, H, G, M]` and the new state.
    """
    g, rows, group = lower.g, spec.rows, spec.q_heads // spec.kv_heads
    q = g.transpose(frame.per_token(query, spec.kv_heads, group, spec.d_k), 0, 2, 1, 3, 4)  # [B, H, T, G, d_k]
    memory = g.concat(state, key, axis=2)  # [B, H, M + T, d_k]
    products = lower.scores(g.reshape(q, 0, 0, -1, spec.d_k), memory, 1.0)
    by_token = g.once(
        ("by_token", group), lambda: g.concat(g.const([0, 0]), frame.length, g.const([group, -1]), axis=0)
    )
    products = g.op("Reshape", products, by_token)  # [B, H, T, G, M + T]
    total = g.op("CumSum", decay, g.const(2))
    carried = g.op("Mul", g.slice(products, 0, rows, 4), unsqueeze(g, g.op("Exp", total), 3))
    pairs = g.slice(products, rows, np.iinfo(np.int64).max, 4)
    pairs = g.op("Mul", pairs, g.once("causal", lambda: causal(g, key)))  # [B, H, T, G, S]
    logits = g.op("Add", carried, g.op("MatMul", pairs, reach(g, write, total)))
    return g.transpose(logits, 0, 2, 1, 3, 4), advance(g, write, key, total, g.slice(memory, 0, rows, 2))
