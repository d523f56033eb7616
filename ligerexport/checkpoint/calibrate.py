"""The learned score: a linear map of a layer's attention input, fitted on what the Transformer later attends to.

This module has the fit, the text for it, and the file format of scores. `ligerexport.checkpoint.scores` chooses the
scores of a conversion and writes them into its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ligerexport.checkpoint.checkpoint import read_header
from ligerexport.checkpoint.fitted import score_names as score_names
from ligerexport.checkpoint.fitted import score_shapes as score_shapes
from ligerexport.checkpoint.watch import attention, watched
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import CheckpointError, UsageError
from ligerexport.text.tokenizer import TextModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 2048
"""Tokens of a window, if the model's trained context is long enough."""
SHORTEST = 512
"""Smallest number of tokens with room for facts and, later, questions."""
FIRST = 8
"""Tokens at the start that a fit leaves out: sinks are always kept, and would dominate the squared error."""

_METADATA, _COSTS = "liger_scores", "liger_costs"

Costs = dict[int, list[list[float]]]
"""Costs `[H_kv][options]` by layer, in the order of `ligerexport.checkpoint.shares.OPTIONS`."""

# Statement, question and answer. None may resemble what `ligerexport.evaluate` asks for.
_FACTS = (
    (" The phone extension of {name} is {number}.",
     " What is the phone extension of {name}? The phone extension of {name} is", " {number}."),
    (" The code of the {thing} is {number}.", " Which code opens the {thing}? The code of the {thing} is",
     " {number}."),
    (" {name} moved to {city}.", " Where did {name} move? {name} moved to", " {city}."),
    (" The {thing} in {city} belongs to {name}.",
     " To whom does the {thing} in {city} belong? The {thing} in {city} belongs to", " {name}."),
    (" {name}'s account number is {number}, as the clerk noted.", " The account number of {name} is", " {number}."),
)  # fmt: skip
_NAMES = (
    "Adam", "Bella", "Carlos", "Diana", "Edgar", "Fiona", "Gavin", "Hazel", "Igor", "Julia", "Kevin", "Lydia",
    "Miguel", "Norah", "Omar", "Paula", "Quinn", "Rosa", "Simon", "Tessa",
)  # fmt: skip
_CITIES = (
    "Lisbon", "Nairobi", "Toronto", "Oslo", "Cairo", "Madrid", "Seoul", "Lima", "Dublin", "Vienna", "Havana", "Quito",
)  # fmt: skip
_THINGS = ("safe", "locker", "garage", "archive", "printer", "boat", "server", "gate")
_MOST_FACTS = 6
_LEAST_DISTANCE = 150


def window_length(config: Mapping[str, Any]) -> int:
    """Return how many tokens a window has for a model with this config.json."""
    return min(LENGTH, config.get("max_position_embeddings") or LENGTH)


class Fit(NamedTuple):
    """The result of `fit_scores`.

    Attributes:
        tensors: Weight `[H_kv, hidden]` and bias `[H_kv]` of each layer, fp32 on the CPU, by their names in a
            checkpoint.
        explained: Share of the variance that the map explains, for each layer as the mean over heads.
    """

    tensors: dict[str, Tensor]
    explained: list[float]


