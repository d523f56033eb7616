"""A state as what differs from another one: a chat changes few slots of the memory that it began with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import numpy as np

from ligerexport.artifact.snapshot import Snapshot

MOST = 0.5
"""Largest size of a difference, as a share of the state's."""


@dataclass(frozen=True)
class Delta:
    """What makes a state from another one.

    Attributes:
        base: The other state, whole.
        rest: The state without its tensors.
        changed: For each tensor, a bit for each of its rows `[ceil(R / 8)]` uint8, and those that differ `[N, W]`, in
            unsigned integers.
    """

    base: Snapshot
    rest: Snapshot
    changed: dict[str, tuple[np.ndarray, np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes in addition to the other state."""
        return self.rest.nbytes + sum(bits.nbytes + rows.nbytes for bits, rows in self.changed.values())

    def whole(self) -> Snapshot:
        """Return the state."""
        tensors = {name: tensor.copy() for name, tensor in self.base.tensors.items()}
        for name, (bits, rows) in self.changed.items():
            found = _rows(tensors[name])
            found[np.unpackbits(bits, count=len(found)).view(bool)] = rows
        return replace(self.rest, tensors=tensors)


def difference(state: Snapshot, base: Snapshot) -> Delta | None:
    """Return a state as a difference from another one; None if that would not be much smaller."""
    limit, size, changed = MOST * state.nbytes, 0, {}
    for name, tensor in state.tensors.items():
        other = base.tensors.get(name)
        if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
            return None
        rows = _rows(tensor)
        differ = (rows != _rows(other)).any(-1)
        changed[name] = np.packbits(differ), rows.compress(differ, axis=0)
        size += changed[name][0].nbytes + changed[name][1].nbytes
        if size > limit:
            return None
    return Delta(base, replace(state, tensors={}), changed)


def _rows(tensor: np.ndarray) -> np.ndarray:
    """Return the bits of a contiguous tensor in rows `[R, W]`: vectors of slots if it has many, otherwise numbers."""
    last = tensor.shape[-1]
    width = tensor.itemsize * (last if tensor.size > last * last else 1)
    unit = gcd(width, 8)
    return tensor.reshape(-1).view(f"u{unit}").reshape(-1, width // unit)
