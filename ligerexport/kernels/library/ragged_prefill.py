"""`torch.ops.ligerexport.ragged_prefill`: a chunk of tokens over ragged slots in Triton kernels only."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ligerexport.kernels.library.dispatch import fused
from ligerexport.model.state import MixerSpec, MixerState


def serves(query: Tensor, key: Tensor, value: Tensor, spec: MixerSpec) -> bool:
    """Return whether `ragged_prefill` computes this call: on CUDA, by a learned score or none, without gradients."""
    differentiated = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return fused(query) and spec.splits and not differentiated


def ragged_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
    score: Tensor | None,
) -> tuple[Tensor, MixerState]:
    """Run `ligerexport.kernels.ops.liger_mixer` for a call that `serves` accepts; not differentiable.

    Slots may be in any order before the call. After it, those of a head are ordered by position.
    """
    names = _names(spec.text)
    past = [state[name] for name in names]
    output, *present = _ragged_prefill(query, key, value, position, past, rotary, score, spec.text)
    return output, dict(zip(names, present, strict=True))


@lru_cache(maxsize=512)
def _names(text: str) -> tuple[str, ...]:
    """Return the tensors of the state of the layer `MixerSpec.text`."""
    return tuple(tensor.name for tensor in MixerSpec.from_text(text).state())


@torch.library.custom_op("ligerexport::ragged_prefill", mutates_args=())
def _ragged_prefill(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, state: list[Tensor], rotary: Tensor,
    score: Tensor | None, spec: str,
) -> list[Tensor]:  # fmt: skip
    from ligerexport.kernels.fused.ragged_prefill import ragged_prefill as kernels

    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    names = _names(spec)
    past = {name: x.contiguous() for name, x in zip(names, state, strict=True)}
    output, present = kernels(query, key, value, score, position, past, MixerSpec.from_text(spec), rotary)
    return [output, *(present[name] for name in names)]


@_ragged_prefill.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, position: Tensor, state: list[Tensor], *rest: Any) -> list[Tensor]:
    output = query.new_empty(*query.shape[:3], value.shape[3])
    return [output, *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in state)]
