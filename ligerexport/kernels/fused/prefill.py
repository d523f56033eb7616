"""A whole chunk of `liger_mixer` in kernels only, so that it can be planned ahead of time for callers without torch.

The kernels of novelty, memory and recurrences are beside this file; this file has those that combine them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused import linear_attention, memory_attention
from ligerexport.kernels.fused.evicted_prefill import evicted_prefill
from ligerexport.kernels.fused.recall_error import recall_error
from ligerexport.model.gates import OPEN
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
    if config.recurrent:
        real_key, real_value = (x.new_empty(x.shape) for x in (key, value))
        for x, real, hidden in ((key, real_key, OPEN), (value, real_value, 0.0)):
            hide_padding[tokens, spec.kv_heads, batch](
                x, real, position, tokens, *x.stride()[:3],
                HIDDEN=hidden, HEADS=spec.kv_heads, WIDTH=x.shape[3], BLOCK=triton.next_power_of_2(x.shape[3]),
                num_warps=1,
            )  # fmt: skip
        past = state["recurrent_state"]
        recurred, final, _ = linear_attention.forward(query, real_key, real_value, None, past, None, config.gate, 1.0)
        present = present | {"recurrent_state": final}
    return blend_outputs(attended.output, recurred, spec), present


def blend_outputs(attended: Tensor, recurred: Tensor, spec: MixerSpec) -> Tensor:
    """Return the weighted sum of two outputs `[B, T, H_q, d_v]`, or of the first one if there is no recurrence."""
    batch, tokens = attended.shape[:2]
    output, config, width = attended.new_empty(attended.shape), spec.config, spec.q_heads * spec.d_v
    blend[tokens, batch](
        attended, recurred, output, config.attention_weight, config.recurrence_weight, tokens,
        RECURRENT=config.recurrent, WIDTH=width, BLOCK=min(1024, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip
    return output


@triton.jit
def hide_padding(
    p_x, p_real, p_position, tokens, stride_b, stride_t, stride_h, HIDDEN: tl.constexpr, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy `[B, T, H, d]`, with another value for padding. Grid: (T, H, B)."""
    t, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    x = tl.load(p_x + b * stride_b + t.to(tl.int64) * stride_t + h * stride_h + channels, mask=channels < WIDTH)
    x = tl.where(tl.load(p_position + b) + t < 0, HIDDEN, x)
    tl.store(p_real + ((b * tokens + t) * HEADS + h) * WIDTH + channels, x, mask=channels < WIDTH)


@triton.jit
def blend(
    p_attended, p_recurred, p_output, attention_weight, recurrence_weight, tokens,
    RECURRENT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the weighted sum of two `[B, T, WIDTH]`. Grid: (T, B)."""
    row = (tl.program_id(1).to(tl.int64) * tokens + tl.program_id(0)) * WIDTH
    for start in tl.static_range(0, WIDTH, BLOCK):
        at, mask = row + start + tl.arange(0, BLOCK), start + tl.arange(0, BLOCK) < WIDTH
        mixed = attention_weight * tl.load(p_attended + at, mask=mask).to(tl.float32)
        if RECURRENT:
            mixed += recurrence_weight * tl.load(p_recurred + at, mask=mask).to(tl.float32)
        tl.store(p_output + at, mixed, mask=mask)
