"""The recurrence of a keyed gate in one launch: `ligerexport.kernels.keyed`, one token after the other.

A program holds all rows of a KV head in registers, since a query's softmax reads all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused.numbers import LOG2E
from ligerexport.model.gates import get_gate
from ligerexport.model.state import MixerSpec


def keyed_recurrence(
    heads: tuple[Tensor, Tensor, Tensor],
    position: Tensor,
    past: tuple[Tensor, Tensor],
    present: tuple[Tensor, Tensor],
    output: Tensor,
    spec: MixerSpec,
    index: Tensor | None = None,
    attended: Tensor | None = None,
) -> None:
    """Write the state after a chunk, and the answer of the rows to each query.

    Args:
        heads: Query, key and value `[B, T, H, d]`, with any strides and a contiguous last axis.
        position: `[B]`, number of tokens seen; negative before padding.
        past: Keys `[M, H_kv, rows, d_k]` and values `[M, H_kv, rows, d_v]` before the first token, contiguous.
        present: The same after the last token; they may be `past`.
        output: `[B, T, H_q, d_v]`, contiguous, to write to. With `attended` it gets the sum of both, and 0 for padding.
        spec: The layer.
        index: `[B]`, the row of the state of each sequence; negative skips it and gives 0; None for row b.
        attended: `[B, T, H_q, d_v]`, contiguous: the weighted output of the slots; None if another launch adds it.
    """
    query, key, value = heads
    batch, tokens, gate = query.shape[0], query.shape[1], get_gate(spec.config.gate)
    sizes = {"ROWS": spec.rows, "POOL": spec.d_k // spec.rows, "D_K": spec.d_k, "D_V": spec.d_v}
    padded = {f"{name}_PAD": triton.next_power_of_2(size) for name, size in sizes.items()}
    numbers = padded["ROWS_PAD"] * (padded["D_K_PAD"] + padded["D_V_PAD"])
    _keyed_kernel[(batch * spec.kv_heads,)](
        query, key, value, position, index, *past, *present, attended, output, spec.config.recurrence_weight, tokens,
        *(stride for x in heads for stride in x.stride()[:3]), H=spec.kv_heads, G=spec.q_heads // spec.kv_heads,
        **sizes, **padded, DIVISOR=gate.decay_divisor, num_warps=max(1, min(16, numbers // 2048)), num_stages=1,
    )  # fmt: skip


@triton.jit
def _keyed_kernel(
    p_query, p_key, p_value, p_position, p_index, p_past_key, p_past_value, p_present_key, p_present_value,
    p_attended, p_output, recurrence_weight, tokens,
    s_query_b, s_query_t, s_query_h, s_key_b, s_key_t, s_key_h, s_value_b, s_value_t, s_value_h,
    H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, POOL: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    ROWS_PAD: tl.constexpr, POOL_PAD: tl.constexpr, D_K_PAD: tl.constexpr, D_V_PAD: tl.constexpr,
    DIVISOR: tl.constexpr,
):  # fmt: skip
    """Compute `keyed_recurrence` for one KV head of one sequence. Grid: (B * H_kv,)."""
    unit = tl.program_id(0)
    b, h = (unit // H).to(tl.int64), unit % H
    row = b
    if p_index is not None:
        row = tl.load(p_index + b).to(tl.int64)
    o_m, o_p, o_k, o_v = tl.arange(0, ROWS_PAD), tl.arange(0, POOL_PAD), tl.arange(0, D_K_PAD), tl.arange(0, D_V_PAD)
    if row < 0:
        for place in range(tokens * G):
            at = (b * tokens + place // G) * (H * G) + h * G + place % G
            tl.store(p_output + at * D_V + o_v, tl.zeros([D_V_PAD], p_output.dtype.element_ty), mask=o_v < D_V)
        return
    m_m, m_k, m_v = o_m < ROWS, o_k < D_K, o_v < D_V
    m_pool = m_m[:, None] & (o_p < POOL)[None, :]
    at_k, in_k = (row * H + h) * (ROWS * D_K) + o_m[:, None] * D_K + o_k[None, :], m_m[:, None] & m_k[None, :]
    at_v, in_v = (row * H + h) * (ROWS * D_V) + o_m[:, None] * D_V + o_v[None, :], m_m[:, None] & m_v[None, :]
    keys, values = tl.load(p_past_key + at_k, mask=in_k, other=0.0), tl.load(p_past_value + at_v, mask=in_v, other=0.0)
    now = tl.load(p_position + b).to(tl.int32)
    p_query += b * s_query_b + h * G * s_query_h
    p_key += b * s_key_b + h * s_key_h
    p_value += b * s_value_b + h * s_value_h
    first = (b * tokens * H + h) * (G * D_V)
    for t in range(tokens):
        pooled = tl.load(p_key + o_m[:, None] * POOL + o_p[None, :], mask=m_pool, other=0.0).to(tl.float32)
        gate = tl.sum(pooled, axis=1) * (1.0 / POOL)
        faint = tl.exp2(-tl.abs(gate) * LOG2E)
        softplus = tl.where(faint < 1e-3, faint * (1.0 - faint * 0.5), tl.log(1.0 + faint))
        decay = (tl.minimum(gate, 0.0) - softplus) * (1.0 / DIVISOR)
        decay = tl.where(m_m & (now + t >= 0), decay, 0.0)
        kept = tl.exp2(decay * LOG2E)
        # 1 - exp(g) would lose what a nearly open gate admits
        series = -decay * (1.0 + decay * (0.5 + decay * (1.0 / 6 + decay * (1.0 / 24 + decay * (1.0 / 120)))))
        write = tl.where(decay > -0.1, series, 1.0 - kept)[:, None]
        key = tl.load(p_key + o_k, mask=m_k, other=0.0).to(tl.float32)
        value = tl.load(p_value + o_v, mask=m_v, other=0.0).to(tl.float32)
        keys = kept[:, None] * keys + write * key[None, :]
        values = kept[:, None] * values + write * value[None, :]
        for g in tl.static_range(G):
            query = tl.load(p_query + g * s_query_h + o_k, mask=m_k, other=0.0).to(tl.float32)
            logits = tl.where(m_m, tl.sum(keys * query[None, :], axis=1) * LOG2E, -1e30)
            weights = tl.exp2(logits - tl.max(logits, axis=0))
            read = tl.sum(weights[:, None] * values, axis=0) * (1.0 / tl.sum(weights, axis=0))
            at = first + t * (H * G * D_V) + g * D_V + o_v
            if p_attended is not None:
                mixed = tl.load(p_attended + at, mask=m_v, other=0.0) + recurrence_weight * read
                read = tl.where(now + t >= 0, mixed, 0.0)
            tl.store(p_output + at, read.to(p_output.dtype.element_ty), mask=m_v)
        p_query += s_query_t
        p_key += s_key_t
        p_value += s_value_t
    tl.store(p_present_key + at_k, keys, mask=in_k)
    tl.store(p_present_value + at_v, values, mask=in_v)
