"""`torch.ops.ligerexport.mixer_step`: one token of every sequence, in place, in one or two launches on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ligerexport.kernels.library.dispatch import fused
from ligerexport.kernels.ops import liger_mixer
from ligerexport.model.state import FUSED, MixerSpec, MixerState

CHANGED = (*FUSED, "slot_key_scale", "slot_value_scale")
"""Tensors of a state that a step changes, in the order of the operator's arguments."""


def mixer_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
    index: Tensor | None = None,
    score: Tensor | None = None,
) -> Tensor:
    """Mix one token of every sequence and update its state in place; not differentiable.

    Args:
        query: `[B, H_q, d_k]`, raw projections as in `ligerexport.kernels.ops.liger_mixer`.
        key: `[B, H_kv, d_k]`.
        value: `[B, H_kv, d_v]`.
        position: `[B]` int64, number of tokens that each sequence has seen; negative for padding.
        state: Contiguous pools `[M, ...]` by the names of `MixerSpec.state`, M at least B. On CUDA the slots end
            up in any order.
        rotary: `rotary_table(inv_freq, spec.max_distance, BLOCK, turns=True)`.
        index: `[B]` integer, the row of the pools that holds each sequence, negative to skip it; None for row b.
        score: `[B, H_kv]` fp32, the learned score; needed if `spec.config.foresees`.

    Returns:
        Output `[B, H_q, d_v]` in the dtype of `query`; zero for a sequence that is skipped or padding.

    Raises:
        ValueError: A pool needs a `score` that is missing, a tensor of the state is not contiguous, or no kernel
            computes a step of this layer: it has cells or memories, or ragged slots with a recurrence or other scores
            than a learned one.
    """
    if spec.config.foresees and score is None:
        raise ValueError("a pool ranks by a learned score, but no score was given")
    if not spec.config.fuses and not spec.splits:
        raise ValueError(
            "cells, memories, and ragged slots with a recurrence or other scores than a learned one have no fused "
            "step; use liger_mixer"
        )
    if strided := [name for name, tensor in state.items() if not tensor.is_contiguous()]:
        raise ValueError(f"the state is changed in place, so {strided[0]} has to be contiguous")
    pools = {name: state.get(name) for name in CHANGED}
    return _mixer_step(query, key, value, position, **pools, rotary=rotary, index=index, score=score, spec=spec.text)


@torch.library.custom_op("ligerexport::mixer_step", mutates_args=CHANGED)
def _mixer_step(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, slot_key: Tensor, slot_value: Tensor,
    slot_position: Tensor, slot_score: Tensor | None, recurrent_state: Tensor | None, recurrent_key: Tensor | None,
    recurrent_mass: Tensor | None, judge_state: Tensor | None, slot_key_scale: Tensor | None,
    slot_value_scale: Tensor | None, rotary: Tensor, index: Tensor | None, score: Tensor | None, spec: str,
) -> Tensor:  # fmt: skip
    tensors = (
        slot_key, slot_value, slot_position, slot_score, recurrent_state, recurrent_key, recurrent_mass, judge_state,
        slot_key_scale, slot_value_scale,
    )  # fmt: skip
    pools = {name: tensor for name, tensor in zip(CHANGED, tensors, strict=True) if tensor is not None}
    heads, layer = (query, key, value), MixerSpec.from_text(spec)
    if not fused(query):
        return _plain(heads, position, pools, layer, rotary, index, score)
    if layer.splits:
        from ligerexport.kernels.fused.ragged_step import ragged_step

        return ragged_step(heads, position, pools, layer, rotary, index, score=score)
    from ligerexport.kernels.fused.mixer_step import mixer_step as kernel

    return kernel(heads, position, pools, layer, rotary, index, score=score)


def _plain(
    heads: tuple[Tensor, Tensor, Tensor],
    position: Tensor,
    pools: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
    index: Tensor | None,
    score: Tensor | None,
) -> Tensor:
    query, _, value = heads
    rows = torch.arange(query.shape[0], device=query.device) if index is None else index.long()
    active = ((rows >= 0) & (position >= 0)).nonzero()[:, 0]
    rows = rows[active]
    output = query.new_zeros(*query.shape[:2], value.shape[2])
    if len(active):
        q, k, v = (x[active, None] for x in heads)
        state = {name: pool[rows] for name, pool in pools.items()}
        learned = None if score is None else score[active, None]
        mixed, state = liger_mixer(q, k, v, position[active], state, spec, rotary, learned)
        output[active] = mixed[:, 0]
        for name, pool in pools.items():
            pool[rows] = state[name]
    return output


@_mixer_step.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[2])
