"""Gated linear attention forward on the GPU: four launches, or two where each sequence is one segment.

`prepare` turns raw projections into queries and keys that carry their decay within a chunk, so that the rest consists
of matrix products. `segment_states` sums each segment's contribution to the state, `scan_states` carries it over
segments, and `attend_segments` walks each segment with the state in registers. Each KV head processes its state once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ligerexport.kernels.fused.blocks import (
    around_middle,
    around_reference,
    is_strong,
    load_block,
    load_key,
    load_query,
    load_scores,
    load_state,
    store_block,
    store_state,
)

# Columns of the table of segments, see `ligerexport.kernels.fused.segments`.
START = tl.constexpr(0)
END = tl.constexpr(1)
SEQUENCE = tl.constexpr(2)
LAST = tl.constexpr(3)
FIRST_CHUNK = tl.constexpr(4)
COLUMNS = tl.constexpr(5)

# Outputs of `prepare` for each chunk and KV head, `[3, K]`.
ENTER = tl.constexpr(0)
LEAVE = tl.constexpr(1)
PASSED = tl.constexpr(2)
"""Bits of decay of the whole chunk."""


@triton.jit
def prepare(
    q, k, g, scaled_q, scaled_k, factors, flags, chunks, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_g, stride_gh,
    HEADS, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    QUERY_MAP: tl.constexpr, KEY_MAP: tl.constexpr, DECAY: tl.constexpr, STAGES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write scaled features of queries and keys, and the state's factors. Grid: (KV heads, chunks, K blocks)."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    row = chunks + chunk * COLUMNS
    at = chunk * HEADS + head
    if tl.load(row + SEQUENCE) < 0:
        tl.store(flags + at, 0)
        return
    first, length = tl.load(row + START).to(tl.int64), tl.load(row + END) - tl.load(row + START)
    token, channels = tl.arange(0, C), tl.program_id(2) * BK + tl.arange(0, BK)
    PK: tl.constexpr = K if K % BK == 0 else 0
    m_rows = token < length
    p_k, p_g = k + first * stride_k + head * stride_kh, g + first * stride_g + head * stride_gh
    key, d = load_key(p_k, p_g, token, channels, stride_k, stride_g, m_rows, K, PK, KEY_MAP, DECAY)
    r, before, after = around_middle(d, OPERAND, PRECISION)
    q_factor, k_factor, strong, enter, leave = around_reference(r, before, after)
    stride = HEADS * K
    store_block(scaled_k + first * stride + head * K, key * k_factor, token, channels, stride, m_rows, K, PK)
    for j in tl.range(0, GROUP, num_stages=STAGES):
        p_q = q + first * stride_q + (head * GROUP + j) * stride_qh
        query = load_query(p_q, token, channels, stride_q, m_rows, K, PK, QUERY_MAP) * scale
        p_scaled = scaled_q + first * GROUP * stride + (head * GROUP + j) * K
        store_block(p_scaled, query * q_factor, token, channels, GROUP * stride, m_rows, K, PK)
    p_factors = factors + at.to(tl.int64) * 3 * K + channels
    tl.store(p_factors + ENTER * K, enter, mask=channels < K)
    tl.store(p_factors + LEAVE * K, leave, mask=channels < K)
    tl.store(p_factors + PASSED * K, before + after, mask=channels < K)
    any_strong = tl.max(strong.to(tl.int32), axis=0)
    if K <= BK:
        tl.store(flags + at, any_strong)
    else:
        tl.atomic_or(flags + at, any_strong)


@triton.jit
def segment_states(
    x, y, factors, flags, states, decays, chunk_states, segments,
    stride_y, stride_yh,
    HEADS, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, STORE_CHUNKS: tl.constexpr, STATES: tl.constexpr, STAGES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum over a segment from zero, or (STORE_CHUNKS) walk it from `states` and write each chunk's state on the way.

    Forward: x = scaled keys, y = values. REVERSE, for gradients: x = scaled queries, y = gradient of the output, summed
    over the group, from the last token to the first. The chunk's state is what its products need: after `enter`,
    in reverse after `leave`. Grid: (V blocks, KV heads, segments).
    """
    PV: tl.constexpr = V if V % BV == 0 else 0
    block, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = segments + segment * COLUMNS
    start, end = tl.load(row + START), tl.load(row + END)
    sequence, last = tl.load(row + SEQUENCE), tl.load(row + LAST)
    if sequence < 0:
        return
    if not STORE_CHUNKS and not REVERSE and last > 0:
        return  # the state after the last segment is not read
    token, channels, columns = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    m_k = channels < K
    at = (segment * HEADS + head).to(tl.int64)
    if STATES:
        state = load_state(states + at * K * V, channels, columns, K, V, BK)
    else:
        state = tl.zeros([BK, BV], tl.float32)
    first_chunk = tl.load(row + FIRST_CHUNK)
    pending = tl.full([BK], 1.0, tl.float32)
    total = tl.zeros([BK], tl.float32)
    stride_x = HEADS * GROUP * K
    count = tl.cdiv(end - start, C)
    for i in tl.range(0, count * GROUP, num_stages=STAGES):  # chunks, and in each the heads of the group
        n = count - 1 - i // GROUP if REVERSE else i // GROUP
        h = head * GROUP + i % GROUP
        first = (start + n * C).to(tl.int64)
        m_rows = token < end - first
        here = ((first_chunk + n) * HEADS + head).to(tl.int64)
        item = load_block(x + first * stride_x + h * K, token, channels, stride_x, m_rows, K, BK)
        other = load_block(y + first * stride_y + h * stride_yh, token, columns, stride_y, m_rows, V, PV)
        p_factors = factors + here * 3 * K + channels
        enter = tl.load(p_factors + ENTER * K, mask=m_k, other=1.0)
        leave = tl.load(p_factors + LEAVE * K, mask=m_k, other=1.0)
        passed = tl.load(p_factors + PASSED * K, mask=m_k, other=0.0)
        if i % GROUP == 0:
            state = state * (pending * (leave if REVERSE else enter))[:, None]
            pending = enter if REVERSE else leave
            total += passed
            if STORE_CHUNKS:
                store_state(chunk_states + here * K * V, state, channels, columns, K, V, BK)
            if tl.load(flags + here) > 0:
                state = state * tl.where(is_strong(enter, leave, passed), tl.exp2(passed), 1.0)[:, None]
        state = tl.dot(tl.trans(item.to(OPERAND)), other.to(OPERAND), state, input_precision=PRECISION)
    if not STORE_CHUNKS:
        store_state(states + at * K * V, state * pending[:, None], channels, columns, K, V, BK)
        tl.store(decays + at * K + channels, total, mask=m_k & (block == 0))


