"""Facts about a checkpoint, and the card of the verbs that make one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ligerexport.cli import options
from ligerexport.console import card, format_bytes
from ligerexport.model.config import LigerConfig


def check_output(output: Path, force: bool, marker: str) -> None:
    from ligerexport.staging import check_destination

    check_destination(output, force=force, marker=marker)


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


def describe(path: Path, config: LigerConfig) -> dict[str, Any]:
    """Return facts about a checkpoint under a conversion."""
    from ligerexport.checkpoint.checkpoint import check_checkpoint
    from ligerexport.layers.mixer import layer_specs, read_config

    info = check_checkpoint(path)
    hf: Any = read_config(info.config)
    hf.liger = config.to_dict()
    specs = layer_specs(hf)
    state = sum(tensor.nbytes() for spec in specs if spec for tensor in spec.state())
    converted = [spec for layer, spec in enumerate(specs) if spec and spec.config == config.for_layer(layer)]
    saved = sum(4 * spec.kv_heads * (spec.d_k + spec.d_v) for spec in specs if spec)
    return {
        "path": str(path),
        "weight_bytes": info.bytes,
        "layers": f"{len(converted)} of {len(specs)} converted",
        "exact_slots": round(sum(spec.config.num_slots for spec in converted) / max(1, len(converted))),
        "state_bytes": state,
        "kv_cache_larger_from": state // saved + 1 if saved else None,
        "scores_explain": (info.config.get("liger_scores") or {}).get("explained"),
    }
