"""Pack documents into rows by best fit, in an order drawn from the seed, and collate them as transformers does.

Positions restart at each document, and so do state, window and mask. A phase chooses which positions count.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ligerexport.train.data import Documents

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100
"""Target of a position that predicts nothing, as in transformers."""

ALIGNED = 16
"""What divides the largest length, so that Triton kernels are compiled once and not for each length."""


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Put documents into rows of `capacity` tokens, longest first, each into the row with the least room left.

    Args:
        lengths: Number of tokens in each document, at most `capacity`.
        capacity: Number of tokens in a row.

    Returns:
        The documents of each row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room and row, ordered
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(free, (int(lengths[index]), -1))
        room, row = free.pop(place) if place < len(free) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if (room := room - int(lengths[index])) > 1:
            insort(free, (room, row))
    return rows


@dataclass(frozen=True)
class Rows:
    """An endless sequence of packed rows. Each epoch has all rows once, in its own order.

    Attributes:
        documents: The documents to pack.
        rows: Documents of each row.
        length: Number of tokens in a row, padding included.
        seed: Seed for the order.
    """

    documents: Documents
    rows: list[list[int]]
    length: int
    seed: int = 0

    def at(self, start: int, count: int) -> list[int]:
        """Return rows `start` to `start + count` of the sequence: a pure function, so that a run resumes exactly."""
        found: list[int] = []
        while len(found) < count:
            epoch, offset = divmod(start + len(found), len(self.rows))
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            found += order[offset : offset + count - len(found)].tolist()
        return found

    def collate(self, rows: Sequence[int]) -> Batch:
        """Return a batch of rows, on the CPU. The rest of a row prolongs its last document and is not trained on."""
        import torch

        shape = (len(rows), self.length)
        ids, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        position, answers = np.zeros(shape, np.int64), np.zeros(shape, bool)
        bounds, data = [0], self.documents
        for i, row in enumerate(rows):
            place = 0
            for document in self.rows[row]:
                begin, end = data.bounds[document], data.bounds[document + 1]
                size = int(end - begin)
                part = slice(place, place + size)
                ids[i, part], position[i, part] = data.ids[begin:end], np.arange(size)
                targets[i, place : place + size - 1] = data.ids[begin + 1 : end]
                answers[i, place : place + size - 1] = data.answers[begin + 1 : end]
                place += size
                bounds.append(i * self.length + place)
            position[i, place:] = np.arange(size, size + self.length - place)
            bounds[-1] = (i + 1) * self.length
        made = [torch.from_numpy(x) for x in (ids, position, targets, answers)]
        ends = torch.tensor(bounds, dtype=torch.int32)
        longest = -(-int(np.diff(bounds).max()) // ALIGNED) * ALIGNED
        return Batch(made[0], made[1], made[2], made[3], ends, longest)


@dataclass(frozen=True)
class Batch:
    """Packed rows.

    Attributes:
        input_ids: Token ids `[R, L]` int64.
        position_ids: Positions `[R, L]`, which restart at 0 with each document.
        targets: The next token of the same document, or `IGNORE`, `[R, L]`.
        answers: Whether the target is part of an answer, `[R, L]` bool.
        cu_seq_lens_q: Offsets in the `R L` tokens at which documents begin and end, `[N + 1]` int32.
        max_length_q: Number of tokens in the longest document, or up to 15 more.
        counted: Whether the phase counts each position, `[R, L]` bool; set by `count`.
        weights: How much the phase counts each position, `[R, L]` fp32; set by `count`.
        places: Indices of the counted positions in the `R L` tokens; found on the CPU, so that no GPU is waited for.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    answers: Tensor
    cu_seq_lens_q: Tensor
    max_length_q: int
    counted: Tensor | None = None
    weights: Tensor | None = None
    places: Tensor | None = None

    def count(self, *, answers: bool, after: int, weight: float = 1.0) -> Batch:
        """Return the batch with its counted positions and their weights set; see `Phase`."""
        counted = (self.targets != IGNORE) & (self.position_ids >= after)
        if answers:
            counted &= self.answers
        weights = counted * (1.0 + (weight - 1.0) * self.answers)
        return replace(self, counted=counted, weights=weights, places=counted.flatten().nonzero()[:, 0])

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of a transformers model."""
        names = ("input_ids", "position_ids", "cu_seq_lens_q", "max_length_q")
        return {name: getattr(self, name) for name in names} | {"use_cache": False}

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if hasattr(v, "to")})
