"""Programmatic dependent launch: a kernel begins before the previous one ends, and loads data that it does not write.

Every kernel that is launched like this waits for the previous one, and only then lets the next one begin. So when a
kernel begins, all but the previous one have ended, and loads before the wait are safe unless it writes there. In
other launches these functions do nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Wait for the previous kernel, and let the next one begin."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(p, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr):
    """Load the first four tiles `[ROWS, COLUMNS]` of a matrix `[rows, columns]` into the L2 cache."""
    if OVERLAP:
        LINE: tl.constexpr = 1024 // p.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
        o_m = tl.minimum(tl.arange(0, ROWS), rows - 1)
        o_k = tl.minimum(tl.arange(0, 4 * COLUMNS // LINE) * LINE, columns - 1)
        address = (p + o_m[:, None] * columns + o_k[None, :]).to(tl.int64)
        code: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(code, "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)
