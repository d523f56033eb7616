"""Ragged slots: KV heads with memories of their own sizes on one axis of the state, in 8 or 16 bits if wanted.

Heads of equal sizes form a group, for which the operator of equal heads does the work. Keys and values are rounded to
the type of the state when they arrive, before anything reads them, and their codes are never computed again. So a
prompt can be cut anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ligerexport.model.state import MixerSpec, MixerState

MOST = 127
"""Largest code of 8 bits; codes are symmetric around 0."""

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
    if dtype == "float16":
        return Stored(x.clamp(-largest, largest).half(), None)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (x.abs().amax(dim=-1) / MOST).clamp(torch.finfo(torch.float16).tiny, largest).half()
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

    Gradients pass through the rounding of keys and values unchanged.
    """
    size, now = spec.q_heads // spec.kv_heads, position[:, None] + torch.arange(key.shape[1], device=key.device)
    key, new_key = _rounded(key, spec)
    value, new_value = _rounded(value, spec)
    axis, outputs, order = _Axis(spec, state), [], []
    for heads, group in spec.groups:
        lanes = [head * size + lane for head in heads for lane in range(size)]
        past = axis.past(heads, group, query.dtype)
        learned = _pick(score, heads, 2) if score is not None and group.config.foresees else None
        mixed, present = mixer(
            _pick(query, lanes, 2), _pick(key, heads, 2), _pick(value, heads, 2), position, past, group, rotary,
            learned, None if router is None else _pick(router, heads, 0),
        )  # fmt: skip
        axis.put(heads, past, present, now, {"slot_key": new_key, "slot_value": new_value})
        outputs.append(mixed)
        order += lanes
    back = sorted(range(spec.q_heads), key=order.__getitem__)
    return _pick(torch.cat(outputs, dim=2), back, 2), axis.present()


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
    return x.index_select(dim, torch.tensor(index, device=x.device))


def _take(x: Tensor, index: Tensor, filled: Tensor) -> Tensor:
    """Gather rows `index` `[B, H, N]` of `x` `[B, H, C]` or `[B, H, C, d]`; 0 where nothing is filled."""
    if x.ndim == 4:
        index, filled = index[..., None].expand(-1, -1, -1, x.shape[3]), filled[..., None]
    return torch.where(filled, x.gather(2, index), 0)


class _Axis:
    """The state of a ragged layer, by heads: the state before a call, and the parts of the one after it."""

    def __init__(self, spec: MixerSpec, state: MixerState) -> None:
        self.state, self.plain = state, spec.config.state_dtype == "activation"
        self.counts = spec.slots_per_head
        self.scored = tuple(n if head.config.slots else 0 for n, head in zip(self.counts, spec.heads, strict=True))
        self.parts: dict[str, dict[int, Tensor]] = {name: {} for name in state}

    def _rows(self, name: str, heads: Sequence[int]) -> Tensor:
        """Return a tensor of some heads of equal sizes, `[B, heads, ...]`."""
        x = self.state[name]
        if not name.startswith("slot_"):
            return _pick(x, heads, 1)
        dim, counts = (2, self.scored) if name == "slot_score" else (1, self.counts)
        starts = [0, *accumulate(counts)]
        return torch.stack([x.narrow(dim, starts[head], counts[head]) for head in heads], dim=1)

    def _stored(self, name: str, heads: Sequence[int]) -> Stored:
        scale = f"{name}_scale"
        return Stored(self._rows(name, heads), self._rows(scale, heads) if scale in self.state else None)

    def past(self, heads: Sequence[int], group: MixerSpec, dtype: torch.dtype) -> MixerState:
        """Return the state of a group, as the mixer of equal heads has it."""
        past = {}
        for tensor in group.state():
            if tensor.name in ("slot_key", "slot_value"):
                stored = self._stored(tensor.name, heads)
                past[tensor.name] = stored.codes if self.plain else stored.read(dtype)
            else:
                past[tensor.name] = self._rows(tensor.name, heads)
        return past | {"slot_position": past["slot_position"].long()}

    def put(
        self, heads: Sequence[int], past: MixerState, present: MixerState, now: Tensor, new: dict[str, Stored]
    ) -> None:
        """Take over the state of a group after a call.

        Args:
            heads: The group's heads.
            past: What `past` returned.
            present: The state after the call.
            now: `[B, T]`, positions of the new tokens.
            new: New keys and values, `[B, T, H_kv, ...]`.
        """
        found = dict(present) | {"slot_position": present["slot_position"].int()}
        if not self.plain:
            held = present["slot_position"]
            positions = torch.cat([past["slot_position"], now[:, None].expand(-1, len(heads), -1)], dim=2)
            positions, order = positions.clamp_min(-1).sort(dim=-1)
            source = order.gather(2, torch.searchsorted(positions, held))
            for name, arrived in new.items():
                for part, old, x in zip(("", "_scale"), self._stored(name, heads), arrived, strict=True):
                    if old is not None and x is not None:
                        both = torch.cat([old, _pick(x, heads, 2).transpose(1, 2)], dim=2)
                        found[name + part] = _take(both, source, held >= 0)
        for name, x in found.items():
            self.parts[name] |= dict(zip(heads, x.unbind(1), strict=True))

    def present(self) -> MixerState:
        """Return the state after the call."""
        made = {}
        for name, parts in self.parts.items():
            heads = [parts[head] for head in sorted(parts)]
            if name.startswith("slot_"):
                made[name] = torch.cat(heads, dim=2 if name == "slot_score" else 1)
            else:
                made[name] = torch.stack(heads, dim=1)
        return made
