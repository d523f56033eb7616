"""Faults in memories with sizes for each KV head, whose slots lie on one axis as codes with scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import onnxruntime

from ligerexport.exporters.onnx import packed, session
from ligerexport.exporters.onnx.builder import Builder
from ligerexport.exporters.onnx.lent import KEEP
from ligerexport.exporters.onnx.spec import ModelSpec
from planting.described import at, changed
from planting.edited import edit, find, instead, past
from planting.lowered import call, compiled
from planting.table import AT, GRAPHS, ONNX, Site, fault

RAGGED: dict[str, Any] = {"presets": ("recall",), "lowerings": ONNX}
IN_GRAPHS: dict[str, Any] = {"presets": ("recall",), "lowerings": GRAPHS}
IN_NATIVE: dict[str, Any] = {"presets": ("recall",), "lowerings": ("native",)}


def picked(places: Callable[[int], Any], axis: int = 1) -> Any:
    """Return a change that takes other places of an axis, from its length."""

    def change(g: Builder, x: ir.Value) -> ir.Value:
        assert x.shape is not None
        return g.op("Gather", x, g.const(np.asarray(places(int(x.shape[axis])))), axis=axis)

    return change


def memory(spec: ModelSpec, *words: str) -> ModelSpec:
    """Return a model whose layer `AT` has other sizes."""
    return changed(spec, {"heads": (" ".join(words),)})


@fault("spec", **RAGGED)
def window_of_one_head_too_short(spec: ModelSpec) -> ModelSpec:
    first, second = at(spec).heads[0].split()
    window, slots = map(int, first.split("+"))
    return memory(spec, f"{window - 1}+{slots + 1}", second)


@fault("spec", **RAGGED)
def sizes_of_two_heads_swapped(spec: ModelSpec) -> ModelSpec:
    return memory(spec, *reversed(at(spec).heads[0].split()))


@fault("code", **IN_GRAPHS)
def slots_of_a_head_one_place_off(site: Site) -> Any:
    mixer = site.spec.mixers[AT]
    assert mixer is not None

    def early(function: Any, widths: Any, heads: Any) -> np.ndarray:
        found = function(widths, heads)
        return found - 1 if tuple(widths) == mixer.slots_per_head and 0 not in heads else found

    return call(packed, "places", None, early)


@fault("code", 0, **IN_GRAPHS)
def largest_code_is_another(site: Site) -> Any:
    return patch.object(packed, "MOST", 126)


@edit(**RAGGED)
def scales_of_neighbours_exchanged(model: ir.Model) -> None:
    instead(model, past(model, "slot_key_scale"), picked(lambda n: np.arange(n) ^ 1))


@edit(**RAGGED)
def values_with_the_scales_of_keys(model: ir.Model) -> None:
    other = past(model, "slot_key_scale")
    instead(model, past(model, "slot_value_scale"), lambda g, x: g.op("Identity", other))


@edit(**RAGGED)
def keys_of_two_heads_swapped(model: ir.Model) -> None:
    instead(model, past(model, "slot_key"), picked(lambda n: np.roll(np.arange(n), n // 2)))


@edit(**RAGGED)
def scores_of_two_heads_swapped(model: ir.Model) -> None:
    instead(model, past(model, "slot_score"), picked(lambda n: np.roll(np.arange(n), n // 2), axis=2))


@edit(**RAGGED)
def a_code_is_not_overwritten(model: ir.Model) -> None:
    old = past(model, "slot_key")

    def stale(g: Builder, new: ir.Value) -> ir.Value:
        assert old.shape is not None
        return g.op("Where", g.const(np.arange(int(old.shape[1]))[:, None] == 3, bool), old, new)

    instead(model, find(model, f"present.{AT}.slot_key"), stale)


@edit(**RAGGED)
def scores_are_not_updated(model: ir.Model) -> None:
    old = past(model, "slot_score")
    instead(model, find(model, f"present.{AT}.slot_score"), lambda g, x: g.op("Identity", old))


@edit(**RAGGED)
def positions_of_the_slots_off_by_one(model: ir.Model) -> None:
    instead(model, past(model, "slot_position"), lambda g, x: g.op("Sub", x, g.const(1, np.int32)))


@fault("code", 0, **IN_NATIVE)
def compiled_head_one_slot_off(site: Site) -> Any:
    return compiled("at_(b * layer.slots + size_.first)", "at_(b * layer.slots + size_.first - (h > 0))")


@fault("code", 0, **IN_NATIVE)
def compiled_scale_of_the_key_for_the_value(site: Site) -> Any:
    return compiled("c_.new_value_scale[at_ + i] = w_.value_scale[t]", "c_.new_value_scale[at_ + i] = w_.key_scale[t]")


@fault("code", 0, **IN_NATIVE)
def compiled_count_of_a_pool_one_too_few(site: Site) -> Any:
    old = "static_cast<int64_t>(pool.size()) < size_.counts[p]"
    return compiled(old, f"{old} - (h_ == 1)")


@fault("code", 0, **IN_NATIVE)
def compiled_prompt_sees_one_token_ahead(site: Site) -> Any:
    return compiled("set(d.far + j, i, i - n_, ", "set(d.far + j, i, i - n_ - 1, ")


@fault("code", 0, **IN_NATIVE)
def compiled_largest_distance_of_a_prompt(site: Site) -> Any:
    return compiled("w_.time[i] + l_.max_distance + 1 - start_", "w_.time[i] + l_.max_distance - 1 - start_")


@fault("code", None, **IN_NATIVE)
def compiled_draft_leaves_a_token(site: Site) -> Any:
    return compiled("t < kept && i < undo.filled", "t <= kept && t < undo.length && i < undo.filled")


@fault("code", None, **IN_NATIVE)
def compiled_draft_loses_what_it_overwrote(site: Site) -> Any:
    return compiled("undo.each(changes[i].place, undo.old_row(i), write)", "undo.old_row(i)")


@fault("code", None, **RAGGED)
def logits_of_a_draft_one_token_late(site: Site) -> Any:
    def late(function: Any, binding: Any, logits: np.ndarray) -> None:
        function(binding, logits)
        keep = onnxruntime.OrtValue.ortvalue_from_numpy(np.arange(1, logits.shape[1] + 1) % logits.shape[1])
        binding.bind_ortvalue_input(KEEP, keep)

    return call(session, "_keep_all", None, late)
