"""Products with weights, and rows of the embedding, in each precision. `weights.py` defines the bytes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ligerexport.exporters.onnx.builder import Builder
from ligerexport.exporters.onnx.lowerings import Blocked, Portable
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.onnx.weights import DATA_FILE, Part, WeightStorage, data_layout, first_of

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"


class Weights:
    """The weights of a model as initializers of a graph, with the products and look-ups that use them.

    Args:
        lower: Lowering of the graph.
        storage: How weights are stored.
        adapters: Inputs from `adapter_inputs`, by their names.
        input_ids: `[B, T]`, whose axes the tokens of a product with an adapter have.
    """

    def __init__(
        self, g: Builder, lower: Portable, spec: ModelSpec, storage: WeightStorage,
        adapters: Mapping[str, ir.Value] | None = None, input_ids: ir.Value | None = None,
    ) -> None:  # fmt: skip
        self.g, self.lower, self.spec, self.storage = g, lower, spec, storage
        self._adapters, self._ids = adapters or {}, input_ids
        self._layout = data_layout(spec, storage)

    def vector(self, name: str) -> ir.Value:
        """Return a weight that is stored as fp32."""
        return self._value(name, self._layout[name])

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """Return `x @ weight^T + bias` of a linear map, or of several by their joint name; x is `[tokens, in]` fp32."""
        product = self._product(x, name)
        if f"lora.{name}.a" not in self._adapters:
            return product
        a, b = (self._adapters[f"lora.{name}.{half}"] for half in "ab")
        g, ids = self.g, self._ids
        shape = g.once(("lora", "shape"), lambda: g.op("Concat", g.op("Shape", ids), g.const([-1]), axis=0))
        added = g.op("MatMul", g.op("MatMul", g.op("Reshape", x, shape), a), b)  # by sequence, [B, T, out]
        return g.op("Add", product, g.op("Reshape", added, g.op("Shape", product)))

    def _product(self, x: ir.Value, name: str) -> ir.Value:
        g, lower, weight = self.g, self.lower, f"{name}.weight"
        bias = self.vector(f"{name}.bias") if f"{name}.bias" in self._layout else None
        stored = f"{EMBEDDING}.weight" if name == HEAD and self.spec.tied else weight
        part = self._layout[stored]
        if f"{stored}_scale" in self._layout:
            return lower.blocked_linear(x, self._blocked(stored, weight), bias)
        table = self._value(stored, part)
        if part.dtype != ir.DataType.FLOAT:  # a cast of a constant, folded when the graph is loaded
            table = g.op("Cast", table, to=ir.DataType.FLOAT)
        return g.op("Gemm", x, table, *([bias] if bias else []), transB=1)

    def stored(self, name: str) -> bool:
        """Return whether there is a linear map of this name, which may be a joint one."""
        return f"{name}.weight" in self._layout

    def embed(self, ids: ir.Value) -> ir.Value:
        """Return rows of the embedding `[tokens, D]` fp32 for ids `[tokens]`."""
        name = f"{EMBEDDING}.weight"
        if f"{name}_scale" in self._layout:
            return self.lower.blocked_rows(self._blocked(name, name), ids)
        rows = self.g.op("Gather", self._value(name, self._layout[name]), ids)
        stored = self._layout[name].dtype
        return rows if stored == ir.DataType.FLOAT else self.g.op("Cast", rows, to=ir.DataType.FLOAT)

    def _value(self, name: str, part: Part) -> ir.Value:
        def make() -> ir.Value:
            shape = ir.Shape(part.shape)
            return self.g.initializer(
                ir.ExternalTensor(DATA_FILE, part.offset, part.nbytes, part.dtype, shape=shape, name=name)
            )

        return self.g.once(("weight", name), make)

    def _blocked(self, stored: str, name: str) -> Blocked:
        """Describe a quantised matrix; its bytes may be initializers of several shapes under several names."""

        def view(suffix: str, shape: tuple[int, ...] | None = None, dtype: ir.DataType | None = None) -> ir.Value:
            part = self._layout[stored + suffix]
            return self._value(name + suffix, Part(part.offset, dtype or part.dtype, shape or part.shape))

        first = first_of(self.spec, stored)
        rows, width = self._layout[f"{stored}_scale"].shape[self.storage.transposed], self.spec.weights[first].shape[1]
        return Blocked(rows, width, self.storage.bits(self.spec, first), self.storage.block_of(self.spec, first), view)
