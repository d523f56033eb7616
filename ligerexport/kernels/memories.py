"""Mixture-of-Memories (arXiv 2502.13685): a token changes and reads only the states that a router chooses by its key.

A KV head has M memories and one state that all tokens share. Each is the gated recurrence of the head. A memory that
is not chosen neither takes the token nor forgets. The router has no weights of its own: its logits are sums of groups
of channels of the projected key, which every M-th channel belongs to. So training changes it with the key projection.

All M + 1 states are heads of one linear attention. In a head that is not chosen, the token looks like padding: its gate
is open and its value is zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ligerexport.kernels.library.linear_attention import linear_attention
from ligerexport.model.config import LigerConfig
from ligerexport.model.gates import get_gate


def route(key: Tensor, memories: int) -> Tensor:
    """Return the logits of the memories, `[..., M]` fp64, from projected keys `[..., d_k]`.

    In fp64, because a choice must not depend on how a prompt is cut, which changes the order of sums.
    """
    d_k = key.shape[-1]
    group = torch.arange(d_k, device=key.device)[:, None] % memories == torch.arange(memories, device=key.device)
    return key.double() @ group.double() / math.sqrt(d_k / memories)


def choose(logits: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """Return which memories a token uses `[..., M + 1]` bool, the shared one last, and their weights `[..., M + 1]`.

    The weights of the chosen memories sum to 1 and that of the shared one is 1 (MoM, equations 3 and 4).
    """
    best = logits.topk(active, dim=-1).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)
    weights = logits.masked_fill(~chosen, -torch.inf).softmax(dim=-1)
    return torch.nn.functional.pad(chosen, (0, 1), value=True), torch.nn.functional.pad(weights, (0, 1), value=1.0)


def routed_recurrence(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, state: Tensor, config: LigerConfig
) -> tuple[Tensor, Tensor]:
    """Run the gated recurrence in the memories that each token uses.

    Differentiable in query, key and value, not through the choice of memories.

    Args:
        query: `[B, T, H_q, d_k]` as projected.
        key: `[B, T, H_kv, d_k]` as projected; the logits of the router and the gate are computed from it too.
        value: `[B, T, H_kv, d_v]`.
        padding: `[B, T, 1, 1]`, tokens that change nothing.
        state: `[B, H_kv, M + 1, d_k, d_v]` before the first token, the shared state last.
        config: The conversion.

    Returns:
        Output `[B, T, H_q, d_v]` in at least fp32, and the states after the last token.
    """
    heads, count = state.shape[1:3]
    chosen, weights = choose(route(key, config.memories), config.active)
    still = (padding | ~chosen)[..., None]  # [B, T, H_kv, M + 1, 1]
    read, state = linear_attention(
        query.unflatten(2, (heads, 1, -1)).expand(-1, -1, -1, count, -1, -1).flatten(2, 4),
        torch.where(still, get_gate(config.gate).open_key, key[:, :, :, None]).flatten(2, 3),
        torch.where(still, 0.0, value[:, :, :, None]).flatten(2, 3),
        gate=config.gate, initial_state=state.flatten(1, 2),
    )  # fmt: skip
    read = read.unflatten(2, (heads, count, -1)) * weights.to(state.dtype)[..., None, None]
    return read.sum(dim=3).flatten(2, 3), state.unflatten(1, (heads, count))
