"""The keys that a call may attend to: carried slots in the order of their positions, then the new tokens.

All other kernels read these rotated and padded copies. Channels that rotate together lie side by side, so that a tile
is rotated in registers; the order of channels does not change the product of a query and a key.
"""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ligerexport.kernels.fused.launch import launch, layout, same
from ligerexport.kernels.tuning import cdiv, power_of_two
from ligerexport.model.state import MixerSpec, MixerState

BLOCK = 64
"""Number of queries that are mixed at a time."""

NARROWEST = 32
"""Smallest number of channels of a tile; with 16, Triton 3.6 computes a wrong gradient of fp32 queries on an H100."""

EMPTY = tl.constexpr(-(2**30))
"""Time of an empty candidate; differences from it still fit in 32 bits."""
NEVER = tl.constexpr(2**31 - 1)
"""Death of a candidate that stays."""

_LONGER: MutableMapping[Tensor, tuple[int, Tensor]] = WeakIdKeyDictionary()
"""For a rotary table, the last longer one that was made of it, which all layers of a model share, and its turns."""


@dataclass(frozen=True)
class Candidates:
    """The tensors that the kernels of one call share.

    C = N + T. D_k and D_v are the widths rounded up to powers of two, and at least `NARROWEST`.

    Attributes:
        spec: The layer.
        call: The same object for calls of equal layout.
        query: `[B, H_q, T, D_k]`, rotated by the token's index.
        key: `[B, H_kv, C, D_k]`, rotated by `time`, carried ones by at most the largest distance.
        value: `[B, H_kv, C, D_v]`.
        time: `[B, H_kv, C]` int32, index of the token, negative for carried ones, `EMPTY` for empty ones.
        leave: `[B, H_kv, C]` int32, time at which it leaves the window: never for a sink, always for an empty one.
        score: `[B, H_kv, P, C]`; attention received in this call is not in it yet.
        source: `[B, H_kv, N]` int32, the slot of the state from which a carried candidate came.
        position: `[B]` int64.
        sizes: `[H_kv, 2]` int32, window and scored slots of each head; unused if all heads have those of the layer.
        angles: `[2, rows, R]`, cosine and sine from offset `-reach` to at least 0.
        reach: Largest offset in `angles`.
    """

    spec: MixerSpec
    call: Hashable
    query: Tensor
    key: Tensor
    value: Tensor
    time: Tensor
    leave: Tensor
    score: Tensor
    source: Tensor
    position: Tensor
    sizes: Tensor
    angles: Tensor
    reach: int

    @property
    def length(self) -> int:
        """T."""
        return self.query.shape[2]

    @property
    def count(self) -> int:
        """C."""
        return self.key.shape[2]

    @property
    def blocks(self) -> int:
        """Blocks of queries."""
        return cdiv(self.length, BLOCK)

    @property
    def ragged(self) -> bool:
        """Whether heads have sizes of their own."""
        return bool(self.spec.sizes)

    @property
    def precision(self) -> str:
        """Precision of scalar products of fp32."""
        return "tf32x3" if self.query.dtype == torch.float32 else "ieee"


@triton.jit
def angles(p_angles, plane, offset, reach, PAIRS: tl.constexpr, R: tl.constexpr):
    """Return cosine and sine `[rows, PAIRS]` of an offset in tokens for each row."""
    pair = tl.arange(0, PAIRS)[None, :]
    row = tl.maximum(reach - tl.abs(offset), 0)
    p_cos = p_angles + row[:, None] * R + pair
    cos = tl.load(p_cos, mask=pair < R, other=1.0)
    sin = tl.load(p_cos + plane, mask=pair < R, other=0.0)
    return cos, tl.where((offset > 0)[:, None], -sin, sin)


