"""Constants that several kernels use."""

from __future__ import annotations

import math

import triton.language as tl

from ligerexport.model import gates, scores

LOG2E = tl.constexpr(math.log2(math.e))
"""Bits in a nat."""
LN2 = tl.constexpr(math.log(2))
"""Nats in a bit."""
FAINTEST = tl.constexpr(scores.FAINTEST)
STRONGEST = tl.constexpr(gates.STRONGEST)
