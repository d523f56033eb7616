"""Run a converted checkpoint in torch, as a session whose states artifacts of the same checkpoint read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ligerexport import __version__
from ligerexport.artifact.artifact import Artifact, ByteCounts, Graph, Manifest, StateTensor
from ligerexport.artifact.snapshot import Snapshot
from ligerexport.checkpoint.checkpoint import check_checkpoint
from ligerexport.checkpoint.loading import load_model
from ligerexport.dtypes import BY_SAFETENSORS, DTYPES, HALVES
from ligerexport.errors import CheckpointError, MissingDependency, UsageError
from ligerexport.exporters.build import source_of
from ligerexport.exporters.onnx.spec import ModelSpec, read_spec
from ligerexport.exporters.session import BatchSession, choose_chunk
from ligerexport.exporters.torch_fused import fuse
from ligerexport.exporters.torch_graph import Replay
from ligerexport.layers.mixer import CACHE, LigerCache, LigerLayer, shared_table
from ligerexport.model.state import FORGOTTEN

CHUNK = 1024
"""Number of prompt tokens per call."""
LONGEST = 1 << 14
"""Largest number of prompt tokens per call, whose activations must fit into memory."""


class TorchSession(BatchSession):
    """One batch of sequences on a converted checkpoint. See `ligerexport.run.runtime.Session` for the interface.

    Weights and activations are in fp32 on a CPU. On a GPU they are in the checkpoint's type of 16 bits, if it has one,
    and steps and whole chunks are replayed as CUDA graphs from the second one on.

    Args:
        path: Directory of the checkpoint.
        batch: B, number of sequences that advance together.
        chunk: Number of prompt tokens per call, at most `LONGEST`; None takes `CHUNK`.
        device: `cpu` or `cuda`.
        meter: Whether to compute `forgotten`, which on a GPU takes the slower kernels.

    Raises:
        CheckpointError: The checkpoint is incomplete, not converted, or keeps layers as softmax.
        MissingDependency: There is no such device.
        UsageError: `batch` or `chunk` is out of range.
    """

    def __init__(
        self, path: Path | str, *, batch: int = 1, chunk: int | None = None, device: str = "cpu", meter: bool = False
    ) -> None:
        if device not in ("cpu", "cuda"):
            raise UsageError(f"unknown device '{device}'", hint="choose from cpu, cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise MissingDependency("a cuda device", hint="leave --device out")
        info = check_checkpoint(path, tokenizer=False)
        spec = read_spec(info)
        if None in spec.mixers:
            raise CheckpointError(
                f"{path} keeps layers as softmax, which sessions in torch do not support",
                hint="build an artifact: ligerexport build --target onnx",
            )
        stored = [BY_SAFETENSORS[name] for name in info.dtypes if BY_SAFETENSORS[name] in HALVES]
        dtype = stored[0].name if stored and device == "cuda" else "float32"
        self.artifact = Artifact(Path(path), _manifest(spec, source_of(info, lambda size: None), dtype))
        self.chunk = choose_chunk(chunk, CHUNK, LONGEST)
        self._model: Any = load_model(path, DTYPES[dtype].torch).eval().to(device)  # type: ignore[arg-type]
        if device == "cuda":
            fuse(self._model)
        self._mixers = [mixer for mixer in spec.mixers if mixer is not None]
        self._meters = meter and spec.evicts
        layers = [layer.self_attn for layer in self._model.model.layers]
        # graphs read the tables, so they must stay
        self._tables = [shared_table(x.inv_freq, x.spec.max_distance, self._model.device) for x in layers]
        self._allocate(batch)

    def _allocate(self, batch: int) -> None:
        if batch < 1:
            raise UsageError(f"batch {batch}", hint="it is at least 1")
        self.batch = batch
        self._position = np.zeros(batch, np.int64)
        self._step_ids = np.zeros((batch, 1), np.int64)
        self._cache: Any = LigerCache(self._model.config)
        for layer, mixer in zip(cast(list[LigerLayer], self._cache.layers), self._mixers, strict=True):
            state = mixer.initial_state(batch, self._model.dtype, self._model.device, meter=self._meters)
            layer.advance(state, 0)
        # a longer chunk reads a table that is made for its length and does not stay
        graphs = {1, min(self.chunk, *(mixer.max_distance + 1 for mixer in self._mixers))} & {1, self.chunk}
        self._replay = Replay(self._call, self._cache.layers, graphs, self._model.device)
        self._begin()

    @property
    def eager(self) -> str | None:
        """Why calls are not replayed as CUDA graphs; None if they are."""
        return self._replay.eager

    def sibling(self, batch: int = 1) -> TorchSession:
        """Return a session for other sequences on the same loaded weights, which may run in another thread.

        Raises:
            UsageError: `batch` is out of range.
        """
        other = copy.copy(self)
        other._allocate(batch)
        return other

    @property
    def forgotten(self) -> np.ndarray | None:
        if not self._meters:
            return None
        states = [layer.state for layer in self._cache.layers]
        none = torch.zeros(self.batch)
        shares = [state[FORGOTTEN].mean(dim=(1, 2)).cpu() if FORGOTTEN in state else none for state in states]
        found: np.ndarray = torch.stack(shares, dim=1).numpy()
        return found

    @property
    def state_bytes(self) -> int:
        """Size of the state of all sequences, in bytes."""
        return sum(tensor.nbytes for _, tensor in self._tensors())

    def _tensors(self) -> list[tuple[StateTensor, Tensor]]:
        """Return the tensors of the cache beside their descriptions."""
        held = {
            f"past.{i}.{x}": tensor for i, layer in enumerate(self._cache.layers) for x, tensor in layer.state.items()
        }
        return [(tensor, held[tensor.past]) for tensor in self.artifact.manifest.state]

    @torch.inference_mode()
    def _advance(self, ids: np.ndarray) -> np.ndarray:
        for start in range(0, ids.shape[1], self.chunk):
            part = ids[:, start : start + self.chunk]
            output = self._replay(part, self._position[:, None] + np.arange(part.shape[1]))
            for layer in self._cache.layers:
                layer.seen = 0  # this class counts tokens, and fades sums, by rows
            self._position += part.shape[1]
        # pageable memory would take most of a step's time when many sequences advance
        logits = torch.empty(output.shape, dtype=output.dtype, pin_memory=output.is_cuda).copy_(output)
        found: np.ndarray = logits.numpy()
        return found

    def _call(self, ids: Tensor, position: Tensor) -> Tensor:
        """Advance the cache; return logits `[B, V]` in fp32."""
        arguments = {"position_ids": position, CACHE: self._cache, "use_cache": True, "logits_to_keep": 1}
        logits: Tensor = self._model(ids, **arguments).logits[:, -1].float()
        return logits

    @torch.inference_mode()
    def _forget(self, row: int | None) -> None:
        rows = self._rows(row)
        self._position[rows] = 0
        for described, tensor in self._tensors():
            tensor[rows] = described.fill

    @torch.inference_mode()
    def _copy(self, row: int | None) -> Snapshot:
        rows = self._rows(row)
        tensors = {described.past: _to_numpy(tensor[rows]) for described, tensor in self._tensors()}
        return Snapshot(self.artifact.manifest.fingerprint, self._position[rows].copy(), tensors)

    @torch.inference_mode()
    def _replace(self, snapshot: Snapshot, row: int | None) -> None:
        rows = self._rows(row)
        self._position[rows] = snapshot.position
        for described, tensor in self._tensors():
            given = torch.from_numpy(np.ascontiguousarray(snapshot.tensors[described.past]))
            tensor[rows] = given.view(tensor.dtype).to(tensor.device)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a copy; numpy has no bfloat16, so its bits are kept as uint16."""
    copied = tensor.clone().cpu()
    array: np.ndarray = (copied.view(torch.uint16) if copied.dtype == torch.bfloat16 else copied).numpy()
    return array


def _manifest(spec: ModelSpec, source: Any, dtype: str) -> Manifest:
    """Return the description of a session with weights and activations in a type."""
    state = []
    for layer, mixer in enumerate(spec.mixers):
        for x in mixer.state() if mixer is not None else ():
            kind = dtype if x.dtype == "activation" else x.dtype
            names = f"past.{layer}.{x.name}", f"present.{layer}.{x.name}"
            state.append(StateTensor(*names, ("B", *x.shape), kind, x.fill))
    weights = spec.shape.parameters * DTYPES[dtype].nbytes
    return Manifest(
        ligerexport=__version__, target="torch", lowering="torch", precision=dtype, source=source, family=spec.family,
        liger=spec.liger.to_dict(), model=spec.shape, graph=Graph("", CHUNK, (), ()), state=tuple(state),
        bytes=ByteCounts(weights, sum(tensor.nbytes for tensor in state), spec.kv_per_token), requires={},
        verification={}, slots=tuple(mixer.slots_per_head for mixer in spec.mixers if mixer is not None),
    )  # fmt: skip
