"""The families of checkpoints: which transformers classes they are, and the few facts that others need of them.

A new family is a row of `FAMILIES`. Nothing here imports torch before a row is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ligerexport.errors import CheckpointError, close_matches

if TYPE_CHECKING:
    import torch

PREFIX = "liger_"
"""What a converted checkpoint's `model_type` starts with."""

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the text."""


@dataclass(frozen=True)
class Family:
    """One family of decoder-only Transformers in transformers.

    Attributes:
        model_type: Value of `model_type` in its config.json.
        prefix: What its classes' names start with.
        qk_norm: Whether each query and key head is normed before rotary embedding.
    """

    model_type: str
    prefix: str
    qk_norm: bool = False

    def attribute(self, suffix: str) -> Any:
        """Return the family's class whose name ends in `suffix`, such as `ForCausalLM` or `RotaryEmbedding`."""
        package = f"transformers.models.{self.model_type}"
        module = "configuration" if suffix == "Config" else "modeling"
        return getattr(import_module(f"{package}.{module}_{self.model_type}"), self.prefix + suffix)

    def rope(self, config: Any) -> tuple[torch.Tensor, float]:
        """Return the rotary frequencies `[R]` in radians a token, and the factor on cosine and sine.

        Raises:
            CheckpointError: The frequencies depend on the length of the text.
        """
        kind = config.rope_parameters["rope_type"]
        if kind not in STATIC_ROPE:
            raise CheckpointError(
                f"rotary embedding of type '{kind}' changes with the length of the text",
                hint=f"supported: {', '.join(STATIC_ROPE)}",
            )
        embedding = self.attribute("RotaryEmbedding")(config)
        return embedding.inv_freq.float(), float(embedding.attention_scaling)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3", qk_norm=True),
    )
}


def get_family(model_type: str) -> Family:
    """Return the family of a checkpoint, converted or not.

    Args:
        model_type: Value of `model_type` in config.json.

    Raises:
        CheckpointError: No such family; the hint names close matches.
    """
    name = model_type.removeprefix(PREFIX)
    if name not in FAMILIES:
        raise CheckpointError(f"unknown family '{name}'", hint=close_matches(name, FAMILIES))
    return FAMILIES[name]
