"""Level 1: fused products with weights, one row and many, against fp64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ligerexport.kernels.fused.linear import linear
from ligerexport.kernels.linear import LinearSpec
from ligerexport.kernels.linear import linear as plain

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALVES = (torch.float16, torch.bfloat16) if GPU else (torch.float16,)  # the interpreter has no product in bf16
ERRORS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SIZES = [(40, 72), (130, 128), *([(3, 576), (576, 1536), (4096, 4096), (14336, 4096)] if GPU else [(3, 2112)])]


def make_inputs(rows: int, spec: LinearSpec, dtype: torch.dtype) -> list[Tensor | None]:
    height = spec.outputs * (1 if spec.activation is None else 2)
    with torch.device(DEVICE):
        x = torch.randn(rows, spec.inputs)
        weight = torch.randn(height, spec.inputs) / spec.inputs**0.5
        norm = torch.rand(spec.inputs) + 0.5 if spec.epsilon is not None else None
        bias = torch.randn(height) if spec.bias else None
        residual = torch.randn(rows, spec.outputs) if spec.residual else None
    return [x if spec.epsilon is not None else x.to(dtype), weight.to(dtype), norm, bias, residual]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", SIZES)
def test_equals_plain(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Every element is written and right, with any operation before and after the product."""
    torch.manual_seed(0)
    forms = product((None, 1e-5), (None, "silu", "gelu"), (False, True), (False, True), (False, True))
    for i, (epsilon, activation, bias, residual, wide) in enumerate(forms):
        whole = i % 5 == 0 if GPU else i % 16 == 5  # each takes compiling, or interpreting
        if size[0] > 500 and not whole:
            continue
        for rows in (1, 2, 17, 70) if whole else ((1, 5)[i % 2],):
            outputs = size[0] if GPU or rows > 1 else min(size[0], 12)  # each output of one row is a program
            spec = LinearSpec(outputs, size[1], epsilon, activation, bias, residual, wide)
            inputs = make_inputs(rows, spec, dtype)
            kind = torch.float32 if wide else dtype
            out = torch.full((rows, outputs), float("nan"), dtype=kind, device=DEVICE)
            assert linear(*inputs, spec, out=out) is out  # type: ignore[arg-type, call-arg, misc]
            exact = plain(*(x if x is None else x.double() for x in inputs), spec)  # type: ignore[arg-type, call-arg, misc]
            error = ((out.double() - exact).norm() / exact.norm()).item()
            assert error < ERRORS[dtype], (spec, rows, error)


@pytest.mark.parametrize("size", SIZES)
def test_codes(size: tuple[int, int]) -> None:
    """Weights in int8 with a scale for each row, all 256 codes among them."""
    torch.manual_seed(0)
    for i, (epsilon, activation, more, wide) in enumerate(product((None, 1e-5), (None, "silu"), *[(False, True)] * 2)):
        whole = GPU or i in (3, 12)
        if size[0] > 500 and not whole:
            continue
        for rows in (1, 2, 17, 70) if whole else ((1, 5)[i % 2],):
            outputs = size[0] if GPU or rows > 1 else min(size[0], 12)
            spec = LinearSpec(outputs, size[1], epsilon, activation, more, more, wide, coded=True)
            x, weight, *rest = make_inputs(rows, spec, torch.float16)
            assert x is not None and weight is not None
            codes = torch.randint(256, weight.shape, dtype=torch.uint8, device=DEVICE)
            codes.view(-1)[:256] = torch.arange(256)
            scale = (torch.rand(len(codes), device=DEVICE) + 0.5) / (74 * size[1] ** 0.5)
            kind = torch.float32 if wide else torch.float16
            out = torch.full((rows, outputs), float("nan"), dtype=kind, device=DEVICE)
            linear(x, codes, *rest, spec, out=out, scale=scale)
            exact = plain(x.double(), (codes.double() - 128) * scale.double()[:, None], *rest, spec)
            error = ((out.double() - exact).norm() / exact.norm()).item()
            assert error < ERRORS[torch.float16], (spec, rows, error)


def test_rows_of_codes() -> None:
    """An id outside of the weight has no row."""
    spec = LinearSpec(40, 33, wide=True, coded=True, indexed=True)
    codes, scale = torch.randint(256, (33, 40), dtype=torch.uint8, device=DEVICE), torch.rand(33, device=DEVICE)
    ids = torch.tensor([[3], [32], [-1], [33], [0]], dtype=torch.int32, device=DEVICE)
    out = torch.full((5, 40), float("nan"), device=DEVICE)
    linear(ids, codes, None, None, None, spec, out=out, scale=scale)
    rows = (codes.float() - 128) * scale[:, None]
    torch.testing.assert_close(out, torch.stack([rows[3], rows[32], *torch.zeros(2, 40, device=DEVICE), rows[0]]))


def test_large_rows_do_not_overflow() -> None:
    """Half precision stores the normalised values, not the input."""
    spec = LinearSpec(32, 64, 1e-5)
    for rows in (1, 3):
        x, weight, norm, *rest = make_inputs(rows, spec, torch.float16)
        assert x is not None and weight is not None
        out = torch.empty(rows, 32, dtype=torch.float16, device=DEVICE)
        linear(x * 1e6, weight, norm, *rest, spec, out=out)
        exact = plain(x * 1e6, weight, norm, *rest, spec)
        torch.testing.assert_close(out, exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("epsilon", [None, 1e-5])
@pytest.mark.parametrize("rows", [1, 5, 66])
def test_side(rows: int, epsilon: float | None) -> None:
    """A second product of the same normalised input, in fp32 beside one in half precision."""
    spec = LinearSpec(70, 96, epsilon, side=3)
    x, weight, norm, *rest = make_inputs(rows, spec, torch.float16)
    _, side_weight, _, bias, _ = make_inputs(rows, spec.of_side(), torch.float32)
    out = torch.full((rows, 70), float("nan"), dtype=torch.float16, device=DEVICE)
    beside = torch.full((rows, 3), float("nan"), device=DEVICE)
    assert x is not None and weight is not None and side_weight is not None and bias is not None
    linear(x, weight, norm, *rest, spec, out=out, side=(side_weight, bias, beside))
    exact = plain(x, weight, norm, *rest, spec)
    torch.testing.assert_close(out, exact, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(beside, plain(x, side_weight, norm, bias, None, spec.of_side()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2048, 4111])
def test_blocks_of_rows(rows: int) -> None:
    """Every block of rows meets every block of outputs if they are numbered in bands and the last band is smaller."""
    spec = LinearSpec(600, 64)
    inputs = make_inputs(rows, spec, torch.float16)
    out = torch.full((rows, 600), float("nan"), dtype=torch.float16, device=DEVICE)
    linear(*inputs, spec, out=out)  # type: ignore[arg-type, call-arg, misc]
    torch.testing.assert_close(out, plain(*inputs, spec), rtol=2e-3, atol=2e-3)  # type: ignore[arg-type, call-arg, misc]
