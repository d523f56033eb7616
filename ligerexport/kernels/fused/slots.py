"""When each candidate is evicted, which old candidates a block of queries still sees, and the slots that remain.

A pool keeps the best of all tokens that left the window so far, and a token that it drops competes for the next pool.
One token leaves the window at a time (an event), so a pool drops either that token or the worst that it holds. The
content of a pool follows from the best of all earlier blocks of events, merged as sorted lists, and from counting
better items within the block. No loop over single tokens is needed.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused.candidates import BLOCK, EMPTY, NEVER, Candidates, pool_of, window_of
from ligerexport.kernels.fused.launch import launch
from ligerexport.kernels.fused.numbers import FAINTEST
from ligerexport.kernels.tuning import cdiv, power_of_two
from ligerexport.model.state import SLOTS, MixerState

EVENTS = 128
"""Number of events for which one program finds the drops of a pool."""

LONG = 512
"""Number of a pool's places from which blocks of events are merged by segments."""
SEGMENT = 8
"""Number of blocks of events in a segment."""

NOTHING = tl.constexpr(-(2**63))
"""Order of an event without an item: worse than all items."""
NEVER_DROPPED = tl.constexpr(2**63 - 1)
"""Order of a token that is never dropped."""


@triton.jit
def _order(score, time, item, enters, HORIZON: tl.constexpr):
    """Return an integer per item that is larger for a better one: by rank, the older on a tie; `NOTHING` for no item.

    Pools that age rank by times counted from the start of the call, because the positions of a long text would round.
    """
    rank = score
    if HORIZON > 0:
        rank = tl.log(tl.maximum(score, FAINTEST)) + tl.div_rn(time.to(tl.float32), HORIZON)
    bits = tl.where(rank == 0, 0.0, rank).to(tl.int32, bitcast=True)  # -0 must rank as 0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(enters, (bits.to(tl.int64) << 32) + (item ^ 0x7FFFFFFF).to(tl.int64), NOTHING)


@triton.jit
def _enter_kernel(
    p_time, p_leave, p_score, p_position, p_sizes, p_death, p_key, p_sorted, count, events, blocks,
    H_KV: tl.constexpr, SINKS: tl.constexpr, POOLS: tl.constexpr, HORIZON: tl.constexpr, LISTED: tl.constexpr,
    EVENTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Enter every token that leaves the window within the call into the first pool."""
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = block * EVENTS + tl.arange(0, EVENTS)
    bh = b * H_KV + h
    time = tl.load(p_time + bh * count + c, mask=c < count, other=EMPTY)
    leave = tl.load(p_leave + bh * count + c, mask=c < count, other=EMPTY)
    score = tl.load(p_score + bh * POOLS * count + c, mask=c < count, other=0.0)
    position = time + tl.load(p_position + b)
    enters = (c < events) & (time != EMPTY) & (position >= SINKS)
    if RAGGED:  # a head without slots drops a token that leaves at once
        enters &= (c < count - window_of(p_sizes, h, 0, True)) & (pool_of(p_sizes, h, 0, True) > 0)
    tl.store(p_death + bh * count + c, tl.where(enters, NEVER, leave), mask=c < count)
    key = _order(score, time, c, enters, HORIZON)
    tl.store(p_key + bh * events + c, key, mask=c < events)
    if block < blocks:
        tl.store(p_sorted + (bh * blocks + block) * LISTED + tl.arange(0, LISTED), tl.topk(key, LISTED))


@triton.jit
def _merged(best, other, PLACES: tl.constexpr, STAGES: tl.constexpr):
    """Return the best items of a falling and a rising list, in falling order."""
    x = tl.maximum(best, other)  # rises at most once, so halves can be exchanged one after the other
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(x, (2**stage, 2, PLACES // 2 ** (stage + 1)))
        opposite = tl.sum(pairs, axis=1, keep_dims=True) - pairs
        first = tl.arange(0, 2)[None, :, None] == 0
        x = tl.reshape(tl.where((pairs > opposite) == first, pairs, opposite), (PLACES,))
    return x


@triton.jit
def _leaders_kernel(
    p_sorted, p_before, p_leaders, p_total, blocks, per,
    LISTED: tl.constexpr, PLACES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Merge the sorted items of `per` blocks of events, after those in `p_before`. Grid: (segments, B * H).

    What is None is not read or written: `p_leaders` gets the best items before each block, `p_total` those of all.
    """
    segment, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, PLACES)
    at = (bh * tl.num_programs(0) + segment) * PLACES + i
    first = segment * per
    last = tl.minimum(first + per, blocks)
    p_block = p_sorted + (bh * blocks + first) * LISTED + PLACES - 1 - i
    listed = i >= PLACES - LISTED
    best = tl.full((PLACES,), NOTHING, tl.int64)
    if p_before is not None:
        best = tl.load(p_before + at)
    arriving = tl.load(p_block, mask=listed, other=NOTHING)
    for block in range(first, last):
        p_block += LISTED
        after = tl.load(p_block, mask=listed & (block + 1 < last), other=NOTHING)  # ready by the next iteration
        if p_leaders is not None:
            tl.store(p_leaders + (bh * blocks + block) * PLACES + i, best)
        best = _merged(best, arriving, PLACES, STAGES)
        arriving = after
    if p_total is not None:
        tl.store(p_total + at, best)


