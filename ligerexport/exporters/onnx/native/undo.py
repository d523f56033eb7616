"""Memory that a session lends the operators for what a draft overwrites; see `undo.h`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ligerexport.artifact.artifact import StateTensor
from ligerexport.errors import LigerError
from ligerexport.exporters.onnx.native import take_back

PARTS = "slot_key", "slot_value", "slot_key_scale", "slot_value_scale", "slot_position", "slot_score"
"""Tensors of a layer's state, in the order of `Undo::Part`."""
_RECORD, _CHANGE = 256, 16
"""Bytes of an `Undo`, at least, and of a `Change`."""


class Undo:
    """The records of all layers and rows of a session.

    Args:
        state: The session's state, which keeps its place in memory.
        layers: Number of layers.
        heads: H_kv.
        tokens: Largest number of tokens of a draft.

    Attributes:
        memory: `[layers, bytes]` uint8, an input of the graph.
        kept: `[B]` int64, see `take_back`.
    """

    def __init__(self, state: Mapping[StateTensor, np.ndarray], layers: int, heads: int, tokens: int) -> None:
        self._take_back = take_back()
        self._ranges = np.zeros((layers, len(PARTS), 2), np.int64)
        rows = np.zeros(layers, np.int64)
        for tensor, array in state.items():
            _, layer, name = tensor.past.split(".")
            first = array.ctypes.data
            self._ranges[int(layer), PARTS.index(name)] = first, first + array.nbytes
            rows[int(layer)] += array.itemsize * (1 if array.ndim == 2 else array.shape[1 if name == PARTS[-1] else 2])
        batch = next(iter(state.values())).shape[0]
        record = _RECORD + tokens * (_CHANGE + 2 * (int(rows.max()) // 8 * 8 + 16))
        self.memory = np.zeros((layers, batch * heads * record), np.uint8)
        self.kept = np.zeros(batch, np.int64)
        counts = layers, self.memory.shape[1], batch, heads
        self._call = self.memory.ctypes.data, *counts, self.kept.ctypes.data, self._ranges.ctypes.data

    def take_back(self) -> None:
        """Keep the first `kept` tokens of the last call of each row.

        Raises:
            LigerError: The operators did not work on this state.
        """
        if self._take_back(*self._call):
            raise LigerError(
                "the graph does not update the state in the place that it was given",
                hint="do not use this artifact; build it again, or copy it from where it was built",
            )
