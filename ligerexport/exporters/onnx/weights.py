"""The data file of a graph: which tensors hold the weights, where they are, and how they are written and read.

Weights keep their names and the checkpoint's orientation `[out, in]`, except quantised weights that a lowering wants
transposed. Maps of one input are adjacent; a tied embedding is stored once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from safetensors import safe_open

from ligerexport.checkpoint.checkpoint import not_finite
from ligerexport.dtypes import DTYPES
from ligerexport.errors import UsageError
from ligerexport.exporters.onnx.lora import JOINT as JOINT
from ligerexport.exporters.onnx.quantise import (
    MIDDLE,
    Blocks,
    Moments,
    dequantise,
    pack,
    quantise,
    quantise_rows,
    requantise,
    unpack,
)
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.targets import BLOCK, WEIGHTS, Precision

DATA_FILE = "model.onnx.data"
ALIGNMENT = 4096
"""Alignment in bytes: a page, so that a runtime can map a weight instead of copying it."""
SUFFIXES = ("", "_scale", "_zero_point")
"""Suffixes of the names of the three tensors of a quantised matrix."""
_MLP = re.compile(r"layers\.(\d+)\.mlp\.(\w+)_proj")
_JOINT_OF = {f"{n.partition('.')[0]}.{kind}_proj": n for n, kinds in JOINT.items() for kind in kinds}
_KINDS = [kind for kinds in JOINT.values() for kind in kinds]
ROW_ERROR = 0.15
"""Largest error of a row of codes with one scale; a large element costs the others more than in a block."""
WIDE = 128
"""Largest block that `BlockLinear` reads."""
SLAB = 1 << 24
"""Number of elements that are read at a time."""


@dataclass(frozen=True)
class WeightStorage:
    """How weights are stored.

    Attributes:
        precision: Row of `WEIGHTS`.
        block: Number of elements of a row that share a scale and a zero point, for precisions with blocks.
        transposed: Whether quantised matrices are stored as `[in, out]`, for `DequantizeLinear` before a product that
            runtimes fuse; otherwise they are stored as ONNX Runtime's `MatMulNBits` reads them.
        by_row: Whether a row of a quantised matrix is one block for the TensorRT plugin, with `MIDDLE` as its zero
            point, which is not stored. Four codes of 8 bits are one int32, because TensorRT before 10 has no integers
            of 8 bits.
    """

    precision: Precision = WEIGHTS["fp32"]
    block: int = BLOCK
    transposed: bool = False
    by_row: bool = False

    @property
    def activation(self) -> ir.DataType:
        """Type of the inputs and outputs of products that run in the type of their weights, or of codes by row."""
        if self.by_row and self.precision.blocked:
            return ir.DataType.FLOAT16
        dtype = DTYPES[self.precision.dtype]
        return ir.DataType(dtype.onnx) if dtype.half else ir.DataType.FLOAT

    @property
    def shared(self) -> int | None:
        """Elements that share a scale as manifests have it; None without blocks, or if each row is one."""
        return self.block if self.precision.blocked and not self.by_row else None

    @property
    def error(self) -> float:
        """The same as `Precision.error`, or `ROW_ERROR` for codes by row."""
        return ROW_ERROR if self.by_row and self.precision.blocked else self.precision.error

    def bits(self, spec: ModelSpec, name: str) -> int:
        """Return the bits of an element of a weight; 32 for vectors and for learned scores.

        `int4` stores with 8 bits what would lose most: embedding and output; query, key and value of the attention, of
        which queries and keys decide which tokens keep a slot; the whole MLP in the first eighth of the layers and in
        the last one; and `down_proj` in the layers that ONNX Runtime's model builder (`k_quant_mixed`) and llama.cpp
        (`Q4_K_M`) choose: the first, the last and every third between. Maps that are one product have the same bits.
        """
        if len(spec.weights[name].shape) != 2 or "score_proj" in name:
            return 32
        if not self.precision.mixed:
            return self.precision.bits
        if not (place := _MLP.search(name)):
            return self.precision.bits if "o_proj" in name else 8
        layer, layers = int(place[1]), len(spec.mixers)
        eighth = layers // 8
        whole = layer < eighth or (eighth > 0 and layer == layers - 1)
        often = layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        return 8 if whole or (often and place[2] == "down") else self.precision.bits

    def block_of(self, spec: ModelSpec, name: str) -> int:
        """Return the elements of a block of a matrix.

        For 8 bits among matrices of 4 bits they are twice as many, or `WIDE` if rows have a multiple of it.
        """
        if self.by_row:
            return spec.weights[name].shape[1]
        if not self.precision.mixed or self.bits(spec, name) != 8:
            return self.block
        widest = max(2 * self.block, WIDE)
        return 2 * self.block if spec.weights[name].shape[1] % widest else widest


FP32 = WeightStorage()


class Part(NamedTuple):
    """A tensor of the data file: offset in bytes, type and shape."""

    offset: int
    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, which stores two 4-bit codes in a byte."""
        return -(-prod(self.shape) * self.dtype.bitwidth // 8)


def data_layout(spec: ModelSpec, storage: WeightStorage = FP32) -> dict[str, Part]:
    """Return every tensor of `DATA_FILE` by name, shard after shard, on page boundaries.

    A quantised weight has three tensors: codes under its own name, `NAME_scale` and `NAME_zero_point`. Where rows are
    stored one after the other, maps of one input are adjacent and also appear as one tensor, by its name in `JOINT`.
    """
    groups: dict[str, list[str]] = {}
    for name in spec.used:
        place = re.search(r"(self_attn|mlp)\.\w+_proj", name)
        kind = place[0] if place and not storage.transposed else ""
        groups.setdefault(name.replace(kind, _JOINT_OF.get(kind, kind)), []).append(name)
    layout, end = {}, 0
    for joint, names in groups.items():
        names.sort(key=lambda name: [f".{kind}_proj" in name for kind in _KINDS], reverse=True)
        parts = {name: _parts(spec, name, storage) for name in names}
        for suffix, (dtype, (_, *shape)) in parts[names[0]].items():
            start = end
            for name in names:
                part = layout[name + suffix] = Part(end, *parts[name][suffix])
                end += part.nbytes
            rows = sum(layout[name + suffix].shape[0] for name in names)
            layout[joint + suffix] = Part(start, dtype, (rows, *shape))
            end = align(end)
    return layout


def first_of(spec: ModelSpec, name: str) -> str:
    """Return the first of the weights that a joint name stands for, or the name itself if it is one weight."""
    for joint, kinds in JOINT.items():
        if name not in spec.weights:
            name = name.replace(joint, f"{joint.partition('.')[0]}.{kinds[0]}_proj")
    return name


def align(offset: int) -> int:
    """Return the next page boundary."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _parts(spec: ModelSpec, name: str, storage: WeightStorage) -> dict[str, tuple[ir.DataType, tuple[int, ...]]]:
    bits, shape = storage.bits(spec, name), spec.weights[name].shape
    if bits == 32:
        return {"": (ir.DataType.FLOAT, shape)}
    if bits == 16:
        return {"": (ir.DataType(DTYPES[storage.precision.dtype].onnx), shape)}
    rows, width = shape
    if storage.by_row:
        if width % 4:
            raise UsageError(f"rows of {width} codes in {name}, no multiple of 4", hint="build with --weights fp16")
        return {"": (ir.DataType.INT32, (rows, width // 4)), "_scale": (ir.DataType.FLOAT, (rows,))}
    block = storage.block_of(spec, name)
    count = -(-width // block)
    if storage.transposed:
        integer = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}[bits]
        sizes: list[tuple[int, ...]] = [(width, rows), (count, rows), (count, rows)]
    else:
        integer = ir.DataType.UINT8
        sizes = [(rows, count, block * bits // 8), (rows, count), (rows, -(-count * bits // 8))]
    dtypes = integer, ir.DataType.FLOAT, integer
    return dict(zip(SUFFIXES, zip(dtypes, sizes, strict=True), strict=True))


def weight_bytes(spec: ModelSpec, storage: WeightStorage = FP32) -> int:
    """Return the bytes of all weights of the graph, including scales and zero points."""
    layout = data_layout(spec, storage)
    return sum(layout[key].nbytes for name in spec.used for key in (name + s for s in SUFFIXES) if key in layout)


def write_weights(
    spec: ModelSpec,
    directory: Path,
    storage: WeightStorage = FP32,
    advance: Callable[[float], None] = lambda amount: None,
    moments: Iterable[Mapping[str, Moments]] = (),
) -> None:
    """Stream the weights from the shards into `DATA_FILE`, some rows at a time; transposed weights are read whole.

    Args:
        moments: For `quantise`, by the names of weights, some weights at a time; other weights are written after these.
    """
    layout = data_layout(spec, storage)
    with (directory / DATA_FILE).open("wb") as data:
        for name, own in _with_moments(spec, moments):
            part = layout[name]
            if f"{name}_scale" not in layout:
                data.seek(part.offset)
                for slab in weight_slabs(spec, name):
                    data.write(np.ascontiguousarray(slab, part.dtype.numpy()).view(np.uint8).data)
                    advance(slab.size * part.dtype.itemsize)
                continue
            bits = storage.bits(spec, name)
            found: Iterable[Blocks] = (
                quantise_rows(slab)
                if storage.by_row
                else quantise(slab, bits, storage.block_of(spec, name), storage.precision.levels, own)
                for slab in weight_slabs(spec, name)
            )
            if storage.transposed:
                found = [Blocks(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))]
            ends = {suffix: layout[name + suffix].offset for suffix in SUFFIXES if name + suffix in layout}
            for blocks in found:
                for suffix, array in _encode(blocks, spec.weights[name].shape[1], bits, storage).items():
                    data.seek(ends[suffix])
                    ends[suffix] += data.write(array.data.cast("B"))
                    advance(array.nbytes)
            for suffix, end in ends.items():
                assert end == layout[name + suffix].offset + layout[name + suffix].nbytes


def _with_moments(spec: ModelSpec, moments: Iterable[Mapping[str, Moments]]) -> Iterator[tuple[str, Moments | None]]:
    """Yield the names of all weights, first those with moments, which are needed no longer when the next are drawn."""
    left = dict.fromkeys(spec.used)
    for found in moments:
        for name in left.keys() & found.keys():
            del left[name]
            yield name, found[name]
    for name in left:
        yield name, None


def weight_slabs(spec: ModelSpec, name: str) -> Iterator[np.ndarray]:
    """Yield a weight of the checkpoint in fp32, some rows at a time.

    Raises:
        CheckpointError: A value is not finite.
    """
    with safe_open(spec.weights[name].file, framework="pt") as shard:  # numpy has no bf16
        stored = shard.get_slice(name)
        for rows in _slabs(spec, name):
            slab = stored[rows].float().numpy()
            if not np.isfinite(slab).all():
                raise not_finite(name, spec.path)
            yield slab


def _slabs(spec: ModelSpec, name: str) -> Iterator[slice]:
    """Yield the rows of a weight, at most `SLAB` elements at a time."""
    shape = spec.weights[name].shape
    height = max(1, SLAB // prod(shape[1:]))
    return (slice(start, start + height) for start in range(0, shape[0], height))


def _encode(blocks: Blocks, width: int, bits: int, storage: WeightStorage) -> dict[str, np.ndarray]:
    """Return the bytes of the tensors of a quantised matrix, C-contiguous."""
    codes, scale, zero = blocks
    if storage.by_row:
        return {"": codes, "_scale": scale}
    if storage.transposed:
        codes, scale, zero = codes[:, :width].T.reshape(-1), scale.T, zero.T.reshape(-1)
    arrays = pack(codes, bits), scale, pack(zero, bits)
    return {suffix: np.ascontiguousarray(array) for suffix, array in zip(SUFFIXES, arrays, strict=True)}


def stored_slabs(
    spec: ModelSpec, storage: WeightStorage, directory: Path, name: str
) -> Iterator[tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]]:
    """Yield the values of a stored weight in fp32, in the same slabs as `weight_slabs`, and how each was rounded.

    Args:
        storage: How the weights are stored.
        directory: Directory of `DATA_FILE`.
        name: Name of the weight.

    Yields:
        Rows, and the function that rounds the checkpoint's rows to the nearest value of the type or grid.
    """
    layout, bits, shape = data_layout(spec, storage), storage.bits(spec, name), spec.weights[name].shape
    file = np.memmap(directory / DATA_FILE, mode="c")  # torch accepts no read-only array

    def bytes_of(suffix: str) -> np.ndarray:
        part = layout[name + suffix]
        return file[part.offset : part.offset + part.nbytes]

    if f"{name}_scale" not in layout:
        dtype = layout[name].dtype.numpy()
        stored = bytes_of("").view(dtype).reshape(shape)
        for rows in _slabs(spec, name):
            yield stored[rows].astype(np.float32, copy=False), lambda own: own.astype(dtype).astype(np.float32)
        return
    (height, width), block = shape, storage.block_of(spec, name)
    if storage.by_row:
        codes, each = bytes_of("").reshape(shape), bytes_of("_scale").view(np.float32)[:, None]
        for rows in _slabs(spec, name):
            zeros = np.full((len(each[rows]), 1), MIDDLE)
            yield _both(Blocks(codes[rows], each[rows], zeros), width, 2**bits)
        return
    scale = bytes_of("_scale").view(np.float32).reshape(layout[f"{name}_scale"].shape)
    count = -(-width // block)
    whole = {"": width if storage.transposed else count * block, "_zero_point": count}
    if storage.transposed:
        scale = scale.T
        codes, zero = (unpack(bytes_of(s), bits, n * height).reshape(n, height).T for s, n in whole.items())
    else:
        codes, zero = (unpack(bytes_of(s).reshape(height, -1), bits, n) for s, n in whole.items())
    beyond = (0, 0), (0, count * block - whole[""])
    for rows in _slabs(spec, name):
        blocks = Blocks(np.pad(codes[rows], beyond), np.ascontiguousarray(scale[rows]), zero[rows])
        yield _both(blocks, width, storage.precision.levels or 2**bits)


def _both(blocks: Blocks, width: int, levels: int) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Return the values of a quantised matrix, and the function that rounds to the nearest value of its grids."""
    return dequantise(blocks, width), lambda own: dequantise(requantise(own, blocks, levels), width)