class Scores(NamedTuple):
    """Learned scores and their origin.

    Attributes:
        tensors: Weights and biases, by their names in a checkpoint.
        facts: `from`, `windows`, `tokens`, `seed`, `explained` and `sha256`; None for each that is not known.
        costs: What each size of memory costs in each KV head, from a fit of `recall`; None after another fit.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    costs: Costs | None = None


def fit_scores(
    model: PreTrainedModel,
    windows: Tensor,
    window: int,
    *,
    batch: int = 1,
    ridge: float = 1e-4,
    floor: float = 1e-3,
    progress: ProgressFactory | None = None,
) -> Fit:
    """Fit a linear map from the hidden state to the logarithm of the largest attention weight that a token gets later.

    The maximum is over the query heads of the group and over queries more than `window` tokens later. Least squares
    uses the normal equations in fp64, whose size does not depend on the number of windows. Tokens in the last quarter
    of a window are left out, because too little text follows them.

    Args:
        model: The untouched Transformer, of a family in `FAMILIES`, in evaluation mode.
        windows: Token ids `[N, T]`.
        window: Tokens that the conversion keeps exactly.
        batch: Number of windows at a time.
        ridge: Value added to the diagonal, relative to its mean; it does not apply to the bias.
        floor: Value added to the weights before the logarithm.

    Raises:
        UsageError: The windows are too short to look beyond `window`.
    """
    count, length = windows.shape
    end = length - length // 4
    if end <= max(window, FIRST) + 1:
        raise UsageError(
            f"windows of {length} tokens are too short to fit a score for a window of {window}",
            hint="give the conversion a smaller --window",
        )
    decoder: Any = model.model
    sums = [Sums() for _ in decoder.layers]

    def attend(
        layer: int, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, sliding_window: int | None
    ) -> Tensor:
        peak = key.new_zeros(key.shape[:3], dtype=torch.float32)
        place = torch.arange(length, device=key.device)

        def seen(first: int, weights: Tensor) -> None:
            rows, last = weights.shape[-2:]
            far = max(0, first - window)  # first key that is near
            distance = place[first : first + rows, None] - place[far:last]
            weights[..., far:].masked_fill_(distance <= window, 0.0)
            peak[..., :last] = torch.maximum(peak[..., :last], weights.amax((2, 3)))

        output = attention(query, key, value, sliding_window, seen)
        part = slice(FIRST, end)
        target = (peak.transpose(1, 2) + floor).log()
        sums[layer].add(hidden[:, part].flatten(0, 1).double(), target[:, part].flatten(0, 1).double())
        return output

    with (
        torch.no_grad(),
        watched(model, attend),
        (progress or silent)("fitting the scores", count, "steps") as advance,
    ):
        for ids in windows.split(batch):
            decoder(input_ids=ids.to(model.device), use_cache=False)
            advance(len(ids))
        tensors: dict[str, Tensor] = {}
        explained = []
        for layer, found in enumerate(sums):
            weight, bias, share = found.solve(ridge)
            tensors |= dict(zip(score_names(layer), (weight, bias), strict=True))
            explained.append(share)
    return Fit(tensors, explained)


class Sums:
    """The normal equations of one layer."""

    def __init__(self) -> None:
        self.count = 0
        self.x: Tensor | float = 0.0
        self.y: Tensor | float = 0.0
        self.xx: Tensor | float = 0.0
        self.xy: Tensor | float = 0.0
        self.yy: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens: hidden states `[n, hidden]`, targets `[n, H_kv]`."""
        self.count += len(x)
        self.x, self.y = self.x + x.sum(0), self.y + y.sum(0)
        self.xx, self.xy, self.yy = self.xx + x.T @ x, self.xy + x.T @ y, self.yy + y.square().sum(0)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor, float]:
        """Return weight, bias, and the mean share of the variance that they explain."""
        x, y = torch.as_tensor(self.x) / self.count, torch.as_tensor(self.y) / self.count
        xx = self.xx / self.count - x[:, None] * x  # the covariance
        xy = self.xy / self.count - x[:, None] * y
        variance = self.yy / self.count - y.square()
        weight = torch.linalg.solve(xx + ridge * xx.diagonal().mean() * torch.eye(len(x)).to(xx), xy)
        error = variance - 2 * (weight * xy).sum(0) + (weight * (xx @ weight)).sum(0)
        share = torch.where(variance > 1e-12, 1 - error / variance.clamp_min(1e-12), 0.0)
        return weight.T.float().contiguous().cpu(), (y - x @ weight).float().cpu(), share.mean().item()


