"""`ligerexport.kernels.evicted` for a whole chunk in kernels only, without a gradient and without torch in between.

The deaths of candidates give the token that each step evicts. A running sum of features is the sum of the blocks before
and a sum within the block. The kernels of linear attention read the values, with queries divided by the count, since
the sum of many thousand values exceeds fp16.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused import linear_attention
from ligerexport.kernels.fused.candidates import EMPTY, NEVER
from ligerexport.kernels.fused.evicted_step import rotary_places, slow_turn
from ligerexport.kernels.fused.memory_attention import Attended
from ligerexport.kernels.fused.numbers import LN2, LOG2E
from ligerexport.model.state import MixerSpec, MixerState


def evicted_prefill(
    query: Tensor, key: Tensor, attended: Attended, state: MixerState, spec: MixerSpec, rotary: Tensor
) -> MixerState:
    """Add the evicted tokens to `attended.output`, in place.

    Args:
        query: `[B, T, H_q, d_k]`, any strides with a contiguous last axis, before rotary embedding.
        key: `[B, T, H_kv, d_k]`, likewise.
        attended: Result of `memory_attention.forward` for them.
        state: Slots, recurrent state and mass before the call.
        rotary: The same as in `prefill`.

    Returns:
        The new state and mass.
    """
    found = attended.found
    assert found is not None
    batch, tokens, q_heads, d_k = query.shape
    kv_heads, slots, d_v = spec.kv_heads, spec.config.num_slots, spec.d_v
    width = triton.next_power_of_2(d_k)
    block = 64 if width <= 64 else 32  # tokens per program
    blocks, dtype = triton.cdiv(tokens, block), query.dtype
    lost = torch.zeros(batch, kv_heads, tokens, dtype=torch.int32, device=query.device)
    feature = query.new_empty(batch, tokens, kv_heads, d_k)
    value = query.new_empty(batch, tokens, kv_heads, d_v)
    totals = query.new_empty(batch, kv_heads, blocks, d_k, dtype=torch.float32)
    # queries divided by the count exceed the range of fp16
    wanted = query.new_empty(query.shape, dtype=torch.bfloat16 if dtype == torch.float16 else dtype)
    share = query.new_empty(batch, tokens, q_heads, dtype=torch.float32)
    mass = torch.empty_like(state["recurrent_mass"])
    places, slow_sine = rotary_places(spec, rotary)
    common = {"H": kv_heads, "D_K": d_k, "DK_PAD": width, "BLOCK": block, **places}
    _lost_kernel[(triton.cdiv(found.count, 128), kv_heads, batch)](
        attended.death, found.time, lost, found.count, tokens, H=kv_heads, BLOCK=128, num_warps=4
    )
    _gather_kernel[(blocks, kv_heads, batch)](
        key, state["slot_key"], found.value, found.source, lost, rotary, feature, value, totals,
        *key.stride()[:3], slow_sine, tokens, blocks, found.count, SLOTS=slots, D_V=d_v, WIDTH_V=found.value.shape[3],
        **common, num_warps=4,
    )  # fmt: skip
    _features_kernel[(blocks, kv_heads, batch)](
        query, rotary, feature, totals, state["recurrent_mass"], attended.lse, wanted, share, mass,
        *query.stride()[:3], spec.scale, math.log2(spec.config.recurrence_weight), slow_sine, tokens, blocks,
        G=q_heads // kv_heads, **common, num_warps=8,
    )  # fmt: skip
    open_gate = torch.zeros_like(feature)
    read, final, _ = linear_attention.forward(
        wanted, feature, value, open_gate, state["recurrent_state"], None, None, 1.0
    )
    _join_kernel[(tokens, batch)](
        attended.output, read, share, tokens, HEADS=q_heads, D_V=d_v,
        BLOCK=min(1024, triton.next_power_of_2(q_heads * d_v)), num_warps=4,
    )  # fmt: skip
    return {"recurrent_state": final, "recurrent_mass": mass}


@triton.jit
def _lost_kernel(p_death, p_time, p_lost, count, tokens, H: tl.constexpr, BLOCK: tl.constexpr):
    """Write 1 + the index of the candidate that each step evicts. Grid: (C / BLOCK, H, B)."""
    bh = tl.program_id(2).to(tl.int64) * H + tl.program_id(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    death = tl.load(p_death + bh * count + c, mask=c < count, other=NEVER)
    time = tl.load(p_time + bh * count + c, mask=c < count, other=EMPTY)
    tl.store(p_lost + bh * tokens + death, c + 1, mask=(time != EMPTY) & (death >= 0) & (death < tokens))


@triton.jit
def _gather_kernel(
    p_key, p_slot_key, p_values, p_source, p_lost, p_rotary, p_feature, p_value, p_totals,
    key_b, key_t, key_h, slow_sine, tokens, blocks, count,
    H: tl.constexpr, SLOTS: tl.constexpr, D_K: tl.constexpr, DK_PAD: tl.constexpr, D_V: tl.constexpr,
    WIDTH_V: tl.constexpr, R: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write features and values of the tokens that a block evicts, and the features' sum. Grid: (blocks, H, B)."""
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh = b * H + h
    t = block * BLOCK + tl.arange(0, BLOCK)
    m_t = t < tokens
    c = tl.load(p_lost + bh * tokens + t, mask=m_t, other=0) - 1
    old, new = (c >= 0) & (c < SLOTS), c >= SLOTS
    o_k, o_v = tl.arange(0, DK_PAD), tl.arange(0, WIDTH_V)
    _, _, slow, _, _ = slow_turn(p_rotary, slow_sine, o_k, o_k < D_K, R, NEAR, FAR, TABLE)
    source = bh * SLOTS + tl.load(p_source + bh * SLOTS + c, mask=old, other=0)
    carried = tl.load(p_slot_key + source[:, None] * D_K + o_k[None, :], mask=old[:, None] & slow[None, :], other=0.0)
    p_new = p_key + b * key_b + h * key_h + (c - SLOTS).to(tl.int64)[:, None] * key_t + o_k[None, :]
    arrived = tl.load(p_new, mask=new[:, None] & slow[None, :], other=0.0)
    feature = tl.where(old[:, None], carried.to(tl.float32), arrived.to(tl.float32))
    feature += tl.where((o_k == 0)[None, :] & (c >= 0)[:, None], 1.0, 0.0)
    to = (b * tokens + t) * H + h
    m_k = m_t[:, None] & (o_k < D_K)[None, :]
    tl.store(p_feature + to[:, None] * D_K + o_k[None, :], feature.to(p_feature.dtype.element_ty), mask=m_k)
    tl.store(p_totals + (bh * blocks + block) * D_K + o_k, tl.sum(feature, axis=0), mask=o_k < D_K)
    p_from = p_values + (bh * count + c)[:, None] * WIDTH_V + o_v[None, :]
    value = tl.load(p_from, mask=(c >= 0)[:, None], other=0.0)
    m_v = m_t[:, None] & (o_v < D_V)[None, :]
    tl.store(p_value + to[:, None] * D_V + o_v[None, :], value.to(p_value.dtype.element_ty), mask=m_v)


