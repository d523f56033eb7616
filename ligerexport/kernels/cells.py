"""Cells of evicted tokens: a router sends a token to a cell by its key, and a query reads the mean of each cell.

This is Mixture-of-Memories (arXiv 2502.13685) for the tokens that a bounded memory loses. A memory is a count, a sum of
keys and a sum of values. All cells share one softmax with the slots, in which the logit of a cell is that of its mean
key plus the logarithm of its count. By Jensen's inequality a cell never gets more than the softmax would have given its
tokens; a cell of one token gets exactly as much. As in `ligerexport.kernels.evicted`, all tokens are read at one
distance, by the channels that turn slowly.

All products are plain torch, on CUDA too, where the tokens to evict come from the fused memory attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ligerexport.kernels.evicted import BLOCK, slow_rotation
from ligerexport.kernels.library.memory_attention import Evicted
from ligerexport.kernels.memory_attention import rotate
from ligerexport.model.state import CELLS, MixerSpec, MixerState


def read_cells(
    query: Tensor,
    evicted: Evicted,
    mixed: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
    router: Tensor,
) -> tuple[Tensor, MixerState, Tensor]:
    """Add evicted tokens to their cells, and the cells to a softmax, a block of tokens at a time.

    Differentiable in query, evicted keys and values, and `mixed`; not through the choice of cells.

    Args:
        query: `[B, T, H_q, d_k]` before rotary embedding.
        evicted: What `memory_attention` returns.
        mixed: `[B, T, H_q, d_v]`, output of the softmax over the slots.
        state: Tensors `CELLS` before the first token: counts `[B, H_kv, M]`, sums of keys `[B, H_kv, M, d_k]` and of
            values `[B, H_kv, M, d_v]`.
        rotary: `rotary_table(inv_freq, spec.max_distance, ahead)`.
        router: `[H_kv, M, d_k + 1]`; a token goes to the cell with the largest product with its key, followed by 1.

    Returns:
        Output `[B, T, H_q, d_v]`, the state after the last token, and the share of the attention that fell on cells
        `[B, T, H_q]`; all in at least fp32.
    """
    dtype, heads = torch.promote_types(query.dtype, torch.float32), spec.kv_heads

    def by_head(x: Tensor) -> Tensor:  # [B, T, H_q, ...] to [B, H_kv, G, T, ...]
        return x.to(dtype).unflatten(2, (heads, -1)).movedim(1, 3)

    with torch.autocast(query.device.type, enabled=False):  # sums over thousands of tokens need more than bf16
        (cos, sin), _ = slow_rotation(rotary.to(dtype), spec)
        phi = by_head(rotate(query.to(dtype), cos, sin)) * spec.scale  # 0 in fast channels
        near, normaliser = by_head(mixed), by_head(evicted.normaliser)[..., None]
        lost = evicted.lost.transpose(1, 2)[..., None]
        key, value = (x.transpose(1, 2).to(dtype).where(lost, 0.0) for x in (evicted.key, evicted.value))
        chosen = choose_cells(key.detach(), router).to(dtype) * lost
        count, keys, values = (state[name] for name in CELLS)
        outputs, shares = [], []
        for start in range(0, query.shape[1], BLOCK):
            q, softmax, log = (x[:, :, :, start : start + BLOCK] for x in (phi, near, normaliser))
            c, k, v = (x[:, :, None, start : start + BLOCK] for x in (chosen, key, value))
            until = c.new_ones(c.shape[3], c.shape[3]).tril()
            counts = count[:, :, None, None] + until @ c  # [B, H_kv, 1, t, M]
            sizes = counts.where(counts > 0, 1.0)
            logits = (q @ keys[:, :, None].mT + (q @ k.mT).tril() @ c) / sizes
            logits = logits + (spec.config.recurrence_weight * sizes).log() - log
            weights = torch.nn.functional.pad(logits.masked_fill(counts == 0, -torch.inf), (1, 0)).softmax(dim=-1)
            means = weights[..., 1:] / sizes
            shares.append(1 - weights[..., :1])
            outputs.append(weights[..., :1] * softmax + means @ values[:, :, None] + (means @ c.mT).tril() @ v)
            c, k, v = c[:, :, 0], k[:, :, 0], v[:, :, 0]
            count, keys, values = count + c.sum(dim=2), keys + c.mT @ k, values + c.mT @ v
        output, share = (torch.cat(x, dim=3).movedim(3, 1).flatten(2, 3) for x in (outputs, shares))
    present = {name: x.detach() for name, x in zip(CELLS, (count, keys, values), strict=True)}
    return output, present, share[..., 0]


def choose_cells(key: Tensor, router: Tensor) -> Tensor:
    """Return the cell of each key `[B, H_kv, T, d_k]` as one of M, `[B, H_kv, T, M]` int64.

    In fp64, because a choice must not depend on how a prompt is cut, which changes the order of sums.
    """
    router = router.double()
    logits = key.double() @ router[..., :-1].mT + router[:, None, :, -1]
    return torch.nn.functional.one_hot(logits.argmax(dim=-1), router.shape[1])
