"""The torch model of a checkpoint in fp32, of which at most one layer is in memory.

All pieces of a text go through a layer before the next layer is read, so one pass over the weights is enough.
A piece sees earlier pieces through the cache, as usual. The embedding has only the rows of the
text's tokens, and the output is multiplied some rows at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ligerexport.artifact.artifact import Artifact
from ligerexport.checkpoint.checkpoint import check_checkpoint
from ligerexport.checkpoint.fidelity import compare, load_source, softmax_alone, source_outputs, text_for, weightless
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import VerificationError
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.onnx.weights import WeightStorage, stored_slabs, weight_slabs
from ligerexport.layers.mixer import CACHE, LigerCache, LigerLayer, read_config
from ligerexport.model.families import output_head
from ligerexport.model.state import FORGOTTEN
from ligerexport.threads import default_threads

State = dict[str, np.ndarray]

SHARE = 0.25
"""Largest share of the free memory that all weights together may take to stay in memory for later reads."""
UNKNOWN = 1 << 32
"""Bytes that are assumed to be free if the system does not report them."""


@dataclass(frozen=True)
class Answer:
    """The torch model's result of one call: its tokens, logits `[V]`, and the state by `past.*` names.

    `forgotten` `[layers]` is the same as in `Session`, for an artifact that returns it.

    `whole` is whether the state is complete. Otherwise it has only positions and scores of slots, and no cache. The
    cache holds torch's own state, to continue from.
    """

    ids: np.ndarray
    logits: np.ndarray
    state: State
    whole: bool
    cache: LigerCache | None = None
    forgotten: np.ndarray | None = None

    def after(self) -> LigerCache:
        """Return the cache after a whole answer; copy it before you continue from it."""
        assert self.cache is not None
        return self.cache


class Reference:
    """The torch model, with the weights that an artifact stores.

    The weights are compared with the checkpoint's when they are first read: each element must be the nearest value that
    its type, or the scale and zero point of its block, can represent, and no row may be far from the checkpoint's.

    Args:
        spec: The checkpoint.
        artifact: Artifact whose weights to take; None keeps the checkpoint's.
        storage: How the weights are stored.
        tolerance: Largest root mean square difference of a row to the checkpoint's, relative to the row's own.
    """

    def __init__(
        self,
        spec: ModelSpec,
        artifact: Artifact | None = None,
        storage: WeightStorage | None = None,
        tolerance: float = 0.0,
    ) -> None:
        self._spec, self._form, self._tolerance = spec, storage, tolerance
        self._stored = None if artifact is None else artifact.directory
        self._meters = artifact is not None and artifact.manifest.meters
        with weightless():  # what the model computes of its configuration is real
            self._model = AutoModelForCausalLM.from_config(read_config(spec.config), dtype=torch.float32).eval()
        self._read: set[str] = set()
        self._held: dict[str, Tensor] = {}
        self._holds = 4 * sum(prod(weight.shape) for weight in spec.weights.values()) <= SHARE * free_memory()

    def linear_maps(self) -> list[tuple[str, nn.Linear]]:
        """Return the linear maps of all layers with their names; their weights are there only while a layer runs."""
        layers = self._model.model.layers.named_modules(prefix="model.layers")
        return [(name, module) for name, module in layers if isinstance(module, nn.Linear)]

    def new_cache(self) -> LigerCache:
        """Return a cache that has seen nothing."""
        cache = LigerCache(self._model.config)
        for layer, entry in zip(self._model.model.layers, cache.layers, strict=True):
            if self._meters and isinstance(entry, LigerLayer):
                entry.advance(layer.self_attn.spec.initial_state(1, torch.float32, meter=True), 0)
        return cache

    def answers(
        self,
        pieces: list[np.ndarray],
        cache: LigerCache | None = None,
        *,
        whole: Container[int] | None = None,
        hidden: bool = False,
        advance: Callable[[float], None] = lambda amount: None,
    ) -> list[Answer]:
        """Run the pieces of a text, one call each.

        Args:
            pieces: Token ids `[T]`.
            cache: State to continue from, which is updated.
            whole: Pieces whose answers have the complete state and a cache; None means all.
            hidden: Whether answers also have the residual stream after each layer, as `past.LAYER.hidden` `[T, D]`.
            advance: Called with 1 after each layer.
        """
        states: list[State] = [{} for _ in pieces]
        caches = [self.new_cache() if whole is None or i in whole else None for i in range(len(pieces))]
        shares = np.zeros((len(pieces), len(self._spec.mixers)), np.float32)

        def keep(layer: int, piece: int, entry: Any, stream: Tensor) -> None:
            states[piece] |= {
                f"past.{layer}.{name}": x for name, x in _layer_state(entry, caches[piece] is not None).items()
            }
            if (copied := caches[piece]) is not None:
                copied.layers[layer] = copy.copy(entry)  # a call makes new tensors and leaves these as they are
            if self._meters and FORGOTTEN in (entry.state or {}):
                shares[piece, layer] = float(entry.state[FORGOTTEN].mean())
            if hidden:
                states[piece][f"past.{layer}.hidden"] = stream[0].numpy()

        streams = self._streams(pieces, cache, keep, advance)
        logits = self._logits(torch.cat([stream[:, -1] for stream in streams]))
        return [
            Answer(ids, logits[i], states[i], caches[i] is not None, caches[i], shares[i] if self._meters else None)
            for i, ids in enumerate(pieces)
        ]

    def every(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits after each token of a text `[T]`, `[T, V]`."""
        (stream,) = self._streams([ids], None, lambda *anything: None, lambda amount: None)
        return self._logits(stream[0])

    @torch.inference_mode()
    def layer_by_layer(self, texts: np.ndarray) -> Iterator[None]:
        """Run texts `[N, T]`, each from its beginning; yield after each layer."""
        (calls,), cache = self._calls([texts], self.new_cache()), self.new_cache()
        stream = calls[0][0]
        for i, layer in enumerate(self._model.model.layers):
            with self._loaded(f"model.layers.{i}"):
                stream = layer(stream, **calls[i][1] | {CACHE: cache})
            yield

    @torch.inference_mode()
    def _logits(self, streams: Tensor) -> np.ndarray:
        logits = np.empty((len(streams), self._spec.vocab_size), np.float32)
        with self._loaded("model.norm"):
            streams = self._model.model.norm(streams)
        first, head, empty = 0, output_head(self._model), self._model.lm_head.weight
        try:
            for rows in self._rows("model.embed_tokens.weight" if self._spec.tied else "lm_head.weight"):
                self._put("lm_head.weight", nn.Parameter(rows, requires_grad=False))
                logits[:, first : first + len(rows)] = head(streams).numpy()
                first += len(rows)
        finally:
            self._put("lm_head.weight", empty)
        return logits

    @torch.inference_mode()
    def _streams(
        self,
        pieces: list[np.ndarray],
        cache: LigerCache | None,
        keep: Callable[[int, int, Any, Tensor], None],
        advance: Callable[[float], None],
    ) -> list[Tensor]:
        """Run the layers one after the other; return the output of the last, `[1, T, D]` for each piece."""
        cache = self.new_cache() if cache is None else cache
        calls = self._calls(pieces, cache)
        streams = [layers[0][0] for layers in calls]
        for i, layer in enumerate(self._model.model.layers):
            with self._loaded(f"model.layers.{i}"):
                for piece, layers in enumerate(calls):
                    streams[piece] = layer(streams[piece], **layers[i][1] | {CACHE: cache})
                    keep(i, piece, cache.layers[i], streams[piece])
            advance(1)
        return streams

    def _calls(self, pieces: list[np.ndarray], cache: LigerCache) -> list[list[tuple[Tensor, dict[str, Any]]]]:
        """Return the arguments that the family's own model passes to each layer; only the first stream is real."""
        model, seen = self._model.model, self.new_cache()
        for i, entry in enumerate(seen.layers):
            _count(entry, cache.get_seq_length(i))
        calls: list[list[tuple[Tensor, dict[str, Any]]]] = []

        def note(entry: Any) -> Callable[..., Tensor]:
            def forward(stream: Tensor, **settings: Any) -> Tensor:
                calls[-1].append((stream, settings))
                _count(entry, stream.shape[1])
                return stream

            return forward

        for layer, entry in zip(model.layers, seen.layers, strict=True):
            layer.forward = note(entry)
        try:
            with self._loaded("model.embed_tokens", "model.norm", tokens=np.unique(np.concatenate(pieces))):
                for ids in pieces:
                    calls.append([])
                    model(torch.from_numpy(np.atleast_2d(ids)), **{CACHE: seen}, use_cache=True)
        finally:
            for layer in model.layers:
                del layer.forward
        return calls

    @contextmanager
    def _loaded(self, *names: str, tokens: np.ndarray | None = None) -> Iterator[None]:
        """Load the weights of modules and drop them at the end of the `with` block.

        Of the embedding, only the rows of `tokens` are loaded. Each core reads a weight, since numpy takes only one for
        what it decodes and compares.
        """
        empty = {
            f"{name}.{key}": parameter
            for name in names
            for key, parameter in self._model.get_submodule(name).named_parameters()
        }
        try:
            with ThreadPoolExecutor(default_threads()) as pool:
                wanted = [tokens if "embed_tokens" in name else None for name in empty]
                for name, weight in zip(empty, pool.map(self._weight, empty, wanted), strict=True):
                    self._put(name, nn.Parameter(weight, requires_grad=False))
            yield
        finally:
            for name, parameter in empty.items():
                self._put(name, parameter)

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, key = name.rpartition(".")
        setattr(self._model.get_submodule(owner), key, parameter)

    def _weight(self, name: str, wanted: np.ndarray | None = None) -> Tensor:
        """Return a weight, or only the rows `wanted` if the model is large: the other rows are never read."""
        if name in self._held:
            return self._held[name]
        again, first = name in self._read, 0
        weight = torch.empty(self._spec.weights[name].shape)
        for slab in self._slabs(name):
            part = weight[first : first + len(slab)]
            if wanted is None or self._holds:
                part[:] = torch.from_numpy(slab)
            else:
                rows = wanted[(first <= wanted) & (wanted < first + len(slab))] - first
                part[rows] = torch.from_numpy(slab[rows])
            first += len(slab)
        if again and self._holds:
            self._held[name] = weight
        return weight

    def _rows(self, name: str) -> Iterator[Tensor]:
        """Yield a weight, some rows at a time if the model is large."""
        if self._holds:
            yield self._weight(name)
        else:
            yield from map(torch.from_numpy, self._slabs(name))

    def _slabs(self, name: str) -> Iterator[np.ndarray]:
        """Yield rows of a weight as the artifact stores them, compared with the checkpoint's on first use."""
        own = weight_slabs(self._spec, name)
        if self._stored is None or self._form is None:
            yield from own
            self._read.add(name)
            return
        first = 0
        for stored, rounded in stored_slabs(self._spec, self._form, self._stored, name):
            if name not in self._read:
                theirs = next(own)
                self._compare(name, first, stored, theirs, rounded(theirs))
            first += len(stored)
            yield stored
        self._read.add(name)

    def _compare(self, name: str, first: int, stored: np.ndarray, own: np.ndarray, rounded: np.ndarray) -> None:
        assert self._form is not None
        stored, own, rounded = (x.reshape(len(x), -1) for x in (stored, own, rounded))
        precision, what = self._form.precision.dtype, None
        if not np.array_equal(stored, rounded):
            row = int((stored != rounded).any(axis=1).argmax())
            what = f"row {first + row} is not what storing it in {precision} gives"
        elif self._tolerance:
            size = np.maximum(np.linalg.norm(own, axis=1), np.finfo(np.float32).tiny)
            apart = np.nan_to_num(np.linalg.norm(stored - own, axis=1) / size, nan=np.inf)
            row = int(apart.argmax())
            if not apart[row] <= self._tolerance:
                what = (
                    f"row {first + row} is off by {apart[row]:.1e} of its size, at most {self._tolerance:.1e} was "
                    f"expected of {precision}"
                )
        if what is not None:
            raise VerificationError(
                f"{name} as it is stored is not the checkpoint's: {what}",
                hint="nothing was written; build with --weights fp32, and please report this with the model's name",
            )