@triton.jit
def _features_kernel(
    p_query, p_rotary, p_feature, p_totals, p_mass, p_lse, p_wanted, p_share, p_new_mass,
    query_b, query_t, query_h, scale, log2_weight, slow_sine, tokens, blocks,
    H: tl.constexpr, G: tl.constexpr, D_K: tl.constexpr, DK_PAD: tl.constexpr, R: tl.constexpr, NEAR: tl.constexpr,
    FAR: tl.constexpr, TABLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the features of the queries of a block, and the evicted tokens' share. Grid: (blocks, H, B)."""
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh = b * H + h
    t = block * BLOCK + tl.arange(0, BLOCK)
    m_t = t < tokens
    o_k = tl.arange(0, DK_PAD)
    m_k = o_k < D_K
    cos, sin, slow, turns, other = slow_turn(p_rotary, slow_sine, o_k, m_k, R, NEAR, FAR, TABLE)
    before = tl.load(p_mass + bh * D_K + o_k, mask=m_k, other=0.0)
    for start in range(0, block, 16):
        earlier = start + tl.arange(0, 16)
        p_earlier = p_totals + (bh * blocks + earlier)[:, None] * D_K + o_k[None, :]
        before += tl.sum(tl.load(p_earlier, mask=(earlier < block)[:, None] & m_k[None, :], other=0.0), axis=0)
    at = ((b * tokens + t) * H + h)[:, None] * D_K + o_k[None, :]
    feature = tl.load(p_feature + at, mask=m_t[:, None] & m_k[None, :], other=0.0).to(tl.float32)
    sums = before[None, :] + tl.cumsum(feature, axis=0)
    if block == blocks - 1:
        last = tl.sum(tl.where((t == tokens - 1)[:, None], sums, 0.0), axis=0)
        tl.store(p_new_mass + bh * D_K + o_k, last, mask=m_k)
    one = tl.where(o_k == 0, 1.0, 0.0)
    count = tl.sum(sums * one[None, :], axis=1)
    some = tl.maximum(count, 1.0)
    for g in tl.static_range(G):
        head = h * G + g
        p_row = p_query + b * query_b + t.to(tl.int64)[:, None] * query_t + head * query_h
        b_q = tl.load(p_row + o_k[None, :], mask=m_t[:, None] & slow[None, :], other=0.0).to(tl.float32)
        b_other = tl.load(p_row + other[None, :], mask=m_t[:, None] & turns[None, :], other=0.0).to(tl.float32)
        turned = scale * (b_q * cos[None, :] + b_other * sin[None, :])
        mean = tl.sum(turned * sums, axis=1) / some
        wanted = (turned + (1.0 - mean)[:, None] * one[None, :]) / some[:, None]
        row = (b * tokens + t) * (H * G) + head
        m_to = m_t[:, None] & m_k[None, :]
        tl.store(p_wanted + row[:, None] * D_K + o_k[None, :], wanted.to(p_wanted.dtype.element_ty), mask=m_to)
        normaliser = tl.load(p_lse + (b * (H * G) + head) * tokens + t, mask=m_t, other=0.0)
        logit = mean * LOG2E + tl.log2(some) + log2_weight - normaliser
        share = tl.where(count > 0, tl.sigmoid(logit * LN2), 0.0)
        tl.store(p_share + row, share, mask=m_t)


@triton.jit
def _join_kernel(
    p_mixed, p_read, p_share, tokens, HEADS: tl.constexpr, D_V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Mix the answer of the state into the softmax's output, in place. Grid: (T, B)."""
    row = tl.program_id(1).to(tl.int64) * tokens + tl.program_id(0)
    for start in tl.static_range(0, HEADS * D_V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < HEADS * D_V
        share = tl.load(p_share + row * HEADS + i // D_V, mask=mask, other=0.0)
        mixed = tl.load(p_mixed + row * (HEADS * D_V) + i, mask=mask, other=0.0).to(tl.float32)
        read = tl.load(p_read + row * (HEADS * D_V) + i, mask=mask, other=0.0).to(tl.float32)
        joined = tl.where(share > 0, mixed + share * (read - mixed), mixed)
        tl.store(p_mixed + row * (HEADS * D_V) + i, joined.to(p_mixed.dtype.element_ty), mask=mask)
