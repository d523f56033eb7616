"""The targets of `build` and the precisions of weights, one row each. The `Backend` of a target does its work."""

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
        backend: Its `ligerexport.exporters.backend.Backend` as `module:class`, imported on demand.
        lowerings: Ways to write the mixer, the default first.
        requires: Distribution and version specifier of each runtime.
        weights: Precisions of weights, the default first.
        doc: One line for tables.
        onnxruntime: Whether ONNX Runtime runs the graph, on any of its devices; other targets run only on a GPU.
        sms: Compute capabilities that it can be built for; empty if it does not need a GPU.
        chunk: Default number of prompt tokens per call.
        run: Command that runs an artifact, with %s for its path; empty if there is none.
        ragged: Lowerings that support memories with sizes for each KV head or a small type of their slots.
    """

    backend: str
    lowerings: tuple[str, ...]
    requires: dict[str, str]
    weights: tuple[str, ...]
    doc: str
    onnxruntime: bool = False
    sms: tuple[int, ...] = ()
    chunk: int = 128
    run: str = ""
    ragged: tuple[str, ...] = ()


TARGETS: dict[str, Target] = {
    "onnx": Target(
        backend="ligerexport.exporters.onnx.backend:OnnxRuntime",
        lowerings=("ort", "portable", "native"),
        requires={"onnxruntime": ">=1.29"},  # the first with correct shapes for LinearAttention with fewer KV heads
        weights=("fp32", "fp16", "int8", "int4"),
        doc="a step graph for ONNX Runtime, weights in fp32 to int4",
        onnxruntime=True,
        run="ligerexport run %s",
        ragged=("ort", "portable", "native"),
    ),
    "trt": Target(
        backend="ligerexport.exporters.tensorrt.backend:TensorRT",
        lowerings=("plugin",),
        requires={},
        weights=("fp16", "bf16", "fp32", "int8"),
        doc="TensorRT 8.5 and later: a graph for our plugin, its kernels, and an engine where TensorRT is installed",
        sms=(80, 86, 87, 89, 90, 100, 120),
        chunk=1024,
        run="liger-run %s --ids 1,2,3",
        ragged=("plugin",),
    ),
    "trt-rtx": Target(
        backend="ligerexport.exporters.tensorrt.backend:TensorRTRTX",
        lowerings=("portable",),
        requires={},
        weights=("fp16", "bf16", "fp32"),
        doc="an engine for TensorRT-RTX on GeForce and RTX GPUs, built without a GPU",
        sms=(80, 86, 89, 120, 121),
        ragged=("portable",),
    ),
}


@dataclass(frozen=True)
class Precision:
    """How the embedding and the weights of linear maps are stored; norms, biases and scores are always fp32.

    A precision that is fp32, fp16 or bf16, or whose codes have 4 or 8 bits, needs nothing but a row. Codes of another
    width need code in these places, and in the kernels behind them:

    - `pack` and `unpack` in `exporters/onnx/quantise.py`, and the codes' ONNX type in `_parts` of `weights.py`;
    - `Portable.blocked_rows` in `exporters/onnx/lowerings.py`, which unpacks codes from bytes;
    - `Ort`: what ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized` accept;
    - `Native`: `exporters/onnx/native/block_linear.h` and the operator in `ort_operator.cc`;
    - `Plugin`: `by_row` in `exporters/onnx/weights.py`, and `kernels/fused/linear.py`.

    Another floating-point type needs a row in `ligerexport/dtypes.py`, and kernels of the plugin for it.

    Attributes:
        dtype: Name in manifests; for floating-point types also the row of `DTYPES`.
        bits: Size of an element. Below 16, elements are codes, and blocks of them share a scale and a zero point.
        error: Largest root mean square error of a stored row that verification accepts, relative to that of the row. A
            few large elements may leave the rest little precision.
        doc: One line for tables.
        mixed: Whether the matrices that lose most are stored with 8 bits; see `WeightStorage.bits`.
        levels: Number of codes that are used, if not all of them.
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
STATES = {"fp32": "activation", "fp16": "float16", "int8": "int8"}
"""Types of the keys and values of slots by their names in options, as `LigerConfig.state_dtype` has them."""
BLOCK = 32
"""Default number of elements of a row that share a scale and a zero point."""
BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that ONNX Runtime's kernels accept."""


def get_precision(name: str, block: int) -> Precision:
    """Return the row of `WEIGHTS` with this name.

    Raises:
        UsageError: There is no such precision, or no kernel accepts such blocks.
    """
    if block not in BLOCKS:
        raise UsageError(f"block {block}", hint=f"choose from {', '.join(map(str, BLOCKS))}")
    return look_up("precision of weights", name, WEIGHTS)


def precision_of(dtype: str) -> Precision:
    """Return the row of `WEIGHTS` whose dtype a manifest names."""
    return next(row for row in WEIGHTS.values() if row.dtype == dtype)


def get_target(name: str) -> Target:
    """Return the row of `TARGETS` with this name."""
    return look_up("target", name, TARGETS)


def get_backend(name: str) -> Backend:
    """Return the backend of a target."""
    row = get_target(name)
    made: Backend = resolve_name(row.backend)(name, row)
    return made
