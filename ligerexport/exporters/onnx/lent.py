"""Constants of a graph that a session takes for inputs: they hold what only some calls want.

A graph as it is in its file has no such inputs, so other programs need not know of them. Protocol buffers merge what is
appended to a message, so a few bytes after a model add inputs to its graph; an input with the name of a constant may be
given, and has the constant's value if it is not.
"""

from __future__ import annotations

from ligerexport.dtypes import DTYPES

KEEP = "keep"
"""Says which tokens of a call get logits, by their numbers: the last one of each sequence."""
UNDO = "undo"
"""Lends memory to the operators of `native` for what a call overwrites; see `native/undo.py`."""
LENT: dict[str, tuple[str, tuple[str, ...]]] = {KEEP: ("int64", ("K",)), UNDO: ("uint8", ("L", "U"))}
"""Type and axes of each such constant."""
_GRAPH, _INPUT, _CONSTANT_NAME = 7, 11, 8


def lent(graph: bytes) -> tuple[str, ...]:
    """Return which constants of `LENT` a graph has; those of earlier versions have none."""
    return tuple(name for name in LENT if _field(_CONSTANT_NAME, name.encode()) in graph)


def with_inputs(graph: bytes) -> bytes:
    """Return a graph whose constants of `LENT` are inputs too."""
    return graph + b"".join(_field(_GRAPH, _field(_INPUT, _value(name))) for name in lent(graph))


def _value(name: str) -> bytes:
    """Return an `onnx.ValueInfoProto`."""
    dtype, axes = LENT[name]
    shape = b"".join(_field(1, _field(2, axis.encode())) for axis in axes)
    return _field(1, name.encode()) + _field(2, _field(1, bytes([8, DTYPES[dtype].onnx]) + _field(2, shape)))


def _field(number: int, data: bytes) -> bytes:
    """Return a field of fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(data)]) + data
