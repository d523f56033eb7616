"""One face for what is timed: artifacts, converted checkpoints and Transformers take ids and answer with the next.

The next token is always the most likely one, so that models that agree write the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ligerexport.artifact.artifact import MANIFEST
from ligerexport.errors import MissingDependency, UsageError
from ligerexport.threads import default_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ligerexport.run.runtime import Session

CHUNK = 512
"""Tokens of a call of a torch model that reads a prompt."""


class Engine(Protocol):
    """Sequences that advance together.

    Attributes:
        kind: `artifact`, `converted` or `transformer`.
        precision: Type of the weights.
        device: `cpu` or `cuda`.
        vocab_size: V.
        trained_length: Tokens.
        weight_bytes: Of the weights that a token reads.
        batch: B.
    """

    kind: str
    precision: str
    device: str
    vocab_size: int
    trained_length: int
    weight_bytes: int
    batch: int

    @property
    def state_bytes(self) -> int:
        """Bytes of state or KV cache of all sequences, counted over the tensors that there are."""
        ...

    def prefill(self, ids: Sequence[Sequence[int]]) -> list[int]:
        """Advance by `[B, T]` and return the most likely next ids `[B]`."""
        ...

    def fill(self, tokens: int) -> list[int]:
        """Put as many tokens into the cache without reading them, where its time does not depend on what they are."""
        ...

    def sibling(self, batch: int = 1) -> Engine:
        """Return other sequences on the same weights, which have seen nothing."""
        ...


def open_engine(
    model: str, *, batch: int = 1, threads: int | None = None, device: str = "auto", dtype: str = "auto"
) -> Engine:
    """Open a model for timing.

    Args:
        model: An artifact, a checkpoint directory, converted or not, a hub id, or a built-in model.
        batch: B.
        threads: Of one operator; None takes the physical cores.
        device: Row of `ligerexport.measure.bench.settings.DEVICES`.
        dtype: Row of `DTYPES` there.

    Raises:
        LigerError: There is no such model, it is damaged, or its runtime or device is not there.
    """
    if (Path(model).expanduser() / MANIFEST).is_file():
        return ArtifactEngine.open(Path(model).expanduser(), batch, threads, device)
    return TorchEngine.open(model, batch, threads, device, dtype)


class ArtifactEngine:
    """The session of an artifact. See `Engine`."""

    kind = "artifact"

    def __init__(self, session: Session, device: str) -> None:
        manifest = session.artifact.manifest
        self._session, self.device, self.batch = session, device, session.batch
        self.precision = manifest.precision
        self.vocab_size, self.trained_length = manifest.model.vocab_size, manifest.model.trained_length
        config = session.artifact.directory / "config.json"
        tied = json.loads(config.read_text()).get("tie_word_embeddings", True) if config.is_file() else True
        shape = manifest.model
        looked_up = 0 if tied else shape.vocab_size * shape.hidden_size / shape.parameters  # one row of it a token
        self.weight_bytes = int(manifest.bytes.weights * (1 - looked_up))

    @classmethod
    def open(cls, path: Path, batch: int, threads: int | None, device: str) -> ArtifactEngine:
        """Load an artifact; its files were hashed by whoever started this."""
        from ligerexport.run.runtime import load

        manifest = json.loads((path / MANIFEST).read_text())
        if manifest.get("target", "onnx") != "onnx":  # a runtime that has a GPU and no choice
            return cls(load(path, batch=batch, threads=threads, hashes=False), "cuda")
        if device == "auto":
            import onnxruntime

            there = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
            device = "cuda" if there and manifest.get("lowering") != "native" else "cpu"
        return cls(load(path, batch=batch, threads=threads, hashes=False, device=device), device)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state's tensors."""
        return self._session.state_bytes

    def prefill(self, ids: Sequence[Sequence[int]]) -> list[int]:
        """Return as `Engine.prefill`."""
        array = np.asarray(ids, np.int64)
        logits = self._session.step(array[:, 0]) if array.shape[1] == 1 else self._session.prefill(array)
        return [int(row) for row in logits.argmax(axis=-1)]

    def fill(self, tokens: int) -> list[int]:
        """Refuse: a state is what was read."""
        raise UsageError("the state of a recurrent model cannot be filled without reading")

    def sibling(self, batch: int = 1) -> ArtifactEngine:
        """Return as `Engine.sibling`."""
        return ArtifactEngine(self._session.sibling(batch), self.device)


