"""The node of the operator: a layer's bounded exact memory and the recurrence over what it evicts."""

from __future__ import annotations

import onnx_ir as ir
import torch

from ligerexport.exporters.onnx.builder import Builder
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.lowerings import Table
from ligerexport.exporters.onnx.native import DOMAIN
from ligerexport.kernels.evicted import slow_rotation
from ligerexport.model.scores import get_score
from ligerexport.model.state import MixerSpec

SLOTS = ("slot_key", "slot_value", "slot_position", "slot_score")
EVICTED = ("recurrent_state", "recurrent_mass")


def turn_table(g: Builder, rotary: torch.Tensor, spec: MixerSpec, name: str) -> ir.Value:
    """Add cosine and sine of the distance at which evicted tokens are read, and which pairs are slow, `[3, R]`."""
    turn, slow = slow_rotation(rotary, spec)
    return g.table(f"{name}.turn", torch.cat([turn, slow[None].float()]).numpy())


def bounded_memory(
    frame: Frame,
    spec: MixerSpec,
    keys: Table,
    turn: ir.Value | None,
    projected: tuple[ir.Value, ir.Value, ir.Value],
    arrival: ir.Value | None,
    foreseen: ir.Value | None,
    past: dict[str, ir.Value],
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Write one layer's memory as a node.

    Args:
        frame: What layers share.
        spec: The layer.
        keys: Cosine and sine by offset from `-max_distance` on.
        turn: From `turn_table`, where tokens are evicted.
        projected: Query, key, value `[B * T, H * d]`, before rotary embedding.
        arrival: `[B, H, 1, T]`, scores on arrival; None without such a pool.
        foreseen: `[B * T, H]`, what `arrival` was made from; where it is a linear map, the operator makes it itself.
        past: State by the names of `MixerSpec.state`.

    Returns:
        Output `[B * T, H_q * d_v]` and the new state.
    """
    config = spec.config
    attributes: dict[str, int | float] = {
        "q_heads": spec.q_heads, "kv_heads": spec.kv_heads, "d_k": spec.d_k, "d_v": spec.d_v, "scale": spec.scale,
        "slots": config.num_slots, "window": config.window, "sinks": config.sinks, "max_distance": spec.max_distance,
        "evicts": int(config.evicts), "recurrence_weight": float(config.recurrence_weight),
        "pools": len(config.slots),
    }  # fmt: skip
    for i, (name, count) in enumerate(config.slots):
        score = get_score(name)
        received = score.signal == "received"
        attributes |= {
            f"pool{i}_count": count, f"pool{i}_received": int(received), f"pool{i}_maximum": int(score.reduce == "max"),
            f"pool{i}_by_value": int(score.by_value), f"pool{i}_horizon": float(score.horizon or 0),
            f"pool{i}_first_distance": score.first_distance(config.window) if received else 0,
        }  # fmt: skip
    made = foreseen.producer() if foreseen is not None else None
    linear = list(made.inputs) if made is not None and made.op_type == "Gemm" else [None] * 3
    names = (*SLOTS, *(EVICTED if config.evicts else ()))
    whole, evicted = frame.g.whole(*projected), [past.get(name) for name in EVICTED] if config.evicts else [None, None]
    tensors = [*projected] if whole is None else [whole, None, None]
    tensors += [frame.position, keys.cos, keys.sin, *(past.get(name) for name in SLOTS)]
    tensors += [arrival if linear[0] is None else None, turn, *evicted, *linear]
    mixed, *present = frame.g.op("BoundedMemory", *tensors, outputs=1 + len(names), domain=DOMAIN, **attributes)
    return mixed, {name: new for name, new in zip(names, present, strict=True) if name in past}