@triton.jit
def scan_states(
    states, decays, initial, final, offsets, HEADS, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn each segment's own sum into the state that it starts from (REVERSE: ends with), in place.

    `final` receives the state after the last segment, only in reverse: forward, `attend_segments` writes
    it. Grid: (blocks of K V, KV heads, sequences).
    """
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < K * V
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    whole = (sequence * HEADS + head).to(tl.int64) * K * V + at
    carry = tl.zeros([BLOCK], tl.float32)
    if INITIAL:
        carry = tl.load(initial + whole, mask=inside, other=0.0)
    for i in tl.range(begin, end):
        segment = begin + end - 1 - i if REVERSE else i
        here = (segment * HEADS + head).to(tl.int64)
        m_own = inside & (REVERSE or i < end - 1)
        own = tl.load(states + here * K * V + at, mask=m_own, other=0.0)
        decay = tl.load(decays + here * K + at // V, mask=m_own, other=0.0)
        tl.store(states + here * K * V + at, carry, mask=inside)
        carry = carry * tl.exp2(decay) + own
    if FINAL:
        tl.store(final + whole, carry, mask=inside)


@triton.jit
def attend_segments(
    scaled_q, scaled_k, v, factors, flags, strong, o, states, final, segments, stride_v, stride_vh, stride_o, stride_oh,
    HEADS, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    STATES: tl.constexpr, FINAL: tl.constexpr, STAGES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk a segment with the state in registers: o_t = q_t S_t. Grid: (V blocks, KV heads, segments)."""
    PV: tl.constexpr = V if V % BV == 0 else 0
    block, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = segments + segment * COLUMNS
    start, end = tl.load(row + START), tl.load(row + END)
    sequence, last = tl.load(row + SEQUENCE), tl.load(row + LAST)
    if sequence < 0:
        return
    token, channels, columns = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    m_k = channels < K
    causal = token[:, None] >= token[None, :]
    if STATES:
        state = load_state(states + (segment * HEADS + head).to(tl.int64) * K * V, channels, columns, K, V, BK)
    else:
        state = tl.zeros([BK, BV], tl.float32)
    first_chunk = tl.load(row + FIRST_CHUNK)
    pending = tl.full([BK], 1.0, tl.float32)
    for i in tl.range(0, tl.cdiv(end - start, C), num_stages=STAGES):
        first = (start + i * C).to(tl.int64)
        m_rows = token < end - first
        here = ((first_chunk + i) * HEADS + head).to(tl.int64)
        p_factors = factors + here * 3 * K + channels
        enter = tl.load(p_factors + ENTER * K, mask=m_k, other=1.0)
        leave = tl.load(p_factors + LEAVE * K, mask=m_k, other=1.0)
        key = load_block(scaled_k + (first * HEADS + head) * K, token, channels, HEADS * K, m_rows, K, BK).to(OPERAND)
        value = load_block(v + first * stride_v + head * stride_vh, token, columns, stride_v, m_rows, V, PV).to(OPERAND)
        any_strong = tl.load(flags + here) > 0
        state = state * (pending * enter)[:, None]
        entering = state.to(OPERAND)
        for j in tl.static_range(GROUP):
            h = head * GROUP + j
            p_scaled = scaled_q + (first * HEADS * GROUP + h) * K
            query = load_block(p_scaled, token, channels, HEADS * GROUP * K, m_rows, K, BK).to(OPERAND)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            scores = tl.where(causal, scores, 0.0)
            if any_strong:
                scores += load_scores(strong, (first_chunk + i) * HEADS * GROUP + h, C)
            scores = scores.to(OPERAND)
            output = tl.dot(query, entering, input_precision=PRECISION)
            output = tl.dot(scores, value, output, input_precision=PRECISION)
            p_o = o + first * stride_o + h * stride_oh
            store_block(p_o, output, token, columns, stride_o, m_rows, V, PV)
        if any_strong:
            passed = tl.load(p_factors + PASSED * K, mask=m_k, other=0.0)
            state = state * tl.where(is_strong(enter, leave, passed), tl.exp2(passed), 1.0)[:, None]
        state = tl.dot(tl.trans(key), value, state, input_precision=PRECISION)
        pending = leave
    if FINAL and last > 0:
        p_final = final + (sequence * HEADS + head).to(tl.int64) * K * V
        store_state(p_final, state * pending[:, None], channels, columns, K, V, BK)
