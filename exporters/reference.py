"""The torch model of a checkpoint in fp32, with no more of it in memory than a layer.

All pieces of a text go through a layer before the next layer is read, so one pass over the weights does for them,
however large the model. What a piece sees of those before it is in the cache, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ligerexport.artifact import Artifact
from ligerexport.errors import VerificationError
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.onnx.weights import WeightFormat, matrix_slabs, weight_slabs
from ligerexport.families import output_head
from ligerexport.mixer import LigerCache, LigerLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

State = dict[str, np.ndarray]

HELD = 1 << 30
"""Bytes that all weights together may have to stay in memory once they are read a second time."""


@dataclass(frozen=True)
class Answer:
    """What torch says after one call: the tokens of the call, logits `[V]`, and the state by `past.*` names.

    `whole` is whether the state is complete; else only positions and scores of slots are there.
    """

    ids: np.ndarray
    logits: np.ndarray
    state: State
    whole: bool


class Reference:
    """The torch model, with the weights that an artifact stores where it rounds them.

    Stored weights are compared with the checkpoint's, row by row, when they are first read.

    Args:
        spec: The checkpoint.
        artifact: Whose weights to take; None keeps the checkpoint's.
        form: How they are stored.
        tolerance: Largest root mean square difference of a row to the checkpoint's, relative to the row's own.
    """

    def __init__(
        self,
        spec: ModelSpec,
        artifact: Artifact | None = None,
        form: WeightFormat | None = None,
        tolerance: float = 0.0,
    ) -> None:
        self._spec, self._form, self._tolerance = spec, form, tolerance
        self._stored = None if artifact is None else artifact.directory
        self._model = _empty_model(spec)
        self._read: set[str] = set()
        self._held: dict[str, Tensor] = {}
        self._holds = 4 * sum(prod(weight.shape) for weight in spec.weights.values()) <= HELD

    def new_cache(self) -> LigerCache:
        """Return a cache that has seen nothing."""
        return LigerCache(self._model.config)

    def answers(
        self,
        pieces: list[np.ndarray],
        cache: LigerCache | None = None,
        *,
        whole: Container[int] | None = None,
        hidden: bool = False,
        advance: Callable[[float], None] = lambda amount: None,
    ) -> list[Answer]:
        """Run the pieces of a text, a call each.

        Args:
            pieces: Token ids `[T]`.
            cache: What to go on from, and to leave the state in.
            whole: Pieces whose answers have the complete state; None is all.
            hidden: Whether answers also have the residual stream after each layer, as `past.LAYER.hidden` `[T, D]`.
            advance: Told 1 after each layer.

        Raises:
            VerificationError: A stored row differs from the checkpoint's by more than the tolerance.
        """
        states: list[State] = [{} for _ in pieces]

        def keep(layer: int, piece: int, entry: Any, stream: Tensor) -> None:
            complete = whole is None or piece in whole
            states[piece] |= {f"past.{layer}.{name}": x for name, x in _layer_state(entry, complete).items()}
            if hidden:
                states[piece][f"past.{layer}.hidden"] = stream[0].numpy()

        streams = self._streams(pieces, cache, keep, advance)
        logits = self._logits(torch.cat([stream[:, -1] for stream in streams]))
        return [Answer(ids, logits[i], states[i], whole is None or i in whole) for i, ids in enumerate(pieces)]

    def every(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits after each token of a text `[T]`, `[T, V]`."""
        (stream,) = self._streams([ids], None, lambda *anything: None, lambda amount: None)
        return self._logits(stream[0])

    @torch.inference_mode()
    def _logits(self, streams: Tensor) -> np.ndarray:
        with self._loaded("model.norm", "lm_head"):
            return output_head(self._model)(self._model.model.norm(streams)).numpy()

    @torch.inference_mode()
    def _streams(
        self,
        pieces: list[np.ndarray],
        cache: LigerCache | None,
        keep: Callable[[int, int, Any, Tensor], None],
        advance: Callable[[float], None],
    ) -> list[Tensor]:
        """Run the layers one after the other; return what comes out of the last, `[1, T, D]` for each piece."""
        cache = self.new_cache() if cache is None else cache
        calls = self._calls(pieces, cache)
        streams = [layers[0][0] for layers in calls]
        for i, layer in enumerate(self._model.model.layers):
            with self._loaded(f"model.layers.{i}"):
                for piece, layers in enumerate(calls):
                    streams[piece] = layer(streams[piece], **layers[i][1] | {"past_key_values": cache})
                    keep(i, piece, cache.layers[i], streams[piece])
            advance(1)
        return streams

    def _calls(self, pieces: list[np.ndarray], cache: LigerCache) -> list[list[tuple[Tensor, dict[str, Any]]]]:
        """Return what the family's own model calls each layer with for each piece; only the first stream is real."""
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
            with self._loaded("model.embed_tokens", "model.norm"):
                for ids in pieces:
                    calls.append([])
                    model(torch.from_numpy(ids)[None], past_key_values=seen, use_cache=True)
        finally:
            for layer in model.layers:
                del layer.forward
        return calls

    @contextmanager
    def _loaded(self, *names: str) -> Iterator[None]:
        """Give modules their weights for the length of a block."""
        empty = {
            f"{name}.{key}": parameter
            for name in names
            for key, parameter in self._model.get_submodule(name).named_parameters()
        }
        try:
            for name in empty:
                self._put(name, nn.Parameter(self._weight(name), requires_grad=False))
            yield
        finally:
            for name, parameter in empty.items():
                self._put(name, parameter)

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, key = name.rpartition(".")
        setattr(self._model.get_submodule(owner), key, parameter)

    def _weight(self, name: str) -> Tensor:
        if name == "lm_head.weight" and self._spec.tied:
            name = "model.embed_tokens.weight"
        if name in self._held:
            return self._held[name]
        weight = torch.empty(self._spec.weights[name].shape)
        start = 0
        for slab in self._slabs(name):
            weight[start : start + len(slab)] = torch.from_numpy(slab)
            start += len(slab)
        if name in self._read and self._holds:
            self._held[name] = weight
        self._read.add(name)
        return weight

    def _slabs(self, name: str) -> Iterator[np.ndarray]:
        """Yield rows of a weight as the artifact stores them, compared with the checkpoint's when they are new."""
        own = weight_slabs(self._spec, name)
        if self._stored is None or self._form is None or self._form.bits(self._spec, name) == 32:
            yield from own
            return
        stored = matrix_slabs(self._spec, self._form, self._stored, name)
        if name in self._read:
            yield from stored
            return
        first = 0
        for ours, theirs in zip(stored, own, strict=True):
            self._compare(name, first, ours, theirs)
            first += len(ours)
            yield ours

    def _compare(self, name: str, first: int, stored: np.ndarray, own: np.ndarray) -> None:
        size = np.maximum(np.linalg.norm(own, axis=1), np.finfo(np.float32).tiny)
        apart = np.nan_to_num(np.linalg.norm(stored - own, axis=1) / size, nan=np.inf)
        row = int(apart.argmax())
        if not apart[row] <= self._tolerance:
            assert self._form is not None
            raise VerificationError(
                f"{name} as it is stored is not the checkpoint's: row {first + row} is off by {apart[row]:.1e} of its "
                f"size, at most {self._tolerance:.1e} was expected of {self._form.precision.dtype}",
                hint="nothing was written; build with --weights fp32, and please report this with the model's name",
            )


def _empty_model(spec: ModelSpec) -> PreTrainedModel:
    """Return the model without the memory of its weights; what it computes of its configuration is real."""
    from transformers import AutoModelForCausalLM

    from ligerexport.mixer import read_config

    def empty(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(empty)
    try:
        return AutoModelForCausalLM.from_config(read_config(spec.config), dtype=torch.float32).eval()
    finally:
        hook.remove()


def _count(entry: Any, tokens: int) -> None:
    """Let a layer of a cache have seen more tokens, of which it need not know anything."""
    if isinstance(entry, LigerLayer):
        entry.seen += tokens
    elif tokens:
        column = torch.empty(1, 1, tokens, 1)
        entry.update(column, column)


def _layer_state(entry: Any, whole: bool) -> State:
    """Copy the state of a layer by the graph's names; of one kept as softmax the values: the keys are rotated."""
    tensors: dict[str, Tensor] = getattr(entry, "state", None) or {"value": entry.values}
    names = tensors if whole else {"slot_position", "slot_score"} & tensors.keys()
    return {name: tensors[name].numpy().copy() for name in names}
