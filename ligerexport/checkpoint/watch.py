"""Run a Transformer with an attention function of our own, which sees what enters a layer and what it attends to.

It is registered as an attention function of transformers, so it gets queries and keys as every family makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor, int | None], Tensor]
"""Takes the layer, its input `[B, T, hidden]`, the scaled query `[B, H_q, T, d]`, key and value `[B, H_kv, T, d]`, and
the number of tokens that a query sees, None for all; returns the output `[B, T, H_q, d]`."""

_QUERIES = 128  # in memory at a time, so that the attention weights of all heads fit a CPU's cache
_NAME = "ligerexport_watched"


@contextmanager
def watched(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Replace the attention of a model of a family in `FAMILIES`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from ligerexport.layers.mixer import IGNORED

    entering: dict[int, Tensor] = {}

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering[module.layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def called(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float,
        sliding_window: int | None = None, dropout: float = 0.0, **others: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        ignored = IGNORED | {"position_ids"}  # queries and keys are rotated already
        unknown = [name for name, value in others.items() if value is not None and name not in ignored]
        if dropout or unknown:
            raise TypeError(f"the attention of the fit does not support {unknown[0] if unknown else 'dropout'}")
        layer = module.layer_idx
        return attend(layer, entering.pop(layer), query * scaling, key, value, sliding_window), None

    before = model.config._attn_implementation
    decoder: Any = model.model
    hooks = [layer.self_attn.register_forward_pre_hook(enter, with_kwargs=True) for layer in decoder.layers]
    ALL_ATTENTION_FUNCTIONS[_NAME] = called
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[_NAME]
        for hook in hooks:
            hook.remove()


def attention(
    query: Tensor, key: Tensor, value: Tensor, sliding_window: int | None, seen: Callable[[int, Tensor], None]
) -> Tensor:
    """Compute causal attention, one block of queries at a time.

    Args:
        query: `[B, H_q, T, d]`, scaled, rotated.
        key: `[B, H_kv, T, d]`, rotated.
        value: `[B, H_kv, T, d]`.
        sliding_window: Tokens that a query of this layer sees, its own included; None for all.
        seen: Called for each block with its first query and the weights `[B, H_kv, H_q / H_kv, queries, keys]` of the
            keys up to its last query. It may change them.

    Returns:
        Output `[B, T, H_q, d]`.
    """
    length, dtype = key.shape[2], value.dtype
    query, key, value = query.float().unflatten(1, (key.shape[1], -1)), key.float(), value.float()
    output = torch.empty_like(query)
    place = torch.arange(length, device=key.device)
    for first in range(0, length, _QUERIES):
        last = min(first + _QUERIES, length)
        block = query[:, :, :, first:last]
        # rows: the queries of all heads of a group; columns: keys
        logits = (block.flatten(2, 3) @ key[:, :, :last].mT).unflatten(2, block.shape[2:4])
        distance = place[first:last, None] - place[:last]
        logits[..., first:].masked_fill_(distance[:, first:] < 0, -torch.inf)
        if sliding_window is not None:
            logits.masked_fill_(distance >= sliding_window, -torch.inf)
        weights = logits.softmax(-1)
        output[:, :, :, first:last] = (weights.flatten(2, 3) @ value[:, :, :last]).unflatten(2, block.shape[2:4])
        seen(first, weights)
    return output.flatten(1, 2).transpose(1, 2).to(dtype).contiguous()
