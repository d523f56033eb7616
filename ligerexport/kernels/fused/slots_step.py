"""The slots of one KV head for one token: attention over them, and the replacement of a token by the new one.

This is part of the kernel in `mixer_step.py`. The slots are an unordered set here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ligerexport.kernels.fused.numbers import FAINTEST
from ligerexport.kernels.fused.overlap import wait
from ligerexport.model.scores import Pool

# indices of the fields of a `Pool`, which is a plain tuple inside a kernel
SIZE = tl.constexpr(Pool._fields.index("size"))
ON_ARRIVAL = tl.constexpr(Pool._fields.index("on_arrival"))
BY_VALUE = tl.constexpr(Pool._fields.index("by_value"))
SUMMED = tl.constexpr(Pool._fields.index("summed"))
FIRST_DISTANCE = tl.constexpr(Pool._fields.index("first_distance"))
HORIZON = tl.constexpr(Pool._fields.index("horizon"))


@triton.jit
def row(tile, i):
    """Return row `i` of `[rows, n]`, as a reduction, so that the row is computed once and not in every lane."""
    return tl.sum(tl.where(tl.arange(0, tile.shape[0])[:, None] == i, tile, 0), axis=0)


@triton.jit
def dot(a, b, c, PRECISION: tl.constexpr):
    """Return a @ b + c; the interpreter has no bf16 product."""
    if PRECISION == "ieee":
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def _rank_keys(scores, position, now, POOLS: tl.constexpr):
    """Return int64 keys `[P, N]` that order slots by each pool's rank and then by age, higher for older ones."""
    o_p = tl.arange(0, scores.shape[0])[:, None]
    rank = scores + 0.0  # turns -0 into 0, which has other bits
    for i in tl.static_range(len(POOLS)):
        if POOLS[i][HORIZON] > 0:
            # ages differ from positions by a constant, and round less
            aged = tl.log(tl.maximum(scores, FAINTEST))
            aged += ((position - now).to(tl.float32) * (1.0 / POOLS[i][HORIZON]))[None, :]
            rank = tl.where(o_p == i, aged, rank)
    bits = rank.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - position)[None, :]


@triton.jit
def _loser(keys, candidate, POOLS: tl.constexpr):
    """Return a mask `[N]` of the candidate that fits into no pool; there is at most one."""
    for i in tl.static_range(len(POOLS)):
        key = row(keys, i)
        if i + 1 < len(POOLS):
            key = tl.where(candidate, key, -0x7FFFFFFFFFFFFFFF)
            better = tl.sum((key[:, None] > key[None, :]).to(tl.int32), axis=0)
            candidate = candidate & (better >= POOLS[i][SIZE])
        else:
            # the last pool drops its worst candidate, which is found without counting
            over = tl.sum(candidate.to(tl.int32), axis=0) > POOLS[i][SIZE]
            worst = tl.min(tl.where(candidate, key, 0x7FFFFFFFFFFFFFFF), axis=0)
            candidate = candidate & over & (key == worst)
    return candidate


