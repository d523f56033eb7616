"""The weights that a fit adds to a checkpoint: maps that score tokens, and maps that choose their cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ligerexport.model.config import LigerConfig

FITTED = ("score_proj", "cell_proj")
"""Names of the maps in a mixer; both stay in fp32."""


def is_fitted(name: str) -> bool:
    """Return whether a weight of a checkpoint comes from a fit and not from the Transformer."""
    return any(f".{part}." in name for part in FITTED)


def score_names(layer: int, part: str = "score_proj") -> tuple[str, str]:
    """Return the names of the weight and the bias of a layer's map in a checkpoint."""
    return f"model.layers.{layer}.self_attn.{part}.weight", f"model.layers.{layer}.self_attn.{part}.bias"


def score_shapes(config: Mapping[str, Any], liger: LigerConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a conversion needs from a fit; most conversions need none.

    Args:
        config: config.json of the model.
        liger: The conversion.
    """
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config.get("num_hidden_layers", 0)):
        if layer not in liger.unchanged and liger.for_layer(layer).foresees:
            shapes |= dict(zip(score_names(layer), ((heads, config["hidden_size"]), (heads,)), strict=True))
        if layer not in liger.unchanged and liger.celled:
            rows = heads, liger.cells
            shapes |= dict(zip(score_names(layer, "cell_proj"), ((*rows, width), rows), strict=True))
    return shapes
