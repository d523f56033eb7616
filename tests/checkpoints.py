"""Tiny converted checkpoints with random weights, large enough that an error in any of them shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ligerexport.config import LigerConfig
from ligerexport.families import PREFIX, get_family

SIZES: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip

MEMORY = LigerConfig(
    window=12, sinks=2, slots=(("recent_use", 3), ("peak_effect", 4), ("novelty", 5)),
    attention_weight=1.0, recurrence_weight=0.0,
)  # fmt: skip


def make_checkpoint(
    path: Path,
    liger: LigerConfig,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    **sizes: Any,
) -> Path:
    """Write a converted checkpoint of a random model."""
    torch.manual_seed(0)
    row = get_family(family)
    model = row.attribute("ForCausalLM")(row.attribute("Config")(**SIZES | sizes)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path, max_shard_size=shard)
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": PREFIX + family,
        "architectures": [f"Liger{row.prefix}ForCausalLM"],
        "liger": liger.to_dict(),
    }
    (path / "config.json").write_text(json.dumps(config))
    return path
