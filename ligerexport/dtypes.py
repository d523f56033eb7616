"""The types of tensor elements: one row each, with every name and number that a library or a file uses for it.

No heavy library is imported before a row is asked for its own type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dtype:
    """One type.

    Attributes:
        name: Name in numpy, torch and manifests.
        bits: Size of an element.
        onnx: Number in ONNX's `TensorProto.DataType`.
        kernel: Name in Triton's signatures, kernel packs and options of the CLI; empty if no kernel takes it.
        safetensors: Name in a checkpoint's files; empty if no weight of a checkpoint may have it.
    """

    name: str
    bits: int
    onnx: int
    kernel: str = ""
    safetensors: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of an element; 0 if several share a byte."""
        return self.bits // 8

    @property
    def half(self) -> bool:
        """Whether this is a floating-point type of 16 bits."""
        return "float" in self.name and self.bits == 16

    @property
    def torch(self) -> torch.dtype:
        """The type in torch."""
        import torch

        found: torch.dtype = getattr(torch, self.name)
        return found


DTYPES: dict[str, Dtype] = {
    row.name: row
    for row in (
        Dtype("float32", 32, 1, "fp32", "F32"),
        Dtype("float16", 16, 10, "fp16", "F16"),
        Dtype("bfloat16", 16, 16, "bf16", "BF16"),
        Dtype("int64", 64, 7, "i64"),
        Dtype("int32", 32, 6, "i32"),
        Dtype("int8", 8, 3, "i8"),
        Dtype("uint8", 8, 2, "u8"),
        Dtype("int4", 4, 22),
        Dtype("uint4", 4, 21),
        Dtype("bool", 8, 9),
    )
}
"""Every type by its name."""
BY_ONNX = {row.onnx: row for row in DTYPES.values()}
BY_KERNEL = {row.kernel: row for row in DTYPES.values() if row.kernel}
BY_SAFETENSORS = {row.safetensors: row for row in DTYPES.values() if row.safetensors}
HALVES = tuple(row for row in DTYPES.values() if row.half)
