"""One token of `liger_mixer` in one launch: slots, judge and recurrence are read once and updated in place.

The slots are an unordered set here: the new token overwrites the one that loses its slot. A KV head has one program
for its slots and several that each stream columns of its states; the last of them to finish combines their results. If
evicted tokens feed the recurrence, `evicted_step` follows, which needs the token that the first launch evicted. The
rows of a keyed gate follow in a second launch too, which reads the first one's output in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused.evicted_step import evicted_step
from ligerexport.kernels.fused.keyed import keyed_recurrence
from ligerexport.kernels.fused.numbers import LOG2E
from ligerexport.kernels.fused.slots_step import ON_ARRIVAL, attend_slots
from ligerexport.kernels.fused.state_step import judge, recur
from ligerexport.kernels.tuning import overlaps
from ligerexport.model.gates import get_gate
from ligerexport.model.state import MixerSpec, MixerState


@dataclass(frozen=True)
class Tiling:
    """How one launch is divided: each head has one program for its slots, and others for the columns of its states.

    Attributes:
        block_v: Columns of the recurrent state that a program holds.
        block_judge: Columns of the judge state that a program holds.
        num_warps: Warps per program.
        block_r: Number of channel pairs that are rotated at a time, at least 16.
        max_registers: Largest number of registers per thread; None lets the compiler choose.
    """

    block_v: int
    block_judge: int
    num_warps: int
    block_r: int = 32
    max_registers: int | None = None


def choose_tiling(spec: MixerSpec, batch: int, itemsize: int = 2) -> Tiling:
    """Return the tiling for a layer, a batch and activations of `itemsize` bytes."""
    width, few = triton.next_power_of_2(max(spec.d_k, spec.d_v)), batch * spec.kv_heads < 33
    # at most 32 registers per thread for keys, and the same for values; more programs if there are few heads
    warps = min(16, max(4, _padded(spec.config.num_slots) * width * itemsize // 4096))
    columns = max(16, 1024 * warps // triton.next_power_of_2(spec.d_k))
    block_v, block_judge = (16, 16) if few else (min(64, 2 * columns), min(64, columns))
    return Tiling(block_v, block_judge, warps, max_registers=None if few or itemsize > 2 else 128)


def mixer_step(
    heads: tuple[Tensor, Tensor, Tensor],
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

    Arguments and result are those of `ligerexport.kernels.library.mixer_step`, except these.

    Args:
        heads: Query, key and value, with any strides and a contiguous last axis.
        out: `[B, H_q, d_v]`, contiguous, to write to.
        tiling: Division of the launch; None for `choose_tiling`.
    """
    (query, key, value), config, gate = heads, spec.config, get_gate(spec.config.gate)
    batch = query.shape[0]
    position = position.contiguous()
    index = None if index is None else index.contiguous()
    score = score.contiguous() if score is not None and config.foresees else None
    if out is None:
        out = query.new_empty(batch, spec.q_heads, spec.d_v)
    tiling = tiling or choose_tiling(spec, batch, query.element_size())
    pools, units, rotated = spec.pools, batch * spec.kv_heads, rotary.shape[-1]
    group, evicts = spec.q_heads // spec.kv_heads, config.evicts
    recurrent, judge = None if evicts or config.keyed else state.get("recurrent_state"), state.get("judge_state")
    mixed = torch.empty_like(out, dtype=torch.float32) if config.keyed else out
    lost = query.new_empty(units, (group + 1) * (spec.d_v + 1) + spec.d_k, dtype=torch.float32) if evicts else None
    roles = 1 + triton.cdiv(spec.d_v, tiling.block_v) * (recurrent is not None)
    roles += triton.cdiv(spec.d_v, tiling.block_judge) * config.judged
    left = triton.cdiv((2 * group + 1) * spec.d_v + group + 2, 32) * 32
    scratch, count = (_scratch(query.device, units * left), _count(query.device, units)) if roles > 1 else (None, None)
    precision = "tf32x3" if query.dtype == torch.float32 else "tf32"
    _mixer_step_kernel[(units * roles,)](
        query, key, value, position, index, rotary, mixed,
        state["slot_key"], state["slot_value"], state["slot_position"], state.get("slot_score"),
        recurrent, judge, score, scratch, count, lost,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        spec.scale * LOG2E.value, config.attention_weight, config.recurrence_weight,
        H=spec.kv_heads, G=group, D_K=spec.d_k, DK_PAD=triton.next_power_of_2(spec.d_k),
        D_V=spec.d_v, DV_PAD=triton.next_power_of_2(spec.d_v),
        R=rotated, R_PAD=_padded(rotated), BLOCK_R=min(tiling.block_r, _padded(rotated)),
        REST_PAD=_padded(spec.d_k - 2 * rotated), CAP=spec.max_distance, TABLE=rotary.shape[1] * rotated,
        N=config.num_slots, N_PAD=_padded(config.num_slots), WINDOW=config.window, SINKS=config.sinks,
        POOLS=pools, P_PAD=triton.next_power_of_2(max(len(pools), 1)), BY_VALUE=any(pool.by_value for pool in pools),
        QUERY_MAP=gate.query_map, KEY_MAP=gate.key_map, DECAY=gate.kernel_decay, NORMALISED=config.normalised,
        PRECISION="ieee" if triton.knobs.runtime.interpret else precision,
        TILE=min(triton.next_power_of_2(spec.d_v), 65536 // (_padded(config.num_slots) * query.element_size())),
        BLOCK_V=tiling.block_v, BLOCK_JUDGE=tiling.block_judge, SCRATCH=left, OVERLAP=overlaps(),
        num_warps=tiling.num_warps, num_stages=1, maxnreg=tiling.max_registers,
    )  # fmt: skip
    if lost is not None:
        evicted_step(query, position, index, rotary, out, state, lost, spec)
    if config.keyed:
        rows = state["recurrent_key"], state["recurrent_state"]
        single = query[:, None], key[:, None], value[:, None]
        keyed_recurrence(single, position, rows, rows, out, spec, index, mixed)
    return out


@cache
def _count(device: torch.device, size: int) -> Tensor:
    """Return one counter per head, 0 between launches; launches must not overlap."""
    return torch.zeros(size, dtype=torch.int32, device=device)


@cache
def _scratch(device: torch.device, size: int) -> Tensor:
    """Return memory for partial results; it is never freed, since CUDA graphs hold its address."""
    return torch.empty(size, dtype=torch.float32, device=device)


def _padded(size: int) -> int:
    """Return the next power of two that is large enough for a matrix product, or 0 for 0."""
    return max(16, triton.next_power_of_2(size)) if size else 0


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
    QUERY_MAP: tl.constexpr, KEY_MAP: tl.constexpr, DECAY: tl.constexpr, NORMALISED: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_JUDGE: tl.constexpr,
    SCRATCH: tl.constexpr, OVERLAP: tl.constexpr,
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

    # The programs of a head write for the last one: attention and the recurrence's answer, both `[G, d_v]`, and the
    # answer's sums of weights, `[G]`; the judge's answer, `[d_v]`, and its mass; the new token's slot.
    p_mixed, p_read, p_recalled, p_place = p_output, None, None, None
    if ROLES > 1:
        p_scratch += unit.to(tl.int64) * SCRATCH
        p_read, p_recalled = p_scratch + G * D_V, p_scratch + G * (2 * D_V + 1)
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
        attend_slots(
            p_query, p_key, p_value, s_query_h, p_rotary, p_slot_key + head * (N * D_K),
            p_slot_value + head * (N * D_V), p_slot_position + head * N, p_slot_score, p_score, p_mixed, p_place,
            p_lost, p_now, scale2, attention_weight, G, D_K, DK_PAD, D_V, DV_PAD, R, R_PAD, BLOCK_R, REST_PAD, CAP,
            TABLE, N, N_PAD, WINDOW, SINKS, POOLS, P_PAD, BY_VALUE, TILE, PRECISION, OVERLAP,
        )  # fmt: skip
    if RECURRENT > 0:
        start = (role - 1) * BLOCK_V
        if (role > 0) & (role <= RECURRENT):
            recur(
                p_query, p_key, p_value, s_query_h, p_recurrent + head * (D_K * (D_V + 1 if NORMALISED else D_V)),
                p_read, start, p_now, recurrence_weight, G, D_K, DK_PAD, D_V, BLOCK_V, QUERY_MAP, KEY_MAP, DECAY,
                NORMALISED, PRECISION, OVERLAP,
            )  # fmt: skip
    if JUDGES > 0:
        start = (role - 1 - RECURRENT) * BLOCK_JUDGE
        if role > RECURRENT:
            p_state = p_judge + head * (D_K * (D_V + 1))
            judge(p_key, p_value, p_state, p_recalled, start, p_now, D_K, DK_PAD, D_V, BLOCK_JUDGE, OVERLAP)
    if ROLES > 1:
        tl.debug_barrier()
        arrived = tl.atomic_add(p_count + unit, 1, sem="acq_rel")
        if arrived == ROLES - 1:
            tl.store(p_count + unit, 0)  # for the next launch
            now = tl.load(p_now).to(tl.int32)
            if RECURRENT > 0:
                o_part = o_g[:, None] * D_V + o_v[None, :]
                mixed = tl.load(p_scratch + o_part, mask=m_out, cache_modifier=".cg")
                read = tl.load(p_read + o_part, mask=m_out, cache_modifier=".cg")
                if NORMALISED:  # the weight of the recurrence is in both
                    sums = tl.load(p_read + G * D_V + o_g, mask=o_g < G, other=0.0, cache_modifier=".cg")
                    read = read * (recurrence_weight / tl.where(sums > 0, sums, 1.0))[:, None]
                mixed += read
                tl.store(p_out, tl.where(now >= 0, mixed, 0.0).to(p_output.dtype.element_ty), mask=m_out)
            if JUDGES > 0:
                mass = tl.load(p_recalled + D_V, cache_modifier=".cg")
                place = tl.load(p_place, cache_modifier=".cg").to(tl.int32)
                recalled = tl.load(p_recalled + o_v, mask=o_v < D_V, other=0.0, cache_modifier=".cg")
                b_v = tl.load(p_value + o_v, mask=o_v < D_V, other=0.0).to(tl.float32)
                wrong = b_v - recalled * tl.where(mass > 0, 1.0 / tl.where(mass > 0, mass, 1.0), 0.0)
                novelty = tl.sqrt(tl.sum(wrong * wrong, axis=0))
                for i in tl.static_range(len(POOLS)):
                    if POOLS[i][ON_ARRIVAL]:
                        tl.store(p_slot_score + i * N + place, novelty, mask=now >= 0)
