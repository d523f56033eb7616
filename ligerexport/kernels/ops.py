"""The operator of a converted layer, and the interface between models, kernels and exporters.

`liger_mixer` takes raw projections and state and returns mixed heads and state. A prompt can be cut anywhere: with the
state carried over, the output is the same. `reference.py` defines what it must compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ligerexport.kernels.cells import read_cells
from ligerexport.kernels.evicted import evicted_recurrence
from ligerexport.kernels.keyed import keyed_recurrence
from ligerexport.kernels.library.linear_attention import linear_attention
from ligerexport.kernels.library.memory_attention import BLOCK, memory_attention
from ligerexport.kernels.library.recall_error import recall_error
from ligerexport.kernels.linear_attention import weighted_mean
from ligerexport.kernels.memories import routed_recurrence
from ligerexport.kernels.memory_attention import rotary_table
from ligerexport.kernels.ragged import ragged_mixer
from ligerexport.model.gates import get_gate
from ligerexport.model.state import FORGOTTEN, MixerSpec, MixerState

__all__ = ["BLOCK", "liger_mixer", "rotary_table"]


def liger_mixer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
    score: Tensor | None = None,
    router: Tensor | None = None,
) -> tuple[Tensor, MixerState]:
    """Mix softmax over the bounded exact memory with the recurrence.

    Differentiable in query, key and value, not in state, score and router.

    Args:
        query: `[B, T, H_q, d_k]`, projected and normed as in the family, before rotary embedding.
        key: `[B, T, H_kv, d_k]`, projected and normed in the same way.
        value: `[B, T, H_kv, d_v]`.
        position: `[B]` int64, number of tokens that each sequence has seen; negative inside padding on the left.
        state: State from the last call, or `spec.initial_state`; `FORGOTTEN` in it asks for that measurement.
        rotary: `rotary_table(inv_freq, spec.max_distance, BLOCK)`.
        score: `[B, T, H_kv]` fp32, the learned score of each token; needed if `spec.config.foresees`.
        router: `[H_kv, M, d_k + 1]` fp32, which chooses the cell of an evicted token; needed if `spec.config.celled`.

    Returns:
        Output `[B, T, H_q, d_v]` in the dtype of `query`, and the new state. Sums and states are fp32, or fp64 for
        fp64.

    Raises:
        ValueError: A pool needs a `score` that is missing, or cells need a `router`.
    """
    config, arrival, present = spec.config, score, {}
    if config.foresees and score is None:
        raise ValueError("a pool ranks by a learned score, but no score was given")
    if config.celled and router is None:
        raise ValueError("cells need a router, but none was given")
    if config.ragged:
        with torch.autocast(query.device.type, enabled=False):  # it would change the types of codes and scales
            return ragged_mixer(liger_mixer, query, key, value, position, state, spec, rotary, score, router)
    if config.judged:
        arrival, present["judge_state"] = recall_error(key.detach(), value.detach(), position, state["judge_state"])
    mixed, slots, evicted = memory_attention(query, key, value, arrival, position, state, spec, rotary)
    if evicted is not None and config.celled:
        assert router is not None
        mixed, cells, share = read_cells(query, evicted, mixed, state, spec, rotary, router)
        return mixed.to(query.dtype), slots | present | cells | _measured(state, share)
    if evicted is not None:
        mixed, present["recurrent_state"], present["recurrent_mass"], share = evicted_recurrence(
            query, evicted.key, evicted.value, evicted.lost, mixed, evicted.normaliser, state["recurrent_state"],
            state["recurrent_mass"], spec, rotary,
        )  # fmt: skip
        return mixed.to(query.dtype), slots | present | _measured(state, share)
    mixed = config.attention_weight * mixed
    if config.recurrent:
        gate = get_gate(config.gate)
        padding = (position[:, None] + torch.arange(key.shape[1], device=key.device) < 0)[..., None, None]
        if config.keyed:
            recurred, present["recurrent_key"], present["recurrent_state"] = keyed_recurrence(
                query, key, value, padding, state["recurrent_key"], state["recurrent_state"], gate
            )
        elif config.routed:
            recurred, present["memory_state"] = routed_recurrence(
                query, key, value, padding, state["memory_state"], config
            )
        else:
            real_key, real_value = key.masked_fill(padding, gate.open_key), value.masked_fill(padding, 0.0)
            if gate.normalised:  # a sum of weights needs more than bf16
                weight = (~padding).to(torch.promote_types(value.dtype, torch.float32)).expand(*value.shape[:3], 1)
                real_value = torch.cat([real_value.to(weight.dtype), weight], dim=-1)
            recurred, present["recurrent_state"] = linear_attention(
                query, real_key, real_value, gate=config.gate, initial_state=state["recurrent_state"]
            )
            if gate.normalised:
                recurred = weighted_mean(recurred)
        mixed = mixed + config.recurrence_weight * recurred
    return mixed.to(query.dtype), slots | present


def _measured(state: MixerState, share: Tensor) -> MixerState:
    """Return the share of the last token, from that of each token `[B, T, H_q]`, if the state asks for it."""
    return {FORGOTTEN: share[:, -1].detach().view_as(state[FORGOTTEN])} if FORGOTTEN in state else {}
