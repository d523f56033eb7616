"""The targets of `build` and the precisions of weights, one row each. What a target does is in its `Backend`."""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from ligerexport.errors import UsageError, look_up

if TYPE_CHECKING:
    from ligerexport.exporters.backend import Backend


@dataclass(frozen=True)
class Target:
    """One kind of artifact.

    Attributes:
        backend: Where its `ligerexport.exporters.backend.Backend` is, as `module:class`; imported when it is needed.
        lowerings: Ways to write the mixer, the default first.
        extra: Extra of this package that installs what building and running need.
        requires: Distribution and version specifier of each runtime.
        weights: Precisions of weights, the default first.
        doc: One line for tables.
        onnxruntime: Whether ONNX Runtime runs the graph, on any of its devices; other targets have a GPU and no choice.
        sms: Compute capabilities that it can be built for; none if it is not only for GPUs.
        chunk: Tokens of a prompt in one call by default.
        run: Command that runs an artifact, with %s for its path; empty if there is none.
    """

    backend: str
    lowerings: tuple[str, ...]
    extra: str
    requires: dict[str, str]
    weights: tuple[str, ...]
    doc: str
    onnxruntime: bool = False
    sms: tuple[int, ...] = ()
    chunk: int = 128
    run: str = ""


TARGETS: dict[str, Target] = {
    "onnx": Target(
        backend="ligerexport.exporters.onnx.backend:OnnxRuntime",
        lowerings=("ort", "portable", "native"),
        extra="onnx",
        requires={"onnxruntime": ">=1.29"},  # first with right shapes for LinearAttention with fewer KV heads
        weights=("fp32", "fp16", "int8", "int4"),
        doc="a step graph for ONNX Runtime, weights in fp32 to int4",
        onnxruntime=True,
        run='ligerexport run %s "Once upon a time"',
    ),
    "trt": Target(
        backend="ligerexport.exporters.tensorrt.backend:TensorRT",
        lowerings=("plugin",),
        extra="trt",
        requires={},
        weights=("fp16", "bf16", "fp32"),
        doc="TensorRT 8.5 and later: a graph for our plugin, its kernels, and an engine where TensorRT is installed",
        sms=(80, 86, 87, 89, 90, 100, 120),
        chunk=1024,
        run="liger-run %s --ids 1,2,3",
    ),
    "trt-rtx": Target(
        backend="ligerexport.exporters.tensorrt.backend:TensorRTRTX",
        lowerings=("portable",),
        extra="rtx",
        requires={},
        weights=("fp16", "bf16", "fp32"),
        doc="an engine for TensorRT-RTX on GeForce and RTX GPUs, built without a GPU",
        sms=(80, 86, 89, 120, 121),
    ),
}


@dataclass(frozen=True)
class Precision:
    """How the embedding and the weights of linear maps are stored; norms, biases and scores are always fp32.

    A row is all that a precision needs whose codes have 4 or 8 bits, or that is fp32 or a half. Codes of another width
    need code in these places, and in the kernels behind them:

    - `pack` and `unpack` in `exporters/onnx/quantise.py`, and the codes' ONNX type in `_parts` of `weights.py`;
    - `Portable.blocked_rows` in `exporters/onnx/lowerings.py`, which takes codes out of their bytes;
    - `Ort`: what ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized` take;
    - `Native`: `exporters/onnx/native/block_linear.h` and the operator in `ort_operator.cc`.

    Another floating-point type needs a row in `ligerexport/dtypes.py`, and kernels of the plugin for it.

    Attributes:
        dtype: Name in manifests; for floating-point types also the row of `DTYPES`.
        bits: Size of an element. Below 16, elements are codes, and blocks of them share a scale and a zero point.
        error: Largest root mean square error of a stored row that verification accepts, relative to that of the row. A
            few large elements may leave little precision to the others.
        doc: One line for tables.
        mixed: Whether matrices that lose most have 8 bits all the same; see `WeightStorage.bits`.
        levels: Codes that are used, if not all of them.
    """

    dtype: str
    bits: int
    error: float
    doc: str
    mixed: bool = False
    levels: int | None = None

    @property
    def blocked(self) -> bool:
        """Whether elements are codes in blocks."""
        return self.bits < 16


WEIGHTS: dict[str, Precision] = {
    "fp32": Precision("float32", 32, 0.0, "as computed with"),
    "fp16": Precision("float16", 16, 1e-3, "half the file; a CPU makes them fp32 when it loads them"),
    "bf16": Precision("bfloat16", 16, 8e-3, "the range of fp32, of which 3 digits stay"),
    "int8": Precision("int8", 8, 0.05, "less than a third of the file, nothing lost that can be measured"),
    "int4": Precision("int4", 4, 0.5, "4 bits where they cost least and 8 elsewhere; loses a little", mixed=True),
}
BLOCK = 32
"""Elements of a row that share a scale and a zero point, unless told otherwise."""
BLOCKS = (16, 32, 64, 128, 256)
"""What ONNX Runtime's kernels take."""


def get_precision(name: str, block: int) -> Precision:
    """Return the row of `WEIGHTS` with this name.

    Raises:
        UsageError: No such precision, or no kernel takes such blocks.
    """
    if block not in BLOCKS:
        raise UsageError(f"block {block}", hint=f"choose from {', '.join(map(str, BLOCKS))}")
    return look_up("precision of weights", name, WEIGHTS)


def precision_of(dtype: str) -> Precision:
    """Return the row of `WEIGHTS` with a manifest's name of a precision."""
    return next(row for row in WEIGHTS.values() if row.dtype == dtype)


def get_target(name: str) -> Target:
    """Return the row of `TARGETS` with this name."""
    return look_up("target", name, TARGETS)


def get_backend(name: str) -> Backend:
    """Return what a target does."""
    row = get_target(name)
    made: Backend = resolve_name(row.backend)(name, row)
    return made
