"""Check what a step graph may contain before a runtime parses it: known operators, and no sizes but its own.

Hashes in a manifest show damage, but whoever forges a graph can forge them too. The file is read as protocol buffers.
Only the fields that our graphs use are accepted, and no weights are read. The package onnx is not used, because
importing it takes five times as long. The runtime must check the numbers that operators are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from struct import unpack_from
from typing import Any

from ligerexport.artifact.artifact import Artifact, TensorInfo
from ligerexport.dtypes import BY_ONNX
from ligerexport.errors import ArtifactError

STANDARD = {
    "Abs", "Add", "And", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "Cos", "CumSum", "DequantizeLinear",
    "Div", "Exp", "Expand", "Flatten", "Gather", "GatherElements", "Gelu", "Gemm", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Log", "MatMul", "Max", "Mod", "Mul", "Neg", "Not", "Pad", "Pow",
    "Range", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "Round", "ScatterElements", "Shape",
    "Sigmoid", "Sin", "Slice", "Softmax", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Tanh",
    "Tile", "TopK", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
EARLIER = {"GatherND", "Min", "SimplifiedLayerNormalization"}
OPERATORS = {
    "": STANDARD | EARLIER,
    "com.microsoft": {
        "FusedMatMul", "GatherBlockQuantized", "LinearAttention", "MatMulNBits", "QuickGelu", "RotaryEmbedding",
        "SkipSimplifiedLayerNormalization",
    },
    "ligerexport": {
        "BlockLinear", "BoundedMemory", "GatedUnit", "RaggedMemory", "RaggedMemoryFloat16", "RaggedMemoryInt8",
    },
}  # fmt: skip
"""Operators of every lowering, by domain; those of `EARLIER` are only in graphs that earlier versions wrote."""
SIZED = {"ConstantOfShape", "Expand", "Pad", "Range", "Tile"}
"""Operators whose output size is given by the numbers in an input."""
_ARITHMETIC = {"Add", "Cast", "Concat", "Gather", "Mul", "Reshape", "Squeeze", "Sub", "Unsqueeze"}
MOST = 1 << 24
"""Largest product of the constants of a shape."""
# fields of onnx.proto by their numbers, and the message that each holds
_TEXT: dict[int, str | None] = dict.fromkeys((1, 2))
_MESSAGES: dict[str, dict[int, str | None]] = {
    "model": dict.fromkeys((1, 2, 3, 4, 5, 6)) | {7: "graph", 8: "opset", 14: "pair", 25: "function"},
    "graph": {1: "node", 2: None, 5: "tensor", 10: None, 11: "value", 12: "value", 13: "value"},
    "node": {1: None, 2: None, 3: None, 4: None, 5: "attribute", 6: None, 7: None},
    "attribute": {1: None, 2: None, 3: None, 4: None, 5: "tensor", 7: None, 8: None, 9: None, 13: None, 20: None},
    "tensor": {1: None, 2: None, 8: None, 9: None, 13: "pair", 14: None},
    "value": {1: None, 2: "type", 3: None},
    "type": {1: "tensor type"},
    "tensor type": {1: None, 2: "shape"},
    "shape": {1: "dimension"},
    "dimension": _TEXT,
    "opset": _TEXT,
    "pair": _TEXT,
    "function": {1: None, 4: None, 5: None, 6: None, 7: "node", 8: None, 9: "opset", 10: None},
}

Message = dict[int, list[Any]]


def check_graph(artifact: Artifact) -> None:
    """Check an artifact's graph against its manifest.

    Raises:
        ArtifactError: The graph has something that this package never writes, or does not match the manifest.
    """
    try:
        _check_model(_parse("model", data := artifact.graph.read_bytes(), 0, len(data)), artifact)
    except (ValueError, IndexError, RecursionError) as error:
        raise ArtifactError(
            f"{artifact.graph} is not the graph of its manifest: {error}",
            hint="do not use this artifact; build it again, or copy it from where it was built",
        ) from error


def _parse(kind: str, data: bytes, at: int, end: int) -> Message:
    """Return the values of a message by field number: integers, bytes (text, packed numbers) and messages."""
    known, found = _MESSAGES[kind], dict[int, list[Any]]()
    while at < end:
        key = data[at]
        at += 1
        if key > 127:
            key, at = _varint(data, at - 1)
        field, wire = key >> 3, key & 7
        if field not in known:
            raise ValueError(f"field {field} of a {kind}")
        inner = known[field]
        value: Any = None
        if wire == 2:
            size = data[at]
            at += 1
            if size > 127:
                size, at = _varint(data, at - 1)
            stop = at + size
            if stop > end:
                raise ValueError(f"it ends within a {kind}")
            if inner is None:
                value = data[at:stop]
            else:
                value = _attribute(data[at:stop]) if inner == "attribute" else _parse(inner, data, at, stop)
            at = stop
        elif inner is not None:
            raise ValueError(f"field {field} of a {kind} is not a message")
        elif wire == 0:
            value, at = _varint(data, at)
        elif wire == 5:
            value, at = data[at : at + 4], at + 4
        else:
            raise ValueError(f"wire type {wire}")
        found.setdefault(field, []).append(value)
    if at != end:
        raise ValueError(f"it ends within a {kind}")
    return found


@lru_cache(maxsize=256)
def _attribute(data: bytes) -> Message:
    """Return an attribute, from a cache because most nodes have the same few."""
    return _parse("attribute", data, 0, len(data))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value - (1 << 64) if value >> 63 else value, at
        shift += 7
    raise ValueError("an integer is too long")


def _text(message: Message, field: int) -> str:
    value = message.get(field, [b""])[-1]
    if not isinstance(value, bytes):
        raise ValueError(f"{value} where text was expected")
    return value.decode()


def _check_model(model: Message, artifact: Artifact) -> None:
    versions = [(_text(x, 1), x.get(2, [0])[-1]) for x in model.get(8, ())]
    if len(model.get(7, ())) != 1 or dict(versions).get("") != 21 or len(dict(versions)) != len(versions):
        raise ValueError(f"one graph of opset 21 was expected, there are {versions}")
    if unknown := [x for x in versions if x[0] and (x[0] not in OPERATORS or x[1] != 1)]:
        raise ValueError(f"operators of {unknown}")
    for function in model.get(25, ()):
        if (_text(function, 10), _text(function, 1)) != ("com.microsoft", "LinearAttention"):
            raise ValueError(f"a function {_text(function, 1)}")
        for node in function.get(7, ()):
            _check_node(node, {"": OPERATORS[""]})
    if len(model.get(25, ())) > 1:
        raise ValueError("two functions have one name")
    graph = model[7][0]
    for node in graph.get(1, ()):
        _check_node(node, OPERATORS)
    for tensor in graph.get(5, ()):
        _check_tensor(tensor, artifact)
    promised = artifact.manifest.graph
    for field, what, expected in ((11, "inputs", promised.inputs), (12, "outputs", promised.outputs)):
        if [_face(x) for x in graph.get(field, ())] != [_promise(x) for x in expected]:
            raise ValueError(f"its {what} differ")
    _check_sizes(graph)


def _check_node(node: Message, operators: dict[str, set[str]]) -> None:
    if (kind := _text(node, 4)) not in operators.get(domain := _text(node, 7), ()):
        raise ValueError(f"an operator {domain}::{kind}")
    for attribute in node.get(5, ()):
        for tensor in attribute.get(5, ()):
            _check_tensor(tensor, None)


def _check_tensor(tensor: Message, artifact: Artifact | None) -> None:
    """Check that the numbers of a tensor exist, in the tensor or in the artifact's file of weights."""
    name, dims = _text(tensor, 8), _integers(tensor, 1)
    if min(dims, default=0) < 0 or tensor.get(2, [0])[-1] not in BY_ONNX or len(dims) > 8:
        raise ValueError(f"the tensor {name} is {dims}")
    size = -(-prod(dims) * BY_ONNX[tensor[2][-1]].bits // 8)
    entries = {_text(x, 1): _text(x, 2) for x in tensor.get(13, ())}
    if not entries:
        if tensor.get(14, [0])[-1] or len(tensor.get(9, [b""])[-1]) != size:
            raise ValueError(f"the tensor {name} does not have its {size} bytes")
        return
    if artifact is None or entries.get("location") != artifact.manifest.graph.data:
        raise ValueError(f"the tensor {name} is in {entries.get('location')}")
    offset, length = entries.get("offset", "0"), entries.get("length", "")
    known = set(entries) <= {"location", "offset", "length"} and offset.isdigit() and length == str(size)
    if not known or 9 in tensor or tensor.get(14) != [1] or int(offset) + size > _weight_bytes(artifact):
        raise ValueError(f"the tensor {name} of {size} bytes is at {entries}")


def _weight_bytes(artifact: Artifact) -> int:
    """Return the size of the weights' file, from the manifest unless the artifact is unfinished."""
    name, files = artifact.manifest.graph.data, artifact.manifest.files
    return files[name].bytes if name in files else 0 if files else (artifact.directory / name).stat().st_size


def _integers(message: Message, field: int) -> list[int]:
    """Return the values of a repeated integer, packed or not."""
    found: list[int] = []
    for value in message.get(field, ()):
        if isinstance(value, int):
            found.append(value)
        else:
            at = 0
            while at < len(value):
                number, at = _varint(value, at)
                found.append(number)
    return found


def _face(value: Message) -> tuple[str, str, tuple[int | str, ...]]:
    """Return name, type and shape of an input or output; an axis of any size is text."""
    tensor = value[2][-1].get(1, [{}])[-1] if 2 in value else {}
    dtype, shape = BY_ONNX.get(tensor.get(1, [0])[-1]), tensor.get(2, [{}])[-1]
    return _text(value, 1), dtype.name if dtype else "none", tuple(x[1][-1] if 1 in x else "" for x in shape.get(1, ()))


def _promise(info: TensorInfo) -> tuple[str, str, tuple[int | str, ...]]:
    return info.name, info.dtype, tuple(size if isinstance(size, int) else "" for size in info.shape)


def _check_sizes(graph: Message) -> None:
    """Check the constants that set how much an operator makes from nothing, also through arithmetic on shapes."""
    constants = {_text(x, 8): x[9][-1] for x in graph.get(5, ()) if x[2][-1] == 7 and 9 in x}
    producers: dict[bytes, Message] = {}
    sized = []
    for node in graph.get(1, ()):
        kind = _text(node, 4)
        if kind in _ARITHMETIC:
            producers |= dict.fromkeys(node.get(2, ()), node)
        elif kind in SIZED:
            sized += node.get(1, [])[kind in ("Expand", "Pad", "Tile") :]
    for name in sized:
        numbers = [abs(x) for x in _reached(name, producers, constants) if x]
        if prod(numbers) > MOST:
            raise ValueError(f"a shape with {max(numbers)} elements")


def _reached(name: bytes, producers: dict[bytes, Message], constants: dict[str, bytes]) -> Iterator[int]:
    """Yield the constants that a value is computed from, each once."""
    seen, left = set[bytes](), [name]
    while left:
        value = left.pop()
        if value in seen:
            continue
        seen.add(value)
        if raw := constants.get(value.decode()):
            yield from unpack_from(f"<{len(raw) // 8}q", raw)
        elif value in producers:
            left += producers[value].get(1, ())
