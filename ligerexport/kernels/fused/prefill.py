"""A whole chunk of `liger_mixer` in kernels only, so that it can be planned ahead of time for callers without torch.

The kernels of novelty, memory and recurrences are beside this file; this file has those that combine them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused import linear_attention, memory_attention
from ligerexport.kernels.fused.evicted_prefill import evicted_prefill
from ligerexport.kernels.fused.keyed import keyed_recurrence
from ligerexport.kernels.fused.recall_error import recall_error
from ligerexport.model.gates import get_gate
from ligerexport.model.state import MixerSpec, MixerState


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor | None,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
) -> tuple[Tensor, MixerState]:
    """Run `liger_mixer`, with the same arguments and results."""
    config, judged = spec.config, {}
    if config.judged:
        score, judged["judge_state"] = recall_error(key, value, position, state["judge_state"])
    attended = memory_attention.forward(query, key, value, score, position, state, spec, rotary)
    present, recurred = attended.present | judged, attended.output
    if config.evicts:
        return attended.output, present | evicted_prefill(query, key, attended, state, spec, rotary)
    if not config.recurrent and config.attention_weight == 1:
        return attended.output, present
    batch, tokens = query.shape[:2]
    if config.keyed:
        rows = state["recurrent_key"], state["recurrent_state"]
        last_key, last = torch.empty_like(rows[0]), torch.empty_like(rows[1])
        recurred = query.new_empty(*query.shape[:3], spec.d_v, dtype=torch.float32)
        keyed_recurrence((query, key, value), position, rows, (last_key, last), recurred, spec)
        present = present | {"recurrent_key": last_key, "recurrent_state": last}
    elif config.recurrent:
        real_key = key.new_empty(key.shape)
        # a sum of weights needs more than 16 bits
        real_value = value.new_empty(*value.shape[:3], spec.columns, dtype=torch.float32 if config.normalised else None)
        for x, real, hidden in ((key, real_key, get_gate(config.gate).open_key), (value, real_value, 0.0)):
            hide_padding[tokens, spec.kv_heads, batch](
                x, real, position, tokens, *x.stride()[:3], HIDDEN=hidden, HEADS=spec.kv_heads, WIDTH=x.shape[3],
                WIDER=real.shape[3], BLOCK=triton.next_power_of_2(real.shape[3]), num_warps=1,
            )  # fmt: skip
        past = state["recurrent_state"]
        recurred, final, _ = linear_attention.forward(query, real_key, real_value, None, past, None, config.gate, 1.0)
        present = present | {"recurrent_state": final}
    return blend_outputs(attended.output, recurred, spec), present


def blend_outputs(attended: Tensor, recurred: Tensor, spec: MixerSpec) -> Tensor:
    """Return the weighted sum of two outputs `[B, T, H_q, d_v]`, or of the first one if there is no recurrence.

    The second has one more column if the recurrence is normalised: the sum of weights, by which it is divided.
    """
    batch, tokens = attended.shape[:2]
    output, config, width = attended.new_empty(attended.shape), spec.config, spec.q_heads * spec.d_v
    blend[tokens, batch](
        attended, recurred, output, config.attention_weight, config.recurrence_weight, tokens,
        RECURRENT=config.recurrent, HEAD=spec.d_v, COLUMNS=spec.columns, WIDTH=width,
        BLOCK=min(1024, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip
    return output


@triton.jit
def hide_padding(
    p_x, p_real, p_position, tokens, stride_b, stride_t, stride_h, HIDDEN: tl.constexpr, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, WIDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy `[B, T, H, d]`, with another value for padding, and fill further columns with 1. Grid: (T, H, B)."""
    t, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    p_x += b * stride_b + t.to(tl.int64) * stride_t + h * stride_h
    x = tl.load(p_x + channels, mask=channels < WIDTH, other=1.0)
    x = tl.where(tl.load(p_position + b) + t < 0, HIDDEN, x)
    tl.store(p_real + ((b * tokens + t) * HEADS + h) * WIDER + channels, x, mask=channels < WIDER)


@triton.jit
def blend(
    p_attended, p_recurred, p_output, attention_weight, recurrence_weight, tokens,
    RECURRENT: tl.constexpr, HEAD: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the weighted sum of `[B, T, WIDTH]` and `[B, T, WIDTH / HEAD, COLUMNS]`. Grid: (T, B)."""
    token = tl.program_id(1).to(tl.int64) * tokens + tl.program_id(0)
    for start in tl.static_range(0, WIDTH, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        at, mask = token * WIDTH + channel, channel < WIDTH
        mixed = attention_weight * tl.load(p_attended + at, mask=mask).to(tl.float32)
        if RECURRENT and COLUMNS == HEAD:
            mixed += recurrence_weight * tl.load(p_recurred + at, mask=mask).to(tl.float32)
        elif RECURRENT:
            p_head = p_recurred + (token * (WIDTH // HEAD) + channel // HEAD) * COLUMNS
            weight = tl.load(p_head + HEAD, mask=mask, other=1.0)
            read = tl.load(p_head + channel % HEAD, mask=mask, other=0.0) / tl.where(weight > 0, weight, 1.0)
            mixed += recurrence_weight * read
        tl.store(p_output + at, mixed, mask=mask)
