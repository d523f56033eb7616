"""One layer's mixer as graph nodes, for one chunk of T tokens; `ligerexport.kernels.ops.liger_mixer` defines it.

Every `past` tensor has one consumer. Comments name axes: C = N + T candidates, G queries in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ligerexport.exporters.onnx.builder import Builder
from ligerexport.exporters.onnx.candidates import Candidates, split
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.lowerings import Portable, Table
from ligerexport.exporters.onnx.native.node import bounded_memory, turn_table
from ligerexport.exporters.onnx.packed import Codes, Heads, Pool, read, store
from ligerexport.exporters.onnx.recurrence import gated_recurrence, weighted_mean
from ligerexport.kernels.evicted import slow_rotation
from ligerexport.kernels.memory_attention import MASKED, rotary_table, rotate
from ligerexport.model.scores import FAINTEST
from ligerexport.model.state import EVICTED, FORGOTTEN, MixerSpec


@dataclass(frozen=True)
class RotaryTables:
    """Tables for keys by offset from `-max_distance` on, for the queries of a chunk, and for the largest distance. They
    are None in a layer without rotary embedding.

    `query_map` and `key_map` `[d_k, d_k - 1]` make the features of evicted tokens, except the first; `turn` `[3, R]`
    makes them in the lowering `native`.
    """

    keys: Table | None
    near: Table | None
    far: Table | None
    rows: int
    query_map: ir.Value | None = None
    key_map: ir.Value | None = None
    turn: ir.Value | None = None


def rotary_tables(
    lower: Portable, inv_freq: Tensor, spec: MixerSpec, max_chunk: int, name: str = "rotary"
) -> RotaryTables:
    """Add the tables of layers that share them to the graph, for calls of at most `max_chunk` tokens.

    `spec` is that of the layer with the most slots.
    """
    g = lower.g
    # ONNX Runtime requires at least as many rows as candidates
    ahead = max(max_chunk, max_chunk + spec.config.num_slots - spec.max_distance)
    rotary = rotary_table(inv_freq, spec.max_distance, ahead).numpy()
    half = rotary.shape[2]
    far = np.stack([rotary[0, :1], -rotary[1, :1]]).repeat(ahead, axis=1)

    def table(kind: str, values: np.ndarray) -> Table | None:
        if not inv_freq.any() and not lower.native:
            return None
        cos, sin = (np.ascontiguousarray(x) for x in values)
        return Table(g.table(f"{name}.{kind}.cos", cos), g.table(f"{name}.{kind}.sin", sin), half)

    near = rotary[:, spec.max_distance :]
    maps: dict[str, ir.Value] = {}
    if spec.config.evicts and lower.native:
        maps["turn"] = turn_table(g, torch.from_numpy(rotary), spec, name)
    elif spec.config.evicts:
        (cos, sin), slow = slow_rotation(torch.from_numpy(rotary), spec)
        channels = torch.eye(spec.d_k)
        turned = rotate(channels, cos, sin) * spec.scale, rotate(channels, slow.float(), torch.zeros_like(sin))
        names = ("query_map", "key_map")
        maps = {n: g.table(f"{name}.{n}", x[:, 1:].contiguous().numpy()) for n, x in zip(names, turned, strict=True)}
    return RotaryTables(table("keys", rotary), table("near", near), table("far", far), rotary.shape[1], **maps)


def mixer(
    lower: Portable,
    frame: Frame,
    spec: MixerSpec,
    tables: RotaryTables,
    projected: tuple[ir.Value, ir.Value, ir.Value],
    past: dict[str, ir.Value],
    seen: list[Candidates],
    score: ir.Value | None = None,
    layer: int = 0,
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Write one mixer.

    Args:
        tables: Tables from `rotary_tables`.
        projected: Query, key, value `[B * T, H * d]`, before rotary embedding.
        past: State by the names of `MixerSpec.state`; `candidates` reads the positions, except in `native`.
        seen: Candidates from `candidates` of each group of heads; the lowering `native` does not need them.
        score: `[B * T, H]` fp32, needed where `spec.config.foresees`.
        layer: Index of the layer, for the lowering `native`.

    Returns:
        Output `[B * T, H_q * d_v]` and the new state, with `FORGOTTEN` `[B, H_q]` if `lower.meter` asks for it.
    """
    g, config, heads = lower.g, spec.config, spec.kv_heads
    keys, values = frame.per_token(projected[1], heads, spec.d_k), frame.per_token(projected[2], heads, spec.d_v)
    new: dict[str, Codes] = {}
    if not lower.native or config.judged or (config.recurrent and not config.evicts):  # `native` rounds by itself
        new = {"slot_key": store(g, keys, config.state_dtype), "slot_value": store(g, values, config.state_dtype)}
    if new and config.state_dtype != "activation":
        keys, values = (read(g, x, config.state_dtype) for x in new.values())
        projected = projected[0], g.reshape(keys, -1, heads * spec.d_k), g.reshape(values, -1, heads * spec.d_v)

    present: dict[str, ir.Value] = {}
    arrival = features = None
    if config.foresees:
        assert score is not None
        arrival = g.transpose(frame.per_token(score, heads, 1), 0, 2, 3, 1)
    if config.judged:
        real = g.once("real4", lambda: g.op("Unsqueeze", frame.real(), g.const([3])))
        features = g.op("Mul", g.op("Softmax", keys, axis=-1), real)
        arrival, present["judge_state"] = _judge(lower, frame, spec, features, values, past["judge_state"])
    if lower.native:
        assert tables.keys is not None
        metered = lower.meter and config.evicts
        mixed, kept = bounded_memory(
            frame, spec, tables.keys, tables.turn, projected, arrival, score, past, layer, metered
        )
    else:
        query = g.transpose(frame.per_token(projected[0], spec.q_heads, spec.d_k), 0, 2, 1, 3)
        if config.ragged:
            mixed, kept = _by_group(lower, frame, spec, tables, seen, query, new, arrival, past)
        else:
            key, value = (
                g.concat(past[name], g.transpose(x, 0, 2, 1, 3), axis=2)
                for name, x in (("slot_key", keys), ("slot_value", values))
            )
            slots = Slots(lower, frame, spec, tables, seen[0])
            mixed, kept, order = slots.attend(query, key, value, arrival, past)
            row = g.op("Add", order, frame.row_base(heads, config.num_slots))
            kept["slot_key"] = g.op("Gather", g.reshape(key, -1, spec.d_k), row)
            kept["slot_value"] = g.op("Gather", g.reshape(value, -1, spec.d_v), row)
    if config.evicts:
        return mixed, kept | present
    mixed = _scaled(g, mixed, config.attention_weight)
    if config.recurrent:
        recurred, recurrent = gated_recurrence(lower, frame, spec, projected, features, past)
        present |= recurrent
        mixed = g.op("Add", mixed, _scaled(g, recurred, config.recurrence_weight))
    return mixed, kept | present


