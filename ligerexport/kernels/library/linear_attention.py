"""`torch.ops.ligerexport.linear_attention`: gated linear attention, Triton on CUDA and plain torch on the CPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ligerexport.kernels.fused.segments import segment_count, segment_length
from ligerexport.kernels.library.dispatch import fused, watched
from ligerexport.kernels.linear_attention import apply_gate, gated_linear_attention
from ligerexport.model.gates import get_gate


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None = None,
    *,
    gate: str | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t (ONNX LinearAttention, `update_rule="gated"`).

    Exact under strong gates: no factor overflows, and nothing is clamped that fp32 can distinguish from zero.

    Args:
        query: `[B, T, H_q, d_k]`; H_q is a multiple of H_kv, and the heads of a group share one state.
        key: `[B, T, H_kv, d_k]`.
        value: `[B, T, H_kv, d_v]`; query, key and value are in fp32, bf16 or fp16.
        decay: `[B, T, H_kv, d_k]`, g in nats per token, at most 0; with it, query and key are features.
        gate: Name for `get_gate`, instead of `decay`: feature maps and decay are computed from the raw projections.
        scale: Factor of the output.
        initial_state: `[N, H_kv, d_k, d_v]` fp32; None is zero. N is B, or the number of packed sequences.
        cu_seqlens: `[N + 1]` integer, the bounds of packed sequences along T; B must be 1.

    Returns:
        Output `[B, T, H_q, d_v]` in the dtype of `value`, and the final state `[N, H_kv, d_k, d_v]` fp32. Both are
        differentiable.

    Raises:
        ValueError: Shapes disagree, not exactly one of `decay` and `gate` is given, or the gate is keyed.
    """
    if (decay is None) == (gate is None):
        raise ValueError("give either decay or gate")
    if gate is not None and get_gate(gate).keyed:
        raise ValueError(f"the rows of '{gate}' have keys; use ligerexport.kernels.keyed.keyed_recurrence")
    batch, _, q_heads, d_k = query.shape
    if key.shape[:2] != query.shape[:2] or key.shape[:3] != value.shape[:3] or key.shape[3] != d_k:
        raise ValueError(f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not agree")
    if q_heads % key.shape[2]:
        raise ValueError(f"{q_heads} query heads are not a multiple of {key.shape[2]} key-value heads")
    if decay is not None and decay.shape != key.shape:
        raise ValueError(f"decay {list(decay.shape)} does not have the shape of key {list(key.shape)}")
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"packed sequences have batch 1, not {batch}")
    run = _Direct.apply if fused(query) and not watched(query) else _linear_attention
    output, state, _ = run(query, key, value, decay, initial_state, cu_seqlens, gate, scale)
    return output, state


@torch.library.custom_op("ligerexport::linear_attention", mutates_args=())
def _linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, gate: str | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not fused(query):
        output, state = _plain(query, key, value, decay, initial_state, cu_seqlens, gate, scale)
        return output, state, state.new_empty(0, *state.shape[1:])
    from ligerexport.kernels.fused import linear_attention as kernels

    return kernels.forward(query, key, value, decay, initial_state, cu_seqlens, gate, scale)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, gate: str | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the recurrence in plain torch, packed sequences one after the other."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        outputs, states = [], []
        for n, (start, end) in enumerate(pairwise(bounds)):
            part = slice(start, end)
            state = None if initial_state is None else initial_state[n : n + 1]
            g = None if decay is None else decay[:, part]
            output, state = _plain(query[:, part], key[:, part], value[:, part], g, state, None, gate, scale)
            outputs.append(output)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads = key.shape[2]
    q = query.to(dtype).unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)
    k, v = key.to(dtype).transpose(1, 2), value.to(dtype).transpose(1, 2)
    if gate is None:
        assert decay is not None
        g = decay.to(dtype).transpose(1, 2)
    else:
        q, k, g = apply_gate(q, k, get_gate(gate))
    if initial_state is None:
        initial_state = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    if key.shape[1] == 0:
        return value.new_zeros(*query.shape[:3], v.shape[3]), initial_state.clone()
    output, state = gated_linear_attention(q * scale, k, v, g, initial_state)
    return output.permute(0, 3, 1, 2, 4).flatten(2, 3).to(value.dtype).contiguous(), state


@_linear_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, gate: str | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, _, d_k = query.shape
    heads, d_v = value.shape[2:]
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else batch
    state = query.new_empty(sequences, heads, d_k, d_v, dtype=torch.promote_types(query.dtype, torch.float32))
    segments = 0
    if fused(query):
        segment = segment_length(batch * length, heads, d_k, d_v, query.element_size())
        longest = batch * length if packed else length
        segments = 0 if longest <= segment else segment_count(batch * length, sequences, segment, packed)
    return value.new_empty(*query.shape[:3], d_v), state, state.new_empty(segments, heads, d_k, d_v)


@torch.library.custom_op("ligerexport::linear_attention_backward", mutates_args=())
def _linear_attention_backward(
    d_output: Tensor, d_final: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None,
    initial_state: Tensor | None, states: Tensor, cu_seqlens: Tensor | None, gate: str | None, scale: float,
) -> list[Tensor]:  # fmt: skip
    from ligerexport.kernels.fused import linear_attention as kernels

    inputs = (query, key, value, decay, initial_state)
    found = kernels.backward(d_output, d_final, inputs, states, cu_seqlens, gate, scale)
    return [x for x in found if x is not None]


@_linear_attention_backward.register_fake
def _(d_output: Tensor, d_final: Tensor, *inputs: Any) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:5] if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.gate, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, d_output: Tensor, d_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens, states = ctx.saved_tensors
    if fused(tensors[0]):
        found = _linear_attention_backward(d_output, d_final, *tensors, states, cu_seqlens, ctx.gate, ctx.scale)
    else:
        with torch.enable_grad():
            leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
            q, k, v, g, state = leaves
            assert q is not None and k is not None and v is not None
            again = _plain(q, k, v, g, state, cu_seqlens, ctx.gate, ctx.scale)
        wanted = [x for x in leaves if x is not None]
        found = list(torch.autograd.grad(again, wanted, (d_output, d_final)))
    rest = iter(found)
    return (*(None if x is None else next(rest) for x in tensors), None, None, None)


_linear_attention.register_autograd(_differentiate, setup_context=_save)


class _Direct(torch.autograd.Function):
    """The operator on a GPU without torch's registry, which takes longer than the kernels of a small call."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        from ligerexport.kernels.fused import linear_attention as kernels

        return kernels.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_output: Tensor | None, d_final: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        from ligerexport.kernels.fused import linear_attention as kernels

        *inputs, cu_seqlens, states = ctx.saved_tensors
        if d_output is None:  # only the final state was used
            d_output = inputs[2].new_zeros(*inputs[0].shape[:3], inputs[2].shape[3])
        found = kernels.backward(d_output, d_final, tuple(inputs), states, cu_seqlens, ctx.gate, ctx.scale)
        return *found, None, None, None