@triton.jit
def slot_logits(
    p_query, s_query_h, p_rotary, b_first, b_second, b_rest, o_e, distance,
    G: tl.constexpr, G_PAD: tl.constexpr, D_K: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    BLOCK_R: tl.constexpr, REST_PAD: tl.constexpr, CAP: tl.constexpr, TABLE: tl.constexpr, N_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return products `[G, N]` of the queries with all slots, including empty ones: they need only positions."""
    o_g, o_r = tl.arange(0, G_PAD), tl.arange(0, BLOCK_R)
    m_g = o_g < G
    offset = tl.minimum(tl.maximum(CAP - distance, 0), CAP)
    p_cos = p_rotary + offset[:, None] * R + o_r[None, :]
    p_q = p_query + o_g[:, None] * s_query_h + o_r[None, :]
    logits = tl.zeros([G_PAD, N_PAD], tl.float32)
    for i in tl.static_range(R_PAD // BLOCK_R):
        m_r = (o_r + i * BLOCK_R < R)[None, :]
        cos = tl.load(p_cos + i * BLOCK_R, mask=m_r, other=0.0)
        sin = tl.load(p_cos + TABLE + i * BLOCK_R, mask=m_r, other=0.0)
        first, second = b_first[i].to(tl.float32), b_second[i].to(tl.float32)
        q_first = tl.load(p_q + i * BLOCK_R, mask=m_g[:, None] & m_r, other=0.0)
        q_second = tl.load(p_q + R + i * BLOCK_R, mask=m_g[:, None] & m_r, other=0.0)
        logits = dot(q_first.to(tl.float32), tl.trans(first * cos - second * sin), logits, PRECISION)
        logits = dot(q_second.to(tl.float32), tl.trans(second * cos + first * sin), logits, PRECISION)
    if REST_PAD > 0:
        p_rest = p_query + o_g[:, None] * s_query_h + o_e[None, :]
        q_rest = tl.load(p_rest, mask=m_g[:, None] & (o_e < D_K)[None, :], other=0.0)
        logits = dot(q_rest, tl.trans(b_rest), logits, PRECISION)
    return logits


@triton.jit
def _mix(
    p_value, p_values, b_values, p_mixed, weight, weight_now, filled, now,
    G: tl.constexpr, G_PAD: tl.constexpr, D_V: tl.constexpr, DV_PAD: tl.constexpr, N: tl.constexpr,
    N_PAD: tl.constexpr, BY_VALUES: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the weighted sum of the values `[G, d_v]`; return the squared norm of each slot's value for `BY_VALUES`.

    `b_values` is the first tile of columns; the next one is loaded while one is multiplied.
    """
    dtype: tl.constexpr = p_values.dtype.element_ty
    o_g, o_n, o_c = tl.arange(0, G_PAD), tl.arange(0, N_PAD), tl.arange(0, TILE)
    m_g, m_n = o_g < G, o_n < N
    coarse = weight.to(dtype)
    has_empty = tl.sum(filled.to(tl.int32), axis=0) < N_PAD
    square = tl.zeros([N_PAD], tl.float32)
    for j in tl.static_range(DV_PAD // TILE):
        values = b_values
        if has_empty:  # an empty slot may hold any number
            values = tl.where(filled[:, None], values, 0.0)
        m_c = o_c + j * TILE < D_V
        if j + 1 < DV_PAD // TILE:
            m_next = m_n[:, None] & (o_c + (j + 1) * TILE < D_V)[None, :]
            b_values = tl.load(p_values + (j + 1) * TILE, mask=m_next, other=0.0)
        if BY_VALUES:
            square += tl.sum(values.to(tl.float32) * values.to(tl.float32), axis=1)
        mixed = weight_now[:, None] * tl.load(p_value + o_c + j * TILE, mask=m_c, other=0.0).to(tl.float32)[None, :]
        mixed = dot(coarse, values, mixed, PRECISION)
        if dtype != tl.float32:  # the rounding error of the weight
            mixed = dot((weight - coarse.to(tl.float32)).to(dtype), values, mixed, PRECISION)
        mixed = tl.where(now >= 0, mixed, 0.0).to(p_mixed.dtype.element_ty)
        tl.store(p_mixed + o_g[:, None] * D_V + (o_c + j * TILE)[None, :], mixed, mask=m_g[:, None] & m_c[None, :])
    return square


@triton.jit
def _hand_over(
    p_lost, p_slot_key, p_slot_value, place, loser, normaliser,
    G: tl.constexpr, G_PAD: tl.constexpr, D_K: tl.constexpr, DK_PAD: tl.constexpr, D_V: tl.constexpr,
    DV_PAD: tl.constexpr,
):  # fmt: skip
    """Write the key and value that lose their slot, the normaliser `[G]`, and whether there is a loser."""
    o_g, o_k, o_v = tl.arange(0, G_PAD), tl.arange(0, DK_PAD), tl.arange(0, DV_PAD)
    m_g, m_k, m_v = o_g < G, o_k < D_K, o_v < D_V
    there = tl.sum(loser.to(tl.int32), axis=0) > 0
    lost_key = tl.load(p_slot_key + place * D_K + o_k, mask=m_k & there, other=0.0)
    lost_value = tl.load(p_slot_value + place * D_V + o_v, mask=m_v & there, other=0.0)
    tl.store(p_lost + o_k, lost_key.to(tl.float32), mask=m_k)
    tl.store(p_lost + D_K + o_v, lost_value.to(tl.float32), mask=m_v)
    tl.store(p_lost + D_K + D_V + o_g, normaliser, mask=m_g)
    tl.store(p_lost + D_K + D_V + G, there.to(tl.float32))


@triton.jit
def _store_scores(
    p_slot_score, p_score, scores, square, b_v, logits, logit_now, local, near, distance, place,
    G: tl.constexpr, G_PAD: tl.constexpr, N: tl.constexpr, N_PAD: tl.constexpr, POOLS: tl.constexpr,
):  # fmt: skip
    """Update the scores by the attention received, from a softmax over sinks and window alone."""
    o_g, o_n = tl.arange(0, G_PAD), tl.arange(0, N_PAD)
    m_g, m_n = o_g < G, o_n < N
    top = tl.maximum(tl.max(tl.where(local[None, :], logits, -1e30), axis=1), logit_now)
    weight = tl.where(local[None, :], tl.exp2(logits - top[:, None]), 0.0)
    weight_now = tl.exp2(logit_now - top)
    share = tl.where(m_g, 1.0 / (tl.sum(weight, axis=1) + weight_now), 0.0)
    weight, weight_now = weight * share[:, None], weight_now * share
    is_new = o_n == place
    for i in tl.static_range(len(POOLS)):
        if not POOLS[i][ON_ARRIVAL]:
            received = tl.sum(weight, axis=0) if POOLS[i][SUMMED] else tl.max(weight, axis=0)
            received_now = tl.sum(weight_now, axis=0) if POOLS[i][SUMMED] else tl.max(weight_now, axis=0)
            if POOLS[i][BY_VALUE]:
                received *= tl.sqrt(square)
                received_now *= tl.sqrt(tl.sum(b_v.to(tl.float32) * b_v.to(tl.float32), axis=0))
            score = row(scores, i)
            score = score + received if POOLS[i][SUMMED] else tl.maximum(score, received)
            score = tl.where(is_new, received_now if POOLS[i][FIRST_DISTANCE] == 0 else 0.0, score)
            counts = is_new | (near & (distance >= POOLS[i][FIRST_DISTANCE]))
            tl.store(p_slot_score + i * N + o_n, score, mask=counts & m_n)
        elif p_score is not None:  # the judge's novelty is not known yet
            tl.store(p_slot_score + i * N + place, tl.load(p_score))


@triton.jit
def attend_slots(
    p_query, p_key, p_value, s_query_h, p_rotary, p_slot_key, p_slot_value, p_slot_position, p_slot_score, p_score,
    p_mixed, p_place, p_lost, p_now, scale2, attention_weight,
    G: tl.constexpr, D_K: tl.constexpr, DK_PAD: tl.constexpr, D_V: tl.constexpr, DV_PAD: tl.constexpr, R: tl.constexpr,
    R_PAD: tl.constexpr, BLOCK_R: tl.constexpr, REST_PAD: tl.constexpr, CAP: tl.constexpr, TABLE: tl.constexpr,
    N: tl.constexpr, N_PAD: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, POOLS: tl.constexpr,
    P_PAD: tl.constexpr, BY_VALUES: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attend over the slots of one head, write `[G, d_v]` to `p_mixed`, and store the new token in its slot."""
    G_PAD: tl.constexpr = 16  # the smallest number of rows of a matrix product
    o_g, o_k, o_r, o_n = tl.arange(0, G_PAD), tl.arange(0, DK_PAD), tl.arange(0, BLOCK_R), tl.arange(0, N_PAD)
    o_v, o_c = tl.arange(0, DV_PAD), tl.arange(0, TILE)
    m_g, m_k, m_n, m_v = o_g < G, o_k < D_K, o_n < N, o_v < D_V

    # All large loads start before the program waits for any; only the rotary rows depend on their results.
    position = tl.load(p_slot_position + o_n, mask=m_n, other=-1).to(tl.int32)
    scores, b_rest, o_e = None, None, None
    if len(POOLS) > 0:
        o_p = tl.arange(0, P_PAD)
        p_scores, m_scores = p_slot_score + o_p[:, None] * N + o_n[None, :], (o_p < len(POOLS))[:, None] & m_n[None, :]
        scores = tl.load(p_scores, mask=m_scores, other=0.0)
    p_first = p_slot_key + o_n[:, None] * D_K + o_r[None, :]
    b_first, b_second = tl.tuple([]), tl.tuple([])
    for i in tl.static_range(R_PAD // BLOCK_R):
        m_part = m_n[:, None] & (o_r + i * BLOCK_R < R)[None, :]
        b_first += (tl.load(p_first + i * BLOCK_R, mask=m_part, other=0.0),)
        b_second += (tl.load(p_first + R + i * BLOCK_R, mask=m_part, other=0.0),)
    if REST_PAD > 0:
        o_e = 2 * R + tl.arange(0, REST_PAD)
        m_rest = m_n[:, None] & (o_e < D_K)[None, :]
        b_rest = tl.load(p_slot_key + o_n[:, None] * D_K + o_e[None, :], mask=m_rest, other=0.0)
    p_values, m_values = p_slot_value + o_n[:, None] * D_V + o_c[None, :], m_n[:, None] & (o_c < D_V)[None, :]
    if len(POOLS) == 0:
        b_values = tl.load(p_values, mask=m_values, other=0.0)
    wait(OVERLAP)
    now = tl.load(p_now).to(tl.int32)
    b_k = tl.load(p_key + o_k, mask=m_k, other=0.0)
    b_v = tl.load(p_value + o_v, mask=m_v, other=0.0)
    b_q = tl.load(p_query + o_g[:, None] * s_query_h + o_k[None, :], mask=m_g[:, None] & m_k[None, :], other=0.0)

    distance = now - position
    logits = slot_logits(
        p_query, s_query_h, p_rotary, b_first, b_second, b_rest, o_e, distance,
        G, G_PAD, D_K, R, R_PAD, BLOCK_R, REST_PAD, CAP, TABLE, N_PAD, PRECISION,
    )  # fmt: skip
    logits *= scale2
    logit_now = scale2 * tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32)[None, :], axis=1)  # no rotation at distance 0

    # Find who is in the memory, and the new token's slot: the loser's slot, or the first empty one without a loser.
    filled = (position >= 0) & (position < now)
    near = filled & (distance < WINDOW)
    local = near | (filled & (position < SINKS))
    loser = filled & (local == 0)
    if len(POOLS) > 0:
        b_values = tl.load(p_values, mask=m_values, other=0.0)  # loads during the search for losers
        loser = _loser(_rank_keys(scores, position, now, POOLS), loser, POOLS)
    visible = filled & (loser == 0)
    claim = tl.where(loser, 2, tl.where(filled, 0, 1))
    place = N_PAD - 1 - tl.max(tl.where(m_n, claim * N_PAD + N_PAD - 1 - o_n, 0), axis=0) % N_PAD

    top = tl.maximum(tl.max(tl.where(visible[None, :], logits, -1e30), axis=1), logit_now)
    weight = tl.where(visible[None, :], tl.exp2(logits - top[:, None]), 0.0)
    weight_now = tl.exp2(logit_now - top)
    total = tl.sum(weight, axis=1) + weight_now
    normaliser = top + tl.log2(total)
    share = attention_weight / total
    square = _mix(
        p_value, p_values, b_values, p_mixed, weight * share[:, None], weight_now * share, filled, now,
        G, G_PAD, D_V, DV_PAD, N, N_PAD, BY_VALUES, TILE, PRECISION,
    )  # fmt: skip
    if p_place is not None:
        tl.store(p_place, place.to(tl.float32))
    if p_lost is not None:  # before the new token overwrites it
        p_lost += G * D_V
        _hand_over(
            p_lost, p_slot_key, p_slot_value, place, loser, normaliser, G, G_PAD, D_K, DK_PAD, D_V, DV_PAD
        )  # fmt: skip
        tl.debug_barrier()
    if now >= 0:
        tl.store(p_slot_key + place * D_K + o_k, b_k, mask=m_k)
        tl.store(p_slot_value + place * D_V + o_v, b_v, mask=m_v)
        tl.store(p_slot_position + place, now)
        if len(POOLS) > 0:
            _store_scores(
                p_slot_score, p_score, scores, square, b_v, logits, logit_now, local, near, distance, place,
                G, G_PAD, N, N_PAD, POOLS,
            )  # fmt: skip
