"""Find the first layer at which a graph and the torch model part, for the message of a failed verification."""

from __future__ import annotations

import numpy as np

from ligerexport.artifact import Artifact
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.reference import Reference, State

APART = 1e-3
"""Relative distance of two residual vectors from which a layer counts as different."""


def first_difference(
    spec: ModelSpec, artifact: Artifact, ids: np.ndarray, reference: Reference
) -> tuple[int, str] | None:
    """Run both from the start, a chunk at a time, and compare state and residual stream layer by layer.

    Args:
        spec: The checkpoint.
        artifact: The graph at fault; a variant with more outputs is written beside it for a moment.
        ids: Tokens that showed the difference.
        reference: The torch model to compare with.

    Returns:
        The layer and what differs in it, or None when they agree.
    """
    from ligerexport.exporters.verify import of_layer

    graph, chunk = _Graph(artifact), artifact.manifest.graph.max_chunk
    for answer in reference.answers(np.split(ids, range(chunk, len(ids), chunk)), hidden=True):
        found = graph.run(answer.ids)
        for layer in range(len(spec.mixers)):
            if what := _difference(of_layer(answer.state, layer), of_layer(found, layer)):
                return layer, what
    return None


def _difference(ours: State, theirs: State) -> str | None:
    """Return which of a layer's tensors differs, in the order in which the layer computes them."""
    from ligerexport.exporters.verify import sort_slots, state_error

    if "slot_position" in ours:
        ours, theirs = sort_slots(ours), sort_slots(theirs)
    for name, tensor in ours.items():
        other = theirs[name]
        if name == "hidden":
            tensor = tensor[-len(other) :]
            apart = np.linalg.norm(tensor - other, axis=-1) / np.linalg.norm(tensor, axis=-1)
            if not apart.max() < APART:
                return f"its output, by {apart.max():.1e} of its size"
        elif not np.array_equal(tensor, other) if tensor.dtype.kind == "i" else not state_error(tensor, other) < APART:
            return f"its {name}"
    return None


class _Graph:
    """The graph with the residual stream after each layer as further outputs, on the same external data."""

    def __init__(self, artifact: Artifact) -> None:
        import onnx
        import onnxruntime

        from ligerexport.exporters.onnx.lowerings import FP32_ACTIVATIONS
        from ligerexport.exporters.onnx.native import register

        manifest = artifact.manifest
        model = onnx.load(artifact.graph, load_external_data=False)
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(f"hidden.{i}", onnx.TensorProto.FLOAT, None)
            for i in range(manifest.model.layers)
        )
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = FP32_ACTIVATIONS
        variant = artifact.graph.with_suffix(".debug")
        onnx.save(model, variant)
        try:
            options = onnxruntime.SessionOptions()
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(FP32_ACTIVATIONS))
            options.enable_mem_reuse = False  # planning reuse is quadratic in the nodes
            if manifest.lowering == "native":
                register(options)
            self._session = onnxruntime.InferenceSession(str(variant), options, providers=["CPUExecutionProvider"])
        finally:
            variant.unlink()
        letters: dict[int | str, int] = {"B": 1, "P": 0}
        self._state = {
            t.past: np.full([letters[n] if isinstance(n, str) else n for n in t.shape], t.fill, t.dtype)
            for t in manifest.state
        }
        self._position = 0
        self._layers = manifest.model.layers

    def run(self, ids: np.ndarray) -> State:
        """Return the state after more tokens, with `past.LAYER.hidden` as `Reference.answers` has it."""
        feeds = self._state | {"input_ids": ids[None], "position": np.array([self._position])}
        wanted = {entry.name for entry in self._session.get_inputs()}
        names = [output.name for output in self._session.get_outputs()]
        results = self._session.run(None, {name: value for name, value in feeds.items() if name in wanted})
        values = dict(zip(names, results, strict=True))
        self._state = {name: values[name.replace("past.", "present.", 1)] for name in self._state}
        self._position += len(ids)
        return self._state | {f"past.{i}.hidden": values[f"hidden.{i}"] for i in range(self._layers)}
