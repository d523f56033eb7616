"""The data file of a graph: which tensors stand for the weights, where each lies, how it is written and read back.

Weights keep their names and, but for quantised ones that a lowering wants transposed, the orientation `[out, in]` of
the checkpoint; a tied embedding is stored once. Nothing here knows an operator.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ligerexport.exporters.onnx.quantise import Blocks, dequantise, pack, quantise, unpack
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.targets import BLOCK, WEIGHTS, Precision

DATA_FILE = "model.onnx.data"
ALIGNMENT = 4096
"""Bytes; a page, so that a runtime can map a weight instead of copying it."""
SUFFIXES = ("", "_scale", "_zero_point")
"""Of the names of the three tensors of a quantised matrix."""
_HALVES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_MLP = re.compile(r"layers\.(\d+)\.mlp\.(\w+)_proj")
SLAB = 1 << 24
"""Elements that are read at a time."""


@dataclass(frozen=True)
class WeightFormat:
    """How weights are stored.

    Attributes:
        precision: Row of `WEIGHTS`.
        block: Elements of a row that share a scale and a zero point, where the precision has blocks.
        transposed: Whether quantised matrices lie as `[in, out]`, the form of `DequantizeLinear` before a product that
            runtimes fuse, and else as ONNX Runtime's `MatMulNBits` wants them.
        typed: Whether products run in the type of their weights, and not in fp32.
    """

    precision: Precision = WEIGHTS["fp32"]
    block: int = BLOCK
    transposed: bool = False
    typed: bool = False

    @property
    def activation(self) -> ir.DataType:
        """Type of what goes into products with weights and comes out of them."""
        return _HALVES.get(self.precision.dtype, ir.DataType.FLOAT) if self.typed else ir.DataType.FLOAT

    def bits(self, spec: ModelSpec, name: str) -> int:
        """Return the bits of an element of a weight; 32 for what is no matrix, and for learned scores.

        Of `int4`, what costs most has 8: the embedding and the output, the attention's projections, which decide what
        keeps a slot, and `down_proj` of the layers that ONNX Runtime's model builder (`k_quant_mixed`) and llama.cpp
        (`Q4_K_M`) choose: the first, the last and every third between.
        """
        if len(spec.weights[name].shape) != 2 or "score_proj" in name:
            return 32
        if self.precision.bits != 4 or not (place := _MLP.search(name)):
            return max(self.precision.bits, 8)
        layer, layers = int(place[1]), len(spec.mixers)
        often = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        return 8 if often and place[2] == "down" else 4


FP32 = WeightFormat()


class Part(NamedTuple):
    """A tensor of the data file: offset in bytes, type and shape."""

    offset: int
    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file; codes of 4 bits lie two in a byte."""
        return -(-prod(self.shape) * self.dtype.bitwidth // 8)


def data_layout(spec: ModelSpec, form: WeightFormat = FP32) -> dict[str, Part]:
    """Return every tensor of `DATA_FILE` by name, shard after shard, on page boundaries.

    A quantised weight is three: its codes under its own name, and `NAME_scale` and `NAME_zero_point`.
    """
    layout, end = {}, 0
    for name in weight_names(spec):
        for suffix, (dtype, shape) in _parts(spec, name, form).items():
            part = layout[name + suffix] = Part(end, dtype, shape)
            end = align(end + part.nbytes)
    return layout


def align(offset: int) -> int:
    """Return the next page boundary."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def weight_names(spec: ModelSpec) -> list[str]:
    """Return the names of the weights that the graph uses, in the order of the file."""
    unused = {"lm_head.weight"} if spec.tied else set()
    return [name for name in spec.weights if not name.endswith("rotary_emb.inv_freq") and name not in unused]


def _parts(spec: ModelSpec, name: str, form: WeightFormat) -> dict[str, tuple[ir.DataType, tuple[int, ...]]]:
    bits, shape = form.bits(spec, name), spec.weights[name].shape
    if bits == 32:
        return {"": (ir.DataType.FLOAT, shape)}
    if bits == 16:
        return {"": (_HALVES[form.precision.dtype], shape)}
    rows, width = shape
    count = -(-width // form.block)
    if form.transposed:
        integer = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}[bits]
        sizes: list[tuple[int, ...]] = [(width, rows), (count, rows), (count, rows)]
    else:
        integer = ir.DataType.UINT8
        sizes = [(rows, count, form.block * bits // 8), (rows, count), (rows, -(-count * bits // 8))]
    dtypes = integer, ir.DataType.FLOAT, integer
    return dict(zip(SUFFIXES, zip(dtypes, sizes, strict=True), strict=True))


def weight_bytes(spec: ModelSpec, form: WeightFormat = FP32) -> int:
    """Return the bytes of all weights of the graph, scales and zero points among them."""
    return sum(part.nbytes for part in data_layout(spec, form).values())


def write_weights(
    spec: ModelSpec,
    directory: Path,
    form: WeightFormat = FP32,
    advance: Callable[[float], None] = lambda amount: None,
) -> None:
    """Stream the weights from the shards into `DATA_FILE`, a slab of rows at a time; integers a matrix at a time."""
    layout = data_layout(spec, form)
    with (directory / DATA_FILE).open("wb") as data:
        for name in weight_names(spec):
            part = layout[name]
            if f"{name}_scale" not in layout:
                data.seek(part.offset)
                for slab in _slabs(spec, name):
                    data.write(np.ascontiguousarray(slab, part.dtype.numpy()).view(np.uint8).data)
                    advance(slab.size * part.dtype.itemsize)
                continue
            bits = form.bits(spec, name)
            found = [quantise(slab, bits, form.block) for slab in _slabs(spec, name)]
            blocks = Blocks(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))
            del found
            for suffix, array in _encode(blocks, spec.weights[name].shape[1], bits, form.transposed).items():
                part = layout[name + suffix]
                assert array.nbytes == part.nbytes
                data.seek(part.offset)
                data.write(array.data.cast("B"))
                advance(part.nbytes)


def _slabs(spec: ModelSpec, name: str) -> Iterator[np.ndarray]:
    """Yield a weight of the checkpoint in fp32, some rows at a time."""
    from safetensors import safe_open

    shape = spec.weights[name].shape
    rows = max(1, SLAB // prod(shape[1:]))
    with safe_open(spec.weights[name].file, framework="pt") as shard:  # numpy knows no bf16
        stored = shard.get_slice(name)
        for start in range(0, shape[0], rows):
            yield stored[start : start + rows].float().numpy()


def _encode(blocks: Blocks, width: int, bits: int, transposed: bool) -> dict[str, np.ndarray]:
    """Return the bytes of the three tensors of a quantised matrix, C-contiguous."""
    codes, scale, zero = blocks
    if transposed:
        codes, scale, zero = codes[:, :width].T.reshape(-1), scale.T, zero.T.reshape(-1)
    arrays = pack(codes, bits), scale, pack(zero, bits)
    return {suffix: np.ascontiguousarray(array) for suffix, array in zip(SUFFIXES, arrays, strict=True)}


def read_matrix(spec: ModelSpec, form: WeightFormat, file: np.ndarray, name: str) -> np.ndarray:
    """Return what a stored matrix stands for, `[out, in]` fp32.

    Args:
        spec: The model.
        form: As it was written with.
        file: The bytes of `DATA_FILE`.
        name: Of the weight.
    """
    layout, bits, width = data_layout(spec, form), form.bits(spec, name), spec.weights[name].shape[1]

    def bytes_of(suffix: str) -> np.ndarray:
        part = layout[name + suffix]
        return file[part.offset : part.offset + part.nbytes]

    if f"{name}_scale" not in layout:
        part = layout[name]
        return bytes_of("").view(part.dtype.numpy()).reshape(part.shape).astype(np.float32)
    scale = bytes_of("_scale").view(np.float32).reshape(layout[f"{name}_scale"].shape)
    if not form.transposed:
        rows, count = scale.shape
        codes = unpack(bytes_of("").reshape(rows, -1), bits, count * form.block)
        return dequantise(Blocks(codes, scale, unpack(bytes_of("_zero_point").reshape(rows, -1), bits, count)), width)
    count, rows = scale.shape
    codes = unpack(bytes_of(""), bits, width * rows).reshape(width, rows).T
    zero = unpack(bytes_of("_zero_point"), bits, count * rows).reshape(count, rows).T
    padded = np.pad(codes, ((0, 0), (0, count * form.block - width)))
    return dequantise(Blocks(padded, np.ascontiguousarray(scale.T), zero), width)
