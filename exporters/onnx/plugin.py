"""A layer's mixer as one node of the TensorRT plugin, and the contract between the node and the plugin.

The plugin's kernels are compiled ahead of time and looked up by `layer_digest`; the node carries nothing else of what a
layer computes, only what decides its inputs and outputs.
"""

from __future__ import annotations

import onnx_ir as ir

from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.lowerings import Portable
from ligerexport.exporters.onnx.native import DOMAIN
from ligerexport.state import MixerSpec

CONTRACT = 1
"""Version of attributes, inputs and outputs of the node; the plugin refuses another one."""
KIND = "LigerMixer"


def plugin_mixer(
    lower: Portable,
    frame: Frame,
    spec: MixerSpec,
    inv_freq: tuple[float, ...],
    projected: tuple[ir.Value, ir.Value, ir.Value],
    past: dict[str, ir.Value],
    score: ir.Value | None,
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Write one mixer.

    Args:
        lower: The lowering.
        frame: What layers share.
        spec: The layer.
        inv_freq: `[R]`, radians a token; zeros in a layer without rotary embedding.
        projected: Query, key, value `[B * T, H * d]` fp32, before rotary embedding.
        past: State by the names of `MixerSpec.state`, in its order.
        score: `[B * T, H]` fp32, needed where `spec.config.foresees`.

    Returns:
        Output `[B * T, H_q * d_v]` fp32 and the new state.
    """
    from ligerexport.kernels.plans import layer_digest, spec_fields

    g, config = lower.g, spec.config
    widths = spec.q_heads * spec.d_k, spec.kv_heads * spec.d_k, spec.kv_heads * spec.d_v
    tensors = [frame.per_token(lower.narrow(x), width) for x, width in zip(projected, widths, strict=True)]
    tensors += [frame.position, _rotary(lower, inv_freq, spec.max_distance)]
    if config.foresees:
        assert score is not None
        tensors.append(frame.per_token(score, spec.kv_heads))
    mixed, *present = g.op(
        KIND, *tensors, *past.values(), outputs=1 + len(past), domain=DOMAIN,
        plugin_namespace=DOMAIN, plugin_version="1", contract=CONTRACT, layer_spec=layer_digest(spec_fields(spec)),
        q_heads=spec.q_heads, kv_heads=spec.kv_heads, d_k=spec.d_k, d_v=spec.d_v, slots=config.num_slots,
        pools=len(config.slots), max_distance=spec.max_distance, foresees=int(config.foresees),
        judged=int(config.judged), recurrent=int(config.recurrent), evicts=int(config.evicts),
    )  # fmt: skip
    return lower.wide(g.reshape(mixed, -1, spec.q_heads * spec.d_v)), dict(zip(past, present, strict=True))


def _rotary(lower: Portable, inv_freq: tuple[float, ...], max_distance: int) -> ir.Value:
    """Return the table that kernels take `[2, rows, R]`, one for layers that turn alike."""
    import torch

    from ligerexport.kernels.ops import BLOCK, rotary_table

    g = lower.g

    def make() -> ir.Value:
        name = f"rotary.{sum(x.startswith('rotary.') for x in g.initializers)}"
        return g.initializer(ir.tensor(rotary_table(torch.tensor(inv_freq), max_distance, BLOCK).numpy(), name=name))

    return g.once(("rotary", inv_freq, max_distance), make)
