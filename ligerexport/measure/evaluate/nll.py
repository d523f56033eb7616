"""Measure held-out loss by position and agreement with a teacher, for several models in one pass over the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from ligerexport.measure.evaluate.estimate import Estimate, Table
from ligerexport.measure.opened import Opened, chunk_size

FIRST_EDGE = 64


def position_bins(length: int) -> list[tuple[int, int]]:
    """Return bins of positions, each ending at twice the end of the one before: 0-64, 64-128, ... up to `length`."""
    edges, edge = [0], FIRST_EDGE
    while edge < length:
        edges.append(edge)
        edge *= 2
    return list(pairwise([*edges, length]))


def by_position(
    scorers: Mapping[str, Opened],
    windows: Tensor,
    *,
    teacher: str | None = None,
    batch: int = 1,
    advance: Callable[[float], None] = lambda amount: None,
) -> dict[str, Table]:
    """Measure models on the same windows.

    Args:
        scorers: Models by name.
        windows: Token ids `[n, T]`.
        teacher: Name of the model that the others are compared with; None compares nothing.
        batch: Number of windows at a time.
        advance: Called with the number of tokens read by each model.

    Returns:
        For each model `nll` in nats per token. With a teacher, also for the others `top1`, the share of positions with
        the teacher's first choice, and `kl`, KL(teacher || model) in nats per token. Columns are bins of the predicted
        position, and `mean`. Standard errors are over windows.
    """
    names = list(scorers) if teacher is None else [teacher, *(name for name in scorers if name != teacher)]
    chunk = chunk_size(batch, max(scorer.vocab_size for scorer in scorers.values()))
    rows: dict[str, dict[str, list[Tensor]]] = {name: {} for name in names}
    for ids in windows.split(batch):
        parts: dict[str, dict[str, list[Tensor]]] = {name: {} for name in names}
        streams = [scorers[name].logits(ids[:, :-1], chunk) for name in names]
        for start, chunks in zip(range(0, ids.shape[1] - 1, chunk), zip(*streams, strict=True), strict=True):
            expected = None
            for name, logits in zip(names, chunks, strict=True):
                log_p = logits.log_softmax(dim=-1)
                target = ids[:, start + 1 : start + chunk + 1].to(log_p.device)
                measured = {"nll": -log_p.gather(2, target[..., None])[..., 0]}
                if name == teacher:
                    expected = log_p
                elif expected is not None:
                    measured |= compare(expected.to(log_p.device), log_p)
                for key, value in measured.items():
                    parts[name].setdefault(key, []).append(value.double().cpu())
            advance(target.numel() * len(names))
        for name, measures in parts.items():
            for key, values in measures.items():
                rows[name].setdefault(key, []).append(torch.cat(values, dim=1))
    return {
        name: {key: _bins(torch.cat(values), windows.shape[1]) for key, values in measures.items()}
        for name, measures in rows.items()
    }


def compare(expected: Tensor, found: Tensor) -> dict[str, Tensor]:
    """Return agreement and divergence `[B, t]` from log probabilities `[B, t, V]`."""
    return {
        "top1": (expected.argmax(dim=-1) == found.argmax(dim=-1)).double(),
        "kl": torch.nn.functional.kl_div(found, expected, reduction="none", log_target=True).sum(dim=-1),
    }


def _bins(values: Tensor, length: int) -> dict[str, Estimate]:
    """Average values `[n, T - 1]`, whose column p - 1 belongs to position p, over bins of p and then over windows."""
    means = {f"{a}-{b}": values[:, max(a - 1, 0) : b - 1].mean(dim=1) for a, b in position_bins(length)}
    means["mean"] = values.mean(dim=1)
    return {name: Estimate.of(mean.tolist()) for name, mean in means.items()}
