"""Products with weights in one launch each, with RMSNorm before and bias, gated unit and residual after.

For one row, each weight is read once and sums are fp32; memory limits the speed. More rows are tiles of a matrix
product; their norm is a launch of its own, which also computes a second product of few outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused.overlap import prefetch, wait
from ligerexport.kernels.linear import ACTIVATIONS, LinearSpec
from ligerexport.kernels.tuning import get_product_tile, overlaps

FEW_ROWS = 64
"""Largest number of rows in a step of many sequences, whose launches overlap; a prompt has more."""
SMALL_WEIGHT = 1 << 22
"""Largest weight, in elements, for which the product of a few rows overlaps; above it was slower (H100, 16 rows)."""


def linear(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    spec: LinearSpec,
    *,
    out: Tensor,
    side: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Compute `spec`; the other arguments are those of `ligerexport.kernels.linear.linear`, all contiguous.

    Args:
        out: `[M, N]` to write to, fp32 or of the weight's type, depending on `spec.wide`.
        side: Weight `[S, K]` and bias `[S]` of the second product, and its result `[M, S]`, all fp32.
        scale: `[N]`, or `[2 N]` of a gated unit, fp32: what a row of codes is multiplied with, for a coded weight.

    Returns:
        `out`.
    """
    rows, (n, k) = x.shape[0], (spec.outputs, spec.inputs)
    if spec.indexed:
        _look_up_kernel[(rows,)](x, weight, scale, out, N=n, K=k, BLOCK=triton.next_power_of_2(n), num_warps=4)
        return out
    gate = 0 if spec.activation is None else 1 + ACTIVATIONS.index(spec.activation)
    epsilon = spec.epsilon or 0.0
    tile = get_product_tile(rows, n, k, weight.element_size(), gate > 0)
    few = rows <= FEW_ROWS
    overlap = few and overlaps()
    if rows == 1:
        _row_kernel[(triton.cdiv(n, tile.block_n) + spec.side,)](
            x, weight.view(torch.int32) if spec.coded else weight, scale, norm, bias, residual, out,
            *(side or (None,) * 3), N=n, K=k, EPSILON=epsilon, GATE=gate, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            OVERLAP=overlap, num_warps=tile.warps,
        )  # fmt: skip
        return out
    kind = torch.float16 if spec.coded else weight.dtype
    if norm is not None or side is not None:
        normed = None if norm is None else torch.empty(rows, k, dtype=kind, device=x.device)
        block = triton.next_power_of_2(k)
        height = 1 if few else max(1, min(4, 16384 // block))
        sides = 1 if few else max(1, spec.side)  # per program; few rows would otherwise give few programs
        _norm_kernel[(triton.cdiv(rows, height), triton.cdiv(max(1, spec.side), sides))](
            x, norm, normed, *(side or (None,) * 3), rows, K=k, S=spec.side, SIDES=sides, EPSILON=epsilon,
            BLOCK_M=height, BLOCK_K=block, OVERLAP=overlap, num_warps=8 if block > 2048 else 4,
        )  # fmt: skip
        x = x if normed is None else normed
    precision = "ieee" if kind == torch.float32 else "tf32"
    _tile_kernel[(triton.cdiv(rows, tile.block_m), triton.cdiv(n, tile.block_n))](
        x, weight, scale, bias, residual, out, rows, N=n, K=k, GATE=gate, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, PRECISION=precision, OVERLAP=overlap and n * k <= SMALL_WEIGHT,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@triton.jit
def _activate(x, GATE: tl.constexpr):
    if GATE == 1:
        return x * tl.sigmoid(x)
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(y)) / 2 = sigmoid(2 y)


@triton.jit
def _load(p, m_rows, m_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a tile of weights, with masks only if some of its rows or columns do not exist."""
    if ROWS and COLUMNS:
        return tl.load(p)
    if COLUMNS:
        return tl.load(p, mask=m_rows[:, None], other=0.0)
    return tl.load(p, mask=m_rows[:, None] & m_columns[None, :], other=0.0)


@triton.jit
def _wide(code):
    """Return codes without their zero point in fp32: as last bits of 2 ** 23, because GPUs convert integers slowly."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _products(weight, x, p_scale, DEPTH: tl.constexpr):
    """Return the products of a tile and a row; with four codes in an integer, the sums of its four."""
    if p_scale is None:
        y = weight.to(tl.float32) * x[None, :]
    else:
        even, odd = tl.split(tl.reshape(x, (DEPTH, 2, 2)))
        x_0, x_2 = tl.split(even)
        x_1, x_3 = tl.split(odd)
        y = _wide(weight & 255) * x_0[None, :] + _wide((weight >> 8) & 255) * x_1[None, :]
        y += _wide((weight >> 16) & 255) * x_2[None, :] + _wide((weight >> 24) & 255) * x_3[None, :]
    return y


@triton.jit
def _input(p_x, p_norm, o_k, m_k, squares):
    """Load elements of one row, with the norm's weight but without its factor, and sum their squares."""
    x = tl.load(p_x + o_k, mask=m_k, other=0.0).to(tl.float32)
    if p_norm is not None:
        squares += x * x
        x *= tl.load(p_norm + o_k, mask=m_k, other=0.0)
    return x, squares


@triton.jit
def _factor(p_norm, squares, K: tl.constexpr, EPSILON: tl.constexpr):
    """Return the norm's factor."""
    if p_norm is not None:
        return tl.rsqrt(tl.sum(squares, axis=0) / K + EPSILON)
    return 1.0


@triton.jit
def _row_kernel(
    p_x, p_weight, p_scale, p_norm, p_bias, p_residual, p_out, p_side_weight, p_side_bias, p_side_out,
    N: tl.constexpr, K: tl.constexpr, EPSILON: tl.constexpr, GATE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute a block of outputs of one row, or one output of the second product. Grid: (N / BLOCK_N + S,)."""
    ROWS: tl.constexpr = N % BLOCK_N == 0
    COLUMNS: tl.constexpr = K % BLOCK_K == 0
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    if p_side_out is not None:  # noqa: SIM102, because the compiler knows only the first
        if tl.program_id(0) >= BLOCKS:
            wait(OVERLAP)
            _side_output(p_x, p_side_weight, p_norm, p_side_bias, p_side_out, tl.program_id(0) - BLOCKS, K, EPSILON,
                         BLOCK_K)  # fmt: skip
            return
    PACKED: tl.constexpr = 1 if p_scale is None else 4
    WIDTH: tl.constexpr = K // PACKED
    DEPTH: tl.constexpr = BLOCK_K // PACKED
    first = tl.program_id(0) * BLOCK_N
    o_n, o_k, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, DEPTH)
    m_n = first + o_n < N
    p_weight += first.to(tl.int64) * WIDTH + o_n[:, None] * WIDTH + o_d[None, :]
    p_up = p_weight + N * WIDTH if GATE else p_weight
    sums = tl.zeros((BLOCK_N, DEPTH), tl.float32)
    up_sums = tl.zeros((BLOCK_N, DEPTH), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    # the first weights are loaded before x arrives
    weight = _load(p_weight, m_n, o_d < WIDTH, ROWS, COLUMNS)
    up = _load(p_up, m_n, o_d < WIDTH, ROWS, COLUMNS) if GATE else weight
    wait(OVERLAP)
    for k in range(0, K, BLOCK_K):
        m_k = k + o_k < K
        x, squares = _input(p_x, p_norm, k + o_k, m_k, squares)
        sums += _products(weight, x, p_scale, DEPTH)
        if GATE:
            up_sums += _products(up, x, p_scale, DEPTH)
        if k + BLOCK_K < K:
            at = (k + BLOCK_K) // PACKED
            weight = _load(p_weight + at, m_n, at + o_d < WIDTH, ROWS, COLUMNS)
            if GATE:
                up = _load(p_up + at, m_n, at + o_d < WIDTH, ROWS, COLUMNS)
    factor = _factor(p_norm, squares, K, EPSILON)
    y = tl.sum(sums, axis=1) * factor
    o_n += first
    if p_scale is not None:
        y *= tl.load(p_scale + o_n, mask=m_n, other=0.0)
    if p_bias is not None:
        y += tl.load(p_bias + o_n, mask=m_n, other=0.0)
    if GATE:
        up_y = tl.sum(up_sums, axis=1) * factor
        if p_scale is not None:
            up_y *= tl.load(p_scale + N + o_n, mask=m_n, other=0.0)
        if p_bias is not None:
            up_y += tl.load(p_bias + N + o_n, mask=m_n, other=0.0)
        y = _activate(y, GATE) * up_y
    if p_residual is not None:
        y += tl.load(p_residual + o_n, mask=m_n, other=0.0)
    tl.store(p_out + o_n, y.to(p_out.dtype.element_ty), mask=m_n)


@triton.jit
def _side_output(
    p_x, p_weight, p_norm, p_bias, p_out, n, K: tl.constexpr, EPSILON: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Compute output n of the second product of one row."""
    o_k = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_K,), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = k + o_k < K
        x, squares = _input(p_x, p_norm, k + o_k, m_k, squares)
        sums += x * tl.load(p_weight + n * K + k + o_k, mask=m_k, other=0.0)
    y = tl.sum(sums, axis=0) * _factor(p_norm, squares, K, EPSILON)
    tl.store(p_out + n, y + tl.load(p_bias + n))


@triton.jit
def _norm_kernel(
    p_x, p_norm, p_out, p_side_weight, p_side_bias, p_side_out, rows,
    K: tl.constexpr, S: tl.constexpr, SIDES: tl.constexpr, EPSILON: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute the RMSNorm of some rows, and part of a second product. Grid: (M / BLOCK_M, S / SIDES), at least one."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_k = o_m < rows, o_k < K
    at, m_x = o_m[:, None] * K + o_k[None, :], m_m[:, None] & m_k[None, :]
    wait(OVERLAP)
    x = tl.load(p_x + at, mask=m_x, other=0.0).to(tl.float32)
    if p_norm is not None:
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / K + EPSILON)
        x *= factor[:, None] * tl.load(p_norm + o_k, mask=m_k, other=0.0)[None, :]
        if tl.program_id(1) == 0:
            tl.store(p_out + at, x.to(p_out.dtype.element_ty), mask=m_x)
    if p_side_out is not None:
        for i in range(SIDES):
            s = tl.program_id(1) * SIDES + i
            y = tl.sum(x * tl.load(p_side_weight + s * K + o_k, mask=m_k, other=0.0)[None, :], axis=1)
            tl.store(p_side_out + o_m * S + s, y + tl.load(p_side_bias + s), mask=m_m)


@triton.jit
def _look_up_kernel(p_id, p_weight, p_scale, p_out, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Write the row of codes `[K, N]` that an id names, times its scale; zeros where there is none. Grid: (M,)."""
    row, o_n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    i = tl.load(p_id + row).to(tl.int64)
    known = (i >= 0) & (i < K)
    codes = tl.load(p_weight + i * N + o_n, mask=(o_n < N) & known, other=0)
    scale = tl.load(p_scale + i, mask=known, other=0.0)
    tl.store(p_out + row * N + o_n, _wide(codes.to(tl.uint32)) * scale, mask=o_n < N)


@triton.jit
def _zeros(p_scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return what `_dot` adds to."""
    if p_scale is None:
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    return y


@triton.jit
def _dot(x, weight, y, p_scale, PRECISION: tl.constexpr):
    """Add x @ weight^T, or its transpose for codes."""
    if p_scale is None:
        y = tl.dot(x, tl.trans(weight), y, input_precision=PRECISION)
    else:
        half = (weight.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0  # as in `_wide`
        y = tl.dot(half, tl.trans(x), y)
    return y


@triton.jit
def _scaled(y, p_scale, o_n, m_n):
    """Return the sums of a tile; those of codes are transposed and multiplied with the scales of their outputs."""
    if p_scale is not None:
        y = tl.trans(y) * tl.load(p_scale + o_n, mask=m_n, other=0.0)[None, :]
    return y


@triton.jit
def _tile_kernel(
    p_x, p_weight, p_scale, p_bias, p_residual, p_out, rows,
    N: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute some outputs of some rows. Grid: (M / BLOCK_M, N / BLOCK_N).

    Programs that run at a time share rows and weights: numbers go through 16 blocks of rows before the next outputs.
    Codes become fp16 in registers, from which tensor cores take only the left side of a product, so y is transposed.
    """
    ROWS: tl.constexpr = N % BLOCK_N == 0
    COLUMNS: tl.constexpr = K % BLOCK_K == 0
    rows_blocks, number = tl.num_programs(0), tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    band, number = number // (16 * tl.num_programs(1)), number % (16 * tl.num_programs(1))
    height = tl.minimum(rows_blocks - 16 * band, 16)
    top, first = (16 * band + number % height) * BLOCK_M, number // height * BLOCK_N
    o_m, o_n, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_m, m_n = top + o_m < rows, first + o_n < N
    p_x += top.to(tl.int64) * K + o_m[:, None] * K + o_k[None, :]
    p_weight += first.to(tl.int64) * K
    prefetch(p_weight, N - first, K, BLOCK_N, BLOCK_K, OVERLAP)
    if GATE:
        prefetch(p_weight + N * K, N - first, K, BLOCK_N, BLOCK_K, OVERLAP)
    wait(OVERLAP)
    p_weight += o_n[:, None] * K + o_k[None, :]
    y = _zeros(p_scale, BLOCK_M, BLOCK_N)
    if GATE:
        p_up = p_weight + N * K
        up_y = _zeros(p_scale, BLOCK_M, BLOCK_N)
    for k in range(0, K, BLOCK_K):
        m_k = k + o_k < K
        x = _load(p_x + k, m_m, m_k, False, COLUMNS)
        weight = _load(p_weight + k, m_n, m_k, ROWS, COLUMNS)
        y = _dot(x, weight, y, p_scale, PRECISION)
        if GATE:
            up = _load(p_up + k, m_n, m_k, ROWS, COLUMNS)
            up_y = _dot(x, up, up_y, p_scale, PRECISION)
    o_n += first
    y = _scaled(y, p_scale, o_n, m_n)
    if p_bias is not None:
        y += tl.load(p_bias + o_n, mask=m_n, other=0.0)[None, :]
    if GATE:
        up_y = _scaled(up_y, None if p_scale is None else p_scale + N, o_n, m_n)
        if p_bias is not None:
            up_y += tl.load(p_bias + N + o_n, mask=m_n, other=0.0)[None, :]
        y = _activate(y, GATE) * up_y
    at = top.to(tl.int64) * N + o_m[:, None] * N + o_n[None, :]
    m_out = m_m[:, None] & m_n[None, :]
    if p_residual is not None:
        y += tl.load(p_residual + at, mask=m_out, other=0.0)
    tl.store(p_out + at, y.to(p_out.dtype.element_ty), mask=m_out)
