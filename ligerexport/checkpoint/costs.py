"""What a Transformer's loss gains if the attention of a KV head sees a bounded memory, to first order.

The change of a head's output under a memory, times the gradient of the loss, is the change of the loss that one row
causes. Its square, summed over rows, is the cost of that memory. Costs of heads are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ligerexport.checkpoint.shares import OPTIONS, SLOTS, WINDOWS
from ligerexport.checkpoint.watch import watched
from ligerexport.model.families import output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 256
"""Rows of a text that are looked at, evenly spread, since a sum over rows is estimated well by some of them."""
_BLOCK = 64  # rows in memory at a time, so that they fit a CPU's cache
_PART = 512  # tokens whose logits are in memory at a time


class Seen(NamedTuple):
    """What one layer computed from a text: input `[T, hidden]`, scaled query `[H_q, T, d]`, key and value
    `[H_kv, T, d]`, the tokens that a query sees, and the output `[1, T, H_q, d]` with its graph."""

    entering: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    sliding_window: int | None
    output: Tensor


def text_costs(
    model: PreTrainedModel, ids: Tensor, first: int, maps: dict[int, tuple[Tensor, Tensor]], sinks: int
) -> dict[int, Tensor]:
    """Return the cost of every memory of each layer in `maps` on one text, `[H_kv, options]` by layer, on the CPU.

    Args:
        model: The Transformer, in evaluation mode, with parameters that need no gradient.
        ids: `[T]`.
        first: First token whose loss counts.
        maps: Weight `[H_kv, hidden]` and bias `[H_kv]` of the score of each layer.
        sinks: First tokens that every memory has.
    """
    seen: dict[int, Seen] = {}

    def attend(
        layer: int, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, sliding_window: int | None
    ) -> Tensor:
        output = _attention(query, key, value, sliding_window).transpose(1, 2)
        if layer in maps:
            entering, q, k, v = (x[0].detach() for x in (hidden, query, key, value))
            seen[layer] = Seen(entering, q, k, v, sliding_window, output)
        return output.contiguous()

    ids = ids.to(model.device)
    embedded = model.get_input_embeddings()(ids[None]).requires_grad_(True)
    decoder: Any = model.model
    with watched(model, attend):
        last = decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
    outputs = [part.output for part in seen.values()]
    gradients = torch.autograd.grad(last, outputs, _loss_gradient(model, last.detach(), ids, first))
    with torch.no_grad():
        return {
            layer: _layer_costs(part, gradient[0], maps[layer], sinks).cpu()
            for (layer, part), gradient in zip(seen.items(), gradients, strict=True)
        }


def _loss_gradient(model: PreTrainedModel, last: Tensor, ids: Tensor, first: int) -> Tensor:
    """Return the gradient of the summed loss of the tokens from `first` on, with respect to `last`, `[T, hidden]`."""
    head, gradient = output_head(model), torch.zeros_like(last)
    for start in range(first - 1, len(ids) - 1, _PART):  # a part at a time, because a vocabulary may be large
        part = slice(start, min(start + _PART, len(ids) - 1))
        x = last[part].requires_grad_(True)
        loss = functional.cross_entropy(head(x).float(), ids[part.start + 1 : part.stop + 1], reduction="sum")
        (gradient[part],) = torch.autograd.grad(loss, x)
    return gradient


def _attention(query: Tensor, key: Tensor, value: Tensor, sliding_window: int | None) -> Tensor:
    """Return causal attention `[1, H_q, T, d]` without keeping its weights for the gradient."""
    group, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    mask = None
    if sliding_window is not None and sliding_window < length:
        place = torch.arange(length, device=query.device)
        distance = place[:, None] - place
        mask = (distance >= 0) & (distance < sliding_window)
    return functional.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=1.0)


def _layer_costs(seen: Seen, gradient: Tensor, score: tuple[Tensor, Tensor], sinks: int) -> Tensor:
    """Return the costs of a layer, `[H_kv, options]` in fp64, from the gradient of its output `[T, H_q, d]`."""
    length, kv_heads = len(gradient), len(seen.key)
    scores = functional.linear(seen.entering.float(), *score).T
    costs = torch.zeros(kv_heads, len(OPTIONS), dtype=torch.float64, device=gradient.device)
    looked_at = torch.arange(0, length, max(1, length // ROWS), device=gradient.device)
    for head in range(kv_heads):
        key, value = seen.key[head].float(), seen.value[head].float()
        order = sinks + scores[head, sinks:].argsort(descending=True, stable=True)
        for rows in looked_at.split(_BLOCK):
            count = int(rows[-1]) + 1
            query, slope = (
                x.float().unflatten(0, (kv_heads, -1))[head]
                for x in (seen.query[:, rows], gradient[rows].transpose(0, 1))
            )
            distance = rows[:, None] - torch.arange(count, device=rows.device)
            unseen = distance < 0
            if seen.sliding_window is not None:
                unseen |= distance >= seen.sliding_window
            weights = (query @ key[:count].mT).masked_fill_(unseen, -torch.inf).softmax(-1)
            parts = torch.stack([weights, weights * (slope @ value[:count].mT)])
            costs[head] += _block_costs(parts, distance, order[order < count], sinks)
    return costs


def _block_costs(parts: Tensor, distance: Tensor, order: Tensor, sinks: int) -> Tensor:
    """Return the costs of some rows of a head, `[options]` in fp64.

    Args:
        parts: Weights of attention, and weights times the gradient's products with the values, `[2, G, rows, T]`.
        distance: From row to column, `[rows, T]`.
        order: The columns after the sinks, best score first.
        sinks: Number of first tokens that are always seen.
    """
    full, first = parts[1].sum(-1), parts[..., :sinks].sum(-1)
    parts, distance = parts[..., order], distance[:, order]
    wanted = torch.tensor([n for n in SLOTS if n], device=distance.device, dtype=torch.int32)
    wanted = wanted.expand(len(distance), -1).contiguous()
    near = first
    costs, last = [], 0
    for window in WINDOWS:
        near = near + (parts * ((distance >= last) & (distance < window))).sum(-1)
        left = distance >= window
        # of the tokens that have left the window, best first, the sum up to the n-th
        end = torch.searchsorted(left.cumsum(-1, dtype=torch.int32), wanted).clamp_max_(len(order) - 1)
        far = (parts * left).cumsum(-1).gather(-1, end.expand(*parts.shape[:2], -1, -1))
        seen = torch.cat([near[..., None], near[..., None] + far], -1)  # [2, G, rows, slots]
        change = (seen[1] / seen[0].clamp_min(1e-20) - full[..., None]).sum(0)
        costs.append(change.double().square().sum(0))
        last = window
    return torch.cat(costs)


def weigh(costs: Sequence[tuple[float, dict[int, Tensor]]]) -> dict[int, Tensor]:
    """Add up costs of several kinds, each scaled so that the smallest memory in every head costs its share in all."""
    total: dict[int, Tensor] = {}
    for share, found in costs:
        whole = sum(layer[:, 0].sum() for layer in found.values())
        for layer, cost in found.items():
            total[layer] = total.get(layer, 0) + share * cost / torch.as_tensor(whole).clamp_min(1e-300)
    return total
