"""Run a graph of the lowering `plugin` without TensorRT: onnx's evaluator in numpy, and our torch op for the mixers.

It is slow, and used only for comparisons. It reads nodes by the contract in `node.py`,
as the plugin does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from ligerexport.artifact.artifact import Artifact
from ligerexport.artifact.snapshot import Snapshot
from ligerexport.dtypes import DTYPES, HALVES
from ligerexport.errors import ArtifactError
from ligerexport.exporters.onnx.native import DOMAIN
from ligerexport.exporters.onnx.quantise import MIDDLE
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.tensorrt.node import CONTRACTS, LINEAR, MIXER, read_linear
from ligerexport.model.state import MOST, MixerSpec

if TYPE_CHECKING:
    from ligerexport.kernels.linear import LinearSpec

_HALVES = {row.onnx: row.name for row in HALVES}


class PluginSession:
    """One or more sequences on an artifact of the target `trt`. Implements part of `ligerexport.run.runtime.Session`.

    Args:
        artifact: Graph, weights and manifest.
        spec: The checkpoint that it was built from.
        batch: B, number of sequences.
        wide: Whether fp16 and bf16 are computed in fp32, with the weights as stored, to compare with fp32 arithmetic.
            Keys and values are then not rounded to a smaller type of the state either.
    """

    def __init__(self, artifact: Artifact, spec: ModelSpec, *, batch: int = 1, wide: bool = False) -> None:
        self.artifact, self.batch, self.chunk = artifact, batch, artifact.manifest.graph.max_chunk
        self._evaluator, self._wide = evaluator(artifact, spec, wide=wide), wide
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._position = np.zeros(self.batch, np.int32)
        self._state = {}
        for t in self.artifact.manifest.state:
            sizes = [self.batch if size == "B" else int(size) for size in t.shape]
            row = DTYPES["float32" if self._wide and DTYPES[t.dtype].bits < 32 else t.dtype]
            self._state[t.past] = np.full(sizes, t.fill, _numpy(row.onnx))

    def prefill(self, ids: Sequence[int] | np.ndarray, padding: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Advance by a prompt `[T]` or `[B, T]`, in chunks; return logits `[B, V]`."""
        array = np.atleast_2d(np.asarray(ids, np.int32))
        if padding is not None:
            self._position -= np.asarray(padding, np.int32)
        for start in range(0, array.shape[1], self.chunk):
            part = array[:, start : start + self.chunk]
            feeds = {name: x.view(np.int32) if x.dtype == np.int8 else x for name, x in self._state.items()}
            feeds |= {"input_ids": part, "position": self._position}
            logits, *present = cast("list[np.ndarray]", self._evaluator.run(None, feeds))
            for (name, past), x in zip(list(self._state.items()), present, strict=True):
                self._state[name] = x.view(np.int8) if past.dtype == np.int8 else x
            self._position = self._position + np.int32(part.shape[1])
        return logits

    def step(self, ids: int | Sequence[int] | np.ndarray) -> np.ndarray:
        """Advance by one token; return logits as `prefill` does."""
        return self.prefill(np.reshape(ids, (self.batch, 1)))

    def snapshot(self) -> Snapshot:
        """Return the state."""
        return Snapshot(self.artifact.manifest.fingerprint, self._position.astype(np.int64), dict(self._state))

    def restore(self, snapshot: Snapshot) -> None:
        """Set the state from a snapshot of this or another session."""
        self._position = snapshot.position.astype(np.int32)
        self._state = {name: snapshot.tensors[name].astype(x.dtype) for name, x in self._state.items()}


def evaluator(artifact: Artifact, spec: ModelSpec, *, wide: bool = False) -> ReferenceEvaluator:
    """Return onnx's evaluator of an artifact's graph; the arguments are those of `PluginSession`."""
    model = onnx.load(artifact.graph)
    if wide and artifact.manifest.precision in ("int8", *_HALVES.values()):  # in other artifacts a half is an error
        _widen(model)
    return ReferenceEvaluator(model, new_ops=[_mixer_op(spec, wide), _linear_op(wide)])


def _widen(model: onnx.ModelProto) -> None:
    """Change all fp16 and bf16 to fp32, also in weights and casts."""
    for tensor in model.graph.initializer:
        if tensor.data_type in _HALVES:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i in _HALVES:
                attribute.i = onnx.TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in _HALVES:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def _numpy(kind: int) -> np.dtype:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))


