"""`KERNELS`: the tile sizes of the fused kernels by width and dtype, one table for eager calls, benchmarks and AOT.

Found by sweeps on an H100; a row is a choice of speed alone, never of results beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

# Bytes of shared memory that a block may take, by compute capability.
SHARED_MEMORY: dict[int, int] = {
    80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10,
}  # fmt: skip
_TARGET: ContextVar[int | None] = ContextVar("_TARGET", default=None)


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        chunk: Tokens a chunk, for all kernels of one operator; `prepare` holds it.
        block_k: Channels of keys that one program holds, where it need not hold all.
        block_v: Channels of values that one program holds at a time.
        warps: Warps of 32 threads a program.
        stages: Iterations of the loop over chunks whose loads are in flight.
    """

    chunk: int = 0
    block_k: int = 0
    block_v: int = 0
    warps: int = 4
    stages: int = 1


def _walk(block_v: int, warps: int, stages: int = 1) -> Tile:
    return Tile(block_v=block_v, warps=warps, stages=stages)


# Per kernel: (largest padded width, bytes of an activation) -> tile; the first row that is wide enough counts.
KERNELS: dict[str, dict[tuple[int, int], Tile]] = {
    "prepare": {
        (64, 2): Tile(64, 64, 0, 2), (128, 2): Tile(64, 64, 0, 2), (256, 2): Tile(32, 64, 0, 4),
        (64, 4): Tile(32, 64, 0, 4), (128, 4): Tile(32, 64, 0, 4), (256, 4): Tile(16, 64, 0, 4),
    },
    "prepare_maps": {
        (64, 2): _walk(0, 4, 2), (128, 2): _walk(0, 4, 2), (256, 2): _walk(0, 8, 2),
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

# Rows that take the place of those above on 8.x and 12.x, where products take operands from registers, not from shared
# memory. Chosen by what the compiler spills; no such GPU was at hand to measure speed.
REGISTER_OPERANDS: dict[str, dict[tuple[int, int], Tile]] = {
    "attend_segments": {(64, 2): _walk(32, 4, 2), (128, 2): _walk(16, 8), (256, 2): _walk(16, 8)},
}


def get_tile(kernel: str, width: int, itemsize: int) -> Tile:
    """Return the row of `KERNELS` for heads padded to `width` channels and activations of `itemsize` bytes."""
    rows = KERNELS[kernel]
    if target() // 10 not in (9, 10):
        rows = rows | REGISTER_OPERANDS.get(kernel, {})
    return min((key, tile) for key, tile in rows.items() if key[0] >= width and key[1] == itemsize)[1]


def padded(width: int) -> int:
    """Return the power of two that a head of `width` channels takes in a kernel."""
    return max(16, 1 << (width - 1).bit_length())


@contextmanager
def targeting(sm: int) -> Iterator[None]:
    """Have `get_tile` choose for a compute capability, 90 for 9.0, instead of the current device."""
    token = _TARGET.set(sm)
    try:
        yield
    finally:
        _TARGET.reset(token)


def target() -> int:
    """Return the compute capability that tiles are chosen for: the first device's, 90 without one."""
    return _TARGET.get() or _capability()


@cache
def _capability() -> int:
    import torch

    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(0)
    return 10 * major + minor
