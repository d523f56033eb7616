"""The recurrence over evicted tokens, which approximates the softmax over the tokens that the memory does not keep.

Softmax over the n evicted tokens would weigh a value by exp(q k). To first order around the mean logit m, the sum of
these weights is n exp(m), and the sum of the weighted values is exp(m) ((1 - m) sum v + q sum k v). This is linear
attention with the key features 1 and k and the query features 1 - m and q; it shares the softmax's denominator. By
Jensen's inequality, n exp(m) is never more than the weight that the softmax itself would have given these tokens.

A sum does not know the distance to each token, so all are read at one distance. Channels that turn by more than 90
degrees over it are left out, since over many tokens they average out. Channel 0, the fastest, carries the feature 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ligerexport.kernels.library.linear_attention import linear_attention
from ligerexport.kernels.memory_attention import rotate
from ligerexport.model.state import MixerSpec

BLOCK = 64
"""Number of tokens that one product sums."""


def slow_rotation(rotary: Tensor, spec: MixerSpec) -> tuple[Tensor, Tensor]:
    """Return the rotation of a query by the distance, `[2, R]`, zero for fast channels, and a mask of the rest, `[R]`.

    Args:
        rotary: `rotary_table(inv_freq, spec.max_distance, ahead)`.
    """
    distance = min(spec.config.recurrence_distance, spec.max_distance)
    cos, sin = rotary[:, spec.max_distance - 1].double()  # one token back
    # a CUDA graph cannot set one element to a number from the host
    slow = (torch.atan2(-sin, cos) * distance <= math.pi / 2) & (torch.arange(len(cos), device=cos.device) > 0)
    cos, sin = rotary[:, spec.max_distance - distance]
    return torch.stack([cos, -sin]).where(slow, 0.0), slow


def evicted_recurrence(
    query: Tensor,
    lost_key: Tensor,
    lost_value: Tensor,
    lost: Tensor,
    mixed: Tensor,
    normaliser: Tensor,
    state: Tensor,
    mass: Tensor,
    spec: MixerSpec,
    rotary: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add the evicted tokens to a softmax.

    Args:
        query: `[B, T, H_q, d_k]` before rotary embedding.
        lost_key: `[B, T, H_kv, d_k]`, key of the token that each step evicts, before rotary embedding.
        lost_value: `[B, T, H_kv, d_v]`, its value.
        lost: `[B, T, H_kv]`, whether a step evicts a token.
        mixed: `[B, T, H_q, d_v]`, output of the softmax.
        normaliser: `[B, T, H_q]`, logarithm of the denominator of `mixed`.
        state: `[B, H_kv, d_k, d_v]`, sum of the products of features and values so far.
        mass: `[B, H_kv, d_k]`, sum of the features; the first is the number of tokens.
        rotary: `rotary_table(inv_freq, spec.max_distance, ahead)`.

    Returns:
        Output `[B, T, H_q, d_v]`, new state, new mass, and the share of the attention that fell on evicted tokens
        `[B, T, H_q]`; all in at least fp32.
    """
    dtype, heads = torch.promote_types(query.dtype, torch.float32), lost_key.shape[2]
    with torch.autocast(query.device.type, enabled=False):  # sums over thousands of tokens need more than bf16
        (cos, sin), slow = slow_rotation(rotary.to(dtype), spec)
        one = torch.nn.functional.one_hot(torch.zeros((), dtype=torch.long, device=query.device), query.shape[-1])
        there = lost[..., None].to(dtype)
        key = (lost_key.to(dtype) * _both_halves(slow.to(dtype), query.shape[-1]) + one) * there
        value = torch.where(lost[..., None], lost_value, 0.0)
        sums = mass[:, None] + _running_sum(key)

        count = sums[..., :1].detach()  # [B, T, H_kv, 1]
        turned = rotate(query.to(dtype), cos, sin).unflatten(2, (heads, -1)) * spec.scale  # 0 in channel 0
        mean = (turned * sums[..., None, :]).sum(dim=-1) / count.clamp_min(1)  # [B, T, H_kv, G]
        features = (turned + (1 - mean)[..., None] * one).flatten(2, 3)
        # sums of many values exceed fp16; the kernels take its operands in bf16 anyway
        narrow = torch.bfloat16 if query.dtype == torch.float16 else query.dtype
        q, k, v = (x.to(narrow) for x in (features, key, value))
        read, state = linear_attention(q, k, v, torch.zeros_like(k), initial_state=state)

        there = (count > 0).expand_as(mean)
        logit = mean + torch.where(there, count * spec.config.recurrence_weight, 1.0).log()
        logit = torch.where(there, logit - normaliser.unflatten(2, (heads, -1)), -torch.inf)
        share = torch.sigmoid(logit).flatten(2, 3)
        count = count.expand_as(mean).flatten(2, 3)[..., None]
        output = mixed.to(dtype) + share[..., None] * (read / count.clamp_min(1) - mixed)
        return output, state, sums[:, -1].detach(), share


def _both_halves(x: Tensor, width: int) -> Tensor:
    """Expand `[R]`, one number per rotated pair, to `[width]` channels; channels that are not rotated get 1."""
    return torch.nn.functional.pad(torch.cat([x, x]), (0, width - 2 * len(x)), value=1.0)


def _running_sum(x: Tensor) -> Tensor:
    """Return `x.cumsum(dim=1)` of `[B, T, H, d]` as products within blocks: a scan over strided memory is slow."""
    length = x.shape[1]
    block = min(BLOCK, length)
    blocks = torch.nn.functional.pad(x.flatten(2), (0, 0, 0, -length % block)).unflatten(1, (-1, block))
    within = torch.ones(block, block, dtype=x.dtype, device=x.device).tril() @ blocks  # [B, blocks, block, H d]
    total = within[:, :, -1]
    return (within + (total.cumsum(dim=1) - total)[:, :, None]).flatten(1, 2)[:, :length].unflatten(2, x.shape[2:])
