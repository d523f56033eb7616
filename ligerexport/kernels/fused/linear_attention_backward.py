"""Gradients of gated linear attention on the GPU, chunk by chunk in parallel, from the states on both sides of a chunk.

`prepare` and `segment_states` have written scaled queries and keys, the state before each chunk and the gradient of the
state after it. `scaled_gradient` needs no factors; `finish_gradient` applies them and the feature maps. The gradient of
the decay comes from q dq - k dk, summed within the chunk alone and over products that cancel exactly, so that its error
does not grow with the length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ligerexport.kernels.fused.blocks import (
    around_middle,
    around_reference,
    decay_to_key,
    features_gradient,
    is_strong,
    load_block,
    load_key,
    load_query,
    load_scores,
    load_state,
    store_block,
    sum_tokens,
)
from ligerexport.kernels.fused.linear_attention_forward import (
    COLUMNS,
    END,
    ENTER,
    LEAVE,
    PASSED,
    SEQUENCE,
    START,
)


@triton.jit
def value_gradient(
    scaled_q, scaled_k, flags, strong, do, dv, adjoints, chunks, stride_do, stride_doh, stride_dv, stride_dvh,
    HEADS, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dv_j = sum of (q_i k_j) do_i over later i, plus k_j dS. Grid: (V blocks, KV heads, chunks)."""
    PV: tl.constexpr = V if V % BV == 0 else 0
    block, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = chunks + chunk * COLUMNS
    if tl.load(row + SEQUENCE) < 0:
        return
    first, length = tl.load(row + START).to(tl.int64), tl.load(row + END) - tl.load(row + START)
    token, channels, columns = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    m_rows = token < length
    causal = token[:, None] >= token[None, :]
    at = (chunk * HEADS + head).to(tl.int64)
    any_strong = tl.load(flags + at) > 0
    key = load_block(scaled_k + (first * HEADS + head) * K, token, channels, HEADS * K, m_rows, K, BK).to(OPERAND)
    adjoint = load_state(adjoints + at * K * V, channels, columns, K, V, BK).to(OPERAND)
    gradient = tl.dot(key, adjoint, input_precision=PRECISION)
    for j in tl.range(0, GROUP):
        h = head * GROUP + j
        p_scaled = scaled_q + (first * HEADS * GROUP + h) * K
        query = load_block(p_scaled, token, channels, HEADS * GROUP * K, m_rows, K, BK).to(OPERAND)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        scores = tl.where(causal, scores, 0.0)
        if any_strong:
            scores += load_scores(strong, chunk * HEADS * GROUP + h, C)
        scores = scores.to(OPERAND)
        d_output = load_block(do + first * stride_do + h * stride_doh, token, columns, stride_do, m_rows, V, PV)
        gradient = tl.dot(tl.trans(scores), d_output.to(OPERAND), gradient, input_precision=PRECISION)
    store_block(dv + first * stride_dv + head * stride_dvh, gradient, token, columns, stride_dv, m_rows, V, PV)


