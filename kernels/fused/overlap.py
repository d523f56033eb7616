"""Programmatic dependent launch: a kernel begins while the one before it ends, and loads what that one does not write.

Every kernel that is launched so waits before anything that depends on others, and lets the next one begin only then: at
that time all but the one before it are done. So what is loaded before the wait may be written by any but that one.
Launched otherwise, none of it does anything.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Wait for the kernel before, and let the next one begin."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
