"""Block quantisation of weights in numpy: the integers, scales and zero points that represent a matrix.

A row is cut into blocks; the values of a block are `scale * (code - zero point)` with unsigned codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

SPANS = np.linspace(0.85, 1.15, 9)
"""Widths of the grid that are tried, relative to the range of a block: narrower clips, wider is coarser."""
LEAST = np.float32(0.05)
"""Weight of a column without inputs, relative to the mean of all: a text is too short to show what never comes."""
TILE = 1 << 17
"""Elements that are searched at a time; they fit a core's cache, which is three times as fast as whole matrices."""
ROWS = 1 << 20
"""Elements of rows whose grids are chosen together at a time, which is twice as fast as `TILE`."""
CHUNK = 2048
"""Columns whose grids are chosen together, a multiple of every block. It bounds work and memory for wide matrices."""
TOGETHER = np.float32(0.7)
"""Weight of the products of two inputs, relative to their squares: a short text shows them less reliably."""
FEW_SPANS = SPANS[::2]
"""Widths that are tried when grids are chosen together."""

Moments: TypeAlias = Sequence[np.ndarray]
"""Mean products of each two inputs of a linear map, `[n, n]` for every `CHUNK` inputs, or mean squares, `[n]`."""

MIDDLE = np.uint8(128)
"""Zero point of the codes that `quantise_rows` makes."""


class Blocks(NamedTuple):
    """A quantised matrix `[N, K]`, each row in `B = ceil(K / block)` blocks.

    `codes` is `[N, B * block]` uint8, where elements beyond K stand for 0; `scale` is `[N, B]` fp32; `zero_point` is
    `[N, B]` uint8.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray


def quantise(
    matrix: np.ndarray,
    bits: int,
    block: int,
    levels: int | None = None,
    moments: Moments | None = None,
) -> Blocks:
    """Quantise the rows of a matrix `[N, K]` fp32 in blocks, to the nearest code of the best grid of each block.

    Codes are below `levels`, by default `2**bits`. For given codes the best scale is a quotient of sums, and for a
    given scale the best codes are the nearest. Both are found once for several widths of the grid, and the width with
    the smallest error wins; a block of zeros stays zero. This is the search of llama.cpp's k-quants, except that the
    zero point is an integer while errors are compared.

    Args:
        matrix: The weights of a linear map.
        bits: Bits of a code.
        block: Elements of a block.
        levels: Number of different codes.
        moments: Those of the map's inputs on a text. Squared errors are weighted by the mean square of the input, and
            with few levels and the products of inputs, the grids of a row are then chosen together, so that the error
            of its output is small. Without moments all errors count alike.
    """
    rows, width = matrix.shape
    count = -(-width // block)
    result = Blocks(
        np.empty((rows, count * block), np.uint8),
        np.empty((rows, count), np.float32),
        np.empty((rows, count), np.uint8),
    )
    tile, levels = max(1, TILE // (count * block)), levels or 2**bits
    chunks = None if moments is None else _damped(moments, count * block - width)
    weights = None if chunks is None else np.concatenate([_squares(chunk) for chunk in chunks]).reshape(count, block)
    for start in range(0, rows, tile):
        part = slice(start, start + tile)
        padded = np.pad(matrix[part], ((0, 0), (0, count * block - width)))
        each = None if weights is None else np.tile(weights, (len(padded), 1))
        found = _search(padded.reshape(-1, block), levels, each)
        for whole, piece in zip(result, found, strict=True):
            whole[part] = piece.reshape(-1, whole.shape[1])
    if chunks is not None and chunks[0].ndim == 2 and levels < 256:
        tile = max(1, ROWS // (count * block))
        for start in range(0, rows, tile):
            part = slice(start, start + tile)
            padded = np.pad(matrix[part], ((0, 0), (0, count * block - width)))
            _choose_together(padded, Blocks(*(whole[part] for whole in result)), chunks, levels)
    return result


def _squares(chunk: np.ndarray) -> np.ndarray:
    return chunk.diagonal() if chunk.ndim == 2 else chunk


def _damped(moments: Moments, beyond: int) -> list[np.ndarray]:
    """Return what weighs errors: moments relative to the mean square of all inputs, and `beyond` columns of zeros."""
    mean = sum(_squares(chunk).sum() for chunk in moments) / sum(map(len, moments))
    result = []
    for chunk in moments:
        damped = chunk.astype(np.float32) / max(mean, np.finfo(np.float32).tiny)
        squares = _squares(damped) + LEAST
        if damped.ndim == 2:
            damped *= TOGETHER
            np.fill_diagonal(damped, squares)
        result.append(damped if damped.ndim == 2 else squares)
    result[-1] = np.pad(result[-1], (0, beyond))
    return result


def _choose_together(matrix: np.ndarray, blocks: Blocks, moments: Moments, levels: int) -> None:
    """Choose grids again, block after block, so that errors of the blocks of a row cancel each other in its output.

    The error of an output is the sum of the errors of its inputs, which are correlated. So each block takes, of several
    widths and of the zero points below and above, the grid whose errors add least to those of all other blocks. Every
    code stays the nearest of its grid.

    Args:
        matrix: Rows `[N, B * block]`.
        blocks: Their codes and grids, which are changed.
        moments: What `_damped` returned.
        levels: Number of different codes.
    """
    block, first = matrix.shape[1] // blocks.scale.shape[1], 0
    errors = dequantise(blocks, matrix.shape[1]) - matrix
    for chunk in moments:
        beside = errors[:, first : first + len(chunk)]
        for start in range(0, len(chunk), block):
            part, at = slice(start, start + block), (first + start) // block
            own, here = np.ascontiguousarray(chunk[part, part]), beside[:, part]
            others = 2 * (beside @ chunk[:, part] - here @ own)
            best = _cost(here, own, others)
            x = matrix[:, first + start : first + start + block]
            for codes, scale, zero in _candidates(x, own.diagonal(), levels):
                error = codes * scale - x
                cost = _cost(error, own, others)
                better = cost < best
                best = np.where(better, cost, best)
                here[better] = error[better]
                blocks.codes[better, at * block : (at + 1) * block] = (codes + zero)[better]
                blocks.scale[better, at], blocks.zero_point[better, at] = scale[better, 0], zero[better, 0]
        first += len(chunk)


def _cost(error: np.ndarray, own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return what errors of a block `[N, block]` add to the squared errors of the outputs, `[N]`."""
    return np.einsum("nk,nk->n", error, error @ own + others)