@triton.jit
def scaled_gradient(
    scaled_q, scaled_k, v, factors, flags, do, dq, dk, dg, states, adjoints, chunks,
    stride_v, stride_vh, stride_do, stride_doh, stride_dg, stride_dgh,
    HEADS, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write gradients of scaled queries and keys, and of the decay in nats. Grid: (KV heads, chunks)."""
    PV: tl.constexpr = V if V % BV == 0 else 0
    head, chunk = tl.program_id(0), tl.program_id(1)
    row = chunks + chunk * COLUMNS
    if tl.load(row + SEQUENCE) < 0:
        return
    first, length = tl.load(row + START).to(tl.int64), tl.load(row + END) - tl.load(row + START)
    token, channels = tl.arange(0, C), tl.arange(0, BK)
    m_rows, m_k = token < length, channels < K
    causal = token[:, None] >= token[None, :]
    at = (chunk * HEADS + head).to(tl.int64)
    p_v, stride_k = v + first * stride_v + head * stride_vh, HEADS * K
    p_key, stride_q = (first * HEADS + head) * K, HEADS * GROUP * K

    cross = tl.zeros([C, BK], tl.float32)  # gradient of keys through the state after the chunk
    bound = tl.zeros([BK], tl.float32)
    for n in range(0, tl.cdiv(V, BV)):
        columns = n * BV + tl.arange(0, BV)
        value = load_block(p_v, token, columns, stride_v, m_rows, V, PV).to(OPERAND)
        adjoint = load_state(adjoints + at * K * V, channels, columns, K, V, BK)
        state = load_state(states + at * K * V, channels, columns, K, V, BK)
        cross = tl.dot(value, tl.trans(adjoint.to(OPERAND)), cross, input_precision=PRECISION)
        bound += tl.sum(state.to(tl.float32) * adjoint.to(tl.float32), axis=1)
    if tl.load(flags + at) > 0:
        p_factors = factors + at * 3 * K + channels
        enter = tl.load(p_factors + ENTER * K, mask=m_k, other=1.0)
        leave = tl.load(p_factors + LEAVE * K, mask=m_k, other=1.0)
        passed = tl.load(p_factors + PASSED * K, mask=m_k, other=0.0)
        bound = bound * tl.where(is_strong(enter, leave, passed), tl.exp2(passed), 1.0)
    within = tl.zeros([C, BK], tl.float32)  # gradient of keys through pairs in the chunk
    balance = tl.zeros([C, BK], tl.float32)
    key = load_block(scaled_k + p_key, token, channels, stride_k, m_rows, K, BK)
    for j in tl.range(0, GROUP):
        h = head * GROUP + j
        p_do, p_query = do + first * stride_do + h * stride_doh, (first * HEADS * GROUP + h) * K
        d_scores = tl.zeros([C, C], tl.float32)
        d_query = tl.zeros([C, BK], tl.float32)
        for n in range(0, tl.cdiv(V, BV)):
            columns = n * BV + tl.arange(0, BV)
            d_output = load_block(p_do, token, columns, stride_do, m_rows, V, PV).to(OPERAND)
            value = load_block(p_v, token, columns, stride_v, m_rows, V, PV).to(OPERAND)
            state = load_state(states + at * K * V, channels, columns, K, V, BK).to(OPERAND)
            d_scores = tl.dot(d_output, tl.trans(value), d_scores, input_precision=PRECISION)
            d_query = tl.dot(d_output, tl.trans(state), d_query, input_precision=PRECISION)
        d_scores = tl.where(causal, d_scores, 0.0).to(OPERAND)
        query = load_block(scaled_q + p_query, token, channels, stride_q, m_rows, K, BK)
        d_query = tl.dot(d_scores, key.to(OPERAND), d_query, input_precision=PRECISION)
        within = tl.dot(tl.trans(d_scores), query.to(OPERAND), within, input_precision=PRECISION)
        balance += query.to(tl.float32) * d_query
        store_block(dq + p_query, d_query, token, channels, stride_q, m_rows, K, BK)
    store_block(dk + p_key, within + cross, token, channels, stride_k, m_rows, K, BK)

    later = (token[:, None] <= token[None, :]).to(tl.float32)
    key = key.to(tl.float32)
    decay = sum_tokens(later, balance - key * within, OPERAND, PRECISION)
    decay += sum_tokens(1.0 - later, key * cross, OPERAND, PRECISION) + bound[None, :]
    store_block(dg + first * stride_dg + head * stride_dgh, decay, token, channels, stride_dg, m_rows, K, BK)


@triton.jit
def finish_gradient(
    q, k, g, scaled_dq, scaled_dk, decay_gradient, flags, dq, dk, chunks, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_g, stride_gh, stride_dg, stride_dgh,
    stride_dq, stride_dqh, stride_dk, stride_dkh,
    HEADS, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    QUERY_MAP: tl.constexpr, KEY_MAP: tl.constexpr, DECAY: tl.constexpr, STAGES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Turn gradients of scaled queries and keys into those of raw ones. Grid: (KV heads, chunks, K blocks)."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    row = chunks + chunk * COLUMNS
    if tl.load(row + SEQUENCE) < 0:
        return
    first, length = tl.load(row + START).to(tl.int64), tl.load(row + END) - tl.load(row + START)
    token, channels = tl.arange(0, C), tl.program_id(2) * BK + tl.arange(0, BK)
    PK: tl.constexpr = K if K % BK == 0 else 0
    m_rows = token < length
    p_k, p_g = k + first * stride_k + head * stride_kh, g + first * stride_g + head * stride_gh
    key, d = load_key(p_k, p_g, token, channels, stride_k, stride_g, m_rows, K, PK, KEY_MAP, DECAY)
    r, before, after = around_middle(d, OPERAND, PRECISION)
    q_factor, k_factor, _, _, _ = around_reference(r, before, after)
    if tl.load(flags + chunk * HEADS + head) > 0:  # `strong_gradient` has applied them
        q_factor, k_factor = tl.zeros_like(r) + 1.0, tl.zeros_like(r) + 1.0
    p_scaled = scaled_dk + (first * HEADS + head) * K
    gradient = load_block(p_scaled, token, channels, HEADS * K, m_rows, K, PK).to(tl.float32)
    gradient = gradient * k_factor
    if KEY_MAP != "none" and DECAY[2] > 0.0:  # the features are 1 - floor times those of the map
        key, gradient = key * (1.0 / (1.0 - DECAY[2])), gradient * (1.0 - DECAY[2])
    gradient = features_gradient(key, gradient, KEY_MAP)
    if KEY_MAP != "none":
        p_decay = decay_gradient + first * stride_dg + head * stride_dgh
        decay = load_block(p_decay, token, channels, stride_dg, m_rows, K, PK).to(tl.float32)
        x = load_block(p_k, token, channels, stride_k, m_rows, K, PK).to(tl.float32)
        gradient += decay_to_key(x, decay, K, DECAY)
    store_block(dk + first * stride_dk + head * stride_dkh, gradient, token, channels, stride_dk, m_rows, K, PK)
    for j in tl.range(0, GROUP, num_stages=STAGES):
        h = head * GROUP + j
        p_q = q + first * stride_q + h * stride_qh
        feature = load_query(p_q, token, channels, stride_q, m_rows, K, PK, QUERY_MAP)
        p_scaled = scaled_dq + (first * HEADS * GROUP + h) * K
        gradient = load_block(p_scaled, token, channels, HEADS * GROUP * K, m_rows, K, PK).to(tl.float32)
        gradient = features_gradient(feature, gradient * q_factor * scale, QUERY_MAP)
        store_block(dq + first * stride_dq + h * stride_dqh, gradient, token, channels, stride_dq, m_rows, K, PK)
