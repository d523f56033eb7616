"""The kernel pack `kernels.liger`: cubins of several compute capabilities and plans, as the TensorRT plugin reads them.

The file is little-endian: `MAGIC`, kernels, plans, blobs, and the CRC-32 of all bytes before; `plugin/pack.cc` reads
it. The length of a string or list comes before it, and expressions are in postfix.
"""

from __future__ import annotations

import ast
import struct
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from ligerexport.dtypes import BY_KERNEL
from ligerexport.errors import LigerError
from ligerexport.kernels.aot import compile_kernels
from ligerexport.kernels.launch_manifest import HIDDEN, Buffer, Kernel, Launch, Manifest, Plan
from ligerexport.kernels.linear import LinearSpec
from ligerexport.kernels.plans import layer_digest
from ligerexport.kernels.tuning import FORWARD
from ligerexport.model.state import MixerSpec

PACK = "kernels.liger"
MAGIC = b"LIGERPK2"
OPERATORS = ("step", "prefill")  # the two operators of a mixer
PTX = 1 << 16
"""Added to a compute capability: also store text for it and all later ones, which the driver compiles."""
TYPES = ("*", "i32", "i64", "fp32")
ROLES = ("input", "output", "state", "scratch", "persistent", "table", "constant")
TABLES = ("segments", "chunks", "offsets")
OPERATIONS = (ast.Add, ast.Sub, ast.Mult)


def write_pack(
    specs: Iterable[MixerSpec],
    path: Path | str,
    *,
    products: Iterable[tuple[LinearSpec, str]] = (),
    sms: Sequence[int] = (90,),
    dtype: str = "fp16",
    max_batch: int = 64,
    jobs: int | None = None,
) -> Manifest:
    """Compile the kernels of layers, without a GPU, and write them as one file; equal arguments give equal bytes.

    Args:
        specs: The layers; equal layers are packed once.
        path: File to write.
        products: Products with weights, each with the dtype of its weight; equal products are packed once.
        sms: Compute capabilities, 90 for 9.0. With `FORWARD` among them there is PTX for every later GPU.
        dtype: Type of activations: `bf16`, `fp16` or `fp32`.
        max_batch: Largest batch of a step.
        jobs: Number of processes; None takes one per core.

    Returns:
        The manifest of the compiled kernels.
    """
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "kernels"
        layers, products = list(dict.fromkeys(specs)), list(dict.fromkeys(products))
        made = compile_kernels(layers, dtype, sms, place, operators=OPERATORS, products=products, max_batch=max_batch,
                               ptx=True, jobs=jobs)  # fmt: skip
        Path(path).write_bytes(_encode(made, place))
    return made


def _encode(manifest: Manifest, place: Path) -> bytes:
    cubins = [cubin for x in manifest.kernels.values() for cubin in x.cubins.values()]
    code = {x.file: (place / x.file).read_bytes() for x in cubins}
    code |= {x.ptx: (place / x.ptx).read_bytes() + b"\0" for x in cubins if x.ptx}  # the driver reads up to the zero
    contents = list(dict.fromkeys(code.values()))
    blobs = {file: contents.index(content) for file, content in code.items()}
    names = {name: i for i, name in enumerate(manifest.kernels)}
    body = MAGIC
    body += _list(_kernel(x, blobs) for x in manifest.kernels.values())
    body += _list(_plan(x, names) for x in manifest.plans)
    body += _list(struct.pack("<Q", len(content)) + content for content in contents)
    return body + struct.pack("<I", zlib.crc32(body))


