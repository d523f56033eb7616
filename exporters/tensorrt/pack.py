"""The kernel pack `kernels.liger`: cubins of several compute capabilities and plans, as the TensorRT plugin reads them.

Little-endian: `MAGIC`, kernels, plans, blobs, and the CRC-32 of all before; `plugin/pack.cc` is the reader. Strings and
lists have their length in front, and expressions are in postfix.
"""

from __future__ import annotations

import ast
import struct
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from ligerexport.errors import LigerError
from ligerexport.kernels.aot import compile_kernels
from ligerexport.kernels.linear import LinearSpec
from ligerexport.kernels.manifest import HIDDEN, Buffer, Kernel, Launch, Manifest, Plan
from ligerexport.kernels.plans import layer_digest
from ligerexport.state import MixerSpec

PACK = "kernels.liger"
MAGIC = b"LIGERPK2"
OPERATORS = ("step", "prefill")  # of a mixer
TYPES = ("*", "i32", "i64", "fp32")
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4, "i32": 4, "i64": 8}
ROLES = ("input", "output", "state", "scratch", "persistent", "table")
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
    """Compile what layers launch, without a GPU, and write it as one file; the same arguments give the same bytes.

    Args:
        specs: The layers; equal ones are packed once.
        path: File to write.
        products: Products with weights, each with the dtype of its weight; likewise.
        sms: Compute capabilities, 90 for 9.0.
        dtype: Of activations: `bf16`, `fp16` or `fp32`.
        max_batch: Largest batch of a step.
        jobs: Processes; None for one a core.

    Returns:
        What was packed.

    Raises:
        MissingDependency: No Triton.
        UsageError: An unknown compute capability or dtype, or a layer whose evicted tokens feed the recurrence.
        LigerError: A kernel does not compile.
    """
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "kernels"
        layers, products = list(dict.fromkeys(specs)), list(dict.fromkeys(products))
        made = compile_kernels(layers, dtype, sms, place, operators=OPERATORS, products=products, max_batch=max_batch,
                               jobs=jobs)  # fmt: skip
        Path(path).write_bytes(_encode(made, place))
    return made


def _encode(manifest: Manifest, place: Path) -> bytes:
    contents = {cubin.sha256: place / cubin.file for x in manifest.kernels.values() for cubin in x.cubins.values()}
    blobs = {digest: i for i, digest in enumerate(contents)}
    names = {name: i for i, name in enumerate(manifest.kernels)}
    body = MAGIC
    body += _list(_kernel(x, blobs) for x in manifest.kernels.values())
    body += _list(_plan(x, names) for x in manifest.plans)
    body += _list(struct.pack("<Q", len(content := file.read_bytes())) + content for file in contents.values())
    return body + struct.pack("<I", zlib.crc32(body))


def _kernel(kernel: Kernel, blobs: dict[str, int]) -> bytes:
    cubins = []
    for sm, x in kernel.cubins.items():
        if x.global_scratch or x.profile_scratch:
            raise LigerError(f"kernel '{kernel.name}' for sm_{sm} needs scratch that no plan describes")
        cubins.append(struct.pack("<IIII", int(sm), x.threads, x.shared, blobs[x.sha256]) + _text(x.symbol))
    kinds = [("*" if x.type[0] == "*" else x.type, x.divisible) for x in kernel.arguments]
    kinds += [("*", 1)] * len(HIDDEN)
    arguments = _list(struct.pack("<BB", TYPES.index(kind), divisible) for kind, divisible in kinds)
    overlaps = bool(kernel.constants.get("OVERLAP"))
    return struct.pack("<IB", len(HIDDEN), overlaps) + arguments + _list(cubins)


def _plan(plan: Plan, kernels: dict[str, int]) -> bytes:
    axes = {name: i for i, name in enumerate((*(x for x in plan.axes if x not in plan.derived), *plan.derived))}
    buffers = {name: i for i, name in enumerate(plan.buffers)}
    body = _text(layer_digest(plan.spec)) + _text(plan.operator) + _text(plan.dtype)
    body += _list(struct.pack("<I", sm) for sm in plan.sms)
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
    head = struct.pack("<BBBB", ROLES.index(buffer.role), WIDTHS[buffer.type], zero, table)
    return _text(name) + head + _list(_expression(x, axes) for x in buffer.shape)


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
