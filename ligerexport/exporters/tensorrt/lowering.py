"""The lowering for the TensorRT plugin: standard operators that `fuse_for_plugin` turns into the plugin's nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.lowerings import Blocked, Native, Portable
from ligerexport.exporters.onnx.native import DOMAIN
from ligerexport.exporters.tensorrt.node import plugin_linear
from ligerexport.kernels.linear import LinearSpec


class Plugin(Portable):
    """Operators that TensorRT parses from 8.5 on: opset 17, int32.

    Parsers of 8.5 silently read `Shape` of a range as the whole shape, and do not resolve a negative index.
    """

    plugin = True
    adds_late = False
    max_tensors = None
    transposed = False
    integer = "int32"
    opset = 17
    ir_version = 8
    domains = (DOMAIN,)
    gated_unit = Native.gated_unit

    def rms_norm(self, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        g = self.g
        mean = g.op("ReduceMean", g.op("Mul", x, x), axes=[-1])
        return g.op("Mul", g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.floats(eps)))), weight)

    def blocked_linear(self, x: ir.Value, matrix: Blocked, bias: ir.Value | None) -> ir.Value:
        weight = self.g.op("DequantizeLinear", matrix.view(""), matrix.view("_scale"), axis=0)
        return self.g.op("Gemm", x, weight, *([bias] if bias else []), transB=1)

    def blocked_rows(self, matrix: Blocked, ids: ir.Value) -> ir.Value:
        spec = LinearSpec(matrix.width, matrix.rows, wide=True, coded=True, indexed=True)
        given = [self.g.reshape(ids, -1, 1), matrix.view(""), matrix.view("_scale")]
        with self.g.scope("embedding"):  # `fuse_for_plugin` names its nodes anew
            rows: ir.Value = plugin_linear(self.g, spec, given)
        return rows

    def last(self, frame: Frame, x: ir.Value, width: int) -> ir.Value:
        end = np.iinfo(np.int32).max
        return self.g.reshape(self.g.slice(frame.per_token(x, width), -1, end, 1), -1, width)
