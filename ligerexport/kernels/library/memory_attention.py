"""`torch.ops.ligerexport.memory_attention`: softmax over the bounded exact memory, on CUDA and on the CPU."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ligerexport.kernels.library.dispatch import fused
from ligerexport.kernels.memory_attention import memory_attention as plain_memory_attention
from ligerexport.model.state import SLOTS, MixerSpec, MixerState


class Evicted(NamedTuple):
    """The tokens that the memory evicted, and the normaliser of the softmax over the remaining tokens.

    Attributes:
        key: `[B, T, H_kv, d_k]`, key of the token that each step evicts.
        value: `[B, T, H_kv, d_v]`, its value.
        lost: `[B, T, H_kv]`, whether a step evicts a token.
        normaliser: `[B, T, H_q]`, logarithm of the softmax's denominator.
    """

    key: Tensor
    value: Tensor
    lost: Tensor
    normaliser: Tensor


BLOCK = 64
"""Number of tokens that are mixed at a time; `rotary_table` must reach this far ahead."""


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arrival: Tensor | None,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
) -> tuple[Tensor, MixerState, Evicted | None]:
    """Attend over the slots with every query and choose the slots that the next call starts with.

    Differentiable in query, key and value; not in the state, and not through the choice of slots.

    Args:
        query: `[B, T, H_q, d_k]` before rotary embedding.
        key: `[B, T, H_kv, d_k]` before rotary embedding.
        value: `[B, T, H_kv, d_v]`.
        arrival: `[B, T, H_kv]`, the score on arrival, novelty or learned; needed if a pool ranks by it.
        position: `[B]` int64, tokens seen before this call; a token at a negative position is padding.
        state: Tensors named `slot_*`, as `MixerSpec.state` lists them; on the CPU ordered by position.
        rotary: `rotary_table(inv_freq, spec.max_distance, BLOCK)`.

    Returns:
        Output `[B, T, H_q, d_v]` in the dtype of `query`, the slots after the last token, ordered by position, and
        the input of a recurrence over evicted tokens; None if `spec` has no such recurrence.
    """
    names = [name for name in SLOTS if name in state]
    output, *rest = _memory_attention(
        query, key, value, arrival, position, [state[name] for name in names], rotary, spec.text
    )
    present = dict(zip(names, rest, strict=False))
    if not spec.config.evicts:
        return output, present, None
    *_, lse, lost = rest
    keys = torch.cat([state["slot_key"].transpose(1, 2).to(key.dtype), key], dim=1)
    values = torch.cat([state["slot_value"].transpose(1, 2).to(value.dtype), value], dim=1)
    index = lost.clamp_min(0)[..., None]
    lost_key = keys.gather(1, index.expand(*lost.shape, key.shape[3]))
    lost_value = values.gather(1, index.expand(*lost.shape, value.shape[3]))
    return output, present, Evicted(lost_key, lost_value, lost >= 0, lse.transpose(1, 2) * math.log(2))


@torch.library.custom_op("ligerexport::memory_attention", mutates_args=())
def _memory_attention(
    query: Tensor, key: Tensor, value: Tensor, arrival: Tensor | None, position: Tensor, slots: list[Tensor],
    rotary: Tensor, spec: str,
) -> list[Tensor]:  # fmt: skip
    layer, state = MixerSpec.from_text(spec), dict(zip(SLOTS, slots, strict=False))
    if not fused(query):
        output, plain, lse, lost = _plain(query, key, value, arrival, position, slots, rotary, spec)
        saved = [lse, lost] if layer.config.evicts else [lse.new_empty(0), lost.new_empty(0)]
        return [output, *plain, *(position.new_empty(0, dtype=torch.int32) for _ in range(2)), *saved]
    from ligerexport.kernels.fused import memory_attention as kernels

    done = kernels.forward(query, key, value, arrival, position, state, layer, rotary)
    present = [done.present[name] for name in SLOTS if name in state]
    lost = find_lost(done.death, position, state["slot_position"]) if layer.config.evicts else position.new_empty(0)
    return [done.output, *present, done.death.clone(), done.table, done.lse, lost]


def find_lost(death: Tensor, position: Tensor, slot_position: Tensor) -> Tensor:
    """Return the candidate that each step evicts, `[B, T, H_kv]` int64: a slot's index, N + a token, or -1 for none.

    Args:
        death: `[B, H_kv, N + T]`, the first token that no longer sees each candidate, slots ordered by position.
        position: `[B]`.
        slot_position: `[B, H_kv, N]`, in any order.
    """
    batch, heads, count = death.shape
    slots = slot_position.shape[2]
    sorted_position, order = slot_position.sort(dim=-1, stable=True)
    new = torch.arange(count - slots, device=death.device)
    real = (position[:, None] + new >= 0)[:, None].expand(-1, heads, -1)
    real = torch.cat([sorted_position >= 0, real], dim=2)
    index = torch.cat([order, (slots + new).expand(batch, heads, -1)], dim=2)
    when = death.long().where(real, len(new)).clamp(0, len(new))  # those that stay go to an extra column
    lost = index.new_full((batch, heads, len(new) + 1), -1).scatter(2, when, index)
    return lost[..., :-1].transpose(1, 2).contiguous()


def _plain(
    query: Tensor, key: Tensor, value: Tensor, arrival: Tensor | None, position: Tensor, slots: list[Tensor],
    rotary: Tensor, spec: str,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Attend in plain torch, block by block; return output, slots, base-2 normalisers `[B, H_q, T]`, evicted tokens."""
    layer = MixerSpec.from_text(spec)
    state = dict(zip(SLOTS, slots, strict=False))
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).unflatten(2, (layer.kv_heads, -1)).permute(0, 2, 3, 1, 4)
    k, v = key.to(dtype).transpose(1, 2), value.to(dtype).transpose(1, 2)
    a = None if arrival is None else arrival.transpose(1, 2)
    outputs, normalisers, evicted = [], [], []
    for start in range(0, query.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        output, state, normaliser, lost = plain_memory_attention(
            q[:, :, :, part], k[:, :, part], v[:, :, part], None if a is None else a[:, :, part], position + start,
            state, layer, rotary,
        )  # fmt: skip
        outputs.append(output)
        normalisers.append(normaliser)
        evicted.append(lost)
    mixed = torch.cat(outputs, dim=3).permute(0, 3, 1, 2, 4).flatten(2, 3).to(query.dtype).contiguous()
    lse = torch.cat(normalisers, dim=3).flatten(1, 2) / math.log(2)
    who = torch.cat(evicted, dim=2)  # as positions
    slot = (slots[2][:, :, None] == who[..., None]).long().argmax(dim=-1)
    index = torch.where(who < position[:, None, None], slot, slots[2].shape[2] + who - position[:, None, None])
    lost = torch.where(who < 0, -1, index).transpose(1, 2).contiguous()
    return mixed, [state[name] for name in SLOTS if name in state], lse, lost


@_memory_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, arrival: Tensor | None, position: Tensor, slots: list[Tensor],
    rotary: Tensor, spec: str,
) -> list[Tensor]:  # fmt: skip
    layer = MixerSpec.from_text(spec)
    batch, length, q_heads, _ = query.shape
    present = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in slots]
    evicts, wide = layer.config.evicts, torch.promote_types(query.dtype, torch.float32)
    normalisers = (batch, q_heads, length) if evicts else (0,)
    saved: list[tuple[tuple[Any, ...], torch.dtype]] = [((0,), torch.int32), ((0,), torch.int32), (normalisers, wide)]
    if fused(query):
        blocks = (length + BLOCK - 1) // BLOCK
        saved = [
            ((batch, layer.kv_heads, layer.config.num_slots + length), torch.int32),
            ((batch, layer.kv_heads, blocks + 1, layer.config.kept), torch.int32),
            ((batch, q_heads, length), torch.float32),
        ]
    saved.append(((batch, length, layer.kv_heads) if evicts else (0,), torch.int64))
    output = query.new_empty(batch, length, q_heads, layer.d_v)
    return [output, *present, *(query.new_empty(shape, dtype=dtype) for shape, dtype in saved)]