@triton.jit
def channels(PAIRS: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """Return the two channels of each pair; beyond 2 R channels neighbours are paired and are not rotated."""
    pair = tl.arange(0, PAIRS)
    if 2 * R == D:
        first, second = pair, pair + R
    else:
        first, second = tl.where(pair < R, pair, 2 * pair), tl.where(pair < R, pair + R, 2 * pair + 1)
    return first, second, pair < D // 2


@triton.jit
def turn(x, cos, sin, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rotate the pairs of neighbours of a tile `[ROWS, WIDTH]`."""
    first, second = tl.split(tl.reshape(x.to(tl.float32), (ROWS, WIDTH // 2, 2)))
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(turned, (ROWS, WIDTH))


@triton.jit
def _load_turned(p_row, m_row, cos, sin, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """Load rows `[ROWS]` of d channels, rotate them and return them `[ROWS, WIDTH]` with pairs side by side."""
    first, second, m_pair = channels(WIDTH // 2, D, R)
    mask = m_row[:, None] & m_pair[None, :]
    b_first = tl.load(p_row[:, None] + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b_second = tl.load(p_row[:, None] + second[None, :], mask=mask, other=0.0).to(tl.float32)
    turned = tl.join(b_first * cos - b_second * sin, b_second * cos + b_first * sin)
    return tl.reshape(turned, (ROWS, WIDTH))


@triton.jit
def narrowed(x, p_from, p_to):
    """Return fp32 in the type that `p_to` points to; what bf16 holds may be more than fp16 does."""
    if p_from.dtype.element_ty == tl.bfloat16 and p_to.dtype.element_ty == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(p_to.dtype.element_ty)


@triton.jit
def window_of(p_sizes, h, WINDOW: tl.constexpr, RAGGED: tl.constexpr):
    """Return the window of a head."""
    if RAGGED:
        return tl.load(p_sizes + 2 * h)
    else:
        return WINDOW


@triton.jit
def pool_of(p_sizes, h, SIZE: tl.constexpr, RAGGED: tl.constexpr):
    """Return the scored slots of a head in its only pool."""
    if RAGGED:
        return tl.load(p_sizes + 2 * h + 1)
    else:
        return SIZE


@triton.jit
def kept_of(p_sizes, h, SINKS: tl.constexpr, KEPT: tl.constexpr, RAGGED: tl.constexpr):
    """Return the sinks and scored slots of a head."""
    if RAGGED:
        return SINKS + tl.load(p_sizes + 2 * h + 1)
    else:
        return KEPT


@triton.jit
def _leave(time, position, window, SINKS: tl.constexpr):
    """Return when candidates leave the window."""
    sink = time + position < SINKS
    return tl.where(time == EMPTY, EMPTY, tl.where(sink, NEVER, time + window)).to(tl.int32)


@triton.jit
def _tokens_kernel(
    p_query, p_key, p_value, p_arrival, p_position, p_sizes, p_angles,
    p_turned_query, p_turned_key, p_copied_value, p_time, p_leave, p_score,
    query_b, query_t, query_h, key_b, key_t, key_h, value_b, value_t, value_h, arrival_b, arrival_t, arrival_h,
    length, plane, reach,
    H_KV: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    POOLS: tl.constexpr, ARRIVAL_POOL: tl.constexpr, D_K: tl.constexpr, WIDTH_K: tl.constexpr, D_V: tl.constexpr,
    WIDTH_V: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Rotate queries and keys of `ROWS` new tokens for one KV head's group, and copy their values and scores.

    A program takes the whole group, since the angles are as large as the queries of two heads.
    """
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh = b * H_KV + h
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_t = t < length
    cos, sin = angles(p_angles, plane, t, reach, WIDTH_K // 2, R)
    i_k, i_v = tl.arange(0, WIDTH_K), tl.arange(0, WIDTH_V)
    p_row = p_query + b * query_b + t.to(tl.int64) * query_t + h * GROUP * query_h
    for head in range(GROUP):
        turned = _load_turned(p_row + head * query_h, m_t, cos, sin, ROWS, WIDTH_K, D_K, R)
        p_to = p_turned_query + ((bh * GROUP + head) * length + t)[:, None] * WIDTH_K + i_k[None, :]
        tl.store(p_to, narrowed(turned, p_query, p_turned_query), mask=m_t[:, None])

    p_row = p_key + b * key_b + t.to(tl.int64) * key_t + h * key_h
    turned = _load_turned(p_row, m_t, cos, sin, ROWS, WIDTH_K, D_K, R)
    lane = bh * (SLOTS + length) + SLOTS + t
    p_to = p_turned_key + lane[:, None] * WIDTH_K + i_k[None, :]
    tl.store(p_to, turned.to(p_turned_key.dtype.element_ty), mask=m_t[:, None])
    p_row = p_value + b * value_b + t.to(tl.int64) * value_t + h * value_h
    b_v = tl.load(p_row[:, None] + i_v[None, :], mask=m_t[:, None] & (i_v < D_V)[None, :], other=0.0)
    tl.store(p_copied_value + lane[:, None] * WIDTH_V + i_v[None, :], b_v, mask=m_t[:, None])
    position = tl.load(p_position + b)
    time = tl.where(t + position >= 0, t, EMPTY)
    tl.store(p_time + lane, time, mask=m_t)
    tl.store(p_leave + lane, _leave(time, position, window_of(p_sizes, h, WINDOW, RAGGED), SINKS), mask=m_t)
    if ARRIVAL_POOL >= 0:
        b_score = tl.load(p_arrival + b * arrival_b + t * arrival_t + h * arrival_h, mask=m_t, other=0.0)
        row = (bh * POOLS + ARRIVAL_POOL) * (SLOTS + length) + SLOTS + t
        tl.store(p_score + row, b_score, mask=m_t)


@triton.jit
def _slots_kernel(
    p_slot_key, p_slot_value, p_slot_position, p_slot_score, p_position, p_sizes, p_angles,
    p_turned_key, p_copied_value, p_time, p_leave, p_score, p_source,
    count, plane, reach, cap,
    H_KV: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    POOLS: tl.constexpr, D_K: tl.constexpr, WIDTH_K: tl.constexpr, D_V: tl.constexpr, WIDTH_V: tl.constexpr,
    R: tl.constexpr, ROWS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Put carried slots in the order of their positions, empty ones first, and rotate their keys."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_n = n < SLOTS
    bh = b * H_KV + h
    b_position = tl.load(p_slot_position + bh * SLOTS + n, mask=m_n, other=0)
    place = tl.zeros((ROWS,), tl.int32)
    for start in range(0, SLOTS, COLUMNS):
        other = start + tl.arange(0, COLUMNS)
        b_other = tl.load(p_slot_position + bh * SLOTS + other, mask=other < SLOTS, other=0)
        before = (b_other[None, :] < b_position[:, None]) | (
            (b_other[None, :] == b_position[:, None]) & (other[None, :] < n[:, None])
        )
        place += tl.sum((before & (other < SLOTS)[None, :]).to(tl.int32), axis=1)

    position = tl.load(p_position + b)
    time = tl.where(b_position < 0, EMPTY, tl.maximum(b_position - position, EMPTY + 1)).to(tl.int32)
    lane = bh * count + place
    tl.store(p_time + lane, time, mask=m_n)
    tl.store(p_leave + lane, _leave(time, position, window_of(p_sizes, h, WINDOW, RAGGED), SINKS), mask=m_n)
    tl.store(p_source + bh * SLOTS + place, n, mask=m_n)
    for pool in tl.static_range(POOLS):
        b_score = tl.load(p_slot_score + (bh * POOLS + pool) * SLOTS + n, mask=m_n, other=0.0)
        tl.store(p_score + (bh * POOLS + pool) * count + place, b_score, mask=m_n)

    # An empty slot may hold any number, also one whose product with zero is not zero.
    m_full = m_n & (time != EMPTY)
    cos, sin = angles(p_angles, plane, tl.maximum(time, -cap), reach, WIDTH_K // 2, R)
    turned = _load_turned(p_slot_key + (bh * SLOTS + n) * D_K, m_full, cos, sin, ROWS, WIDTH_K, D_K, R)
    p_to = p_turned_key + lane[:, None] * WIDTH_K + tl.arange(0, WIDTH_K)[None, :]
    tl.store(p_to, turned.to(p_to.dtype.element_ty), mask=m_n[:, None])
    i_v = tl.arange(0, WIDTH_V)
    p_row = p_slot_value + (bh * SLOTS + n) * D_V
    b_v = tl.load(p_row[:, None] + i_v[None, :], mask=m_full[:, None] & (i_v < D_V)[None, :], other=0.0)
    p_to = p_copied_value + lane[:, None] * WIDTH_V + i_v[None, :]
    tl.store(p_to, b_v.to(p_to.dtype.element_ty), mask=m_n[:, None])


def gather_candidates(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arrival: Tensor | None,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
    call: Hashable = None,
    dtype: torch.dtype | None = None,
) -> Candidates:
    """Return the candidates of a call; the other arguments are those of `memory_attention`.

    Args:
        call: An object that is the same for calls of equal layout, if the caller has one.
        dtype: Type of the copies; None takes that of the queries.
    """
    (batch, length, q_heads, d_k), (kv_heads, d_v), position = query.shape, value.shape[2:], position.contiguous()
    config, slots, pools = spec.config, spec.config.num_slots, len(spec.config.slots)
    width_k, width_v = (max(power_of_two(d), NARROWEST) for d in (d_k, d_v))
    table, reach = _reach(rotary, spec.max_distance, length)
    call = call or same(layout(query, key, value, arrival, position, table, *state.values()), spec.text)
    time = torch.empty(batch, kv_heads, slots + length, dtype=torch.int32, device=query.device)
    found = Candidates(
        spec=spec,
        call=call,
        query=query.new_empty(batch, q_heads, length, width_k, dtype=dtype),
        key=query.new_empty(batch, kv_heads, slots + length, width_k, dtype=dtype),
        value=query.new_empty(batch, kv_heads, slots + length, width_v, dtype=dtype),
        time=time,
        leave=torch.empty_like(time),
        score=torch.empty(batch, kv_heads, pools, slots + length, dtype=torch.float32, device=query.device),
        source=torch.empty(batch, kv_heads, slots, dtype=torch.int32, device=query.device),
        position=position,
        sizes=sizes_on(spec.sizes, query.device) if spec.sizes else position,
        angles=table,
        reach=reach,
    )
    arrives = next((i for i, pool in enumerate(spec.pools) if pool.on_arrival), -1)
    strides = [s for x in (query, key, value) for s in x.stride()[:3]]
    strides += (0, 0, 0) if arrival is None else arrival.stride()
    constants = {
        "H_KV": kv_heads, "SLOTS": slots, "WINDOW": config.window, "SINKS": config.sinks, "POOLS": pools, "D_K": d_k,
        "WIDTH_K": width_k, "D_V": d_v, "WIDTH_V": width_v, "R": table.shape[2], "RAGGED": found.ragged,
    }  # fmt: skip
    rows = 32 if max(width_k, width_v) <= 128 else 16
    launch(
        call, _tokens_kernel, (cdiv(length, rows), kv_heads, batch),
        query, key, value, position if arrival is None else arrival, position, found.sizes, table, found.query,
        found.key, found.value, found.time, found.leave, found.score, *strides, length, table.stride(0), reach,
        constants=lambda: constants | {
            "GROUP": q_heads // kv_heads, "ARRIVAL_POOL": arrives, "ROWS": rows, "num_warps": 4,
        },
    )  # fmt: skip
    launch(
        call, _slots_kernel, (cdiv(slots, 16), kv_heads, batch),
        state["slot_key"], state["slot_value"], state["slot_position"], state.get("slot_score", found.score), position,
        found.sizes, table, found.key, found.value, found.time, found.leave, found.score, found.source, found.count,
        table.stride(0), reach, spec.max_distance,
        constants=lambda: constants | {
            "COLUMNS": min(512, power_of_two(slots)), "ROWS": 16, "num_warps": 4,
        },
    )  # fmt: skip
    return found


@cache
def sizes_on(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return the sizes of heads as a tensor."""
    return torch.tensor(sizes, dtype=torch.int32, device=device)


def _reach(rotary: Tensor, cap: int, length: int) -> tuple[Tensor, int]:
    """Return a table of angles that reaches back over the whole call, and its reach in tokens."""
    if length <= cap + 1:
        return rotary.contiguous(), cap
    turns = length // cap + 1
    made = _LONGER.get(rotary)
    if made is None or made[0] != turns:
        made = _LONGER[rotary] = turns, _turned_on(rotary, cap, turns)
    return made[1], made[1].shape[1] - 1


def _turned_on(rotary: Tensor, cap: int, turns: int) -> Tensor:
    """Return the angles from offset `-(turns + 1) cap + 1` to 0."""
    circle = torch.complex(rotary[0, : cap + 1].double(), rotary[1, : cap + 1].double())
    steps = torch.arange(turns, -1, -1, device=rotary.device)
    whole = circle[0].angle() * steps[:, None]
    longer = (torch.polar(torch.ones_like(whole), whole)[:, None] * circle[1:]).flatten(0, 1)
    return torch.stack([longer.real, longer.imag]).float()
