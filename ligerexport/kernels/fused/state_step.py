"""The states of one KV head for one token: columns of the gated recurrence and of the judge of novelty.

This is part of the kernel in `mixer_step.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ligerexport.kernels.fused.numbers import LOG2E, STRONGEST
from ligerexport.kernels.fused.overlap import wait
from ligerexport.kernels.fused.slots_step import row


@triton.jit
def _sigmoid(x):
    """Return the logistic function without an exponential that could overflow."""
    faint = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x >= 0, 1.0, faint) / (1.0 + faint)


@triton.jit
def _decay_of_key(key, D_K: tl.constexpr, DECAY: tl.constexpr):
    """Return exp(g) of a raw key, whose padded channels are 0; DECAY is `Gate.kernel_decay`."""
    tl.static_assert(
        DECAY[0] == "logsigmoid" or DECAY[0] == "minus_exp" or DECAY[0] == "head_logsigmoid"
        or DECAY[0] == "head_minus_softplus", "no such decay in this kernel",
    )  # fmt: skip
    if DECAY[0] == "head_logsigmoid" or DECAY[0] == "head_minus_softplus":
        key = tl.sum(key, axis=0) * (1.0 / D_K) + tl.zeros_like(key)
    if DECAY[0] == "head_minus_softplus":
        key = -key
    if DECAY[0] == "minus_exp":
        kept = tl.exp2(-tl.minimum(tl.exp2(key * LOG2E) * (1.0 / DECAY[1]), STRONGEST) * LOG2E)
    elif DECAY[2] > 0.0:
        kept = DECAY[2] + (1.0 - DECAY[2]) * _sigmoid(key)
    else:
        exponent = tl.minimum(key, 0.0) * LOG2E
        kept = tl.exp2((exponent - tl.log2(1.0 + tl.exp2(-tl.abs(key) * LOG2E))) * (1.0 / DECAY[1]))
    return kept


@triton.jit
def features(x, m_columns, MAP: tl.constexpr):
    """Return the features of the last axis of `x` by a map of `FEATURE_MAPS`; 0 outside a mask."""
    tl.static_assert(MAP == "softmax" or MAP == "one_minus_sigmoid", "no such feature map in this kernel")
    if MAP == "softmax":
        x = tl.where(m_columns, x * LOG2E, -1e30)
        e = tl.where(m_columns, tl.exp2(x - tl.max(x, axis=-1, keep_dims=True)), 0.0)
        return e * (1.0 / tl.sum(e, axis=-1, keep_dims=True))
    else:
        return tl.where(m_columns, _sigmoid(-x), 0.0)


@triton.jit
def recur(
    p_query, p_key, p_value, s_query_h, p_state, p_read, start, p_now, recurrence_weight,
    G: tl.constexpr, D_K: tl.constexpr, DK_PAD: tl.constexpr, D_V: tl.constexpr, BLOCK_V: tl.constexpr,
    QUERY_MAP: tl.constexpr, KEY_MAP: tl.constexpr, DECAY: tl.constexpr, NORMALISED: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Update the columns of the recurrent state from `start`, and write the queries' answer `[G, columns]`.

    If the state is normalised, its last column is the sum of weights; the first block writes the answer's sums `[G]`
    behind the answer.
    """
    WIDTH: tl.constexpr = D_V + 1 if NORMALISED else D_V
    G_PAD: tl.constexpr = 16
    o_g, o_k, o_v = tl.arange(0, G_PAD), tl.arange(0, DK_PAD), start + tl.arange(0, BLOCK_V)
    m_g, m_k, m_v = o_g < G, o_k < D_K, o_v < D_V
    p_mass = p_state + o_k * WIDTH + D_V
    p_state += o_k[:, None] * WIDTH + o_v[None, :]
    b_state = tl.load(p_state, mask=m_k[:, None] & m_v[None, :], other=0.0, eviction_policy="evict_first")
    wait(OVERLAP)
    # the queries of the group and, in the row after them, the key
    p_x = tl.where(m_g[:, None], p_query + (o_g * s_query_h)[:, None], p_key) + o_k[None, :]
    b_x = tl.load(p_x, mask=(o_g <= G)[:, None] & m_k[None, :], other=0.0).to(tl.float32)
    b_v = tl.load(p_value + o_v, mask=m_v, other=0.0).to(tl.float32)
    phi_q = features(b_x, m_k[None, :], QUERY_MAP)
    phi_k = row(phi_q if QUERY_MAP == KEY_MAP else features(b_x, m_k[None, :], KEY_MAP), G)
    if DECAY[2] > 0.0:
        phi_k = phi_k * (1.0 - DECAY[2])
    decay = _decay_of_key(row(b_x, G), D_K, DECAY)
    # phi_q (decay S + phi_k v) = (phi_q decay) S + (phi_q phi_k) v: the product takes S as it was loaded
    phi_q = tl.where(m_g[:, None], phi_q * recurrence_weight, 0.0)
    read = tl.sum(phi_q * phi_k[None, :], axis=1)[:, None] * b_v[None, :]
    read = tl.dot(phi_q * decay[None, :], b_state, read, input_precision=PRECISION)
    b_state = decay[:, None] * b_state + phi_k[:, None] * b_v[None, :]
    m_state = m_k[:, None] & m_v[None, :] & (tl.load(p_now) >= 0)
    tl.store(p_state, b_state, mask=m_state, eviction_policy="evict_first")
    tl.store(p_read + o_g[:, None] * D_V + o_v[None, :], read, mask=m_g[:, None] & m_v[None, :])
    if NORMALISED:
        m_mass = m_k & (start == 0)
        b_mass = decay * tl.load(p_mass, mask=m_mass, other=0.0) + phi_k
        tl.store(p_mass, b_mass, mask=m_mass & (tl.load(p_now) >= 0))
        tl.store(p_read + G * D_V + o_g, tl.sum(phi_q * b_mass[None, :], axis=1), mask=m_g & (start == 0))


@triton.jit
def judge(
    p_key, p_value, p_state, p_recalled, start, p_now,
    D_K: tl.constexpr, DK_PAD: tl.constexpr, D_V: tl.constexpr, BLOCK_V: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add the token to the columns of the judge state from `start`; write its answer before that, `[columns]`."""
    o_k, o_v = tl.arange(0, DK_PAD), start + tl.arange(0, BLOCK_V)
    m_k, m_v = o_k < D_K, o_v < D_V
    p_mass = p_state + o_k * (D_V + 1) + D_V
    p_state += o_k[:, None] * (D_V + 1) + o_v[None, :]
    b_state = tl.load(p_state, mask=m_k[:, None] & m_v[None, :], other=0.0, eviction_policy="evict_first")
    m_mass = m_k & (start == 0)  # the last column, the sum of the features, belongs to the first block
    b_mass = tl.load(p_mass, mask=m_mass, other=0.0)
    wait(OVERLAP)
    b_v = tl.load(p_value + o_v, mask=m_v, other=0.0).to(tl.float32)
    phi = features(tl.load(p_key + o_k, mask=m_k, other=0.0).to(tl.float32), m_k, "softmax")
    tl.store(p_recalled + o_v, tl.sum(phi[:, None] * b_state, axis=0), mask=m_v)
    b_state += phi[:, None] * b_v[None, :]
    active = tl.load(p_now) >= 0
    tl.store(p_state, b_state, mask=m_k[:, None] & m_v[None, :] & active, eviction_policy="evict_first")
    if start == 0:
        tl.store(p_recalled + D_V, tl.sum(phi * b_mass, axis=0))
        tl.store(p_mass, b_mass + phi, mask=m_k & active)
