"""Replay calls of a model on a GPU as CUDA graphs, because launching the kernels one by one takes longer than they run.

A graph reads its ids from a fixed buffer and updates the state in place, so one graph serves all calls with as many
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ligerexport.console import warn
from ligerexport.model.state import MixerState

Call = Callable[[Tensor, Tensor], Tensor]
"""Advances the state by ids `[B, T]` at positions `[B, T]` and returns logits `[B, V]` in fp32, all on the device."""


class Replay:
    """Calls a model: the second and later calls with a number of tokens in `lengths` are graphs.

    Args:
        call: The model.
        layers: Its layers, which hold the state as `LigerLayer` does. Whoever changes it changes it in place.
        lengths: Numbers of tokens.
        device: Where the model is.

    Attributes:
        eager: Why calls are not replayed; None if they are.
    """

    def __init__(self, call: Call, layers: Any, lengths: Collection[int], device: torch.device) -> None:
        self.eager: str | None = None if device.type == "cuda" else f"a {device.type} device has no CUDA graphs"
        self._call, self._layers, self._device = call, layers, device
        self._met: set[int] = set()
        self._lengths = lengths
        self._graphs: dict[int, tuple[Tensor, Callable[[], None], list[Tensor]]] = {}
        self._states: list[MixerState] = []

    def __call__(self, ids: np.ndarray, position: np.ndarray) -> Tensor:
        """Advance by ids `[B, T]` at positions `[B, T]`, int64; return logits `[B, V]`, until the next call."""
        given = torch.from_numpy(np.stack([ids, position]))
        tokens = ids.shape[1]
        if self.eager is None and tokens in self._met:
            if tokens not in self._graphs:
                self._capture(given)
            if tokens in self._graphs:
                inputs, replay, outputs = self._graphs[tokens]
                self._settle()
                inputs.copy_(given)
                replay()
                return outputs[0]
        if tokens in self._lengths:
            self._met.add(tokens)
        given = given.to(self._device)
        return self._call(given[0], given[1])

    def _capture(self, given: Tensor) -> None:
        """Make the graph of calls with as many tokens as `given` `[2, B, T]`; set `eager` if that is impossible."""
        inputs, outputs = given.to(self._device), list[Tensor]()
        self._states = self._states or [layer.state for layer in self._layers]
        self._settle()

        def run() -> None:
            outputs[:] = [self._call(inputs[0], inputs[1])]
            self._settle()

        before = [({name: x.clone() for name, x in layer.state.items()}, layer.seen) for layer in self._layers]
        try:
            warm_up(run)
            self._graphs[given.shape[2]] = inputs, capture(run), outputs
        except RuntimeError as error:
            self.eager = f"this model's calls cannot be captured: {str(error).splitlines()[0]}"
            warn(f"decoding is slower than it could be: {self.eager}")
        for layer, (state, seen) in zip(self._layers, before, strict=True):
            layer.state, layer.seen = state, seen
        self._settle()

    def _settle(self) -> None:
        """Move the state to the tensors that the graphs read and write."""
        for layer, kept in zip(self._layers, self._states, strict=True):
            if layer.state is not kept:
                for name, x in layer.state.items():
                    if x is not kept[name]:
                        kept[name].copy_(x)
                layer.state = kept


def warm_up(run: Callable[[], None]) -> None:
    """Call a function once on another stream, which compiles kernels and prepares libraries before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Return what replays the launches of a function."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    replay: Callable[[], None] = graph.replay
    return replay
