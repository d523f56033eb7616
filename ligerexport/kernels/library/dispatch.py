"""Which calls the fused kernels serve; all others run in plain torch, even on a GPU."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def fused(x: Tensor) -> bool:
    """Return whether Triton serves activations like `x`: on CUDA, and not in fp64."""
    return x.device.type == "cuda" and x.dtype != torch.float64 and _has_triton()
