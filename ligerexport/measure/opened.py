"""One interface to score and to time an open model: a Transformer, a converted checkpoint or an artifact.

An artifact scores with its session, one sequence at a time. Torch is imported only if it is needed, so that an artifact
is timed in a process without torch.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ligerexport.artifact.artifact import MANIFEST, is_artifact
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import CheckpointError, MissingDependency, UsageError
from ligerexport.exporters.targets import get_target
from ligerexport.run.runtime import Session
from ligerexport.text.tokenizer import TextModel
from ligerexport.threads import default_threads
from ligerexport.versions import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

CHUNK = 1024
"""Largest number of tokens in a scoring call."""
PROMPT_CHUNK = 512
"""Number of tokens per call when a torch model reads a timed prompt."""
BUDGET = 1 << 27
"""Largest number of logits in a call: half a gigabyte in fp32."""


class Timed(ABC):
    """A model to time: `advance` continues after the last call.

    Attributes:
        kind: `artifact`, `converted`, `transformer`, `llama.cpp` or `onnxruntime-genai`.
        device: `cpu`, `cuda` or `mps`.
        precision: Type of the weights.
        vocab_size: Size V of the vocabulary.
        trained_length: Trained context length in tokens.
        batch: Number B of sequences that advance together, and the best number to score at a time.
        runtime: The program that computes, with its version.
        grows: Whether the memory of a sequence grows with the text.
        fills: Whether `fill` is possible.
        room: Largest number of tokens in a sequence; None if there is no limit.
    """

    kind: str
    device: str
    precision: str
    vocab_size: int
    trained_length: int
    batch: int
    runtime: str
    grows: bool
    fills: bool = False
    room: int | None = None

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of weights read per token."""

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of the state or KV cache of all advancing sequences, counted over the actual tensors."""

    @abstractmethod
    def advance(self, ids: Sequence[Sequence[int]]) -> list[int]:
        """Advance by ids `[B, T]` and return the most likely next ids `[B]`."""

    def fill(self, tokens: int) -> list[int]:
        """Fill a KV cache with random keys and values of `tokens` tokens; times do not depend on the values.

        Raises:
            UsageError: The model is recurrent.
        """
        raise UsageError("the state of a recurrent model cannot be filled without reading")

    def held(self) -> list[list[list[int]]] | None:
        """Return the positions that the first sequence holds exactly, by layer and KV head; None if unknown."""
        return None

    def forgotten(self) -> list[float] | None:
        """Return the share of the first sequence's attention on forgotten tokens, by layer; see `Session.forgotten`."""
        return None

    @abstractmethod
    def sibling(self, batch: int = 1) -> Timed:
        """Return new sequences on the same weights, with empty states."""


