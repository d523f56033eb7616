"""The definition of `liger_mixer`: a plain loop over sequences, heads and tokens that a newcomer can check by reading.

It is slow and exact, and independent of the chunked form in `ops.py`, which must agree with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ligerexport.model.gates import STRONGEST, get_gate
from ligerexport.model.scores import FAINTEST, Pool
from ligerexport.model.state import CELLS, FORGOTTEN, MixerSpec, MixerState

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: torch.softmax(x, dim=-1),
    "one_minus_sigmoid": lambda x: 1 - torch.sigmoid(x),
}
"""Functions from raw projections `[..., d_k]` to features of the recurrence."""
STATES = "recurrent_state", "memory_state"
"""Tensors of the state of the recurrence, of which a layer has one or none."""
DECAYS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logsigmoid": lambda k, divisor: torch.sigmoid(k).pow(1 / divisor),
    "minus_exp": lambda k, divisor: torch.exp(-k.clamp_max(math.log(STRONGEST * divisor)).exp() / divisor),
    "head_logsigmoid": lambda k, divisor: torch.sigmoid(k.mean()).pow(1 / divisor),
    "head_minus_softplus": lambda k, divisor: (1 + k.mean().exp()).pow(-1 / divisor),
}
"""Functions from a raw key `[d_k]` and a divisor to the share alpha = exp(g) that is kept of each row of the state."""


@dataclass
class Slot:
    """One token of the exact memory of one KV head."""

    key: Tensor
    value: Tensor
    position: int
    scores: list[float]


def liger_mixer_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
    score: Tensor | None = None,
    router: Tensor | None = None,
) -> tuple[Tensor, MixerState]:
    """Mix tokens one after the other; arguments and results are those of `ligerexport.kernels.ops.liger_mixer`."""
    batch, length, _, _ = query.shape
    layer, group = spec, spec.q_heads // spec.kv_heads
    output = query.new_zeros(batch, length, spec.q_heads, spec.d_v)
    present = {name: tensor.clone() for name, tensor in state.items()}
    for b in range(batch):
        for h, spec in enumerate(layer.heads):
            slots = _load_slots(state, b, h, layer, query.dtype)
            recurrent = next((state[name][b, h] for name in STATES if name in state), None)
            keys = state["recurrent_key"][b, h] if spec.config.keyed else None
            mass = state["recurrent_mass"][b, h] if spec.config.expands else None
            cells = [state[name][b, h] for name in CELLS if name in state]
            judge = present["judge_state"][b, h] if spec.config.judged else None
            share = state[FORGOTTEN][b, h] if FORGOTTEN in state else None
            for t in range(length):
                now = int(position[b]) + t
                if now < 0:  # padding on the left
                    continue
                q = query[b, t, h * group : (h + 1) * group]
                k, v = _round(key[b, t, h], layer), _round(value[b, t, h], layer)
                arrival = 0.0 if judge is None else _judge(k, v, judge)
                if spec.config.foresees:
                    assert score is not None
                    arrival = score[b, t, h].item()
                mixed, normaliser, evicted = _attend(q, k, v, now, slots, arrival, spec, rotary)
                if cells:
                    assert router is not None
                    for slot in evicted:
                        cells = _to_cell(slot, cells, router[h])
                    mixed, share = _read_cells(q, cells, mixed, normaliser, spec, rotary)
                elif mass is not None:
                    assert recurrent is not None
                    for slot in evicted:
                        recurrent, mass = _evict(slot, recurrent, mass, spec, rotary)
                    mixed, share = _expand(q, recurrent, mass, mixed, normaliser, spec, rotary)
                else:
                    mixed = spec.config.attention_weight * mixed
                if recurrent is not None and mass is None:
                    if keys is None:
                        recurred, recurrent = _recur(q, k, v, recurrent, spec)
                    else:
                        recurred, recurrent, keys = _recur_by_keys(q, k, v, recurrent, keys, spec)
                    mixed = mixed + spec.config.recurrence_weight * recurred
                output[b, t, h * group : (h + 1) * group] = mixed
            _store_slots(present, b, h, slots, layer)
            after = dict.fromkeys(STATES, recurrent) | {"recurrent_key": keys, "recurrent_mass": mass, FORGOTTEN: share}
            for name, x in (after | dict(zip(CELLS, cells, strict=False))).items():
                if x is not None and name in state:
                    present[name][b, h] = x.detach()
    return output, present


def _recur(q: Tensor, k: Tensor, v: Tensor, recurrent: Tensor, spec: MixerSpec) -> tuple[Tensor, Tensor]:
    """Update `[d_k, d_v]` and read it: paper, equation 7; ONNX LinearAttention, `gated`; or do it in memories.

    A normalised state has one more column, for a value that is always 1.
    """
    if recurrent.ndim == 3:
        return _recur_in_memories(q, k, v, recurrent, spec)
    gate = get_gate(spec.config.gate)
    kept, write = DECAYS[gate.decay](k, gate.decay_divisor), FEATURE_MAPS[gate.key_map](k)
    if gate.floor:
        kept, write = gate.floor + (1 - gate.floor) * kept, (1 - gate.floor) * write
    if gate.normalised:
        v = torch.cat([v, v.new_ones(1)])
    recurrent = kept.expand(len(k))[:, None] * recurrent + torch.outer(write, v)
    read = FEATURE_MAPS[gate.query_map](q) @ recurrent
    return read[:, :-1] / read[:, -1:] if gate.normalised else read, recurrent


def _recur_in_memories(q: Tensor, k: Tensor, v: Tensor, memories: Tensor, spec: MixerSpec) -> tuple[Tensor, Tensor]:
    """Update the chosen of `[M + 1, d_k, d_v]` and the last one, and read these: MoM, equations 3 to 8."""
    count = spec.config.memories
    logits = torch.stack([k[m::count].sum() / math.sqrt(spec.d_k / count) for m in range(count)])
    chosen = logits.argsort(descending=True)[: spec.config.active].tolist()
    weights = [*torch.softmax(logits[chosen], dim=0), 1.0]
    output, present = q.new_zeros(q.shape[0], spec.d_v), list(memories)
    for weight, m in zip(weights, [*chosen, count], strict=True):
        recurred, present[m] = _recur(q, k, v, memories[m], spec)
        output = output + weight * recurred
    return output, torch.stack(present)


def _recur_by_keys(
    q: Tensor, k: Tensor, v: Tensor, recurrent: Tensor, keys: Tensor, spec: MixerSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Update M rows `[M, d_v]` and their keys `[M, d_k]` and read them by softmax: gated slot attention."""
    gate = get_gate(spec.config.gate)
    kept = DECAYS[gate.decay](k.unflatten(0, (len(keys), -1)).mean(-1), gate.decay_divisor)[:, None]
    recurrent, keys = kept * recurrent + (1 - kept) * v, kept * keys + (1 - kept) * k
    return torch.softmax(q @ keys.T, dim=-1) @ recurrent, recurrent, keys


