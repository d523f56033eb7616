"""The card that ends `convert` and `build`."""

from __future__ import annotations

from typing import Any

from ligerexport.cli import options
from ligerexport.console import card, format_bytes


def finish(json: bool, title: str, facts: dict[str, Any], next_command: str | None) -> None:
    """End with the card and, if wanted, JSON."""
    options.finish_json(json, facts)
    labels = {"path": "where", "weight_bytes": "weights"}
    rows = []
    for key, value in facts.items():
        if key == "kv_cache_larger_from":
            rows.append(options.crossover_row(value))
        elif value is not None:
            text = format_bytes(value) if key.endswith("bytes") else str(value)
            if key == "scores_explain":
                text = f"{value:.0%} of the variance"
            rows.append((labels.get(key, key.removesuffix("_bytes").replace("_", " ")), text))
    card(title, rows, next_command=next_command)
