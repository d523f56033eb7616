"""A measured number with its standard error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True)
class Estimate:
    """A mean over independent samples.

    Attributes:
        mean: The mean.
        stderr: Standard error of the mean; None for a single sample.
        count: Number of samples: windows, prompts or questions.
    """

    mean: float
    stderr: float | None
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Estimate:
        """Return mean and standard error of samples."""
        count = len(samples)
        mean = sum(samples) / count
        if count < 2:
            return cls(mean, None, count)
        variance = sum((x - mean) ** 2 for x in samples) / (count - 1)
        return cls(mean, sqrt(variance / count), count)

    @classmethod
    def closed(cls, gaps: Sequence[float], whole: Sequence[float]) -> Estimate | None:
        """Return the share of a gap that is closed, 1 - mean(gaps) / mean(whole); None if there is no gap.

        The standard error is that of a ratio of paired samples to first order.
        """
        count, total = len(whole), sum(whole)
        if total <= 0:
            return None
        share = sum(gaps) / total
        rest = cls.of([gap - share * one for gap, one in zip(gaps, whole, strict=True)])
        return cls(1 - share, rest.stderr and rest.stderr * count / total, count)


Table = dict[str, dict[str, Estimate]]
"""Estimates by measurement, then by column (bin of positions, distance, metric of a task)."""
