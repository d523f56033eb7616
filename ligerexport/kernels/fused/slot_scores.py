"""The attention that each token receives while it is in the window, by softmax over sinks and window.

There are two passes: the normaliser of every query, then for each block of keys all queries whose window reaches it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ligerexport.kernels.fused.attend import attend
from ligerexport.kernels.fused.candidates import EMPTY, Candidates
from ligerexport.kernels.fused.launch import launch
from ligerexport.kernels.fused.numbers import LOG2E
from ligerexport.kernels.fused.slots import old_table


@triton.jit
def _received_kernel(
    p_query, p_key, p_value, p_time, p_lse, p_score, length, scale, back,
    H_KV: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, WINDOW: tl.constexpr, POOLS: tl.constexpr,
    MAX_POOLS: tl.constexpr, SUM_POOLS: tl.constexpr, VALUE_POOLS: tl.constexpr, MAX_FROM: tl.constexpr,
    SUM_FROM: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the scores of one tile of keys; pools are bits of `MAX_POOLS`, `SUM_POOLS` and `VALUE_POOLS`."""
    key_tile = tl.program_id(0) - back
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh, count = b * H_KV + h, SLOTS + length
    i = tl.arange(0, TILE)
    i_k = tl.arange(0, WIDTH_K)
    c = SLOTS + key_tile * TILE + i
    m_c = (c >= 0) & (c < count)
    time = tl.load(p_time + bh * count + c, mask=m_c, other=EMPTY)
    p_key += bh * count * WIDTH_K
    p_query += bh * GROUP * length * WIDTH_K
    p_lse += bh * GROUP * length
    b_k = tl.load(p_key + c[:, None] * WIDTH_K + i_k[None, :], mask=m_c[:, None], other=0.0)

    # Transposed, so that the reduction over queries comes last and stays within a row of threads.
    highest = tl.zeros((TILE, TILE), tl.float32)
    summed = tl.zeros((TILE, TILE), tl.float32)
    first = tl.maximum(key_tile, 0)
    last = tl.minimum((key_tile * TILE + TILE - 1 + WINDOW - 1) // TILE, (length - 1) // TILE)
    for step in range(0, (last - first + 1) * GROUP):
        t = (first + step // GROUP) * TILE + i
        m_t = t < length
        lane = step % GROUP * length + t
        b_q = tl.load(p_query + lane[:, None] * WIDTH_K + i_k[None, :], mask=m_t[:, None], other=0.0)
        lse = tl.load(p_lse + lane, mask=m_t, other=0.0)
        s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scale * LOG2E) - lse[None, :]
        distance = t[None, :] - time[:, None]
        counts = (distance >= 0) & (distance < WINDOW) & m_t[None, :]
        weight = tl.exp2(tl.where(counts, s, float("-inf")))
        if MAX_POOLS > 0:
            highest = tl.maximum(highest, tl.where(distance >= MAX_FROM, weight, 0.0))
        if SUM_POOLS > 0:
            summed += tl.where(distance >= SUM_FROM, weight, 0.0)

    norm = tl.full((TILE,), 1.0, tl.float32)
    if VALUE_POOLS > 0:
        i_v = tl.arange(0, WIDTH_V)
        b_v = tl.load(p_value + (bh * count + c)[:, None] * WIDTH_V + i_v[None, :], mask=m_c[:, None], other=0.0)
        norm = tl.sqrt_rn(tl.sum(b_v.to(tl.float32) * b_v.to(tl.float32), axis=1))
    for pool in tl.static_range(POOLS):
        p_pool = p_score + (bh * POOLS + pool) * count + c
        if (MAX_POOLS >> pool) & 1:
            received = tl.max(highest, axis=1)
            if (VALUE_POOLS >> pool) & 1:
                received *= norm
            tl.store(p_pool, tl.maximum(received, tl.load(p_pool, mask=m_c & (c < SLOTS), other=0.0)), mask=m_c)
        if (SUM_POOLS >> pool) & 1:
            received = tl.sum(summed, axis=1)
            if (VALUE_POOLS >> pool) & 1:
                received *= norm
            tl.store(p_pool, received + tl.load(p_pool, mask=m_c & (c < SLOTS), other=0.0), mask=m_c)


def complete_scores(found: Candidates) -> None:
    """Add the attention received in this call to `found.score`, in place."""
    config = found.spec.config
    rows = found.spec.pools
    if all(pool.on_arrival for pool in rows):
        return
    sinks = old_table(found, found.leave, only_sinks=True)
    _, lse = attend(found, found.leave, sinks, found.value.shape[3], with_output=False)
    pools = {
        "MAX_POOLS": [not pool.on_arrival and not pool.summed for pool in rows],
        "SUM_POOLS": [not pool.on_arrival and pool.summed for pool in rows],
        "VALUE_POOLS": [not pool.on_arrival and pool.by_value for pool in rows],
    }
    first = {pool.summed: pool.first_distance for pool in rows if not pool.on_arrival}
    batch, kv_heads = found.time.shape[:2]
    tile = 32 if found.query.element_size() == 4 else 64
    back = triton.cdiv(config.window - 1, tile)
    launch(
        found.call, _received_kernel, (back + triton.cdiv(found.length, tile), kv_heads, batch),
        found.query, found.key, found.value, found.time, lse, found.score, found.length, found.spec.scale, back,
        constants=lambda: {
            "H_KV": kv_heads, "GROUP": found.query.shape[1] // kv_heads, "SLOTS": config.num_slots,
            "WINDOW": config.window, "POOLS": len(rows), "MAX_FROM": first.get(False, 0),
            "SUM_FROM": first.get(True, 0), "WIDTH_K": found.key.shape[3], "WIDTH_V": found.value.shape[3],
            "TILE": tile, "PRECISION": found.precision, "num_warps": 4, "num_stages": 2,
            **{name: sum(1 << i for i, bit in enumerate(bits) if bit) for name, bits in pools.items()},
        },
    )  # fmt: skip
