"""Block quantisation of weights in numpy: the integers, scales and zero points that represent a matrix.

A row is cut into blocks; the values of a block are `scale * (code - zero point)` with unsigned codes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SPANS = np.linspace(0.85, 1.15, 9)
"""Widths of the grid that are tried, relative to the range of a block: narrower clips, wider is coarser."""
LEAST = np.float32(0.05)
"""Weight of a column without inputs, relative to the mean of all: a text is too short to show what never comes."""
TILE = 1 << 17
"""Elements that are searched at a time; they fit a core's cache, which is three times as fast as whole matrices."""


class Blocks(NamedTuple):
    """A quantised matrix `[N, K]`, each row in `B = ceil(K / block)` blocks.

    `codes` is `[N, B * block]` uint8, where elements beyond K stand for 0; `scale` is `[N, B]` fp32; `zero_point` is
    `[N, B]` uint8.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray


def quantise(
    matrix: np.ndarray, bits: int, block: int, levels: int | None = None, importance: np.ndarray | None = None
) -> Blocks:
    """Quantise the rows of a matrix `[N, K]` fp32 in blocks, to the nearest code of the best grid of each block.

    Codes are below `levels`, by default `2**bits`. Squared errors are weighted by the `importance` `[K]` of the column,
    the mean square of that input of the map, so that the error of its output is small; without it all count alike. For
    given codes the best scale is a quotient of sums, and for a given scale the best codes are the nearest. Both are
    found once for several widths of the grid, and the width with the smallest error wins; a block of zeros stays zero.
    This is the search of llama.cpp's k-quants with an importance matrix, except that the zero point is an integer while
    errors are compared.
    """
    rows, width = matrix.shape
    count = -(-width // block)
    result = Blocks(
        np.empty((rows, count * block), np.uint8),
        np.empty((rows, count), np.float32),
        np.empty((rows, count), np.uint8),
    )
    tile = max(1, TILE // (count * block))
    weights = None
    if importance is not None:
        even = importance.astype(np.float32) / max(importance.mean(), np.finfo(np.float32).tiny) + LEAST
        weights = np.pad(even, (0, count * block - width)).reshape(count, block)
    for start in range(0, rows, tile):
        part = slice(start, start + tile)
        padded = np.pad(matrix[part], ((0, 0), (0, count * block - width)))
        each = None if weights is None else np.tile(weights, (len(padded), 1))
        found = _search(padded.reshape(-1, block), levels or 2**bits, each)
        for whole, piece in zip(result, found, strict=True):
            whole[part] = piece.reshape(-1, whole.shape[1])
    return result


def _search(x: np.ndarray, levels: int, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes, scale and zero point of blocks `[n, block]`, whose elements have weights of the same shape."""
    top = np.float32(levels - 1)
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    step = np.maximum((high - low) / top, np.finfo(np.float32).tiny)
    scale, zero_point, best = step, np.zeros_like(step), np.full_like(step, -1)
    for span in SPANS.astype(np.float32) if levels < 256 else [np.float32(1)]:
        tried = step * span
        zero = np.clip(np.rint(-low / tried), 0, top)
        codes = np.clip(np.rint(x / tried) + zero, 0, top) - zero
        weighted = codes if weights is None else weights * codes
        dot = np.einsum("nk,nk->n", x, weighted)[:, None]
        norm = np.maximum(np.einsum("nk,nk->n", codes, weighted)[:, None], LEAST)
        explained = dot * dot / norm  # the part of the sum of squares that the best scale, dot / norm, explains
        better = explained > best
        best = np.where(better, explained, best)
        scale = np.where(better & (dot > 0), dot / norm, scale)
        zero_point = np.where(better, zero, zero_point)
    codes = np.clip(np.rint(x / scale) + zero_point, 0, top)
    return codes.astype(np.uint8), scale, zero_point.astype(np.uint8)


def requantise(matrix: np.ndarray, grid: Blocks, levels: int) -> Blocks:
    """Quantise the rows of a matrix `[N, K]` fp32 to the nearest codes for given scales and zero points."""
    rows, count = grid.scale.shape
    codes = np.pad(matrix, ((0, 0), (0, grid.codes.shape[1] - matrix.shape[1]))).reshape(rows, count, -1)
    codes /= grid.scale[..., None]
    np.rint(codes, out=codes)
    codes += grid.zero_point[..., None]
    return grid._replace(codes=np.clip(codes, 0, levels - 1, out=codes).astype(np.uint8).reshape(rows, -1))


def dequantise(blocks: Blocks, width: int) -> np.ndarray:
    """Return the matrix `[N, width]` fp32 that quantised blocks represent."""
    rows, count = blocks.scale.shape
    values = blocks.codes.reshape(rows, count, -1).astype(np.float32)
    values -= blocks.zero_point[..., None]
    values *= blocks.scale[..., None]
    return values.reshape(rows, -1)[:, :width]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 codes along the last axis into bytes, the first code in the low half of a byte."""
    if bits == 8:
        return codes
    even = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return even[..., 0::2] | even[..., 1::2] << 4


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the first `count` codes of the last axis that `pack` packed."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)[..., :count]
