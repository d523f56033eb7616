"""How each piece of the model is written: with standard operators, or with ONNX Runtime's where these are faster.

`Portable` uses standard operators of opset 21 without control flow. `Ort` replaces some pieces by contrib operators
and `Native` a layer's memory by an operator of this project.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ligerexport.exporters.onnx.builder import CONTRIB, IR_VERSION, OPSET, Builder
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.lent import KEEP
from ligerexport.exporters.onnx.native import DOMAIN
from ligerexport.exporters.onnx.spec import ACTIVATIONS

FP32_ACTIVATIONS, INT8_ACTIVATIONS = 1, 4
"""`accuracy_level` of `MatMulNBits`. Without it, codes of 8 bits take a path that is a hundred times slower."""


@dataclass(frozen=True)
class Table:
    """Cosine and sine `[rows, R]` of the rotary embedding; R is half the rotated width."""

    cos: ir.Value
    sin: ir.Value
    half: int


@dataclass(frozen=True)
class Blocked:
    """A quantised matrix `[rows, width]`: blocks of a row share a scale and a zero point.

    Attributes:
        rows: Number of outputs of the map, or rows of the embedding.
        width: Number of elements in a row.
        bits: Number of bits in a code.
        block: Number of elements in a block; the last block of a row may have fewer.
        view: Returns codes (suffix ""), `_scale` or `_zero_point` as they are stored; given a shape, or a shape and a
            type, it returns the same bytes in that form.
    """

    rows: int
    width: int
    bits: int
    block: int
    view: Callable[..., ir.Value]

    def parts(self) -> list[ir.Value]:
        """Return codes, scales and zero points as they are stored."""
        return [self.view(suffix) for suffix in ("", "_scale", "_zero_point")]


class Portable:
    """Uses standard operators only.

    Attributes:
        native: Whether a layer's memory is one node, of the library that `native` compiles.
        plugin: Whether a layer's mixer is one node, of the TensorRT plugin.
        adds_late: Whether the sum at the end of a layer is computed by the norm of the next layer.
        max_tensors: Largest number of inputs and outputs of a node; None is any number. WebGPU guarantees 8 storage
            buffers per shader.
        transposed: Whether quantised matrices are stored as `[in, out]`.
        integer: Type of the graph's integer inputs and outputs.
        opset: Version of the standard operators.
        ir_version: Version of the file format.
        domains: Domains of the other operators.

    Args:
        meter: Whether layers that evict also return the share of attention that fell on what they forgot.
    """

    native = False
    plugin = False
    adds_late = True
    max_tensors: int | None = 8
    transposed = True
    integer = "int64"
    opset = OPSET
    ir_version = IR_VERSION
    domains: tuple[str, ...] = (CONTRIB,)

    def __init__(self, g: Builder, meter: bool = False) -> None:
        self.g, self.meter = g, meter

    def last(self, frame: Frame, x: ir.Value, width: int) -> ir.Value:
        """Return the rows of `[B * T, width]` of the tokens that `KEEP` numbers: the last one of each sequence."""
        keep = self.g.table(KEEP, np.array([-1]))
        return self.g.reshape(self.g.op("Gather", frame.per_token(x, width), keep, axis=1), -1, width)

    def functions(self) -> list[ir.Function]:
        """Return the model-local functions that the graph needs."""
        return []

    def rms_norm(self, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        """Norm the last axis, written in the form that ONNX Runtime fuses."""
        g = self.g
        mean = g.op("ReduceMean", g.op("Pow", x, g.floats(2)), g.const([-1]))
        scaled = g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.floats(eps))))
        return g.op("Mul", scaled, weight)

    def add(self, x: ir.Value, residual: ir.Value) -> ir.Value:
        """Return the sum."""
        return self.g.op("Add", x, residual)

    def add_norm(self, x: ir.Value, residual: ir.Value, weight: ir.Value, eps: float) -> tuple[ir.Value, ir.Value]:
        """Return the norm of the sum, and the sum."""
        total = self.add(x, residual)
        return self.rms_norm(total, weight, eps), total

    def silu(self, x: ir.Value) -> ir.Value:
        """Return x * sigmoid(x)."""
        return self.g.op("Mul", x, self.g.op("Sigmoid", x))

    def gelu(self, x: ir.Value) -> ir.Value:
        """Return GELU by its approximation with tanh."""
        return self.g.op("Gelu", x, approximate="tanh")

    def gated_unit(self, gate: ir.Value, up: ir.Value, activation: str) -> ir.Value:
        """Return `activation(gate) * up`; `activation` is the name of a method."""
        return self.g.op("Mul", getattr(self, activation)(gate), up)

    def scores(self, query: ir.Value, key: ir.Value, scale: float) -> ir.Value:
        """Return `scale * query @ key^T`."""
        g = self.g
        return g.op("MatMul", g.op("Mul", query, g.floats(scale)), g.transpose(key, 0, 1, 3, 2))

    def rotate_queries(self, x: ir.Value, table: Table, length: ir.Value, d_k: int) -> ir.Value:
        """Rotate `[B, H_q, T, d_k]` by the first T rows of a table; `length` is T, `[1]`."""
        g = self.g

        def rows(values: ir.Value) -> ir.Value:
            first = ("rows", values.name)
            return g.once(first, lambda: g.op("Slice", values, g.const([0]), length, g.const([0])))

        cos, sin = rows(table.cos), rows(table.sin)
        return rotate(g, x, cos, sin, table.half, d_k)

    def rotate_keys(self, x: ir.Value, table: Table, row: ir.Value, heads: int, d_k: int) -> ir.Value:
        """Rotate `[B, H, C, d_k]` by rows `[B * H, C]` of a table."""
        g = self.g
        flat = g.op("Reshape", x, g.const([-1, 1, 0, d_k]))
        cos, sin = (g.op("Unsqueeze", g.op("Gather", values, row), g.const([1])) for values in (table.cos, table.sin))
        return g.reshape(rotate(g, flat, cos, sin, table.half, d_k), -1, heads, 0, d_k)

    def blocked_linear(self, x: ir.Value, matrix: Blocked, bias: ir.Value | None) -> ir.Value:
        """Return `x @ matrix^T + bias`, in the form that ONNX Runtime fuses to `MatMulNBits`."""
        weight = self.g.op("DequantizeLinear", *matrix.parts(), axis=0, block_size=matrix.block)
        return self.g.op("Gemm", x, weight, *([bias] if bias else []))

    def blocked_rows(self, matrix: Blocked, ids: ir.Value) -> ir.Value:
        """Return rows `[tokens, width]` of a quantised matrix for ids `[tokens]`.

        Opset 21 cannot gather 4-bit integers, so codes are taken out of their bytes, element by element. A matrix that
        is also multiplied with is stored only once, transposed, so its rows are columns here.
        """
        g, bits = self.g, matrix.bits
        column = np.arange(matrix.width)
        ids = g.op("Unsqueeze", ids, g.const([1]))
        at, block = (g.op("Add", ids, g.const(x * matrix.rows)) for x in (column, column // matrix.block))
        count = -(-matrix.width // matrix.block) * matrix.rows

        def codes(suffix: str, size: int, index: ir.Value) -> ir.Value:
            stored = matrix.view(suffix, (-(-size * bits // 8),), ir.DataType.UINT8)
            if bits == 8:
                return g.op("Cast", g.op("Gather", stored, index), to=ir.DataType.FLOAT)
            byte = g.op("Cast", g.op("Gather", stored, g.op("Div", index, g.const(2))), to=ir.DataType.INT64)
            high = g.op("Mod", index, g.const(2))
            divisor = g.op("Add", g.op("Mul", high, g.const(15)), g.const(1))
            return g.op("Cast", g.op("Mod", g.op("Div", byte, divisor), g.const(16)), to=ir.DataType.FLOAT)

        code = codes("", matrix.width * matrix.rows, at)
        scale = g.op("Gather", matrix.view("_scale", (count,)), block)
        return g.op("Mul", g.op("Sub", code, codes("_zero_point", count, block)), scale)

    def linear_attention(
        self,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        state: ir.Value,
        decay: ir.Value,
        heads: tuple[int, int],
        d_k: int,
    ) -> tuple[ir.Value, ir.Value]:
        """Run ONNX LinearAttention, `gated`, scale 1, from packed `[B, T, H * d]`; return packed output and the state.

        `heads` is H_q and H_kv.
        """
        return pairwise_linear_attention(self.g, query, key, value, state, decay, heads[1], d_k)


class Ort(Portable):
    """Uses contrib operators of ONNX Runtime, which have CPU kernels in fp32."""

    max_tensors = None
    transposed = False

    def functions(self) -> list[ir.Function]:
        """Return the body of `LinearAttention`, for runtimes that have no kernel for it."""
        return [linear_attention_function()]

    def add_norm(self, x: ir.Value, residual: ir.Value, weight: ir.Value, eps: float) -> tuple[ir.Value, ir.Value]:
        name = "SkipSimplifiedLayerNormalization"
        normed, _, _, total = self.g.op(name, x, residual, weight, outputs=4, domain=CONTRIB, epsilon=eps)
        return normed, total

    def silu(self, x: ir.Value) -> ir.Value:
        return self.g.op("QuickGelu", x, domain=CONTRIB, alpha=1.0)

    def scores(self, query: ir.Value, key: ir.Value, scale: float) -> ir.Value:
        return self.g.op("FusedMatMul", query, key, domain=CONTRIB, transB=1, alpha=float(scale))

    def rotate_queries(self, x: ir.Value, table: Table, length: ir.Value, d_k: int) -> ir.Value:
        if 2 * table.half != d_k:
            return super().rotate_queries(x, table, length, d_k)
        return self.g.op("RotaryEmbedding", x, self.g.const([0]), table.cos, table.sin, domain=CONTRIB)

    def rotate_keys(self, x: ir.Value, table: Table, row: ir.Value, heads: int, d_k: int) -> ir.Value:
        """Rotate `[B, H, C, d_k]` by rows `[B * H, C]` of a table; the operator sees every head as a sequence."""
        g = self.g
        if 2 * table.half != d_k:
            return super().rotate_keys(x, table, row, heads, d_k)
        rotated = g.op("RotaryEmbedding", g.reshape(x, -1, 1, 0, d_k), row, table.cos, table.sin, domain=CONTRIB)
        return g.reshape(rotated, -1, heads, 0, d_k)

    def blocked_linear(self, x: ir.Value, matrix: Blocked, bias: ir.Value | None) -> ir.Value:
        """Return `x @ matrix^T + bias`, with x in int8 and a scale for each block, which makes it fast."""
        inputs = [x, *matrix.parts(), *([None, bias] if bias else [])]
        return self.g.op(
            "MatMulNBits", *inputs, domain=CONTRIB, K=matrix.width, N=matrix.rows, bits=matrix.bits,
            block_size=matrix.block, accuracy_level=INT8_ACTIVATIONS,
        )  # fmt: skip

    def blocked_rows(self, matrix: Blocked, ids: ir.Value) -> ir.Value:
        g, padded = self.g, -(-matrix.width // matrix.block) * matrix.block
        codes = matrix.view("", (matrix.rows, padded * matrix.bits // 8))
        rows = g.op(
            "GatherBlockQuantized", codes, ids, matrix.view("_scale"), matrix.view("_zero_point"), domain=CONTRIB,
            bits=matrix.bits, block_size=matrix.block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        return rows if padded == matrix.width else g.slice(rows, 0, matrix.width, 1)

    def linear_attention(
        self,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        state: ir.Value,
        decay: ir.Value,
        heads: tuple[int, int],
        d_k: int,
    ) -> tuple[ir.Value, ir.Value]:
        return self.g.op(
            "LinearAttention", query, key, value, state, decay,
            outputs=2, domain=CONTRIB, q_num_heads=heads[0], kv_num_heads=heads[1], update_rule="gated", scale=1.0,
        )  # fmt: skip


def rotate(g: Builder, x: ir.Value, cos: ir.Value, sin: ir.Value, half: int, d_k: int) -> ir.Value:
    """Rotate the halves of the first 2 R channels of the last axis."""
    widths = [half, half, d_k - 2 * half] if d_k > 2 * half else [half, half]
    first, second, *rest = g.op("Split", x, g.const(widths), outputs=len(widths), axis=-1)
    left = g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin))
    right = g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin))
    return g.concat(left, right, *rest, axis=-1)


def pairwise_linear_attention(
    g: Builder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    state: ir.Value,
    decay: ir.Value,
    heads: int | ir.Value,
    d_k: int | ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """Write gated linear attention over T tokens at once, for packed tensors.

    `heads` is H_kv. It and `d_k` are numbers or values `[1]`. `decay` is `[B, T, H_kv * d_k]`, or `[B, T, H_kv]` if it
    is the same for all channels. The decay between two tokens comes from the difference of their sums, which is at most
    0, so no gate overflows. State and values are joined first, so that the state has one consumer and may be updated in
    place.
    """
    q = g.transpose(g.reshape(query, 0, 0, heads, -1, d_k), 0, 2, 1, 3, 4)  # [B, H, T, G, d_k]
    k, v, gate = (split_heads(g, x, heads) for x in (key, value, decay))
    memory = g.concat(state, v, axis=2)  # [B, H, d_k + T, d_v]
    total = g.op("CumSum", gate, g.const(2))
    pairs = g.op("MatMul", q, g.transpose(reach(g, k, total), 0, 1, 2, 4, 3))  # [B, H, T, G, S]
    weights = g.op("Mul", pairs, causal(g, k))
    carried = g.op("Mul", q, unsqueeze(g, g.op("Exp", total), 3))
    rows = g.op("Concat", carried, weights, axis=-1)  # [B, H, T, G, d_k + T]
    width = g.const([d_k]) if isinstance(d_k, int) else d_k
    flat = g.op("Concat", g.const([0, 0, -1]), g.op("Shape", memory, start=2, end=3), axis=0)
    read = g.op("MatMul", g.op("Reshape", rows, flat), memory)
    groups = g.op("Concat", g.op("Shape", q, end=4), g.const([-1]), axis=0)
    output = g.reshape(g.transpose(g.op("Reshape", read, groups), 0, 2, 1, 3, 4), 0, 0, -1)
    return output, advance(g, k, v, total, g.op("Slice", memory, g.const([0]), width, g.const([2])))


def split_heads(g: Builder, x: ir.Value, heads: int | ir.Value) -> ir.Value:
    """Return `[B, H, T, d]` of packed `[B, T, H * d]`."""
    return g.transpose(g.reshape(x, 0, 0, heads, -1), 0, 2, 1, 3)


def unsqueeze(g: Builder, x: ir.Value, axis: int) -> ir.Value:
    """Add an axis."""
    return g.op("Unsqueeze", x, g.const([axis]))


def reach(g: Builder, key: ir.Value, total: ir.Value) -> ir.Value:
    """Return each key s decayed until time t, `[B, H, T, S, d_k]`, undecayed if s > t; `total` is the sum of decays."""
    between = g.op("Sub", unsqueeze(g, total, 3), unsqueeze(g, total, 2))
    return g.op("Mul", g.op("Exp", g.op("Clip", between, None, g.floats(0))), unsqueeze(g, key, 2))


def advance(g: Builder, key: ir.Value, value: ir.Value, total: ir.Value, state: ir.Value) -> ir.Value:
    """Return the state after the last token."""
    end = g.slice(total, -1, np.iinfo(np.int64).max, 2)
    added = g.op("MatMul", g.transpose(g.op("Mul", key, g.op("Exp", g.op("Sub", end, total))), 0, 1, 3, 2), value)
    return g.op("Add", g.op("Mul", g.transpose(g.op("Exp", end), 0, 1, 3, 2), state), added)


def causal(g: Builder, key: ir.Value) -> ir.Value:
    """Return `[T, 1, S]`, which is 1 where s <= t."""
    length = g.op("Squeeze", g.op("Shape", key, start=2, end=3))
    t = g.op("Range", g.const(0), length, g.const(1))
    seen = g.op("LessOrEqual", t, g.op("Unsqueeze", t, g.const([1, 2])))
    return g.op("Cast", seen, to=ir.DataType.FLOAT)


def linear_attention_function() -> ir.Function:
    """Return `com.microsoft::LinearAttention` as a model-local function, valid for the gated rule."""
    g = Builder(function=True)
    inputs = [ir.Value(name=name) for name in ("query", "key", "value", "past_state", "decay")]
    query, key, value, past, decay = inputs
    heads, d_k = (g.op("Shape", past, start=axis, end=axis + 1) for axis in (1, 2))
    output, state = pairwise_linear_attention(g, query, key, value, past, decay, heads, d_k)
    output.name, state.name = "output", "present_state"
    graph = ir.Graph(inputs, [output, state], nodes=g.nodes, opset_imports={"": OPSET})
    attributes = [
        ir.Attr(name, ir.AttributeType.UNDEFINED, None)
        for name in ("q_num_heads", "kv_num_heads", "update_rule", "scale")
    ]
    return ir.Function(CONTRIB, "LinearAttention", "", graph=graph, attributes=attributes)


class Native(Ort):
    """`Ort` with this project's CPU operators for a layer's memory, its gated unit and quantised products."""

    native = True
    domains = CONTRIB, DOMAIN

    def blocked_linear(self, x: ir.Value, matrix: Blocked, bias: ir.Value | None) -> ir.Value:
        """Return `x @ matrix^T + bias` from the codes in the file, of which the runtime makes no copy."""
        if matrix.block not in (32, 64, 128):
            return super().blocked_linear(x, matrix, bias)
        return self.g.op(
            "BlockLinear", x, *matrix.parts(), *([bias] if bias else []), domain=DOMAIN, K=matrix.width,
            N=matrix.rows, bits=matrix.bits, block_size=matrix.block, accuracy_level=INT8_ACTIVATIONS,
        )  # fmt: skip

    def gated_unit(self, gate: ir.Value, up: ir.Value, activation: str) -> ir.Value:
        """Return `activation(gate) * up`, from two products or from one that has both."""
        whole = self.g.whole(gate, up)
        inputs = [gate, up] if whole is None else [whole, None]
        return self.g.op("GatedUnit", *inputs, domain=DOMAIN, activation=list(ACTIVATIONS.values()).index(activation))