def _by_group(
    lower: Portable,
    frame: Frame,
    spec: MixerSpec,
    tables: RotaryTables,
    seen: list[Candidates],
    query: ir.Value,
    new: dict[str, Codes],
    arrival: ir.Value | None,
    past: dict[str, ir.Value],
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Do what `Slots.attend` does for a ragged layer, group by group; `new` has codes of keys and values."""
    g, heads, lanes = lower.g, Heads(lower, spec), spec.q_heads // spec.kv_heads
    pool = Pool(frame, heads, past, new)
    queries = heads.split(query, 1, lanes)
    arrivals = heads.split(arrival, 1) if arrival is not None else [None] * len(queries)
    scored = [n if head.config.slots else 0 for n, head in zip(spec.slots_per_head, spec.heads, strict=True)]
    scores = iter(heads.split(past["slot_score"], 2, scored) if any(scored) else ())
    carried = {name: heads.split(past[name], 1) for name in EVICTED if spec.config.evicts and name in past}
    outputs, chosen, parts = [], [], dict[str, list[ir.Value]]()
    for i, (group, layer) in enumerate(spec.groups):
        own = {name: x[i] for name, x in carried.items()}
        if layer.config.slots:
            own["slot_score"] = g.transpose(g.reshape(next(scores), 0, 0, len(group), -1), 0, 2, 1, 3)
        slots = Slots(lower, frame, layer, tables, seen[i])
        key, value = pool.read("slot_key", group), pool.read("slot_value", group)
        mixed, kept, order = slots.attend(queries[i], key, value, arrivals[i], own)
        outputs.append(mixed)
        chosen.append(pool.place(group, order))
        for name, x in kept.items():
            parts.setdefault(name, []).append(x)
    present = pool.keep(chosen) | {name: heads.join(parts[name], 1) for name in carried}
    if FORGOTTEN in parts:
        present[FORGOTTEN] = heads.join(parts[FORGOTTEN], 1, lanes)
    position = heads.join([g.reshape(x, 0, -1) for x in parts["slot_position"]], 1, spec.slots_per_head)
    present["slot_position"] = g.op("Cast", position, to=ir.DataType.INT32)
    if any(scored):
        rows = [g.reshape(g.transpose(x, 0, 2, 1, 3), 0, 0, -1) for x in parts["slot_score"]]
        present["slot_score"] = heads.join(rows, 2, scored)
    return heads.join(outputs, 1, lanes * spec.d_v), present


def _scaled(g: Builder, x: ir.Value, weight: float) -> ir.Value:
    return x if weight == 1 else g.op("Mul", x, g.floats(weight))


def _judge(
    lower: Portable, frame: Frame, spec: MixerSpec, features: ir.Value, values: ir.Value, state: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Return the recall error of each token `[B, H, 1, T]` and the new judge state; see `recall_error`.

    Keys lag one token behind queries, so each token reads only earlier tokens: nothing is subtracted, nothing cancels.
    """
    g, heads = lower.g, spec.kv_heads
    key = g.op("Pad", features, g.const([0, 1, 0, 0, 0, 0, 0, 0]))
    query = g.op("Pad", features, g.const([0, 0, 0, 0, 0, 1, 0, 0]))
    extended = g.op("Pad", values, g.const([0, 1, 0, 0, 0, 0, 0, 1]), g.floats(1))
    query, key, extended = (g.reshape(x, 0, 0, -1) for x in (query, key, extended))
    still = frame.filled(0.0, -1, heads * spec.d_k)
    recalled, state = lower.linear_attention(query, key, extended, state, still, (heads, heads), spec.d_k)
    recalled = g.reshape(g.slice(recalled, 0, -1, 1), 0, 0, heads, spec.d_v + 1)
    error = g.op("ReduceL2", g.op("Sub", values, weighted_mean(g, recalled, spec.d_v)), g.const([3]))
    return g.transpose(error, 0, 2, 3, 1), state


class Slots:
    """The bounded exact memory of one layer; see `ligerexport.kernels.memory_attention`."""

    def __init__(self, lower: Portable, frame: Frame, spec: MixerSpec, tables: RotaryTables, seen: Candidates) -> None:
        self.lower, self.frame, self.spec, self.tables, self.seen = lower, frame, spec, tables, seen
        self.g = lower.g

    def attend(
        self, query: ir.Value, key: ir.Value, value: ir.Value, arrival: ir.Value | None, past: dict[str, ir.Value]
    ) -> tuple[ir.Value, dict[str, ir.Value], ir.Value]:
        """Attend from queries `[B, H_q, T, d_k]` to candidates `[B, H, C, d]`.

        Returns:
            The output `[B * T, H_q * d_v]`, the state after the last token without keys and values, and the candidates
            in its slots `[B, H, N]`, in the order that `TENSORS` of `model/state.py` asks for.
        """
        g, spec = self.g, self.spec
        logits = self._logits(query, key)
        visible, scores = self.seen.always, []
        if spec.config.slots:
            scores = self._scores(logits, value, arrival, past["slot_score"])
            visible = self._keep(scores)
        logits = g.op("Where", visible, logits, g.floats(MASKED))  # [B, H, G, T, C]
        evicted, present = self._evicted(query, visible, key, value, past) if spec.config.evicts else (None, {})
        if evicted is not None:
            logits = g.concat(logits, evicted[0], axis=-1)  # all that was evicted is one candidate more
        weights = g.op("Softmax", logits, axis=-1)
        if evicted is not None:
            weights, share = g.op("Split", weights, self._candidates_and_one(), outputs=2, axis=-1)
        mixed = g.op("MatMul", g.op("Reshape", weights, self._rows_by_candidates()), value)
        mixed = g.transpose(g.op("Reshape", mixed, self._heads_by_tokens()), 0, 2, 1, 3)
        mixed = g.reshape(mixed, -1, spec.q_heads * spec.d_v)
        if evicted is not None:
            if self.lower.meter:
                present[FORGOTTEN] = g.reshape(g.op("Gather", share, g.const(-1), axis=3), 0, -1)  # [B, H_q]
            answer = g.op("Mul", g.transpose(share, 0, 3, 1, 2, 4), evicted[1])
            mixed = g.op("Add", mixed, g.reshape(answer, -1, spec.q_heads * spec.d_v))
        kept, order = self._survivors(visible, scores)
        return mixed, kept | present, order

    def _candidates_and_one(self) -> ir.Value:
        g, slots = self.g, self.spec.config.num_slots
        return g.once(("C and 1", slots), lambda: g.concat(self.frame.candidates(slots), g.const([1]), axis=0))

    def _evicted(
        self, query: ir.Value, visible: ir.Value, key: ir.Value, value: ir.Value, past: dict[str, ir.Value]
    ) -> tuple[tuple[ir.Value, ir.Value], dict[str, ir.Value]]:
        """Return logit `[B, H, G, T, 1]` and value `[B, T, H, G, d_v]` of all evicted tokens, and the new state.

        See `ligerexport.kernels.evicted`.
        """
        g, spec, frame, heads = self.g, self.spec, self.frame, self.spec.kv_heads
        assert self.seen.carried is not None
        before = g.concat(self.seen.carried, g.slice(visible, 0, -1, 3), axis=3)
        lost = g.op("Cast", g.op("And", before, g.op("Not", visible)), to=ir.DataType.FLOAT)
        lost = g.op("Squeeze", lost, g.const([2]))  # [B, H, T, C], at most one 1 a row
        parts = g.op("ReduceSum", lost, g.const([3])), g.op("MatMul", lost, key), g.op("MatMul", lost, value)
        there, lost_key, lost_value = (g.transpose(x, 0, 2, 1, 3) for x in parts)
        features = g.concat(there, g.op("MatMul", lost_key, self.tables.key_map), axis=3)  # [B, T, H, d_k]
        mass = g.op("Unsqueeze", past["recurrent_mass"], g.const([1]))
        mass = g.op("Add", mass, g.op("CumSum", features, g.const(1)))
        present = {"recurrent_mass": g.op("Gather", mass, g.const(-1), axis=1)}

        count, sums = g.op(
            "Split", g.op("Unsqueeze", mass, g.const([4])), g.const([1, spec.d_k - 1]), outputs=2, axis=3
        )
        turned = g.op("MatMul", g.transpose(query, 0, 2, 1, 3), self.tables.query_map)
        turned = g.reshape(turned, 0, 0, heads, -1, spec.d_k - 1)  # [B, T, H, G, d_k - 1]
        some = g.op("Clip", count, g.floats(1))
        mean = g.op("Div", g.op("MatMul", turned, sums), some)
        packed = g.concat(g.op("Sub", g.floats(1), mean), turned, axis=4), features, lost_value
        still = frame.filled(0.0, 0, heads * spec.d_k)
        q, k, v = (g.reshape(x, 0, 0, -1) for x in packed)
        read, present["recurrent_state"] = self.lower.linear_attention(
            q, k, v, past["recurrent_state"], still, (spec.q_heads, heads), spec.d_k
        )
        # the logarithm of no tokens is minus infinity, which the softmax takes for nothing
        logit = g.op("Add", mean, g.op("Log", _scaled(g, count, spec.config.recurrence_weight)))
        answer = g.op("Div", g.reshape(read, 0, 0, heads, -1, spec.d_v), some)
        return (g.transpose(logit, 0, 2, 3, 1, 4), answer), present

    def _rows_by_candidates(self) -> ir.Value:
        g, slots = self.g, self.spec.config.num_slots
        return g.once(
            ("rows_by_candidates", slots), lambda: g.concat(g.const([0, 0, -1]), self.frame.candidates(slots), axis=0)
        )

    def _heads_by_tokens(self) -> ir.Value:
        g, heads = self.g, self.spec.q_heads
        return g.once(
            ("heads_by_tokens", heads), lambda: g.concat(g.const([0, heads]), self.frame.length, g.const([-1]), axis=0)
        )

    def _by_groups(self) -> ir.Value:
        """Return the shape `[B, H, G, T, -1]`."""
        g, group = self.g, self.spec.q_heads // self.spec.kv_heads
        return g.once(
            ("groups", group), lambda: g.concat(g.const([0, 0, group]), self.frame.length, g.const([-1]), axis=0)
        )

    def _logits(self, query: ir.Value, key: ir.Value) -> ir.Value:
        """Return logits `[B, H, G, T, C]` at the rotary distance, or at the largest one where that is exceeded."""
        g, spec, heads = self.g, self.spec, self.spec.kv_heads

        def scored(table: Table | None, keys: ir.Value) -> ir.Value:
            q = query
            if table is not None:
                q = self.lower.rotate_queries(query, table, self.frame.length, spec.d_k)
            logits = self.lower.scores(g.reshape(q, 0, heads, -1, spec.d_k), keys, spec.scale)
            return g.op("Reshape", logits, self._by_groups())

        if self.tables.keys is None:
            return scored(None, key)
        rotated = self.lower.rotate_keys(key, self.tables.keys, self.seen.row, heads, spec.d_k)
        return g.op("Where", self.seen.within, scored(self.tables.near, rotated), scored(self.tables.far, key))

    def _scores(self, logits: ir.Value, value: ir.Value, arrival: ir.Value | None, past: ir.Value) -> list[ir.Value]:
        """Return the scores `[B, H, 1, C]` of all candidates by pool, complete once a token has left the window."""
        g, spec = self.g, self.spec
        nothing = self.frame.filled(0.0, spec.kv_heads, 1, 0)
        fresh = [arrival if pool.on_arrival else nothing for pool in spec.pools]
        carried = g.concat(past, self._join(fresh), axis=3)
        scores, local = split(g, carried, len(fresh), axis=2), None
        for i, (pool, counts) in enumerate(zip(spec.pools, self.seen.counts, strict=True)):
            if counts is None:
                continue
            if local is None:
                local = g.op("Softmax", g.op("Add", logits, self.seen.local), axis=-1)
            reduce, merge = ("ReduceSum", "Add") if pool.summed else ("ReduceMax", "Max")
            received = g.op(reduce, g.op("Mul", local, counts), g.const([2, 3]), keepdims=0)
            if pool.by_value:
                received = g.op("Mul", received, g.op("ReduceL2", value, g.const([-1]), keepdims=0))
            scores[i] = g.op(merge, scores[i], g.op("Unsqueeze", received, g.const([2])))
        return scores

    def _join(self, parts: list[Any]) -> ir.Value:
        return self.g.concat(*parts, axis=2) if len(parts) > 1 else parts[0]

    def _keep(self, scores: list[ir.Value]) -> ir.Value:
        """Return whether each query sees each candidate, `[B, H, 1, T, C]`: window, sinks, and the best of each pool.

        Tokens that are already seen rank lowest, and tokens that cannot compete rank next, at `MASKED`, so that the
        best are always unseen tokens. There are always enough of these.
        """
        g, visible = self.g, self.seen.always
        for pool, rank, age in zip(self.spec.pools, scores, self.seen.ages, strict=True):
            if age is not None:
                rank = g.op("Add", g.op("Log", g.op("Clip", rank, g.floats(FAINTEST))), age)
            ranked = g.op("Add", g.op("Unsqueeze", rank, g.const([2])), self.seen.rank)
            if visible is not self.seen.always:
                ranked = g.op("Where", visible, g.floats(-np.inf), ranked)
            value, best = g.op("TopK", ranked, g.const([pool.size]), outputs=2, axis=-1)
            won = g.op("Greater", value, g.floats(MASKED / 2))
            visible = g.op("ScatterElements", visible, best, won, axis=-1)
        return visible

    def _survivors(self, visible: ir.Value, scores: list[ir.Value]) -> tuple[dict[str, ir.Value], ir.Value]:
        """Return positions and scores of the slots that the last query sees, and their candidates."""
        g, slots = self.g, self.spec.config.num_slots
        last = g.op("Gather", visible, g.const(-1), axis=3)  # [B, H, 1, C]
        rank = g.op("Where", last, *self.frame.columns(slots))
        _, order = g.op("TopK", rank, g.const([slots]), outputs=2, axis=-1, largest=0)
        position = g.op("Where", last, self.seen.position, g.const(-1))
        present = {"slot_position": g.op("Squeeze", g.op("GatherElements", position, order, axis=3), g.const([2]))}
        if scores:
            present["slot_score"] = self._join([g.op("GatherElements", score, order, axis=3) for score in scores])
        return present, g.reshape(order, 0, 0, -1)
