"""One token of `liger_mixer` in one launch: slots, judge and recurrence are read once and updated in place.
Where evicted tokens feed the recurrence, `evicted_step` follows: it needs what the first launch evicted.

The slots are an unordered set here: the new token overwrites the one that loses its place. A KV head has one program
for its slots and some that each stream columns of its states; the last of them to end puts their parts together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused.evicted_step import evicted_step
from ligerexport.kernels.fused.overlap import wait
from ligerexport.kernels.tuning import overlaps
from ligerexport.model.gates import get_gate
from ligerexport.model.scores import get_score
from ligerexport.model.state import MixerSpec, MixerState

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tiling:
    """How one launch is cut: a head has one program for its slots and some for the columns of its states.

    Attributes:
        block_v: Columns of the recurrent state that a program holds.
        block_judge: Columns of the judge state that a program holds.
        num_warps: Warps a program.
        block_r: Pairs of channels that are rotated at a time, at least 16.
        max_registers: Registers a thread may take; None leaves it to the compiler.
    """

    block_v: int
    block_judge: int
    num_warps: int
    block_r: int = 32
    max_registers: int | None = None


def choose_tiling(spec: MixerSpec, batch: int, itemsize: int = 2) -> Tiling:
    """Return the cut for a layer, a batch and activations of `itemsize` bytes."""
    width, few = triton.next_power_of_2(max(spec.d_k, spec.d_v)), batch * spec.kv_heads < 33
    # at most 32 registers a thread for keys and as many for values; more programs where there are few heads
    warps = min(16, max(4, _padded(spec.config.num_slots) * width * itemsize // 4096))
    columns = max(16, 1024 * warps // triton.next_power_of_2(spec.d_k))
    block_v, block_judge = (16, 16) if few else (min(64, 2 * columns), min(64, columns))
    return Tiling(block_v, block_judge, warps, max_registers=None if few or itemsize > 2 else 128)


def mixer_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
    index: Tensor | None = None,
    out: Tensor | None = None,
    tiling: Tiling | None = None,
    score: Tensor | None = None,
) -> Tensor:
    """Mix one token of every sequence and update its state in place.

    Args:
        query: `[B, H_q, d_k]` as projected, any strides with a contiguous last axis.
        key: `[B, H_kv, d_k]`, likewise.
        value: `[B, H_kv, d_v]`, likewise.
        position: `[B]` int64, tokens that each sequence has seen; negative for padding, which gives zeros.
        state: Pools `[M, ...]` by the names of `MixerSpec.state`, M at least B.
        spec: The layer.
        rotary: `rotary_table(inv_freq, spec.max_distance, ahead)`, fp32.
        index: `[B]`, the row of the pools that holds each sequence, negative to skip it; None for row b.
        out: `[B, H_q, d_v]`, contiguous, to write to.
        tiling: Cut of the launch; None for `choose_tiling`.
        score: `[B, H_kv]` fp32, needed where `spec.config.foresees`.

    Returns:
        Output `[B, H_q, d_v]` in the dtype of `query`.
    """
    config, gate, batch = spec.config, get_gate(spec.config.gate), query.shape[0]
    position = position.contiguous()
    index = None if index is None else index.contiguous()
    score = score.contiguous() if score is not None and config.foresees else None
    if out is None:
        out = query.new_empty(batch, spec.q_heads, spec.d_v)
    tiling = tiling or choose_tiling(spec, batch, query.element_size())
    pools, heads, rotated = pool_table(spec), batch * spec.kv_heads, rotary.shape[-1]
    group, evicts = spec.q_heads // spec.kv_heads, config.evicts
    recurrent, judge = None if evicts else state.get("recurrent_state"), state.get("judge_state")
    lost = query.new_empty(heads, (group + 1) * (spec.d_v + 1) + spec.d_k, dtype=torch.float32) if evicts else None
    roles = 1 + triton.cdiv(spec.d_v, tiling.block_v) * (recurrent is not None)
    roles += triton.cdiv(spec.d_v, tiling.block_judge) * config.judged
    left = triton.cdiv((2 * spec.q_heads // spec.kv_heads + 1) * spec.d_v + 2, 32) * 32
    scratch, count = (_scratch(query.device, heads * left), _count(query.device, heads)) if roles > 1 else (None, None)
    precision = "tf32x3" if query.dtype == torch.float32 else "tf32"
    _mixer_step_kernel[(heads * roles,)](
        query, key, value, position, index, rotary, out,
        state["slot_key"], state["slot_value"], state["slot_position"], state.get("slot_score"),
        recurrent, judge, score, scratch, count, lost,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        spec.scale * LOG2E, config.attention_weight, config.recurrence_weight,
        H=spec.kv_heads, G=group, D_K=spec.d_k, DK_PAD=triton.next_power_of_2(spec.d_k),
        D_V=spec.d_v, DV_PAD=triton.next_power_of_2(spec.d_v),
        R=rotated, R_PAD=_padded(rotated), BLOCK_R=min(tiling.block_r, _padded(rotated)),
        REST_PAD=_padded(spec.d_k - 2 * rotated), CAP=spec.max_distance, TABLE=rotary.shape[1] * rotated,
        N=config.num_slots, N_PAD=_padded(config.num_slots), WINDOW=config.window, SINKS=config.sinks,
        POOLS=pools, P_PAD=triton.next_power_of_2(max(len(pools), 1)), BY_VALUE=any(pool[2] for pool in pools),
        QUERY_SOFTMAX=gate.query_map == "softmax", KEY_SOFTMAX=gate.key_map == "softmax", DIVISOR=gate.decay_divisor,
        PRECISION="ieee" if triton.knobs.runtime.interpret else precision,
        TILE=min(triton.next_power_of_2(spec.d_v), 65536 // (_padded(config.num_slots) * query.element_size())),
        BLOCK_V=tiling.block_v, BLOCK_JUDGE=tiling.block_judge, SCRATCH=left, OVERLAP=overlaps(),
        num_warps=tiling.num_warps, num_stages=1, maxnreg=tiling.max_registers,
    )  # fmt: skip
    if lost is not None:
        evicted_step(query, position, index, rotary, out, state, lost, spec)
    return out


@cache
def _count(device: torch.device, size: int) -> Tensor:
    """Return a counter a head, 0 between launches; launches must not overlap."""
    return torch.zeros(size, dtype=torch.int32, device=device)


@cache
def _scratch(device: torch.device, size: int) -> Tensor:
    """Return where the programs of a head leave their parts; never freed, for graphs hold its address."""
    return torch.empty(size, dtype=torch.float32, device=device)


def pool_table(spec: MixerSpec) -> tuple[tuple[int, bool, bool, bool, int, float], ...]:
    """Return for each pool: count, by a score on arrival, by value, summed, first distance counted, horizon or 0."""
    rows = []
    for name, count in spec.config.slots:
        s = get_score(name)
        first = s.first_distance(spec.config.window)
        rows.append((count, s.on_arrival, s.by_value, s.reduce == "sum", first, s.horizon or 0.0))
    return tuple(rows)


def _padded(size: int) -> int:
    """Return the next power of two that a matrix product takes, or 0 for nothing."""
    return max(16, triton.next_power_of_2(size)) if size else 0


@triton.jit
def _row(tile, i):
    """Return row `i` of `[rows, n]`; a reduction, so that what made the row is computed once and not in every lane."""
    return tl.sum(tl.where(tl.arange(0, tile.shape[0])[:, None] == i, tile, 0), axis=0)


@triton.jit
def _sigmoid(x):
    """Return the logistic function without an exponential that could overflow."""
    faint = tl.exp2(-tl.abs(x) * 1.4426950408889634)
    return tl.where(x >= 0, 1.0, faint) / (1.0 + faint)


@triton.jit
def _decay(key, DIVISOR: tl.constexpr):
    """Return exp(logsigmoid(key) / DIVISOR)."""
    exponent = tl.minimum(key, 0.0) * 1.4426950408889634
    return tl.exp2((exponent - tl.log2(1.0 + tl.exp2(-tl.abs(key) * 1.4426950408889634))) * (1.0 / DIVISOR))


@triton.jit
def _features(x, m_columns, SOFTMAX: tl.constexpr):
    """Return the features of the last axis of `x`: its softmax, or 1 - sigmoid; 0 outside a mask."""
    if SOFTMAX:
        x = tl.where(m_columns, x * 1.4426950408889634, -1e30)
        e = tl.where(m_columns, tl.exp2(x - tl.max(x, axis=-1, keep_dims=True)), 0.0)
        return e * (1.0 / tl.sum(e, axis=-1, keep_dims=True))
    else:
        return tl.where(m_columns, _sigmoid(-x), 0.0)


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    """Return a @ b + c; the interpreter has no bf16 product."""
    if PRECISION == "ieee":
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def _rank_keys(scores, position, now, POOLS: tl.constexpr):
    """Return int64 keys `[P, N]` that order slots by each pool's rank and then by age, the older higher."""
    o_p = tl.arange(0, scores.shape[0])[:, None]
    rank = scores + 0.0  # makes -0 a 0, which has other bits
    for i in tl.static_range(len(POOLS)):
        if POOLS[i][5] > 0:
            # ages instead of positions differ by a constant, and round less
            aged = tl.log(tl.maximum(scores, 1e-30)) + ((position - now).to(tl.float32) * (1.0 / POOLS[i][5]))[None, :]
            rank = tl.where(o_p == i, aged, rank)
    bits = rank.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - position)[None, :]


