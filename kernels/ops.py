"""The waist: one op a layer, between everything that knows a gate's name and everything that runs it.

`liger_mixer` takes raw projections and state and returns mixed heads and state. Cut a prompt anywhere, carry the
state, get the same output. `reference.py` is its truth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ligerexport.gates import get_gate
from ligerexport.kernels.linear_attention import feature_map, gated_linear_attention, recall_error
from ligerexport.kernels.memory_attention import memory_attention, rotary_table
from ligerexport.state import MixerSpec, MixerState

__all__ = ["BLOCK", "liger_mixer", "rotary_table"]

BLOCK = 64
"""Tokens that are mixed at a time; `rotary_table` must reach this far ahead."""


def liger_mixer(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, state: MixerState, spec: MixerSpec, rotary: Tensor
) -> tuple[Tensor, MixerState]:
    """Mix softmax over the bounded exact memory with the gated recurrence.

    Args:
        query: `[B, T, H_q, d_k]`, projected and normed as the family does, before rotary embedding.
        key: `[B, T, H_kv, d_k]`, likewise.
        value: `[B, T, H_kv, d_v]`.
        position: `[B]` int64, tokens that each sequence has seen; negative while its padding on the left lasts.
        state: What the last call returned, or `spec.initial_state`.
        spec: The layer.
        rotary: `rotary_table(inv_freq, spec.max_distance, BLOCK)`.

    Returns:
        Output `[B, T, H_q, d_v]` in the dtype of `query`, and the new state. Arithmetic is fp32, or fp64 for fp64.
    """
    outputs = []
    for start in range(0, query.shape[1], BLOCK):
        q, k, v = (x[:, start : start + BLOCK] for x in (query, key, value))
        output, state = _mix_block(q, k, v, position + start, state, spec, rotary)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def _mix_block(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, state: MixerState, spec: MixerSpec, rotary: Tensor
) -> tuple[Tensor, MixerState]:
    """Mix at most `BLOCK` tokens."""
    batch, length, _, _ = query.shape
    config, gate = spec.config, get_gate(spec.config.gate)
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).unflatten(2, (spec.kv_heads, -1)).permute(0, 2, 3, 1, 4)
    k, v = key.to(dtype).transpose(1, 2), value.to(dtype).transpose(1, 2)
    real = (position[:, None] + torch.arange(length, device=key.device) >= 0)[:, None, :, None]

    novelty, present = None, {}
    if config.judged:
        novelty, present["judge_state"] = recall_error(torch.softmax(k, dim=-1) * real, v, state["judge_state"])
    mixed, slots = memory_attention(q, k, v, novelty, position, state, spec, rotary)
    mixed = config.attention_weight * mixed
    if config.recurrent:
        features_q, features_k = feature_map(q, gate.query_map), feature_map(k, gate.key_map) * real
        decay = torch.nn.functional.logsigmoid(k) / gate.decay_divisor * real
        recurred, present["recurrent_state"] = gated_linear_attention(
            features_q, features_k, v, decay, state["recurrent_state"]
        )
        mixed = mixed + config.recurrence_weight * recurred
    output = mixed.permute(0, 3, 1, 2, 4).reshape(batch, length, spec.q_heads, spec.d_v)
    return output.to(query.dtype), slots | present