def _kernel(kernel: Kernel, blobs: dict[str, int]) -> bytes:
    cubins = []
    for sm, x in kernel.cubins.items():
        if x.global_scratch or x.profile_scratch:
            raise LigerError(f"kernel '{kernel.name}' for sm_{sm} needs scratch that no plan describes")
        files = [(int(sm), x.file), *([(PTX | int(sm), x.ptx)] if x.ptx else [])]
        cubins += [struct.pack("<IIII", n, x.threads, x.shared, blobs[file]) + _text(x.symbol) for n, file in files]
    kinds = [("*" if x.type[0] == "*" else x.type, x.divisible) for x in kernel.arguments]
    kinds += [("*", 1)] * len(HIDDEN)
    arguments = _list(struct.pack("<BB", TYPES.index(kind), divisible) for kind, divisible in kinds)
    overlaps = bool(kernel.constants.get("OVERLAP"))
    return struct.pack("<IB", len(HIDDEN), overlaps) + arguments + _list(cubins)


def _plan(plan: Plan, kernels: dict[str, int]) -> bytes:
    axes = {name: i for i, name in enumerate((*(x for x in plan.axes if x not in plan.derived), *plan.derived))}
    buffers = {name: i for i, name in enumerate(plan.buffers)}
    body = _text(layer_digest(plan.spec)) + _text(plan.operator) + _text(plan.dtype)
    body += _list(struct.pack("<I", sm) for sm in (*plan.sms, *(PTX | sm for sm in plan.sms if sm == FORWARD)))
    body += _list(_text(name) for name in axes if name not in plan.derived)
    body += _list(_text(name) + _expression(text, axes) for name, text in plan.derived.items())
    body += _list(
        struct.pack("<Iqq", axes[name], low, (1 << 62) if high is None else high)
        for name, (low, high) in plan.ranges.items()
    )
    body += _list(_buffer(name, x, axes) for name, x in plan.buffers.items())
    return body + _list(_launch(x, kernels, buffers, axes) for x in plan.launches)


def _buffer(name: str, buffer: Buffer, axes: dict[str, int]) -> bytes:
    zero = buffer.fill.startswith("zero")
    table = 1 + TABLES.index(name) if buffer.role == "table" else 0
    head = struct.pack("<BBBB", ROLES.index(buffer.role), BY_KERNEL[buffer.type].nbytes, zero, table)
    body = _text(name) + head + _list(_expression(x, axes) for x in buffer.shape)
    if buffer.role != "constant":
        return body
    return body + _list(struct.pack("<i", int(word)) for word in buffer.fill.split())


def _launch(launch: Launch, kernels: dict[str, int], buffers: dict[str, int], axes: dict[str, int]) -> bytes:
    values = []
    for x in launch.values:
        if x.buffer is not None and x.offset is not None:
            values.append(struct.pack("<BI", 0, buffers[x.buffer]) + _expression(x.offset, axes))
        elif x.integer is not None:
            values.append(struct.pack("<B", 1) + _expression(x.integer, axes))
        else:
            values.append(struct.pack("<Bf", 2, x.number))
    grid = b"".join(_expression(x, axes) for x in launch.grid)
    return struct.pack("<I", kernels[launch.kernel]) + grid + _list(values)


def _expression(text: str, axes: dict[str, int]) -> bytes:
    """Encode an expression of `launches.evaluate`: numbers, axes, + - * and cdiv, operands first."""

    def visit(node: ast.expr) -> list[bytes]:
        match node:
            case ast.Constant(value=int(number)):
                return [struct.pack("<Bq", 0, number)]
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
                return [struct.pack("<Bq", 0, -number)]
            case ast.Name(id=name):
                return [struct.pack("<Bq", 1, axes[name])]
            case ast.BinOp(left=left, op=op, right=right):
                return [*visit(left), *visit(right), struct.pack("<Bq", 2 + OPERATIONS.index(type(op)), 0)]
            case ast.Call(func=ast.Name(id="cdiv"), args=[a, b]):
                return [*visit(a), *visit(b), struct.pack("<Bq", 5, 0)]
        raise LigerError(f"'{ast.unparse(node)}' cannot be packed")

    return _list(visit(ast.parse(text, mode="eval").body))


def _text(text: str) -> bytes:
    return struct.pack("<I", len(text.encode())) + text.encode()


def _list(items: Iterable[bytes]) -> bytes:
    made = list(items)
    return struct.pack("<I", len(made)) + b"".join(made)
