"""`torch.ops.ligerexport.memory_attention`: softmax over the bounded exact memory, on CUDA and on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ligerexport.kernels.library.dispatch import fused
from ligerexport.kernels.memory_attention import memory_attention as plain_memory_attention
from ligerexport.state import MixerSpec, MixerState

BLOCK = 64
"""Tokens that are mixed at a time; `rotary_table` must reach this far ahead."""

SLOTS = ("slot_key", "slot_value", "slot_position", "slot_score")


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arrival: Tensor | None,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
) -> tuple[Tensor, MixerState]:
    """Attend over the slots with every query and choose the slots that the next call starts with.

    Differentiable in query, key and value; not in the state, and not through what the memory keeps.

    Args:
        query: `[B, T, H_q, d_k]` before rotary embedding.
        key: `[B, T, H_kv, d_k]` before rotary embedding.
        value: `[B, T, H_kv, d_v]`.
        arrival: `[B, T, H_kv]`, score on arrival, novelty or the learned one; needed when a pool is kept by it.
        position: `[B]` int64, tokens seen before this call; a token at a negative position is padding.
        state: Tensors named `slot_*`, as `MixerSpec.state` lists them; on the CPU ordered by position.
        spec: The layer.
        rotary: `rotary_table(inv_freq, spec.max_distance, BLOCK)`.

    Returns:
        Output `[B, T, H_q, d_v]` in the dtype of `query`, and the slots after the last token, ordered by position.
    """
    names = [name for name in SLOTS if name in state]
    output, *rest = _memory_attention(
        query, key, value, arrival, position, [state[name] for name in names], rotary, spec.text
    )
    return output, dict(zip(names, rest, strict=False))


@torch.library.custom_op("ligerexport::memory_attention", mutates_args=())
def _memory_attention(
    query: Tensor, key: Tensor, value: Tensor, arrival: Tensor | None, position: Tensor, slots: list[Tensor],
    rotary: Tensor, spec: str,
) -> list[Tensor]:  # fmt: skip
    if not fused(query):
        return _memory_attention_plain(query, key, value, arrival, position, slots, rotary, spec)
    from ligerexport.kernels.fused import memory_attention as kernels

    state = dict(zip(SLOTS, slots, strict=False))
    done = kernels.forward(query, key, value, arrival, position, state, MixerSpec.from_text(spec), rotary)
    present = [done.present[name] for name in SLOTS if name in state]
    return [done.output, *present, done.death.clone(), done.table, done.lse]


def _memory_attention_plain(
    query: Tensor, key: Tensor, value: Tensor, arrival: Tensor | None, position: Tensor, slots: list[Tensor],
    rotary: Tensor, spec: str,
) -> list[Tensor]:  # fmt: skip
    output, present = _plain(query, key, value, arrival, position, slots, rotary, spec)
    nothing = [query.new_empty(0, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.float32)]
    return [output, *present, *nothing]


def _plain(
    query: Tensor, key: Tensor, value: Tensor, arrival: Tensor | None, position: Tensor, slots: list[Tensor],
    rotary: Tensor, spec: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Attend in plain torch, block after block."""
    layer = MixerSpec.from_text(spec)
    state = dict(zip(SLOTS, slots, strict=False))
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).unflatten(2, (layer.kv_heads, -1)).permute(0, 2, 3, 1, 4)
    k, v = key.to(dtype).transpose(1, 2), value.to(dtype).transpose(1, 2)
    a = None if arrival is None else arrival.transpose(1, 2)
    outputs = []
    for start in range(0, query.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        output, state = plain_memory_attention(
            q[:, :, :, part], k[:, :, part], v[:, :, part], None if a is None else a[:, :, part], position + start,
            state, layer, rotary,
        )  # fmt: skip
        outputs.append(output)
    mixed = torch.cat(outputs, dim=3).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return mixed.to(query.dtype).contiguous(), [state[name] for name in SLOTS if name in state]


@_memory_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, arrival: Tensor | None, position: Tensor, slots: list[Tensor],
    rotary: Tensor, spec: str,
) -> list[Tensor]:  # fmt: skip
    layer = MixerSpec.from_text(spec)
    batch, length, q_heads, _ = query.shape
    present = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in slots]
    saved: list[tuple[tuple[Any, ...], torch.dtype]] = [((0,), torch.int32), ((0,), torch.int32), ((0,), torch.float32)]
    if fused(query):
        blocks = (length + BLOCK - 1) // BLOCK
        saved = [
            ((batch, layer.kv_heads, layer.config.num_slots + length), torch.int32),
            ((batch, layer.kv_heads, blocks + 1, layer.config.kept), torch.int32),
            ((batch, q_heads, length), torch.float32),
        ]
    output = query.new_empty(batch, length, q_heads, layer.d_v)
    return [output, *present, *(query.new_empty(shape, dtype=dtype) for shape, dtype in saved)]


@torch.library.custom_op("ligerexport::memory_attention_backward", mutates_args=())
def _memory_attention_backward(
    d_output: Tensor, query: Tensor, key: Tensor, value: Tensor, arrival: Tensor | None, position: Tensor,
    slots: list[Tensor], rotary: Tensor, output: Tensor, death: Tensor, table: Tensor, lse: Tensor, spec: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from ligerexport.kernels.fused import memory_attention as kernels

    state = dict(zip(SLOTS, slots, strict=False))
    done = kernels.Attended(output, {}, death, table, lse)
    return kernels.backward(d_output, query, key, value, position, state, MixerSpec.from_text(spec), rotary, done)


@_memory_attention_backward.register_fake
def _(
    d_output: Tensor, query: Tensor, key: Tensor, value: Tensor, arrival: Tensor | None, position: Tensor,
    slots: list[Tensor], rotary: Tensor, output: Tensor, death: Tensor, table: Tensor, lse: Tensor, spec: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    return q, k, v


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    query, key, value, arrival, position, slots, rotary, ctx.spec = inputs
    ctx.save_for_backward(query, key, value, arrival, position, rotary, output[0], *output[-3:], *slots)


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    query, key, value, arrival, position, rotary, output, death, table, lse, *slots = ctx.saved_tensors
    found: tuple[Tensor, ...]
    if fused(query):
        found = _memory_attention_backward(
            gradients[0], query, key, value, arrival, position, slots, rotary, output, death, table, lse, ctx.spec
        )
    else:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (query, key, value)]
            again, _ = _plain(leaves[0], leaves[1], leaves[2], arrival, position, slots, rotary, ctx.spec)
        found = torch.autograd.grad(again, leaves, gradients[0])
    return *found, None, None, [None] * len(slots), None, None


_memory_attention.register_autograd(_differentiate, setup_context=_save)
