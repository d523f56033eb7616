"""Seeded mutations of file contents: bytes, JSON, safetensors, ONNX graphs, chat templates. No file is opened here."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

OUTSIDE = "../outside/secret.bin"
MARK = "HOSTILE_PAYLOAD"
PAYLOAD = f"__import__('os').system('touch {MARK}')"
"""Code that no input may run; compiling any text with the mark in it is a finding."""
DEEP = "@deep@"
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    255,
    2**31 - 1,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    10**30,
    -(2**63),
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "x" * 5000,
    "B",
    "float32",
    OUTSIDE,
    "/etc/hostname",
    "..",
    "\x1b[31mred\nline\x00",
    "\ud800",
    PAYLOAD,
    [],
    [[]],
    {},
    [1, 2, 3],
    {"x": 1},
    [None],
    DEEP,
)
NUMBERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 16, 255, 4097, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)


def damage(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat or overwrite bytes, in one to eight places."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at = rng.randrange(len(made) + 1)
        match rng.randrange(6):
            case 0 if at < len(made):
                made[at] ^= 1 << rng.randrange(8)
            case 1 if rng.random() < 0.3:
                del made[at:]
            case 2:
                del made[at : at + rng.randrange(1, 9)]
            case 3:
                made[at:at] = rng.choice(
                    (b"\x00", b"\xff" * 9, b"[", b"{", b'"', b"\x80" * 12 + b"\x01", b"-1", b"e9999")
                )
            case 4:
                made[at:at] = made[max(0, at - rng.randrange(1, 64)) : at]
            case _ if at + 8 <= len(made):
                made[at : at + 8] = rng.choice((b"\xff" * 8, b"\x00" * 8, struct.pack("<Q", rng.getrandbits(62))))
    return bytes(made)


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return every container with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        _places(value[key], found)
    return found


def mutate_value(value: Any, rng: random.Random, keys: dict[str, Any] | None = None) -> Any:
    """Change JSON in place: values, keys, lists; `keys` are further ones to add at the top."""
    made = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        places = _places(made, [])
        if not places or rng.random() < 0.01:
            return rng.choice(VALUES)
        if keys and isinstance(made, dict) and rng.random() < 0.3:
            name = rng.choice(list(keys))
            made[name] = keys[name]
            continue
        # choose shallow places first; otherwise most changes would be in the longest list
        holder, key = rng.choice(places[:60] if rng.random() < 0.5 else places)
        old = holder[key]
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice((f"{key}x", "", OUTSIDE, "/etc/hostname", "a\nb", "__class__"))] = holder.pop(key)
            case 2:
                holder[key] = [old] * rng.choice((0, 2, 3))
            case 3:
                other, name = rng.choice(places)
                holder[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else None)
            case 4 if isinstance(old, int | float):
                holder[key] = rng.choice((old + 1, old - 1, -old, old * 2, old * 10**6, rng.choice(NUMBERS), str(old)))
            case 5 if isinstance(old, str):
                holder[key] = rng.choice((old + "x", old[:-1], old * 40, "../" + old, old.upper()))
            case _:
                holder[key] = rng.choice(VALUES)
    return made


def to_json(value: Any) -> bytes:
    """Return JSON, with `DEEP` as nested lists."""
    text = json.dumps(value).replace(json.dumps(DEEP), "[" * 30000 + "]" * 30000)
    return text.encode()


def mutate_json(data: bytes, rng: random.Random, keys: dict[str, Any] | None = None) -> bytes:
    """Change a JSON file, usually its values and sometimes its bytes."""
    if rng.random() < 0.15:
        return damage(data, rng)
    return to_json(mutate_value(json.loads(data), rng, keys))


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change a safetensors file: its header, the header's length, or the numbers."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(5):
        case 0:
            return (
                struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))) + header + body
            )
        case 1:
            return damage(data[: 8 + length], rng) + body
        case 2:
            return data[: 8 + length] + damage(body, rng)
        case _:
            made = mutate_json(header, rng, {"__metadata__": rng.choice(({"a": 1}, [], {"format": "pt"}))})
            return struct.pack("<Q", len(made)) + made + body


def mutate_tensors(tensors: dict[str, np.ndarray], rng: random.Random) -> dict[str, np.ndarray]:
    """Change arrays: names, types, shapes, numbers."""
    made = dict(tensors)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(made) or ["x"])
        array = made.pop(name, np.zeros(1, np.float32))
        match rng.randrange(7):
            case 0:
                continue
            case 1:
                name = rng.choice((name + "x", "position", "ids", OUTSIDE))
            case 2:
                array = array.astype(rng.choice(("float64", "float16", "int32", "uint8", "int64", "float32", "bool")))
            case 3:
                array = array.reshape(-1) if rng.random() < 0.5 else array[..., None]
            case 4:
                array = np.concatenate([array.reshape(-1)] * 2)
            case 5:
                array = np.full_like(array, rng.choice((0, 1, -1, 3, 100)))
            case _:
                extreme = NUMBERS if array.dtype.kind == "i" else (np.nan, np.inf, -np.inf, 1e38, -1e38, 0.0)
                array = array.copy()
                if array.size:
                    bits = np.array([rng.choice(extreme)]).astype(array.dtype)[0]
                    array.reshape(-1)[rng.randrange(array.size) if rng.random() < 0.6 else slice(None)] = bits
        made[name] = array
    return made


def mutate_graph(data: bytes, rng: random.Random) -> bytes:
    """Change an ONNX graph, usually its structure and sometimes its bytes."""
    if rng.random() < 0.3:
        return damage(data, rng)
    model = onnx.load_from_string(data)
    for _ in range(rng.choice((1, 1, 1, 2))):
        rng.choice(_GRAPH)(model, rng)
    return model.SerializeToString()


def _location(model: Any, rng: random.Random) -> None:
    tensors = [x for x in model.graph.initializer if x.external_data]
    entries = rng.choice(tensors).external_data if tensors else ()
    for entry in entries:
        if entry.key == "location" and rng.random() < 0.6:
            entry.value = rng.choice(
                (
                    OUTSIDE,
                    "/etc/hostname",
                    "",
                    ".",
                    "link.bin",
                    "./../outside/secret.bin",
                    "a\x00b",
                    "manifest.json",
                    "x" * 5000,
                    "sub/../../outside/secret.bin",
                )
            )
        elif entry.key != "location" and rng.random() < 0.6:
            entry.value = rng.choice((str(rng.choice(NUMBERS)), "", "x", "1e9", str(int(entry.value) + 64)))


def _tensor(model: Any, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    match rng.randrange(5):
        case 0 if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
        case 1:
            tensor.dims.extend([rng.choice((1, 2, 2**40))] * rng.choice((1, 8, 70)))
        case 2:
            tensor.data_type = rng.choice((0, 1, 2, 6, 7, 8, 10, 11, 16, 21, 22, 99))
        case 3:
            tensor.raw_data = b"\x01" * rng.choice((0, 3, 8, 4096))
        case _:
            tensor.data_location = 1 - tensor.data_location


def _constant(model: Any, rng: random.Random) -> None:
    """Change a number that is part of a shape."""
    found = [x for x in model.graph.initializer if x.data_type == TensorProto.INT64 and len(x.raw_data) >= 8]
    if found:
        tensor = rng.choice(found)
        values = np.frombuffer(tensor.raw_data, np.int64).copy()
        values[rng.randrange(len(values))] = rng.choice(NUMBERS)
        tensor.raw_data = values.tobytes()


def _node(model: Any, rng: random.Random) -> None:
    nodes = model.graph.node
    node = rng.choice(nodes)
    match rng.randrange(8):
        case 0:
            node.op_type = rng.choice(
                (
                    "Loop",
                    "If",
                    "Scan",
                    "Tile",
                    "Expand",
                    "RandomNormal",
                    "Identity",
                    "Pad",
                    "Gather",
                    "ConstantOfShape",
                    "Resize",
                    "Nope",
                    "LinearAttention",
                    "StringConcat",
                )
            )
        case 1:
            node.domain = rng.choice(("", "com.microsoft", "ligerexport", "ai.onnx.ml", "com.microsoft.nchwc", "evil"))
        case 2 if node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice([*rng.choice(nodes).output, "", "nowhere"])
        case 3:
            del (node.input if rng.random() < 0.5 else node.output)[:1]
        case 4:
            nodes.append(copy.deepcopy(node))
        case 5:
            nodes.remove(node)
        case 6:
            other = rng.choice(nodes)
            node.input[:], other.input[:] = list(other.input), list(node.input)
        case _:
            node.input.extend([rng.choice(nodes).output[0]] * rng.choice((1, 40))) if nodes[0].output else None


def _attribute(model: Any, rng: random.Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes:
        return
    node = rng.choice(nodes)
    attribute = rng.choice(node.attribute)
    match rng.randrange(6):
        case 0 | 1 | 2:
            attribute.i = rng.choice(NUMBERS)
            if attribute.ints:
                attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
        case 3:
            attribute.f = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38))
        case 4:
            node.attribute.remove(attribute)
        case _:
            attribute.type = rng.choice((1, 2, 3, 4, 5, 6, 7))


def _body(name: str) -> Any:
    """Return the body of a loop that never ends."""
    value = helper.make_tensor_value_info
    inputs = [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, [])]
    return helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"])], name, inputs, [value("on", TensorProto.BOOL, [])]
    )


def _control(model: Any, rng: random.Random) -> None:
    true = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    model.graph.initializer.append(true)
    model.graph.node.append(helper.make_node("Loop", ["", "yes"], [], body=_body("forever")))


def _function(model: Any, rng: random.Random) -> None:
    """Add functions that call themselves or each other, with exponential growth, or that replace a usual operator."""
    opset = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    make = helper.make_function
    match rng.randrange(4):
        case 0:
            model.functions.append(
                make("local", "F0", ["x"], ["y"], [helper.make_node("F0", ["x"], ["y"], domain="local")], opset)
            )
        case 1:
            for i in range(26):  # 2 ** 26 nodes
                body = [
                    helper.make_node(f"F{i + 1}", ["x"], ["z"], domain="local"),
                    helper.make_node(f"F{i + 1}", ["z"], ["y"], domain="local"),
                ]
                model.functions.append(make("local", f"F{i}", ["x"], ["y"], body, opset))
            model.functions.append(make("local", "F26", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], opset))
        case 2:
            model.functions.append(
                make(
                    "",
                    rng.choice(("Add", "Reshape")),
                    ["x", "w"],
                    ["y"],
                    [helper.make_node("Identity", ["x"], ["y"])],
                    opset[:1],
                )
            )
            return
        case _:
            for function in model.functions:
                function.node.append(
                    helper.make_node("LinearAttention", list(function.input), ["q", "r"], domain="com.microsoft")
                )
            return
    model.opset_import.append(opset[1])
    first = model.graph.node[0]
    if first.input and first.output:
        model.graph.node.insert(0, helper.make_node("F0", [first.input[0]], ["called"], domain="local"))


def _header(model: Any, rng: random.Random) -> None:
    match rng.randrange(5):
        case 0:
            model.ir_version = rng.choice((0, 1, 3, 11, 99, 2**40))
        case 1:
            rng.choice(model.opset_import).version = rng.choice((0, 1, 7, 22, 99, 2**40, -1))
        case 2:
            model.opset_import.append(
                helper.make_opsetid(rng.choice(("", "evil", "ai.onnx.ml")), rng.choice((1, 21, 99)))
            )
        case 3:
            del model.opset_import[:1]
        case _:
            entry = model.metadata_props.add()
            entry.key, entry.value = "ort.something", "x" * 100


def _face(model: Any, rng: random.Random) -> None:
    """Change an input or an output."""
    values = rng.choice((model.graph.input, model.graph.output))
    value = rng.choice(values)
    dims = value.type.tensor_type.shape.dim
    match rng.randrange(6):
        case 0 | 1 if dims:
            rng.choice(dims).dim_value = rng.choice(NUMBERS)
        case 2:
            value.type.tensor_type.elem_type = rng.choice((0, 1, 2, 7, 8, 10, 99))
        case 3:
            value.name = rng.choice(("", "x", "position", "logits"))
        case 4:
            values.remove(value)
        case _:
            values.append(copy.deepcopy(value))


def _bomb(model: Any, rng: random.Random) -> None:
    """Add operators that make huge tensors that are not stored in a file."""
    size = rng.choice((2**20, 2**33, 2**40))
    model.graph.initializer.extend(
        [
            helper.make_tensor("many", TensorProto.INT64, [2], [size, 64]),
            helper.make_tensor("one", TensorProto.FLOAT, [1, 1], [1.0]),
        ]
    )
    kind = rng.choice(("ConstantOfShape", "Expand", "Tile"))
    model.graph.node.append(
        helper.make_node(kind, ["many"] if kind == "ConstantOfShape" else ["one", "many"], ["bomb"])
    )
    model.graph.node.append(helper.make_node("ReduceSum", ["bomb"], ["boom"]))


_GRAPH: tuple[Callable[[Any, random.Random], None], ...] = (
    _location,
    _location,
    _tensor,
    _tensor,
    _constant,
    _constant,
    _node,
    _node,
    _node,
    _attribute,
    _attribute,
    _control,
    _function,
    _header,
    _face,
    _face,
    _bomb,
)
