"""The table of faults to plant in an artifact while it is built, and helpers to plant them.

There are three ways. `spec`: the graph is written from a changed description. `code`: the lowering, the session or an
operator is replaced while graph and weights are written and run. `file`: the written graph or weights are edited.
Four more are planted before there is an artifact, in `convert` and its input. `source`: the Transformer's directory
is damaged. `written`: the conversion is edited as soon as it is written. `reading`: our code reads the checkpoint
differently, so that torch model and artifact are wrong alike. `after`: the finished conversion is edited.
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
from ligerexport.exporters.onnx.weights import DATA_FILE, WeightStorage, data_layout

AT = 1
"""The layer that gets a fault of one layer."""
LAST = 2
"""The number that stands for the place after the last layer."""
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
    storage: WeightStorage

    @property
    def row(self) -> type[Portable]:
        """The lowering's class."""
        return LOWERINGS[self.lowering]

    def stored(self, name: str) -> np.ndarray:
        """Return a tensor of the data file for writing, with codes of 4 bits as bytes."""
        part = data_layout(self.spec, self.storage)[name]
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
    """A fault and the place where it is planted.

    Attributes:
        how: One of the ways above.
        layer: Layer that verification must name; None if the fault belongs to no layer.
        plant: Returns another `ModelSpec`; returns a context for a `Site`; edits a `Site`; edits a directory; returns a
            context for the source's directory (`reading`).
        presets: Presets to which it applies.
        lowerings: Lowerings to which it applies.
        weights: Precisions to which it applies.
        family: Family of the model.
        sizes: Sizes of the model that differ from the default.
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
    """Register a function in the table, under its name with spaces."""

    def enter(plant: Callable[..., Any]) -> Callable[..., Any]:
        FAULTS[plant.__name__.replace("_", " ")] = Fault(how, layer, plant, **where)
        return plant

    return enter
