"""Softmax attention over the bounded exact memory (sinks, window, scored slots) in plain torch, a block at a time.

Every query of a block sees exactly its own set: its window, the sinks, and the best of all tokens that had left the
window by then. Rotary embedding is applied here only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ligerexport.model.scores import FAINTEST, Pool
from ligerexport.model.state import MixerSpec, MixerState

MASKED = -1e30
"""Logit of a slot that a query does not see; finite, so that a query without any slot gives finite numbers."""


def rotary_table(
    inv_freq: Tensor, max_distance: int, ahead: int, dtype: torch.dtype = torch.float32, turns: bool = False
) -> Tensor:
    """Tabulate rotary embedding for offsets from `-max_distance` to `ahead - 1` tokens.

    Args:
        inv_freq: `[R]`, radians per token; R is half the rotated width.
        max_distance: Largest distance in tokens.
        ahead: Longest block of tokens, at least 1.
        dtype: Type of the table, which is computed in fp64.
        turns: Whether a last row says which part of a turn one token back is, from 0 to 1, as the sum of a multiple of
            2^-16 and a rest below it.

    Returns:
        `[2, max_distance + ahead + turns, R]`, cosine and sine.
    """
    offset = torch.arange(-max_distance, ahead, dtype=torch.float64, device=inv_freq.device)
    angle = offset[:, None] * inv_freq.double()
    table = torch.stack([angle.cos(), angle.sin()])
    if turns:
        part = (inv_freq.double() / (-2 * torch.pi)).remainder(1)
        coarse = (part * 2**16).floor() / 2**16
        table = torch.cat([table, torch.stack([coarse, part - coarse])[:, None]], dim=1)
    return table.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the first 2 R channels of `x` `[..., d_k]` by angles `[..., R]`."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arrival: Tensor | None,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
) -> tuple[Tensor, MixerState, Tensor, Tensor]:
    """Attend over the slots and choose the slots that the next block starts with.

    Args:
        query: `[B, H_kv, G, T, d_k]` before rotary embedding.
        key: `[B, H_kv, T, d_k]` before rotary embedding.
        value: `[B, H_kv, T, d_v]`.
        arrival: `[B, H_kv, T]`, the score on arrival, novelty or learned; needed if a pool ranks by it.
        position: `[B]`, tokens seen before this block; a token at a negative position is padding.
        state: Tensors named `slot_*`, as `MixerSpec.state` lists them.
        rotary: Table from `rotary_table`, with `ahead` at least T.

    Returns:
        Output `[B, H_kv, G, T, d_v]`, the slots after the last token, the logarithm of the softmax's denominator
        `[B, H_kv, G, T]`, and the position of the token that each step evicts `[B, H_kv, T]`, -1 for none.
    """
    config = spec.config
    now = position[:, None] + torch.arange(key.shape[2], device=key.device)
    keys = torch.cat([state["slot_key"].to(key.dtype), key], dim=2)
    values = torch.cat([state["slot_value"].to(value.dtype), value], dim=2)
    positions = torch.cat([state["slot_position"], now[:, None].expand(-1, key.shape[1], -1)], dim=2)

    distance = now[:, None, :, None] - positions[:, :, None]  # [B, H_kv, T, C]
    seen = (distance >= 0) & (positions >= 0)[:, :, None]
    near = distance < config.window
    sink = (positions < config.sinks)[:, :, None]
    always = seen & (near | sink)
    logits = _logits(query, keys, positions, distance, position, spec, rotary)

    scores = None
    if config.slots:
        local = torch.softmax(logits.where(always[:, :, None], MASKED), dim=-1)
        scores = _scores(local, seen & near, distance, values, arrival, state["slot_score"], spec)
    born = positions - position[:, None, None]
    visible = always | _kept(seen & ~near & ~sink, scores, born, spec.pools)
    logits = logits.where(visible[:, :, None], MASKED)
    output = torch.softmax(logits, dim=-1) @ values[:, :, None]
    lost = torch.nn.functional.pad(state["slot_position"] >= 0, (0, key.shape[2]))[:, :, None]
    lost = torch.cat([lost, visible[:, :, :-1]], dim=2) & ~visible
    lost_position = torch.where(lost, positions[:, :, None], -1).amax(dim=-1)

    last = positions.where(visible[:, :, -1], -1)
    order = last.sort(dim=-1, stable=True).indices[..., -config.num_slots :]
    present = {
        "slot_key": _take(keys, order).to(state["slot_key"].dtype),
        "slot_value": _take(values, order).to(state["slot_value"].dtype),
        "slot_position": last.gather(-1, order),
    }
    if scores is not None:
        present["slot_score"] = scores.gather(-1, order[:, :, None].expand(-1, -1, scores.shape[2], -1))
    return output, present, logits.logsumexp(dim=-1), lost_position


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows `index` `[B, H, N]` of `x` `[B, H, C, d]`."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def _logits(
    query: Tensor, keys: Tensor, positions: Tensor, distance: Tensor, position: Tensor, spec: MixerSpec, rotary: Tensor
) -> Tensor:
    """Return logits `[B, H_kv, G, T, C]` at the rotary distance, limited to the largest one."""
    cos, sin = rotary.to(keys.dtype)
    length, cap = query.shape[3], spec.max_distance
    # the offset of an empty slot is meaningless and may lie outside the table during padding
    offset = (positions - position[:, None, None] + cap).clamp(0, rotary.shape[1] - 1)
    rotated = rotate(keys, cos[offset], sin[offset])[:, :, None].transpose(-1, -2)
    logits = rotate(query, cos[cap : cap + length], sin[cap : cap + length]) @ rotated
    if length > 1:  # for a single query, offsets are distances and nothing is left to correct
        far = rotate(query, cos[0], -sin[0]) @ keys[:, :, None].transpose(-1, -2)
        logits = logits.where((distance <= cap)[:, :, None], far)
    return spec.scale * logits


def _scores(
    local: Tensor,
    in_window: Tensor,
    distance: Tensor,
    values: Tensor,
    arrival: Tensor | None,
    past: Tensor,
    spec: MixerSpec,
) -> Tensor:
    """Return the scores `[B, H_kv, P, C]` of all candidates, each complete once its token has left the window."""
    scores = []
    for i, pool in enumerate(spec.pools):
        if pool.on_arrival:
            assert arrival is not None
            scores.append(torch.cat([past[:, :, i], arrival], dim=-1))
            continue
        counts = in_window & (distance >= pool.first_distance)
        weight = local.where(counts[:, :, None], 0.0)
        received = weight.sum(dim=(2, 3)) if pool.summed else weight.amax(dim=(2, 3))
        if pool.by_value:
            received = received * values.norm(dim=-1)
        carried = torch.nn.functional.pad(past[:, :, i], (0, local.shape[3]))
        scores.append(carried + received if pool.summed else torch.maximum(carried, received))
    return torch.stack(scores, dim=2)


def _kept(left: Tensor, scores: Tensor | None, born: Tensor, pools: tuple[Pool, ...]) -> Tensor:
    """Return a mask `[B, H_kv, T, C]` of the tokens that left the window and hold a slot for each query.

    A token's rank does not depend on the query, so candidates are sorted once; each query keeps the first of those
    that have left. The older token wins a tie. Pools that age use positions `born` `[B, H_kv, C]` relative to the
    block, which do not round as large positions would.
    """
    kept = torch.zeros_like(left)
    for i, pool in enumerate(pools):
        assert scores is not None
        rank = scores[:, :, i]
        if pool.horizon:
            rank = rank.clamp_min(FAINTEST).log() + born / pool.horizon
        order = rank.sort(dim=-1, descending=True, stable=True).indices[:, :, None].expand_as(left)
        ranked = left.gather(-1, order)
        best = ranked & (ranked.cumsum(dim=-1, dtype=torch.int32) <= pool.size)
        won = torch.zeros_like(left).scatter(-1, order, best)
        kept, left = kept | won, left & ~won
    return kept
