"""A layer's mixer and a product with a weight as nodes of the TensorRT plugin, and the contract between the two sides.

The plugin's kernels are compiled ahead of time and looked up by `layer_digest`. The plugin reads only the attributes
that decide a node's inputs and outputs; `epsilon` and `activation` are for other readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ligerexport.dtypes import BY_ONNX
from ligerexport.exporters.onnx.builder import Builder
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.native import DOMAIN
from ligerexport.model.state import MixerSpec

if TYPE_CHECKING:
    from ligerexport.kernels.linear import LinearSpec

CONTRACTS = EQUAL, RAGGED, KEYED, CODED = 2, 3, 4, 5
"""Versions of the nodes' attributes, inputs and outputs that the plugin takes: 3 has mixers with ragged slots, 4 some
with keyed rows, and 5 products with weights in int8."""
MIXER, LINEAR = "LigerMixer", "LigerLinear"
OPERANDS = ("query", "key", "value", "position", "rotary", "score")
"""Inputs of a mixer before its state, in order. A joint node has key and value in the query, and only a layer with
learned scores has a score. `tests/headers.py` writes the header `operands.h` of the C++ from them."""
NAMED: dict[str, Any] = {"domain": DOMAIN, "plugin_namespace": DOMAIN, "plugin_version": "1", "contract": EQUAL}


def plugin_mixer(
    frame: Frame,
    spec: MixerSpec,
    inv_freq: tuple[float, ...],
    projected: tuple[ir.Value, ir.Value, ir.Value],
    past: dict[str, ir.Value],
    score: ir.Value | None,
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Write one mixer.

    Args:
        inv_freq: `[R]`, radians per token; zeros in a layer without rotary embedding.
        projected: Query, key, value `[B * T, H * d]` fp32, before rotary embedding.
        past: State by the names of `MixerSpec.state`, in its order.
        score: `[B * T, H]` fp32, needed where `spec.config.foresees`.

    Returns:
        Output `[B * T, H_q * d_v]` fp32 and the new state.
    """
    from ligerexport.kernels.plans import layer_digest, spec_fields

    g, config = frame.g, spec.config
    joint = g.whole(*projected)
    given = dict(zip(OPERANDS, projected if joint is None else (joint,), strict=False))
    given |= {"position": frame.position, "rotary": _rotary(g, inv_freq, spec.max_distance)}
    if config.foresees:
        assert score is not None
        given["score"] = score
    tensors = [given[name] for name in OPERANDS if name in given]
    mixed, *present = g.op(
        MIXER, *tensors, *past.values(), outputs=1 + len(past), layer_spec=layer_digest(spec_fields(spec)),
        **NAMED | mixer_attributes(spec, joint is not None),
    )  # fmt: skip
    return mixed, dict(zip(past, present, strict=True))


def mixer_attributes(spec: MixerSpec, joint: bool) -> dict[str, int]:
    """Return the numbers of a mixer; with ragged slots, `slots` and `scored` are the sizes of the axes of both."""
    config = spec.config
    made = {
        "contract": EQUAL, "q_heads": spec.q_heads, "kv_heads": spec.kv_heads, "d_k": spec.d_k, "d_v": spec.d_v,
        "slots": config.num_slots, "pools": len(config.slots), "max_distance": spec.max_distance, "joint": int(joint),
        "foresees": int(config.foresees), "judged": int(config.judged), "recurrent": int(config.recurrent),
        "evicts": int(config.evicts),
    }  # fmt: skip
    if config.keyed:
        made |= {"contract": KEYED, "keyed": 1}
    if not config.ragged:
        return made
    pools, scored = next((x.shape for x in spec.state() if x.name == "slot_score"), (0, 0))
    return made | {
        "contract": RAGGED, "slots": sum(spec.slots_per_head), "pools": pools, "ragged": 1, "scored": scored,
        "halved": int(config.state_dtype == "float16"), "scaled": int(config.scaled),
    }  # fmt: skip


def plugin_linear(g: Builder, spec: LinearSpec, inputs: Sequence[ir.Value]) -> Any:
    """Write one product.

    Args:
        spec: What is computed.
        inputs: x `[M, K]`, fp32 where it is normed and otherwise of the weight's type; the weight `[N, K]`, or
            `[2 N, K]` of a gated unit; then, as far as `spec` has them, the norm's weight `[K]`, the bias `[N]` or
            `[2 N]`, the residual `[M, N]`, and weight `[S, K]` and bias `[S]` of a side, fp32. A coded weight is
            `[N, K / 4]` int32, each with four codes of 8 bits around 128, its scales `[N]` follow it, and halves are
            fp16. Where rows are indexed, x is their ids `[M, 1]` int32, and the weight is `[K, N / 4]`.

    Returns:
        `[M, N]`, fp32 or of the weight's type, as `spec.wide` says; with a side also `[M, S]` fp32.
    """
    from ligerexport.kernels.plans import layer_digest, spec_fields

    for_readers: dict[str, Any] = {} if spec.epsilon is None else {"epsilon": spec.epsilon}
    for_readers |= {} if spec.activation is None else {"activation": spec.activation}
    coded = {"contract": CODED, "coded": 1, "indexed": int(spec.indexed)} if spec.coded else {}
    return g.op(
        LINEAR, *inputs, **NAMED | coded, layer_spec=layer_digest(spec_fields(spec)), N=spec.outputs, K=spec.inputs,
        normed=int(spec.epsilon is not None), biased=int(spec.bias), added=int(spec.residual), wide=int(spec.wide),
        side=spec.side, outputs=2 if spec.side else 1, **for_readers,
    )  # fmt: skip


def read_linear(attributes: Mapping[str, Any]) -> LinearSpec:
    """Return what `plugin_linear` wrote, from a node's attributes by name."""
    from ligerexport.kernels.linear import LinearSpec

    flags = {name: bool(attributes[old]) for name, old in (("bias", "biased"), ("residual", "added"), ("wide", "wide"))}
    flags |= {name: bool(attributes.get(name)) for name in ("coded", "indexed")}
    epsilon, activation = (attributes.get(name) for name in ("epsilon", "activation"))
    return LinearSpec(attributes["N"], attributes["K"], epsilon, activation, **flags, side=attributes["side"])


def products(graph: ir.Graph) -> dict[tuple[LinearSpec, str], None]:
    """Return the products of a graph, each once, with the type of activations by its name in the kernels."""
    found: dict[tuple[LinearSpec, str], None] = {}
    for node in graph:
        if node.op_type == LINEAR and (weight := node.inputs[1]) is not None and weight.dtype is not None:
            spec = read_linear({name: x.value for name, x in node.attributes.items()})
            found[spec, "fp16" if spec.coded else BY_ONNX[weight.dtype].kernel] = None
    return found


def _rotary(g: Builder, inv_freq: tuple[float, ...], max_distance: int) -> ir.Value:
    """Return the table that kernels take, `[2, rows, R]`, shared by layers with equal rotation."""
    import torch

    from ligerexport.kernels.ops import BLOCK, rotary_table

    def make() -> ir.Value:
        name = f"rotary.{sum(x.startswith('rotary.') for x in g.initializers)}"
        table = rotary_table(torch.tensor(inv_freq), max_distance, BLOCK, turns=True)
        return g.initializer(ir.tensor(table.numpy(), name=name))

    return g.once(("rotary", inv_freq, max_distance), make)
