"""Softmax attention over the bounded exact memory for all tokens of a call at once, with Triton kernels.

`ligerexport.kernels.memory_attention` defines the result. Here each key is visible from its arrival until its death, so
the policy of the memory is one array of integers. It is computed first; attention itself needs no pools.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ligerexport.kernels.fused.attend import attend
from ligerexport.kernels.fused.attend_backward import attend_backward
from ligerexport.kernels.fused.candidates import Candidates, gather_candidates
from ligerexport.kernels.fused.slot_scores import complete_scores
from ligerexport.kernels.fused.slots import deaths, old_table, present_slots
from ligerexport.model.state import MixerSpec, MixerState


@dataclass(frozen=True)
class Attended:
    """The result of `forward`, which `backward` needs again.

    Attributes:
        output: `[B, T, H_q, d_v]`, 0 where a token is padding.
        present: The slots after the last token.
        death: `[B, H_kv, N + T]` int32, the first token that no longer sees each candidate, carried ones (by position)
            before new ones.
        table: `[B, H_kv, blocks + 1, kept]` int32, from `old_table`.
        lse: `[B, H_q, T]` fp32, base-2 logarithms of the softmax's denominators.
        found: The candidates; `backward` computes them again.
    """

    output: Tensor
    present: MixerState
    death: Tensor
    table: Tensor
    lse: Tensor
    found: Candidates | None = None


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors whose last axis is contiguous."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arrival: Tensor | None,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
    death: Tensor | None = None,
) -> Attended:
    """Attend; the arguments are those of `ligerexport.kernels.library.memory_attention`, with slots in any order.

    `death` passes the memory's decisions, which are then not computed.
    """
    query, key, value = _rows(query, key, value)
    state = {name: tensor.contiguous() for name, tensor in state.items() if name.startswith("slot_")}
    found = gather_candidates(query, key, value, arrival, position, state, spec, rotary)
    if death is None:
        complete_scores(found)
        death = deaths(found)
    table = old_table(found, death)
    present = present_slots(found, table, key, value, state)
    output, lse = attend(found, death, table, spec.d_v)
    assert output is not None
    return Attended(output, present, death, table, lse, found)


def backward(
    d_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
    attended: Attended,
    d_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; the candidates are computed again, not kept.

    `d_lse` `[B, H_q, T]` is the gradient of the normalisers; None if nothing reads them.
    """
    query, key, value, d_output = _rows(query, key, value, d_output)
    state = {name: tensor.contiguous() for name, tensor in state.items() if name.startswith("slot_")}
    arrival = query.new_zeros(1, 1, 1, dtype=torch.float32).expand(*key.shape[:3])  # scores are complete already
    found = gather_candidates(query, key, value, arrival, position, state, spec, rotary)
    return attend_backward(found, attended.death, attended.table, attended.output, attended.lse, d_output, d_lse)
