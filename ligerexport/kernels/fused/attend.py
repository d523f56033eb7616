"""Softmax of blocks of queries over the candidates that they see, and the same for the scores' local softmax.

A block of queries sees a list of old candidates and a run of near ones; a program works through both as one list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused.candidates import BLOCK, Candidates, angles, kept_of, turn, window_of
from ligerexport.kernels.fused.launch import launch
from ligerexport.kernels.fused.numbers import LOG2E
from ligerexport.kernels.tuning import cdiv


@triton.jit
def listed(p_row, i, t0, window, kept, SLOTS: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    """Return the candidates at places `i` of a block's list, old ones from its row of the table; -1 for none."""
    near = SLOTS + t0 - window + 1 + i - kept
    c = tl.where(i < kept + window - 1 + BLOCK, near, -1)
    if KEPT > 0:
        c = tl.where(i < kept, tl.load(p_row + i, mask=i < kept, other=-1), c)
    return c


@triton.jit
def far_logits(
    b_q, b_k, t, time, p_angles, plane, reach, cap,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return scalar products at the largest rotary distance, and the queries and keys rotated for it."""
    cos, sin = angles(p_angles, plane, cap - t, reach, WIDTH // 2, R)
    far_q = turn(b_q, cos, sin, ROWS, WIDTH).to(b_q.dtype)
    cos, sin = angles(p_angles, plane, tl.minimum(-time, cap), reach, WIDTH // 2, R)
    far_k = turn(b_k, cos, sin, KEYS, WIDTH).to(b_k.dtype)
    return tl.dot(far_q, tl.trans(far_k), input_precision=PRECISION), far_k


@triton.jit
def _attend_kernel(
    p_query, p_key, p_value, p_death, p_time, p_table, p_position, p_sizes, p_angles, p_output, p_lse,
    output_b, output_t, output_h, length, blocks, plane, reach, cap, scale,
    H_KV: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, WINDOW: tl.constexpr,
    KEPT: tl.constexpr, WIDTH_K: tl.constexpr, D_V: tl.constexpr, WIDTH_V: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, FAR: tl.constexpr, WITH_OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr, SINKS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Attend with one head for queries of one block.

    The launch with `FAR` computes the blocks in which a distance may exceed the largest rotary one, and the launch
    without it all others: in one kernel, the rare case would take registers from the common one.
    """
    part, head = tl.program_id(0) // GROUP, tl.program_id(0) % GROUP
    block = part * QUERIES // BLOCK
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh, count = b * H_KV + h, SLOTS + length
    t0 = block * BLOCK
    if (tl.load(p_position + b) + t0 + BLOCK - 1 > cap) != FAR:
        return
    t = part * QUERIES + tl.arange(0, QUERIES)
    m_t = t < length
    # Only scalars need 64-bit arithmetic; offsets within a head fit in 32 bits.
    p_query += bh * GROUP * length * WIDTH_K
    p_lse += bh * GROUP * length
    p_key += bh * count * WIDTH_K
    p_value += bh * count * WIDTH_V
    p_death += bh * count
    p_time += bh * count
    p_table += (bh * (blocks + 1) + block) * KEPT
    lane = head * length + t
    i_k, i_v = tl.arange(0, WIDTH_K), tl.arange(0, WIDTH_V)
    b_q = tl.load(p_query + lane[:, None] * WIDTH_K + i_k[None, :], mask=m_t[:, None], other=0.0)

    best = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, WIDTH_V), tl.float32)
    window = window_of(p_sizes, h, WINDOW, RAGGED)
    kept = kept_of(p_sizes, h, SINKS, KEPT, RAGGED)
    for start in range(0, kept + window - 1 + BLOCK, KEYS):
        c = listed(p_table, start + tl.arange(0, KEYS), t0, window, kept, SLOTS, KEPT, BLOCK)
        m_c = (c >= 0) & (c < count)
        death = tl.load(p_death + c, mask=m_c, other=-1)
        b_k = tl.load(p_key + c[:, None] * WIDTH_K + i_k[None, :], mask=m_c[:, None], other=0.0)
        sees = (c - SLOTS)[None, :] <= t[:, None]
        sees &= death[None, :] > t[:, None]
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if FAR:
            time = tl.load(p_time + c, mask=m_c, other=0)
            far = sees & (t[:, None] - time[None, :] > cap)
            if tl.max(far.to(tl.int32)) > 0:
                far_s, _ = far_logits(
                    b_q, b_k, t, time, p_angles, plane, reach, cap, QUERIES, KEYS, WIDTH_K, R, PRECISION
                )
                s = tl.where(far, far_s, s)
        s = tl.where(sees, s * (scale * LOG2E), float("-inf"))
        higher = tl.maximum(best, tl.max(s, axis=1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(p, axis=1)
        best = higher
        if WITH_OUTPUT:
            b_v = tl.load(p_value + c[:, None] * WIDTH_V + i_v[None, :], mask=m_c[:, None], other=0.0)
            acc = acc * shrink[:, None]
            acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)

    # A row of padding sees nothing: its sum is 0, and so is its output.
    total = tl.where(total > 0, total, 1.0)
    tl.store(p_lse + lane, best + tl.log2(total), mask=m_t)
    if WITH_OUTPUT:
        p_row = p_output + b * output_b + t.to(tl.int64) * output_t + (h * GROUP + head) * output_h
        b_o = acc / total[:, None]
        tl.store(
            p_row[:, None] + i_v[None, :], b_o.to(p_output.dtype.element_ty),
            mask=m_t[:, None] & (i_v < D_V)[None, :],
        )  # fmt: skip


def far_launches(found: Candidates, kept: int) -> tuple[tuple[bool, int], ...]:
    """Return (with pairs beyond the largest rotary distance, that distance) for each launch that is needed.

    Positions are on the device, so both launches are needed whenever a kept slot may be that far away. The launch with
    such pairs loads nothing ahead: Triton 3.6 would compute wrong addresses in the table; `test_aot` guards this.
    """
    cap = found.spec.max_distance
    return ((False, cap), (True, cap)) if kept else ((False, 2**31 - 1),)


def tiles(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile sizes of the forward pass for a width of heads."""
    single, wide = dtype == torch.float32, width > 128
    return {
        "QUERIES": 32 if single and wide else 64, "KEYS": (16 if single else 64) if wide else 32,
        "num_warps": 8 if single or wide else 4, "num_stages": 1 if single and wide else 2,
    }  # fmt: skip


def query_programs(found: Candidates, tile: dict[str, int]) -> int:
    """Return how many programs of a tile the queries of one KV head need."""
    return cdiv(found.length, tile["QUERIES"]) * (found.query.shape[1] // found.key.shape[1])


def attend(
    found: Candidates,
    death: Tensor,
    table: Tensor,
    d_v: int,
    with_output: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Attend with all queries to the candidates that they see.

    Args:
        found: The candidates.
        death: `[B, H_kv, C]` int32, the time from which each candidate is no longer seen.
        table: Table from `old_table` for this `death`.
        d_v: Width of the values.
        with_output: Whether to compute the output too, and not only the normaliser.
        dtype: Type of the output; None takes that of the candidates.

    Returns:
        Output `[B, T, H_q, d_v]` and the normaliser `[B, H_q, T]`: the logarithm to base 2 of the sum of exponentials.
    """
    batch, q_heads, length, width_k = found.query.shape
    kv_heads, config = found.key.shape[1], found.spec.config
    group = q_heads // kv_heads
    lse = torch.empty(batch, q_heads, length, dtype=torch.float32, device=found.query.device)
    output = found.query.new_empty(batch, length, q_heads, d_v, dtype=dtype) if with_output else None
    tile = tiles(max(width_k, found.value.shape[3]), found.query.dtype)
    for far, cap in far_launches(found, table.shape[3]):
        launch(
            (found.call, far, with_output), _attend_kernel, (query_programs(found, tile), kv_heads, batch),
            found.query, found.key, found.value, death, found.time, table, found.position, found.sizes, found.angles,
            lse if output is None else output, lse, *((0, 0, 0) if output is None else output.stride()[:3]), length,
            found.blocks, found.angles.stride(0), found.reach, cap, found.spec.scale,
            constants=lambda: {
                "H_KV": kv_heads, "GROUP": group, "SLOTS": config.num_slots, "WINDOW": config.window,
                "KEPT": table.shape[3], "WIDTH_K": width_k, "D_V": d_v, "WIDTH_V": found.value.shape[3],
                "R": found.angles.shape[2], "BLOCK": BLOCK, "FAR": far, "WITH_OUTPUT": with_output,
                "PRECISION": found.precision, "SINKS": config.sinks, "RAGGED": found.ragged, **tile,
                "num_stages": 1 if far else tile["num_stages"],
            },
        )  # fmt: skip
    return output, lse
