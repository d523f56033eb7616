"""Tiny converted checkpoints with random weights, large enough that an error in any weight shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ligerexport.checkpoint.convert import converted_config
from ligerexport.checkpoint.fitted import is_fitted
from ligerexport.layers.mixer import model_classes
from ligerexport.model.config import PRESETS, LigerConfig
from ligerexport.model.families import get_family
from ligerexport.model.gates import GATES

SIZES: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
OF_FAMILY: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                    "query_pre_attn_scalar": 20, "final_logit_softcapping": 5.0, "rope_parameters": {
                        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                    }},
    "granite": {"embedding_multiplier": 6.0, "attention_multiplier": 0.4, "residual_multiplier": 0.3,
                "logits_scaling": 1.7},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
             "original_max_position_embeddings": 45},
    "smollm3": {"no_rope_layer_interval": 2},
}  # fmt: skip
"""Settings that some families need in addition to `SIZES`."""

EVERY_GATE = [*GATES, "hgrn2:0.3", "gsa:4"]
"""All gates, also with the number that some of them take."""
SOME_GATES = ["gla", "hgrn2", "gsa:4", "mlstm"]
"""One gate of each kind of state, and of each way to fill it."""
BUILT = [name for name, preset in PRESETS.items() if not preset.config.ragged]
"""Presets that targets can build."""
FUSED = [name for name in BUILT if PRESETS[name].config.fuses]
"""Presets of which fused kernels, and so the TensorRT plugin, compute a whole step."""

MEMORY = LigerConfig(
    window=12, sinks=2, slots=(("recent_use", 3), ("peak_effect", 4), ("novelty", 5)),
    attention_weight=1.0, recurrence_weight=0.0,
)  # fmt: skip
FORESIGHT = replace(MEMORY, slots=(("recent_use", 5), ("learned", 7)))


def make_checkpoint(
    path: Path,
    liger: LigerConfig,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """Write a converted checkpoint of a random model."""
    torch.manual_seed(seed)
    config_class, model_class = model_classes(get_family(family))
    config = config_class(**SIZES | OF_FAMILY.get(family, {}) | sizes)
    model = model_class(config_class.from_dict(converted_config(config.to_dict(), liger))).to(dtype)
    disturb(model)
    for name, parameter in model.named_parameters():
        if is_fitted(name):
            parameter.data = parameter.float()
    model.save_pretrained(path, max_shard_size=shard)
    return path


def make_transformer(path: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """Write a random Transformer as transformers' `save_pretrained` does, with a tokenizer file."""
    torch.manual_seed(0)
    row = get_family(family)
    model = row.attribute("ForCausalLM")(row.attribute("Config")(**SIZES | OF_FAMILY.get(family, {}) | sizes)).to(dtype)
    disturb(model)
    model.save_pretrained(path)
    Tokenizer(WordLevel({"?": 0}, "?")).save(str(path / "tokenizer.json"))
    return path


@torch.no_grad()
def disturb(model: torch.nn.Module) -> None:
    """Change biases from 0 and norms from 1."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
