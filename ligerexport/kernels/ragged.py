"""Ragged slots: KV heads with memories of their own sizes on one axis of the state, in 8 or 16 bits if wanted.

Heads of equal sizes form a group, for which the operator of equal heads does the work. The Triton kernels read the
sizes of each head and take all heads at once, with scratch memory for the largest; the state itself has no padding.
Without gradients, they also do what this file does, see `ligerexport.kernels.fused.ragged_prefill`.
Keys and values are rounded to the type of the state when they arrive, before anything reads them, and their codes are
never computed again. So a prompt can be cut anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ligerexport.kernels.library.dispatch import fused
from ligerexport.kernels.library.ragged_prefill import ragged_prefill, serves
from ligerexport.model.state import FORGOTTEN, MOST, MixerSpec, MixerState

Mixer = Callable[..., tuple[Tensor, MixerState]]
"""An operator of equal heads with the arguments and results of `ligerexport.kernels.ops.liger_mixer`."""


class Stored(NamedTuple):
    """Vectors in a type of `STATE_DTYPES`.

    Attributes:
        codes: `[..., d]`, the vectors, or integers that a scale multiplies.
        scale: `[...]` fp16; None if `codes` are the vectors.
    """

    codes: Tensor
    scale: Tensor | None

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return the vectors `[..., d]` in a floating-point type."""
        if self.scale is None:
            return self.codes.to(dtype)
        return (self.codes.float() * self.scale.float()[..., None]).to(dtype)


def store(x: Tensor, dtype: str) -> Stored:
    """Round vectors `[..., d]` to a type of `STATE_DTYPES`; `int8` gives each vector a scale."""
    if dtype == "activation":
        return Stored(x, None)
    largest = torch.finfo(torch.float16).max
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if dtype == "float16":
        return Stored(x.clamp(-largest, largest).half(), None)
    most = x.new_full((), MOST)  # on CUDA, x / MOST would multiply by a rounded 1 / MOST
    scale = (x.abs().amax(dim=-1) / most).clamp(torch.finfo(torch.float16).tiny, largest).half()
    codes = (x / scale[..., None].to(x.dtype)).round().clamp(-MOST, MOST)
    return Stored(codes.to(torch.int8), scale)


def ragged_mixer(
    mixer: Mixer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
    score: Tensor | None,
    router: Tensor | None,
) -> tuple[Tensor, MixerState]:
    """Run `mixer` for each group of heads; further arguments and the results are those of the mixer.

    Gradients pass through the rounding of keys and values unchanged. On CUDA, kernels compute all heads at once where
    no gradient is needed.
    """
    if serves(query, key, value, spec):
        return ragged_prefill(query, key, value, position, state, spec, rotary, score)
    key, new_key = _rounded(key, spec)
    value, new_value = _rounded(value, spec)
    now = position[:, None] + torch.arange(key.shape[1], device=key.device)
    plan = _plan(spec, fused(query) and spec.roomy is not None, query.device)
    outputs, parts = [], []
    for group in plan.groups:
        past = _read(state, group, spec, query.dtype)
        learned = _pick(score, group.heads, 2) if score is not None and group.spec.config.foresees else None
        mixed, present = mixer(
            _pick(query, group.lanes, 2), _pick(key, group.heads, 2), _pick(value, group.heads, 2), position, past,
            group.spec, rotary, learned, None if router is None else _pick(router, group.heads, 0),
        )  # fmt: skip
        new = {"slot_key": new_key, "slot_value": new_value}
        parts.append(_written(state, group, past, present, now, new))
        outputs.append(mixed)
    return _pick(torch.cat(outputs, dim=2), plan.lanes, 2), _joined(state, parts, plan)


class _Group(NamedTuple):
    """KV heads that one call of the mixer computes.

    Attributes:
        heads: The heads.
        lanes: Their query heads.
        spec: The layer as the mixer sees it.
        slots: `[heads * N]`, the slot on the axis for each slot of the mixer's state, -1 for none.
        scored: The same on the axis of scores; empty if the group keeps no scores.
    """

    heads: tuple[int, ...]
    lanes: tuple[int, ...]
    spec: MixerSpec
    slots: Tensor
    scored: Tensor


class _Plan(NamedTuple):
    """How a layer is computed.

    Attributes:
        groups: The groups.
        lanes: The place of each query head in the outputs of all groups.
        heads: The place of each KV head in all groups.
        slots: The place of each slot of the axis in the slots of all groups.
        scored: The same for scores.
    """

    groups: tuple[_Group, ...]
    lanes: tuple[int, ...]
    heads: tuple[int, ...]
    slots: Tensor
    scored: Tensor


@lru_cache(maxsize=512)
def _plan(spec: MixerSpec, roomy: bool, device: torch.device) -> _Plan:
    """Return the groups of a layer: all heads with room for the largest one, or heads of equal sizes."""
    size = spec.q_heads // spec.kv_heads
    counts = spec.slots_per_head
    scored = [n if head.config.slots else 0 for n, head in zip(counts, spec.heads, strict=True)]
    split = ((tuple(range(spec.kv_heads)), spec.roomy),) if roomy and spec.roomy else spec.groups
    groups = []
    for heads, group in split:
        lanes = tuple(head * size + lane for head in heads for lane in range(size))
        slots = _places(counts, heads, group.config.num_slots)
        scores = _places(scored, heads, group.config.num_slots) if group.config.slots else []
        groups.append(_Group(heads, lanes, group, _index(slots, device), _index(scores, device)))
    order = [head for group in groups for head in group.heads]

    def back(name: str) -> Tensor:
        places = [place for group in groups for place in getattr(group, name).tolist()]
        where = {place: i for i, place in enumerate(places) if place >= 0}
        return _index([where[place] for place in range(len(where))], device)

    lanes = tuple(order.index(head) * size + lane for head in range(spec.kv_heads) for lane in range(size))
    heads = tuple(order.index(head) for head in range(spec.kv_heads))
    return _Plan(tuple(groups), lanes, heads, back("slots"), back("scored"))


