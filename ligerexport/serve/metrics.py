"""What `/metrics` says in the format of Prometheus: requests, times between tokens, and what the engines count."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from ligerexport.serve.answers import Piece
    from ligerexport.serve.engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_NOW = ("running", "reading", "waiting", "states")
"""Beginnings of the names of an engine's figures that go up and down; the others only grow."""


class Metrics:
    """The figures of one server.

    Args:
        engines: The engine of each model.
    """

    def __init__(self, engines: dict[str, Engine]) -> None:
        self._engines, self._registry = engines, CollectorRegistry()
        self.requests = Counter("ligerexport_requests", "Requests by path and status.", ["path", "status"],
                                registry=self._registry)  # fmt: skip
        self._first = Histogram("ligerexport_first_token_seconds", "Time from a request's start to its first token.",
                                ["model"], buckets=_SECONDS, registry=self._registry)  # fmt: skip
        self._next = Histogram("ligerexport_next_token_seconds", "Time between two tokens of one response.", ["model"],
                               buckets=_SECONDS, registry=self._registry)  # fmt: skip
        self._registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Metric]:
        """Yield what each engine counts."""
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for model, engine in self._engines.items():
            for name, value in engine.stats().items():
                kind = GaugeMetricFamily if name.startswith(_NOW) else CounterMetricFamily
                said = f"{name.replace('_', ' ').capitalize()}, as the engine of a model counts."
                family = families.setdefault(name, kind(f"ligerexport_{name}", said, labels=["model"]))
                family.add_metric([model], value)
        yield from families.values()

    def timer(self, model: str) -> Callable[[Piece], None]:
        """Return a function to call with each piece of a response that starts now."""
        last = time.perf_counter()
        histogram = self._first

        def record(piece: Piece) -> None:
            nonlocal last, histogram
            if piece.events and not piece.events[0].prompt:
                now = time.perf_counter()
                histogram.labels(model).observe(now - last)
                last, histogram = now, self._next

        return record

    def text(self) -> bytes:
        """Return the page."""
        return generate_latest(self._registry)
