"""Helpers of the linear-attention kernels for a block of tokens: feature maps, decay, and sums over tokens.

Decay is in bits (log base 2) inside the kernels, since the hardware's exponential is `exp2`. DECAY is
`Gate.kernel_decay`: the name of the decay, its divisor, and the floor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ligerexport.kernels.fused.numbers import LOG2E, STRONGEST

FAINTEST_DECAY = tl.constexpr(-256.0)
"""Bits of decay per token beyond which fp32 forgets everything anyway; keeps sums finite for a decay of -inf."""
REACH = tl.constexpr(80.0)
"""Largest decay in bits in half a chunk for which factors around the middle of the chunk do not overflow."""


@triton.jit
def load_block(pointer, rows, columns, stride, m_rows, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Load `[rows, columns]` of a matrix with contiguous columns; zero outside."""
    p_block = pointer + rows[:, None] * stride + columns[None, :]
    if WIDTH == PADDED:
        return tl.load(p_block, mask=m_rows[:, None], other=0.0)
    return tl.load(p_block, mask=m_rows[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_block(pointer, block, rows, columns, stride, m_rows, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Store what `load_block` loads."""
    p_block = pointer + rows[:, None] * stride + columns[None, :]
    block = block.to(pointer.dtype.element_ty)
    if WIDTH == PADDED:
        tl.store(p_block, block, mask=m_rows[:, None])
    else:
        tl.store(p_block, block, mask=m_rows[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def load_state(pointer, rows, columns, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr):
    """Load `[rows, columns]` of a contiguous `[K, V]` state; zero outside."""
    m_state = (columns < V)[None, :]
    if K != BK:
        m_state = m_state & (rows < K)[:, None]
    return tl.load(pointer + rows[:, None] * V + columns[None, :], mask=m_state, other=0.0)


@triton.jit
def store_state(pointer, block, rows, columns, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr):
    """Store what `load_state` loads."""
    m_state = (columns < V)[None, :]
    if K != BK:
        m_state = m_state & (rows < K)[:, None]
    tl.store(pointer + rows[:, None] * V + columns[None, :], block.to(pointer.dtype.element_ty), mask=m_state)


@triton.jit
def load_scores(pointer, at, C: tl.constexpr):
    """Load the `[C, C]` scores of one chunk and head as fp32."""
    token = tl.arange(0, C)
    return tl.load(pointer + at.to(tl.int64) * C * C + token[:, None] * C + token[None, :]).to(tl.float32)


@triton.jit
def features(x, m_rows, channels, K: tl.constexpr, MAP: tl.constexpr):
    """Map raw projections `[C, BK]` fp32 by a map of `FEATURE_MAPS`; zero in rows outside `m_rows` and beyond K."""
    m_block = m_rows[:, None] & (channels < K)[None, :]
    if MAP == "softmax":
        x = tl.where((channels < K)[None, :], x * LOG2E, float("-inf"))
        x = tl.exp2(x - tl.max(x, axis=1)[:, None])
        x = x * (1.0 / tl.sum(x, axis=1))[:, None]
    elif MAP == "one_minus_sigmoid":
        x = 1.0 / (1.0 + tl.exp2(x * LOG2E))
    else:
        tl.static_assert(MAP == "none", "no such feature map in this kernel")
    return tl.where(m_block, x, 0.0)


@triton.jit
def features_gradient(feature, gradient, MAP: tl.constexpr):
    """Return the gradient of the raw projections from that of their features, both `[C, BK]` fp32."""
    if MAP == "softmax":
        return feature * (gradient - tl.sum(feature * gradient, axis=1)[:, None])
    elif MAP == "one_minus_sigmoid":
        return -feature * (1.0 - feature) * gradient
    else:
        tl.static_assert(MAP == "none", "no such feature map in this kernel")
        return gradient


@triton.jit
def log_of_sum(e):
    """Return log2(1 + e) for |e| < 1; where 1 + e would lose what a nearly open gate forgets, the series does not."""
    return tl.where(tl.abs(e) < 1e-3, e * (1.0 - 0.5 * e) * LOG2E, tl.log2(1.0 + e))


@triton.jit
def decaying(x, K: tl.constexpr, DECAY: tl.constexpr):
    """Return what the logistic function of a decay is taken of: raw keys `[C, BK]`, or their mean in each channel."""
    if DECAY[0] == "head_logsigmoid" or DECAY[0] == "head_minus_softplus":
        x = tl.sum(x, axis=1)[:, None] * (1.0 / K) + tl.zeros_like(x)
    if DECAY[0] == "head_minus_softplus":
        x = -x
    return x


@triton.jit
def decay_of_key(x, m_rows, K: tl.constexpr, DECAY: tl.constexpr):
    """Return the decay of raw keys `[C, BK]` fp32 in bits; zero in rows outside `m_rows`."""
    x = decaying(x, K, DECAY)
    if DECAY[0] == "minus_exp":
        bits = -tl.minimum(tl.exp2(x * LOG2E) / DECAY[1], STRONGEST) * LOG2E
    elif DECAY[2] > 0.0:  # 1 minus the feature of the key
        bits = log_of_sum((DECAY[2] - 1.0) / (1.0 + tl.exp2(x * LOG2E)))
    else:
        tl.static_assert(
            DECAY[0] == "logsigmoid" or DECAY[0] == "head_logsigmoid" or DECAY[0] == "head_minus_softplus",
            "no such decay in this kernel",
        )
        bits = (tl.minimum(x, 0.0) * LOG2E - log_of_sum(tl.exp2(-tl.abs(x) * LOG2E))) / DECAY[1]
    return tl.where(m_rows[:, None], bits, 0.0)


@triton.jit
def decay_to_key(x, gradient, K: tl.constexpr, DECAY: tl.constexpr):
    """Return the gradient of raw keys through their decay, from that of the decay in nats, both `[C, BK]` fp32."""
    if DECAY[0] == "minus_exp":
        share = tl.exp2(x * LOG2E) / DECAY[1]
        gradient = tl.where(share < STRONGEST, -share * gradient, 0.0)
    else:
        closed = 1.0 / (1.0 + tl.exp2(decaying(x, K, DECAY) * LOG2E))
        if DECAY[2] > 0.0:
            gradient = gradient * closed * (1.0 - closed) * (1.0 - DECAY[2]) / (1.0 - (1.0 - DECAY[2]) * closed)
        else:
            gradient = gradient * closed / DECAY[1]
    if DECAY[0] == "head_logsigmoid" or DECAY[0] == "head_minus_softplus":
        gradient = tl.sum(gradient, axis=1)[:, None] * (1.0 / K) + tl.zeros_like(x)
    if DECAY[0] == "head_minus_softplus":
        gradient = -gradient
    return gradient


@triton.jit
def decay_given(g, m_rows):
    """Return a given decay in nats as bits, `[C, BK]` fp32."""
    return tl.where(m_rows[:, None], tl.maximum(g.to(tl.float32) * LOG2E, FAINTEST_DECAY), 0.0)


@triton.jit
def sum_tokens(which, x, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Return `which @ x` with `which` `[C, C]` of -1, 0, 1 and `x` `[C, BK]` fp32, on tensor cores.

    With bf16 operands, two terms represent 16 bits of `x`.
    """
    which = which.to(OPERAND)
    if tl.float32 == OPERAND:
        return tl.dot(which, x, input_precision=PRECISION)
    high = x.to(OPERAND)
    low = (x - high.to(tl.float32)).to(OPERAND)
    return tl.dot(which, low, tl.dot(which, high))


@triton.jit
def around_middle(d, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Sum decay `[C, BK]` in bits from the middle of the chunk, and over its first and its second half.

    Returns:
        r `[C, BK]`, the decay from the middle through each token (positive before the middle), and the sums of both
        halves `[BK]`.
    """
    C: tl.constexpr = d.shape[0]
    row = tl.arange(0, C)
    through = row[:, None] >= row[None, :]
    first = row < C // 2
    r = sum_tokens(through.to(tl.float32) - first[None, :].to(tl.float32), d, OPERAND, PRECISION)
    before = tl.sum(tl.where(first[:, None], d, 0.0), axis=0)
    after = tl.sum(tl.where(first[:, None], 0.0, d), axis=0)
    return r, before, after


@triton.jit
def load_key(
    k, g, rows, channels, stride_k, stride_g, m_rows,
    K: tl.constexpr, BK: tl.constexpr, MAP: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Load raw keys `[C, BK]` and return their features and decay in bits, fp32; MAP "none" takes decay from `g`."""
    x = load_block(k, rows, channels, stride_k, m_rows, K, BK).to(tl.float32)
    if MAP == "none":
        key, d = x, decay_given(load_block(g, rows, channels, stride_g, m_rows, K, BK), m_rows)
    else:
        key, d = features(x, m_rows, channels, K, MAP), decay_of_key(x, m_rows, K, DECAY)
        if DECAY[2] > 0.0:
            key = key * (1.0 - DECAY[2])
    return key, d


@triton.jit
def load_query(q, rows, channels, stride_q, m_rows, K: tl.constexpr, BK: tl.constexpr, MAP: tl.constexpr):
    """Load raw queries `[C, BK]` and return their features, fp32."""
    x = load_block(q, rows, channels, stride_q, m_rows, K, BK).to(tl.float32)
    return features(x, m_rows, channels, K, MAP)


@triton.jit
def around_reference(r, before, after):
    """Choose a reference per channel so that no factor overflows.

    A mild channel is factored around the middle of the chunk. A strong channel, which forgets more than REACH bits in
    half a chunk, is factored around the start for queries and around the end for keys. Products across the chunk stay
    exact; pairs inside it, which come out below 2 ** -REACH of their value, are added by `strong_channels`.

    Returns:
        Factors of queries and of keys `[C, BK]`, which channels are strong `[BK]`, and factors per channel for the
        state: before the queries' factors apply (`enter`) and after the keys' factors did (`leave`).
    """
    strong = (before < -REACH) | (after < -REACH)
    q_factor = tl.exp2(r + tl.where(strong, before, 0.0)[None, :])
    k_factor = tl.exp2(tl.where(strong, after, 0.0)[None, :] - r)
    return q_factor, k_factor, strong, tl.exp2(tl.where(strong, 0.0, before)), tl.exp2(tl.where(strong, 0.0, after))


@triton.jit
def is_strong(enter, leave, passed):
    """Return which channels are strong, from the result of `around_reference` and the bits of the whole chunk."""
    return (enter == 1.0) & (leave == 1.0) & (passed < -REACH)
