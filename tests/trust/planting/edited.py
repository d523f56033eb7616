"""Faults in which the graph is edited after it was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from ligerexport.exporters.onnx.builder import Builder
from planting.table import AT, GRAPHS, ONNX, SLOTTED, Site, fault

Change = Callable[[Builder, ir.Value], ir.Value]


def instead(model: ir.Model, value: ir.Value, change: Change) -> None:
    """Give all readers of a value, or of an output, the result of `change` instead."""
    g = Builder(prefix=f"fault/{value.name}/")
    readers, order = tuple(value.uses()), list(model.graph)
    result = change(g, value)
    result.type, result.shape = value.type, value.shape
    if value.producer() is not None:
        result.name, value.name = value.name, f"{value.name}.sound"
        value.type = None  # verification may read it in fp32
    for user, index in readers:
        user.replace_input_with(index, result)
    for i, output in enumerate(model.graph.outputs):
        if output is value:
            model.graph.outputs[i] = result
    if result not in model.graph.outputs:
        result.type = None
    for made in g.initializers.values():
        model.graph.register_initializer(made)
    made_by = value.producer()
    place = -1 if made_by is None else order.index(made_by)
    model.graph.insert_before(order[place + 1], g.nodes) if place + 1 < len(order) else model.graph.extend(g.nodes)


def scaled(factor: float) -> Change:
    """Return a change that multiplies by a factor."""
    return lambda g, x: g.op("Mul", x, g.floats(factor))


def rounded(g: Builder, x: ir.Value) -> ir.Value:
    """Round a value to fp16."""
    return g.op("Cast", g.op("Cast", x, to=ir.DataType.FLOAT16), to=ir.DataType.FLOAT)


def find(model: ir.Model, name: str) -> ir.Value:
    """Return a value by its name."""
    return ir.convenience.create_value_mapping(model.graph)[name]


def past(model: ir.Model, name: str) -> ir.Value:
    """Return a tensor of the state of layer `AT`."""
    return find(model, f"past.{AT}.{name}")


def edit(layer: int | None = AT, **where: Any) -> Callable[..., Any]:
    """Register a function that edits the graph as a fault."""

    def enter(change: Callable[[ir.Model], None]) -> Callable[..., Any]:
        def plant(site: Site) -> None:
            with site.edited() as model:
                change(model)

        plant.__name__ = change.__name__
        fault("file", layer, **where)(plant)
        return change

    return enter


@edit()
def keys_of_the_slots_are_not_carried(model: ir.Model) -> None:
    instead(model, past(model, "slot_key"), scaled(0))


@edit(presets=("liger", "evicted"))
def the_recurrence_is_not_carried(model: ir.Model) -> None:
    instead(model, past(model, "recurrent_state"), scaled(0))


@edit(presets=("memory",))
def the_judge_is_not_carried(model: ir.Model) -> None:
    instead(model, past(model, "judge_state"), scaled(0))


@edit(presets=("memory", "recall"), lowerings=ONNX)
def position_of_one_slot_off_by_one(model: ir.Model) -> None:
    """Its token has another position, but the score of the right one."""

    def early(g: Builder, x: ir.Value) -> ir.Value:
        assert x.shape is not None
        integer = np.int64 if x.dtype == ir.DataType.INT64 else np.int32
        return g.op("Sub", x, g.const(np.arange(int(x.shape[-1])) == 8, integer))

    instead(model, past(model, "slot_position"), early)


@edit(presets=SLOTTED)
def scores_of_the_slots_fade(model: ir.Model) -> None:
    instead(model, past(model, "slot_score"), scaled(0.999))


@edit(presets=("evicted",))
def one_evicted_token_too_many(model: ir.Model) -> None:
    def first(g: Builder, x: ir.Value) -> ir.Value:
        assert x.shape is not None
        return g.op("Add", x, g.floats(np.arange(int(x.shape[-1])) == 0))

    instead(model, past(model, "recurrent_mass"), first)


@edit()
def a_slot_is_not_overwritten(model: ir.Model) -> None:
    old = past(model, "slot_key")

    def stale(g: Builder, new: ir.Value) -> ir.Value:
        assert old.shape is not None
        return g.op("Where", g.const(np.arange(int(old.shape[2]))[:, None] == 3, bool), old, new)

    instead(model, find(model, f"present.{AT}.slot_key"), stale)


@edit()
def states_of_two_layers_swapped(model: ir.Model) -> None:
    outputs = model.graph.outputs
    names = [str(x.name) for x in outputs]
    for i, name in enumerate(names):
        if name.startswith(f"present.{AT}."):
            j = names.index(name.replace(f".{AT}.", f".{AT + 1}."))
            one, other = outputs[i], outputs[j]
            one.name, other.name = None, None
            one.name, other.name = names[j], names[i]
            outputs[i], outputs[j] = other, one


@edit()
def values_of_the_slots_in_fp16(model: ir.Model) -> None:
    instead(model, past(model, "slot_value"), rounded)


@edit(presets=("liger", "evicted"))
def the_recurrence_in_fp16(model: ir.Model) -> None:
    instead(model, past(model, "recurrent_state"), rounded)


@edit()
def output_of_a_layer_in_fp16(model: ir.Model) -> None:
    instead(model, find(model, f"hidden.{AT}"), rounded)


@edit()
def a_layer_left_out(model: ir.Model) -> None:
    """Its state is right, but later layers are wrong."""
    before = find(model, f"hidden.{AT - 1}")
    instead(model, find(model, f"hidden.{AT}"), lambda g, x: g.op("Identity", before))


def only(single: bool) -> Change:
    """Return a change that is wrong by a hundredth in calls of one token, or in all others."""

    def change(g: Builder, x: ir.Value) -> ir.Value:
        one = g.op("Equal", g.op("Shape", x, start=0, end=1), g.const([1]))
        wrong, right = g.floats([1.01]), g.floats([1.0])
        return g.op("Mul", x, g.op("Where", one, *((wrong, right) if single else (right, wrong))))

    return change


@edit(lowerings=ONNX)
def prefill_right_and_step_wrong(model: ir.Model) -> None:
    instead(model, find(model, f"hidden.{AT}"), only(single=True))


@edit(lowerings=ONNX)
def step_right_and_prefill_wrong(model: ir.Model) -> None:
    instead(model, find(model, f"hidden.{AT}"), only(single=False))


@edit(0)
def position_off_by_one(model: ir.Model) -> None:
    position = find(model, "position")
    integer = np.int64 if position.dtype == ir.DataType.INT64 else np.int32
    instead(model, position, lambda g, x: g.op("Add", x, g.const(1, integer)))


@edit(0)
def position_does_not_count(model: ir.Model) -> None:
    position = find(model, "position")
    integer = np.int64 if position.dtype == ir.DataType.INT64 else np.int32
    instead(model, position, lambda g, x: g.op("Mul", x, g.const(0, integer)))


@edit(presets=SLOTTED, lowerings=GRAPHS)
def the_second_lowest_score_goes(model: ir.Model) -> None:
    """The next best token is kept in place of the last of the best."""
    node = next(x for x in model.graph if x.name == f"layers.{AT}/TopK")
    count = ir.convenience.get_const_tensor(node.inputs[1])
    assert count is not None
    keep = int(count.numpy().item())
    best = [*range(keep - 1), keep]
    more = Builder(prefix="fault/").const([keep + 1])
    model.graph.register_initializer(more)
    node.replace_input_with(1, more)
    for output in node.outputs:
        instead(model, output, lambda g, x: g.op("Gather", x, g.const(best), axis=-1))


@edit(lowerings=("ort",))
def rotary_interleaved(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "RotaryEmbedding" and str(node.name).startswith(f"layers.{AT}/"):
            node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


@edit(None)
def output_takes_the_embedding(model: ir.Model) -> None:
    """It should have a matrix of its own."""
    head = find(model, "lm_head.weight")
    for user, index in tuple(head.uses()):
        user.replace_input_with(index, find(model, "model.embed_tokens.weight"))
