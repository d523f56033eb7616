"""Faults in which the graph is written from a wrong description of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.model.config import LigerConfig
from planting.table import AT, ONNX, SLOTTED, fault


def changed(spec: ModelSpec, config: dict[str, Any] | None = None, **fields: Any) -> ModelSpec:
    """Return a model whose layer `AT` has another mixer."""
    mixers = list(spec.mixers)
    before = mixers[AT]
    assert before is not None
    mixers[AT] = replace(before, config=replace(at(spec), **config or {}), **fields)
    return replace(spec, mixers=tuple(mixers))


def at(spec: ModelSpec) -> LigerConfig:
    """Return the configuration of layer `AT`."""
    return spec.liger.for_layer(AT)


def pools(spec: ModelSpec, more: int = 0) -> tuple[tuple[str, int], ...]:
    """Return the pools of layer `AT`, with `more` slots in the last one."""
    *rest, (name, count) = at(spec).slots
    return (*rest, (name, count + more))


in_slots = {"presets": SLOTTED, "lowerings": ONNX}


@fault("spec", **in_slots)
def a_sink_dropped(spec: ModelSpec) -> ModelSpec:
    return changed(spec, {"sinks": at(spec).sinks - 1, "slots": pools(spec, 1)})


@fault("spec", **in_slots)
def window_one_too_short(spec: ModelSpec) -> ModelSpec:
    return changed(spec, {"window": at(spec).window - 1, "slots": pools(spec, 1)})


@fault("spec", **in_slots)
def window_one_too_long(spec: ModelSpec) -> ModelSpec:
    return changed(spec, {"window": at(spec).window + 1, "slots": pools(spec, -1)})


@fault("spec", presets=("liger",), lowerings=ONNX)
def the_oldest_of_the_window_is_a_sink(spec: ModelSpec) -> ModelSpec:
    return changed(spec, {"window": at(spec).window - 1, "sinks": 1})


@fault("spec", **in_slots)
def scores_of_two_pools_swapped(spec: ModelSpec) -> ModelSpec:
    (one, count), (other, size), *rest = at(spec).slots
    return changed(spec, {"slots": ((other, count), (one, size), *rest)})


@fault("spec", **in_slots)
def a_slot_in_the_wrong_pool(spec: ModelSpec) -> ModelSpec:
    (one, count), *rest = pools(spec, -1)
    return changed(spec, {"slots": ((one, count + 1), *rest)})


@fault("spec", lowerings=ONNX)
def softmax_scale(spec: ModelSpec) -> ModelSpec:
    return changed(spec, scale=spec.attention[AT].scale * 1.01)


@fault("spec", **in_slots)
def largest_rotary_distance_off_by_one(spec: ModelSpec) -> ModelSpec:
    return changed(spec, max_distance=spec.max_distance - 1)


@fault("spec", presets=("liger",), lowerings=ONNX)
def mix_of_softmax(spec: ModelSpec) -> ModelSpec:
    return changed(spec, {"attention_weight": at(spec).attention_weight * 1.01})


@fault("spec", presets=("liger", "evicted"), lowerings=ONNX)
def weight_of_the_recurrence(spec: ModelSpec) -> ModelSpec:
    return changed(spec, {"recurrence_weight": at(spec).recurrence_weight * 1.01})


@fault("spec", 0, presets=("evicted",), lowerings=ONNX)
def distance_of_the_evicted(spec: ModelSpec) -> ModelSpec:
    other = {"recurrence_distance": spec.liger.recurrence_distance - 1}
    return replace(spec, mixers=tuple(replace(m, config=replace(m.config, **other)) for m in spec.mixers if m))


@fault("spec", presets=("liger",), lowerings=ONNX)
def another_gate(spec: ModelSpec) -> ModelSpec:
    return changed(spec, {"gate": "hgrn2"})


@fault("spec")
def rope_base(spec: ModelSpec) -> ModelSpec:
    layers = list(spec.attention)
    layers[AT] = layers[AT]._replace(inv_freq=tuple(f * 1.001 for f in layers[AT].inv_freq))
    return replace(spec, attention=tuple(layers))


@fault("spec", 0)
def epsilon_of_all_norms(spec: ModelSpec) -> ModelSpec:
    return replace(spec, norm_eps=spec.norm_eps * 100)


@fault("spec", 0)
def another_activation(spec: ModelSpec) -> ModelSpec:
    return replace(spec, activation="gelu_pytorch_tanh")