def drills(text: TextModel, ids: Sequence[int], count: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Return windows of a text `[count, length]`. Every second window states facts and, at least 150 tokens later,
    asks for them and answers.

    Args:
        text: The tokenizer.
        ids: Tokens of the text.
        count: Number of windows.
        length: Tokens of a window.
        seed: Seed for the places in the text and for the facts.

    Raises:
        UsageError: The text or the windows are too short.
    """
    prefix = text.encode("")  # the tokens that begin every text of this model
    body = length - len(prefix)
    if length < SHORTEST:
        raise UsageError(
            f"windows of {length} tokens have no room for facts and questions, which need {SHORTEST}",
            hint="take a score that needs no fit, such as --preset memory",
        )
    if len(ids) <= body:
        raise UsageError(f"the text has {len(ids):,} tokens, one window has {length:,}", hint="give more text")
    rng = random.Random(seed)
    windows = []
    for i in range(count):
        facts = list(_facts(text, rng, body // 4)) if i % 2 else []
        rest = body - sum(len(stated) + len(asked) for stated, asked in facts)
        start = rng.randrange(len(ids) - rest)
        events = []
        for stated, asked in facts:
            at = rng.randrange(rest // 32, min(rest - _LEAST_DISTANCE, rest * 3 // 5))
            events += [(at, stated), (rng.randint(at + _LEAST_DISTANCE, rest), asked)]
        row, done = list(prefix), 0
        for at, piece in sorted(events, key=lambda event: event[0]):
            row += [*ids[start + done : start + at], *piece]
            done = at
        windows.append(row + list(ids[start + done : start + rest]))
    return torch.tensor(windows)


def _facts(text: TextModel, rng: random.Random, room: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield facts and their questions as tokens, each fact once, while they fit into `room` tokens."""
    asked_for: set[str] = set()
    while len(asked_for) < _MOST_FACTS:
        words = {
            "name": rng.choice(_NAMES), "city": rng.choice(_CITIES), "thing": rng.choice(_THINGS),
            "number": "".join(rng.choices("0123456789", k=rng.randint(3, 6))),
        }  # fmt: skip
        statement, question, answer = (part.format(**words) for part in rng.choice(_FACTS))
        if question in asked_for:
            continue
        asked_for.add(question)
        stated, asked = text.encode(statement, special=False), text.encode(question + answer, special=False)
        room -= len(stated) + len(asked)
        if room < 0:
            return
        yield stated, asked


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of scores in hexadecimal, which does not depend on their file."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].float().contiguous().numpy().tobytes())
    return found.hexdigest()


def write_scores(file: Path, scores: Scores) -> None:
    """Write scores as a safetensors file that `read_scores` reads."""
    from safetensors.torch import save_file

    metadata = {"format": "pt", _METADATA: json.dumps(scores.facts)}
    if scores.costs:
        metadata[_COSTS] = json.dumps(scores.costs)
    save_file(scores.tensors, file, metadata=metadata)
    file.chmod(0o644)  # safetensors writes 0600


def read_scores(file: Path, shapes: Mapping[str, tuple[int, ...]], origin: str) -> Scores:
    """Read scores that were fitted earlier from a file, such as the last shard of a converted checkpoint.

    Args:
        file: Safetensors file, which may have more tensors than are needed.
        shapes: Names and shapes of the tensors that are needed.
        origin: Value of `from` in the facts.

    Raises:
        UsageError: The file does not exist.
        CheckpointError: The file is damaged, or its scores were fitted for another model.
    """
    if not file.is_file():
        raise UsageError(f"no file {file}", hint="give a safetensors file of scores, or text: --calibrate TEXT")
    found = read_header(file)
    for name, shape in shapes.items():
        if name not in found or found[name].shape != shape:
            there = f"is {list(found[name].shape)}" if name in found else "is missing"
            raise CheckpointError(
                f"{name} {there} in {file}, this model needs {list(shape)}",
                hint="these scores are another model's; fit new ones: --calibrate TEXT",
            )
    with safe_open(file, "pt") as content:
        metadata = content.metadata() or {}
    said, costs = (json.loads(metadata.get(name, "{}")) for name in (_METADATA, _COSTS))
    tensors = load_scores((file,), shapes)
    keys = ("windows", "tokens", "seed", "explained")
    facts = {"from": origin} | {key: said.get(key) for key in keys} | {"sha256": digest(tensors)}
    return Scores(tensors, facts, {int(layer): heads for layer, heads in costs.items()} or None)


def load_scores(files: Iterable[Path], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the named tensors in fp32 from the files that hold them.

    Raises:
        CheckpointError: A value is not finite.
    """
    wanted, tensors = set(names), {}
    for file in files:
        with safe_open(file, "pt") as content:
            for name in sorted(wanted & set(content.keys())):
                tensors[name] = content.get_tensor(name).float()
                if not tensors[name].isfinite().all():
                    raise CheckpointError(f"{name} in {file} has values that are not finite", hint="fit it again")
    return tensors