def _index(places: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(places, dtype=torch.long, device=device)


def _places(counts: Sequence[int], heads: Sequence[int], room: int) -> list[int]:
    """Return the slots of some heads on the axis, each head filled up with -1 in front."""
    starts = [0, *accumulate(counts)]
    return [i for h in heads for i in (*[-1] * (room - counts[h]), *range(starts[h], starts[h] + counts[h]))]


def _rounded(x: Tensor, spec: MixerSpec) -> tuple[Tensor, Stored]:
    """Return vectors rounded to the type of the state, with the gradient of the given ones, and their codes."""
    stored = store(x.detach(), spec.config.state_dtype)
    if spec.config.state_dtype == "activation":
        return x, stored
    return stored.read(x.dtype) + (x - x.detach()), stored


def _pick(x: Tensor, index: Sequence[int], dim: int) -> Tensor:
    """Return some rows of a tensor, as a view if they are neighbours."""
    if list(index) == list(range(index[0], index[0] + len(index))):
        return x.narrow(dim, index[0], len(index))
    return x.index_select(dim, _kept(tuple(index), x.device))


@lru_cache(maxsize=512)
def _kept(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Return `places` on a device, which a copy in each call would stop."""
    with torch.inference_mode(False):  # an index made in inference mode could not be used in training later
        return _index(places, device)


def _rows(state: MixerState, name: str, group: _Group) -> Tensor:
    """Return a tensor of the state for the heads of a group, `[B, heads, ...]`; empty slots may hold anything."""
    if name == "slot_score":
        picked = state[name].index_select(2, group.scored.clamp_min(0))
        return picked.unflatten(2, (len(group.heads), -1)).transpose(1, 2)
    if name.startswith("slot_"):
        return state[name].index_select(1, group.slots.clamp_min(0)).unflatten(1, (len(group.heads), -1))
    return _pick(state[name], group.heads, 1)


def _stored(state: MixerState, name: str, group: _Group) -> Stored:
    scale = f"{name}_scale"
    return Stored(_rows(state, name, group), _rows(state, scale, group) if scale in state else None)


def _read(state: MixerState, group: _Group, spec: MixerSpec, dtype: torch.dtype) -> MixerState:
    """Return the state of a group, as the mixer has it."""
    past = {}
    for name in (tensor.name for tensor in group.spec.state()):
        if name in ("slot_key", "slot_value"):
            stored = _stored(state, name, group)
            past[name] = stored.codes if spec.config.state_dtype == "activation" else stored.read(dtype)
        else:
            past[name] = _rows(state, name, group)
    empty = (group.slots < 0).view(len(group.heads), -1)
    past["slot_position"] = past["slot_position"].long().masked_fill(empty, -1)
    return past | ({FORGOTTEN: _rows(state, FORGOTTEN, group)} if FORGOTTEN in state else {})


def _written(
    state: MixerState, group: _Group, past: MixerState, present: MixerState, now: Tensor, new: dict[str, Stored]
) -> MixerState:
    """Return the state of a group after a call, `[B, heads, ...]`, with codes in place of the mixer's vectors.

    Args:
        state: The state before the call.
        group: The group.
        past: What `_read` returned.
        present: The mixer's state after the call.
        now: `[B, T]`, positions of the new tokens.
        new: New keys and values, `[B, T, H_kv, ...]`.
    """
    held = present["slot_position"]
    written = present | {"slot_position": held.int()}
    if new["slot_key"].codes.dtype == present["slot_key"].dtype:
        return written
    positions = torch.cat([past["slot_position"], now[:, None].expand(-1, len(group.heads), -1)], dim=2)
    positions, order = positions.clamp_min(-1).sort(dim=-1)
    source = order.gather(2, torch.searchsorted(positions, held))
    for name, arrived in new.items():
        for part, old, x in zip(("", "_scale"), _stored(state, name, group), arrived, strict=True):
            if old is not None and x is not None:
                both = torch.cat([old, _pick(x, group.heads, 2).transpose(1, 2)], dim=2)
                written[name + part] = _take(both, source, held >= 0)
    return written


def _take(x: Tensor, index: Tensor, filled: Tensor) -> Tensor:
    """Gather rows `index` `[B, H, N]` of `x` `[B, H, C]` or `[B, H, C, d]`; 0 where nothing is filled."""
    if x.ndim == 4:
        index, filled = index[..., None].expand(-1, -1, -1, x.shape[3]), filled[..., None]
    return torch.where(filled, x.gather(2, index), 0)


def _joined(state: MixerState, parts: Sequence[MixerState], plan: _Plan) -> MixerState:
    """Return the state of all heads from those of the groups."""
    made = {}
    for name in state:
        found = [part[name] for part in parts if name in part]
        if name == "slot_score":
            made[name] = torch.cat([x.transpose(1, 2).flatten(2) for x in found], dim=2).index_select(2, plan.scored)
        elif name.startswith("slot_"):
            made[name] = torch.cat([x.flatten(1, 2) for x in found], dim=1).index_select(1, plan.slots)
        else:
            made[name] = _pick(torch.cat(found, dim=1), plan.heads, 1)
    return made