def _slow(spec: MixerSpec, rotary: Tensor) -> tuple[int, Tensor]:
    """Return the distance at which the recurrence reads, and a mask of channels that turn by at most 90 degrees."""
    distance = min(spec.config.recurrence_distance, spec.max_distance)
    cos, sin = rotary[:, spec.max_distance - 1].double()
    slow = torch.atan2(-sin, cos) * distance <= math.pi / 2
    slow[0] = False  # its first channel holds the count of evicted tokens
    return distance, torch.cat([slow, slow, slow.new_ones(spec.d_k - 2 * len(slow))])


def _evict(slot: Slot, recurrent: Tensor, mass: Tensor, spec: MixerSpec, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Add one token to the recurrence; its features are 1 and the slow channels of its key."""
    phi = slot.key * _slow(spec, rotary)[1]
    phi = torch.cat([phi.new_ones(1), phi[1:]])
    return recurrent + torch.outer(phi, slot.value), mass + phi


def _expand(
    q: Tensor, recurrent: Tensor, mass: Tensor, mixed: Tensor, normaliser: Tensor, spec: MixerSpec, rotary: Tensor
) -> tuple[Tensor, Tensor]:
    """Share the softmax's denominator with the first-order expansion around the mean logit of the evicted tokens.

    Returns:
        Output `[G, d_v]` and the share of the evicted tokens `[G]`; the next function returns the same.
    """
    count = mass[0]
    if count == 0:
        return mixed, torch.zeros_like(normaliser)
    phi = _far_query(q, spec, rotary)
    mean = phi @ mass / count  # [G], the mean logit
    deviation = phi @ recurrent - mean[:, None] * recurrent[0]  # deviation of the logits from their mean, times values
    answer = (recurrent[0] + deviation) / count
    share = torch.sigmoid(mean + torch.log(spec.config.recurrence_weight * count) - normaliser)
    return (1 - share)[:, None] * mixed + share[:, None] * answer, share


def _far_query(q: Tensor, spec: MixerSpec, rotary: Tensor) -> Tensor:
    """Return the queries `[G, d_k]` that give the logits of evicted tokens; fast channels are 0."""
    distance, slow = _slow(spec, rotary)
    back = rotary.clone()
    back[1] *= -1  # the table reaches further back than ahead
    return spec.scale * _rotate(q, -distance, spec, back) * slow


def _to_cell(slot: Slot, cells: list[Tensor], router: Tensor) -> list[Tensor]:
    """Add one token to the count, the key and the value of the cell that the router chooses by its key."""
    logits = router[:, :-1].double() @ slot.key.double() + router[:, -1].double()
    chosen = torch.zeros_like(cells[0])
    chosen[logits.argmax()] = 1
    return [cells[0] + chosen, cells[1] + torch.outer(chosen, slot.key), cells[2] + torch.outer(chosen, slot.value)]


def _read_cells(
    q: Tensor, cells: list[Tensor], mixed: Tensor, normaliser: Tensor, spec: MixerSpec, rotary: Tensor
) -> tuple[Tensor, Tensor]:
    """Share the softmax's denominator with the cells: each is read as its number of tokens at their mean."""
    there = cells[0] > 0
    count, keys, values = (x[there] for x in cells)
    logits = _far_query(q, spec, rotary) @ (keys / count[:, None]).T
    logits = logits + torch.log(spec.config.recurrence_weight * count)
    weights = torch.softmax(torch.cat([normaliser[:, None], logits], dim=1), dim=1)
    return weights[:, :1] * mixed + weights[:, 1:] @ (values / count[:, None]), weights[:, 1:].sum(dim=1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, now: int, slots: list[Slot], arrival: float, spec: MixerSpec, rotary: Tensor
) -> tuple[Tensor, Tensor, list[Slot]]:
    """Add the token to `slots`, drop the one that loses its slot, and attend.

    Returns:
        Output `[G, d_v]`, the logarithm of the softmax's denominator `[G]`, and the dropped slot.
    """
    config = spec.config
    scores = [arrival if pool.on_arrival else 0.0 for pool in spec.pools]
    slots.append(Slot(k, v, now, scores))

    in_window = [now - s.position < config.window for s in slots]
    kept = _kept(
        [s for s, near in zip(slots, in_window, strict=True) if not near and s.position >= config.sinks], spec.pools
    )
    before = list(slots)
    slots[:] = [
        s
        for s, near in zip(slots, in_window, strict=True)
        if near or s.position < config.sinks or any(s is other for other in kept)
    ]

    logits = torch.stack([_logit(q, s.key, now - s.position, spec, rotary) for s in slots], dim=-1)
    _score(logits, now, slots, spec)
    evicted = [s for s in before if not any(s is other for other in slots)]
    mixed = torch.softmax(logits, dim=-1) @ torch.stack([s.value for s in slots])
    return mixed, torch.logsumexp(logits, dim=-1), evicted


def _judge(k: Tensor, v: Tensor, judge: Tensor) -> float:
    """Return how far the linear state's answer for this key is from `v`, then add the token to it in place."""
    phi = torch.softmax(k, dim=-1)
    recalled = phi @ judge
    answer = recalled[:-1] / recalled[-1] if recalled[-1] > 0 else torch.zeros_like(v)
    judge.add_(torch.outer(phi, torch.cat([v, v.new_ones(1)])))
    return (v - answer).norm().item()


def _kept(left: list[Slot], pools: tuple[Pool, ...]) -> list[Slot]:
    """Return the slots that are kept: the best of the first pool, then of the rest by the next; ties keep the older."""
    kept: list[Slot] = []
    for i, pool in enumerate(pools):
        left = sorted(left, key=lambda s, i=i, pool=pool: (-_rank(s.scores[i], s.position, pool), s.position))  # type: ignore[misc]
        kept, left = kept + left[: pool.size], left[pool.size :]
    return kept


def _rank(value: float, position: int, pool: Pool) -> float:
    """Return the rank in a pool: the score, or its logarithm minus the cost of age."""
    return math.log(max(value, FAINTEST)) + position / pool.horizon if pool.horizon else value


def _rotate(x: Tensor, offset: int, spec: MixerSpec, rotary: Tensor) -> Tensor:
    """Rotate the halves of `x` `[..., d_k]` by `offset` tokens, like transformers' `apply_rotary_pos_emb`."""
    cos, sin = rotary[:, spec.max_distance + offset].to(x.dtype)
    half = cos.numel()
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _logit(q: Tensor, k: Tensor, distance: int, spec: MixerSpec, rotary: Tensor) -> Tensor:
    """Return the attention logits `[G]` of one slot."""
    capped = min(distance, spec.max_distance)
    return spec.scale * (_rotate(q, 0, spec, rotary) @ _rotate(k, -capped, spec, rotary))


def _score(logits: Tensor, now: int, slots: list[Slot], spec: MixerSpec) -> None:
    """Add the attention of this token's queries to the scores of slots in the window: softmax over sinks and window."""
    config = spec.config
    local = [now - s.position < config.window or s.position < config.sinks for s in slots]
    weight = torch.softmax(logits.masked_fill(~torch.tensor(local, device=logits.device), -math.inf), dim=-1)
    for i, pool in enumerate(spec.pools):
        if pool.on_arrival:
            continue
        for j, s in enumerate(slots):
            if pool.first_distance <= now - s.position < config.window:
                received = weight[:, j] * (s.value.norm() if pool.by_value else 1.0)
                if pool.summed:
                    s.scores[i] += received.sum().item()
                else:
                    s.scores[i] = max(s.scores[i], received.max().item())


def _codes(x: Tensor, spec: MixerSpec) -> tuple[Tensor, float]:
    """Return codes of a vector `[d]` in the type of the state and their scale, which is rounded to fp16."""
    if spec.config.state_dtype != "int8":
        return x, 1.0
    scale = max(x.abs().max().item() / 127, 2.0**-14)  # the smallest normal number of fp16
    scale = torch.tensor(scale, dtype=torch.float16).item()
    return (x / scale).round().clamp(-127, 127), scale


def _round(x: Tensor, spec: MixerSpec) -> Tensor:
    """Return a vector `[d]` as the state gives it back, with the gradient of the given one."""
    if spec.config.state_dtype == "activation":
        return x
    codes, scale = _codes(x.detach(), spec)
    rounded = codes.half().to(x.dtype) if spec.config.state_dtype == "float16" else codes * scale
    return rounded + (x - x.detach())


def _rows(name: str, h: int, spec: MixerSpec) -> tuple[Any, ...]:
    """Return the index of the slots of one head in a tensor of the state without its batch axis."""
    if not spec.config.ragged:
        return (h,)
    counts = [head.config.num_slots for head in spec.heads]
    if name == "slot_score":
        counts = [n if head.config.slots else 0 for n, head in zip(counts, spec.heads, strict=True)]
    rows = slice(sum(counts[:h]), sum(counts[: h + 1]))
    return (slice(None), rows) if name == "slot_score" else (rows,)


def _load_slots(state: MixerState, b: int, h: int, spec: MixerSpec, dtype: torch.dtype) -> list[Slot]:
    """Read the filled slots of one head."""
    head = {name: x[b][_rows(name, h, spec)] for name, x in state.items() if name.startswith("slot_")}
    for name in ("slot_key", "slot_value"):
        if spec.config.ragged:
            head[name] = head[name].to(dtype)
        if f"{name}_scale" in head:
            head[name] = head[name] * head[f"{name}_scale"].to(dtype)[:, None]
    scores = head.get("slot_score") if spec.heads[h].config.slots else None
    return [
        Slot(head["slot_key"][n], head["slot_value"][n], int(p), [] if scores is None else scores[:, n].tolist())
        for n, p in enumerate(head["slot_position"].tolist())
        if p >= 0
    ]


def _store_slots(present: MixerState, b: int, h: int, slots: list[Slot], spec: MixerSpec) -> None:
    """Write the slots of one head in the order of their positions, empty slots first."""
    slots.sort(key=lambda s: s.position)
    head = {name: x[b][_rows(name, h, spec)] for name, x in present.items() if name.startswith("slot_")}
    empty = len(head["slot_position"]) - len(slots)
    head["slot_position"].fill_(-1)
    for n, s in enumerate(slots, start=empty):
        for name, vector in (("slot_key", s.key), ("slot_value", s.value)):
            codes, scale = _codes(vector.detach(), spec)
            head[name][n] = codes
            if f"{name}_scale" in head:
                head[f"{name}_scale"][n] = scale
        head["slot_position"][n] = s.position
        if s.scores:
            head["slot_score"][:, n] = torch.tensor(s.scores, dtype=head["slot_score"].dtype)