def _mixer_op(spec: ModelSpec, wide: bool) -> type[OpRun]:
    """Return the operator for the layers of a model, which finds a layer by its digest, as the plugin finds kernels."""
    from ligerexport.kernels.plans import layer_digest, spec_fields

    layers = {layer_digest(spec_fields(layer)): layer for layer in spec.mixers if layer is not None}

    class LigerMixer(OpRun):
        op_domain = DOMAIN

        def _run(self, *tensors: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
            _check(MIXER, attributes)
            layer = layers[attributes["layer_spec"]]
            rounds = layer.config.state_dtype != "activation"
            return (run_unrounded if wide and rounds else run_mixer)(layer, tensors)

    assert LigerMixer.__name__ == MIXER
    return LigerMixer


def _linear_op(wide: bool) -> type[OpRun]:
    """Return the operator of products with weights."""

    class LigerLinear(OpRun):
        op_domain = DOMAIN

        def _run(self, x: np.ndarray, *tensors: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
            _check(LINEAR, attributes)
            spec, (weight, *rest), kind = read_linear(attributes), tensors, tensors[0].dtype
            if spec.coded:
                codes, kind = weight.view(np.uint8), np.dtype(np.float32 if wide else np.float16)
                if spec.indexed:
                    return ((codes[x[:, 0]] - np.float32(MIDDLE)) * rest[0][x[:, 0], None],)
                weight = (codes - np.float32(MIDDLE)) * rest.pop(0)[:, None]
            made, *sides = run_linear(spec, x, weight, rest)
            return made if spec.wide else made.astype(kind), *sides

    assert LigerLinear.__name__ == LINEAR
    return LigerLinear


def _check(kind: str, attributes: dict[str, Any]) -> None:
    if attributes["contract"] not in CONTRACTS:
        raise ArtifactError(f"contract {attributes['contract']} of a {kind}, one of {CONTRACTS} was expected")


def run_linear(
    spec: LinearSpec, x: np.ndarray, weight: np.ndarray, rest: Sequence[np.ndarray]
) -> tuple[np.ndarray, ...]:
    """Return the outputs of a node for its inputs, in fp32."""
    import torch

    from ligerexport.kernels.linear import linear

    rows, there = _torch(x), iter([_torch(y) for y in rest])
    norm, bias, residual = (next(there) if x else None for x in (spec.epsilon is not None, spec.bias, spec.residual))
    with torch.inference_mode():
        made = linear(rows, _torch(weight), norm, bias, residual, spec)
        sides = [linear(rows, next(there), norm, next(there), None, spec.of_side())] if spec.side else []
    return made.float().numpy(), *(y.numpy() for y in sides)


def run_mixer(spec: MixerSpec, tensors: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Return the outputs of a node for its inputs."""
    import torch

    from ligerexport.kernels.ops import liger_mixer

    heads = (spec.q_heads, spec.d_k), (spec.kv_heads, spec.d_k), (spec.kv_heads, spec.d_v)
    widths, given = [count * width for count, width in heads], [_torch(x) for x in tensors]
    joint = given[0].shape[-1] != widths[0]
    projected = given[0].split(widths, -1) if joint else given[:3]
    position, rotary, *rest = given[1 if joint else 3 :]
    sizes = len(position), len(given[0]) // len(position)
    score = rest.pop(0).unflatten(0, sizes) if spec.config.foresees else None
    views = {"int64": lambda x: x.long(), "int8": lambda x: x.view(torch.int8)}
    state = {t.name: views.get(t.dtype, lambda x: x)(x) for t, x in zip(spec.state(), rest, strict=True)}
    query, key, value = (x.unflatten(0, sizes).unflatten(2, y) for x, y in zip(projected, heads, strict=True))
    with torch.inference_mode():
        mixed, present = liger_mixer(query, key, value, position.long(), state, spec, rotary, score)
    outputs = mixed.flatten(2).flatten(0, 1), *(present[t.name] for t in spec.state())
    types = tensors[0].dtype, *(x.dtype for x in tensors[len(tensors) - len(rest) :])
    found = (x.float() if x.is_floating_point() else x for x in outputs)  # numpy has no bf16
    return tuple(
        x.numpy().view(t) if x.dtype == torch.int8 else x.numpy().astype(t) for x, t in zip(found, types, strict=True)
    )


def run_unrounded(spec: MixerSpec, tensors: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Do what `run_mixer` does for a state that is rounded, without rounding: codes and scales are fp32."""
    names, config = [t.name for t in spec.state()], spec.config
    given, state = tensors[: -len(names)], dict(zip(names, tensors[-len(names) :], strict=True))
    sizes = "+".join(str(n) for n in (config.window, *(n for _, n in config.slots)))
    plain = replace(config, state_dtype="activation", heads=config.heads or (" ".join([sizes] * spec.kv_heads),))
    scales = {name: f"{name}_scale" for name in ("slot_key", "slot_value") if f"{name}_scale" in state}
    state |= {name: state[name] * state[scale][..., None] for name, scale in scales.items()}
    kept = [x for name, x in state.items() if name not in scales.values()]
    mixed, *present = run_mixer(replace(spec, config=plain), [*given, *kept])
    made = dict(zip((name for name in names if name not in scales.values()), present, strict=True))
    for name, scale in scales.items():
        made[scale] = np.maximum(np.abs(made[name]).max(axis=-1) / MOST, np.finfo(np.float16).tiny).astype(np.float32)
        made[name] = made[name] / made[scale][..., None]
    return mixed, *(made[name] for name in names)


def _torch(x: np.ndarray) -> Any:
    import torch

    if x.dtype == _numpy(onnx.TensorProto.BFLOAT16):  # torch cannot read such an array
        return torch.from_numpy(x.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(x))
