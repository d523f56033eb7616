"""Which calls the fused kernels serve; all others run in plain torch, even on a GPU."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def fused(x: Tensor) -> bool:
    """Return whether Triton serves activations like `x`: on CUDA, and not in fp64."""
    return x.device.type == "cuda" and x.dtype != torch.float64 and _has_triton()


def watched(x: Tensor) -> bool:
    """Return whether something looks at the operators of this call: a compiler, an exporter or a dispatch mode."""
    plain = type(x) in (Tensor, torch.nn.Parameter)
    return not plain or torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
