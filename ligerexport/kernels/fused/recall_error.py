"""The judge of novelty on the GPU: how far a normalised linear memory of all earlier tokens is from each token's value.

The sequence is divided into segments that are summed in parallel, as in gated linear attention, but without decay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused.blocks import features, load_block
from ligerexport.kernels.tuning import get_tile, padded

PROGRAMS = 264
"""Number of programs to aim for when sequences are divided: two per multiprocessor of an H100."""


@triton.jit
def _load_real(
    k, v, first, position, length, stride_k, stride_v, channels, columns,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Load a chunk: softmax of the keys, zero on padding, and values, fp32."""
    token = tl.arange(0, C)
    m_rows = (first + token < length) & (position + first + token >= 0)
    x = load_block(k + first * stride_k, token, channels, stride_k, m_rows, K, BK).to(tl.float32)
    value = load_block(v + first * stride_v, token, columns, stride_v, m_rows, V, 0).to(tl.float32)
    return features(x, m_rows, channels, K, "softmax"), value


@triton.jit
def sum_segments(
    k, v, positions, sums, length, segment, stride_kb, stride_k, stride_kh, stride_vb, stride_v, stride_vh,
    HEADS, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what each segment adds to the state `[K, V + 1]`. Grid: (segments x V blocks, KV heads, B)."""
    blocks = tl.cdiv(V, BV)
    block, piece = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channels, columns = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    position = tl.load(positions + b)
    state = tl.zeros([BK, BV], tl.float32)
    mass = tl.zeros([BK], tl.float32)
    k += b * stride_kb + head * stride_kh
    v += b * stride_vb + head * stride_vh
    for first in range(piece * segment, tl.minimum(length, (piece + 1) * segment), C):
        key, value = _load_real(k, v, first, position, length, stride_k, stride_v, channels, columns, K, V, BK, C)
        state = tl.dot(tl.trans(key), value, state, input_precision=PRECISION)
        mass += tl.sum(key, axis=0)
    p_sum = sums + ((b * HEADS + head) * (tl.num_programs(0) // blocks) + piece) * K * (V + 1) + channels * (V + 1)
    m_k = channels < K
    tl.store(p_sum[:, None] + columns[None, :], state, mask=m_k[:, None] & (columns < V)[None, :])
    tl.store(p_sum + V, mass, mask=m_k & (block == 0))


@triton.jit
def judge_segments(
    k, v, positions, starts, errors, length, segment, stride_kb, stride_k, stride_kh, stride_vb, stride_v, stride_vh,
    HEADS, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write squared errors `[V blocks, B, T, KV heads]` from the state before each segment. Grid: as `sum_segments`."""
    blocks = tl.cdiv(V, BV)
    block, piece = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, channels, columns = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    position = tl.load(positions + b)
    m_k, m_state = channels < K, (channels < K)[:, None] & (columns < V)[None, :]
    p_start = starts + ((b * HEADS + head) * (tl.num_programs(0) // blocks) + piece) * K * (V + 1) + channels * (V + 1)
    state = tl.load(p_start[:, None] + columns[None, :], mask=m_state, other=0.0)
    mass = tl.load(p_start + V, mask=m_k, other=0.0)
    earlier = token[:, None] > token[None, :]
    k += b * stride_kb + head * stride_kh
    v += b * stride_vb + head * stride_vh
    errors += block * tl.num_programs(2) * length * HEADS + b * length * HEADS + head
    for first in range(piece * segment, tl.minimum(length, (piece + 1) * segment), C):
        key, value = _load_real(k, v, first, position, length, stride_k, stride_v, channels, columns, K, V, BK, C)
        scores = tl.where(earlier, tl.dot(key, tl.trans(key), input_precision=PRECISION), 0.0)
        recalled = tl.dot(key, state, input_precision=PRECISION)
        recalled = tl.dot(scores, value, recalled, input_precision=PRECISION)
        weight = tl.sum(scores, axis=1) + tl.sum(key * mass[None, :], axis=1)
        wrong = value - recalled / tl.where(weight > 0, weight, 1.0)[:, None]
        at = first + token
        tl.store(errors + at * HEADS, tl.sum(wrong * wrong, axis=1), mask=at < length)
        state = tl.dot(tl.trans(key), value, state, input_precision=PRECISION)
        mass += tl.sum(key, axis=0)


@triton.jit
def scan_segments(sums, before, after, pieces, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Replace what each segment adds by the state before it. Grid: (blocks of K (V + 1), B x KV heads)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bh = tl.program_id(1).to(tl.int64)
    state = tl.load(before + bh * SIZE + i, mask=i < SIZE, other=0.0)
    sums += bh * pieces * SIZE + i
    for _ in range(0, pieces):
        added = tl.load(sums, mask=i < SIZE, other=0.0)
        tl.store(sums, state, mask=i < SIZE)
        state += added
        sums += SIZE
    tl.store(after + bh * SIZE + i, state, mask=i < SIZE)


@triton.jit
def join_columns(
    errors, novelty, length, HEADS: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the root of the sum over all blocks of columns, `[B, T, KV heads]`. Grid: (T / TOKENS, B)."""
    first, i = tl.program_id(0) * TOKENS * HEADS, tl.arange(0, BLOCK)
    mask = (i < TOKENS * HEADS) & (first + i < length * HEADS)
    at = tl.program_id(1).to(tl.int64) * length * HEADS + first + i
    total = tl.zeros([BLOCK], tl.float32)
    for block in tl.static_range(BLOCKS):
        total += tl.load(errors + block * tl.num_programs(1).to(tl.int64) * length * HEADS + at, mask=mask, other=0.0)
    tl.store(novelty + at, tl.sqrt(total), mask=mask)


def segment_tokens(batch: int, length: int, heads: int, d_k: int, d_v: int) -> tuple[int, int]:
    """Return the tokens per segment, a multiple of the chunk, and the number of blocks of value columns."""
    tile = get_tile("recall_error", max(padded(d_k), padded(d_v)), 4)
    blocks = triton.cdiv(d_v, min(tile.block_v, padded(d_v)))
    pieces = max(1, PROGRAMS // (heads * blocks))
    return tile.chunk * triton.cdiv(batch * length, pieces * tile.chunk), blocks


def recall_error(key: Tensor, value: Tensor, position: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Judge every token of a call; arguments and results are those of `ligerexport.kernels.library.recall_error`."""
    batch, length, heads, d_k = key.shape
    position = position.contiguous()
    d_v = value.shape[3]
    tile = get_tile("recall_error", max(padded(d_k), padded(d_v)), 4)
    block_v = min(tile.block_v, padded(d_v))
    segment, blocks = segment_tokens(batch, length, heads, d_k, d_v)
    pieces = triton.cdiv(length, segment)
    sums = state.new_empty(batch, heads, pieces, d_k, d_v + 1)
    grid = (pieces * blocks, heads, batch)
    strides = (*key.stride()[:3], *value.stride()[:3])
    sizes = {
        "K": d_k, "V": d_v, "BK": padded(d_k), "BV": block_v, "C": tile.chunk, "PRECISION": "tf32x3",
        "num_warps": tile.warps,
    }  # fmt: skip
    sum_segments[grid](key, value, position, sums, length, segment, *strides, heads, **sizes)
    after, size = torch.empty_like(state), d_k * (d_v + 1)
    scan_segments[triton.cdiv(size, 512), batch * heads](sums, state, after, pieces, SIZE=size, BLOCK=512, num_warps=4)
    errors, novelty = state.new_empty(blocks, batch, length, heads), state.new_empty(batch, length, heads)
    judge_segments[grid](key, value, position, sums, errors, length, segment, *strides, heads, **sizes)
    join_columns[triton.cdiv(length, 64), batch](
        errors, novelty, length, HEADS=heads, BLOCKS=blocks, TOKENS=64, BLOCK=triton.next_power_of_2(64 * heads),
        num_warps=4,
    )  # fmt: skip
    return novelty, after