@torch.library.custom_op("ligerexport::memory_attention_backward", mutates_args=())
def _memory_attention_backward(
    d_output: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, arrival: Tensor | None,
    position: Tensor, slots: list[Tensor], rotary: Tensor, output: Tensor, death: Tensor, table: Tensor, lse: Tensor,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from ligerexport.kernels.fused import memory_attention as kernels

    state = dict(zip(SLOTS, slots, strict=False))
    done = kernels.Attended(output, {}, death, table, lse)
    layer = MixerSpec.from_text(spec)
    return kernels.backward(d_output, query, key, value, position, state, layer, rotary, done, d_lse)


@_memory_attention_backward.register_fake
def _(d_output: Tensor, d_lse: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3])
    return q, k, v


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    query, key, value, arrival, position, slots, rotary, ctx.spec = inputs
    ctx.save_for_backward(query, key, value, arrival, position, rotary, output[0], *output[-4:-1], *slots)


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    query, key, value, arrival, position, rotary, output, death, table, lse, *slots = ctx.saved_tensors
    found: tuple[Tensor, ...]
    evicts = MixerSpec.from_text(ctx.spec).config.evicts
    if fused(query):
        found = _memory_attention_backward(
            gradients[0], gradients[-2] if evicts else None, query, key, value, arrival, position, slots, rotary,
            output, death, table, lse, ctx.spec,
        )  # fmt: skip
    else:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (query, key, value)]
            again, _, log, _ = _plain(leaves[0], leaves[1], leaves[2], arrival, position, slots, rotary, ctx.spec)
        wanted = ((again, log), (gradients[0], gradients[-2])) if evicts else ((again,), (gradients[0],))
        found = torch.autograd.grad(wanted[0], leaves, wanted[1])
    return *found, None, None, [None] * len(slots), None, None


_memory_attention.register_autograd(_differentiate, setup_context=_save)
