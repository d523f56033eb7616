"""The second launch of a step with a recurrence over evicted tokens: `ligerexport.kernels.evicted` for one token."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused.numbers import LN2, LOG2E
from ligerexport.model.state import MixerSpec, MixerState


def evicted_step(
    query: Tensor,
    position: Tensor,
    index: Tensor | None,
    rotary: Tensor,
    out: Tensor,
    state: MixerState,
    lost: Tensor,
    spec: MixerSpec,
) -> None:
    """Add the evicted token to the sums, in place, and their answer to the softmax's output.

    Args:
        query: The same as in `mixer_step`, also `position`, `index`, `rotary`, `state` and `spec`.
        out: `[B, H_q, d_v]`, contiguous, to write to.
        lost: For each KV head of each sequence, fp32: the softmax's output `[G, d_v]`, the evicted key `[d_k]` and
            value `[d_v]`, base-2 logarithms of the softmax's denominators `[G]`, and 1 if a token was evicted or 0.
    """
    places, slow_sine = rotary_places(spec, rotary)
    precision = "tf32x3" if query.dtype == torch.float32 else "tf32"
    _evicted_step_kernel[(query.shape[0] * spec.kv_heads,)](
        query, position, index, rotary, out, state["recurrent_state"], state["recurrent_mass"], lost,
        query.stride(0), query.stride(1), spec.scale, math.log2(spec.config.recurrence_weight), slow_sine,
        H=spec.kv_heads, G=spec.q_heads // spec.kv_heads, D_K=spec.d_k,
        DK_PAD=max(16, triton.next_power_of_2(spec.d_k)), D_V=spec.d_v,
        BLOCK_V=max(16, min(32, triton.next_power_of_2(spec.d_v))), **places,
        PRECISION="ieee" if triton.knobs.runtime.interpret else precision,
        num_warps=4, num_stages=1,
    )  # fmt: skip


def rotary_places(spec: MixerSpec, rotary: Tensor) -> tuple[dict[str, int], float]:
    """Return the places in the table that `slow_turn` reads, and the sine of the fastest slow rotation per token."""
    distance, rotated = min(spec.config.recurrence_distance, spec.max_distance), rotary.shape[-1]
    near, far = spec.max_distance - 1, spec.max_distance - distance
    places = {"R": rotated, "NEAR": near * rotated, "FAR": far * rotated, "TABLE": rotary.shape[1] * rotated}
    return places, math.sin(math.pi / 2 / distance)


@triton.jit
def slow_turn(
    p_rotary, slow_sine, o_k, m_k, R: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, TABLE: tl.constexpr
):  # fmt: skip
    """Return the rotation of each channel over the distance; channels that rotate too fast are left out.

    Returns:
        Factors of a channel and of its partner, masks of slow channels and of those that rotate, and the partner's
        number.
    """
    rotated, second = o_k < 2 * R, o_k >= R
    pair = tl.where(second, o_k - R, o_k)
    cos = tl.load(p_rotary + FAR + pair, mask=rotated, other=1.0)
    sin = -tl.load(p_rotary + FAR + TABLE + pair, mask=rotated, other=0.0)
    near_cos = tl.load(p_rotary + NEAR + pair, mask=rotated, other=1.0)
    near_sin = -tl.load(p_rotary + NEAR + TABLE + pair, mask=rotated, other=0.0)
    slow = m_k & ((rotated == 0) | ((pair > 0) & (near_cos > 0) & (near_sin <= slow_sine)))
    other = tl.where(second, o_k - R, o_k + R)
    return cos, tl.where(second, sin, -sin), slow, slow & rotated, other


@triton.jit
def _evicted_step_kernel(
    p_query, p_position, p_index, p_rotary, p_output, p_state, p_mass, p_lost,
    s_query_b, s_query_h, scale, log2_weight, slow_sine,
    H: tl.constexpr, G: tl.constexpr, D_K: tl.constexpr, DK_PAD: tl.constexpr, D_V: tl.constexpr,
    BLOCK_V: tl.constexpr, R: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `evicted_step` for one head of one sequence. Grid: (B * H_kv,)."""
    unit = tl.program_id(0)
    b, h = (unit // H).to(tl.int64), unit % H
    row = b
    if p_index is not None:
        row = tl.load(p_index + b).to(tl.int64)
        if row < 0:
            return
    G_PAD: tl.constexpr = 16  # the smallest number of rows of a matrix product
    o_g, o_k = tl.arange(0, G_PAD), tl.arange(0, DK_PAD)
    m_g, m_k = o_g < G, o_k < D_K
    now = tl.load(p_position + b).to(tl.int32)
    p_query += b * s_query_b + h * G * s_query_h + o_g[:, None] * s_query_h
    p_lost += unit.to(tl.int64) * ((G + 1) * (D_V + 1) + D_K)
    p_mass += (row * H + h) * D_K
    p_state += (row * H + h) * (D_K * D_V)

    cos, sin, slow, turns, other = slow_turn(p_rotary, slow_sine, o_k, m_k, R, NEAR, FAR, TABLE)
    b_q = tl.load(p_query + o_k[None, :], mask=m_g[:, None] & slow[None, :], other=0.0).to(tl.float32)
    b_other = tl.load(p_query + other[None, :], mask=m_g[:, None] & turns[None, :], other=0.0)
    turned = scale * (b_q * cos[None, :] + b_other.to(tl.float32) * sin[None, :])

    p_key = p_lost + G * D_V
    there = tl.load(p_key + D_K + D_V + G)
    one = tl.where(o_k == 0, 1.0, 0.0)
    key = tl.load(p_key + o_k, mask=slow, other=0.0) + one * there
    sums = tl.load(p_mass + o_k, mask=m_k, other=0.0) + key
    count = tl.sum(sums * one, axis=0)
    some = tl.maximum(count, 1.0)
    mean = tl.sum(turned * sums[None, :], axis=1) / some
    features = turned + (1.0 - mean)[:, None] * one[None, :]
    normaliser = tl.load(p_key + D_K + D_V + o_g, mask=m_g, other=0.0)
    logit = mean * LOG2E + tl.log2(some) + log2_weight - normaliser
    share = tl.where(count > 0, tl.sigmoid(logit * LN2), 0.0)[:, None]
    for i in tl.static_range((D_V + BLOCK_V - 1) // BLOCK_V):
        o_v = i * BLOCK_V + tl.arange(0, BLOCK_V)
        m_v = o_v < D_V
        p_tile, m_tile = p_state + o_k[:, None] * D_V + o_v[None, :], m_k[:, None] & m_v[None, :]
        value = tl.load(p_key + D_K + o_v, mask=m_v, other=0.0)
        b_state = tl.load(p_tile, mask=m_tile, other=0.0) + key[:, None] * value[None, :]
        read = tl.dot(features, b_state, input_precision=PRECISION) / some
        tl.store(p_tile, b_state, mask=m_tile & (now >= 0))
        m_out = m_g[:, None] & m_v[None, :]
        at = o_g[:, None] * D_V + o_v[None, :]
        mixed = tl.load(p_lost + at, mask=m_out, other=0.0)
        mixed = tl.where(now >= 0, mixed + share * (read - mixed), 0.0).to(p_output.dtype.element_ty)
        tl.store(p_output + unit.to(tl.int64) * (G * D_V) + at, mixed, mask=m_out)
    tl.debug_barrier()
    tl.store(p_mass + o_k, sums, mask=m_k & (now >= 0))
