"""Describe a converted checkpoint, and the cost of a fit, from headers alone: no weight is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

from ligerexport.checkpoint.checkpoint import check_checkpoint
from ligerexport.model.config import LigerConfig


def describe_checkpoint(path: Path, config: LigerConfig) -> dict[str, Any]:
    """Return facts about a checkpoint under a conversion."""
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
        "heads": describe_heads(config) if config.heads else None,
        "exact_slots": round(mean(n for spec in converted for n in spec.slots_per_head)) if converted else 0,
        "state_bytes": state,
        "kv_cache_larger_from": state // saved + 1 if saved else None,
        "scores_explain": (info.config.get("liger_scores") or {}).get("explained"),
    }


def describe_heads(config: LigerConfig) -> str:
    """Return the sizes of the memories of KV heads, in words."""
    layers = [layer for layer, words in enumerate(config.heads) if words]
    heads = [head for layer in layers for head in config.for_layer(layer).for_heads()]
    slots = [sum(count for _, count in head.slots) for head in heads]
    return (
        f"a window of {mean(head.window for head in heads):.0f} and {mean(slots):.0f} scored slots on average; "
        f"{sum(map(bool, slots))} of {len(heads)} KV heads have scored slots"
    )


def describe_fit(path: Path, texts: list[Path], windows: int) -> dict[str, Any]:
    """Return the cost of fitting a learned score; empty if there is no text to fit on.

    Args:
        path: The model, which may not be fetched yet.
        texts: Text files.
        windows: Number of windows of text that the fit reads.
    """
    if not texts:
        return {}
    facts: dict[str, Any] = {"fit_text_bytes": sum(file.stat().st_size for file in texts)}
    if not path.is_dir():
        return facts | {"fit": f"{windows} windows, of {len(texts)} text files"}
    from ligerexport.checkpoint.calibrate import window_length

    info = check_checkpoint(path)
    length, weights = window_length(info.config), sum(math.prod(tensor.shape) for tensor in info.tensors.values())
    squares = 8 * info.config["num_hidden_layers"] * info.config["hidden_size"] ** 2
    return facts | {
        "fit": f"{windows} windows of {length:,} tokens, of {len(texts)} text files",
        "fit_tflop": round(2e-12 * weights * windows * length, 1),
        "fit_memory_bytes": 4 * weights + squares,
    }
