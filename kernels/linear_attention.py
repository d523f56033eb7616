"""Gated linear attention in plain torch, chunked: the recurrence of the mixer and the judge of novelty.

Exact under strong gates: every exponent that is taken is at most zero. Which features and decay is for `ops.py` to say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ligerexport.gates import FeatureMap

CHUNK = 32
"""Tokens a chunk; the pairwise decay of a chunk takes CHUNK * CHUNK * d_k floats a head."""


def feature_map(x: Tensor, kind: FeatureMap) -> Tensor:
    """Map raw projections `[..., d_k]` to features of the recurrence."""
    return torch.softmax(x, dim=-1) if kind == "softmax" else torch.sigmoid(-x)


def gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = q_t S_t (ONNX LinearAttention, `update_rule="gated"`).

    Args:
        query: `[B, H_kv, G, T, d_k]`, the features of the G query heads of each KV head.
        key: `[B, H_kv, T, d_k]` features.
        value: `[B, H_kv, T, d_v]`.
        decay: `[B, H_kv, T, d_k]`, g in nats, at most 0.
        state: `[B, H_kv, d_k, d_v]`, S before the first token.

    Returns:
        Output `[B, H_kv, G, T, d_v]` and the state after the last token.
    """
    outputs = []
    for start in range(0, key.shape[2], CHUNK):
        q = query[:, :, :, start : start + CHUNK]
        k, v, g = (x[:, :, start : start + CHUNK] for x in (key, value, decay))
        total = g.cumsum(2)
        between = total[:, :, :, None] - total[:, :, None]  # [B, H, T, S, d_k]
        past = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril()[..., None]
        reach = torch.where(past, between, -torch.inf).exp()
        weight = torch.einsum("bhgtc,bhtsc->bhgts", q, reach * k[:, :, None])
        carried = (q * total.exp()[:, :, None]) @ state[:, :, None]
        outputs.append(carried + weight @ v[:, :, None])
        to_end = k * (total[:, :, -1:] - total).exp()
        state = total[:, :, -1, :, None].exp() * state + to_end.transpose(-1, -2) @ v
    return torch.cat(outputs, dim=3), state


def recall_error(key: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Measure how far a normalised linear memory of all earlier tokens is from each token's value.

    Args:
        key: `[B, H_kv, T, d_k]` features; all zero for a token to be ignored.
        value: `[B, H_kv, T, d_v]`.
        state: `[B, H_kv, d_k, d_v + 1]`; its last column is the sum of the features.

    Returns:
        The Euclidean norm of the error `[B, H_kv, T]` and the state after the last token.
    """
    extended = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
    earlier = (key @ key.transpose(-1, -2)).tril(-1)
    recalled = key @ state + earlier @ extended
    weight = recalled[..., -1:]
    answer = recalled[..., :-1] / torch.where(weight > 0, weight, 1.0)
    return (value - answer).norm(dim=-1), state + key.transpose(-1, -2) @ extended
