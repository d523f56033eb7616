"""The targets of `build` and the precisions of weights: what exists, one row each. How is in the targets' packages."""

from __future__ import annotations

from dataclasses import dataclass

from ligerexport.errors import UsageError, look_up


@dataclass(frozen=True)
class Target:
    """One kind of artifact.

    Attributes:
        lowerings: Ways to write the mixer, the default first.
        extra: Extra of this package that installs what building and running need.
        requires: Distribution and version specifier of each runtime.
        weights: Precisions of weights, the default first.
        doc: One line for tables.
        typed: Whether products run in the type of their weights, and not in fp32.
        sms: Compute capabilities that it can be built for; none where it is for no GPU.
        chunk: Tokens of a prompt in one call, unless more or fewer are wanted.
    """

    lowerings: tuple[str, ...]
    extra: str
    requires: dict[str, str]
    weights: tuple[str, ...]
    doc: str
    typed: bool = False
    sms: tuple[int, ...] = ()
    chunk: int = 128


TARGETS: dict[str, Target] = {
    "onnx": Target(
        lowerings=("ort", "portable", "native"),
        extra="onnx",
        requires={"onnxruntime": ">=1.29"},  # first with right shapes for LinearAttention with fewer KV heads
        weights=("fp32", "fp16", "int8", "int4"),
        doc="a step graph for ONNX Runtime, weights in fp32 to int4",
    ),
    "trt": Target(
        lowerings=("plugin",),
        extra="trt",
        requires={},
        weights=("fp16", "bf16", "fp32"),
        doc="TensorRT 8.5 and later: a graph for our plugin, its kernels, and an engine where TensorRT is installed",
        typed=True,
        sms=(80, 86, 87, 89, 90, 100, 120),
        chunk=1024,
    ),
    "trt-rtx": Target(
        lowerings=("portable",),
        extra="rtx",
        requires={},
        weights=("fp16", "bf16", "fp32"),
        doc="an engine for TensorRT-RTX on GeForce and RTX GPUs, built without a GPU",
        typed=True,
        sms=(80, 86, 89, 120, 121),
    ),
}


@dataclass(frozen=True)
class Precision:
    """How the embedding and the weights of linear maps are stored; norms, biases and scores are always fp32.

    Attributes:
        dtype: As the manifest calls it.
        bits: Of an element. Below 16, blocks of elements share a scale and a zero point.
        doc: One line for tables.
    """

    dtype: str
    bits: int
    doc: str

    @property
    def blocked(self) -> bool:
        """Whether elements are integers in blocks."""
        return self.bits < 16


WEIGHTS: dict[str, Precision] = {
    "fp32": Precision("float32", 32, "as computed with"),
    "fp16": Precision("float16", 16, "half the file; a CPU makes them fp32 when it loads them"),
    "bf16": Precision("bfloat16", 16, "the range of fp32, of which 3 digits stay"),
    "int8": Precision("int8", 8, "less than a third of the file, nothing lost that can be measured"),
    "int4": Precision("int4", 4, "4 bits where they cost least and 8 elsewhere; loses a little"),
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


def get_target(name: str) -> Target:
    """Return the row of `TARGETS` with this name.

    Raises:
        UsageError: No such target; the hint names close matches.
    """
    return look_up("target", name, TARGETS)