def free_memory() -> int:
    """Return the bytes that this process may still take: the system's available memory, within a container's limit."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    free = int(found[1]) * 1024 if found else UNKNOWN
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def check_reading(spec: ModelSpec, progress: ProgressFactory = silent) -> None:
    """Check that the torch model of a checkpoint, with softmax alone, computes the same as transformers does.

    The graph is written from the same reading of the checkpoint, so both could otherwise be wrong in the same way.
    """
    reference = Reference(spec)
    model, streams = reference._model, list[Tensor]()
    ids = text_for(model)
    with progress("comparing with the Transformer", 2, "steps") as advance:
        expected = source_outputs(load_source(check_checkpoint(spec.path, tokenizer=False)), ids)
        advance(1)
        with softmax_alone(model):
            ((before, _), *_), *_ = reference._calls([ids.numpy()], reference.new_cache())
            reference._streams(
                [ids.numpy()], None, lambda layer, piece, entry, x: streams.append(x), lambda amount: None
            )
        logits = torch.from_numpy(reference._logits(streams[-1][0]))
        advance(1)
    found = [*(x[0] for x in (before, *streams)), logits]
    compare(expected, found, f"{spec.path} is not read as transformers reads it")


def _count(entry: Any, tokens: int) -> None:
    """Advance one layer of a cache by a number of tokens without storing their keys and values."""
    if isinstance(entry, LigerLayer):
        entry.seen += tokens
    elif tokens:
        column = torch.empty(1, 1, tokens, 1)
        entry.update(column, column)


def _layer_state(entry: Any, whole: bool) -> State:
    """Return a layer's state by the graph's names; without the keys of a softmax layer, because they are rotated."""
    tensors: dict[str, Tensor] = getattr(entry, "state", None) or {"value": entry.values}
    names = tensors.keys() - {FORGOTTEN} if whole else {"slot_position", "slot_score"} & tensors.keys()
    return {name: tensors[name].numpy() for name in names}
