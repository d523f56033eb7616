"""The operator for products with block-quantised matrices in their file layout, against the matrices' values."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from ligerexport.exporters.onnx.native import DOMAIN, register
from ligerexport.exporters.onnx.quantise import Blocks, dequantise, pack

ROWS = 37
LARGEST = {4: 127, 8: 32639}
"""Integer to which the largest of 32 inputs is rounded, by the number of bits of a code."""


def matrix(width: int, bits: int, block: int) -> tuple[Blocks, np.ndarray]:
    """Return random blocks, and the matrix `[ROWS, width]` of their values."""
    random = np.random.default_rng(width * block + bits)
    shape = ROWS, -(-width // block)
    codes = random.integers(0, 2**bits, (ROWS, shape[1] * block), np.uint8)
    scale = random.uniform(1e-3, 1, shape).astype(np.float32)
    blocks = Blocks(codes, scale, random.integers(0, 2**bits, shape, np.uint8))
    return blocks, dequantise(blocks, width)


def multiply(x: np.ndarray, blocks: Blocks, bits: int, block: int, bias: np.ndarray | None, level: int) -> np.ndarray:
    """Run only the operator."""
    width, count = x.shape[1], blocks.scale.shape[1]
    stored = {
        "codes": pack(blocks.codes, bits).reshape(ROWS, count, -1),
        "scale": blocks.scale,
        "zero": pack(blocks.zero_point, bits),
    } | ({} if bias is None else {"bias": bias})
    node = helper.make_node(
        "BlockLinear", ["x", *stored], ["y"], domain=DOMAIN, K=width, N=ROWS, bits=bits, block_size=block,
        accuracy_level=level,
    )  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in "xy"]
    initializers = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in stored.items()]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    register(options)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [40, 96, 160, 256, 576])
def test_product_is_that_of_the_matrix(width: int, bits: int, block: int) -> None:
    """Widths that end within a unit, a pair of units and a group; tokens that fill a tile, and too few for a tile."""
    blocks, expected = matrix(width, bits, block)
    random = np.random.default_rng(0)
    for tokens in (1, 3, 4, 13):
        sizes = np.float32([[1e-3], [1], [50]])[np.arange(tokens) % 3]
        x = random.normal(size=(tokens, width)).astype(np.float32) * sizes
        wanted, fp32 = x.astype(np.float64) @ expected.T, 2e-6 * np.abs(x) @ np.abs(expected.T)
        steps = [np.abs(x[:, i : i + 32]).max(1) / LARGEST[bits] for i in range(0, width, 32)]
        rounding = np.stack(steps, 1).repeat(32, 1)[:, :width] / 2 @ np.abs(expected.T)
        for level, most in ((1, fp32), (4, fp32 + rounding)):
            assert (np.abs(multiply(x, blocks, bits, block, None, level) - wanted) <= most).all(), (tokens, level)


def test_bias_is_added() -> None:
    blocks, _ = matrix(96, 4, 32)
    x, bias = np.ones((3, 96), np.float32), np.arange(ROWS, dtype=np.float32)
    plain, shifted = (multiply(x, blocks, 4, 32, added, 4) for added in (None, bias))
    np.testing.assert_array_equal(shifted, plain + bias)


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_on_two_threads_are_those_of_one_token_each(bits: int) -> None:
    blocks, _ = matrix(576, bits, 32)
    x = np.random.default_rng(1).normal(size=(67, 576)).astype(np.float32)
    whole = multiply(x, blocks, bits, 32, None, 4)
    apart = np.concatenate([multiply(row[None], blocks, bits, 32, None, 4) for row in x[::13]])
    np.testing.assert_allclose(whole[::13], apart, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_that_are_not_finite_stay_visible(bits: int, bad: float) -> None:
    blocks, _ = matrix(96, bits, 32)
    x = np.ones((2, 96), np.float32)
    x[1, 40] = bad
    found = multiply(x, blocks, bits, 32, None, 4)
    assert np.isfinite(found[0]).all() and not np.isfinite(found[1]).any()