class Opened(Timed):
    """A model to time, and to score: each scoring call starts with an empty state.

    Attributes:
        name: Name that the user gave.
        path: The model's directory.
    """

    name: str
    path: Path

    @cached_property
    def text(self) -> TextModel:
        """The tokenizer."""
        return TextModel(self.path)

    @property
    def prefix(self) -> list[int]:
        """Ids that the tokenizer puts before every text."""
        return self.text.encode("")

    @property
    @abstractmethod
    def sequence_bytes(self) -> int | None:
        """Bytes of the state of one sequence; None if it grows with the text."""

    @abstractmethod
    def read(self, ids: Tensor, state: Any, last: int, *, keep: bool = True) -> tuple[Tensor, Any]:
        """Read tokens; return their logits and the new state, which is valid until the next call with `state=None`.

        Args:
            ids: Token ids `[B, T]`.
            state: State from the previous call; None starts with an empty state.
            last: Number of last tokens whose logits are returned; 0 for all.
            keep: Whether the state is needed.
        """

    def logits(self, ids: Tensor, chunk: int = CHUNK) -> Iterator[Tensor]:
        """Read `[B, T]` and yield the logits after each token, `[B, chunk, V]` fp32; the last may be shorter."""
        state = None
        for part in ids.split(chunk, dim=1):
            logits, state = self.read(part, state, 0)
            yield logits.float()

    def forced(self, ids: Tensor, last: int) -> Tensor:
        """Read `[B, T]` and return the logits after the last tokens, `[B, last, V]` fp32."""
        state, head = None, max(0, ids.shape[1] - max(last, CHUNK))
        for part in ids[:, :head].split(CHUNK, dim=1) if head else ():
            _, state = self.read(part, state, 1)
        return self.read(ids[:, head:], state, last, keep=head > 0)[0].float()

    def greedy(self, ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Read prompts `[B, T]` and yield the greedily decoded tokens `[B]` of each step without end."""
        import torch

        state, parts = None, torch.tensor(ids).split(CHUNK, dim=1)
        while True:
            for part in parts:
                logits, state = self.read(part, state, 1)
            tokens = logits[:, -1].argmax(dim=-1, keepdim=True)
            yield tokens[:, 0].tolist()
            parts = (tokens,)

    @abstractmethod
    def sibling(self, batch: int = 1) -> Opened:
        """Return new sequences on the same weights, with empty states."""


def open_model(
    model: str | Path,
    *,
    scoring: bool = False,
    batch: int = 1,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: ProgressFactory = silent,
) -> Opened:
    """Open a model to measure it.

    Args:
        model: An artifact, a checkpoint directory, converted or not, a hub id, or a built-in model.
        scoring: Whether to score the model, which needs its tokenizer, or to time it.
        batch: Number B of sequences. On a CPU, torch models score one sequence at a time.
        threads: Number of threads per operator for timing; None takes the physical cores.
        device: `auto` takes a GPU if the model runs on one. Artifacts are scored on the CPU.
        dtype: Type of a torch model's weights; `auto` is float32 on a CPU and bfloat16 elsewhere.

    Raises:
        SourceError: There is no such model.
        CheckpointError: The checkpoint is incomplete or damaged.
        ArtifactError: The artifact is damaged or for another runtime.
        MissingDependency: A runtime or a device is not available.
    """
    if is_artifact(model):
        return _open_artifact(Path(model).expanduser(), scoring, batch, threads, device)
    require("build")
    import torch

    from ligerexport.checkpoint.checkpoint import check_checkpoint
    from ligerexport.checkpoint.loading import load_any
    from ligerexport.checkpoint.sources import resolve

    if not scoring:
        torch.set_num_threads(threads or min(torch.get_num_threads(), default_threads()))
    place = pick_device(device)
    source = resolve(model, progress=progress)
    info = check_checkpoint(source.path, tokenizer=scoring)
    if scoring and not (source.path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"no tokenizer.json in {source.path}",
            hint="save the tokenizer with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    with progress(f"loading {source.name}", info.bytes) as advance:
        kind = ("float32" if place.type == "cpu" else "bfloat16") if dtype == "auto" else dtype
        loaded = load_any(info, getattr(torch, kind))
        loaded.to(place)  # type: ignore[arg-type]
        advance(info.bytes)
    return TorchModel(loaded, 1 if scoring and place.type == "cpu" else batch, source.name, source.path)


def _open_artifact(path: Path, scoring: bool, batch: int, threads: int | None, device: str) -> ArtifactModel:
    """Load an artifact. For timing, the caller has already hashed its files."""
    from ligerexport.run.runtime import load

    if scoring:
        return ArtifactModel(load(path, scoring=True))
    manifest = json.loads((path / MANIFEST).read_text())
    if not get_target(manifest.get("target", "onnx")).onnxruntime:  # its runtime always takes the GPU
        return ArtifactModel(load(path, batch=batch, threads=threads, hashes=False), "cuda")
    if device == "auto":
        import onnxruntime

        there = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        device = "cuda" if there and manifest.get("lowering") != "native" else "cpu"
    return ArtifactModel(load(path, batch=batch, threads=threads, hashes=False, device=device), device)


class TorchModel(Opened):
    """A transformers model with its own cache, which grows for a Transformer and is constant for a converted one.

    Args:
        model: Model in evaluation mode, on its device.
        batch: Number B of sequences.
        name: Name that the user gave.
        path: Directory with the tokenizer.
    """

    def __init__(self, model: PreTrainedModel, batch: int = 1, name: str = "", path: Path = Path()) -> None:
        self.model: Any = model
        self.batch, self.name, self.path = batch, name, path
        self.kind = "converted" if hasattr(model.config, "liger") else "transformer"
        self.device, self.precision = model.device.type, str(model.dtype).removeprefix("torch.")
        self.runtime = f"PyTorch {version('torch')}"
        self.fills = self.kind == "transformer"
        text = model.config.get_text_config()
        self.vocab_size, self.trained_length = text.vocab_size, text.max_position_embeddings
        self._cache: Any = None

    @property
    def grows(self) -> bool:  # type: ignore[override]
        return self.sequence_bytes is None

    @property
    def sequence_bytes(self) -> int | None:
        """See `Opened.sequence_bytes`; the state has the model's dtype."""
        from ligerexport.layers.mixer import layer_specs

        if self.kind != "converted":
            return None
        specs, width = layer_specs(self.model.config), self.model.dtype.itemsize
        return None if None in specs else sum(t.nbytes(width) for spec in specs if spec for t in spec.state())

    @property
    def state_bytes(self) -> int:
        """Bytes of the cache's tensors."""
        total = 0
        for layer in self._cache.layers if self._cache is not None else ():
            state = getattr(layer, "state", None)
            tensors = (layer.keys, layer.values) if state is None and hasattr(layer, "keys") else (state or {}).values()
            total += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return total

    @property
    def weight_bytes(self) -> int:
        """See `Timed.weight_bytes`; a tied weight is one parameter."""
        total: int = sum(p.nbytes for p in self.model.parameters())
        embedding = self.model.get_input_embeddings().weight
        head = self.model.get_output_embeddings()  # if it has its own weights, only one row of the embedding is read
        return total if head.weight is embedding else total - int(embedding.nbytes)

    def read(self, ids: Tensor, state: Any, last: int, *, keep: bool = True) -> tuple[Tensor, Any]:
        """See `Opened.read`; the state is the cache."""
        import torch

        from ligerexport.layers.mixer import CACHE

        with torch.no_grad():
            out = self.model(ids.to(self.model.device), **{CACHE: state}, use_cache=keep, logits_to_keep=last)
        return out.logits, out.get(CACHE)

    def advance(self, ids: Sequence[Sequence[int]]) -> list[int]:
        import torch

        with torch.inference_mode():
            for part in torch.tensor(ids).split(PROMPT_CHUNK, dim=1):
                logits, self._cache = self.read(part, self._cache, 1)
            return [int(row) for row in logits[:, -1].argmax(dim=-1)]  # waits for a GPU

    def fill(self, tokens: int) -> list[int]:
        if not self.fills:
            return super().fill(tokens)
        import torch
        from transformers import DynamicCache

        config = self.model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._cache = self._cache or DynamicCache(config=self.model.config)
        with torch.inference_mode():
            for layer in range(config.num_hidden_layers):
                shape = (self.batch, config.num_key_value_heads, tokens, width)
                pair = [torch.randn(shape, dtype=self.model.dtype, device=self.device) for _ in range(2)]
                self._cache.update(*pair, layer)
        return [0] * self.batch

    def sibling(self, batch: int = 1) -> TorchModel:
        return TorchModel(self.model, batch, self.name, self.path)


class ArtifactModel(Opened):
    """The session of an artifact.

    Args:
        session: Session from `ligerexport.run.runtime.load`; scoring needs `scoring=True` and a batch of 1.
        device: Device on which it runs.
    """

    kind = "artifact"

    def __init__(self, session: Session, device: str = "cpu") -> None:
        manifest = session.artifact.manifest
        self.session, self.device, self.batch = session, device, session.batch
        self.path, self.name, self.precision = (
            session.artifact.directory,
            session.artifact.directory.name,
            manifest.precision,
        )
        self.vocab_size, self.trained_length = manifest.model.vocab_size, manifest.model.trained_length
        onnx = get_target(manifest.target).onnxruntime
        self.runtime = f"ONNX Runtime {version('onnxruntime')}" if onnx else "TensorRT"
        self.grows = manifest.growth > 0

    @property
    def sequence_bytes(self) -> int | None:
        manifest = self.session.artifact.manifest
        return None if manifest.growth else manifest.bytes.state_per_sequence

    @property
    def state_bytes(self) -> int:
        """Bytes of the state's tensors."""
        return self.session.state_bytes

    @property
    def weight_bytes(self) -> int:
        manifest, config = self.session.artifact.manifest, self.path / "config.json"
        tied = json.loads(config.read_text()).get("tie_word_embeddings", True) if config.is_file() else True
        shape = manifest.model  # if the output has its own weights, one row of the embedding is read per token
        return int(
            manifest.bytes.weights * (1 - (0 if tied else shape.vocab_size * shape.hidden_size / shape.parameters))
        )

    def read(self, ids: Tensor, state: Any, last: int, *, keep: bool = True) -> tuple[Tensor, Any]:
        """See `Opened.read`; the state is the session itself."""
        import torch

        if state is None:
            self.session.reset()
        if len(ids) != 1:
            raise ValueError(f"got {len(ids)} sequences, an artifact scores one at a time")
        array, head = ids.numpy(), ids.shape[1] - last if last else 0
        if array.shape[1] == 1 and state is not None:
            return torch.from_numpy(self.session.step(array[:, 0]))[:, None], self
        if last == 1:
            return torch.from_numpy(self.session.prefill(array))[:, None], self
        if head:
            self.session.prefill(array[:, :head])
        return torch.from_numpy(np.concatenate(list(self.session.every(array[:, head:])), axis=1)), self

    def advance(self, ids: Sequence[Sequence[int]]) -> list[int]:
        array = np.asarray(ids, np.int64)
        logits = self.session.step(array[:, 0]) if array.shape[1] == 1 else self.session.prefill(array)
        return [int(row) for row in logits.argmax(axis=-1)]

    def held(self) -> list[list[list[int]]]:
        """See `Opened.held`."""
        return [[positions.tolist() for positions in heads] for heads in self.session.held()]

    def forgotten(self) -> list[float] | None:
        """See `Timed.forgotten`."""
        shares = self.session.forgotten
        return None if shares is None else [float(share) for share in shares[0]]

    def sibling(self, batch: int = 1) -> ArtifactModel:
        return ArtifactModel(self.session.sibling(batch), self.device)


def chunk_size(batch: int, vocab_size: int) -> int:
    """Return the number of tokens in a call whose logits `[batch, chunk, V]` stay within the budget."""
    return max(64, min(CHUNK, BUDGET // (batch * vocab_size) // 64 * 64))


def pick_device(name: str) -> torch.device:
    """Return a device; `auto` takes an NVIDIA GPU if there is one.

    Raises:
        MissingDependency: The device is not available.
    """
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    if not there[name]:
        raise MissingDependency(f"a {name} device", hint="leave --device out, or: --device cpu")
    return torch.device(name)


def check_same_tokenizer(model: Opened, teacher: Opened) -> None:
    """Refuse to compare models whose tokens mean different things.

    Raises:
        UsageError: Their vocabularies differ.
    """
    hint = "compare a model with the Transformer that it was converted from"
    if differing := {token for token, _ in model.text.vocabulary.items() ^ teacher.text.vocabulary.items()}:
        raise UsageError(
            f"{model.name} and {teacher.name} have different tokenizers ({len(differing):,} tokens differ)", hint=hint
        )
    if model.vocab_size != teacher.vocab_size:
        raise UsageError(
            f"{model.name} has {model.vocab_size:,} logits, {teacher.name} {teacher.vocab_size:,}", hint=hint
        )
