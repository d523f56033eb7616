"""One token of every sequence for KV heads with memories of their own sizes, in place, in two launches.

The work is split over slots and not over heads. In the first launch, each program attends over one tile, some slots of
one head. It leaves out the slot that would lose its place if it had to be one of this tile, and reports that slot's
rank and logits. In the second launch, each program computes some value channels of one head. It finds the slot that
loses its place, adds up the tiles and all other slots that were left out, in a fixed order, and stores the new token.
The slots are an unordered set here.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused.launch import launch, layout, same
from ligerexport.kernels.fused.numbers import LOG2E
from ligerexport.kernels.library.memory_attention import BLOCK
from ligerexport.kernels.tuning import cdiv, padded, power_of_two
from ligerexport.model.state import MOST, MixerSpec, MixerState

LARGEST_CODE = tl.constexpr(float(MOST))
SMALLEST = tl.constexpr(torch.finfo(torch.float16).tiny)
LARGEST = tl.constexpr(torch.finfo(torch.float16).max)
ROUNDER = tl.constexpr(1.5 * 2**23)
"""Added to a number of at most 2^22 in fp32, it leaves no bits for a fraction."""
RADIANS = tl.constexpr(2 * math.pi / 2**32)
"""The unit of angles in the integers that hold a turn."""
NONE = tl.constexpr(2**63 - 1)
"""Stands for no slot, and ranks above all slots."""
FIELDS = tl.constexpr(8)
"""Numbers in a row of the tables and in what a tile reports."""


class _Plan(NamedTuple):
    """How a layer is divided.

    Attributes:
        tiles: `[tiles, FIELDS]`: head, first slot, slots, window, size of the pool, first score minus first slot.
        heads: `[H_kv, FIELDS]`: first tile, tiles, last slot, size of the pool, first score minus first slot.
        most: Tiles of the largest head.
        slots: Slots of all heads.
        scored: Slots of the heads that keep scores.
    """

    tiles: Tensor
    heads: Tensor
    most: int
    slots: int
    scored: int


@cache
def plan_on(text: str, block: int, device: torch.device) -> _Plan:
    """Return how the layer `MixerSpec.text` is divided into tiles of at most `block` slots."""
    spec = MixerSpec.from_text(text)
    pools = [sum(count for _, count in head.config.slots) for head in spec.heads]
    ends = list(accumulate(spec.slots_per_head))
    tiles: list[tuple[int, ...]] = []
    heads: list[tuple[int, ...]] = []
    scored = 0
    for head, (slots, end, pool) in enumerate(zip(spec.slots_per_head, ends, pools, strict=True)):
        start, first, shift = end - slots, len(tiles), scored - (end - slots)
        for at in range(start, end, block):
            tiles.append((head, at, min(block, end - at), spec.heads[head].config.window, pool, shift))
        heads.append((first, len(tiles) - first, end - 1, pool, shift))
        scored += slots if pool else 0

    def table(rows: list[tuple[int, ...]]) -> Tensor:
        full = [(*row, *[0] * (FIELDS.value - len(row))) for row in rows]
        return torch.tensor(full, dtype=torch.int32, device=device)

    return _Plan(table(tiles), table(heads), max(count for _, count, *_ in heads), ends[-1], scored)


def choose_block(spec: MixerSpec, batch: int) -> int:
    """Return the number of slots in a tile: as many as leave work for a whole GPU, by measurements on an H200."""
    slots = batch * sum(spec.slots_per_head)
    return next((block for block in (256, 128) if slots >= 600 * block), 64)


def ragged_step(
    heads: tuple[Tensor, Tensor, Tensor],
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
    index: Tensor | None = None,
    out: Tensor | None = None,
    block: int | None = None,
    score: Tensor | None = None,
) -> Tensor:
    """Mix one token of every sequence and update its state in place.

    Arguments and result are those of `ligerexport.kernels.library.mixer_step`, except these.

    Args:
        heads: Query, key and value, with any strides and a contiguous last axis.
        out: `[B, H_q, d_v]`, contiguous, to write to.
        block: Number of slots in a tile, a power of two from 16; None for `choose_block`.
        rotary: With the row of turns, which the angles come from: reading as many rows as slots took most of the time.

    Raises:
        ValueError: The table has no row of turns.
    """
    if rotary.shape[1] != spec.max_distance + BLOCK + 1:
        raise ValueError(
            f"rotary must have {spec.max_distance + BLOCK + 1} rows, the last of turns; it has {rotary.shape[1]}"
        )
    (query, key, value), position = heads, position.contiguous()
    index, score = (None if x is None else x.contiguous() for x in (index, score))
    batch, group, rotated = query.shape[0], spec.q_heads // spec.kv_heads, rotary.shape[-1]
    out = query.new_empty(batch, spec.q_heads, spec.d_v) if out is None else out
    block = block or choose_block(spec, batch)
    plan = plan_on(spec.text, block, query.device)
    half = query.element_size() == 2 and not triton.knobs.runtime.interpret
    # per tile: the weighted sum of values `[G, d_v]`, and largest logit, sum of weights and logit left out, each `[G]`
    width = cdiv(group * (spec.d_v + 3), 32) * 32
    sums = torch.empty(batch * len(plan.tiles), width, dtype=torch.float32, device=query.device)
    found = torch.empty(batch * len(plan.tiles), FIELDS.value, dtype=torch.int64, device=query.device)
    slots = [state.get(f"slot_{name}") for name in ("key", "value", "key_scale", "value_scale", "position", "score")]
    call = same(layout(query, key, value, position, index, rotary, score, out, *slots), spec.text, block)
    scale2, d_v, few = spec.scale * LOG2E.value, padded(spec.d_v), batch * spec.kv_heads < 128
    shape = {"G": group, "D_K": spec.d_k, "D_V": spec.d_v, "WIDTH": width}
    launch(
        call, _tiles_kernel, (len(plan.tiles), batch, 1),
        query, position, index, rotary, *slots, plan.tiles, sums, found, query.stride(0), query.stride(1), scale2,
        plan.slots, plan.scored,
        constants=lambda: shape | {
            "DV_PAD": d_v, "R": rotated, "R_PAD": padded(rotated), "BLOCK_R": min(32, padded(rotated)),
            "REST_PAD": padded(spec.d_k - 2 * rotated) if spec.d_k > 2 * rotated else 0, "CAP": spec.max_distance,
            "TABLE": rotary.shape[1] * rotated, "SINKS": spec.config.sinks,
            "G_PAD": max(8, power_of_two(group)), "TILE": block,
            "N": _part(block, query, max(padded(spec.d_k), d_v)), "HALF": half,
            "CODED": half and spec.config.state_dtype == "int8", "PRECISION": _precision(query.dtype), "num_warps": 4,
            "num_stages": 1,  # more copy the slots through shared memory, and took half as long again
        },
    )  # fmt: skip
    columns = min(32, d_v) if few else d_v
    lanes = power_of_two(group)
    launch(
        call, _heads_kernel, (cdiv(spec.d_v, columns), spec.kv_heads, batch),
        query, key, value, position, index, score, out, *slots, plan.heads, sums, found,
        *(x.stride(axis) for x in heads for axis in (0, 1)), scale2, spec.config.attention_weight,
        len(plan.tiles), plan.slots, plan.scored,
        constants=lambda: shape | {
            "H": spec.kv_heads, "G_PAD": lanes, "DK_PAD": power_of_two(spec.d_k), "DV_PAD": d_v,
            "T_PAD": power_of_two(plan.most), "COLUMNS": columns,
            "BLOCK_T": max(1, 4096 // (lanes * columns)), "num_warps": 4,
        },
    )  # fmt: skip
    return out


def _precision(dtype: torch.dtype) -> str:
    """Return how `tl.dot` multiplies fp32; the interpreter knows one way."""
    return "ieee" if triton.knobs.runtime.interpret else "tf32x3" if dtype == torch.float32 else "tf32"


def _part(block: int, query: Tensor, width: int) -> int:
    """Return the slots of a tile that are read at a time, so that their keys and values fit into the registers."""
    return min(block, 64, (1 << 14) // (width * query.element_size()))


@triton.jit
def _tiles_kernel(
    p_query, p_position, p_index, p_rotary, p_slot_key, p_slot_value, p_key_scale, p_value_scale, p_slot_position,
    p_slot_score, p_tiles, p_sums, p_found, s_query_b, s_query_h, scale2, slots, scored,
    G: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr, WIDTH: tl.constexpr, DV_PAD: tl.constexpr, R: tl.constexpr,
    R_PAD: tl.constexpr, BLOCK_R: tl.constexpr, REST_PAD: tl.constexpr, CAP: tl.constexpr, TABLE: tl.constexpr,
    SINKS: tl.constexpr, G_PAD: tl.constexpr, TILE: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr,
    CODED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend over one tile of one sequence, N slots at a time, without its worst slot.

    With `CODED`, codes of 8 bits are multiplied in fp16, which holds them without error and has the fraction of tf32.
    """
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    now = tl.load(p_position + b).to(tl.int32)
    row = b
    if p_index is not None:
        row = tl.load(p_index + b).to(tl.int64)
    if (row < 0) | (now < 0):
        return
    unit = b * tl.num_programs(0) + tile
    p_tiles += tile * FIELDS
    h, first, count = tl.load(p_tiles), tl.load(p_tiles + 1), tl.load(p_tiles + 2)
    window, pool, shift = tl.load(p_tiles + 3), tl.load(p_tiles + 4), tl.load(p_tiles + 5)
    start = row * slots + first
    o_g, o_r, o_n = tl.arange(0, G_PAD), tl.arange(0, BLOCK_R), tl.arange(0, N)
    o_v, o_t = tl.arange(0, DV_PAD), tl.arange(0, TILE)
    m_g, m_v, m_t = o_g < G, o_v < D_V, o_t < count

    # The queries, with a column for each head.
    kind: tl.constexpr = tl.float16 if CODED else tl.float32
    p_q, m_q = p_query + b * s_query_b + (h * G + o_g)[None, :] * s_query_h, m_g[None, :]
    q_first, q_second, per_token = tl.tuple([]), tl.tuple([]), tl.tuple([])
    q_rest, o_e = o_r, o_r  # others below, if some channels are not rotated
    p_turns = p_rotary + TABLE - R + o_r[None, :]  # the last row
    for i in tl.static_range(R_PAD // BLOCK_R):
        o_q = (o_r + i * BLOCK_R)[:, None]
        q_first += (operand(tl.load(p_q + o_q, mask=(o_q < R) & m_q, other=0.0), kind),)
        q_second += (operand(tl.load(p_q + R + o_q, mask=(o_q < R) & m_q, other=0.0), kind),)
        m_turns = (o_r + i * BLOCK_R < R)[None, :]
        high = tl.load(p_turns + i * BLOCK_R, mask=m_turns, other=0.0)
        low = tl.load(p_turns + TABLE + i * BLOCK_R, mask=m_turns, other=0.0)
        per_token += (((high * 65536.0).to(tl.int32) << 16) + (low * 4294967296.0).to(tl.int32),)
    if REST_PAD > 0:
        o_e = 2 * R + tl.arange(0, REST_PAD)
        q_rest = operand(tl.load(p_q + o_e[:, None], mask=(o_e < D_K)[:, None] & m_q, other=0.0), kind)

    # Who ranks worst.
    position = tl.load(p_slot_position + start + o_t, mask=m_t, other=-1)
    score = tl.zeros([TILE], tl.float32)
    if p_slot_score is not None:
        score = tl.load(p_slot_score + row * scored + first + shift + o_t, mask=m_t & (pool > 0), other=0.0)
    filled = (position >= 0) & (position < now)
    ranked = filled & (now - position >= window) & (position >= SINKS)
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0, which has other bits
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    rank = tl.where(ranked, (ordered << 32) + (0x7FFFFFFF - position), NONE)  # of equal scores, the younger is worse
    worst = tl.min(rank, axis=0)
    worst_place = tl.min(tl.where(ranked & (rank == worst), (first + o_t).to(tl.int64), NONE), axis=0)
    p_found += unit * FIELDS
    tl.store(p_found, worst)
    tl.store(p_found + 1, worst_place)
    tl.store(p_found + 2, tl.sum(ranked.to(tl.int32), axis=0))
    tl.store(p_found + 3, tl.min(tl.where(m_t & (filled == 0), (first + o_t).to(tl.int64), NONE), axis=0))

    top, left_out = tl.full([G_PAD], -1e30, tl.float32), tl.full([G_PAD], -1e30, tl.float32)
    total, mixed = tl.zeros([G_PAD], tl.float32), tl.zeros([DV_PAD, G_PAD], tl.float32)
    for at in range(0, count, N):
        n = at + o_n
        m_n, slot = n < count, start + n
        placed = tl.load(p_slot_position + slot, mask=m_n, other=-1)
        p_slot = p_slot_key + slot[:, None] * D_K
        k_first, k_second = tl.tuple([]), tl.tuple([])
        for i in tl.static_range(R_PAD // BLOCK_R):
            o_k = (o_r + i * BLOCK_R)[None, :]
            k_first += (tl.load(p_slot + o_k, mask=m_n[:, None] & (o_k < R), other=0, cache_modifier=".cg"),)
            k_second += (tl.load(p_slot + R + o_k, mask=m_n[:, None] & (o_k < R), other=0, cache_modifier=".cg"),)
        p_values, m_values = p_slot_value + slot[:, None] * D_V + o_v[None, :], m_n[:, None] & m_v[None, :]
        values = tl.load(p_values, mask=m_values, other=0, cache_modifier=".cg")
        turn = tl.minimum(tl.maximum(now - placed, 0), CAP)  # times `per_token`, it wraps around as angles do
        logits = tl.zeros([N, G_PAD], tl.float32)
        for i in tl.static_range(R_PAD // BLOCK_R):
            o_k = (o_r + i * BLOCK_R)[None, :]
            angle = (turn[:, None] * per_token[i]).to(tl.float32) * RADIANS
            cos, sin = turned(angle, HALF)
            cos, sin = cos.to(kind), sin.to(kind)
            one, two = decoded(k_first[i], CODED), decoded(k_second[i], CODED)
            logits = tl.dot(one * cos - two * sin, q_first[i], logits, input_precision=PRECISION)
            logits = tl.dot(two * cos + one * sin, q_second[i], logits, input_precision=PRECISION)
        if REST_PAD > 0:
            k_rest = tl.load(p_slot + o_e[None, :], mask=m_n[:, None] & (o_e < D_K)[None, :], other=0)
            logits = tl.dot(decoded(k_rest, CODED), q_rest, logits, input_precision=PRECISION)
        logits *= scale2
        if p_key_scale is not None:
            logits *= tl.load(p_key_scale + slot, mask=m_n, other=0.0).to(tl.float32)[:, None]

        there = (placed >= 0) & (placed < now)
        is_worst = first + n == worst_place
        visible = (there & (is_worst == 0))[:, None]
        left_out = tl.maximum(left_out, tl.max(tl.where(is_worst[:, None], logits, -1e30), axis=0))
        higher = tl.maximum(top, tl.max(tl.where(visible, logits, -1e30), axis=0))
        weight = tl.where(visible, tl.exp2(logits - higher[None, :]), 0.0)
        fade = tl.exp2(top - higher)
        top, total = higher, total * fade + tl.sum(weight, axis=0)
        if p_value_scale is not None:
            scale = tl.load(p_value_scale + slot, mask=m_n, other=0.0).to(tl.float32)
            weight = tl.where(visible, weight * scale[:, None], 0.0)
        values = decoded(values, CODED)
        if p_value_scale is None:
            values = tl.where(there[:, None], values, 0.0)  # an empty slot may hold any number
        mixed = tl.dot(tl.trans(values), weight.to(kind), mixed * fade[None, :], input_precision=PRECISION)
    p_sums += unit * WIDTH
    p_top = p_sums + G * D_V + o_g
    tl.store(p_top, top, mask=m_g)
    tl.store(p_top + G, total, mask=m_g)
    tl.store(p_top + 2 * G, left_out, mask=m_g)
    tl.store(p_sums + o_g[None, :] * D_V + o_v[:, None], mixed, mask=m_g[None, :] & m_v[:, None])


@triton.jit
def turned(angle, HALF: tl.constexpr):
    """Return cosine and sine of angles between -pi and pi; with `HALF`, their error is at most 2^-20."""
    if HALF:
        cos = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        sin = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        return cos, sin
    else:
        return tl.cos(angle), tl.sin(angle)


@triton.jit
def operand(x, kind: tl.constexpr):
    """Return numbers in the type of a product, at most the largest of fp16."""
    x = x.to(tl.float32)
    if kind == tl.float16:
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    return x.to(kind)


@triton.jit
def decoded(x, CODED: tl.constexpr):
    """Return the contents of slots in the type of a product; four codes a time become fp16 by their bits."""
    if CODED:
        # 0x6400 is 1,024 in fp16, and its last 8 bits count units: 1,024 + 128 + code, less 1,152
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 shifted, low, high, base;
            xor.b32 shifted, $2, 0x80808080;
            mov.b32 base, 0x64806480;
            prmt.b32 low, shifted, 0x64646464, 0x4140;
            prmt.b32 high, shifted, 0x64646464, 0x4342;
            sub.f16x2 $0, low, base;
            sub.f16x2 $1, high, base;
            }""",
            "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@triton.jit
def _heads_kernel(
    p_query, p_key, p_value, p_position, p_index, p_score, p_output, p_slot_key, p_slot_value, p_key_scale,
    p_value_scale, p_slot_position, p_slot_score, p_heads, p_sums, p_found,
    s_query_b, s_query_h, s_key_b, s_key_h, s_value_b, s_value_h, scale2, attention_weight, tiles, slots, scored,
    G: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, G_PAD: tl.constexpr,
    DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, T_PAD: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Add up the tiles of one head for some value channels, without the slot that loses its place, which is taken."""
    part, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_g, o_k, o_v = tl.arange(0, G_PAD), tl.arange(0, DK_PAD), tl.arange(0, DV_PAD)
    o_c, o_t, o_b = part * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, T_PAD), tl.arange(0, BLOCK_T)
    m_g, m_k, m_c = o_g < G, o_k < D_K, o_c < D_V
    p_out = p_output + ((b * H + h) * G + o_g[:, None]) * D_V + o_c[None, :]
    m_out = m_g[:, None] & m_c[None, :]
    now = tl.load(p_position + b).to(tl.int32)
    row = b
    if p_index is not None:
        row = tl.load(p_index + b).to(tl.int64)
    if (row < 0) | (now < 0):
        tl.store(p_out, tl.zeros([G_PAD, COLUMNS], p_output.dtype.element_ty), mask=m_out)
        return
    p_heads += h * FIELDS
    first, count, last = tl.load(p_heads), tl.load(p_heads + 1), tl.load(p_heads + 2)
    pool, shift = tl.load(p_heads + 3), tl.load(p_heads + 4)
    q = tl.load(
        p_query + b * s_query_b + (h * G + o_g[:, None]) * s_query_h + o_k[None, :],
        mask=m_g[:, None] & m_k[None, :], other=0.0,
    )  # fmt: skip
    k = tl.load(p_key + b * s_key_b + h * s_key_h + o_k, mask=m_k, other=0.0).to(tl.float32)
    p_value += b * s_value_b + h * s_value_h
    v = tl.load(p_value + o_c, mask=m_c, other=0.0).to(tl.float32)
    key_scale, value_scale = 1.0, 1.0
    if p_key_scale is not None:
        key_scale = code_scale(k)
        value_scale = code_scale(tl.load(p_value + o_v, mask=o_v < D_V, other=0.0).to(tl.float32))
    k, v = to_codes(k, key_scale, p_slot_key.dtype.element_ty), to_codes(v, value_scale, p_slot_value.dtype.element_ty)

    # Who loses its place, if there are too many; the new token takes that place or an empty one.
    unit = b * tiles + first
    p_found += unit * FIELDS
    p_ranks, m_t = p_found + o_t * FIELDS, o_t < count
    rank = tl.load(p_ranks, mask=m_t, other=NONE)
    full = tl.sum(tl.load(p_ranks + 2, mask=m_t, other=0), axis=0) > pool
    worst = tl.where(full, tl.min(rank, axis=0), NONE)
    is_loser = m_t & (rank == worst) & full
    taken = tl.where(is_loser, tl.load(p_ranks + 1, mask=m_t, other=NONE), NONE)
    empty = tl.load(p_ranks + 3, mask=m_t, other=NONE)
    place = tl.min(tl.where(full, taken, empty), axis=0)
    place = row * slots + tl.minimum(place, last)  # inside the head for any positions

    p_sums += unit * WIDTH
    p_tops = p_sums + o_t[None, :] * WIDTH + G * D_V + o_g[:, None]
    m_tops = m_g[:, None] & m_t[None, :]
    tops, sums = tl.load(p_tops, mask=m_tops, other=-1e30), tl.load(p_tops + G, mask=m_tops, other=0.0)
    spared = tl.load(p_tops + 2 * G, mask=m_tops & (is_loser == 0)[None, :], other=-1e30)
    logit_now = scale2 * key_scale * tl.sum(q.to(tl.float32) * k[None, :], axis=1)  # no rotation at distance 0
    top = tl.maximum(tl.max(tl.maximum(tops, spared), axis=1), logit_now)
    total = tl.sum(sums * tl.exp2(tops - top[:, None]) + tl.exp2(spared - top[:, None]), axis=1)
    weight_now = tl.exp2(logit_now - top)
    share = attention_weight / (total + weight_now)

    mixed = (weight_now * value_scale)[:, None] * v[None, :]
    for start in range(0, count, BLOCK_T):
        t = start + o_b
        m_b = t < count
        m_part = m_g[:, None] & m_b[None, :]
        p_part = p_sums + t[None, :] * WIDTH + o_g[:, None]
        p_mixed = p_sums + t[None, :, None] * WIDTH + o_g[:, None, None] * D_V + o_c[None, None, :]
        weight = tl.exp2(tl.load(p_part + G * D_V, mask=m_part, other=-1e30) - top[:, None])
        part_mixed = tl.load(p_mixed, mask=m_part[:, :, None] & m_c[None, None, :], other=0.0)
        mixed += tl.sum(weight[:, :, None] * part_mixed, axis=1)
        left_out = tl.load(p_found + t * FIELDS, mask=m_b, other=NONE)
        m_left = (left_out != worst) & (left_out != NONE)
        slot = row * slots + tl.load(p_found + t * FIELDS + 1, mask=m_left, other=0)
        logit = tl.load(p_part + G * D_V + 2 * G, mask=m_part & m_left[None, :], other=-1e30)
        weight_left = tl.exp2(logit - top[:, None])
        if p_value_scale is not None:
            scale = tl.load(p_value_scale + slot, mask=m_left, other=0.0).to(tl.float32)
            weight_left *= scale[None, :]
        p_values, m_values = p_slot_value + slot[:, None] * D_V + o_c[None, :], m_left[:, None] & m_c[None, :]
        values = tl.load(p_values, mask=m_values, other=0.0).to(tl.float32)
        mixed += tl.sum(weight_left[:, :, None] * values[None, :, :], axis=1)
    tl.store(p_out, (share[:, None] * mixed).to(p_output.dtype.element_ty), mask=m_out)

    # Nothing above reads this place: it is empty, or it belongs to the slot that loses it.
    tl.store(p_slot_value + place * D_V + o_c, v.to(p_slot_value.dtype.element_ty), mask=m_c)
    if part == 0:
        tl.store(p_slot_key + place * D_K + o_k, k.to(p_slot_key.dtype.element_ty), mask=m_k)
        tl.store(p_slot_position + place, now)
        if p_key_scale is not None:
            tl.store(p_key_scale + place, key_scale)
            tl.store(p_value_scale + place, value_scale)
        if p_slot_score is not None:
            place += row * (scored - slots) + shift
            tl.store(p_slot_score + place, tl.load(p_score + b * H + h), mask=pool > 0)


@triton.jit
def code_scale(x):
    """Return the scales that give vectors codes of 8 bits, as `ligerexport.kernels.ragged.store` rounds it."""
    scale = tl.div_rn(tl.max(tl.abs(x), axis=-1), LARGEST_CODE)
    return tl.minimum(tl.maximum(scale, SMALLEST), LARGEST).to(tl.float16).to(tl.float32)


@triton.jit
def to_codes(x, scale, kind: tl.constexpr):
    """Return vectors rounded to the type of the state, in fp32."""
    if kind == tl.int8:
        codes = (tl.div_rn(x, scale) + ROUNDER) - ROUNDER
        return tl.minimum(tl.maximum(codes, -LARGEST_CODE), LARGEST_CODE)
    if kind == tl.float16:
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    return x.to(kind).to(tl.float32)
