"""`KERNELS`: the tile sizes of the fused kernels by width and dtype, one table for eager calls, benchmarks and AOT.

The sizes were found by sweeps on an H100. They affect speed; results change only by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache

# Bytes of shared memory that a block may use, by compute capability.
SHARED_MEMORY: dict[int, int] = {
    80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10,
}  # fmt: skip
FORWARD = 86
"""Compute capability whose PTX also serves all later ones: each has enough shared memory for its tiles."""
_TARGET: ContextVar[int | None] = ContextVar("_TARGET", default=None)


@dataclass(frozen=True)
class Tile:
    """How a kernel divides its work.

    Attributes:
        chunk: Tokens per chunk for all kernels of one operator; the row of `prepare` holds it.
        block_k: Number of key channels that one program holds, if it need not hold all.
        block_v: Number of value channels that one program holds at a time.
        warps: Warps of 32 threads per program.
        stages: Number of iterations of the loop over chunks whose loads are in flight.
    """

    chunk: int = 0
    block_k: int = 0
    block_v: int = 0
    warps: int = 4
    stages: int = 1


def _walk(block_v: int, warps: int, stages: int = 1) -> Tile:
    return Tile(block_v=block_v, warps=warps, stages=stages)


# Per kernel: (largest padded width, bytes of an activation) -> tile; the first row that is wide enough is used.
KERNELS: dict[str, dict[tuple[int, int], Tile]] = {
    "prepare": {
        (64, 2): Tile(64, 64, 0, 2), (128, 2): Tile(64, 64, 0, 2), (256, 2): Tile(32, 64, 0, 4),
        (64, 4): Tile(32, 64, 0, 4), (128, 4): Tile(32, 64, 0, 4), (256, 4): Tile(16, 64, 0, 4),
    },
    "prepare_maps": {
        (64, 2): _walk(0, 4, 2), (128, 2): _walk(0, 4, 3), (256, 2): _walk(0, 8, 2),
        (64, 4): _walk(0, 4), (128, 4): _walk(0, 8), (256, 4): _walk(0, 8),
    },
    "segment_states": {
        (64, 2): _walk(64, 4, 3), (128, 2): _walk(128, 8, 3), (256, 2): _walk(64, 8, 2),
        (64, 4): _walk(64, 4, 2), (128, 4): _walk(64, 8, 2), (256, 4): _walk(32, 8),
    },
    "attend_segments": {
        (64, 2): _walk(64, 4, 2), (128, 2): _walk(64, 4, 2), (256, 2): _walk(64, 8),
        (64, 4): _walk(64, 4), (128, 4): _walk(64, 8), (256, 4): _walk(32, 8),
    },
    # 32 value channels of 2 bytes: Triton 3.6 compiles reads outside of shared memory for 9.0
    "value_gradient": {
        (64, 2): _walk(64, 4), (128, 2): _walk(64, 4), (256, 2): _walk(64, 8),
        (64, 4): _walk(64, 4), (128, 4): _walk(64, 8), (256, 4): _walk(32, 8),
    },
    "scaled_gradient": {
        (64, 2): _walk(64, 4), (128, 2): _walk(64, 4), (256, 2): _walk(64, 8),
        (64, 4): _walk(64, 4), (128, 4): _walk(32, 8), (256, 4): _walk(32, 8),
    },
    "scaled_gradient_group": {
        (64, 2): _walk(64, 4), (128, 2): _walk(64, 8), (256, 2): _walk(64, 8),
        (64, 4): _walk(64, 4), (128, 4): _walk(32, 8), (256, 4): _walk(32, 8),
    },
    "finish_gradient": {
        (64, 2): Tile(0, 64, 0, 4), (128, 2): Tile(0, 64, 0, 4), (256, 2): Tile(0, 64, 0, 4),
        (64, 4): Tile(0, 64, 0, 4), (128, 4): Tile(0, 64, 0, 4), (256, 4): Tile(0, 64, 0, 4),
    },
    "finish_gradient_maps": {
        (64, 2): _walk(0, 4, 2), (128, 2): _walk(0, 4, 2), (256, 2): _walk(0, 8, 2),
        (64, 4): _walk(0, 4), (128, 4): _walk(0, 8), (256, 4): _walk(0, 8),
    },
    "recall_error": {
        (64, 4): Tile(32, 0, 64, 4), (128, 4): Tile(32, 0, 64, 8), (256, 4): Tile(16, 0, 32, 8),
    },
    "strong_channels": {
        (64, 2): _walk(64, 4), (128, 2): _walk(64, 8), (256, 2): _walk(64, 8),
        (64, 4): _walk(64, 4), (128, 4): _walk(64, 8), (256, 4): _walk(32, 8),
    },
}  # fmt: skip

# Rows that replace those above on 8.x and 12.x, where products take operands from registers, not from shared memory.
# They were chosen so that the compiler does not spill; their speed was not measured.
REGISTER_OPERANDS: dict[str, dict[tuple[int, int], Tile]] = {
    "attend_segments": {(64, 2): _walk(32, 4, 2), (128, 2): _walk(16, 8), (256, 2): _walk(16, 8)},
}


WIDEST = 256
"""Largest padded width in `KERNELS`."""


def get_tile(kernel: str, width: int, itemsize: int) -> Tile:
    """Return the row of `KERNELS` for heads padded to `width` channels and activations of `itemsize` bytes."""
    rows = KERNELS[kernel]
    if target() // 10 not in (9, 10):
        rows = rows | REGISTER_OPERANDS.get(kernel, {})
    return min((key, tile) for key, tile in rows.items() if key[0] >= width and key[1] == itemsize)[1]


def cdiv(n: int, size: int) -> int:
    """Return n / size, rounded up. Triton's own function takes microseconds, a dozen times in a call."""
    return -(-n // size)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`; see `cdiv`."""
    return 1 << (n - 1).bit_length()


def padded(width: int) -> int:
    """Return the power of two to which a kernel pads a head of `width` channels."""
    return max(16, power_of_two(width))


@dataclass(frozen=True)
class ProductTile:
    """How a product with a weight is divided: rows, outputs and inputs per program; the other fields as in `Tile`."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def get_product_tile(rows: int, outputs: int, inputs: int, itemsize: int, gated: bool) -> ProductTile:
    """Return the tile for `rows` rows and a weight `[outputs, inputs]`, or `[2 * outputs, inputs]` if it is gated.

    One row is limited by memory and by the latency of the first weights, so each output of a small matrix is a program
    of one warp. A few rows are limited by memory too, many by arithmetic.
    """
    whole = inputs & -inputs  # the largest power of two that divides it
    if itemsize == 1 and (rows > 1 or inputs >= 2048):
        return _coded_tile(rows, outputs, whole, gated)
    if rows == 1:
        if inputs >= 2048:
            deepest = 1024 if gated else 2048  # the next tile is loaded while one is multiplied
            return ProductTile(1, 4 if outputs > 1024 else 1, min(max(whole, 512), deepest), 4, 1)
        few = outputs <= 8192
        return ProductTile(
            1, 1 if few else 4, 512 if whole >= 512 else 1024 if inputs > 512 else 512, 1 if few else 2, 1
        )
    wide = itemsize == 4
    if rows <= 16:
        deep = 64 if wide or whole < 256 else 256
        tile = ProductTile(16, 16 if outputs < 2048 else 32, deep, 4, 4 if deep > 64 and not wide else 3 if wide else 6)
    elif rows <= 64:
        tile = ProductTile(64, 32 if gated else 64, 32 if wide else 64, 4, 3)
    elif wide:
        tile = ProductTile(64, 32 if gated else 64, 32, 8, 2)
    elif target() // 10 in (9, 10):
        tile = ProductTile(128, 128 if gated or outputs > 4096 else 256, 64, 8, 3)
    else:
        tile = ProductTile(128, 64 if gated else 128, 64 if gated else 32, 8, 3)
    return _fitting(tile, (tile.block_m + tile.block_n * (2 if gated else 1)) * tile.block_k * itemsize)


def _coded_tile(rows: int, outputs: int, whole: int, gated: bool) -> ProductTile:
    """Return the tile for weights of one byte, which are the left side of a product, and inputs of two bytes."""
    if rows == 1:
        deep = min(max(whole, 512), 4096)
        return ProductTile(1, 4 if outputs > 1024 else 1, deep, 8 if deep > 2048 else 4, 1)
    if rows <= 16:
        tile = ProductTile(16, 16 if outputs < 2048 else 32, 64 if whole < 256 else 256, 4, 6)
    elif rows <= 64:
        tile = ProductTile(64, 64, 64, 4, 4)
    else:
        hopper = target() // 10 in (9, 10)
        tile = ProductTile(128, 128 if hopper or not gated else 64, 64, 8, 4 if hopper else 3)
    return _fitting(tile, (2 * tile.block_m + tile.block_n * (2 if gated else 1)) * tile.block_k)


def _fitting(tile: ProductTile, stage: int) -> ProductTile:
    """Return a tile with no more stages, of `stage` bytes, than fit into shared memory."""
    return replace(tile, stages=min(tile.stages, max(1, SHARED_MEMORY.get(target(), 99 << 10) // stage)))


@contextmanager
def targeting(sm: int) -> Iterator[None]:
    """Let `get_tile` choose for a compute capability, 90 for 9.0, instead of the current device."""
    token = _TARGET.set(sm)
    try:
        yield
    finally:
        _TARGET.reset(token)


def target() -> int:
    """Return the compute capability that tiles are chosen for: that of the first device, or 90 without one."""
    return _TARGET.get() or _capability()


def overlaps() -> bool:
    """Return whether a kernel may begin before the previous one ends, possible since 9.0; see `fused/overlap.py`."""
    import triton

    return target() >= 90 and not triton.knobs.runtime.interpret


@cache
def _capability() -> int:
    import torch

    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(0)
    return 10 * major + minor
