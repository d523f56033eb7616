"""Pairs within a chunk that products of scaled queries and keys leave out, in channels that forget very fast.

The result is exact for any decay. Distances are handled one by one, on the chunks that `prepare` flagged.
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
    store_block,
)
from ligerexport.kernels.fused.linear_attention_forward import COLUMNS, END, ENTER, LEAVE, PASSED, START

TOGETHER = tl.constexpr(8)
"""Chunks per program, since most have nothing to do."""


@triton.jit
def strong_reach(factors, at, channels, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Return the decay `[C, BK]` to start from: none in strong channels, complete decay in others."""
    p_factors, m_k = factors + at * 3 * K + channels, channels < K
    enter = tl.load(p_factors + ENTER * K, mask=m_k, other=1.0)
    leave = tl.load(p_factors + LEAVE * K, mask=m_k, other=1.0)
    passed = tl.load(p_factors + PASSED * K, mask=m_k, other=0.0)
    return tl.where(is_strong(enter, leave, passed)[None, :], tl.zeros([C, BK], tl.float32), float("-inf"))


@triton.jit
def strong_scores(
    query, reach, k, g, channels, stride_k, stride_g, length,
    K: tl.constexpr, BK: tl.constexpr, KEY_MAP: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Return the scores `[C, C]` of strong channels."""
    C: tl.constexpr = query.shape[0]
    row = tl.arange(0, C)
    scores = tl.zeros([C, C], tl.float32)
    for distance in range(0, C):
        m_rows = (row >= distance) & (row < length)
        key, d = load_key(k, g, row - distance, channels, stride_k, stride_g, m_rows, K, BK, KEY_MAP, DECAY)
        pair = tl.sum(query * key * tl.exp2(reach), axis=1)
        scores += tl.where(row[None, :] == row[:, None] - distance, pair[:, None], 0.0)
        reach += d
    return scores


@triton.jit
def strong_query_gradient(
    d_scores, reach, k, g, channels, stride_k, stride_g, length,
    K: tl.constexpr, BK: tl.constexpr, KEY_MAP: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the queries `[C, BK]` through `strong_scores`."""
    C: tl.constexpr = d_scores.shape[0]
    row = tl.arange(0, C)
    gradient = tl.zeros([C, BK], tl.float32)
    for distance in range(0, C):
        m_rows = (row >= distance) & (row < length)
        key, d = load_key(k, g, row - distance, channels, stride_k, stride_g, m_rows, K, BK, KEY_MAP, DECAY)
        pair = tl.sum(tl.where(row[None, :] == row[:, None] - distance, d_scores, 0.0), axis=1)
        gradient += pair[:, None] * key * tl.exp2(reach)
        reach += d
    return gradient


@triton.jit
def strong_key_gradient(
    d_scores, reach, q, k, g, channels, stride_q, stride_k, stride_g, length, scale,
    K: tl.constexpr, BK: tl.constexpr, QUERY_MAP: tl.constexpr, KEY_MAP: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the keys' features `[C, BK]` through `strong_scores`."""
    C: tl.constexpr = d_scores.shape[0]
    row = tl.arange(0, C)
    gradient = tl.zeros([C, BK], tl.float32)
    for distance in range(0, C):
        later = row + distance
        query = load_query(q, later, channels, stride_q, later < length, K, BK, QUERY_MAP) * scale
        pair = tl.sum(tl.where(row[:, None] == row[None, :] + distance, d_scores, 0.0), axis=0)
        gradient += pair[:, None] * query * tl.exp2(reach)
        _, d = load_key(k, g, later + 1, channels, stride_k, stride_g, later + 1 < length, K, BK, KEY_MAP, DECAY)
        reach += d
    return gradient


@triton.jit
def any_flag(flags, head, first, count, HEADS):
    """Return whether a chunk of the program has strong channels in a head."""
    chunk = first + tl.arange(0, TOGETHER)
    return tl.max(tl.load(flags + chunk * HEADS + head, mask=chunk < count, other=0), axis=0) > 0


@triton.jit
def strong_pairs(
    q, k, g, factors, flags, strong, chunks, count, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_g, stride_gh,
    HEADS, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    QUERY_MAP: tl.constexpr, KEY_MAP: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Write the scores `[chunks, query heads, C, C]` of strong channels. Grid: (query heads, groups of chunks)."""
    h, start = tl.program_id(0), tl.program_id(1) * TOGETHER
    head = h // GROUP
    if any_flag(flags, head, start, count, HEADS) == 0:
        return
    token, channels = tl.arange(0, C), tl.arange(0, BK)
    for chunk in range(start, tl.minimum(start + TOGETHER, count)):
        at = (chunk * HEADS + head).to(tl.int64)
        if tl.load(flags + at) > 0:
            row = chunks + chunk * COLUMNS
            first, length = tl.load(row + START).to(tl.int64), tl.load(row + END) - tl.load(row + START)
            p_q = q + first * stride_q + h * stride_qh
            p_k, p_g = k + first * stride_k + head * stride_kh, g + first * stride_g + head * stride_gh
            query = load_query(p_q, token, channels, stride_q, token < length, K, BK, QUERY_MAP) * scale
            reach = strong_reach(factors, at, channels, C, K, BK)
            scores = strong_scores(query, reach, p_k, p_g, channels, stride_k, stride_g, length, K, BK, KEY_MAP, DECAY)
            p_scores = strong + (chunk * HEADS * GROUP + h).to(tl.int64) * C * C
            p_scores = p_scores + token[:, None] * C + token[None, :]
            tl.store(p_scores, scores.to(strong.dtype.element_ty))


@triton.jit
def strong_gradient(
    q, k, v, g, factors, flags, do, scaled_dq, scaled_dk, dg, chunks, count, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_g, stride_gh, stride_do, stride_doh,
    stride_dg, stride_dgh,
    HEADS, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    QUERY_MAP: tl.constexpr, KEY_MAP: tl.constexpr, DECAY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Turn gradients of scaled queries and keys into those of features, and add the part through `strong_pairs`.

    Grid: (KV heads, groups of chunks).
    """
    head, start = tl.program_id(0), tl.program_id(1) * TOGETHER
    if any_flag(flags, head, start, count, HEADS) == 0:
        return
    token, channels = tl.arange(0, C), tl.arange(0, BK)
    causal = token[:, None] >= token[None, :]
    later = (token[:, None] <= token[None, :]).to(tl.float32)
    for chunk in range(start, tl.minimum(start + TOGETHER, count)):
        at = (chunk * HEADS + head).to(tl.int64)
        if tl.load(flags + at) > 0:
            row = chunks + chunk * COLUMNS
            first, length = tl.load(row + START).to(tl.int64), tl.load(row + END) - tl.load(row + START)
            m_rows = token < length
            p_k, p_g = k + first * stride_k + head * stride_kh, g + first * stride_g + head * stride_gh
            p_v = v + first * stride_v + head * stride_vh
            reach = strong_reach(factors, at, channels, C, K, BK)
            key, d = load_key(p_k, p_g, token, channels, stride_k, stride_g, m_rows, K, BK, KEY_MAP, DECAY)
            r, before, after = around_middle(d, OPERAND, PRECISION)
            q_factor, k_factor, _, _, _ = around_reference(r, before, after)
            d_key = tl.zeros([C, BK], tl.float32)
            balance = tl.zeros([C, BK], tl.float32)
            for h in range(head * GROUP, (head + 1) * GROUP):
                p_q, p_do = q + first * stride_q + h * stride_qh, do + first * stride_do + h * stride_doh
                query = load_query(p_q, token, channels, stride_q, m_rows, K, BK, QUERY_MAP) * scale
                d_scores = tl.zeros([C, C], tl.float32)
                for n in range(0, tl.cdiv(V, BV)):
                    columns = n * BV + tl.arange(0, BV)
                    d_output = load_block(p_do, token, columns, stride_do, m_rows, V, 0).to(OPERAND)
                    value = load_block(p_v, token, columns, stride_v, m_rows, V, 0).to(OPERAND)
                    d_scores = tl.dot(d_output, tl.trans(value), d_scores, input_precision=PRECISION)
                d_scores = tl.where(causal, d_scores, 0.0)
                d_query = strong_query_gradient(
                    d_scores, reach, p_k, p_g, channels, stride_k, stride_g, length, K, BK, KEY_MAP, DECAY
                )
                balance += query * d_query
                d_key += strong_key_gradient(
                    d_scores, reach, p_q, p_k, p_g, channels, stride_q, stride_k, stride_g, length, scale,
                    K, BK, QUERY_MAP, KEY_MAP, DECAY,
                )  # fmt: skip
                p_dq, stride_dq = scaled_dq + (first * HEADS * GROUP + h) * K, HEADS * GROUP * K
                old = load_block(p_dq, token, channels, stride_dq, m_rows, K, BK).to(tl.float32)
                store_block(p_dq, old * q_factor + d_query, token, channels, stride_dq, m_rows, K, BK)
            p_dg = dg + first * stride_dg + head * stride_dgh
            decay = tl.dot(later, balance - key * d_key, input_precision="tf32x3")
            decay += load_block(p_dg, token, channels, stride_dg, m_rows, K, BK).to(tl.float32)
            store_block(p_dg, decay, token, channels, stride_dg, m_rows, K, BK)
            p_dk, stride_dk = scaled_dk + (first * HEADS + head) * K, HEADS * K
            old = load_block(p_dk, token, channels, stride_dk, m_rows, K, BK).to(tl.float32)
            store_block(p_dk, old * k_factor + d_key, token, channels, stride_dk, m_rows, K, BK)