def _candidates(x: np.ndarray, weights: np.ndarray, levels: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield grids for blocks `[N, block]`: codes without their zero point, scales and zero points `[N, 1]`."""
    top = np.float32(levels - 1)
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    step = np.maximum((high - low) / top, np.finfo(np.float32).tiny)
    for span in FEW_SPANS.astype(np.float32):
        tried = step * span
        below = np.floor(-low / tried)
        for zero in (np.clip(below, 0, top), np.clip(below + 1, 0, top)):
            codes = np.clip(np.rint(x / tried) + zero, 0, top) - zero
            weighted = codes * weights
            dot, norm = (np.einsum("nk,nk->n", y, weighted)[:, None] for y in (x, codes))
            scale = np.where(dot > 0, dot / np.maximum(norm, np.finfo(np.float32).tiny), tried)
            yield np.clip(np.rint(x / scale) + zero, 0, top) - zero, scale, zero


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


def quantise_rows(matrix: np.ndarray) -> Blocks:
    """Quantise a matrix `[N, K]` fp32 to codes of 8 bits, one block for each row, with zero in the middle of the grid.

    A product with such codes needs no zero points, and is multiplied with a row's scale at its end.
    """
    most = np.abs(matrix).max(1, keepdims=True)
    scale = np.where(most > 0, np.maximum(most / np.float32(127), np.finfo(np.float32).tiny), np.float32(1))
    grid = Blocks(np.empty(matrix.shape, np.uint8), scale, np.full_like(scale, MIDDLE, np.uint8))
    return requantise(matrix, grid, 256)


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
