"""The fit of `recall`: a score and the cost of sizes of memory for each KV head, from texts that a Transformer repeats.

First a linear map of what enters the attention of a layer is fitted to the largest attention that a token gets while
the text is repeated: the score of slots. Then the cost of every size is measured in each head, on prose and on
repetitions. `ligerexport.checkpoint.sizes` shares out bytes by it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ligerexport.checkpoint.calibrate import FIRST, Costs, Fit, Sums, score_names
from ligerexport.checkpoint.costs import text_costs, weigh
from ligerexport.checkpoint.passages import Reader, Reading
from ligerexport.checkpoint.watch import attention, watched
from ligerexport.console import ProgressFactory, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROSE = 0.3
"""Share of prose in the cost of a memory; the rest is repeating."""
_FLOOR = 1e-3
"""Added to the attention before its logarithm."""
_RIDGE = 1e-4
"""Added to the diagonal of the normal equations, relative to its mean."""


@dataclass(frozen=True)
class Effort:
    """How much a fit reads.

    Attributes:
        repeated: Number of texts that are read and repeated for the score.
        tokens: Tokens of each of them.
        prose: Number of texts for the cost on prose.
        prose_tokens: Tokens of each of them.
        asked: Number of texts that are read and repeated for the cost on repeating.
        asked_tokens: Tokens of each of them.
    """

    repeated: int
    tokens: int
    prose: int
    prose_tokens: int
    asked: int
    asked_tokens: int

    @property
    def texts(self) -> int:
        """Number of all texts."""
        return self.repeated + self.prose + self.asked

    @property
    def read(self) -> int:
        """Number of tokens that the Transformer reads, about."""
        return 2 * self.repeated * self.tokens + self.prose * self.prose_tokens + 2 * self.asked * self.asked_tokens

    @property
    def passes(self) -> int:
        """Number of tokens times passes over them, about: a gradient costs two passes more than reading."""
        return 2 * self.repeated * self.tokens + 3 * (self.read - 2 * self.repeated * self.tokens)


FULL = Effort(repeated=48, tokens=1600, prose=9, prose_tokens=4800, asked=3, asked_tokens=2600)
"""For a GPU."""
SHORT = Effort(repeated=16, tokens=900, prose=2, prose_tokens=1600, asked=2, asked_tokens=1100)
"""For a CPU: minutes for a model of 135M parameters."""


class Sized(NamedTuple):
    """The result of a fit.

    Attributes:
        fit: The scores.
        costs: Cost of every size in each KV head, to three digits.
        tokens: Number of tokens that were read.
    """

    fit: Fit
    costs: Costs
    tokens: int


def fit_memory(
    model: PreTrainedModel,
    reader: Reader,
    layers: Collection[int],
    *,
    sinks: int,
    effort: Effort,
    progress: ProgressFactory | None = None,
) -> Sized:
    """Fit scores and measure what sizes of memory cost.

    Args:
        model: The untouched Transformer, of a family in `FAMILIES`, in evaluation mode.
        reader: Source of texts.
        layers: Layers that are converted.
        sinks: Number of first tokens that every memory has.
        effort: How much is read.
        progress: Reports the texts; silent by default.
    """
    model.requires_grad_(False)
    progress = progress or silent
    with progress("fitting the scores", effort.repeated, "steps") as advance:
        sums = {layer: Sums() for layer in layers}
        tokens = 0
        for _ in range(effort.repeated):
            reading = reader.read(effort.tokens, repeat=True)
            _add(model, reading, sums)
            tokens += len(reading.ids)
            advance(1)
        fit = _solve(sums)
    maps = {}
    for layer in layers:
        weight, bias = score_names(layer)
        maps[layer] = fit.tensors[weight].to(model.device), fit.tensors[bias].to(model.device)
    kinds = [(PROSE, effort.prose, effort.prose_tokens, False), (1 - PROSE, effort.asked, effort.asked_tokens, True)]
    found = []
    with progress("measuring sizes of memory", effort.prose + effort.asked, "steps") as advance:
        for share, count, length, repeat in kinds:
            costs: dict[int, Tensor] = {}
            for _ in range(count):
                reading = reader.read(length, repeat=repeat)
                for layer, cost in text_costs(model, torch.tensor(reading.ids), reading.first, maps, sinks).items():
                    costs[layer] = costs[layer] + cost if layer in costs else cost
                tokens += len(reading.ids)
                advance(1)
            found.append((share, costs))
    weighed = {layer: cost.tolist() for layer, cost in weigh(found).items()}
    rounded = {layer: [[float(f"{x:.3g}") for x in head] for head in heads] for layer, heads in weighed.items()}
    return Sized(fit, rounded, tokens)


@torch.no_grad()
def _add(model: PreTrainedModel, reading: Reading, sums: dict[int, Sums]) -> None:
    """Add a text to the normal equations of each layer."""

    def attend(
        layer: int, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, sliding_window: int | None
    ) -> Tensor:
        peak = query.new_zeros(key.shape[1], reading.context, dtype=torch.float32)

        def seen(first: int, weights: Tensor) -> None:
            rows = weights[0, :, :, max(0, reading.first - first) :, : reading.context]
            if rows.shape[2]:
                torch.maximum(peak, rows.amax((1, 2)), out=peak)

        output = attention(query, key, value, sliding_window, seen)
        if layer in sums:
            part = slice(FIRST, reading.context)
            sums[layer].add(hidden[0, part].double(), (peak[:, part] + _FLOOR).log().T.double())
        return output

    decoder: Any = model.model
    with watched(model, attend):
        decoder(input_ids=torch.tensor([reading.ids], device=model.device), use_cache=False)


def _solve(sums: dict[int, Sums]) -> Fit:
    tensors: dict[str, Tensor] = {}
    explained = []
    for layer, found in sums.items():
        weight, bias, share = found.solve(_RIDGE)
        tensors |= dict(zip(score_names(layer), (weight, bias), strict=True))
        explained.append(share)
    return Fit(tensors, explained)