class TorchEngine:
    """A transformers model with its own cache: growing for a Transformer, constant for a converted one; an `Engine`."""

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        self._model: Any = model
        self.batch = batch
        self.kind = "converted" if hasattr(model.config, "liger") else "transformer"
        self.device, self.precision = model.device.type, str(model.dtype).removeprefix("torch.")
        text = model.config.get_text_config()
        self.vocab_size, self.trained_length = text.vocab_size, text.max_position_embeddings
        total: int = sum(p.nbytes for p in model.parameters())  # a tied weight is one parameter
        embedding: Any = model.get_input_embeddings().weight
        head: Any = model.get_output_embeddings()  # with weights of its own only one row of the embedding is read
        self.weight_bytes: int = total if head.weight is embedding else total - embedding.nbytes
        self._cache = self._new_cache()

    @classmethod
    def open(cls, model: str, batch: int, threads: int | None, device: str, dtype: str) -> TorchEngine:
        """Load a checkpoint with the attention `sdpa`."""
        try:
            import torch
            import transformers  # noqa: F401
        except ImportError as error:
            raise MissingDependency(error.name or "torch", hint="pip install torch transformers") from error

        from ligerexport.checkpoint.checkpoint import check_checkpoint
        from ligerexport.checkpoint.loading import load_any
        from ligerexport.checkpoint.sources import resolve

        torch.set_num_threads(threads or min(torch.get_num_threads(), default_threads()))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise MissingDependency("a cuda device", hint="leave --device out, or: --device cpu")
        kind = getattr(torch, dtype if dtype != "auto" else "float32" if device == "cpu" else "bfloat16")
        source = resolve(model)
        info = check_checkpoint(source.path, tokenizer=False)
        loaded: Any = load_any(info, kind)
        return cls(loaded.to(device), batch)

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        if self.kind == "transformer":
            return DynamicCache(config=self._model.config)
        from ligerexport.layers.mixer import LigerCache

        return LigerCache(self._model.config)

    @property
    def state_bytes(self) -> int:
        """Bytes of the cache's tensors."""
        total = 0
        for layer in self._cache.layers:
            state = getattr(layer, "state", None)
            tensors = (layer.keys, layer.values) if state is None and hasattr(layer, "keys") else (state or {}).values()
            total += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return total

    def prefill(self, ids: Sequence[Sequence[int]]) -> list[int]:
        """Return as `Engine.prefill`."""
        import torch

        from ligerexport.layers.mixer import CACHE

        with torch.inference_mode():
            for part in torch.tensor(ids, device=self.device).split(CHUNK, dim=1):
                out = self._model(part, **{CACHE: self._cache}, use_cache=True, logits_to_keep=1)
            return [int(row) for row in out.logits[:, -1].argmax(dim=-1)]  # waits for a GPU

    def fill(self, tokens: int) -> list[int]:
        """Put random keys and values into the cache of a Transformer: its time does not depend on what they are.

        Raises:
            UsageError: It is a recurrent model.
        """
        import torch

        if self.kind != "transformer":
            raise UsageError("the state of a recurrent model cannot be filled without reading")
        config = self._model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        with torch.inference_mode():
            for layer in range(config.num_hidden_layers):
                shape = (self.batch, config.num_key_value_heads, tokens, width)
                pair = [torch.randn(shape, dtype=self._model.dtype, device=self.device) for _ in range(2)]
                self._cache.update(*pair, layer)
        return [0] * self.batch

    def sibling(self, batch: int = 1) -> TorchEngine:
        """Return as `Engine.sibling`."""
        return TorchEngine(self._model, batch)
