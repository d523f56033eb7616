"""Faults in the memories that a router chooses."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ligerexport.exporters.onnx.spec import ModelSpec
from planting.described import at, changed
from planting.edited import edit, instead, past
from planting.lowered import call
from planting.table import AT, ONNX, Site, fault


@fault("spec", presets=("mom",), lowerings=ONNX)
def a_token_uses_one_memory_more(spec: ModelSpec) -> ModelSpec:
    return changed(spec, {"active": at(spec).active + 1})


@fault("code", presets=("mom",), lowerings=ONNX)
def a_memory_that_rests_forgets(site: Site) -> Any:
    def other(function: Any, lower: Any, query: Any, key: Any, value: Any, state: Any, decay: Any, *sizes: Any) -> Any:
        rests = lower.g.op("Equal", decay, lower.g.floats(0))
        decay = lower.g.op("Where", rests, lower.g.floats(-0.01), decay)
        return function(lower, query, key, value, state, decay, *sizes)

    return call(site.row, "linear_attention", AT, other)


@edit(presets=("mom",), lowerings=ONNX)
def states_of_two_memories_swapped(model: ir.Model) -> None:
    instead(model, past(model, "memory_state"), lambda g, x: g.op("Gather", x, g.const([1, 0, 2, 3, 4]), axis=2))
