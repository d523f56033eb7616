"""A table of faults to plant in an artifact while it is built, and what they are planted with.

Three ways: `spec`, the graph is written from a changed description; `code`, the lowering, the session or an operator is
another while graph and weights are written and run; `file`, graph or weights are edited once they are written.
Four more are planted before there is an artifact, in `convert` and what it reads: `source`, the Transformer's directory
is damaged; `written`, the conversion is edited as soon as it is written; `reading`, our code reads the checkpoint in
another way, so that torch model and artifact are wrong alike; `after`, the conversion is edited once it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ligerexport.exporters.onnx import graph
from ligerexport.exporters.onnx.graph import LOWERINGS
from ligerexport.exporters.onnx.lowerings import Portable
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.onnx.weights import DATA_FILE, WeightFormat, data_layout

AT = 1
"""The layer that a fault of one layer is planted in."""
LAST = 2
"""What is planted behind the last layer's output."""
ONNX = ("ort", "portable", "native")
GRAPHS = ("ort", "portable")
ALL = (*ONNX, "plugin")
SLOTTED = ("memory", "foresight", "evicted")


@dataclass(frozen=True)
class Site:
    """An artifact that is being built."""

    spec: ModelSpec
    directory: Path
    lowering: str
    form: WeightFormat

    @property
    def row(self) -> type[Portable]:
        """The lowering."""
        return LOWERINGS[self.lowering]

    def stored(self, name: str) -> np.ndarray:
        """Return a tensor of the data file to write to, codes of 4 bits as bytes."""
        part = data_layout(self.spec, self.form)[name]
        data = np.memmap(self.directory / DATA_FILE, mode="r+")[part.offset : part.offset + part.nbytes]
        return data if part.dtype.bitwidth < 8 else data.view(part.dtype.numpy()).reshape(part.shape)

    def of_layer(self, name: str, layer: int = AT) -> np.ndarray:
        """Return `stored` of a weight of a layer."""
        return self.stored(f"model.layers.{layer}.{name}")

    @contextmanager
    def edited(self) -> Iterator[ir.Model]:
        """Read the graph and write it again."""
        path = self.directory / graph.GRAPH_FILE
        model = ir.load(path)
        yield model
        ir.save(model, path)


@dataclass(frozen=True)
class Fault:
    """A fault and where it is planted.

    Attributes:
        how: One of the ways above.
        layer: That verification must name; None where it lies in no layer.
        plant: Returns another `ModelSpec`; returns a context for a `Site`; edits a `Site`; edits a directory; returns a
            context for the source's directory (`reading`).
        presets: It makes sense for.
        lowerings: Likewise.
        weights: Likewise.
        family: Of the model.
        sizes: Of the model that differ.
    """

    how: str
    layer: int | None
    plant: Callable[..., Any]
    presets: tuple[str, ...] = ("liger", *SLOTTED)
    lowerings: tuple[str, ...] = ALL
    weights: str = "fp32"
    family: str = "llama"
    sizes: tuple[tuple[str, Any], ...] = ()


FAULTS: dict[str, Fault] = {}


def fault(how: str, layer: int | None = AT, **where: Any) -> Callable[..., Any]:
    """Enter a function into the table under its name with spaces."""

    def enter(plant: Callable[..., Any]) -> Callable[..., Any]:
        FAULTS[plant.__name__.replace("_", " ")] = Fault(how, layer, plant, **where)
        return plant

    return enter
