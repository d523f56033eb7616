"""Gated linear attention in plain torch, chunked: the recurrence of the mixer and the judge of novelty.

The result is exact under strong gates: every exponent is at most zero. `FEATURE_MAPS` and `DECAYS` have the functions
of the gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ligerexport.model.gates import STRONGEST, Gate

CHUNK = 32
"""Tokens per chunk; the pairwise decay of a chunk takes CHUNK * CHUNK * d_k floats per head."""


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: torch.softmax(x, dim=-1),
    "one_minus_sigmoid": lambda x: torch.sigmoid(-x),
}
"""Functions from raw projections `[..., d_k]` to features of the recurrence."""
DECAYS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logsigmoid": lambda x, divisor: logsigmoid(x) / divisor,
    "minus_exp": lambda x, divisor: -torch.exp(x.clamp_max(math.log(STRONGEST * divisor))) / divisor,
    "head_logsigmoid": lambda x, divisor: logsigmoid(x.mean(-1, keepdim=True)) / divisor,
    "head_minus_softplus": lambda x, divisor: logsigmoid(-x.mean(-1, keepdim=True)) / divisor,
}
"""Functions from raw keys `[..., d_k]` and a divisor to the decay `[..., d_k]` or `[..., 1]` in nats per token."""


def apply_gate(query: Tensor, key: Tensor, gate: Gate) -> tuple[Tensor, Tensor, Tensor]:
    """Return the features of queries and keys, and the decay in nats, all `[..., d_k]`, from raw projections."""
    query, write = FEATURE_MAPS[gate.query_map](query), FEATURE_MAPS[gate.key_map](key)
    if gate.floor:
        write = (1 - gate.floor) * write
        return query, write, torch.log1p(-write)
    return query, write, DECAYS[gate.decay](key, gate.decay_divisor).expand_as(key)


def weighted_mean(read: Tensor) -> Tensor:
    """Divide `[..., d + 1]` by its last column, the sum of weights; 0 if there are none."""
    weight = read[..., -1:]
    return read[..., :-1] / torch.where(weight > 0, weight, 1.0)


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
        weight = torch.einsum("bhgtc,bhtsc->bhgts", q, _reach(k, total))
        carried = (q * total.exp()[:, :, None]) @ state[:, :, None]
        outputs.append(carried + weight @ v[:, :, None])
        state = _advance(k, v, total, state)
    return torch.cat(outputs, dim=3), state


def row_logits(query: Tensor, key: Tensor, write: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run S_t = exp(g_t) S_{t-1} + w_t k_t^T, o_t = S_t q_t: the same recurrence, read by its columns.

    Args:
        query: `[B, H_kv, G, T, d_k]`, for the G query heads of each KV head.
        key: `[B, H_kv, T, d_k]`.
        write: `[B, H_kv, T, M]`, the share of the token's key that each of M rows takes.
        decay: `[B, H_kv, T, M]`, g in nats, at most 0.
        state: `[B, H_kv, M, d_k]`, S before the first token.

    Returns:
        Output `[B, H_kv, G, T, M]` and the state after the last token.
    """
    outputs = []
    for start in range(0, key.shape[2], CHUNK):
        q = query[:, :, :, start : start + CHUNK]
        k, w, g = (x[:, :, start : start + CHUNK] for x in (key, write, decay))
        total = g.cumsum(2)
        pairs = q @ k[:, :, None].transpose(-1, -2)  # [B, H, G, T, S]
        carried = (q @ state[:, :, None].transpose(-1, -2)) * total.exp()[:, :, None]
        outputs.append(carried + torch.einsum("bhgts,bhtsm->bhgtm", pairs, _reach(w, total)))
        state = _advance(w, k, total, state)
    return torch.cat(outputs, dim=3), state


def _reach(key: Tensor, total: Tensor) -> Tensor:
    """Return the decayed keys s at times t, `[B, H, T, S, d_k]`, 0 for later keys; `total` is the sum of decays."""
    between = total[:, :, :, None] - total[:, :, None]
    past = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()[..., None]
    return torch.where(past, between, -torch.inf).exp() * key[:, :, None]


def _advance(key: Tensor, value: Tensor, total: Tensor, state: Tensor) -> Tensor:
    """Return the state after a chunk."""
    to_end = key * (total[:, :, -1:] - total).exp()
    return total[:, :, -1, :, None].exp() * state + to_end.transpose(-1, -2) @ value


def recall_error(key: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Measure how far a normalised linear memory of all earlier tokens is from each token's value.

    Args:
        key: `[B, H_kv, T, d_k]` features; all zero for a token that is ignored.
        value: `[B, H_kv, T, d_v]`.
        state: `[B, H_kv, d_k, d_v + 1]`; its last column is the sum of the features.

    Returns:
        The Euclidean norm of the error `[B, H_kv, T]` and the state after the last token.
    """
    extended = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
    earlier = (key @ key.transpose(-1, -2)).tril(-1)
    recalled = key @ state + earlier @ extended
    return (value - weighted_mean(recalled)).norm(dim=-1), state + key.transpose(-1, -2) @ extended