@triton.jit
def _loser(keys, candidate, POOLS: tl.constexpr):
    """Return which of the candidates `[N]` no pool has room for; there is at most one."""
    for i in tl.static_range(len(POOLS)):
        key = _row(keys, i)
        if i + 1 < len(POOLS):
            key = tl.where(candidate, key, -0x7FFFFFFFFFFFFFFF)
            better = tl.sum((key[:, None] > key[None, :]).to(tl.int32), axis=0)
            candidate = candidate & (better >= POOLS[i][0])
        else:
            # what the last pool cannot take is its worst, which takes no counting to find
            over = tl.sum(candidate.to(tl.int32), axis=0) > POOLS[i][0]
            worst = tl.min(tl.where(candidate, key, 0x7FFFFFFFFFFFFFFF), axis=0)
            candidate = candidate & over & (key == worst)
    return candidate


@triton.jit
def _attend(
    p_query, p_key, p_value, s_query_h, p_rotary, p_slot_key, p_slot_value, p_slot_position, p_slot_score, p_score,
    p_mixed, p_place, p_lost, p_now, scale2, attention_weight,
    G: tl.constexpr, D_K: tl.constexpr, DK_PAD: tl.constexpr, D_V: tl.constexpr, DV_PAD: tl.constexpr, R: tl.constexpr,
    R_PAD: tl.constexpr, BLOCK_R: tl.constexpr, REST_PAD: tl.constexpr, CAP: tl.constexpr, TABLE: tl.constexpr,
    N: tl.constexpr, N_PAD: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, POOLS: tl.constexpr,
    P_PAD: tl.constexpr, BY_VALUE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attend over the slots of one head, write `[G, d_v]` to `p_mixed`, and put the new token in its place."""
    G_PAD: tl.constexpr = 16  # the fewest rows of a matrix product
    dtype: tl.constexpr = p_slot_key.dtype.element_ty
    o_g, o_k, o_r, o_n = tl.arange(0, G_PAD), tl.arange(0, DK_PAD), tl.arange(0, BLOCK_R), tl.arange(0, N_PAD)
    o_v, o_c = tl.arange(0, DV_PAD), tl.arange(0, TILE)
    m_g, m_k, m_n, m_v = o_g < G, o_k < D_K, o_n < N, o_v < D_V

    # Everything big is asked for before anything is waited for; only the rotary rows depend on what comes back.
    position = tl.load(p_slot_position + o_n, mask=m_n, other=-1).to(tl.int32)
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

    # Logits `[G, N]` of all slots, the empty ones too: they need nothing but positions.
    distance = now - position
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
        logits = _dot(q_first.to(tl.float32), tl.trans(first * cos - second * sin), logits, PRECISION)
        logits = _dot(q_second.to(tl.float32), tl.trans(second * cos + first * sin), logits, PRECISION)
    if REST_PAD > 0:
        p_rest = p_query + o_g[:, None] * s_query_h + o_e[None, :]
        q_rest = tl.load(p_rest, mask=m_g[:, None] & (o_e < D_K)[None, :], other=0.0)
        logits = _dot(q_rest, tl.trans(b_rest), logits, PRECISION)
    logits *= scale2
    logit_now = scale2 * tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32)[None, :], axis=1)  # distance 0: nothing turns

    # Who is in the memory, and where the new token goes: the loser's slot, else the first empty one.
    filled = (position >= 0) & (position < now)
    near = filled & (distance < WINDOW)
    local = near | (filled & (position < SINKS))
    loser = filled & (local == 0)
    if len(POOLS) > 0:
        b_values = tl.load(p_values, mask=m_values, other=0.0)  # arrives while losers are looked for
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
    weight, weight_now = weight * share[:, None], weight_now * share
    coarse = weight.to(dtype)
    has_empty = tl.sum(filled.to(tl.int32), axis=0) < N_PAD
    square = tl.zeros([N_PAD], tl.float32)
    for j in tl.static_range(DV_PAD // TILE):
        values = b_values
        if has_empty:  # an empty slot may hold anything
            values = tl.where(filled[:, None], values, 0.0)
        m_c = o_c + j * TILE < D_V
        if j + 1 < DV_PAD // TILE:
            m_next = m_n[:, None] & (o_c + (j + 1) * TILE < D_V)[None, :]
            b_values = tl.load(p_values + (j + 1) * TILE, mask=m_next, other=0.0)
        if BY_VALUE:
            square += tl.sum(values.to(tl.float32) * values.to(tl.float32), axis=1)
        mixed = weight_now[:, None] * tl.load(p_value + o_c + j * TILE, mask=m_c, other=0.0).to(tl.float32)[None, :]
        mixed = _dot(coarse, values, mixed, PRECISION)
        if dtype != tl.float32:  # what rounding the weight lost
            mixed = _dot((weight - coarse.to(tl.float32)).to(dtype), values, mixed, PRECISION)
        mixed = tl.where(now >= 0, mixed, 0.0).to(p_mixed.dtype.element_ty)
        tl.store(p_mixed + o_g[:, None] * D_V + (o_c + j * TILE)[None, :], mixed, mask=m_g[:, None] & m_c[None, :])
    if p_place is not None:
        tl.store(p_place, place.to(tl.float32))
    if p_lost is not None:  # before the new token lies there
        there = tl.sum(loser.to(tl.int32), axis=0) > 0
        lost_key = tl.load(p_slot_key + place * D_K + o_k, mask=m_k & there, other=0.0)
        lost_value = tl.load(p_slot_value + place * D_V + o_v, mask=m_v & there, other=0.0)
        p_lost += G * D_V
        tl.store(p_lost + o_k, lost_key.to(tl.float32), mask=m_k)
        tl.store(p_lost + D_K + o_v, lost_value.to(tl.float32), mask=m_v)
        tl.store(p_lost + D_K + D_V + o_g, normaliser, mask=m_g)
        tl.store(p_lost + D_K + D_V + G, there.to(tl.float32))
        tl.debug_barrier()
    if now >= 0:
        tl.store(p_slot_key + place * D_K + o_k, b_k, mask=m_k)
        tl.store(p_slot_value + place * D_V + o_v, b_v, mask=m_v)
        tl.store(p_slot_position + place, now)
        if len(POOLS) > 0:
            # Attention received, by a softmax over sinks and window alone.
            top = tl.maximum(tl.max(tl.where(local[None, :], logits, -1e30), axis=1), logit_now)
            weight = tl.where(local[None, :], tl.exp2(logits - top[:, None]), 0.0)
            weight_now = tl.exp2(logit_now - top)
            share = tl.where(m_g, 1.0 / (tl.sum(weight, axis=1) + weight_now), 0.0)
            weight, weight_now = weight * share[:, None], weight_now * share
            is_new = o_n == place
            for i in tl.static_range(len(POOLS)):
                if not POOLS[i][1]:
                    received = tl.sum(weight, axis=0) if POOLS[i][3] else tl.max(weight, axis=0)
                    received_now = tl.sum(weight_now, axis=0) if POOLS[i][3] else tl.max(weight_now, axis=0)
                    if POOLS[i][2]:
                        received *= tl.sqrt(square)
                        received_now *= tl.sqrt(tl.sum(b_v.to(tl.float32) * b_v.to(tl.float32), axis=0))
                    score = _row(scores, i)
                    score = score + received if POOLS[i][3] else tl.maximum(score, received)
                    score = tl.where(is_new, received_now if POOLS[i][4] == 0 else 0.0, score)
                    counts = is_new | (near & (distance >= POOLS[i][4]))
                    tl.store(p_slot_score + i * N + o_n, score, mask=counts & m_n)
                elif p_score is not None:  # what the judge says is not known yet
                    tl.store(p_slot_score + i * N + place, tl.load(p_score))


@triton.jit
def _recur(
    p_query, p_key, p_value, s_query_h, p_state, p_read, start, p_now, recurrence_weight,
    G: tl.constexpr, D_K: tl.constexpr, DK_PAD: tl.constexpr, D_V: tl.constexpr, BLOCK_V: tl.constexpr,
    QUERY_SOFTMAX: tl.constexpr, KEY_SOFTMAX: tl.constexpr, DIVISOR: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Update the columns of the recurrent state from `start` and write what the queries read, `[G, columns]`."""
    G_PAD: tl.constexpr = 16
    o_g, o_k, o_v = tl.arange(0, G_PAD), tl.arange(0, DK_PAD), start + tl.arange(0, BLOCK_V)
    m_g, m_k, m_v = o_g < G, o_k < D_K, o_v < D_V
    p_state += o_k[:, None] * D_V + o_v[None, :]
    b_state = tl.load(p_state, mask=m_k[:, None] & m_v[None, :], other=0.0, eviction_policy="evict_first")
    wait(OVERLAP)
    # the queries of the group and, in the row after them, the key
    p_x = tl.where(m_g[:, None], p_query + (o_g * s_query_h)[:, None], p_key) + o_k[None, :]
    b_x = tl.load(p_x, mask=(o_g <= G)[:, None] & m_k[None, :], other=0.0).to(tl.float32)
    b_v = tl.load(p_value + o_v, mask=m_v, other=0.0).to(tl.float32)
    phi_q = _features(b_x, m_k[None, :], QUERY_SOFTMAX)
    phi_k = _row(phi_q if QUERY_SOFTMAX == KEY_SOFTMAX else _features(b_x, m_k[None, :], KEY_SOFTMAX), G)
    decay = _decay(_row(b_x, G), DIVISOR)
    # phi_q (decay S + phi_k v) = (phi_q decay) S + (phi_q phi_k) v: the product takes S as it was loaded
    phi_q = tl.where(m_g[:, None], phi_q * recurrence_weight, 0.0)
    read = tl.sum(phi_q * phi_k[None, :], axis=1)[:, None] * b_v[None, :]
    read = tl.dot(phi_q * decay[None, :], b_state, read, input_precision=PRECISION)
    b_state = decay[:, None] * b_state + phi_k[:, None] * b_v[None, :]
    m_state = m_k[:, None] & m_v[None, :] & (tl.load(p_now) >= 0)
    tl.store(p_state, b_state, mask=m_state, eviction_policy="evict_first")
    tl.store(p_read + o_g[:, None] * D_V + o_v[None, :], read, mask=m_g[:, None] & m_v[None, :])


@triton.jit
def _judge(
    p_key, p_value, p_state, p_recalled, start, p_now,
    D_K: tl.constexpr, DK_PAD: tl.constexpr, D_V: tl.constexpr, BLOCK_V: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add the token to the columns of the judge state from `start`; write what it recalled before, `[columns]`."""
    o_k, o_v = tl.arange(0, DK_PAD), start + tl.arange(0, BLOCK_V)
    m_k, m_v = o_k < D_K, o_v < D_V
    p_mass = p_state + o_k * (D_V + 1) + D_V
    p_state += o_k[:, None] * (D_V + 1) + o_v[None, :]
    b_state = tl.load(p_state, mask=m_k[:, None] & m_v[None, :], other=0.0, eviction_policy="evict_first")
    m_mass = m_k & (start == 0)  # the last column, the sum of the features, goes with the first block
    b_mass = tl.load(p_mass, mask=m_mass, other=0.0)
    wait(OVERLAP)
    b_v = tl.load(p_value + o_v, mask=m_v, other=0.0).to(tl.float32)
    phi = _features(tl.load(p_key + o_k, mask=m_k, other=0.0).to(tl.float32), m_k, True)
    tl.store(p_recalled + o_v, tl.sum(phi[:, None] * b_state, axis=0), mask=m_v)
    b_state += phi[:, None] * b_v[None, :]
    active = tl.load(p_now) >= 0
    tl.store(p_state, b_state, mask=m_k[:, None] & m_v[None, :] & active, eviction_policy="evict_first")
    if start == 0:
        tl.store(p_recalled + D_V, tl.sum(phi * b_mass, axis=0))
        tl.store(p_mass, b_mass + phi, mask=m_k & active)


@triton.jit
def _mixer_step_kernel(
    p_query, p_key, p_value, p_position, p_index, p_rotary, p_output, p_slot_key, p_slot_value, p_slot_position,
    p_slot_score, p_recurrent, p_judge, p_score, p_scratch, p_count, p_lost,
    s_query_b, s_query_h, s_key_b, s_key_h, s_value_b, s_value_h,
    scale2, attention_weight, recurrence_weight,
    H: tl.constexpr, G: tl.constexpr, D_K: tl.constexpr, DK_PAD: tl.constexpr, D_V: tl.constexpr,
    DV_PAD: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, BLOCK_R: tl.constexpr, REST_PAD: tl.constexpr,
    CAP: tl.constexpr, TABLE: tl.constexpr, N: tl.constexpr, N_PAD: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, POOLS: tl.constexpr, P_PAD: tl.constexpr, BY_VALUE: tl.constexpr,
    QUERY_SOFTMAX: tl.constexpr, KEY_SOFTMAX: tl.constexpr, DIVISOR: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_JUDGE: tl.constexpr, SCRATCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    RECURRENT: tl.constexpr = 0 if p_recurrent is None else (D_V + BLOCK_V - 1) // BLOCK_V
    JUDGES: tl.constexpr = 0 if p_judge is None else (D_V + BLOCK_JUDGE - 1) // BLOCK_JUDGE
    ROLES: tl.constexpr = 1 + RECURRENT + JUDGES
    unit, role = tl.program_id(0) // ROLES, tl.program_id(0) % ROLES
    b, h = (unit // H).to(tl.int64), unit % H
    p_query += b * s_query_b + h * G * s_query_h
    p_key += b * s_key_b + h * s_key_h
    p_value += b * s_value_b + h * s_value_h
    p_output += unit.to(tl.int64) * (G * D_V)
    o_g, o_v = tl.arange(0, 8), tl.arange(0, DV_PAD)
    p_out, m_out = p_output + o_g[:, None] * D_V + o_v[None, :], (o_g < G)[:, None] & (o_v < D_V)[None, :]
    row = b
    if p_index is not None:
        row = tl.load(p_index + b).to(tl.int64)
        if row < 0:
            if role == 0:
                tl.store(p_out, tl.zeros([8, DV_PAD], p_output.dtype.element_ty), mask=m_out)
            return
    head = row * H + h
    p_now = p_position + b

    # What the programs of a head leave for the last of them: attention, what is read from the recurrence, both
    # `[G, d_v]`; what the judge recalled `[d_v]` and its mass; the new token's slot.
    p_mixed, p_read, p_recalled, p_place = p_output, None, None, None
    if ROLES > 1:
        p_scratch += unit.to(tl.int64) * SCRATCH
        p_read, p_recalled = p_scratch + G * D_V, p_scratch + 2 * G * D_V
        p_place = p_recalled + D_V + 1
        if RECURRENT > 0:
            p_mixed = p_scratch
    if p_lost is not None:
        p_lost += unit.to(tl.int64) * ((G + 1) * (D_V + 1) + D_K)
        p_mixed = p_lost
    if p_slot_score is not None:
        p_slot_score += head * (len(POOLS) * N)
    if p_score is not None:
        p_score += unit
    if role == 0:
        _attend(
            p_query, p_key, p_value, s_query_h, p_rotary, p_slot_key + head * (N * D_K),
            p_slot_value + head * (N * D_V), p_slot_position + head * N, p_slot_score, p_score, p_mixed, p_place,
            p_lost, p_now, scale2, attention_weight, G, D_K, DK_PAD, D_V, DV_PAD, R, R_PAD, BLOCK_R, REST_PAD, CAP,
            TABLE, N, N_PAD, WINDOW, SINKS, POOLS, P_PAD, BY_VALUE, TILE, PRECISION, OVERLAP,
        )  # fmt: skip
    if RECURRENT > 0:
        start = (role - 1) * BLOCK_V
        if (role > 0) & (role <= RECURRENT):
            _recur(
                p_query, p_key, p_value, s_query_h, p_recurrent + head * (D_K * D_V), p_read, start, p_now,
                recurrence_weight, G, D_K, DK_PAD, D_V, BLOCK_V, QUERY_SOFTMAX, KEY_SOFTMAX, DIVISOR, PRECISION,
                OVERLAP,
            )  # fmt: skip
    if JUDGES > 0:
        start = (role - 1 - RECURRENT) * BLOCK_JUDGE
        if role > RECURRENT:
            p_state = p_judge + head * (D_K * (D_V + 1))
            _judge(p_key, p_value, p_state, p_recalled, start, p_now, D_K, DK_PAD, D_V, BLOCK_JUDGE, OVERLAP)
    if ROLES > 1:
        tl.debug_barrier()
        arrived = tl.atomic_add(p_count + unit, 1, sem="acq_rel")
        if arrived == ROLES - 1:
            tl.store(p_count + unit, 0)  # for the next launch
            now = tl.load(p_now).to(tl.int32)
            if RECURRENT > 0:
                o_part = o_g[:, None] * D_V + o_v[None, :]
                mixed = tl.load(p_scratch + o_part, mask=m_out, cache_modifier=".cg")
                mixed += tl.load(p_read + o_part, mask=m_out, cache_modifier=".cg")
                tl.store(p_out, tl.where(now >= 0, mixed, 0.0).to(p_output.dtype.element_ty), mask=m_out)
            if JUDGES > 0:
                mass = tl.load(p_recalled + D_V, cache_modifier=".cg")
                place = tl.load(p_place, cache_modifier=".cg").to(tl.int32)
                recalled = tl.load(p_recalled + o_v, mask=o_v < D_V, other=0.0, cache_modifier=".cg")
                b_v = tl.load(p_value + o_v, mask=o_v < D_V, other=0.0).to(tl.float32)
                wrong = b_v - recalled * tl.where(mass > 0, 1.0 / tl.where(mass > 0, mass, 1.0), 0.0)
                novelty = tl.sqrt(tl.sum(wrong * wrong, axis=0))
                for i in tl.static_range(len(POOLS)):
                    if POOLS[i][1]:
                        tl.store(p_slot_score + i * N + place, novelty, mask=now >= 0)