@triton.jit
def _least(item, better_before, since, held, key, e, size):
    """Return the least of the items that are in the pool just before each event of a block.

    Args:
        item: `[ROWS]` in the order of `_order`.
        better_before: `[ROWS]`, number of better items before the block.
        since: `[ROWS]`, event of the block that brought the item.
        held: `[ROWS]`, whether the item exists.
        key: `[EVENTS]`, the items of the events.
        e: `[EVENTS]`, the numbers of the events.
        size: Slots of the pool.
    """
    better = (key[None, :] > item[:, None]).to(tl.int32)
    better_so_far = better_before[:, None] + tl.cumsum(better, axis=1) - better
    kept = held[:, None] & (since[:, None] < e[None, :]) & (better_so_far < size)
    return tl.min(tl.where(kept, item[:, None], NEVER_DROPPED), axis=0)


@triton.jit
def _drop_kernel(
    p_key, p_leaders, p_next_key, p_next_sorted, p_score, p_time, p_leave, p_death, p_sizes, count, events, blocks,
    H_KV: tl.constexpr, POOLS: tl.constexpr, NEXT: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr,
    HORIZON: tl.constexpr, LISTED: tl.constexpr, EVENTS: tl.constexpr, ROWS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Find the item that a pool drops at each event of a block; pass it to pool `NEXT`, or evict it after the last."""
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh, size = b * H_KV + h, pool_of(p_sizes, h, SIZE, RAGGED)
    e = tl.arange(0, EVENTS)
    s = block * EVENTS + e
    key = tl.load(p_key + bh * events + s, mask=s < events, other=NOTHING)
    p_leaders += (bh * blocks + block) * PLACES
    threshold = tl.load(p_leaders + tl.maximum(size, 1) - 1)
    least = tl.zeros((EVENTS,), tl.int64) + threshold
    entering = tl.sum((key > threshold).to(tl.int32))
    if entering > 0:
        least = tl.full((EVENTS,), NEVER_DROPPED, tl.int64)
        for start in range(tl.maximum(size - 1 - entering, 0), size, ROWS):  # better ones stay
            place = start + tl.arange(0, ROWS)
            item = tl.load(p_leaders + place, mask=place < size, other=NOTHING)
            least = tl.minimum(least, _least(item, place, place * 0 - 1, place < size, key, e, size))
        i = tl.arange(0, PLACES)
        leaders = tl.load(p_leaders + i, mask=i < size, other=NOTHING)
        for start in range(0, EVENTS, ROWS):
            since = start + tl.arange(0, ROWS)
            m_item = block * EVENTS + since < events
            item = tl.load(p_key + bh * events + block * EVENTS + since, mask=m_item, other=NOTHING)
            enters = item > threshold
            if tl.max(enters.to(tl.int32)) > 0:  # few do
                better_before = tl.sum((leaders[None, :] > item[:, None]).to(tl.int32), axis=1)
                least = tl.minimum(least, _least(item, better_before, since, enters, key, e, size))

    # An event without an item drops nothing, and neither does a pool with an empty slot.
    dropped = tl.minimum(key, least)
    gone = dropped > NOTHING
    item = (dropped & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
    if NEXT == POOLS:
        death = tl.load(p_leave + bh * count + s, mask=gone, other=0)
        tl.store(p_death + bh * count + item, death, mask=gone)
    else:
        time = tl.load(p_time + bh * count + item, mask=gone, other=0)
        score = tl.load(p_score + (bh * POOLS + NEXT) * count + item, mask=gone, other=0.0)
        next_key = _order(score, time, item, gone, HORIZON)
        tl.store(p_next_key + bh * events + s, next_key, mask=s < events)
        tl.store(p_next_sorted + (bh * blocks + block) * LISTED + tl.arange(0, LISTED), tl.topk(next_key, LISTED))


@triton.jit
def _table_kernel(
    p_death, p_table, p_position, p_sizes, count, length, blocks,
    H_KV: tl.constexpr, SLOTS: tl.constexpr, SINKS: tl.constexpr, ONLY_SINKS: tl.constexpr, WINDOW: tl.constexpr,
    KEPT: tl.constexpr, KEPT_PADDED: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """List the candidates older than the first window of each block that its first query sees, -1 after the last.

    The last row is for the last token of the call.
    """
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t = tl.where(block < blocks, block * BLOCK, length - 1)
    old = SLOTS + t - window_of(p_sizes, bh % H_KV, WINDOW, RAGGED) + 1
    if ONLY_SINKS:
        old = tl.minimum(old, SLOTS + tl.maximum(SINKS - tl.load(p_position + bh // H_KV), 0).to(tl.int32))
    p_row = p_table + (bh * (blocks + 1) + block) * KEPT
    found = 0
    for start in range(0, old, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        lives = (tl.load(p_death + bh * count + c, mask=c < old, other=EMPTY) > t).to(tl.int32)
        place = found + tl.cumsum(lives, axis=0) - 1
        tl.store(p_row + place, c, mask=(lives > 0) & (place < KEPT))
        found += tl.sum(lives)
    i = tl.arange(0, KEPT_PADDED)
    tl.store(p_row + i, -1, mask=(i >= found) & (i < KEPT))


@triton.jit
def present_candidates(
    p_table, p_sizes, h, bh, n, m_n, length, blocks,
    SLOTS: tl.constexpr, KEPT: tl.constexpr, KEPT_PADDED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Return the candidates in slots `n` after the last token, -1 for none: the table's last row, then the window."""
    near = SLOTS - window_of(p_sizes, h, SLOTS - KEPT, RAGGED)
    c = tl.where(m_n, length + n, -1)
    if KEPT > 0:
        p_row = p_table + (bh * (blocks + 1) + blocks) * KEPT
        i = tl.arange(0, KEPT_PADDED)
        filled = tl.sum((tl.load(p_row + i, mask=i < KEPT, other=-1) >= 0).to(tl.int32))
        j = n - (near - filled)
        c = tl.where(n < near, tl.load(p_row + j, mask=(n < near) & (j >= 0), other=-1), c)
    return c


@triton.jit
def _present_kernel(
    p_key, p_value, p_slot_key, p_slot_value, p_time, p_source, p_score, p_table, p_position, p_sizes,
    p_new_key, p_new_value, p_new_position, p_new_score,
    key_b, key_t, key_h, value_b, value_t, value_h, length, blocks,
    H_KV: tl.constexpr, SLOTS: tl.constexpr, KEPT: tl.constexpr, KEPT_PADDED: tl.constexpr, POOLS: tl.constexpr,
    D_K: tl.constexpr, WIDTH_K: tl.constexpr, D_V: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Write the slots after the last token: those in the table's last row, aligned to the right, then the window."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh = b * H_KV + h
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_n = n < SLOTS
    c = present_candidates(p_table, p_sizes, h, bh, n, m_n, length, blocks, SLOTS, KEPT, KEPT_PADDED, RAGGED)
    count = SLOTS + length
    time = tl.load(p_time + bh * count + c, mask=c >= 0, other=EMPTY)
    full = time != EMPTY
    position = tl.where(full, time + tl.load(p_position + b), -1)
    tl.store(p_new_position + bh * SLOTS + n, position, mask=m_n)
    for pool in tl.static_range(POOLS):
        score = tl.load(p_score + (bh * POOLS + pool) * count + c, mask=full, other=0.0)
        tl.store(p_new_score + (bh * POOLS + pool) * SLOTS + n, score, mask=m_n)

    old, new = (full & (c < SLOTS))[:, None], (full & (c >= SLOTS))[:, None]
    source = bh * SLOTS + tl.load(p_source + bh * SLOTS + c, mask=full & (c < SLOTS), other=0)
    t = (c - SLOTS).to(tl.int64)
    i_k = tl.arange(0, WIDTH_K)[None, :]
    carried = tl.load(p_slot_key + source[:, None] * D_K + i_k, mask=old & (i_k < D_K), other=0.0)
    arrived = tl.load(p_key + b * key_b + h * key_h + t[:, None] * key_t + i_k, mask=new & (i_k < D_K), other=0.0)
    b_k = tl.where(old, carried, arrived.to(carried.dtype))
    tl.store(p_new_key + (bh * SLOTS + n)[:, None] * D_K + i_k, b_k, mask=m_n[:, None] & (i_k < D_K))
    i_v = tl.arange(0, WIDTH_V)[None, :]
    carried = tl.load(p_slot_value + source[:, None] * D_V + i_v, mask=old & (i_v < D_V), other=0.0)
    arrived = tl.load(
        p_value + b * value_b + h * value_h + t[:, None] * value_t + i_v, mask=new & (i_v < D_V), other=0.0
    )
    b_v = tl.where(old, carried, arrived.to(carried.dtype))
    tl.store(p_new_value + (bh * SLOTS + n)[:, None] * D_V + i_v, b_v, mask=m_n[:, None] & (i_v < D_V))


def deaths(found: Candidates) -> Tensor:
    """Return the time `[B, H_kv, C]` int32 from which each candidate is no longer seen; scores must be complete."""
    pools = found.spec.pools
    if not pools:
        return found.leave
    batch, kv_heads, count = found.time.shape
    events = count - min((window for window, _ in found.spec.sizes), default=found.spec.config.window)
    blocks = cdiv(events, EVENTS)
    death = torch.empty_like(found.time, memory_format=torch.contiguous_format)
    places = [max(2, power_of_two(pool.size)) for pool in pools]
    listed = [min(n, EVENTS) for n in places]

    def lists(width: int) -> Tensor:
        return torch.empty(batch, kv_heads, blocks, width, dtype=torch.int64, device=death.device)

    key = torch.empty(batch, kv_heads, events, dtype=torch.int64, device=death.device)
    best = lists(listed[0])
    common = {"H_KV": kv_heads, "POOLS": len(pools), "EVENTS": EVENTS, "RAGGED": found.ragged, "num_warps": 4}
    launch(
        found.call, _enter_kernel, (cdiv(count, EVENTS), kv_heads, batch),
        found.time, found.leave, found.score, found.position, found.sizes, death, key, best, count, events, blocks,
        constants=lambda: common | {
            "SINKS": found.spec.config.sinks, "HORIZON": pools[0].horizon, "LISTED": listed[0],
        },
    )  # fmt: skip
    for i, pool in enumerate(pools):
        last = i == len(pools) - 1
        after = i if last else i + 1
        leaders = _leaders((found.call, i), best, blocks, places[i])
        next_key, next_best = (key, best) if last else (torch.empty_like(key), lists(listed[after]))
        launch(
            (found.call, i), _drop_kernel, (blocks, kv_heads, batch),
            key, leaders, next_key, next_best, found.score, found.time, found.leave, death, found.sizes, count, events,
            blocks,
            constants=lambda: common | {
                "SIZE": pool.size, "PLACES": places[i], "NEXT": i + 1, "HORIZON": pools[after].horizon,
                "LISTED": listed[after], "ROWS": 16,
            },
        )  # fmt: skip
        key, best = next_key, next_best
    return death


def _leaders(call: Hashable, listed: Tensor, blocks: int, places: int) -> Tensor:
    """Return the best items `[B, H_kv, blocks, places]` before each block of events.

    Long lists are merged in parallel: each segment of blocks by itself, then the segments one after the other, then the
    blocks of each segment after the segments before it.

    Args:
        call: See `launch`.
        listed: `[B, H_kv, blocks, n]`, the best items of each block in falling order.
        blocks: Number of blocks.
        places: Number of items, a power of two.
    """
    lanes = listed.shape[0] * listed.shape[1]

    def merge(
        step: str,
        given: Tensor,
        count: int,
        per: int,
        before: Tensor | None,
        after: Tensor | None,
        total: Tensor | None,
    ) -> None:
        launch(
            (call, step), _leaders_kernel, (cdiv(count, per), lanes, 1), given, before, after, total, count, per,
            constants=lambda: {
                "LISTED": given.shape[3], "PLACES": places, "STAGES": places.bit_length() - 1,
                "num_warps": min(8, max(1, places // 256)),  # three lists must fit into the registers
            },
        )  # fmt: skip

    leaders = listed.new_empty(*listed.shape[:3], places)
    if places < LONG:
        merge("all", listed, blocks, blocks, None, leaders, None)
        return leaders
    segments = cdiv(blocks, SEGMENT)
    totals, before = (listed.new_empty(*listed.shape[:2], segments, places) for _ in range(2))
    merge("segments", listed, blocks, SEGMENT, None, None, totals)
    merge("between", totals, segments, segments, None, before, None)
    merge("within", listed, blocks, SEGMENT, before, leaders, None)
    return leaders


def old_table(found: Candidates, death: Tensor, only_sinks: bool = False) -> Tensor:
    """List for each block of queries the candidates before its first query's window that this query sees.

    All other candidates that the block sees are contiguous, from that window on.

    Args:
        found: The candidates.
        death: `[B, H_kv, C]`, the time from which each is no longer seen.
        only_sinks: Whether only sinks can be in the list.

    Returns:
        `[B, H_kv, blocks + 1, maximum]` int32 in order, -1 after the last; the last row is for the last
        token.
    """
    batch, kv_heads, count = death.shape
    config = found.spec.config
    kept = config.sinks if only_sinks else config.kept
    table = torch.empty(batch, kv_heads, found.blocks + 1, kept, dtype=torch.int32, device=death.device)
    if kept:
        launch(
            (found.call, only_sinks), _table_kernel, (found.blocks + 1, batch * kv_heads, 1),
            death, table, found.position, found.sizes, count, found.length, found.blocks,
            constants=lambda: {
                "H_KV": kv_heads, "SLOTS": config.num_slots, "SINKS": config.sinks, "ONLY_SINKS": only_sinks,
                "WINDOW": config.window, "KEPT": kept, "KEPT_PADDED": power_of_two(kept), "BLOCK": BLOCK,
                "COLUMNS": 1024, "RAGGED": found.ragged, "num_warps": 4,
            },
        )  # fmt: skip
    return table


def present_slots(found: Candidates, table: Tensor, key: Tensor, value: Tensor, state: MixerState) -> MixerState:
    """Return the slots after the last token; `table` comes from `old_table` for the deaths."""
    batch, length, kv_heads, d_k = key.shape
    d_v, config = value.shape[3], found.spec.config
    present = {
        name: torch.empty_like(state[name], memory_format=torch.contiguous_format) for name in SLOTS if name in state
    }
    launch(
        found.call, _present_kernel, (cdiv(config.num_slots, 16), kv_heads, batch),
        key, value, state["slot_key"], state["slot_value"], found.time, found.source, found.score, table,
        found.position, found.sizes, present["slot_key"], present["slot_value"], present["slot_position"],
        present.get("slot_score", found.score), *key.stride()[:3], *value.stride()[:3], length, found.blocks,
        constants=lambda: {
            "H_KV": kv_heads, "SLOTS": config.num_slots, "KEPT": config.kept,
            "KEPT_PADDED": power_of_two(max(config.kept, 1)), "POOLS": len(config.slots), "D_K": d_k,
            "WIDTH_K": found.key.shape[3], "D_V": d_v, "WIDTH_V": found.value.shape[3], "ROWS": 16,
            "RAGGED": found.ragged, "num_warps": 4,
        },
    )  # fmt: skip
    return present
