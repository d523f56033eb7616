"""The targets of `build`: what exists, one row each. How a target is built is in its own package."""

from __future__ import annotations

from dataclasses import dataclass

from ligerexport.errors import look_up


@dataclass(frozen=True)
class Target:
    """One kind of artifact.

    Attributes:
        lowerings: Ways to write the mixer, the default first.
        extra: Extra of this package that installs what building and running need.
        requires: Distribution and version specifier of each runtime.
        doc: One line for tables.
    """

    lowerings: tuple[str, ...]
    extra: str
    requires: dict[str, str]
    doc: str


TARGETS: dict[str, Target] = {
    "onnx": Target(
        lowerings=("ort", "portable", "native"),
        extra="onnx",
        requires={"onnxruntime": ">=1.29"},  # first with right shapes for LinearAttention with fewer KV heads
        doc="a step graph for ONNX Runtime, weights in fp32",
    ),
}


def get_target(name: str) -> Target:
    """Return the row of `TARGETS` with this name.

    Raises:
        UsageError: No such target; the hint names close matches.
    """
    return look_up("target", name, TARGETS)
