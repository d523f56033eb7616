"""The lowering for the TensorRT plugin: standard operators that `fuse_for_plugin` turns into the plugin's nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.lowerings import Native, Portable
from ligerexport.exporters.onnx.native import DOMAIN


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

    def last(self, frame: Frame, x: ir.Value, width: int) -> ir.Value:
        end = np.iinfo(np.int32).max
        return self.g.reshape(self.g.slice(frame.per_token(x, width), -1, end, 1), -1, width)
