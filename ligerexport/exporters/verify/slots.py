"""The slots of a state in a form in which those of a graph and of torch can be compared.

Verification compares graph and torch without rounding keys and values to the type of the state: a code that is rounded
the other way, which fp32 arithmetic cannot exclude, changes the keys of all later layers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.model.state import MOST, MixerSpec

State = dict[str, np.ndarray]

SCALE_ERROR = 1e-4
"""Largest error of the largest code, relative to `MOST`, without rounding."""
TINY = float(np.finfo(np.float16).tiny)


def is_rounded(spec: ModelSpec) -> bool:
    """Return whether keys and values are rounded to a smaller type."""
    return spec.liger.state_dtype != "activation"


def unrounded(spec: ModelSpec) -> ModelSpec:
    """Return the checkpoint for a torch model that does not round; its mixers stay those of the graph."""
    if not is_rounded(spec):
        return spec
    return replace(spec, config={**spec.config, "liger": {**spec.config["liger"], "state_dtype": "activation"}})


def of_layer(state: State, layer: int) -> State:
    prefix = f"past.{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def places(mixer: MixerSpec, head: int) -> tuple[slice, slice]:
    """Return the slots of a KV head on the axis of a ragged layer, and on the axis of scores."""
    counts = mixer.slots_per_head
    scored = [n if spec.config.slots else 0 for n, spec in zip(counts, mixer.heads, strict=True)]
    slots, scores = (slice(sum(sizes[:head]), sum(sizes[: head + 1])) for sizes in (counts, scored))
    return slots, scores


def by_head(state: State, mixer: MixerSpec | None) -> list[tuple[str, State]]:
    """Return a layer's state with slots sorted by position and keys and values as vectors.

    Each KV head of a ragged layer becomes a state of its own, with an axis of one head and with words that name it in
    messages. The state may also be that of a layer with the same memory that is not ragged.
    """
    if mixer is None:
        return [("", state)]
    if not mixer.config.ragged:
        return [("", sort_slots(state))]
    found, packed = [], state["slot_position"].ndim == 2
    for h in range(mixer.kv_heads):
        slots, scores = places(mixer, h)
        head = {name: x[:, h : h + 1] for name, x in state.items() if not (packed and name.startswith("slot_"))}
        if packed:
            head["slot_position"] = state["slot_position"][:, None, slots]
            if scores.stop > scores.start:
                head["slot_score"] = state["slot_score"][:, None, :, scores]
        for name in {"slot_key", "slot_value"} & state.keys() if packed else ():
            scale = state.get(f"{name}_scale")
            factor = 1.0 if scale is None else scale[:, slots, None].astype(np.float32)
            head[name] = (state[name][:, slots].astype(np.float32) * factor)[:, None]
        found.append((f" of head {h}", sort_slots(head)))
    return found


def unscaled(state: State) -> str | None:
    """Return the name of a scale that is wrong, from a state without rounding: the largest code is `MOST`."""
    for name in ("slot_key", "slot_value"):
        if (scale := state.get(f"{name}_scale")) is not None:
            full = (state["slot_position"] >= 0) & (scale > TINY)
            largest = np.abs(state[name]).max(axis=-1, initial=0)[full]
            if (np.abs(largest - MOST) > SCALE_ERROR * MOST).any():
                return f"{name}_scale"
    return None


def encode(state: State, like: State) -> State:
    """Return torch's state as a graph that does not round has it, with names and shapes as in `like`."""
    made = dict(like)
    for name, x in state.items():
        kind = name.rpartition(".")[2]
        if kind.startswith("slot_") and x.ndim > like[name].ndim:  # from [B, H, ...] to one axis
            x = (x.swapaxes(1, 2) if kind == "slot_score" else x).reshape(like[name].shape)
        if f"{name}_scale" in like:
            scale = np.maximum(np.abs(x).max(axis=-1) / MOST, TINY).astype(np.float32)
            made[f"{name}_scale"], x = scale, x / scale[..., None]
        made[name] = x.astype(like[name].dtype)
    return made


def sort_slots(state: State) -> State:
    """Return a mixer's state with slots sorted by position (see `TENSORS` of `model/state.py`), empty slots zero."""
    position = state["slot_position"]
    order = position.argsort(axis=-1, kind="stable")
    position = np.take_along_axis(position, order, -1)
    full = position >= 0
    result = dict(state) | {"slot_position": position}
    for name in {"slot_key", "slot_value"} & state.keys():
        result[name] = np.take_along_axis(state[name], order[..., None], 2) * full[..., None]
    if "slot_score" in state:
        result["slot_score"] = np.take_along_axis(state["slot_score"], order[:, :, None], 3) * full[:, :, None]
    return result
