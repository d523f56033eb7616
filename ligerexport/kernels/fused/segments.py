"""Segments of sequences for the linear-attention kernels: a table that kernels read, made without a device sync.

Tokens of all sequences are stored one after the other, whether packed or batched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ligerexport.kernels.tuning import get_tile, padded

PROGRAMS = 264
"""Number of programs to aim for when sequences are divided: two per multiprocessor of an H100."""

LONGEST_CHUNK = 64
"""A multiple of every tile's chunk, so that segments end where chunks end."""


def segment_length(tokens: int, heads: int, d_k: int, d_v: int, itemsize: int) -> int:
    """Return the tokens per segment: the largest number with which all segments still fill the GPU."""
    width = max(padded(d_k), padded(d_v))
    blocks = -(-d_v // min(get_tile("attend_segments", width, itemsize).block_v, padded(d_v)))
    pieces = max(1, PROGRAMS // (heads * blocks))
    return LONGEST_CHUNK * max(1, -(-tokens // (pieces * LONGEST_CHUNK)))


def segment_count(tokens: int, sequences: int, segment: int, packed: bool) -> int:
    """Return the rows of the table of `cut` (packed) or `cut_batch`."""
    return tokens // segment + sequences if packed else sequences * max(1, -(-(tokens // sequences) // segment))


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of all sequences, at least one for each.

    Attributes:
        table: `[S, 5]` int32: first token, end, sequence (-1 for an unused row), whether it is the last segment of its
            sequence, and the number of its first chunk.
        offsets: `[N + 1]` int32, the rows of each sequence.
        count: S, rows of the table.
        single: Whether each sequence is known to be one segment.
    """

    table: Tensor
    offsets: Tensor
    count: int
    single: bool


def cut(cu_seqlens: Tensor, tokens: int, segment: int, chunk: int) -> Segments:
    """Divide packed sequences.

    Args:
        cu_seqlens: `[N + 1]` integer, the bounds of the sequences.
        tokens: Number of all tokens, `cu_seqlens[-1]`.
        segment: Tokens per segment, a multiple of `chunk`.
        chunk: Tokens per chunk.
    """
    starts = cu_seqlens.long()
    lengths = starts.diff()
    count = segment_count(tokens, lengths.numel(), segment, packed=True)

    def offsets(size: int) -> Tensor:
        pieces = ((lengths + size - 1) // size).clamp_min(1)
        return torch.nn.functional.pad(pieces.cumsum(0), (1, 0))

    rows, chunks = offsets(segment), offsets(chunk)
    row = torch.arange(count, device=starts.device)
    sequence = (torch.searchsorted(rows, row, right=True) - 1).clamp_max(lengths.numel() - 1)
    local = row - rows[sequence]
    start = starts[sequence] + local * segment
    end = torch.minimum(start + segment, starts[sequence + 1])
    used = row < rows[-1]
    last = row == rows[sequence + 1] - 1
    first_chunk = chunks[sequence] + local * (segment // chunk)
    table = torch.stack([start, end, sequence.where(used, -1), last.long(), first_chunk], dim=1)
    return Segments(table.int(), rows.int(), count, tokens <= segment)


@lru_cache(maxsize=256)
def cut_batch(batch: int, length: int, segment: int, chunk: int, device: torch.device) -> Segments:
    """Divide `batch` sequences of equal length."""
    cu_seqlens = torch.arange(batch + 1) * length
    made = cut(cu_seqlens, batch * length, segment, chunk)
    rows = segment_count(batch * length, batch, segment, packed=False)
    return Segments(made.table[:rows].to(device), made.offsets.to(device), rows, length <= segment)
