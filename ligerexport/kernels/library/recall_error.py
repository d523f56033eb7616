"""`torch.ops.ligerexport.recall_error`: the judge of novelty, Triton on CUDA and plain torch on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ligerexport.kernels.library.dispatch import fused
from ligerexport.kernels.linear_attention import recall_error as plain_recall_error

BLOCK = 64
"""Number of tokens that plain torch judges at a time."""


@torch.library.custom_op("ligerexport::recall_error", mutates_args=())
def recall_error(key: Tensor, value: Tensor, position: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Measure how far a normalised linear memory of all earlier tokens is from each token's value.

    Not differentiable, since a score only ranks.

    Args:
        key: `[B, T, H_kv, d_k]`, raw projections; the memory takes their softmax over the head dimension.
        value: `[B, T, H_kv, d_v]`.
        position: `[B]` int64, position of the first token; tokens at negative positions are padding and change nothing.
        state: `[B, H_kv, d_k, d_v + 1]` fp32, the memory; its last column is the sum of the features.

    Returns:
        The Euclidean norm of the error `[B, T, H_kv]` fp32, and the memory after the last token.
    """
    if not fused(key):
        return _plain(key, value, position, state)
    from ligerexport.kernels.fused.recall_error import recall_error as kernel

    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    return kernel(key, value, position, state.contiguous())


def _plain(key: Tensor, value: Tensor, position: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    length = key.shape[1]
    k, v = key.to(state.dtype).transpose(1, 2), value.to(state.dtype).transpose(1, 2)
    real = (position[:, None] + torch.arange(length, device=key.device) >= 0)[:, None, :, None]
    features = torch.softmax(k, dim=-1) * real
    errors = []
    for start in range(0, length, BLOCK):
        error, state = plain_recall_error(features[:, :, start : start + BLOCK], v[:, :, start : start + BLOCK], state)
        errors.append(error)
    return torch.cat(errors, dim=2).transpose(1, 2).contiguous(), state


@recall_error.register_fake
def _(key: Tensor, value: Tensor, position: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return key.new_empty(key.shape[:3], dtype=state.dtype), torch.empty_like(state)
