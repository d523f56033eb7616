"""The gradients of `attend`, from its normaliser and output.

Queries go through their list again. Keys gather from the blocks of queries that see them. For keys that the memory
kept, blocks are grouped into chapters whose sums are then added in a fixed order, so results are deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused.attend import far_launches, far_logits, listed, query_programs
from ligerexport.kernels.fused.candidates import (
    BLOCK,
    Candidates,
    angles,
    channels,
    kept_of,
    turn,
    window_of,
)
from ligerexport.kernels.fused.launch import launch, layout, same
from ligerexport.kernels.fused.numbers import LOG2E

CHAPTER = 4
"""Number of query blocks for which a kept key gathers its gradient in one sum."""


@triton.jit
def _store_turned_back(
    p_row, m_row, x, cos, sin, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, R: tl.constexpr
):
    """Rotate rows back by their angles and store them with the channels in their own order."""
    first, second = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
    i_first, i_second, m_pair = channels(WIDTH // 2, D, R)
    mask = m_row[:, None] & m_pair[None, :]
    b_first, b_second = first * cos + second * sin, second * cos - first * sin
    tl.store(p_row[:, None] + i_first[None, :], b_first.to(p_row.dtype.element_ty), mask=mask)
    tl.store(p_row[:, None] + i_second[None, :], b_second.to(p_row.dtype.element_ty), mask=mask)


@triton.jit
def _query_kernel(
    p_query, p_key, p_value, p_death, p_time, p_table, p_position, p_sizes, p_angles, p_output, p_gradient, p_lse,
    p_delta, p_query_gradient, gradient_b, gradient_t, gradient_h, length, blocks, plane, reach, cap, scale,
    H_KV: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, WINDOW: tl.constexpr,
    KEPT: tl.constexpr, D_K: tl.constexpr, WIDTH_K: tl.constexpr, D_V: tl.constexpr, WIDTH_V: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, FAR: tl.constexpr,
    PRECISION: tl.constexpr, SINKS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Return the gradient of queries of one block for one head, and output times gradient for the keys."""
    part, head = tl.program_id(0) // GROUP, tl.program_id(0) % GROUP
    block = part * QUERIES // BLOCK
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh, count = b * H_KV + h, SLOTS + length
    t0 = block * BLOCK
    if (tl.load(p_position + b) + t0 + BLOCK - 1 > cap) != FAR:
        return
    t = part * QUERIES + tl.arange(0, QUERIES)
    m_t = t < length
    p_query += bh * GROUP * length * WIDTH_K
    p_lse += bh * GROUP * length
    p_delta += bh * GROUP * length
    p_key += bh * count * WIDTH_K
    p_value += bh * count * WIDTH_V
    p_death += bh * count
    p_time += bh * count
    p_table += (bh * (blocks + 1) + block) * KEPT
    lane = head * length + t
    token = (b * length + t) * (H_KV * GROUP) + h * GROUP + head
    i_k, i_v = tl.arange(0, WIDTH_K), tl.arange(0, WIDTH_V)
    b_q = tl.load(p_query + lane[:, None] * WIDTH_K + i_k[None, :], mask=m_t[:, None], other=0.0)
    m_v = m_t[:, None] & (i_v < D_V)[None, :]
    p_row = p_gradient + b * gradient_b + t.to(tl.int64) * gradient_t + (h * GROUP + head) * gradient_h
    b_do = tl.load(p_row[:, None] + i_v[None, :], mask=m_v, other=0.0)
    b_o = tl.load(p_output + token[:, None] * D_V + i_v[None, :], mask=m_v, other=0.0)
    delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), axis=1) + tl.load(p_delta + lane, mask=m_t, other=0.0)
    tl.store(p_delta + lane, delta, mask=m_t)
    lse = tl.load(p_lse + lane, mask=m_t, other=0.0)

    acc = tl.zeros((QUERIES, WIDTH_K), tl.float32)
    window = window_of(p_sizes, h, WINDOW, RAGGED)
    kept = kept_of(p_sizes, h, SINKS, KEPT, RAGGED)
    for start in range(0, kept + window - 1 + BLOCK, KEYS):
        c = listed(p_table, start + tl.arange(0, KEYS), t0, window, kept, SLOTS, KEPT, BLOCK)
        m_c = (c >= 0) & (c < count)
        death = tl.load(p_death + c, mask=m_c, other=-1)
        b_k = tl.load(p_key + c[:, None] * WIDTH_K + i_k[None, :], mask=m_c[:, None], other=0.0)
        b_v = tl.load(p_value + c[:, None] * WIDTH_V + i_v[None, :], mask=m_c[:, None], other=0.0)
        sees = (c - SLOTS)[None, :] <= t[:, None]
        sees &= death[None, :] > t[:, None]
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        dp = tl.dot(b_do.to(b_v.dtype), tl.trans(b_v), input_precision=PRECISION)
        if FAR:
            time = tl.load(p_time + c, mask=m_c, other=0)
            far = sees & (t[:, None] - time[None, :] > cap)
            if tl.max(far.to(tl.int32)) > 0:
                far_s, far_k = far_logits(
                    b_q, b_k, t, time, p_angles, plane, reach, cap, QUERIES, KEYS, WIDTH_K, R, PRECISION
                )
                s = tl.where(far, far_s, s)
                p = tl.exp2(tl.where(far, s * (scale * LOG2E) - lse[:, None], float("-inf")))
                ds = p * (dp - delta[:, None])
                at_cap = tl.dot(ds.to(far_k.dtype), far_k, input_precision=PRECISION)
                cos, sin = angles(p_angles, plane, t - cap, reach, WIDTH_K // 2, R)
                acc += turn(at_cap, cos, sin, QUERIES, WIDTH_K)
                sees &= ~far
        p = tl.exp2(tl.where(sees, s * (scale * LOG2E) - lse[:, None], float("-inf")))
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(b_k.dtype), b_k, acc, input_precision=PRECISION)

    cos, sin = angles(p_angles, plane, t, reach, WIDTH_K // 2, R)
    _store_turned_back(p_query_gradient + token * D_K, m_t, acc * scale, cos, sin, QUERIES, WIDTH_K, D_K, R)


@triton.jit
def _chapter_kernel(
    p_death, p_list, p_place, count, length, blocks, chapters, back,
    SLOTS: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, CHAPTER: tl.constexpr, KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """List the new tokens that some block of a chapter sees from more than `back` blocks away, and their places."""
    chapter, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, last = chapter * CHAPTER, tl.minimum(chapter * CHAPTER + CHAPTER, blocks) - 1
    p_row = p_list + (bh * chapters + chapter) * CAPACITY
    found = 0
    for start in range(0, length, COLUMNS):
        t = start + tl.arange(0, COLUMNS)
        reader = tl.maximum(first, t // BLOCK + back + 1)
        death = tl.load(p_death + bh * count + SLOTS + t, mask=t < length, other=-1)
        read = ((reader <= last) & (death > reader * BLOCK)).to(tl.int32)
        place = found + tl.cumsum(read, axis=0) - 1
        tl.store(p_row + place, t, mask=(read > 0) & (place < CAPACITY))
        tl.store(p_place + (bh * chapters + chapter) * length + t, tl.where(read > 0, place, -1), mask=t < length)
        found += tl.sum(read)
    for start in range(found // KEYS * KEYS, CAPACITY, KEYS):
        i = start + tl.arange(0, KEYS)
        tl.store(p_row + i, -1, mask=(i >= found) & (i < CAPACITY))


@triton.jit
def _gather(
    b_k, b_v, token, death, b_dk, b_dv, t0, head, b, bh, p_query, p_gradient, p_lse, p_delta, p_angles,
    gradient_b, gradient_t, gradient_h, length, plane, reach, cap, scale, back,
    H_KV: tl.constexpr, GROUP: tl.constexpr, KEPT_PART: tl.constexpr, WIDTH_K: tl.constexpr, D_V: tl.constexpr,
    WIDTH_V: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    FAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one head's queries from `t0` on to the gradients of keys and values."""
    i_k, i_v = tl.arange(0, WIDTH_K), tl.arange(0, WIDTH_V)
    t = t0 + tl.arange(0, QUERIES)
    m_t = t < length
    row = bh * GROUP + head
    p_lse += row * length
    p_delta += row * length
    p_query += row * length * WIDTH_K
    p_gradient += b * gradient_b + ((bh % H_KV) * GROUP + head) * gradient_h
    b_q = tl.load(p_query + t[:, None] * WIDTH_K + i_k[None, :], mask=m_t[:, None], other=0.0)
    b_do = tl.load(
        p_gradient + (t * gradient_t)[:, None] + i_v[None, :], mask=m_t[:, None] & (i_v < D_V)[None, :], other=0.0
    ).to(b_v.dtype)
    lse = tl.load(p_lse + t, mask=m_t, other=0.0)
    delta = tl.load(p_delta + t, mask=m_t, other=0.0)
    sees = (token[:, None] <= t[None, :]) & (death[:, None] > t[None, :]) & m_t[None, :]
    if KEPT_PART:
        sees &= (t0 // BLOCK - token // BLOCK > back)[:, None]
    s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    p = tl.zeros((KEYS, QUERIES), tl.float32)
    if FAR:
        far = sees & (t[None, :] - token[:, None] > cap)
        if tl.max(far.to(tl.int32)) > 0:
            # the same as `far_logits`, with the sides exchanged
            cos, sin = angles(p_angles, plane, cap - t, reach, WIDTH_K // 2, R)
            far_q = turn(b_q, cos, sin, QUERIES, WIDTH_K).to(b_q.dtype)
            cos, sin = angles(p_angles, plane, -token, reach, WIDTH_K // 2, R)
            far_k = turn(b_k, cos, sin, KEYS, WIDTH_K).to(b_k.dtype)
            far_s = tl.dot(far_k, tl.trans(far_q), input_precision=PRECISION)
            p = tl.exp2(tl.where(far, far_s * (scale * LOG2E) - lse[None, :], float("-inf")))
            ds = p * (dp - delta[None, :])
            at_cap = tl.dot(ds.to(far_q.dtype), far_q, input_precision=PRECISION)
            b_dk += turn(at_cap, cos, -sin, KEYS, WIDTH_K)
            sees &= ~far
    near_p = tl.exp2(tl.where(sees, s * (scale * LOG2E) - lse[None, :], float("-inf")))
    ds = near_p * (dp - delta[None, :])
    b_dk = tl.dot(ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    b_dv = tl.dot((p + near_p).to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def _kept_kernel(
    p_query, p_key, p_value, p_death, p_angles, p_gradient, p_lse, p_delta, p_position, p_list, p_part_k, p_part_v,
    gradient_b, gradient_t, gradient_h, length, blocks, chapters, back, plane, reach, cap, scale,
    H_KV: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, WIDTH_K: tl.constexpr, D_V: tl.constexpr,
    WIDTH_V: tl.constexpr, R: tl.constexpr, CAPACITY: tl.constexpr, CHAPTER: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gather the gradients of up to `KEYS` keys of a chapter's list from all blocks of the chapter."""
    parts: tl.constexpr = CAPACITY // KEYS
    tiles: tl.constexpr = BLOCK // QUERIES
    chapter, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh, count = b * H_KV + h, SLOTS + length
    first = chapter * CHAPTER
    last = tl.minimum(first + CHAPTER, blocks) - 1
    if (tl.load(p_position + b) + last * BLOCK + BLOCK - 1 > cap) != FAR:
        return
    row = (bh * chapters + chapter) * CAPACITY + part * KEYS + tl.arange(0, KEYS)
    token = tl.load(p_list + row)
    m_c = token >= 0
    if tl.max(m_c.to(tl.int32)) > 0:
        i_k, i_v = tl.arange(0, WIDTH_K), tl.arange(0, WIDTH_V)
        lane = bh * count + SLOTS + token
        b_k = tl.load(p_key + lane[:, None] * WIDTH_K + i_k[None, :], mask=m_c[:, None], other=0.0)
        b_v = tl.load(p_value + lane[:, None] * WIDTH_V + i_v[None, :], mask=m_c[:, None], other=0.0)
        death = tl.load(p_death + lane, mask=m_c, other=-1)
        b_dk = tl.zeros((KEYS, WIDTH_K), tl.float32)
        b_dv = tl.zeros((KEYS, WIDTH_V), tl.float32)
        for step in range(0, (last - first + 1) * tiles * GROUP):
            t0 = first * BLOCK + step // GROUP * QUERIES
            b_dk, b_dv = _gather(
                b_k, b_v, token, death, b_dk, b_dv, t0, step % GROUP, b, bh, p_query, p_gradient, p_lse,
                p_delta, p_angles, gradient_b, gradient_t, gradient_h, length, plane, reach, cap, scale, back,
                H_KV, GROUP, True, WIDTH_K, D_V, WIDTH_V, R, BLOCK, KEYS, QUERIES, FAR, PRECISION,
            )  # fmt: skip
        tl.store(p_part_k + row[:, None] * WIDTH_K + i_k[None, :], b_dk, mask=m_c[:, None])
        tl.store(p_part_v + row[:, None] * WIDTH_V + i_v[None, :], b_dv, mask=m_c[:, None])


@triton.jit
def _near_kernel(
    p_query, p_key, p_value, p_death, p_angles, p_gradient, p_lse, p_delta, p_place, p_part_k, p_part_v,
    p_key_gradient, p_value_gradient, gradient_b, gradient_t, gradient_h, length, blocks, chapters, back, plane, reach,
    cap, scale,
    H_KV: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, D_K: tl.constexpr, WIDTH_K: tl.constexpr,
    D_V: tl.constexpr, WIDTH_V: tl.constexpr, R: tl.constexpr, CAPACITY: tl.constexpr, CHAPTER: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the chapters' parts for some keys of a block, gather from the blocks close by, and write the gradients."""
    tiles: tl.constexpr = BLOCK // QUERIES
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    block = tl.program_id(0) * KEYS // BLOCK
    bh, count = b * H_KV + h, SLOTS + length
    token = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    m_c = token < length
    i_k, i_v = tl.arange(0, WIDTH_K), tl.arange(0, WIDTH_V)
    lane = bh * count + SLOTS + token
    b_dk = tl.zeros((KEYS, WIDTH_K), tl.float32)
    b_dv = tl.zeros((KEYS, WIDTH_V), tl.float32)
    death = tl.load(p_death + lane, mask=m_c, other=-1)
    if CAPACITY > 0:
        stop = tl.minimum((tl.max(death) - 1) // (CHAPTER * BLOCK) + 1, chapters)  # no query sees a key after its death
        for chapter in range((block + back + 1) // CHAPTER, stop):
            place = tl.load(p_place + (bh * chapters + chapter) * length + token, mask=m_c, other=-1)
            if tl.max(place) >= 0:
                row = ((bh * chapters + chapter) * CAPACITY + place)[:, None]
                b_dk += tl.load(p_part_k + row * WIDTH_K + i_k[None, :], mask=(place >= 0)[:, None], other=0.0)
                b_dv += tl.load(p_part_v + row * WIDTH_V + i_v[None, :], mask=(place >= 0)[:, None], other=0.0)
    b_k = tl.load(p_key + lane[:, None] * WIDTH_K + i_k[None, :], mask=m_c[:, None], other=0.0)
    b_v = tl.load(p_value + lane[:, None] * WIDTH_V + i_v[None, :], mask=m_c[:, None], other=0.0)
    last = tl.minimum(block + back + 1, blocks)
    last = tl.minimum(last, (tl.max(death) - 1) // BLOCK + 1)  # no query sees a key after its death
    for step in range(0, (last - block) * tiles * GROUP):
        t0 = block * BLOCK + step // GROUP * QUERIES
        b_dk, b_dv = _gather(
            b_k, b_v, token, death, b_dk, b_dv, t0, step % GROUP, b, bh, p_query, p_gradient, p_lse,
            p_delta, p_angles, gradient_b, gradient_t, gradient_h, length, plane, reach, cap, scale, back,
            H_KV, GROUP, False, WIDTH_K, D_V, WIDTH_V, R, BLOCK, KEYS, QUERIES, FAR, PRECISION,
        )  # fmt: skip
    row = (b * length + token) * H_KV + h
    cos, sin = angles(p_angles, plane, token, reach, WIDTH_K // 2, R)
    _store_turned_back(p_key_gradient + row * D_K, m_c, b_dk * scale, cos, sin, KEYS, WIDTH_K, D_K, R)
    p_to = p_value_gradient + row[:, None] * D_V + i_v[None, :]
    tl.store(p_to, b_dv.to(p_value_gradient.dtype.element_ty), mask=m_c[:, None] & (i_v < D_V)[None, :])


def backward_tiles(width: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Return the tile sizes of the gradient's kernels for a width of heads."""
    single = dtype == torch.float32
    if not single and width <= 128:
        sizes = {"QUERIES": 64, "KEYS": 64, "num_warps": 4}
        return {"query": {**sizes, "num_stages": 1}, "keys": {**sizes, "num_stages": 2}}
    common = {"num_warps": 8, "num_stages": 1}
    if not single or width <= 128:
        return {"query": {"QUERIES": 64, "KEYS": 32, **common}, "keys": {"QUERIES": 32, "KEYS": 32, **common}}
    return {"query": {"QUERIES": 32, "KEYS": 16, **common}, "keys": {"QUERIES": 16, "KEYS": 32, **common}}


def attend_backward(
    found: Candidates,
    death: Tensor,
    table: Tensor,
    output: Tensor,
    lse: Tensor,
    gradient: Tensor,
    lse_gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients `[B, T, H, d]` of query, key and value of the call's tokens.

    `lse_gradient` is the gradient of the base-2 normalisers, None for zero.
    """
    batch, length, q_heads, d_v = output.shape
    kv_heads, width_k, width_v = found.key.shape[1], found.key.shape[3], found.value.shape[3]
    spec, config, blocks = found.spec, found.spec.config, found.blocks
    tile = backward_tiles(max(width_k, width_v), output.dtype)
    # the kernel adds output times gradient, and subtracts the sum from the gradient of each weight
    delta = torch.zeros_like(lse) if lse_gradient is None else lse_gradient / -math.log(2)
    delta = delta.contiguous()
    grad_q = output.new_empty(batch, length, q_heads, spec.d_k)
    grad_k = output.new_empty(batch, length, kv_heads, spec.d_k)
    grad_v = output.new_empty(batch, length, kv_heads, d_v)
    turns, call = (found.angles.stride(0), found.reach), same(found.call, layout(gradient))
    shape = {
        "H_KV": kv_heads, "GROUP": q_heads // kv_heads, "SLOTS": config.num_slots, "WIDTH_K": width_k, "D_V": d_v,
        "WIDTH_V": width_v, "R": found.angles.shape[2], "BLOCK": BLOCK, "PRECISION": found.precision,
    }  # fmt: skip
    for far, cap in far_launches(found, config.kept):
        launch(
            (call, far), _query_kernel, (query_programs(found, tile["query"]), kv_heads, batch),
            found.query, found.key, found.value, death, found.time, table, found.position, found.sizes, found.angles,
            output, gradient, lse, delta, grad_q, *gradient.stride()[:3], length, blocks, *turns, cap, spec.scale,
            constants=lambda: {
                "WINDOW": config.window, "KEPT": config.kept, "D_K": spec.d_k, "FAR": far, "SINKS": config.sinks,
                "RAGGED": found.ragged, **shape, **tile["query"],
            },
        )  # fmt: skip

    common = (found.query, found.key, found.value, death, found.angles, gradient, lse, delta)
    kept = _kept_gradients(found, call, common, shape | tile["keys"])
    back = triton.cdiv(config.window - 1, BLOCK)
    launch(
        call, _near_kernel, (triton.cdiv(length, tile["keys"]["KEYS"]), kv_heads, batch),
        *common, kept.place, kept.key, kept.value, grad_k, grad_v, *gradient.stride()[:3], length, blocks,
        kept.place.shape[2], back, *turns, spec.max_distance, spec.scale,
        constants=lambda: {
            "D_K": spec.d_k, "CAPACITY": kept.key.shape[3], "CHAPTER": CHAPTER,
            "FAR": spec.max_distance < (back + 2) * BLOCK, **shape, **tile["keys"],
        },
    )  # fmt: skip
    return grad_q, grad_k, grad_v


class _Kept(NamedTuple):
    """Gradients of kept keys from distant blocks of queries, summed by chapter.

    Attributes:
        key: `[B, H_kv, chapters, capacity, width]` fp32.
        value: `[B, H_kv, chapters, capacity, width]` fp32.
        place: `[B, H_kv, chapters, T]` int32, the place of each token in the chapter's list.
    """

    key: Tensor
    value: Tensor
    place: Tensor


def _kept_gradients(found: Candidates, call: Hashable, common: tuple[Tensor, ...], constants: dict[str, Any]) -> _Kept:
    """Sum the gradients of kept keys by chapter; `common` holds the first arguments of kernels that gather."""
    death, gradient, config, blocks = common[3], common[5], found.spec.config, found.blocks
    batch, kv_heads, _, width_k = found.key.shape
    back = triton.cdiv(config.window - 1, BLOCK)
    chapters = triton.cdiv(blocks, CHAPTER) if config.kept and blocks > back + 1 else 0
    most, keys = config.kept + (CHAPTER - 1) * min(BLOCK, config.kept), constants["KEYS"]
    capacity = triton.cdiv(most, keys) * keys if chapters else 0
    parts, device = (batch, kv_heads, chapters, capacity), gradient.device
    kept = _Kept(
        torch.empty(*parts, width_k, dtype=torch.float32, device=device),
        torch.empty(*parts, found.value.shape[3], dtype=torch.float32, device=device),
        torch.empty(batch, kv_heads, chapters, found.length, dtype=torch.int32, device=device),
    )
    if not chapters:
        return kept
    chapter_list = torch.empty(parts, dtype=torch.int32, device=device)
    launch(
        call, _chapter_kernel, (chapters, batch * kv_heads, 1),
        death, chapter_list, kept.place, found.count, found.length, blocks, chapters, back,
        constants=lambda: {
            "SLOTS": config.num_slots, "CAPACITY": capacity, "BLOCK": BLOCK, "CHAPTER": CHAPTER, "KEYS": keys,
            "COLUMNS": 1024, "num_warps": 4,
        },
    )  # fmt: skip
    for far, cap in far_launches(found, config.kept):
        launch(
            (call, far), _kept_kernel, (chapters * (capacity // keys), kv_heads, batch),
            *common, found.position, chapter_list, kept.key, kept.value, *gradient.stride()[:3], found.length, blocks,
            chapters, back, found.angles.stride(0), found.reach, cap, found.spec.scale,
            constants=lambda: {"CAPACITY": capacity, "CHAPTER": CHAPTER, "FAR": far, **constants},
        )  # fmt: skip
    return kept
