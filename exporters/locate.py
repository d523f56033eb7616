"""Find the first layer at which a graph and the torch model part, for the message of a failed verification."""

from __future__ import annotations

from typing import Any

import numpy as np

from ligerexport.artifact import Artifact
from ligerexport.exporters.onnx.spec import ModelSpec

APART = 1e-3
"""Relative distance of two residual vectors from which a layer counts as different."""


def first_difference(spec: ModelSpec, artifact: Artifact, ids: np.ndarray, reference: Any) -> tuple[int, str] | None:
    """Run both from the start, a chunk at a time, and compare state and residual stream layer by layer.

    Args:
        spec: The checkpoint.
        artifact: The graph at fault; a variant with more outputs is written beside it for a moment.
        ids: Tokens that showed the difference.
        reference: The torch model to compare with.

    Returns:
        The layer and what differs in it, or None when they agree.
    """
    graph, torch_model = _Graph(artifact), _Torch(reference)
    chunk = artifact.manifest.graph.max_chunk
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        ours, theirs = torch_model.run(part), graph.run(part)
        for layer in range(len(spec.mixers)):
            if what := _difference(ours[layer], theirs[layer]):
                return layer, what
    return None


def _difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> str | None:
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


class _Torch:
    """The torch model with the residual stream after each layer."""

    def __init__(self, model: Any) -> None:
        from ligerexport.mixer import LigerCache

        self._model = model
        self._cache: Any = LigerCache(self._model.config)
        self._hidden: list[np.ndarray] = []
        for layer in self._model.model.layers:
            layer.register_forward_hook(self._keep)

    def _keep(self, module: Any, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._hidden.append(hidden.reshape(-1, hidden.shape[-1]).numpy())

    def run(self, ids: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Return state and `hidden` of each layer after more tokens."""
        import torch

        self._hidden = []
        with torch.inference_mode():
            self._model(torch.from_numpy(ids)[None], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        states = (getattr(layer, "state", None) or {"value": layer.values} for layer in self._cache.layers)
        return [
            {name: tensor.numpy() for name, tensor in state.items()} | {"hidden": hidden}
            for state, hidden in zip(states, self._hidden, strict=True)
        ]


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

    def run(self, ids: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Return state and `hidden` of each layer after more tokens."""
        feeds = self._state | {"input_ids": ids[None], "position": np.array([self._position])}
        wanted = {entry.name for entry in self._session.get_inputs()}
        names = [output.name for output in self._session.get_outputs()]
        results = self._session.run(None, {name: value for name, value in feeds.items() if name in wanted})
        values = dict(zip(names, results, strict=True))
        self._state = {name: values[name.replace("past.", "present.", 1)] for name in self._state}
        self._position += len(ids)
        return [
            {name.split(".", 2)[2]: value for name, value in self._state.items() if name.startswith(f"past.{i}.")}
            | {"hidden": values[f"hidden.{i}"]}
            for i in range(self._layers)
        ]
