"""The node of the operator `BoundedMemory`: a layer's bounded exact memory and the recurrence over evicted tokens.

`INPUTS` and `OUTPUTS` are its contract; `tests/headers.py` writes the header `operands.h` of the C++ from them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from ligerexport.exporters.onnx.builder import Builder
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.lent import UNDO
from ligerexport.exporters.onnx.lowerings import Table
from ligerexport.exporters.onnx.native import DOMAIN, RAGGED_OPERATORS
from ligerexport.kernels.evicted import slow_rotation
from ligerexport.model.scores import Pool
from ligerexport.model.state import EVICTED, FORGOTTEN, RAGGED, SLOTS, MixerSpec

SCALES = tuple(row.name for row in RAGGED if row.needs == "scaled")
"""Scales of keys and values that are codes."""
INPUTS = (
    "query", "key", "value", "position", "cos", "sin", *SLOTS, "arrival", "turn", *EVICTED,
    "hidden", "score_weight", "score_bias", *SCALES, UNDO,
)  # fmt: skip
"""Inputs of the operator, in order."""
OUTPUTS = ("mixed", *SLOTS, *EVICTED, *SCALES, FORGOTTEN)
"""Outputs of the operator, in order: the mixed heads, the new state, and a measurement."""


def turn_table(g: Builder, rotary: torch.Tensor, spec: MixerSpec, name: str) -> ir.Value:
    """Add cosine and sine of the distance at which evicted tokens are read, and a mask of the slow pairs, `[3, R]`."""
    turn, slow = slow_rotation(rotary, spec)
    return g.table(f"{name}.turn", torch.cat([turn, slow[None].float()]).numpy())


def bounded_memory(
    frame: Frame,
    spec: MixerSpec,
    keys: Table,
    turn: ir.Value | None,
    projected: tuple[ir.Value, ir.Value, ir.Value],
    arrival: ir.Value | None,
    learned: ir.Value | None,
    past: dict[str, ir.Value],
    layer: int = 0,
    meter: bool = False,
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Write one layer's memory as a node.

    Args:
        keys: Cosine and sine by offset from `-max_distance` on.
        turn: Table from `turn_table`, if the layer evicts into a recurrence.
        projected: Query, key, value `[B * T, H * d]`, before rotary embedding.
        arrival: `[B, H, 1, T]`, scores on arrival; None if no pool has them.
        learned: `[B * T, H]`, the learned scores from which `arrival` was made. If they come from a linear map, the
            operator computes it itself.
        past: State by the names of `MixerSpec.state`.
        layer: Index of the layer.
        meter: Whether to return `FORGOTTEN` `[B, H_q]` too.

    Returns:
        Output `[B * T, H_q * d_v]` and the new state.
    """
    config, g = spec.config, frame.g
    attributes: dict[str, int | float] = {
        "q_heads": spec.q_heads, "kv_heads": spec.kv_heads, "d_k": spec.d_k, "d_v": spec.d_v, "scale": spec.scale,
        "sinks": config.sinks, "max_distance": spec.max_distance,
        "evicts": int(config.evicts), "recurrence_weight": float(config.recurrence_weight),
        "pools": len(config.slots),
    } | _sizes(spec)  # fmt: skip
    for i, pool in enumerate(spec.pools):
        attributes |= {f"pool{i}_{name}": value for name, value in _pool(pool).items()}
    own = {name for name in OUTPUTS if name in past and (config.evicts or name not in EVICTED)}
    measured = {FORGOTTEN} if meter else set()
    names = OUTPUTS[: 1 + max(map(OUTPUTS.index, own | measured))]
    given = dict(zip(INPUTS, projected, strict=False))
    if (whole := g.whole(*projected)) is not None:
        given = {"query": whole}
    given |= {"position": frame.position, "cos": keys.cos, "sin": keys.sin}
    given |= {name: past[name] for name in own}
    made = learned.producer() if learned is not None else None
    if made is not None and made.op_type == "Gemm":
        given |= {name: x for name, x in zip(("hidden", "score_weight", "score_bias"), made.inputs, strict=False) if x}
    elif arrival is not None:
        given["arrival"] = arrival
    if turn is not None:
        given["turn"] = turn
    kind = RAGGED_OPERATORS[config.state_dtype] if config.ragged else "BoundedMemory"
    if spec.splits:  # what stays is known before the attention, and there are no sums
        given[UNDO] = g.table(UNDO, np.zeros((0, 0), np.uint8))
        attributes["layer"] = layer
    inputs = INPUTS[: 1 + max(map(INPUTS.index, given))]  # older libraries know fewer
    mixed, *present = g.op(kind, *map(given.get, inputs), outputs=len(names), domain=DOMAIN, **attributes)
    return mixed, {name: new for name, new in zip(names[1:], present, strict=True) if name in own | measured}


def _sizes(spec: MixerSpec) -> dict[str, int]:
    """Return the sizes of the memory of all KV heads, or of each one of a ragged layer."""
    config, sizes = spec.config, {}
    for h, head in enumerate(spec.heads if config.ragged else (spec,)):
        prefix, pools = f"head{h}_" if config.ragged else "", head.pools or (None,) * len(config.slots)
        sizes[f"{prefix}window"] = head.config.window
        for i, pool in enumerate(pools):
            sizes[f"{prefix}pool{i}_count"] = pool.size if pool else 0
            sizes[f"{prefix}pool{i}_first_distance"] = pool.first_distance if pool and not pool.on_arrival else 0
    return sizes if config.ragged else sizes | {"slots": config.num_slots}


def _pool(pool: Pool) -> dict[str, int | float]:
    """Return the attributes of a pool, without its sizes and the prefix that numbers it."""
    return {
        "received": int(not pool.on_arrival), "maximum": int(not pool.summed), "by_value": int(pool.by_value),
        "horizon": float(pool.horizon),
    }  # fmt: skip
